"""`rules="auto"`: what it chooses for which model, that it says so, and that a contrast is one."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dlbc
from dlbc.composite import Composite, preset
from dlbc.errors import RuleError
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.target import Target
from tests import zoo


def compiled(name: str, rules: str | Composite = "auto", **options: Any) -> tuple[Explainer, zoo.Case]:
    case = zoo.CASES[name]()
    return dlbc.compile(case.model, case.args or case.kwargs, rules=rules, cache=False, **options), case


@pytest.mark.parametrize(("name", "plan", "rules"), [
    ("mlp", "epsilon", {"epsilon"}), ("lenet", "auto-cnn", {"w_square", "gamma", "epsilon"}),
    ("resnet18_small", "auto-cnn", {"w_square", "gamma", "zplus", "epsilon"}), ("bert", "auto-encoder", {"cp"}),
    ("vit", "auto-vit", {"absolute", "detach", "epsilon"}),
    ("densenet_small", "auto-cnn", {"w_square", "zplus", "epsilon"}), ("llama", "auto-lm", {"cp", "gamma"})])
def test_auto_chooses_by_what_the_model_holds(name: str, plan: str, rules: set[str]) -> None:
    explainer, case = compiled(name)
    assert explainer.manifest.composite == f"auto ({plan})"
    assert explainer.rules().reason and plan in str(explainer.rules())
    assert rules <= {row.rule.partition("(")[0] for row in explainer.rules()}
    found = explainer(*case.args, **case.kwargs)
    assert found.conservation().closes(1e-4)


def test_gamma_falls_from_the_stem_to_the_classifier() -> None:
    """Where a ReLU follows at once; z-plus stands where it follows a sum. Rules are listed from the output back."""
    explainer, _ = compiled("resnet18_small")
    rows = [row for row in explainer.rules() if row.op in ("conv2d", "linear")]
    gammas = [dict(re.findall(r"(\w+)=([^,)]+)", row.rule))["gamma"] for row in rows if row.rule.startswith("gamma")]
    assert list(map(float, gammas)) == sorted(map(float, gammas)) and len(gammas) > 4
    assert rows[0].op == "linear" and rows[0].rule.startswith("epsilon") and rows[-1].rule == "w_square"
    assert sum(row.rule == "zplus" for row in rows) > 4


def test_signed_bottlenecks_get_epsilon_and_what_projects_into_them_gamma() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU6(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU6(), nn.Conv2d(6, 4, 1),  # the bottleneck
        nn.Conv2d(4, 6, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).eval()
    explainer = dlbc.compile(model, torch.randn(1, 3, 8, 8), cache=False)
    rules = [row.rule.partition("(")[0] for row in explainer.rules() if row.op in ("conv2d", "linear")]
    assert rules == ["epsilon", "epsilon", "gamma", "gamma", "w_square"]  # from the output back


def test_batch_norm_that_no_layer_takes_in_shares_by_size() -> None:
    explainer, _ = compiled("densenet_small")
    norms = [row.rule for row in explainer.rules() if row.op == "batch_norm"]
    assert norms and all(rule.startswith("absolute") for rule in norms)
    assert "batch norms" in explainer.rules().reason


def test_a_vision_transformer_tells_targets_apart_in_its_last_layer() -> None:
    """Shares by size everywhere else, so that is where the sign of relevance comes from."""
    explainer, case = compiled("vit")
    layers = [row.rule.partition("(")[0] for row in explainer.rules() if row.op in ("conv2d", "linear")]
    assert layers[0] == "epsilon" and set(layers[1:]) == {"absolute"}
    maps = explainer(*case.args, **case.kwargs, target=[0, 1]).relevance["pixel_values"]
    assert not (np.sign(maps[0]) == np.sign(maps[1])).all()


def test_auto_is_kept_in_files(tmp_path: Any) -> None:
    explainer, case = compiled("resnet18_small")
    explainer.save(tmp_path / "net.dlbc")
    loaded = dlbc.load(tmp_path / "net.dlbc", case.model)
    assert loaded.rules() == explainer.rules() and loaded.rules().reason == explainer.rules().reason
    again = loaded(*case.args, keep="modules", **case.kwargs)  # a program that is compiled now
    name = next(iter(again.relevance))
    np.testing.assert_allclose(again.relevance[name], explainer(*case.args).relevance[name], rtol=1e-4, atol=1e-4)


def test_own_entries_go_before_those_of_a_plan() -> None:
    composite = Composite([("convolution & first", "w_square")], base="auto")
    explainer, _ = compiled("resnet18_small", composite)
    assert [row.rule for row in explainer.rules() if row.op == "conv2d"][-1] == "w_square"
    assert explainer.manifest.composite == "auto+ (auto-cnn)"


# --- contrast ----------------------------------------------------------------------------------------

class Head(nn.Module):
    """Two layers; the head is wide enough (4,096) for sparse targets, or narrow."""

    def __init__(self, classes: int, scale: float = 1.0, softcap: float = 0.0) -> None:
        super().__init__()
        self.body, self.head, self.scale, self.softcap = nn.Linear(6, 8), nn.Linear(8, classes), scale, softcap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(torch.tanh(self.body(x))) * self.scale
        return torch.tanh(y / self.softcap) * self.softcap if self.softcap else y


@pytest.mark.parametrize(("classes", "softcap"), [(5, 0.0), (5, 2.0), (4096, 0.0), (4096, 2.0)])
@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_a_contrast_is_the_output_minus_the_mean(classes: int, softcap: float, backend: str) -> None:
    """Input x gradient of y_t - mean(y), by autograd."""
    torch.manual_seed(0)
    model, x = Head(classes, 0.5, softcap).eval(), torch.randn(3, 6)
    rules = Composite([], base="input-x-gradient", contrast="mean")
    explainer = dlbc.compile(model, x, rules=rules, backend=backend, cache=False)
    assert explainer.manifest.contrast == "mean"
    assert explainer.manifest.sparse == (classes == 4096 and not softcap)
    for target in (2, Target.index([0, 1, 4]), None, Target.difference(1, 3)):
        found = explainer(x, target=target, multiplier=1.0)
        given = x.clone().requires_grad_(True)
        y = model(given)
        rows, chosen = torch.arange(3), [e.index for e in found.target]
        explained = y[rows, chosen] - (y.mean(-1) if found.target[0].against is None else y[:, 3])
        explained.sum().backward()
        assert given.grad is not None
        wanted = (x * given.grad).numpy()
        np.testing.assert_allclose(found.relevance["x"], wanted, atol=1e-5 * np.abs(wanted).max())
    assert explainer(x).conservation().closes(1e-4)


def test_a_contrast_conserves_what_is_explained() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 5, bias=False)).eval()
    x = torch.randn(4, 6)
    explainer = dlbc.compile(model, x, rules=Composite([], base="epsilon", contrast="mean"), cache=False)
    found = explainer(x)
    np.testing.assert_allclose(found.relevance["input"].sum(-1), 100.0, rtol=1e-4)
    explained = model(x).max(-1).values - model(x).mean(-1)
    assert [e.value for e in found.target] == pytest.approx(explained.tolist(), 1e-4)


def test_what_a_contrast_cannot_be() -> None:
    with pytest.raises(RuleError, match="unknown contrast"):
        Composite([], base="epsilon", contrast="median")
    model = nn.Sequential(nn.Linear(6, 1)).eval()
    rules = Composite([], base="epsilon", contrast="mean")
    explainer = dlbc.compile(model, torch.randn(2, 6), rules=rules, cache=False)
    assert not explainer.manifest.contrast  # one output has no others
    assert preset("auto-lm").contrast == "mean"
