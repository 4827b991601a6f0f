"""How a graph is run: sizes, sections, weights, functions, kernels, relevance ops, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from dlbc.errors import InputError, IRError
from dlbc.ir.builder import Builder
from dlbc.ir.core import Function, Graph, Kernel, Op, Rule, Section, Type, Value, Weight
from dlbc.ir.dims import symbol
from dlbc.ir.interpreter import interpret

B, T, S = symbol("B"), symbol("T"), symbol("S")
X = Value("x", Type("f32", (B, T, 4)))
SEED = Value("R.y", Type("f32", (S, B, T, 3)))
WEIGHT, BIAS = Weight("fc.weight", Type("f32", (3, 4))), Weight("fc.bias", Type("f32", (3,)))
WEIGHTS = {"fc.weight": np.arange(12, dtype=np.float32).reshape(3, 4) - 5, "fc.bias": np.ones(3, np.float32)}
INPUT = np.linspace(-1, 1, 2 * 5 * 4, dtype=np.float32).reshape(2, 5, 4)


def model(relevance: Sequence[Op] = (), carried: tuple[Value, ...] = ()) -> Graph:
    """`y = relu(x |W|^T + b)` with |W| prepared."""
    prepare, forward = Builder(), Builder({"x"})
    absolute = prepare.abs(WEIGHT, result="p")
    h = forward.linear(X, absolute, BIAS, result="h", place="fc")
    y = forward.relu(h, result="y", place="act")
    return Graph("model", Section((X,), tuple(forward.ops), (y,), (h,)),
                 dims={"B": (1, 8), "T": (1, 64)}, weights={w.name: w for w in (WEIGHT, BIAS)},
                 prepare=Section((), tuple(prepare.ops), (absolute,)),
                 relevance=Section((SEED,), tuple(relevance), carried) if carried else None)


def test_prepare_and_forward() -> None:
    run = interpret(model(), {"x": INPUT}, WEIGHTS)
    h = INPUT.astype(np.float64) @ np.abs(WEIGHTS["fc.weight"].astype(np.float64)).T + 1
    assert run.sizes == {"B": 2, "T": 5}
    np.testing.assert_allclose(run.values["h"], h)
    np.testing.assert_allclose(run.outputs[0], np.maximum(h, 0))
    assert run.outputs[0].dtype == np.float64
    assert run.relevance == ()
    assert set(run.values) == {"x", "p", "h", "y"}


def test_relevance_reads_forward_and_prepared_values() -> None:
    h, p = Value("h", Type("f32", (B, T, 3))), Value("p", Type("f32", (3, 4)))
    at = Builder({"x", "h", "y", "p", "R.y"})
    share = at.safe_div(SEED, h)
    back = at.matmul(share, p)
    r = at.mul(back, X, result="R.x")
    graph = model(at.ops, (r,))
    seeds = np.random.default_rng(0).normal(size=(3, 2, 5, 3))
    run = interpret(graph, {"x": INPUT}, WEIGHTS, {"R.y": seeds})
    assert run.sizes == {"B": 2, "T": 5, "S": 3}
    expected = (seeds / run.values["h"]) @ np.abs(WEIGHTS["fc.weight"]) * INPUT
    np.testing.assert_allclose(run.relevance[0], expected)
    assert interpret(graph, {"x": INPUT}, WEIGHTS).relevance == ()


def test_expand_gives_a_relevance_op_its_primitives() -> None:
    r = Value("R.h", Type("f32", (S, B, T, 3)))
    op = Op("rel.relu", (SEED,), (r,), place="act", rule=Rule("identity"), of="y")
    graph = model([op], (r,))
    seeds = np.ones((1, 2, 5, 3))

    def expand(graph: Graph, op: Op) -> Sequence[Op]:
        # `h` inside must not replace the forward value of that name
        half = Value("h", r.type)
        return [Op("mul", (op.operands[0], 0.5), (half,)), Op("add", (half, 1), (op.result,))]

    run = interpret(graph, {"x": INPUT}, WEIGHTS, {"R.y": seeds}, expand=expand)
    np.testing.assert_array_equal(run.relevance[0], np.full((1, 2, 5, 3), 1.5))
    assert run.values["h"].shape == (2, 5, 3)
    with pytest.raises(IRError, match=r"#act: `rel\.relu` is no primitive"):
        interpret(graph, {"x": INPUT}, WEIGHTS, {"R.y": seeds})


def test_functions_have_their_own_values_weights_and_sizes() -> None:
    n = symbol("N")
    a, w = Value("a", Type("f32", (B, n, 4))), Weight("w", Type("f32", (4,)))
    inner = Builder({"a"})
    scaled = inner.mul(a, w, result="h")
    mean = inner.mul(inner.sum(scaled, dims=(1,), keepdim=True), inner.full(shape=(), value=n, dtype="f32"))
    function = Function("block", (a, w), tuple(inner.ops), (scaled, mean))
    first, second = Weight("0.w", w.type), Weight("1.w", w.type)

    def call(x: Value, weight: Weight, h: str, m: str) -> Op:
        size = x.type.shape[1]
        return Op("call", (x, weight), (Value(h, Type("f32", (B, size, 4))), Value(m, Type("f32", (B, 1, 4)))),
                  {"function": "block"})

    one = call(X, first, "h", "m")
    two = call(one.results[1], second, "h.1", "m.1")
    graph = Graph("calls", Section((X,), (one, two), (*two.results, one.results[0])),
                  weights={w.name: w for w in (first, second)}, functions={"block": function})
    given = {"0.w": np.arange(4), "1.w": np.ones(4) * 2}
    run = interpret(graph, {"x": INPUT}, given)
    np.testing.assert_allclose(run.values["h"], INPUT * np.arange(4))
    np.testing.assert_allclose(run.values["m"], 5 * (INPUT * np.arange(4)).sum(1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(run.values["m.1"], 2 * run.values["m"])
    assert set(run.values) == {"x", "h", "m", "h.1", "m.1"}
    unknown = replace(graph, forward=replace(graph.forward, body=(replace(one, attrs={"function": "blok"}),)))
    with pytest.raises(IRError, match="no function `@blok`"):
        interpret(unknown, {"x": INPUT}, given)


def test_kernels_run_their_ops() -> None:
    graph = model()
    fused = Kernel("f0", "gemm", graph.forward.body, graph.forward.results)  # type: ignore[arg-type]
    inside = replace(graph, forward=replace(graph.forward, body=(fused,)))
    np.testing.assert_array_equal(interpret(inside, {"x": INPUT}, WEIGHTS).outputs[0],
                                  interpret(graph, {"x": INPUT}, WEIGHTS).outputs[0])


def test_sizes_in_attributes_and_as_operands() -> None:
    at = Builder({"x"})
    last = at.select(X, dim=1, index=T - 1)
    flat = at.reshape(X, shape=(B * T, 4))
    scaled = at.mul(at.sum(flat, dims=(0,)), 2 * T)
    graph = Graph("sizes", Section((X,), tuple(at.ops), (last, scaled)))
    run = interpret(graph, {"x": INPUT}, {})
    np.testing.assert_array_equal(run.outputs[0], INPUT[:, -1])
    np.testing.assert_allclose(run.outputs[1], 10 * INPUT.astype(np.float64).sum((0, 1)))


def test_narrow_integers_wrap_and_halves_do_not_round() -> None:
    a = Value("a", Type("u8", (2,)))
    at = Builder({"a"})
    results = (at.add(a, 1), at.cast(a, dtype="i8"), at.cast(at.div(a, 3), dtype="f16"), at.cast(a, dtype="bool"))
    graph = Graph("narrow", Section((a,), tuple(at.ops), results))
    added, signed, third, true = interpret(graph, {"a": np.array([255, 0])}, {}).outputs
    assert (added.tolist(), signed.tolist(), true.tolist()) == ([0, 1], [-1, 0], [True, False])
    assert (added.dtype, true.dtype) == (np.int64, np.bool_)
    np.testing.assert_array_equal(third, [85, 0])


@pytest.mark.parametrize(("inputs", "weights", "message"), [
    ({}, WEIGHTS, "no array is given for `%x`"),
    ({"x": INPUT[0]}, WEIGHTS, r"`%x` has shape \(5, 4\), its type is f32\[B,T,4\]"),
    ({"x": INPUT[..., :3]}, WEIGHTS, r"%x has shape \[2, 5, 3\]"),
    ({"x": INPUT}, {"fc.weight": WEIGHTS["fc.weight"]}, r"no array is given for the weight `@fc\.bias`"),
    ({"x": INPUT}, {**WEIGHTS, "fc.bias": np.ones(4)}, r"@fc\.bias has shape \[4\]"),
])
def test_arrays_that_do_not_fit(inputs: dict[str, np.ndarray], weights: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        interpret(model(), inputs, weights)


def test_a_size_has_one_value() -> None:
    other = Value("mask", Type("bool", (B, T)))
    graph = replace(model(), forward=replace(model().forward, params=(X, other)))
    with pytest.raises(InputError, match=r"%mask has shape \[2, 4\], its type bool\[B,T\] says \[2, 5\]"):
        interpret(graph, {"x": INPUT, "mask": np.ones((2, 4))}, WEIGHTS)


def test_an_op_that_does_not_do_what_its_type_says() -> None:
    wrong = Value("y", Type("f32", (B, T, 5)))
    graph = Graph("wrong", Section((X,), (Op("relu", (X,), (wrong,), place="act"),), (wrong,)))
    with pytest.raises(IRError, match=r"#act `relu` to %y has shape \[2, 5, 4\], its type f32\[B,T,5\]"):
        interpret(graph, {"x": INPUT}, {})
    graph = Graph("wrong", Section((X,), (Op("matmul", (X, X), (wrong,), place="act"),), (wrong,)))
    with pytest.raises(IRError, match=r"#act: `matmul` of shapes \[2, 5, 4\], \[2, 5, 4\]"):
        interpret(graph, {"x": INPUT}, {})
    graph = Graph("wrong", Section((X,), (Op("relu", (wrong,), (wrong,), place="act"),), (wrong,)))
    with pytest.raises(IRError, match="`%y` is read before it is defined"):
        interpret(graph, {"x": INPUT}, {})
