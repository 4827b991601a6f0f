"""Causal models are run up to the last explained position: the same numbers, and exact zeros behind it."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import dlbc
from dlbc import Target
from dlbc_runtime import explainer as running
from dlbc_runtime.call import Call
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.program import Manifest
from tests import zoo

CAUSAL = ["llama", "gpt2", "gemma2", "qwen3", "mistral"]


@cache
def compiled(name: str, rules: str = "attnlrp", backend: str = "torch") -> Explainer:
    case = zoo.CASES[name]()
    return dlbc.compile(case.model, {**case.kwargs} or case.args, rules=rules, backend=backend, cache=False)


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of positions of each run."""
    found: list[int] = []
    run = Call.run

    def noted(call: Call) -> Explanation:
        found.append(int(call.inputs["input_ids"].shape[1]))
        return run(call)

    monkeypatch.setattr(Call, "run", noted)
    return found


def whole(explainer: Explainer, monkeypatch: pytest.MonkeyPatch, **given: Any) -> Explanation:
    """The explanation without leaving anything out."""
    def kept(call: Call, manifest: Manifest) -> Call:
        return call

    with monkeypatch.context() as patch:
        patch.setattr(running, "shortened", kept)
        return explainer(**given)


def texts(batch: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def equal(found: Explanation, expected: Explanation, end: int) -> None:
    for name, relevance in expected.relevance.items():
        scale = np.abs(relevance).max()
        np.testing.assert_allclose(found.relevance[name], relevance, atol=2e-5 * scale)
        assert not found.relevance[name][..., end:].any()
        np.testing.assert_array_equal(found.inputs[name], expected.inputs[name])
    np.testing.assert_allclose(found.outputs["logits"], expected.outputs["logits"], atol=1e-5)
    assert [(one.position, one.index) for one in found.target] == [(o.position, o.index) for o in expected.target]


@pytest.mark.parametrize("rules", ["attnlrp", "dlb", "cp-lrp", "dlb-contrastive"])
@pytest.mark.parametrize("name", CAUSAL)
def test_what_comes_after_is_not_computed(name: str, rules: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
                                          ) -> None:
    explainer, given = compiled(name, rules), texts()
    found = explainer(**given, target=Target.token(5, 3))
    assert lengths == [4]
    equal(found, whole(explainer, monkeypatch, **given, target=Target.token(5, 3)), 4)
    assert found.conservation().closes()


def test_the_last_of_all_targets_and_rows_counts(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    explainer, given = compiled("llama"), texts()
    targets = [Target.token(5, (1, 4)), Target.difference(7, 8, -6)]
    found = explainer(**given, target=targets)
    assert lengths == [5]
    equal(found, whole(explainer, monkeypatch, **given, target=targets), 5)


def test_padding_behind_every_row_is_left_out(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    explainer, given = compiled("llama"), texts()
    given["attention_mask"][:, 6:] = 0
    found = explainer(**given)
    assert lengths == [6]
    equal(found, whole(explainer, monkeypatch, **given), 6)


def test_numpy_does_so_too(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    explainer, given = compiled("llama", backend="numpy"), texts()
    found = explainer(**given, target=Target.token(5, 2))
    assert lengths == [3]
    equal(found, whole(explainer, monkeypatch, **given, target=Target.token(5, 2)), 3)


def test_a_budget_and_the_plan_know_the_shorter_call() -> None:
    explainer, given = compiled("llama"), texts(length=60)
    short = explainer.memory(**given, target=Target.token(5, 3)).peak.total
    assert short < explainer.memory(**given).peak.total / 4
    within = explainer(**given, target=Target.token(5, 3), memory_budget=2 * short)
    np.testing.assert_allclose(within.relevance["input_ids"],
                               explainer(**given, target=Target.token(5, 3)).relevance["input_ids"], atol=1e-5)


def test_where_later_positions_count_all_are_run(lengths: list[int]) -> None:
    given = texts()
    compiled("llama", "dlb-0.1")(**given, target=Target.token(5, 3))  # these rules look ahead
    compiled("llama")(**given, target=Target.token(5, 3), keep="modules")  # inner values are of all positions
    compiled("llama")(**given, target=Target.token(5, 3), positions="all")
    assert lengths == [9, 9, 9]
    assert not compiled("bert").manifest.causal
