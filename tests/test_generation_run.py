"""A generation as it is used: bad input, interruption, streaming, files, words, the terminal."""

from __future__ import annotations

import concurrent.futures
import functools
import io
import logging
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import dlbc
from dlbc_runtime.errors import ArtifactError, InputError
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.generated_words import word_spans
from dlbc_runtime.generation import GenerationExplanation
from dlbc_runtime.sampler import GenerationInterrupted, Sampler, Step
from tests import generated, zoo

pytest.importorskip("transformers")

PROMPT = [5, 6, 7, 8, 9]


class Letters:
    """A tokenizer of one character a token, as much of one as a sampler asks for."""

    def __init__(self, size: int = 96) -> None:
        self.size, self.eos_token_id, self.pad_token_id = size, 2, 0

    def __len__(self) -> int:
        return self.size

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(one) - 31 for one in text]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [chr(int(i) + 31) for i in ids]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.convert_ids_to_tokens(ids))


@functools.lru_cache(maxsize=1)
def explainer() -> Explainer:
    case = zoo.CASES["llama"]()
    return dlbc.compile(case.model, case.kwargs, rules="attnlrp", cache=False)


def sampler(tokenizer: object = None) -> Sampler:
    return explainer().sampler(tokenizer)


# --- bad input ---------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "an empty text": (lambda: sampler(Letters()).generate(""), "prompt is empty"),
    "empty ids": (lambda: sampler().generate([]), "empty"),
    "one row of several empty": (lambda: sampler().generate([PROMPT, []]), "prompt 1 is empty"),
    "a prompt longer than the context": (lambda: sampler().generate([5] * 41), "context of 40"),
    "no room for new tokens": (lambda: sampler().generate([5] * 30, max_new_tokens=11), "context of 40"),
    "a text without a tokenizer": (lambda: sampler().generate("Hello"), "no tokenizer"),
    "the tokenizer of another model": (lambda: sampler(Letters(97)), "another model"),
    "ids of another model": (lambda: sampler().generate([5, 96]), "holds token 96"),
    "what is no prompt": (lambda: sampler().generate(3.5), "prompt"),
    "a mask in the middle": (lambda: sampler().generate(torch.tensor([[5, 6, 7]]),
                                                        attention_mask=torch.tensor([[1, 0, 1]])), "middle"),
    "an index beyond what comes": (lambda: sampler().generate(PROMPT, max_new_tokens=3, explain_tokens=[3]), "holds 3"),
    "too many tokens to explain": (lambda: sampler().generate(PROMPT, max_new_tokens=3, explain_tokens=4), "of 3 new"),
    "words for what to explain": (lambda: sampler().generate(PROMPT, explain_tokens="some"), "explain_tokens"),
    "beams with a contrast": (lambda: sampler().generate(PROMPT, strategy="beam_search", target=7), "beam search"),
    "beams told token by token": (lambda: sampler().generate(PROMPT, strategy="beam_search", callback=print),
                                  "beam search"),
    "a causal model with a decoder's prompt": (lambda: sampler().generate(PROMPT, decoder_prompt=[1]), "no decoder"),
    "an unknown strategy": (lambda: sampler().generate(PROMPT, strategy="magic"), "one of greedy"),
    "a temperature for greedy": (lambda: sampler().generate(PROMPT, temperature=0.5), "means nothing"),
    "beams for sampling": (lambda: sampler().generate(PROMPT, strategy="top_k", num_beams=3), "means nothing"),
    "several of greedy": (lambda: sampler().generate(PROMPT, num_return_sequences=2), "one result"),
    "more than there are beams": (lambda: sampler().generate(PROMPT, strategy="beam_search", num_beams=2,
                                                             num_return_sequences=3), "of 2 beams"),
    "a top_p above 1": (lambda: sampler().generate(PROMPT, strategy="top_p", top_p=1.5), "at most 1"),
    "a temperature of 0": (lambda: sampler().generate(PROMPT, strategy="temperature", temperature=0), "above 0"),
    "no new tokens": (lambda: sampler().generate(PROMPT, max_new_tokens=0), "at least 1"),
    "a stop text without a tokenizer": (lambda: sampler().generate(PROMPT, stop="."), "no tokenizer"),
    "a contrast beyond the vocabulary": (lambda: sampler().generate(PROMPT, target=96), "no token"),
    "a contrast of several tokens": (lambda: sampler(Letters()).generate(PROMPT, target="ab"), "2 tokens"),
    "an option nobody knows": (lambda: sampler().generate(PROMPT, colour="red"), "transformers cannot"),
    "sinks that are none": (lambda: sampler().generate(PROMPT, sinks="away"), "keep"),
    "when that is never": (lambda: sampler().generate(PROMPT, explain_when="before"), "during"),
    "a last token while it is not known": (lambda: sampler().generate(PROMPT, explain_tokens=[-1],
                                                                      explain_when="during"), "not known"),
    "a multiplier of 0": (lambda: sampler().generate(PROMPT, multiplier=0), "multiplier is 0"),
    "layers that are none": (lambda: sampler().generate(PROMPT, layers="encoder.*"), "matches no module"),
    "a dict without ids": (lambda: sampler().generate({"text": "Hello"}), "no `input_ids`"),
    "half a token to explain": (lambda: sampler().generate(PROMPT, explain_tokens=1.5), "explain_tokens=1.5"),
    "the last tokens while they are not known": (lambda: sampler().generate(
        PROMPT, explain_tokens=range(-2, 0), explain_when="during"), "not known"),
    "a callback that is none": (lambda: sampler().generate(PROMPT, callback=3), "callback=3"),
    "a stop that is no text": (lambda: sampler(Letters()).generate(PROMPT, stop=[3]), "stop="),
    "sampling by two names": (lambda: sampler().generate(PROMPT, do_sample=True), "do_sample is not given"),
    "a length by two names": (lambda: sampler().generate(PROMPT, max_length=9), "max_length is not given"),
    "settings that would be ignored": (lambda: sampler().generate(PROMPT, generation_config=object()),
                                       "generation_config is not given"),
    "a name for a tokenizer": (lambda: sampler("gpt2"), "tokenizer is str"),
    "a text continued by nothing": (lambda: sampler(Letters()).explain("Hello", ""), "continuation: it is empty"),
    "more than the context to explain": (lambda: sampler().explain([5] * 30, [6] * 11), "41 tokens: more than"),
    "a budget that is too small": (lambda: sampler().generate(PROMPT, memory_budget="1KB"), "memory_budget"),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_is_an_error_with_a_remedy(what: str) -> None:
    run, words = WRONG[what]
    with pytest.raises(InputError, match=words) as caught:
        run()
    assert caught.value.hint


