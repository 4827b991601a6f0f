"""Generated text: transformers' own tokens, and relevance that is each prefix's own, from one shared pass."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

import dlbc
from dlbc_runtime.errors import InputError
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.generation import GenerationExplanation
from dlbc_runtime.sampler import Sampler
from tests import zoo
from tests.test_models import PRESETS, compiled, distance

pytest.importorskip("transformers")

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [21, 22, 23]]
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {}, "temperature": {"temperature": 0.7, "seed": 3}, "top_k": {"top_k": 5, "seed": 4},
    "top_p": {"top_p": 0.6, "seed": 5}, "beam_search": {"num_beams": 3, "length_penalty": 0.5},
    "greedy, penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4,
                          "bad_words_ids": [[46], [43]]},
    "top_k, several": {"top_k": 20, "seed": 6, "num_return_sequences": 2},
    "beam_search, several": {"num_beams": 4, "num_return_sequences": 3, "early_stopping": True}}
HF: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False}, "temperature": {"do_sample": True, "top_k": 0}, "top_k": {"do_sample": True},
    "top_p": {"do_sample": True, "top_k": 0}, "beam_search": {"do_sample": False}}


def case(name: str) -> zoo.Case:
    return compiled(name).case


@functools.lru_cache(maxsize=4)
def explainer(name: str, rules: str = "attnlrp", backend: str = "torch") -> Explainer:
    return compiled(name).explainer(rules, backend)


def sampler(name: str, rules: str = "attnlrp", backend: str = "torch") -> Sampler:
    return explainer(name, rules, backend).sampler()


def as_list(found: GenerationExplanation | list[GenerationExplanation]) -> list[GenerationExplanation]:
    return found if isinstance(found, list) else [found]


@functools.lru_cache(maxsize=1)
def t5() -> tuple[Any, Explainer]:
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                                       pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
        model = zoo.randomise(transformers.T5ForConditionalGeneration(config), 2.0)
    ids = torch.tensor([[5, 6, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :3]}
    return model, dlbc.compile(model, inputs, rules="attnlrp", cache=False)


# --- tokens are transformers' own --------------------------------------------------------------------

def theirs(model: Any, rows: list[list[int]], strategy: str, options: dict[str, Any], *, left: bool = True
           ) -> list[list[int]]:
    """What `model.generate` returns for a padded batch, without padding."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        own = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, own], mask[number, own] = torch.tensor(row), 1
    own_options = {**HF[strategy], **options}
    seed = own_options.pop("seed", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, use_cache=True, pad_token_id=0,
                               **own_options)
    each = own_options.get("num_return_sequences", 1)
    start = width if left else 1
    ends = model.generation_config.eos_token_id
    result = []
    for number, sequence in enumerate(found.tolist()):
        new = sequence[start:]
        new = new[:new.index(ends) + 1] if ends in new else new
        result.append((rows[number // each] if left else [0]) + new)
    return result


@pytest.mark.parametrize("options", STRATEGIES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tokens_are_those_of_generate(name: str, options: str) -> None:
    strategy, given = options.partition(",")[0], STRATEGIES[options]
    for rows in (PROMPTS[:1], PROMPTS):
        found = as_list(sampler(name).generate(rows, strategy=strategy, max_new_tokens=6, explain_tokens=None, **given))
        assert [one.ids.tolist() for one in found] == theirs(case(name).model, rows, strategy, given)


@pytest.mark.parametrize("options", STRATEGIES)
def test_tokens_of_an_encoder_decoder_are_those_of_generate(options: str) -> None:
    model, own = t5()
    strategy, given = options.partition(",")[0], STRATEGIES[options]
    found = as_list(own.sampler().generate(PROMPTS, strategy=strategy, max_new_tokens=6, explain_tokens=None, **given))
    assert [one.ids.tolist() for one in found] == theirs(model, PROMPTS, strategy, given, left=False)
    assert [one.source_ids.tolist() for one in found[::len(found) // 3]] == PROMPTS


def test_seeds_leave_torchs_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, other = (
        sampler("llama").generate(PROMPTS[0], strategy="temperature", temperature=3.0, seed=seed, explain_tokens=None)
        for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.ids.tolist() == second.ids.tolist() != other.ids.tolist()


def test_what_ended_a_row_is_its_last_token() -> None:
    """An end token ends it, wherever it comes in a batch; a row of its own length is not padded."""
    end = int(sampler("llama").generate(PROMPTS[0], max_new_tokens=3, explain_tokens=None).ids[-1])
    found = as_list(sampler("llama").generate(PROMPTS, max_new_tokens=6, eos_token_id=end))
    assert found[0].new_ids.tolist().index(end) == len(found[0].new_ids) - 1 <= 2
    assert all(end not in one.new_ids[:-1] for one in found)
    assert [len(one.relevance) for one in found] == [len(one.new_ids) for one in found]


# --- relevance is that of each prefix alone ----------------------------------------------------------

def check_prefixes(own: Explainer, found: GenerationExplanation, mask: bool = True, most: float = 1e-4) -> None:
    """Must-hold 1: each row is the explanation of the prefix alone, and nothing from its own position on."""
    for row, number in enumerate(found.explained):
        position = found.prompt_length + int(number)
        ids = found.ids[None, :position]
        inputs = {"input_ids": ids, **({"attention_mask": np.ones_like(ids)} if mask else {})}
        alone = own(**inputs, target=dlbc.Target.token(int(found.ids[position])))
        assert distance(found.relevance[row, :position], alone.relevance["input_ids"][0]) <= most
        assert not found.relevance[row, position:].any()
        assert found.values[row] == pytest.approx(alone.target[0].value, rel=1e-4, abs=1e-5)
        assert found.probabilities[number] == pytest.approx(alone.target[0].probability, rel=1e-4)


CAUSAL = [name for name in zoo.CAUSAL if name not in ("llama_embeds", "llama_classifier")]


@pytest.mark.parametrize("name", CAUSAL)
def test_relevance_is_that_of_the_prefix_for_every_model(name: str) -> None:
    own = explainer(name)
    mask = "attention_mask" in own.manifest.inputs.names
    for found in as_list(own.sampler().generate(PROMPTS if mask else PROMPTS[:1], max_new_tokens=4)):
        if name != "llama_no_cache_argument":
            check_prefixes(own, found, mask)
        assert found.finished and len(found.explained) == 4


MORE = ("auto", "gamma", "attnlrp-conserving", "dlb-contrastive")


@pytest.mark.parametrize(("rules", "backend"), [*((rules, "torch") for rules in (*PRESETS, *MORE)),
                                                *((rules, "numpy") for rules in PRESETS)])
def test_relevance_is_that_of_the_prefix_for_every_preset(rules: str, backend: str) -> None:
    own = explainer("llama", rules, backend)
    for found in as_list(own.sampler().generate(PROMPTS[:2], max_new_tokens=5)):
        check_prefixes(own, found)


@pytest.mark.parametrize("rules", ["attnlrp", "dlb", "input-x-gradient"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_one_pass_leaves_later_tokens_exactly_nothing(name: str, rules: str) -> None:
    """The call that the sampler makes, looked at before anything is cut off."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 11, 12, 13, 14]])
    found = explainer(name, rules)(input_ids=ids, attention_mask=torch.ones_like(ids), target=[
        dlbc.Target.token(17, position) for position in (0, 3, 4, 8)])
    for row, position in enumerate((0, 3, 4, 8)):
        relevance = found.relevance["input_ids"][row, 0]
        assert relevance[:position + 1].any() and not relevance[position + 1:].any()


def test_padding_on_either_side_changes_nothing() -> None:
    plain = as_list(sampler("llama").generate(PROMPTS, max_new_tokens=4))
    for left in (True, False):
        ids, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
        for number, row in enumerate(PROMPTS):
            own = slice(7 - len(row), 7) if left else slice(0, len(row))
            ids[number, own], mask[number, own] = torch.tensor(row), 1
        found = as_list(sampler("llama").generate({"input_ids": ids, "attention_mask": mask}, max_new_tokens=4))
        for one, other in zip(plain, found, strict=True):
            assert one.ids.tolist() == other.ids.tolist()
            np.testing.assert_array_equal(one.relevance, other.relevance)


def test_groups_of_tokens_and_budgets_do_not_change_relevance(monkeypatch: pytest.MonkeyPatch) -> None:
    import dlbc_runtime.generated_relevance as module

    own = explainer("llama")
    monkeypatch.setattr(module, "SINGLE", (1000, 1))
    monkeypatch.setattr(module, "FORWARD", 1000)
    calls: list[int] = []
    monkeypatch.setattr(module, "_explain", lambda *given, plain=module._explain: (calls.append(len(given[2])),
                                                                                 plain(*given))[1])
    whole = own.sampler().generate(PROMPTS[0], max_new_tokens=12)
    assert calls == [12]
    monkeypatch.setattr(module, "FORWARD", 1)
    split = own.sampler().generate(PROMPTS[0], max_new_tokens=12)
    assert calls[1:] == [4, 4, 4]
    least = own.memory(sizes={"B": 1, "T": 16}, target=dlbc.Target.token(1)).peak.total
    tight = own.sampler().generate(PROMPTS[0], max_new_tokens=12, memory_budget=least * 5 // 4 + 1)
    assert len(calls) > 6
    for other in (split, tight):
        assert distance(whole.relevance, other.relevance) <= 1e-5
    with pytest.raises(InputError, match="memory_budget"):
        own.sampler().generate(PROMPTS[0], max_new_tokens=12, memory_budget=1000)


def test_an_encoder_decoder_is_explained_by_source_and_start() -> None:
    _, own = t5()
    for found in as_list(own.sampler().generate(PROMPTS[:2], max_new_tokens=5, min_new_tokens=5)):
        assert found.prompt_length == 1 and found.source_relevance is not None and found.source_ids is not None
        for row, number in enumerate(found.explained):
            position = 1 + int(number)
            source, ids = found.source_ids[None], found.ids[None, :max(2, position)]
            alone = own(input_ids=source, attention_mask=np.ones_like(source), decoder_input_ids=ids,
                        target=dlbc.Target.token(int(found.ids[position]), position=position - 1))
            assert distance(found.source_relevance[row], alone.relevance["input_ids"][0]) <= 1e-4
            assert distance(found.relevance[row, :max(2, position)], alone.relevance["decoder_input_ids"][0]) <= 1e-4
            assert not found.relevance[row, position:].any()


# --- what else is asked for --------------------------------------------------------------------------

def test_some_tokens_only() -> None:
    whole = sampler("llama").generate(PROMPTS[0], max_new_tokens=6)
    for asked, numbers in (("all", range(6)), (2, range(2)), ([1, -1], [1, 5]), ("none", []), (None, [])):
        some = sampler("llama").generate(PROMPTS[0], max_new_tokens=6, explain_tokens=asked)
        assert some.explained.tolist() == list(numbers)
        assert distance(some.relevance, whole.relevance[list(numbers)]) <= 1e-5 if len(numbers) else True
        np.testing.assert_allclose(some.probabilities, whole.probabilities, rtol=1e-4)
        assert [[i for i, _, _ in one] for one in some.alternatives] == [
            [i for i, _, _ in one] for one in whole.alternatives]


def test_probabilities_and_alternatives_are_the_models() -> None:
    found = sampler("llama").generate(PROMPTS[0], strategy="temperature", temperature=5.0, seed=0, alternatives=3)
    with torch.no_grad():
        logits = case("llama").model(input_ids=torch.from_numpy(found.ids[None])).logits[0]
    wanted = torch.softmax(logits, -1)
    for number, (token, likely) in enumerate(zip(found.new_ids, found.alternatives, strict=True)):
        odds = wanted[found.prompt_length + number - 1]
        assert found.probabilities[number] == pytest.approx(float(odds[token]), rel=1e-4)
        assert [i for i, _, _ in likely] == odds.topk(3).indices.tolist()
        assert [p for _, _, p in likely] == pytest.approx(odds.topk(3).values.tolist(), rel=1e-4)


def test_contrasts_are_differences_of_tokens() -> None:
    own = explainer("llama")
    found = own.sampler().generate(PROMPTS[0], max_new_tokens=4, target=17)
    assert found.target == "contrast" and found.against is not None and set(found.against.tolist()) == {17}
    for row, number in enumerate(found.explained):
        position = found.prompt_length + int(number)
        alone = own(input_ids=found.ids[None, :position], attention_mask=np.ones((1, position), np.int64),
                    target=dlbc.Target.difference(int(found.ids[position]), 17))
        assert distance(found.relevance[row, :position], alone.relevance["input_ids"][0]) <= 1e-4
    runner = own.sampler().generate(PROMPTS[0], max_new_tokens=4, target="alternative")
    assert runner.against.tolist() == [likely[1][0] for likely in runner.alternatives]
    assert (runner.values > 0).all()


def test_log_odds_are_their_gradient_times_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """`target="probability"` under the gradient's rules is the gradient of log(p / (1 - p)) times the embeddings."""
    import dlbc_runtime.target

    monkeypatch.setattr(dlbc_runtime.target, "RIVALS", 95)  # all that there are
    model = case("llama").model
    own = explainer("llama", "input-x-gradient")
    found = own.sampler().generate(PROMPTS[0], max_new_tokens=3, target="probability", multiplier=1.0)
    assert found.target == "probability" and found.against is None
    for row, position in enumerate(found.positions()):
        x = model.get_input_embeddings()(torch.from_numpy(found.ids[None, :position])).detach().requires_grad_(True)
        likely = torch.log_softmax(model(inputs_embeds=x).logits[0, -1], -1)[int(found.ids[position])]
        log_odds = likely - torch.log1p(-likely.exp())
        (gradient,) = torch.autograd.grad(log_odds, x)
        wanted = (gradient * x).sum(-1)[0].detach().numpy()
        assert found.values[row] == pytest.approx(log_odds.item(), rel=1e-4)
        own_row = found.relevance[row, :position]
        cosine = float(own_row @ wanted / np.linalg.norm(own_row) / np.linalg.norm(wanted))
        assert cosine == pytest.approx(1, abs=1e-6)


def test_layers_are_by_name_and_in_order() -> None:
    found = sampler("llama").generate(PROMPTS[0], max_new_tokens=3, layers=True)
    assert list(found.layers) == ["model.layers.0", "model.layers.1"]
    for array in found.layers.values():
        assert array.shape == found.relevance.shape
        for row, position in enumerate(found.positions()):
            assert array[row, :position].any() and not array[row, position:].any()
    one = sampler("llama").generate(PROMPTS[0], max_new_tokens=3, layers="model.layers.0")
    np.testing.assert_allclose(one.layers["model.layers.0"], found.layers["model.layers.0"], rtol=1e-4, atol=1e-4)


def test_sinks_apart_are_the_first_tokens_relevance() -> None:
    kept = sampler("llama").generate(PROMPTS[0], max_new_tokens=3)
    apart = sampler("llama").generate(PROMPTS[0], max_new_tokens=3, sinks="apart")
    np.testing.assert_array_equal(apart.sinks, kept.relevance[:, 0])
    np.testing.assert_array_equal(apart.with_sinks("keep").relevance, kept.relevance)


def test_a_given_continuation_is_explained_as_if_generated() -> None:
    found = sampler("llama").generate(PROMPTS[0], max_new_tokens=5)
    given = sampler("llama").explain(PROMPTS[0], found.new_ids)
    np.testing.assert_array_equal(found.relevance, given.relevance)
    assert given.strategy == "given"
