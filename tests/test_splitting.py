"""The rules that split by sign or go by weights alone: zennit's formulas, bounds, bottlenecks, known signs, errors.

Each rule's own formula is checked op by op in `test_rules.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import dlbc
from dlbc.composite import Composite
from dlbc.errors import InputError, RuleError
from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Section, Type, Value, Weight
from dlbc.ir.dims import symbol
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc.ir.printer import print_graph
from dlbc.passes import run
from dlbc.passes.eliminate_common import EliminateCommon
from dlbc.passes.eliminate_dead import EliminateDead
from dlbc.passes.hoist_constants import HoistConstants
from dlbc.passes.lower import Lower, expand
from dlbc.passes.pair import Pair
from dlbc.passes.rules import parse_rule
from dlbc.passes.signs import nonnegative
from dlbc_runtime.bounds import Bounds

sys.path.insert(0, str(Path(__file__).parent))
import dense
from random_graphs import Model, models
from test_laws import assert_closes
from test_rules import Case, case

Array = NDArray[Any]
Layer = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
RULES = ("gamma", "alpha_beta", "zplus", "w_square", "flat", "zbox(-4, 4)", "absolute(-1, 1)")
few = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))


def explained(one: Case, rule: str, seed: Array) -> Array:
    """Relevance of the carrying operand of a case, float64."""
    graph, inputs, weights = one.graph()
    paired = Pair(rules=Composite([(one.op, rule), ("move", "move")])).run(graph)
    return interpret(EliminateDead().run(Lower().run(paired)), inputs, weights, {"R.y": seed[None]}).relevance[0][0]


# --- zennit's rules, written out -----------------------------------------------------------------------

def stabilised(z: Tensor, eps: float) -> Tensor:
    return z + torch.where(z >= 0, eps, -eps)


def shared_out(layer: Layer, parts: Sequence[tuple[Tensor, Tensor, Tensor | None]], seeds: Sequence[Tensor],
               factors: Sequence[float] | None = None) -> Tensor:
    """sum of factor * x * (d layer(x, w, b) / d x)^T s over modified (x, w, b) with their s."""
    total = torch.zeros_like(parts[0][0])
    for (x, w, b), s, factor in zip(parts, seeds, factors or [1.0] * len(parts), strict=True):
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(layer(leaf, w, b), leaf, s)
        total = total + factor * x * slope
    return total


def zennit(rule: str, layer: Layer, x: Tensor, w: Tensor, b: Tensor, r: Tensor, eps: float, **given: Any) -> Tensor:
    """zennit's rules on a layer, from its `rules.py`: modified inputs and parameters, outputs, gradients, reduction."""
    xp, xn, wp, wn, bp, bn = x.clamp(min=0), x.clamp(max=0), w.clamp(min=0), w.clamp(max=0), b.clamp(min=0), b.clamp(
        max=0)
    up = [(xp, wp, bp), (xn, wn, None)]
    down = [(xp, wn, bn), (xn, wp, None)]

    def over(parts: Sequence[Any], mask: Tensor | float = 1.0) -> Tensor:
        return mask * r / stabilised(sum(layer(*part) for part in parts), eps)  # type: ignore[arg-type]

    if rule == "epsilon":
        return shared_out(layer, [(x, w, b)], [over([(x, w, b)])])
    if rule == "gamma":
        g, y = given["gamma"], layer(x, w, b)
        up = [(xp, w + g * wp, b + g * bp), (xn, w + g * wn, None)]
        down = [(xp, w + g * wn, b + g * bn), (xn, w + g * wp, None)]
        return shared_out(layer, up + down, [over(up, (y > 0).to(y))] * 2 + [over(down, (y < 0).to(y))] * 2)
    if rule == "zplus":
        return shared_out(layer, up, [over(up)] * 2)
    if rule == "alpha_beta":
        alpha, beta = given["alpha"], given["beta"]
        return shared_out(layer, up + down, [over(up)] * 2 + [over(down)] * 2, [alpha] * 2 + [-beta] * 2)
    if rule == "zbox":
        low, high = (torch.as_tensor(given[name], dtype=x.dtype).expand(x.shape).clone() for name in ("low", "high"))
        s = r / stabilised(layer(x, w, b) - layer(low, wp, bp) - layer(high, wn, bn), eps)
        return shared_out(layer, [(x, w, b), (low, wp, bp), (high, wn, bn)], [s] * 3, [1, -1, -1])
    one = torch.ones_like(x)
    part = (one, w ** 2, b ** 2) if rule == "w_square" else (one, torch.ones_like(w), torch.zeros_like(b))
    return shared_out(layer, [part], [over([part])])


