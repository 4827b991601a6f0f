"""What dl-backtrace 0.1.24 computes (float32, recorded from that package's own functions): reproduced where `dlb-0.1`
or `dlb` should, and different where that package is at fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dlbc.ir.builder import Builder
from dlbc.ir.core import Attr, Graph, Section, Type, Value, Weight
from dlbc.ir.interpreter import interpret
from dlbc.passes.lower import Lower
from dlbc.passes.pair import Pair

Array = NDArray[Any]
FILE = Path(__file__).parent / "data" / "dl_backtrace_0_1_24.npz"
PRESETS = ("dlb-0.1", "dlb")


@pytest.fixture(scope="module")
def golden() -> dict[str, Array]:
    with np.load(FILE) as arrays:
        return {name: arrays[name].astype(np.float64) for name in arrays}


def relevance(preset: str, op: str, inputs: list[Array], weights: list[Array], r: Array, **attrs: Attr) -> list[Array]:
    """Relevance of each input of one op."""
    params = [Value(f"x{i}", Type("f32", x.shape)) for i, x in enumerate(inputs)]
    kept = {f"w{i}": Weight(f"w{i}", Type("f32", w.shape)) for i, w in enumerate(weights)}
    at = Builder(p.name for p in params)
    y = at.op(op, *params, *kept.values(), result="y", **attrs)[0]
    return explain(preset, params, at, y, dict(zip(kept, weights, strict=True)), kept, inputs, r)


def explain(preset: str, params: list[Value], at: Builder, y: Value, weights: dict[str, Array], kept: dict[str, Weight],
            inputs: list[Array], r: Array) -> list[Array]:
    names = tuple(p.name for p in params)
    graph = Graph(
        "golden", Section(tuple(params), tuple(at.ops), (y,)), weights=kept, attrs={"inputs": names, "outputs": ("y",)}
    )
    lowered = Lower().run(Pair(composite=preset).run(graph))
    found = interpret(lowered, dict(zip(names, inputs, strict=True)), weights, {f"R.{y.name}": r[None]}).relevance
    return [one[0] for one in found]


def close(own: Array, reference: Array, tolerance: float = 1e-6) -> bool:
    """Equal to float32 rounding, as part of the largest."""
    return bool(np.abs(own - reference).max() <= tolerance * np.abs(reference).max())


def one_sided(case: str, golden: dict[str, Array]) -> Array:
    """Rows in which all contributions to some output have one sign."""
    z = golden[f"{case}/x"][..., None, :] * golden[f"{case}/w"]
    return np.any((z > 0).all(axis=-1) | (z < 0).all(axis=-1), axis=-1)


@pytest.mark.parametrize("case", ["linear_bias", "linear3d"])
def test_linear(case: str, golden: dict[str, Array]) -> None:
    x, w, b, r, expected = (golden[f"{case}/{name}"] for name in ("x", "w", "b", "R", "Rx"))
    assert close(relevance("dlb-0.1", "linear", [x], [w, b], r)[0], expected)
    ours, single = relevance("dlb", "linear", [x], [w, b], r)[0], one_sided(case, golden)
    assert close(ours[~single], expected[~single])
    assert not single.any() or not close(ours[single], expected[single], 1e-3)


def test_linear_without_bias(golden: dict[str, Array]) -> None:
    x, w, r = (golden[f"linear_bias/{name}"] for name in ("x", "w", "R"))
    assert one_sided("linear_bias", golden).tolist() == [True, False, False]
    assert close(relevance("dlb-0.1", "linear", [x], [w], r)[0], golden["linear_bias/Rx_nobias"])


@pytest.mark.parametrize("preset", PRESETS)
def test_convolution(preset: str, golden: dict[str, Array]) -> None:
    x, w, b, r = (golden[f"conv2d_s2p1/{name}"] for name in ("x", "w", "b", "R"))
    for weights, name in (([w, b], "Rx"), ([w], "Rx_nobias")):
        found = relevance(preset, "conv2d", [x], weights, r, stride=(2, 2), padding=(1, 1))[0]
        assert close(found, golden[f"conv2d_s2p1/{name}"])


def test_sum_and_product(golden: dict[str, Array]) -> None:
    x, y, r = (golden[f"add_broadcast/{name}"] for name in ("x", "y", "R"))
    found = relevance("dlb-0.1", "add", [x, y], [], r)
    assert close(found[0], golden["add_broadcast/Rx"])
    assert close(found[1], golden["add_broadcast/Ry"])
    assert not close(relevance("dlb", "add", [x, y], [], r)[0], golden["add_broadcast/Rx"], 1e-2)
    factors = np.random.default_rng(0).normal(size=(2, *golden["mul/R"].shape))
    for preset in PRESETS:
        for own, name in zip(relevance(preset, "mul", list(factors), [], golden["mul/R"]), ("Rx", "Ry"), strict=True):
            assert close(own, golden[f"mul/{name}"])


def test_attention(golden: dict[str, Array]) -> None:
    q, k, v, r = (golden[f"attention/{name}"] for name in "QKVR")
    for scale in (q.shape[-1] ** -0.5, 3.0):  # the attention weights play no part there
        found = relevance("dlb-0.1", "attention", [q, k, v], [], r, scale=scale)
        assert all(close(own, golden[f"attention/R{name}"], 1e-5) for own, name in zip(found, "QKV", strict=True))
    ours = relevance("dlb", "attention", [q, k, v], [], r, scale=q.shape[-1] ** -0.5)
    assert not any(close(own, golden[f"attention/R{name}"], 1e-2) for own, name in zip(ours, "QKV", strict=True))


def test_mean(golden: dict[str, Array]) -> None:
    x, r, expected = (golden[f"pipe_mean_keepdim/{name}"] for name in ("x", "R", "Rx"))
    assert close(relevance("dlb-0.1", "mean", [x], [], r, dims=(1,), keepdim=True)[0], expected)


POOLING: dict[str, tuple[str, dict[str, Attr]]] = {
    "maxpool_fn_k2s2": ("max_pool", {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)}),
    "avgpool_fn_k2s2": ("avg_pool", {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0)}),
    "gavgpool_fn": ("adaptive_avg_pool", {"size": (1, 1)}),
}


@pytest.mark.parametrize("case", POOLING)
@pytest.mark.parametrize("preset", PRESETS)
def test_pooling_functions(preset: str, case: str, golden: dict[str, Array]) -> None:
    x, r, expected = (golden[f"{case}/{name}"] for name in ("x", "R", "Rx"))
    op, attrs = POOLING[case]
    r = r if op != "adaptive_avg_pool" else r[..., None, None]
    assert close(relevance(preset, op, [x], [], r, **attrs)[0], expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_faults_are_not_reproduced(preset: str, golden: dict[str, Array]) -> None:
    """Relevance multiplied by T by a mean without keepdim; pooling undone by plain upsampling."""
    for case, (op, attrs) in {
            "pipe_mean_nokeepdim_B1": ("mean", {"dims": (1,)}), "pipe_maxpool_k2s2": POOLING["maxpool_fn_k2s2"],
            "pipe_adaptive_avgpool1": POOLING["gavgpool_fn"]}.items():
        x, r, fault = (golden[f"{case}/{name}"] for name in ("x", "R", "Rx"))
        found = relevance(preset, op, [x], [], r, **attrs)[0]
        assert not close(found, fault, 1e-2)
        assert found.sum() == pytest.approx(r.sum())


@pytest.mark.parametrize("preset", PRESETS)
def test_layer_norm(preset: str, golden: dict[str, Array]) -> None:
    x, w, b, r, expected = (golden[f"pipe_layernorm/{name}"] for name in ("x", "weight", "bias", "R", "Rx"))
    assert close(relevance(preset, "layer_norm", [x], [w, b], r)[0], expected)


def test_a_whole_model(golden: dict[str, Array]) -> None:
    """Linear, relu, linear: end to end."""
    weights = {name: golden[f"pipe_mlp_5_4_3/{name}"] for name in ("0_weight", "0_bias", "2_weight", "2_bias")}
    kept = {name: Weight(name, Type("f32", array.shape)) for name, array in weights.items()}
    x, at = Value("x", Type("f32", (2, 5))), Builder(["x"])
    h = at.relu(at.linear(x, kept["0_weight"], kept["0_bias"]))
    y = at.linear(h, kept["2_weight"], kept["2_bias"], result="y")
    found = explain("dlb-0.1", [x], at, y, weights, kept, [golden["pipe_mlp_5_4_3/x"]], golden["pipe_mlp_5_4_3/R"])[0]
    assert close(found, golden["pipe_mlp_5_4_3/Rx"])