def test_a_model_without_generate() -> None:
    case = zoo.CASES["mlp"]()
    own = dlbc.compile(case.model, case.args, cache=False)
    with pytest.raises(InputError, match="no `generate`"):
        own.sampler()
    case.model.generate = print  # which is not that of transformers
    with pytest.raises(InputError, match="no `generate`"):
        own.sampler()


def test_an_explainer_without_its_model(tmp_path: Path) -> None:
    explainer().save(tmp_path / "llama.dlbc", weights=True)
    with pytest.raises(ArtifactError, match="no model") as caught:
        dlbc.load(tmp_path / "llama.dlbc").sampler()
    assert "dlbc.load" in caught.value.hint
    again = dlbc.load(tmp_path / "llama.dlbc", explainer().model).sampler().generate(PROMPT, max_new_tokens=2)
    np.testing.assert_array_equal(again.relevance, sampler().generate(PROMPT, max_new_tokens=2).relevance)


def test_a_model_in_training_mode() -> None:
    model = explainer().model
    model.train()
    try:
        with pytest.raises(InputError, match="training mode"):
            sampler().generate(PROMPT)
    finally:
        model.eval()


def test_an_encoder_decoder_and_causal_options() -> None:
    import transformers

    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                                   pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    with torch.random.fork_rng(devices=[]):
        model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    own = dlbc.compile(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                               "decoder_input_ids": ids[:, :3]}, rules="attnlrp", cache=False).sampler()
    with pytest.raises(InputError, match="encoder-decoder"):
        own.generate(PROMPT, sinks="apart")
    found = own.generate(PROMPT, max_new_tokens=3, decoder_prompt=[0, 9])
    assert found.ids[:2].tolist() == [0, 9] and found.prompt_length == 2
    wanted = model.generate(torch.tensor([PROMPT]), decoder_input_ids=torch.tensor([[9]]), max_new_tokens=3,
                            do_sample=False)
    for prompt in ([9], [0, 9]):  # `generate` puts the start token before it
        assert own.generate(PROMPT, max_new_tokens=3, decoder_prompt=prompt).ids.tolist() == wanted[0].tolist()
    with pytest.raises(InputError, match="with_sinks"):
        found.with_sinks("apart")