CONV: dict[str, Any] = {"stride": (2, 1), "padding": (1, 2), "groups": 2}
LAYERS: dict[str, tuple[Layer, Case]] = {}
_rng = np.random.default_rng(8)
LAYERS["linear"] = functional.linear, case(
    "linear", _rng.normal(size=(3, 7)), _rng.normal(size=(5, 7)), _rng.normal(size=5))
LAYERS["conv2d"] = lambda x, w, b: functional.conv2d(x, w, b, **CONV), case(
    "conv2d", _rng.normal(size=(2, 4, 5, 6)), _rng.normal(size=(6, 2, 3, 2)), _rng.normal(size=6), **CONV)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("rule", "ours", "eps", "params"), [
    ("epsilon", "epsilon(1e-6)", 1e-6, {}),
    ("gamma", "gamma(0.25, 1e-6)", 1e-6, {"gamma": 0.25}), ("gamma", "gamma(2, 0.1)", 0.1, {"gamma": 2.0}),
    ("zplus", "zplus", 1e-12, {}), ("alpha_beta", "alpha_beta(2, 1)", 1e-12, {"alpha": 2, "beta": 1}),
    ("alpha_beta", "alpha_beta(1, 0)", 1e-12, {"alpha": 1, "beta": 0}),
    ("w_square", "w_square", 0, {}), ("flat", "flat", 0, {}),
    ("zbox", "zbox(-4, 3.5)", 0, {"low": -4, "high": 3.5}), ("zbox", "zbox(-4, 4)", 0, {"low": -4, "high": 4})])
