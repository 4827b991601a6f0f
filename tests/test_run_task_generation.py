"""The task "generation": prompts as people have them, and everything that `run_task` tells about what came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dlbc
from dlbc.errors import InputError
from dlbc_runtime.tasks_files import load_relevance
from tests.test_run_task import Explainer, compiled, seeded
from tests.words import VOCABULARY, causal, tokenizer

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def language() -> Explainer:
    return compiled(causal(), **words())


def words(text: str = "the cat") -> Any:
    return tokenizer(special=False)(text, return_tensors="pt")


def test_generation(language: Explainer) -> None:
    own = tokenizer(special=False)
    result = language.run_task("generation", "the cat", own, max_new_tokens=4, return_relevance=True,
                               return_scores=True)
    wanted = language.sampler(own).generate("the cat", max_new_tokens=4)
    (found,) = result.explanation
    np.testing.assert_array_equal(result["generated_ids"], wanted.ids[None])
    np.testing.assert_array_equal(result["relevance"]["input_ids"], wanted.relevance)
    assert found.text == wanted.text and "predictions" not in result and result["relevance_computed"]
    for row, step in enumerate(result["relevance_trace"]):
        alone = language(torch.from_numpy(wanted.ids[None, :2 + row]), target=int(wanted.ids[2 + row]),
                         attention_mask=torch.ones(1, 2 + row, dtype=torch.int64))
        np.testing.assert_allclose(step["input_ids"], alone.relevance["input_ids"], rtol=1e-3, atol=1e-3)
    for number, step in enumerate(result["scores_trace"]):
        assert step["ids"][0] == wanted.new_ids[number] and len(step["ids"]) == len(set(step["ids"].tolist()))
        assert step["probabilities"][0] == wanted.probabilities[number] and step["probabilities"].sum() <= 1.0001


@pytest.mark.parametrize("form", ["text", "texts", "ids", "mapping", "tuple", "list", "dict"])
def test_prompts_in_any_form(language: Explainer, form: str) -> None:
    given = words()
    ids, mask = given["input_ids"], given["attention_mask"]
    prompt: Any = {"text": "the cat", "texts": ["the cat"], "ids": ids, "mapping": given, "tuple": (ids, mask),
                   "list": ids[0].tolist(), "dict": {"text": "the cat"}}[form]
    own = tokenizer(special=False) if form in ("text", "texts", "dict") else None
    result = language.run_task("generation", prompt, own, max_new_tokens=3)
    wanted = language.model.generate(**given, max_new_tokens=3, do_sample=False)
    np.testing.assert_array_equal(result["generated_ids"][:, :5], wanted)


def test_several_prompts_and_sequences(language: Explainer) -> None:
    own = tokenizer(special=False)
    result = language.run_task("generation", ["the cat", "a big red dog"], own, max_new_tokens=3, return_relevance=True,
                               return_layerwise_output=True, return_scores=True)
    assert len(result["relevance_trace"]) == sum(len(one.explained) for one in result.explanation) == len(
        result["layerwise_output_trace"])
    assert len(result["scores_trace"]) == sum(len(one.new_ids) for one in result.explanation)
    assert result["relevance_trace"][-1]["input_ids"].shape == (1, len(result.explanation[1].ids) - 1)
    rows = [language.run_task("generation", one, own, max_new_tokens=3)["generated_ids"][0]
            for one in ("the cat", "a big red dog")]
    assert result["generated_ids"].shape == (2, max(map(len, rows)))
    for row, alone in enumerate(rows):
        np.testing.assert_array_equal(result["generated_ids"][row, :len(alone)], alone)
        assert (result["generated_ids"][row, len(alone):] == own.pad_token_id).all()
        one, relevance = result.explanation[row], result["relevance"]["input_ids"][row]
        np.testing.assert_array_equal(relevance[:len(one.explained), :len(one.ids)], one.relevance)
        assert not relevance[len(one.explained):].any() and not relevance[:, len(one.ids):].any()
    beams = language.run_task("generation", "the cat", own, num_beams=3, num_return_sequences=2, max_new_tokens=3)
    assert len(beams.explanation) == 2 and beams.explanation[0].strategy == "beam_search"


@pytest.mark.parametrize(("options", "strategy"), [
    ({}, "greedy"), ({"temperature": 0.7}, "temperature"), ({"top_k": 5}, "top_k"), ({"top_p": 0.8}, "top_p"),
    ({"num_beams": 2}, "beam_search"), ({"num_beams": 1, "top_k": None}, "greedy"),
    ({"do_sample": True}, "temperature"), ({"do_sample": False}, "greedy"), ({"do_sample": True, "top_k": 3}, "top_k"),
    ({"temperature": 1.3, "strategy": "top_k"}, "top_k"), ({"top_k": 3, "top_p": 0.9, "temperature": 2.0}, "top_k")])
def test_the_strategy_is_told_from_the_options(language: Explainer, options: dict[str, Any], strategy: str) -> None:
    with dlbc.deterministic(0):
        result = language.run_task("generation", words(), max_new_tokens=2, explain_tokens="none", **options)
    assert result.explanation[0].strategy == strategy
    assert not result["relevance_computed"] and dict(result["relevance"]) == {}


def test_what_modules_gave_while_generating(language: Explainer) -> None:
    result = language.run_task("generation", words(), max_new_tokens=3, return_layerwise_output=True,
                               return_relevance=True)
    ids = torch.from_numpy(result["generated_ids"])
    outputs: list[Tensor] = []
    with language.model.model.layers[0].register_forward_hook(lambda *given: outputs.append(given[2])), torch.no_grad():
        for step, layers in enumerate(result["layerwise_output_trace"]):
            language.model(ids[:, :2 + step])
            np.testing.assert_allclose(layers["model.layers.0"], outputs[-1], rtol=1e-3, atol=1e-4)
    assert result["relevance"]["model.layers.0"].shape == result["relevance"]["input_ids"].shape


def test_max_length_counts_the_prompt(language: Explainer) -> None:
    result = language.run_task("generation", words(), max_length=5, explain_tokens=1, eos_token_id=None)
    assert result["generated_ids"].shape[1] <= 5 and len(result["relevance"]["input_ids"]) == 1


def test_generation_is_saved(language: Explainer, tmp_path: Path) -> None:
    result = language.run_task("generation", words(), tokenizer(special=False), max_new_tokens=3, save_relevance=True,
                               save_path=tmp_path / "all.json", save_format="json")
    read = load_relevance(result["save_path"])
    assert len(read.steps) == len(result["relevance_trace"])
    for step, own in zip(read.steps, result["relevance_trace"], strict=True):
        np.testing.assert_array_equal(step["input_ids"], own["input_ids"])
    assert read.metadata["explained"][0]["tokens"] == list(result.explanation[0].tokens)


def test_generation_by_auto(language: Explainer, capsys: pytest.CaptureFixture[str]) -> None:
    result = language.run_task(inputs="the cat", tokenizer=tokenizer(special=False), max_new_tokens=1)
    assert result["task"] == "generation" and "each token of its vocabulary" in result.reason
    result.show()
    assert "cat" in capsys.readouterr().out and result._repr_html_()
    assert "generated_ids" in repr(list(result)) and "TaskResult(task='generation'" in repr(result)


def test_an_encoder_decoder() -> None:
    import transformers

    config = transformers.T5Config(vocab_size=len(VOCABULARY), d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
                                   decoder_start_token_id=0, pad_token_id=0, eos_token_id=3)
    model = seeded(lambda: transformers.T5ForConditionalGeneration(config))
    given = words("the cat sat")
    explainer = compiled(model, **given, decoder_input_ids=torch.tensor([[0, 4]]))
    result = explainer.run_task(inputs="the cat sat", tokenizer=tokenizer(special=False), max_new_tokens=3,
                                return_relevance=True)
    wanted = model.generate(**given, max_new_tokens=3, do_sample=False)
    np.testing.assert_array_equal(result["generated_ids"], wanted)
    (found,) = result.explanation
    # max_length counts what the decoder wrote, its start included.
    short = explainer.run_task(inputs="the cat sat", tokenizer=tokenizer(special=False), max_length=3)
    np.testing.assert_array_equal(short["generated_ids"], model.generate(**given, max_length=3, do_sample=False))
    np.testing.assert_array_equal(result["relevance"]["input_ids"], found.source_relevance)
    np.testing.assert_array_equal(result["relevance"]["decoder_input_ids"], found.relevance)
    assert [step["input_ids"].shape[1] for step in result["relevance_trace"]] == [3] * len(found.explained)
    with pytest.raises(InputError, match="layer-wise outputs of an encoder-decoder"):
        explainer.run_task(inputs=given, max_new_tokens=1, return_layerwise_output=True)


@pytest.mark.parametrize(("given", "options", "says"), [
    ("the cat", {}, ["no tokenizer"]), (None, {}, ["no prompt"]), (" ", {}, ["text is empty"]),
    (["the cat", ""], {"tokenizer": tokenizer}, ["text 1 is empty"]),
    ("the cat", {"tokenizer": lambda: tokenizer(extra=50)}, ["has 74 tokens", "another model's"]),
    (torch.tensor([[900]]), {}, ["token id 900"]), (torch.zeros(1, 0, dtype=torch.int64), {}, ["no tokens"]),
    ({"ids": torch.zeros(1, 2)}, {}, ["no `input_ids`"]), (torch.rand(1, 3), {}, ["neither text nor token ids"]),
    (torch.tensor([[5] * 41]), {"max_new_tokens": 5}, ["41 tokens"]),
    (torch.tensor([[5, 6]]), {"max_length": 2}, ["max_length is 2", "2 tokens"]),
    (torch.tensor([[5, 6]]), {"max_length": 9, "max_new_tokens": 2}, ["both given"]),
    (torch.tensor([[5, 6]]), {"strategy": "guess"}, ["strategy='guess'"]),
    (torch.tensor([[5, 6]]), {"num_beams": 2, "target": 3}, ["beam search"]),
    (torch.tensor([[5, 6]]), {"explain_tokens": [99]}, ["99"]),
    (torch.tensor([[5, 6]]), {"temperature": 0.5, "strategy": "greedy"}, ["temperature=0.5"]),
    (torch.tensor([[5, 6]]), {"do_sample": False, "top_p": 0.5}, ["do_sample=False", "'top_p'"]),
    (torch.tensor([[5, 6]]), {"do_sample": True, "num_beams": 2}, ["do_sample=True", "'beam_search'"]),
])
def test_prompts_that_do_not_fit(language: Explainer, given: object, options: dict[str, Any], says: list[str]) -> None:
    options = {name: value() if callable(value) else value for name, value in options.items()}
    with pytest.raises(InputError) as caught:
        language.run_task("generation", given, **options)
    assert all(word in str(caught.value) for word in says), str(caught.value)


def test_a_model_that_does_not_generate() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(24, 8), nn.Linear(8, 24)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.table(input_ids).cumsum(1))

    explainer = compiled(seeded(Own), torch.tensor([[4, 5, 6]]))
    with pytest.raises(InputError, match="Own has no `generate`"):
        explainer.run_task("generation", torch.tensor([[4, 5]]))