def test_what_cannot_be_explained_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    ids = sampler().generate(PROMPT, max_new_tokens=4, explain_tokens=None).new_ids
    against = int(ids[1])
    found = sampler().generate(PROMPT, max_new_tokens=4, target=against)
    assert found.explained.tolist() == [n for n in range(4) if ids[n] != against]
    assert "very token" in caplog.text
    end = int(ids[0])
    found = sampler().generate(PROMPT, max_new_tokens=4, eos_token_id=end, explain_tokens=[0, 3])
    assert found.explained.tolist() == [0] and "ended after 1" in caplog.text


def least(length: int) -> int:
    """The bytes that explaining one token after `length` of them takes at least."""
    ids = torch.full((1, length), 5)
    with pytest.raises(InputError, match="memory_budget") as caught:
        explainer().memory(input_ids=ids, attention_mask=torch.ones_like(ids), memory_budget=1,
                           target=dlbc.Target.token(5, length - 1))
    return int(caught.value.hint.split()[3])


@pytest.mark.parametrize("options", [{"memory_budget": 1000}, {"min_new_tokens": 9}, {"explain_tokens": [8]}])
def test_a_budget_that_cannot_do_is_said_before_generating(options: dict[str, Any]) -> None:
    asked = {"memory_budget": (least(len(PROMPT)) + least(len(PROMPT) + 8)) // 2, "max_new_tokens": 9, **options}
    own, steps = sampler(), []
    with pytest.raises(InputError, match="memory_budget"):
        own.generate(PROMPT, callback=steps.append, **asked)
    # That a ninth token comes is certain only where so many are asked for.
    assert len(steps) == (9 if "explain_tokens" in options else 0)


def test_tokens_are_kept_when_explaining_them_fails() -> None:
    own = sampler()
    budget = (least(len(PROMPT)) + least(len(PROMPT) + 8)) // 2
    with pytest.raises(InputError, match="memory_budget"):
        own.generate(PROMPT, max_new_tokens=9, memory_budget=budget)
    assert isinstance(own.partial, GenerationExplanation) and not own.partial.finished
    assert len(own.partial.new_ids) == 9 and len(own.partial.explained) < 9


# --- interruption, progress, streaming ---------------------------------------------------------------

def test_an_interrupted_explanation_keeps_finished_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    import dlbc_runtime.generated_relevance as module

    monkeypatch.setattr(module, "FORWARD", 1)  # groups of three
    whole = sampler().generate(PROMPT, max_new_tokens=9)
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append((done, total))
        if done >= 6:
            raise KeyboardInterrupt

    own = sampler()
    with pytest.raises(GenerationInterrupted, match=r"6 of 9 tokens are\s+explained") as caught:
        own.generate(PROMPT, max_new_tokens=9, progress=stop)
    partial = caught.value.partial
    assert partial is own.partial and isinstance(partial, GenerationExplanation)
    assert calls == [(3, 9), (6, 9)]
    assert not partial.finished and partial.explained.tolist() == list(range(6))
    assert partial.ids.tolist() == whole.ids.tolist()
    np.testing.assert_array_equal(partial.relevance, whole.relevance[:6])
    np.testing.assert_allclose(partial.probabilities, whole.probabilities, rtol=1e-4)
    rest = own.explain(partial.ids[:5], partial.new_ids, explain_tokens=[6, 7, 8])
    np.testing.assert_allclose(rest.relevance, whole.relevance[6:], rtol=1e-4, atol=1e-4)
    assert own.partial is None


def test_an_interrupted_generation_keeps_its_tokens() -> None:
    whole = sampler().generate(PROMPT, max_new_tokens=5)
    steps: list[Step] = []

    def stop(step: Step) -> None:
        steps.append(step)
        if step.number == 2:
            raise KeyboardInterrupt

    for when in ("after", "during"):
        with pytest.raises(GenerationInterrupted, match="after 3 new tokens") as caught:
            sampler().generate(PROMPT, max_new_tokens=5, callback=stop, explain_when=when)
        partial = caught.value.partial
        assert isinstance(partial, GenerationExplanation)
        assert partial.new_ids.tolist() == whole.new_ids[:3].tolist() and not partial.finished
        assert len(partial.explained) == (3 if when == "during" else 0)
    np.testing.assert_allclose(partial.relevance, whole.relevance[:3, :8], rtol=1e-4, atol=1e-4)


def test_a_callback_sees_each_token_and_may_end_it() -> None:
    whole = sampler(Letters()).generate(PROMPT, max_new_tokens=5)
    steps: list[Step] = []
    found = sampler(Letters()).generate(PROMPT, max_new_tokens=5, callback=lambda step: steps.append(step) or (
        step.number < 3))
    assert [step.id for step in steps] == whole.new_ids[:4].tolist() == found.new_ids.tolist()
    assert [step.text for step in steps] == list(whole.new_tokens[:4])
    assert all(step.relevance is None and step.probability is None for step in steps)
    assert not found.finished and len(found.explained) == 4


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError])
def test_an_error_of_a_callback_is_the_callers_own(error: type[Exception]) -> None:
    def fail(step: Step) -> None:
        if step.number == 2:
            raise error("of the caller")

    own = sampler()
    with pytest.raises(error, match="of the caller"):
        own.generate(PROMPT, max_new_tokens=5, callback=fail)
    assert isinstance(own.partial, GenerationExplanation) and not own.partial.finished
    assert own.partial.new_ids.tolist() == sampler().generate(PROMPT, max_new_tokens=3).new_ids.tolist()


