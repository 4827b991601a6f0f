"""A trained mixture of experts with a known answer (`trained_experts.py`): the relevance of its experts gives it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dlbc

sys.path.insert(0, str(Path(__file__).parent))
import trained_experts

pytest.importorskip("transformers")
COUNT = 256


@pytest.fixture(scope="module")
def model() -> Any:
    found, right = trained_experts.trained()
    assert right > 0.98
    return found


@pytest.mark.real
@pytest.mark.parametrize("rules", ["attnlrp", "cp-lrp", "dlb", "auto"])
def test_relevance_of_experts_tells_which_kind_was_asked_for(model: Any, rules: str) -> None:
    """Every text uses the letters' expert once and the digits' once; the answer rests on the one that was asked."""
    asked = trained_experts.questions(COUNT, torch.Generator().manual_seed(7))
    explainer = dlbc.compile(model, asked.ids[:4], rules=rules, cache=False)
    explanation = explainer(asked.ids)
    assert explanation.experts is not None
    (layer,) = explanation.experts.values()
    digits = asked.asked.numpy() == 1
    relevance, frequency = (np.stack([
        np.where(layer.ids == expert, amount, 0.0).sum((1, 2)) for expert in range(2)], axis=1)
        for amount in (np.abs(layer.relevance), np.ones(layer.ids.shape)))
    share = relevance[:, 1] / relevance.sum(1)
    assert ((share > 0.5) == digits).mean() > 0.85
    assert share[digits].mean() > share[~digits].mean() + 0.5
    by_frequency = [((frequency[:, 1] - frequency[:, 0] > least) == digits).mean() for least in (-1, 0, 1)]
    assert max(by_frequency) < 0.6
