"""`dlb{activation_aware=true}`: before an activation that saturates, only what takes part in it counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dlbc
from dlbc.composite import preset
from dlbc.errors import RuleError

AWARE = "dlb{activation_aware=true}"
WEIGHTS = np.array([[1.0, -3.0], [2.0, 1.0], [4.0, 6.0]])
"""On x = (1, 2): contributions (1, -6), (2, 2), (4, 12)."""
X = torch.tensor([[1.0, 2.0]])


def network(activation: nn.Module) -> nn.Module:
    """Three units behind an activation, summed up with weights 1."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), activation, nn.Linear(3, 1, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(WEIGHTS))
        model[2].weight.fill_(1.0)
    return model


RANGES: list[tuple[nn.Module, Callable[[np.ndarray], np.ndarray], float, float]] = [
    (nn.Tanh(), np.tanh, -2.0, 2.0), (nn.Sigmoid(), lambda t: 1 / (1 + np.exp(-t)), -4.0, 4.0),
    (nn.ReLU(), lambda t: np.maximum(t, 0), 0.0, np.inf), (nn.SiLU(), lambda t: t / (1 + np.exp(-t)), -6.0, np.inf)]


@pytest.mark.parametrize(("activation", "function", "low", "high"), RANGES, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_by_hand(activation: nn.Module, function: Callable[[np.ndarray], np.ndarray], low: float, high: float,
                 backend: str) -> None:
    """The last layer shares 100 out by |f(t)|; each unit then by |z|, those of the wrong sign left out."""
    z = WEIGHTS * X.numpy()
    t = z.sum(1)
    units = np.abs(function(t)) / np.abs(function(t)).sum() * 100
    below, above = (t < low)[:, None], (t > high)[:, None]
    counted = np.where(below, np.maximum(-z, 0), np.where(above, np.maximum(z, 0), np.abs(z)))
    wanted = (counted / np.maximum(counted.sum(1, keepdims=True), 1e-30) * units[:, None]).sum(0)
    explainer = dlbc.compile(network(activation), X, rules=AWARE, backend=backend, cache=False)
    found = explainer(X)
    np.testing.assert_allclose(found.relevance["input"][0], wanted, rtol=1e-4, atol=1e-4)
    plain = dlbc.compile(network(activation), X, rules="dlb", backend=backend, cache=False)(X).relevance["input"][0]
    share = np.abs(z) / np.abs(z).sum(1, keepdims=True)
    np.testing.assert_allclose(plain, (share * units[:, None]).sum(0), rtol=1e-4)
    assert found.conservation().closes()
    ranges = {row.rule for row in explainer.rules() if row.op == "linear"}
    assert len(ranges) == 2, "the layer before the activation has a range, the last has none"


def test_saturated_units_give_another_map() -> None:
    """t = -5 lies below tanh's -2: there only x1 counts, which a plain share would give six sevenths."""
    plain, aware = (dlbc.compile(network(nn.Tanh()), X, rules=rules, cache=False)(X).relevance["input"][0]
                    for rules in ("dlb", AWARE))
    saturated = 100 * np.tanh(5) / (np.tanh(5) + np.tanh(4) + np.tanh(16))
    assert aware[1] - plain[1] == pytest.approx(saturated / 7, rel=1e-4)


def test_the_contrastive_mode_has_ranges_too() -> None:
    """Both relevances go through the one side that counts."""
    model = network(nn.Tanh())
    plain, aware = (dlbc.compile(model, X, rules=rules, cache=False)(X).positive["input"][0]
                    for rules in ("dlb-contrastive", "dlb-contrastive{activation_aware=true}"))
    assert aware.sum() == pytest.approx(plain.sum(), rel=1e-4)
    assert (aware >= 0).all()


def test_options_are_known_by_name() -> None:
    assert preset("dlb{activation_aware=false}").entries == preset("dlb").entries
    with pytest.raises(RuleError, match=r"no option `activation_awre`[^$]*did you mean activation_aware"):
        preset("dlb{activation_awre=true}")
    with pytest.raises(RuleError, match="no option `activation_aware`"):
        preset("epsilon{activation_aware=true}")
    with pytest.raises(RuleError, match="`yes` is no value for `activation_aware`"):
        preset("dlb{activation_aware=yes}")


def test_it_is_kept_in_a_file(tmp_path: Path) -> None:
    model = network(nn.ReLU())
    explainer = dlbc.compile(model, X, rules=AWARE, cache=False)
    explainer.save(tmp_path / "e.dlbc")
    again = dlbc.load(tmp_path / "e.dlbc", model)
    assert again.rules() == explainer.rules()
    np.testing.assert_array_equal(again(X, keep="all").relevance["input"], explainer(X).relevance["input"])