def test_tokens_can_be_explained_while_they_come() -> None:
    rows = [PROMPT, [11, 12]]
    whole = sampler().generate(rows, max_new_tokens=4)
    steps: list[Step] = []
    found = sampler().generate(rows, max_new_tokens=4, callback=steps.append, explain_when="during")
    for step in steps:
        of = whole[step.row]
        np.testing.assert_allclose(step.relevance, of.relevance[step.number, :of.prompt_length + step.number],
                                   rtol=1e-3, atol=1e-4)
        assert step.probability == pytest.approx(of.probabilities[step.number], rel=1e-4)
    assert len(steps) == 8
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_allclose(one.relevance, other.relevance, rtol=1e-3, atol=1e-4)


def test_stop_texts_end_it() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    letters = {"<pad>": 0, "Ġ": 1, **{chr(i + 31): i for i in range(2, 96)}}
    bytes_ = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    bytes_.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="!", pad_token="<pad>")
    own = explainer().sampler(tokenizer)
    whole = own.generate("Seven", max_new_tokens=6)
    assert whole.prompt_length == 5 and whole.text == "".join(chr(i + 31) for i in whole.new_ids)
    stopped = own.generate(["Seven", "It"], max_new_tokens=6, stop=whole.text[:2])
    assert stopped[0].text == whole.text[:2] and len(stopped[1].new_ids) == 6


@pytest.mark.parametrize("tokens", [(0, 2), range(0, 3, 2), np.array([0, 2]), torch.tensor([0, 2])])
def test_indices_in_any_form(tokens: Any) -> None:
    assert sampler().generate(PROMPT, max_new_tokens=4, explain_tokens=tokens).explained.tolist() == [0, 2]
    assert sampler().generate(PROMPT, max_new_tokens=4, explain_tokens=np.int64(2)).explained.tolist() == [0, 1]