def test_rules_are_those_of_zennit(layer: str, rule: str, ours: str, eps: float, params: dict[str, Any]) -> None:
    torch_layer, one = LAYERS[layer]
    x, w, b = (torch.from_numpy(array) for array in one.operands)
    seed = np.random.default_rng(1).normal(size=torch_layer(x, w, b).shape)
    expected = zennit(rule, torch_layer, x, w, b, torch.from_numpy(seed), eps, **params).numpy()
    np.testing.assert_allclose(explained(one, ours, seed), expected, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("bounds", ["zbox(low=[-4, -3.5, -3, -5], high=3)", "zbox([-4, -4, -3, -3], [3, 3, 4, 4])"])
def test_a_box_has_bounds_per_channel(bounds: str) -> None:
    torch_layer, one = LAYERS["conv2d"]
    x, w, b = (torch.from_numpy(array) for array in one.operands)
    seed = np.random.default_rng(1).normal(size=torch_layer(x, w, b).shape)
    found = dict(parse_rule(bounds).params)
    low, high = (np.broadcast_to(np.reshape(found[name], (-1, 1, 1)), (4, 1, 1)) for name in ("low", "high"))  # type: ignore[arg-type]
    expected = zennit("zbox", torch_layer, x, w, b, torch.from_numpy(seed), 0, low=low.copy(), high=high.copy()).numpy()
    np.testing.assert_allclose(explained(one, bounds, seed), expected, atol=1e-9 * np.abs(expected).max())
    _, last = LAYERS["linear"]
    per_feature = f"zbox(low={[-4.0 - i for i in range(7)]}, high=4)"
    graph, inputs, weights = last.graph()
    composite, seeds = Composite([("linear", per_feature)]), np.ones((1, 3, 5))
    lowered = Lower().run(Pair(rules=composite).run(graph))
    np.testing.assert_allclose(interpret(lowered, inputs, weights, {"R.y": seeds}).relevance[0],
                               dense.explain(graph, composite, inputs, weights, seeds)[0], rtol=1e-8)
    with pytest.raises(RuleError, match=r"7 channels, and `conv2d` reads 4"):
        explained(one, per_feature, seed)


class Net(nn.Module):
    """What a small image classifier is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.wide, self.narrow = nn.Conv2d(6, 8, 3, stride=2), nn.Conv2d(8, 4, 1)
        self.last = nn.Conv2d(4, 8, 3, padding=1)
        self.pool, self.mean, self.head = nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        x = torch.relu(self.last(self.narrow(torch.relu(self.wide(x)))))  # `narrow` is a linear bottleneck
        return self.head(self.mean(x).flatten(1))


def net() -> Net:
    torch.manual_seed(3)
    model = Net().eval()
    nn.init.normal_(model.norm.running_mean, std=0.3)
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    nn.init.normal_(model.norm.bias, std=0.3)
    return model


def by_hand(model: Net, x: Tensor, seed: Tensor, first: str, convs: str, eps: float, **params: Any) -> Tensor:
    """The composites of zennit with batch norm merged into the convolution before it; pooling by the gradient (max)
    and the epsilon rule (mean), activations passed; float64. The rules of convolutions but gamma have no stabiliser
    here; zennit's is 1e-6."""
    small = eps if convs == "gamma" else 1e-12
    scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    stem = (model.stem.weight * scale[:, None, None, None],
            (model.stem.bias - model.norm.running_mean) * scale + model.norm.bias)  # type: ignore[operator]

    def layer(module: nn.Conv2d) -> Layer:
        return lambda x, w, b: functional.conv2d(x, w, b, module.stride, module.padding)  # type: ignore[arg-type]

    w, b = (p.detach() for p in stem)
    a = functional.conv2d(x, w, b, padding=1).relu()
    pooled, winners = functional.max_pool2d(a, 2, return_indices=True)
    steps = [(pooled, model.wide), (model.wide(pooled).relu(), model.narrow)]
    steps.append((model.narrow(steps[-1][0]), model.last))
    top = model.last(steps[-1][0]).relu()
    mean = model.mean(top)
    r = zennit("epsilon", functional.linear, mean.flatten(1), model.head.weight, model.head.bias, seed, eps)
    r = shared_out(lambda x, w, b: model.mean(x), [(top, w, None)], [r.reshape(mean.shape) / stabilised(mean, eps)])
    for inner, module in reversed(steps):
        assert module.bias is not None
        r = zennit(convs, layer(module), inner, module.weight, module.bias, r, small, **params)
    r = functional.max_unpool2d(r, winners, 2, output_size=a.shape)
    return zennit(first, layer(model.stem), x, w, b, r, 1e-12, **params)


BOX = {"low": torch.tensor([-3.0, -3.5, -4.0])[:, None, None], "high": torch.tensor(4.0)}
COMPOSITES: dict[str, tuple[list[tuple[str, str]], str, str, dict[str, Any]]] = {
    "EpsilonGammaBox": ([("stem", "zbox(low=[-3, -3.5, -4], high=4)"), ("convolution", "gamma(0.25, 1e-6)")],
                        "zbox", "gamma", {"gamma": 0.25, **BOX}),
    "EpsilonPlus": ([("convolution", "zplus")], "zplus", "zplus", {}),
    "EpsilonPlusFlat": ([("stem", "flat"), ("convolution", "zplus")], "flat", "zplus", {}),
    "EpsilonAlpha2Beta1": ([("convolution", "alpha_beta(2, 1)")], "alpha_beta", "alpha_beta", {"alpha": 2, "beta": 1}),
    "EpsilonAlpha2Beta1Flat": ([("stem", "flat"), ("convolution", "alpha_beta(2, 1)")], "flat", "alpha_beta",
                               {"alpha": 2, "beta": 1})}


@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_composites_of_zennit(name: str, backend: str) -> None:
    """The whole way: compiled, float32, known signs used, against the composite by hand in float64."""
    entries, first, convs, params = COMPOSITES[name]
    rules = Composite([*entries, ("linear_map", "epsilon(1e-6)")], base="epsilon")
    model, x = net(), torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 6 - 3
    explanation = dlbc.compile(model, x, rules=rules, backend=backend, cache=False)(x, target=2)
    assert explanation.conservation().closes()
    seed = torch.zeros(2, 5, dtype=torch.float64)
    seed[:, 2] = 100
    seed = seed * torch.sign(model(x).detach()).double()  # relevance as percent of the explained number
    expected = by_hand(model.double(), x.double(), seed, first, convs, 1e-6, **params).detach().numpy()
    found = np.asarray(explanation.relevance["x"])
    assert np.linalg.norm(found.reshape(expected.shape) - expected) <= 2e-5 * np.linalg.norm(expected)


# --- gamma ---------------------------------------------------------------------------------------------

def test_gamma_stays_bounded_on_a_linear_bottleneck() -> None:
    """conv, conv 1x1 without activation, conv: what enters the last is of both signs, and the plain rule's denominator
    y + gamma (W+ x + b+) crosses 0 where y does not."""
    rng, g = np.random.default_rng(4), 0.25
    image = rng.uniform(0.5, 1.5, size=(1, 2, 4, 4))
    image[0, :, 1, 2] = 4.0, 5.0 - 1e-9  # here the bottleneck is (-4, -5 + 1e-9): y = 1 and W+ x = -4
    kernels = [np.array(k)[..., None, None] for k in ([[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]],
                                                      [[1.0, -1.0], [0.5, 0.3]])]
    x, at = Value("x", Type("f32", (1, 2, 4, 4))), Builder(["x"])
    weights = {f"w{i}": k for i, k in enumerate(kernels)}
    declared = {name: Weight(name, Type("f32", (2, 2, 1, 1))) for name in weights}
    y: Value = at.relu(at.conv2d(x, declared["w0"]))
    y = at.conv2d(at.conv2d(y, declared["w1"]), declared["w2"], result="y")
    graph = Graph("bottleneck", Section((x,), tuple(at.ops), (y,)), weights=declared,
                  attrs={"inputs": ("x",), "outputs": ("y",)})
    seed = rng.uniform(0.5, 1, size=(1, 1, 2, 4, 4))
    composite = Composite([("convolution", f"gamma({g})"), ("activation", "identity")])
    found = interpret(Lower().run(Pair(rules=composite).run(graph)), {"x": image}, weights, {"R.y": seed}).relevance[0]
    plain = torch.from_numpy(seed[0])
    steps = [image, image, np.einsum("oi,bihw->bohw", kernels[1][..., 0, 0], image)]
    for value, kernel in zip(reversed(steps), reversed(kernels), strict=True):
        k = torch.from_numpy(kernel)
        raised = k + g * k.clamp(min=0)
        s = plain / stabilised(functional.conv2d(torch.from_numpy(value), raised), 1e-9)
        plain = shared_out(functional.conv2d, [(torch.from_numpy(value), raised, None)], [s])
    assert plain.abs().max() > 1e9
    most = (2 * (1 + g) / g) ** 3 * seed.max()
    assert np.abs(found).max() < most  # each layer: at most T (1 + g) / (g T / 2) times
    assert np.abs(found).max() < 100


def rectified_chain(relu: str = "relu") -> tuple[Graph, dict[str, Array], dict[str, Array]]:
    """x >= 0 known, then conv and a ReLU: gamma needs one product less."""
    rng = np.random.default_rng(2)
    x, at = Value("x", Type("f32", (2, 2, 4, 4))), Builder(["x"])
    kinds = {"w0": (3, 2, 2, 2), "b0": (3,), "w1": (4, 3, 2, 2), "b1": (4,)}
    weights = {name: rng.normal(size=shape) for name, shape in kinds.items()}
    declared = {name: Weight(name, Type("f32", shape)) for name, shape in kinds.items()}

    def activation(v: Value) -> Value:
        found: Value = at.relu(v) if relu == "relu" else at.clamp(v, low=0.0, high=6.0)
        return found

    h = activation(at.conv2d(x, declared["w0"], declared["b0"]))
    y = at.reshape(at.neg(activation(at.conv2d(h, declared["w1"], declared["b1"]))), shape=(2, 16), result="y")
    graph = Graph("chain", Section((x,), tuple(at.ops), (y,)), weights=declared,
                  attrs={"inputs": ("x",), "outputs": ("y",)})
    return graph, {"x": rng.normal(size=(2, 2, 4, 4))}, weights


@pytest.mark.parametrize("relu", ["relu", "clamp"])
@pytest.mark.parametrize(("rule", "saved"), [("gamma(0.4)", 1), ("gamma(0.4, 0.2)", 1), ("zplus", 2)])
def test_known_signs_save_a_product_and_change_nothing(rule: str, saved: int, relu: str) -> None:
    graph, inputs, weights = rectified_chain(relu)
    composite = Composite([("conv2d", rule)], base="epsilon")
    seed = np.random.default_rng(5).normal(size=(3, 2, 16))
    paired = Pair(rules=composite).run(graph)
    lowered = run(Lower().run(paired), (EliminateCommon(), EliminateDead()))
    found = interpret(lowered, inputs, weights, {"R.y": seed}).relevance[0]
    np.testing.assert_allclose(found, dense.explain(graph, composite, inputs, weights, seed)[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(found, interpret(paired, inputs, weights, {"R.y": seed}, expand=expand).relevance[0])
    assert lowered.relevance is not None
    products = [op for op in lowered.relevance.ops if op.name.startswith("conv")]
    of = [op.of for op in products]
    first, second = (op.result.name for op in graph.forward.ops if op.name == "conv2d")
    assert of.count(first) - of.count(second) == saved and of.count(second) == 2


@pytest.mark.parametrize("rule", ["gamma", "zplus", "zbox(-4, 4)", "w_square", "flat"])
def test_what_weights_alone_decide_is_computed_once(rule: str) -> None:
    """Hoisted into `prepare`, the same numbers come out; the rest of the section reads no part of a weight again."""
    graph, inputs, weights = rectified_chain()
    paired = Pair(rules=Composite([("conv2d", rule)], base="epsilon")).run(graph)
    lowered = run(Lower().run(paired), (EliminateCommon(),))
    hoisted = run(lowered, (HoistConstants(relevance=True), EliminateDead()))
    seed = {"R.y": np.random.default_rng(5).normal(size=(1, 2, 16))}
    np.testing.assert_array_equal(interpret(hoisted, inputs, weights, seed).relevance[0],
                                  interpret(lowered, inputs, weights, seed).relevance[0])
    assert hoisted.relevance is not None and hoisted.forward.body == lowered.forward.body
    parts = {"abs", "relu", "neg"} - ({"neg"} if rule == "gamma" else set())
    made = [(op.name, *map(str, op.operands), *op.attrs.values()) for op in hoisted.prepare.ops]
    assert len(set(made)) == len(made) > 0
    assert not [op for op in hoisted.relevance.ops if op.name in parts and str(op.operands[0]).startswith("@")]
    assert parse_graph(print_graph(hoisted)) == hoisted


def test_precompute_is_asked_for_by_name() -> None:
    """The numbers are the same; what is kept is in the plan of memory. It follows the weights."""
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)).eval().requires_grad_(False)
    x = torch.randn(4, 6)
    never, auto = (dlbc.compile(model, x, rules="dlb", cache=False, precompute=how) for how in ("never", "auto"))
    assert never.memory(x).between == 0 and auto.memory(x).between == 4 * (6 * 40 + 40 + 40 * 3 + 3)
    for _ in range(2):
        np.testing.assert_array_equal(auto(x, target=1).relevance["input"], never(x, target=1).relevance["input"])
        model[0].weight.mul_(-1.5)
    with pytest.raises(InputError, match="precompute='sometimes'"):
        dlbc.compile(model, x, precompute="sometimes")


def test_the_size_of_a_weight_is_kept_where_few_rows_read_it() -> None:
    """|W| of a classifier, which takes longer to make than to use; not that of a layer over positions."""
    at = Builder(["x"])
    x = Value("x", Type("f32", (symbol("B"), symbol("T"), 4)))
    wide, narrow = Weight("wide", Type("f32", (5, 4))), Weight("narrow", Type("f32", (3, 5)))
    hidden = at.relu(at.linear(x, wide))
    y = at.linear(at.mean(hidden, dims=(1,)), narrow, result="y")
    graph = Graph("words", Section((x,), tuple(at.ops), (y,)), dims={"B": (1, 8), "T": (1, 64)},
                  weights={"wide": wide, "narrow": narrow}, attrs={"inputs": ("x",), "outputs": ("y",)})
    lowered = run(Lower().run(Pair(composite="dlb").run(graph)), (EliminateCommon(),))
    rng = np.random.default_rng(3)
    numbers = {"wide": rng.normal(size=(5, 4)), "narrow": rng.normal(size=(3, 5))}
    inputs, seed = {"x": rng.normal(size=(2, 6, 4))}, {"R.y": rng.normal(size=(2, 2, 3))}
    for few, made in ((True, ["@narrow"]), (False, ["@wide", "@narrow"])):
        hoisted = run(lowered, (HoistConstants(relevance=True, few=few), EliminateDead()))
        assert sorted(str(op.operands[0]) for op in hoisted.prepare.ops if op.name == "abs") == sorted(made)
        np.testing.assert_array_equal(interpret(hoisted, inputs, numbers, seed).relevance[0],
                                      interpret(lowered, inputs, numbers, seed).relevance[0])


@pytest.mark.parametrize("entries", [
    [("relu", "pass")],  # leaves relevance where y < 0
    [("first", "gamma")],  # relevance, not a multiplier, comes to the second convolution
])
def test_signs_are_not_taken_for_known_where_more_passes_the_relu(entries: list[tuple[str, str]]) -> None:
    graph, inputs, weights = rectified_chain()
    composite = Composite([*entries, ("conv2d", "gamma"), ("move", "move"), ("activation", "identity")])
    seed = np.random.default_rng(5).normal(size=(1, 2, 16))
    found = interpret(Lower().run(Pair(rules=composite).run(graph)), inputs, weights, {"R.y": seed}).relevance[0]
    np.testing.assert_allclose(found, dense.explain(graph, composite, inputs, weights, seed)[0], rtol=1e-9)


def test_what_is_never_negative() -> None:
    x, w = Value("x", Type("f32", (2, 3, 4))), Weight("w", Type("f32", (4,)))
    at = Builder(["x"])
    a, b = at.relu(x, result="a"), at.clamp(x, low=0.0, high=6.0, result="b")
    sure = [at.reshape(at.add(a, at.sigmoid(x)), shape=(6, 4)), at.mul(a, b), at.mul(a, 2.0), at.mean(a, dims=(1,)),
            at.maximum(x, a), at.cat(a, b, dim=0), at.pad(a, pads=((0, 0), (0, 0), (1, 1))), at.add(a, 1.0)]
    unsure = [at.mul(a, w), at.sub(a, b), at.mul(a, -1.0), at.minimum(x, a), at.cat(a, x, dim=0), at.add(a, x),
              at.clamp(x, high=6.0), at.pad(a, pads=((0, 0), (0, 0), (1, 1)), value=-1.0), at.neg(a), at.silu(a)]
    graph = Graph("signs", Section((x,), tuple(at.ops), (a,)), weights={"w": w})
    found = nonnegative(graph)
    assert {v.name for v in sure} <= found and not {v.name for v in unsure} & found


# --- float32 -------------------------------------------------------------------------------------------

class OneSign(nn.Module):
    """All contributions but the bias's are positive, whatever the sign of the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(700, 12)
        with torch.no_grad():
            self.layer.weight.abs_()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize("rule", ["alpha_beta", "alpha_beta(1, 0)", "absolute(low=1000)", "zplus"])
def test_a_side_of_nothing_but_rounding_is_empty(rule: str, backend: str) -> None:
    """In float32 (T - y) / 2 is not quite 0 where there is no negative contribution: nothing may be divided by it."""
    torch.manual_seed(0)
    model, x = OneSign().eval(), torch.rand(1, 700) + 0.1
    with torch.no_grad():
        model.layer.bias.copy_(torch.tensor([0.0, 1e-7, -1e-7, 1e-10, -1e-10, 1e-4, -1e-4, 1.0, -1.0, 10.0, -10.0, 0]))
    explainer = dlbc.compile(model, x, rules=Composite([("linear", rule)], base="dlb"), backend=backend, cache=False)
    weights, biases = (p.detach().double().numpy() for p in (model.layer.weight, model.layer.bias))
    for target in range(12):
        explanation = explainer(x, target=target)
        found, b = np.asarray(explanation.relevance["x"]).ravel(), float(biases[target])
        z = weights[target] * x[0].double().numpy()
        expected = 100 * z / (z.sum() + max(b, 0)) * (2 if rule == "alpha_beta" else 1)
        if rule.startswith("absolute"):
            expected = np.zeros_like(z)  # y lies below 1000: only negative contributions would count
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-4)
        assert explanation.conservation().closes()


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_models_split_in_float32(rule: str) -> None:
    """y rounded to bfloat16 is not compared with sums in float32."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 3)).eval().bfloat16(), torch.rand(2, 40)
    rules = Composite([("linear_map", rule)], base="dlb")
    found = dlbc.compile(model, x.bfloat16(), rules=rules, cache=False)(x.bfloat16(), target=1)
    exact = dlbc.compile(model.float(), x, rules=rules, cache=False)(x.bfloat16().float(), target=1)
    one, other = (np.asarray(e.relevance["input"], np.float64) for e in (found, exact))
    assert np.linalg.norm(one - other) <= 4e-2 * np.linalg.norm(other)


# --- laws ----------------------------------------------------------------------------------------------

def ledger(graph: Graph, composite: Composite, inputs: dict[str, Array], weights: dict[str, Array], seeds: Array
           ) -> tuple[list[Array], list[Any]]:
    """Relevance of the inputs, and the ledger's entries with their values [S]."""
    lowered = Lower(ledger=True).run(Pair(rules=composite).run(graph))
    assert lowered.relevance is not None
    found = list(interpret(lowered, inputs, weights, {lowered.relevance.params[0].name: seeds}).relevance)
    entries: Any = lowered.attrs["ledger"]
    at = len(found) - len(entries)
    return found[:at], list(zip(entries, found[at:], strict=True))


@few
@given(models(), st.sampled_from(RULES), st.booleans())
def test_laws_on_random_graphs(model: Model, rule: str, zero: bool) -> None:
    """Finite, linear in the seed, batch invariant, and the ledger closes."""
    composite = Composite([("linear_map", rule)], base="cp-lrp" if rule.startswith("gamma") else "dlb")
    lowered = Lower().run(Pair(rules=composite).run(model.graph))
    assert lowered.relevance is not None
    weights = {n: np.zeros_like(a) if zero and not np.isinf(a).any() else a for n, a in model.weights.items()}

    def relevance(inputs: dict[str, Array], seeds: Array) -> Array:
        name = lowered.relevance.params[0].name  # type: ignore[union-attr]
        return interpret(lowered, inputs, weights, {name: seeds}).relevance[0]

    inputs, (s, t) = model.inputs(), model.seeds(2)
    one, other, both = relevance(inputs, np.stack([s, t, 2 * s - 3 * t]))
    assert np.isfinite(both).all()
    size = max(np.abs(both).max(), np.abs(one).max(), np.abs(other).max(), 1e-3)
    assert np.abs(both - (2 * one - 3 * other)).max() <= 1e-6 * size
    assert_closes(*ledger(model.graph, composite, inputs, weights, model.seeds(2)), model.seeds(2))
    row = relevance({name: array[1:] for name, array in inputs.items()}, s[None, 1:])[0]
    assert np.abs(row - one[1:]).max(initial=0) <= 1e-9 * size


# --- parameters ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("rule", "says"), [
    ("gamma(-1)", "0 or more"), ("gamma(inf)", "finite"), ("gamma(nan)", "not a number"), ("gamma(1, 0)", "positive"),
    ("alpha_beta(2, 2)", "alpha - beta must be 1"), ("alpha_beta(0.5, -0.5)", "neither may be negative"),
    ("alpha_beta(inf, inf)", "must be 1"), ("zbox(1, -1)", "low below high"), ("zbox(0, 0)", "low below high"),
    ("zbox(-inf, 1)", "finite"), ("zbox([0, 0], [1, 0])", "channel 1"), ("zbox([0, 0], [1, 1, 1])", "2 numbers"),
    ("absolute(1, 1)", "low must be below high"), ("absolute(low=inf)", "low must be below high"),
    ("absolute(low=[1, 2])", "must be a number"), ("w_square(1)", "no parameter")])
