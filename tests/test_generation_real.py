"""Generation on a trained model, SmolLM2: transformers' tokens, the prefix's relevance, and what it says."""

from __future__ import annotations

import functools

import pytest
import torch

from dlbc_runtime.generation import GenerationExplanation
from dlbc_runtime.sampler import Sampler
from tests.test_generation import check_prefixes
from tests.test_models import PRESETS
from tests.test_real import compiled_language_model, language_model

pytestmark = pytest.mark.real

PROMPT = "The capital of France is"


@functools.lru_cache(maxsize=1)
def sampler() -> Sampler:
    _, tokenizer, _ = language_model()
    return compiled_language_model().sampler(tokenizer)


@pytest.mark.parametrize(("strategy", "options", "theirs"), [
    ("greedy", {}, {"do_sample": False}),
    ("temperature", {"temperature": 0.8}, {"do_sample": True, "top_k": 0, "top_p": 1.0}),
    ("top_k", {"top_k": 10, "num_return_sequences": 2}, {"do_sample": True, "top_p": 1.0, "temperature": 1.0}),
    ("top_p", {"top_p": 0.7}, {"do_sample": True, "top_k": 0, "temperature": 1.0}),
    ("beam_search", {"num_beams": 3}, {"do_sample": False})])
def test_tokens_are_those_of_generate(strategy: str, options: dict[str, float], theirs: dict[str, object]) -> None:
    built, tokenizer, _ = language_model()
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    prompts = [PROMPT, "Water boils at a temperature of about one hundred"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    seed = None if strategy in ("greedy", "beam_search") else 7
    found = sampler().generate(prompts, strategy=strategy, seed=seed, max_new_tokens=8, explain_tokens=None, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        wanted = built.case.model.generate(**batch, max_new_tokens=8, use_cache=True, **theirs, **options)
    assert isinstance(found, list)
    assert [tokenizer.decode(one.ids) for one in found] == [
        tokenizer.decode(ids[ids != tokenizer.pad_token_id]) for ids in wanted]


def test_a_contrast_says_why_this_and_not_that() -> None:
    found = sampler().generate(PROMPT, max_new_tokens=1, target=" London")
    assert isinstance(found, GenerationExplanation)
    assert found.new_tokens == (" Paris",) and found.against_tokens == (" London",) and found.values[0] > 0
    assert found.top(1, by="positive")[0].name.strip() == "France"


def test_words_alternatives_and_layers() -> None:
    found = sampler().generate(PROMPT, max_new_tokens=4, layers="model.layers.0,model.layers.15")
    assert isinstance(found, GenerationExplanation)
    assert found.text.startswith(" Paris") and found.alternatives[0][0][1] == " Paris"
    assert list(found.layers) == ["model.layers.0", "model.layers.15"]
    assert "".join(found.tokens) == PROMPT + found.text
    assert "".join(found.words().tokens) == PROMPT + found.text


@pytest.mark.parametrize("rules", PRESETS)
def test_relevance_is_that_of_the_prefix(rules: str) -> None:
    built, tokenizer, _ = language_model()
    for backend in ("torch", "numpy"):
        own = built.explainer(rules, backend)
        found = own.sampler(tokenizer).generate([PROMPT, "Two plus two makes"], max_new_tokens=4,
                                                explain_tokens=[0, 1, 3])
        assert isinstance(found, list)
        for one in found:
            check_prefixes(own, one)