def test_padding_that_is_no_token() -> None:
    """Configurations of some models have -1 for "no padding"; rows of different lengths are padded all the same."""
    case = zoo.CASES["llama"]()
    case.model.config.pad_token_id = case.model.generation_config.pad_token_id = -1
    own = dlbc.compile(case.model, case.kwargs, rules="attnlrp", cache=False).sampler()
    found = own.generate([PROMPT, [11]], max_new_tokens=2)
    wanted = sampler().generate([PROMPT, [11]], max_new_tokens=2)
    assert [one.ids.tolist() for one in found] == [one.ids.tolist() for one in wanted]


def everything_of(model: torch.nn.Module) -> dict[str, object]:
    """What there is to change in a model and in the process around it, in a form that compares."""
    own: Any = model
    modules = {name: (module.training, sorted(module.__dict__), *(
        len(getattr(module, hooks)) for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")))
        for name, module in model.named_modules()}
    weights = {name: (weight.data_ptr(), weight._version, weight.requires_grad, weight.grad is None, weight.tolist())
               for name, weight in [*model.named_parameters(), *model.named_buffers()]}
    return {"config": own.config.to_dict(), "generation_config": own.generation_config.to_dict(),
            "objects": (id(own.config), id(own.generation_config), type(model), model.forward.__func__),
            "modules": modules, "weights": weights,
            "attention": own.config._attn_implementation, "torch": torch.random.get_rng_state().tolist(),
            "numpy": np.random.get_state()[1].tolist(), "python": random.getstate(),
            "flags": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
                      torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
                      torch.backends.cudnn.benchmark, torch.backends.mkldnn.is_available()),
            "environment": dict(os.environ), "warnings": list(warnings.filters)}


def test_nothing_of_the_model_or_the_process_changes(tmp_path: Path) -> None:
    case = zoo.CASES["llama"]()
    case.model.generation_config.temperature = 0.9  # settings of the user's
    next(case.model.parameters()).requires_grad_(False)
    before, steps = everything_of(case.model), []
    own = dlbc.compile(case.model, case.kwargs, rules="attnlrp", cache=False)
    assert everything_of(case.model) == before
    for options in ({}, {"strategy": "temperature", "seed": 1}, {"strategy": "beam_search"}, {"layers": True},
                    {"target": "alternative", "explain_when": "during", "callback": steps.append}):
        own.sampler(Letters()).generate([PROMPT, [11]], max_new_tokens=3, **options)
        assert everything_of(case.model) == before, options
    own.sampler().explain(PROMPT, [4, 5]).words().save(tmp_path / "found.html")
    own.run_task("generation", [PROMPT], max_new_tokens=2, return_scores=True, return_layerwise_output=True)
    assert everything_of(case.model) == before


def test_samplers_of_one_explainer_work_side_by_side() -> None:
    rows = [[5, 6, 7, 8, 9], [11, 12], [20, 21, 22], [30]]
    alone = [sampler().generate(row, max_new_tokens=4) for row in rows]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda row: sampler().generate(row, max_new_tokens=4), rows * 2))
    for one, other in zip(together, alone * 2, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        np.testing.assert_allclose(one.relevance, other.relevance, rtol=1e-4, atol=1e-4)


# --- words, files, the terminal ----------------------------------------------------------------------

EXAMPLES: dict[str, Callable[[], GenerationExplanation]] = {
    "plain": generated.example, "some": lambda: generated.example(explained=(1, 4), contrast=True, finished=False),
    "sinks": lambda: generated.example(sinks=True), "translated": generated.translated,
    "words": lambda: generated.example().words()}


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_files_come_back(name: str, suffix: str, tmp_path: Path) -> None:
    found = EXAMPLES[name]()
    again = GenerationExplanation.load(found.save(tmp_path / f"found{suffix}"))
    assert again.to_dict() == found.to_dict()
    assert list(again.layers) == list(found.layers) and again.method == found.method


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_damaged_and_foreign_files_are_refused(suffix: str, tmp_path: Path) -> None:
    path = generated.example().save(tmp_path / f"found{suffix}")
    content = path.read_bytes()
    for wrong in (content[:-9], content.replace(b'"prompt_length":6', b'"prompt_length":7'),
                  content.replace(b'"finished":true', b'"finished":null'), content.replace(b'"ids"', b'"idz"'),
                  content.replace(b'\\"prompt_length\\":6', b'\\"prompt_length\\":9'), b"", b"{}"):
        if wrong != content:
            path.write_bytes(wrong)
            with pytest.raises(ArtifactError) as caught:
                GenerationExplanation.load(path)
            assert caught.value.hint
    other = tmp_path / f"other{suffix}"
    explainer()([PROMPT]).save(other)
    with pytest.raises(ArtifactError, match="not an explained generation"):
        GenerationExplanation.load(other)
    with pytest.raises(ArtifactError, match="cannot be read"):
        GenerationExplanation.load(tmp_path / f"none{suffix}")
    with pytest.raises(InputError, match="cannot write"):
        generated.example().save(tmp_path / "found.txt")


def test_arrays_that_do_not_fit_are_refused() -> None:
    from dataclasses import replace

    found = generated.example()
    for wrong in ({"relevance": found.relevance[:, :-1]}, {"probabilities": found.probabilities[1:]},
                  {"explained": found.explained + 1}, {"prompt_length": 13}, {"tokens": found.tokens[1:]}):
        with pytest.raises(InputError):
            replace(found, **wrong)


def test_top_names_the_strongest_sources() -> None:
    found = generated.example()
    for by, sign in (("positive", 1), ("negative", -1)):
        for one in found.top(1, by=by):
            row = sign * found.relevance[one.seed]
            assert one.index[0] == row.argmax() and one.name == found.tokens[one.index[0]]
    source = next(one for one in generated.translated().top(5) if one.input == "source")
    assert generated.translated().source_tokens[source.index[0]] == source.name
    with pytest.raises(InputError, match="unknown order"):
        found.top(1, by="size")  # type: ignore[arg-type]


def test_words_are_their_tokens_together() -> None:
    found = generated.example().words()
    assert found.tokens == ("<s>", "The", " capital", " of", " France", " is", " Paris", ",", " the", " capital", ".")
    assert found.prompt_length == 6 and found.spans is not None and found.spans[9].tolist() == [9, 11]
    plain = generated.example()
    assert found.probabilities[3] == pytest.approx(plain.probabilities[3] * plain.probabilities[4])
    np.testing.assert_allclose(found.relevance[3, 2], plain.relevance[3:5, 2].mean(), rtol=1e-5)
    assert found.words().tokens == found.tokens
    assert word_spans(["don", "'t", " well", "-", "known", "\n", "x"]).tolist() == [[0, 2], [2, 5], [5, 6], [6, 7]]


@given(st.lists(st.text(alphabet="ab ,.<>\n", max_size=4), max_size=12), st.integers(0, 12))
def test_words_partition_the_tokens(tokens: list[str], apart: int) -> None:
    spans = word_spans(tokens, (apart,))
    flat = [place for first, after in spans for place in range(first, after)]
    assert flat == list(range(len(tokens)))
    assert apart >= len(tokens) or apart in spans[:, 0]


@given(st.integers(0, 2**32 - 1))
def test_merging_words_keeps_totals(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(6, rng.integers(1, 7), replace=False))
    found = generated.example(explained=tuple(int(row) for row in rows))
    words = found.words()
    owners = np.array([0, 1, 2, 3, 3, 4])[rows]
    wanted = [found.relevance[owners == one].sum(1).mean() for one in np.unique(owners)]
    np.testing.assert_allclose(words.relevance.sum(1), wanted, rtol=1e-4, atol=1e-3)
    assert words.explained.tolist() == np.unique(owners).tolist()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_terminal_shows_tokens_and_their_sources(name: str) -> None:
    found = EXAMPLES[name]()
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(found)
    text = console.export_text()
    for token in found.new_tokens:
        assert token.strip() in text
    assert ("interrupted" in text) == (not found.finished) and ("not explained" in text) == (
        len(found.explained) < len(found.new_ids))