def test_parameters_that_make_no_sense(rule: str, says: str) -> None:
    with pytest.raises(RuleError, match=says):
        parse_rule(rule)


def test_rules_read_back_from_text() -> None:
    graph, _, _ = rectified_chain()
    for rule in ("absolute", "absolute(low=-2)", "zbox(low=[-2, -1.5], high=[3, inf])"[:29] + "3])", "gamma(0.1)",
                 "alpha_beta(2, 1)"):
        base = "epsilon" if rule.startswith("gamma") else "dlb"
        paired = Pair(rules=Composite([("first", rule), ("conv2d", "zplus")], base=base)).run(graph)
        assert parse_graph(print_graph(paired)) == paired
    assert "<absolute(-inf, inf)>" in print_graph(Pair(composite="dlb").run(graph))
    assert "<gamma(0.25, 1e-09)>" in print_graph(
        Pair(rules=Composite([("conv2d", "gamma")], base="epsilon")).run(graph))


def test_data_beyond_the_bounds_are_told() -> None:
    image = np.zeros((2, 3, 4, 5))
    bounds = Bounds("x", (-1.0, -2.0, -3.0), (2.0, 2.0, 2.0))
    bounds.check(image)
    bounds.check(image + 2.002)  # a thousandth of the range: rounding
    bounds.check(np.zeros((0, 3)))
    image[1, 1, 2, 3] = -2.5
    with pytest.raises(InputError, match=r"`x` goes 0.5 below the bound `low=-2`(.|\n)*holds -2.5") as caught:
        bounds.check(image)
    assert "[1, 1, 2, 3]" in str(caught.value)
    with pytest.raises(InputError, match=r"1 above the bound `high=2`"):
        bounds.check(np.full((1, 3), 3.0))
    with pytest.raises(InputError, match=r"3 channels, input `x` has shape \[2, 4\]"):
        bounds.check(np.zeros((2, 4)))
    Bounds("x", (0.0,), (1.0,)).check(np.linspace(0, 1, 6))
    with pytest.raises(InputError, match="high=1"):
        Bounds("x", (0.0,), (1.0,)).check(np.array(math.pi))


@pytest.mark.parametrize("low", ["-3", "[-3, -2]"])
def test_the_box_must_hold_the_data(low: str, tmp_path: Path) -> None:
    """Both when compiling and in every call, saved or not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).eval()
    x = torch.rand(1, 2, 4, 4)
    rules = Composite([("convolution & first", f"zbox(low={low}, high=1)")], base="epsilon")
    explainer = dlbc.compile(model, x, rules=rules, cache=False)
    explainer.save(tmp_path / "box.dlbc")
    for one in (explainer, dlbc.load(tmp_path / "box.dlbc", model)):
        assert one(x).conservation().closes()
        with pytest.raises(InputError, match="above the bound `high=1`"):
            one(x + 1)
    with pytest.raises(InputError, match="below the bound"):
        dlbc.compile(model, x - 5, rules=rules, cache=False)

