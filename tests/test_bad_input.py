"""Bad input gets an error that says where, what and the remedy, before any work is lost."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dlbc
from dlbc.errors import DlbcError, ExportError, InputError, RuleError, UnsupportedOpError


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).eval()


X = torch.linspace(-1, 1, 8).reshape(2, 4)


@pytest.fixture(scope="module")
def explainer() -> dlbc.Explainer:
    return dlbc.compile(net(), X, rules="epsilon", cache=False)


@pytest.mark.parametrize(("inputs", "says"), [
    ((torch.zeros(2, 5),), ["axis 1", "5", "4"]),
    ((torch.zeros(4),), ["1 axes", "2"]),
    ((torch.zeros(2, 4, dtype=torch.float64),), ["f64", "f32"]),
    ((torch.zeros(2, 4, dtype=torch.int64),), ["i64", "f32"]),
    ((X, X), ["2 inputs"]),
    ((), ["missing"]),
    (("text",), ["str"]),
    ((X * float("nan"),), ["NaN", "input"]),
    ((X / 0.0,), ["infinity"]),
])
def test_inputs_that_do_not_fit(explainer: dlbc.Explainer, inputs: tuple[object, ...], says: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        explainer(*inputs)
    assert all(word in str(caught.value) for word in says), str(caught.value)


@pytest.mark.parametrize(("target", "says"), [
    (3, ["3", "out of range", "0 to 2"]),
    (-1, ["-1", "out of range"]),
    ([], ["empty"]),
    ("cat", ["str", "Target"]),
    (True, ["bool"]),
    (dlbc.Target.index([0, 1, 2]), ["3 numbers", "2 batch rows"]),
    (dlbc.Target.difference(0, 7), ["7", "out of range"]),
    (dlbc.Target.tensor(np.zeros((5, 5))), ["[5, 5]", "[2, 3]"]),
])
def test_targets_that_do_not_fit(explainer: dlbc.Explainer, target: object, says: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        explainer(X, target=target)
    assert all(word in str(caught.value) for word in says), str(caught.value)


@pytest.mark.parametrize("options", [{"multiplier": float("nan")}, {"multiplier": 0.0}, {"positions": "some"}])
def test_options_that_make_no_sense(explainer: dlbc.Explainer, options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        explainer(X, **options)


@pytest.mark.parametrize(("rules", "says"), [
    ("atnlrp", ["atnlrp", "attnlrp"]),
    (lambda: dlbc.Composite([("linear", "epsilno")]), ["epsilno", "epsilon"]),
    (lambda: dlbc.Composite([("linear", "epsilon(-1)")]), ["positive"]),
    (lambda: dlbc.Composite([("linear", "epsilon(gama=1)")]), ["gama", "eps"]),
    (lambda: dlbc.Composite([("layers.*", "epsilon")], base="epsilon"), ["layers.*", "matches no module"]),
])
def test_rules_that_do_not_exist(rules: object, says: list[str]) -> None:
    with pytest.raises(RuleError) as caught:
        dlbc.compile(net(), X, rules=rules() if callable(rules) else rules, cache=False)
    assert all(word in str(caught.value) for word in says), str(caught.value)


def test_unknown_backend() -> None:
    with pytest.raises(DlbcError, match="numpy"):
        dlbc.compile(net(), X, backend="nunpy", cache=False)


def test_unknown_output_and_place(explainer: dlbc.Explainer) -> None:
    with pytest.raises(DlbcError, match="output"):
        explainer(X, output="logitz")
    with pytest.raises(DlbcError, match="matches no module"):
        explainer(X, keep="layer9.*")


class LogSumExp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(x, -1, keepdim=True)


def test_an_op_without_a_rule_names_itself_and_the_way_out() -> None:
    model = nn.Sequential(nn.Linear(4, 3), LogSumExp()).eval()
    with pytest.raises(UnsupportedOpError) as caught:
        dlbc.compile(model, X, rules="epsilon", cache=False)
    assert all(word in str(caught.value) for word in ("logsumexp", "#1", "fallback"))
    passed = dlbc.compile(model, X, rules="epsilon", fallback="gradient", cache=False)
    assert np.isfinite(passed(X).relevance["input"]).all()
    assert any(row.rule.startswith("gradient") for row in passed.rules())


def test_training_mode_is_explained_as_eval_said_once_and_restored(caplog: pytest.LogCaptureFixture) -> None:
    model = net().train()
    model[0].eval()
    with caplog.at_level(logging.WARNING):
        explainer = dlbc.compile(model, X, rules="epsilon", cache=False)
    assert sum("training" in record.message for record in caplog.records) == 1
    assert [module.training for module in model] == [False, True, True, True]
    np.testing.assert_allclose(explainer(X).outputs["output"], model.eval()(X).detach(), rtol=1e-5)


def test_weights_with_nan_are_named() -> None:
    model = net()
    with torch.no_grad():
        model[3].bias[1] = float("nan")
    with pytest.raises(InputError, match=r"3\.bias"):
        dlbc.compile(model, X, cache=False)


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


def test_data_dependent_control_flow_names_the_models_line() -> None:
    with pytest.raises(ExportError) as caught:
        dlbc.compile(Branch(), X, cache=False)
    assert "test_bad_input.py" in str(caught.value)


def test_the_model_is_left_as_it_was() -> None:
    model = net().train()
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    grad = torch.is_grad_enabled()
    dlbc.compile(model, X, cache=False)(X)
    assert torch.is_grad_enabled() == grad
    assert all(module.training for module in model.modules())
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name][0])
        assert value.requires_grad == before[name][1]
        assert value.grad is None


def test_out_of_memory_says_what_to_lower(explainer: dlbc.Explainer, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = explainer._load(explainer.default)

    def starve(*_: object) -> object:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(loaded.module, "forward", starve)
    with pytest.raises(InputError, match="batch size"):
        explainer(X)


def test_an_illegal_access_of_memory_is_no_lack_of_it(explainer: dlbc.Explainer, monkeypatch: pytest.MonkeyPatch
                                                      ) -> None:
    loaded = explainer._load(explainer.default)

    def break_in(*_: object) -> object:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(loaded.module, "forward", break_in)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        explainer(X)


def test_what_is_no_model_and_what_is_no_input() -> None:
    with pytest.raises(InputError, match=r"not a torch\.nn\.Module"):
        dlbc.compile("gpt2", X)
    with pytest.raises(InputError, match="inputs"):
        dlbc.compile(net(), X, explain=["inputs"], cache=False)
    assert set(dlbc.compile(net(), X, explain="input", cache=False)(X).relevance) == {"input"}


# --- operands that no rule gives relevance to --------------------------------------------------------

@pytest.mark.parametrize("operation", [
    lambda x, z: F.conv1d(x[:, None], z.reshape(3, 1, 4))[..., 0], lambda x, z: F.group_norm(x, 2, z[:4]),
], ids=["convolution", "norm"])
@pytest.mark.parametrize("rules", ["attnlrp", "dlb", "input-x-gradient"])
def test_a_weight_computed_from_an_explained_input_is_refused(operation: Callable[..., torch.Tensor],
                                                              rules: str) -> None:
    """Not silently without the relevance that the input gets by that way."""
    class Computed(nn.Module):
        def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return operation(x, torch.tanh(z))

    inputs = (torch.ones(2, 4), torch.ones(12))
    with pytest.raises(UnsupportedOpError, match="computed from an explained input"):
        dlbc.compile(Computed(), inputs, rules=rules, dynamic=False, cache=False)
    dlbc.compile(Computed(), inputs, rules=rules, dynamic=False, explain=["x"], cache=False)


def test_a_floating_input_called_position_is_explained() -> None:
    class Placed(nn.Module):
        def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            return x * position

    x = torch.ones(2, 4)
    assert set(dlbc.compile(Placed(), (x, x), rules="epsilon", cache=False)(x, x).relevance) == {"x", "position"}


def test_weights_that_became_something_else_are_named() -> None:
    model = net()
    explainer = dlbc.compile(model, X, rules="epsilon", cache=False)
    explanation = explainer(X)
    with torch.no_grad():
        model[0].bias.add_(1.0)
    with pytest.raises(InputError, match="weights have changed"):
        explanation.conservation()
    assert explainer(X).conservation().closes()
    with torch.no_grad():
        model[3].weight[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"3\.weight.*NaN or infinity"):
        explainer(X)
    model.double()
    with pytest.raises(InputError, match=r"f64.*f32"):
        explainer(X)
