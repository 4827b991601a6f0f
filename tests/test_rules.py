"""Every rule of every op, lowered and interpreted, equals its textbook formula (`dense.py`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dlbc.composite import Composite, _fits, completed
from dlbc.ir.builder import Builder
from dlbc.ir.core import Attr, Graph, Rule, Section, Type, Value, Weight
from dlbc.ir.interpreter import interpret
from dlbc.passes.eliminate_dead import EliminateDead
from dlbc.passes.lower import Lower, expand
from dlbc.passes.outputs import FINAL
from dlbc.passes.pair import Pair
from dlbc.passes.rotations import Turned, rotations
from dlbc.passes.rules import RULES, load_rules, parse_rule
from dlbc.passes.rules.activations import STEPS, UNARY

sys.path.insert(0, str(Path(__file__).parent))
import dense

Array = NDArray[Any]
DTYPES = {"f": "f32", "i": "i64", "b": "bool"}
rng = np.random.default_rng(20240607)


@dataclass
class Case:
    """One application of an op: its operands (arrays or literals), which of them carry, attributes."""

    op: str
    operands: tuple[Any, ...]
    carried: tuple[int, ...]
    attrs: dict[str, Attr]

    def graph(self, after: str = "") -> tuple[Graph, dict[str, Array], dict[str, Array]]:
        """The graph of the op alone (`after`: and a function of its result), inputs and weights."""
        params, weights, operands = {}, {}, []
        for i, array in enumerate(self.operands):
            if not isinstance(array, np.ndarray):
                operands.append(array)
                continue
            kind = Type(DTYPES[array.dtype.kind], array.shape)
            operands.append(Value(f"x{i}", kind) if i in self.carried else Weight(f"w{i}", kind))
            (params if i in self.carried else weights)[operands[-1].name] = array
        at = Builder(params)
        y = at.op(self.op, *operands, result="y", **self.attrs)[0]
        if after:
            y = at.op(after, y, result="z")[0]
        elif self.op in FINAL:  # what a final softmax reads would be explained instead
            y = at.reshape(y, shape=y.type.shape, result="z")
        kept = {o.name: o for o in operands if isinstance(o, Weight)}
        graph = Graph(
            "case",
            Section(tuple(o for o in operands if isinstance(o, Value)), tuple(at.ops), (y,)),
            weights=kept,
            attrs={"inputs": tuple(params), "outputs": ("y",), "explain": tuple(params)},
        )
        return graph, params, weights


def normal(*shape: int) -> Array:
    """Numbers of either sign, none near 0."""
    return rng.uniform(0.2, 2.0, size=shape) * rng.choice([-1, 1], size=shape)


def positive(*shape: int) -> Array:
    return rng.uniform(0.3, 2.0, size=shape)


def case(op: str, *operands: Any, carried: tuple[int, ...] = (0,), **attrs: Attr) -> Case:
    return Case(op, operands, carried, attrs)


def both(op: str, *operands: Any, **attrs: Attr) -> Iterator[Case]:
    """Each operand alone as the carrier, and both."""
    for carried in ((0,), (1,), (0, 1)):
        if all(isinstance(operands[i], np.ndarray) for i in carried):
            yield Case(op, operands, carried, attrs)


def _linear_maps() -> Iterator[Case]:
    yield case("linear", normal(2, 5), normal(4, 5), normal(4))
    yield case("linear", normal(2, 3, 5), normal(4, 5))
    yield case("linear", np.abs(normal(1, 2)), np.abs(normal(3, 2)), normal(3))  # one sign only
    yield case("linear_rows", normal(2, 3, 5), normal(2, 3, 2, 5), normal(2, 3, 2))
    yield case("linear_rows", normal(2, 5), normal(2, 3, 5))
    for n in (1, 2, 3):
        size, one = (6, 5, 4)[:n], (1,) * n
        yield case(f"conv{n}d", normal(2, 2, *size), normal(3, 2, *(2,) * n), normal(3))
        yield case(
            f"conv{n}d", normal(1, 4, *size), normal(4, 2, *(3, 2, 2)[:n]), stride=(2, 1, 2)[:n], padding=one, groups=2
        )
        yield case(
            f"conv{n}d",
            normal(1, 2, *size),
            normal(2, 1, *(2,) * n),
            normal(2),
            dilation=(2, 1, 1)[:n],
            stride=(2,) * n,
            groups=2,
        )
        small = (3, 2, 2)[:n]
        yield case(f"conv_transpose{n}d", normal(2, 2, *small), normal(2, 3, *(2,) * n), normal(3))
        yield case(f"conv_transpose{n}d", normal(1, 4, *small), normal(4, 1, *(3, 2, 2)[:n]), stride=(2,) * n,
                   padding=(1, 0, 0)[:n], output_padding=(1, 0, 0)[:n], groups=2)
        yield case(
            f"conv_transpose{n}d", normal(1, 2, *small), normal(2, 2, *(2,) * n), normal(2), dilation=(2, 1, 1)[:n]
        )
    yield from both("matmul", normal(2, 3, 4), normal(2, 4, 2))
    yield from both("matmul", normal(3, 4), normal(2, 4, 2))
    yield from both("matmul", normal(2, 1, 3, 2), normal(2, 2, 2))
    yield from both("einsum", normal(2, 3, 4), normal(2, 5, 4), equation="bqd,bkd->bqk")
    yield from both("einsum", normal(2, 3, 4), normal(4, 5), equation="bqd,dk->kqb")
    yield from both("einsum", normal(2, 3), normal(4, 3), equation="ab,cb->c")  # `a` is summed over
    yield case("einsum", normal(2, 3, 4), equation="abc->ca")
    yield case("einsum", normal(2, 3), normal(3, 2), normal(2, 2), equation="ab,bc,cd->ad", carried=(1,))
    yield case("einsum", normal(2, 3), normal(3, 2), normal(2, 2), equation="ab,bc,cd->ad", carried=(0, 2))
    yield case("einsum", normal(2, 3), normal(3, 2), normal(2, 2), equation="ab,bc,cd->ad", carried=(0, 1, 2))
    flat: dict[str, Attr] = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0)}
    yield case("avg_pool", normal(2, 2, 4, 4), **flat)
    yield case("avg_pool", normal(1, 2, 5, 5), kernel=(3, 2), stride=(2, 1), padding=(1, 0))
    yield case("avg_pool", normal(1, 2, 5, 5), kernel=(3, 2), stride=(2, 2), padding=(1, 1), count_include_pad=False)
    yield case("avg_pool", normal(1, 1, 5, 5), **{**flat, "ceil_mode": True})
    yield case("avg_pool", normal(1, 2, 5), kernel=(2,), stride=(1,), padding=(0,), divisor=3)
    yield case("avg_pool", normal(1, 1, 3, 2, 2), kernel=(2, 2, 1), stride=(1, 1, 1), padding=(0, 0, 0))
    yield case("adaptive_avg_pool", normal(2, 2, 5, 4), size=(2, 3))
    yield case("adaptive_avg_pool", normal(1, 2, 5), size=(1,))
    yield case("interpolate", normal(2, 2, 3, 4), size=(6, 4), mode="nearest", scales=(2.0, 1.0))
    yield case("interpolate", normal(2, 1, 4), size=(7,), mode="nearest_exact")
    yield case("interpolate", normal(1, 2, 3, 2), size=(5, 3), mode="linear")
    yield case("interpolate", normal(1, 1, 3, 2, 2), size=(2, 4, 3), mode="linear", align_corners=True)
    yield case("interpolate", normal(1, 2, 5, 4), size=(7, 3), mode="cubic")  # weights of both signs
    yield case("interpolate", normal(1, 1, 6, 4), size=(3, 2), mode="cubic", antialias=True)
    for name in ("mean", "sum"):
        yield case(name, normal(2, 3, 4), dims=(1,))
        yield case(name, normal(2, 3, 4), dims=(-1, 0))
        yield case(name, normal(2, 3, 4), dims=(-2,), keepdim=True)
        yield case(name, normal(2, 3))
    for name in ("var", "logsumexp", "prod"):
        yield case(name, normal(2, 3, 4), dims=(-1, 0))
        yield case(name, normal(2, 3), dims=(1,), keepdim=True)
        yield case(name, normal(2, 2))
    yield case("var", normal(2, 3), dims=(-1,), correction=1)
    yield case("cumsum", normal(2, 3, 4), dim=1)
    yield case("cumsum", normal(2, 3), dim=-1)
    for interleaved in (False, True):
        yield case("rotary", normal(2, 2, 3, 4), normal(3, 4), normal(3, 4), interleaved=interleaved)
        yield case("rotary", normal(1, 3, 4), normal(2, 1, 3, 4), normal(2, 1, 3, 4), interleaved=interleaved)
    yield case("batch_norm", normal(2, 3, 2, 2), normal(3), positive(3), normal(3), normal(3))
    yield case("batch_norm", normal(2, 3), normal(3), positive(3))


def _elementwise() -> Iterator[Case]:
    for name in ("add", "sub", "mul", "div"):
        yield from both(name, normal(2, 3), normal(2, 3))
        yield from both(name, normal(2, 3, 2), normal(3, 1))
        yield from both(name, normal(1, 3), normal(2, 1, 1))
        yield case(name, normal(2, 3), 1.7)
        yield case(name, 2, normal(2, 3), carried=(1,))
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh"):
        yield from both("glu", normal(2, 3), normal(2, 3), activation=activation)
    for name in (*UNARY, *STEPS):
        if name in ("tan", *STEPS):
            yield case(name, np.array([[0.3, -0.7, 1.2], [-1.1, 0.6, -0.4]]))
        elif name not in ("pow", "prelu", "gelu", "log", "log1p", "sqrt", "rsqrt"):
            yield case(name, normal(2, 7))
    for name in ("log", "log1p", "sqrt", "rsqrt"):
        yield case(name, positive(2, 3))
    for approximate in ("none", "tanh", "quick"):
        yield case("gelu", normal(2, 5), approximate=approximate)
    yield case("hardswish", 3 * normal(2, 5))
    yield case("hardsigmoid", 3 * normal(2, 5))
    yield case("softplus", normal(2, 4), beta=2.0, threshold=1.0)
    yield case("elu", normal(2, 4), alpha=0.7, scale=1.3, input_scale=0.5)
    yield case("leaky_relu", normal(2, 4), negative_slope=0.3)
    yield case("relu", np.array([[0.0, 1.0, -1.0]]))
    yield case("prelu", normal(2, 3, 2), normal(3))
    yield case("prelu", normal(2, 3), normal(1))
    yield case("pow", normal(2, 3), 2)
    yield case("pow", positive(2, 3), 0.5)
    yield case("pow", positive(2, 3), normal(3))
    yield case("pow", 2.0, normal(2, 3), carried=(1,))
    yield case("pow", positive(1, 3), normal(2, 1), carried=(1,))


def _selections() -> Iterator[Case]:
    mask = rng.random((2, 3)) < 0.5
    for carried in ((1,), (2,), (1, 2)):
        yield Case("where", (mask, normal(2, 3), normal(3)), carried, {})
        yield Case("where", (mask[0], normal(2, 1), normal(1, 3)), carried, {})
    yield case("where", mask, normal(2, 3), -1e9, carried=(1,))
    for low, high in ((-0.5, 0.5), (None, 0.4), (0.0, None), (None, None)):
        yield case("clamp", normal(2, 5), low=low, high=high)
    for name in ("maximum", "minimum"):
        yield from both(name, normal(2, 3), normal(3))
        yield from both(name, np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]))
        yield case(name, normal(2, 3), 0.0)
    ties = np.round(normal(2, 2, 5, 4) * 2)
    yield case("max_pool", normal(2, 2, 4, 4), kernel=(2, 2), stride=(2, 2), padding=(0, 0), dilation=(1, 1))
    yield case("max_pool", ties, kernel=(3, 2), stride=(2, 1), padding=(1, 1), dilation=(1, 2))
    yield case("max_pool", ties[:1], kernel=(2, 3), stride=(2, 2), padding=(0, 1), dilation=(1, 1), ceil_mode=True)
    yield case("max_pool", normal(1, 2, 5), kernel=(3,), stride=(1,), padding=(1,), dilation=(2,))
    yield case(
        "max_pool", normal(1, 1, 3, 3, 2), kernel=(2, 2, 2), stride=(1, 1, 1), padding=(0, 0, 0), dilation=(1, 1, 1)
    )
    yield case("adaptive_max_pool", ties, size=(2, 3))
    yield case("adaptive_max_pool", normal(1, 2, 5), size=(2,))
    for name in ("amax", "amin"):
        yield case(name, ties, dims=(-1,))
        yield case(name, normal(2, 3, 2), dims=(0, 2), keepdim=True)
        yield case(name, normal(2, 3))
    for name in ("max_with_index", "min_with_index"):
        yield case(name, ties, dim=-2)
        yield case(name, normal(2, 3), dim=0, keepdim=True)


def _moves() -> Iterator[Case]:
    x = normal(2, 3, 4)
    yield case("reshape", x, shape=(6, 4))
    yield case("permute", x, dims=(2, 0, 1))
    yield case("permute", x, dims=(0, -1, -2))
    yield case("expand", normal(3, 1), shape=(2, 3, 4))
    yield case("slice", x, dim=-1, start=1, stop=4, step=2)
    yield case("slice", x, dim=1, stop=2)
    yield case("select", x, dim=-2, index=1)
    yield case("select", x, dim=2, index=-1)
    yield case("cat", x, normal(2, 1, 4), normal(2, 2, 4), dim=-2, carried=(0, 1, 2))
    yield case("cat", x, normal(2, 1, 4), dim=1, carried=(1,))
    yield case("pad", x, pads=((0, 1), (1, 0), (2, -1)))
    yield case("pad", x, pads=((0, 0), (-1, 1), (0, 0)), value=3.0)
    yield case("flip", x, dims=(-1, 0))
    yield case("roll", x, shifts=(1, -2), dims=(0, -1))
    yield case("triangle", x, upper=True)
    yield case("triangle", x, upper=False, diagonal=-1)
    yield case("gather", x, rng.integers(0, 4, (2, 2, 3)), dim=-1)
    yield case("gather", x, rng.integers(0, 3, (2, 5, 4)), dim=1)
    yield case("take", x, np.array([[0, 2], [2, 1]]), dim=-2)
    yield case("take", x, np.array([3, 0]), dim=2)
    yield case("index", x, np.array([[0], [2]]), np.array([1, 3, 1]), dims=(1, 2))
    yield case("index", x, np.array([1, 0, 1]), dims=(0,))
    once = np.stack([rng.permutation(4)[:2] for _ in range(6)]).reshape(2, 3, 2)
    for carried in ((0,), (2,), (0, 2)):
        yield Case("scatter", (x, once, normal(2, 3, 2)), carried, {"dim": -1})
        yield Case("scatter_add", (x, rng.integers(0, 4, (2, 3, 5)), normal(2, 3, 5)), carried, {"dim": 2})
        yield Case("scatter_add", (x, rng.integers(0, 3, (2, 4, 4)), normal(2, 4, 4)), carried, {"dim": -2})
    yield case("scatter", x, once, 0.5, dim=-1)
    twice = np.array([0, 1, 1])
    for carried in ((0,), (1,), (0, 1)):
        yield Case("index_put", (x, normal(2, 2, 4), np.array([0, 2])), carried, {"dims": (1,)})
        yield Case("index_put", (x, normal(4), np.array([2, 1])), carried, {"dims": (1,)})
        yield Case("index_put", (x, normal(3, 3, 4), np.array([0, 1, 1])), carried, {"dims": (0,), "accumulate": True})
        yield Case("index_put", (x, normal(1, 4), twice, twice), carried, {"dims": (0, 1), "accumulate": True})
    yield case("index_put", x, 0.5, np.array([0, 2]), dims=(1,))
    yield case("cast", x, dtype="f64")
    yield case("topk", x, k=2, dim=1)
    yield case("topk", x, k=3, largest=False)
    yield case("sort", x, dim=-2, descending=True)
    yield case("embedding", rng.integers(0, 5, (2, 3)), normal(5, 4))
    for name in ("softmax", "log_softmax"):
        yield case(name, x, dim=-1)
        yield case(name, x, dim=1)


def _norms() -> Iterator[Case]:
    for name in ("layer_norm", "rms_norm"):
        yield case(name, normal(2, 3, 4))
        yield case(name, normal(2, 4), normal(4), eps=0.1)
        yield case(name, normal(2, 3, 2), normal(3, 2), dims=2)
    yield case("layer_norm", normal(2, 4), normal(4), normal(4))
    yield case("group_norm", normal(2, 4, 3), groups=2)
    yield case("group_norm", normal(2, 4, 2, 2), normal(4), normal(4), groups=2, eps=1e-3)
    yield case("group_norm", normal(2, 4), normal(4), groups=1)


def _attention() -> Iterator[Case]:
    def qkv(heads: int = 2, groups: int = 2, queries: int = 3, keys: int = 3, batch: int = 2) -> tuple[Array, ...]:
        return normal(batch, heads, queries, 2), normal(batch, groups, keys, 2), normal(batch, groups, keys, 3)

    whole = (0, 1, 2)
    yield case("attention", *qkv(), scale=0.7, carried=whole)
    yield case("attention", *qkv(4, 2), scale=0.7, causal=True, carried=whole)
    yield case("attention", *qkv(2, 1, 2, 4), scale=0.7, causal=True, carried=whole)
    yield case("attention", *qkv(queries=5, keys=5, batch=1), scale=0.7, causal=True, window=2, carried=whole)
    yield case("attention", *qkv(), rng.random((2, 1, 3, 3)) < 0.6, scale=0.7, carried=whole)
    yield case("attention", *qkv(), np.tril(np.ones((3, 3), bool), -1), scale=0.7, carried=whole)  # row 0 sees nothing
    yield case("attention", *qkv(), normal(1, 2, 1, 3), scale=0.7, carried=whole)
    yield case("attention", *qkv(4, 2), scale=1.3, softcap=1.5, carried=whole)
    yield case("attention", *qkv(), None, normal(2), scale=0.7, carried=whole)
    yield case("attention", *qkv(4, 2), np.tril(np.ones((3, 3), bool), -1), normal(4), scale=0.7, window=2,
               carried=whole)  # row 0 sees the sink alone
    yield case("attention", *qkv(4, 2), normal(1, 4, 1, 3), normal(4), scale=1.3, softcap=1.5, carried=whole)
    yield case("attention", *qkv(), scale=0.7, carried=(1, 2))
    yield case("attention", *qkv(), scale=0.7, carried=(2,))


def _recurrent() -> Iterator[Case]:
    for name, gates in (("lstm", 4), ("gru", 3), ("rnn", 1)):
        states = 2 if name == "lstm" else 1
        whole = tuple(range(1 + states))

        def layer(steps: int, rows: int, inputs: int, size: int, biases: bool = True, *, gates: int = gates,
                  states: int = states) -> tuple[Array, ...]:
            weights = normal(gates * size, inputs), normal(gates * size, size)
            return (normal(steps, rows, inputs), *(normal(rows, size) for _ in range(states)), *weights,
                    *(normal(gates * size) for _ in range(2 * biases)))

        yield case(name, *layer(4, 2, 3, 2), carried=whole)
        yield case(name, *layer(3, 1, 2, 3, False), reverse=True, carried=whole)
        yield case(name, *layer(4, 3, 2, 2), np.array([2, 4, 1]), carried=whole)
        yield case(name, *layer(4, 2, 2, 2, False), None, None, np.array([4, 2]), reverse=True, carried=whole)
        yield case(name, *layer(1, 2, 3, 2), carried=(0,))
        yield case(name, *layer(3, 2, 3, 2), carried=(states,))
    yield case("rnn", *layer(4, 2, 3, 2), activation="relu", carried=(0, 1))
    yield case("rnn", np.zeros((3, 1, 2)), np.zeros((1, 2)), normal(2, 2), normal(2, 2), activation="relu")


def _mixtures() -> Iterator[Case]:
    """Experts without rows, one expert twice in a row, a row of zeros; the same x for all experts (1) and their own."""
    twice, once = np.array([[2, 0], [2, 2]]), np.array([[3], [1], [3]])
    for ids in (twice, once, rng.integers(0, 4, (2, 2, 2))):
        for rows in sorted({1, ids.shape[-1]}):
            x = normal(*ids.shape[:-1], rows, 3)
            yield case("expert_linear", x, ids, normal(4, 2, 3), normal(4, 2))
            yield case("expert_linear", np.abs(x), ids, normal(4, 3, 2), transposed=True)
    yield case("expert_linear", np.zeros((2, 1, 3)), twice, normal(4, 2, 3), normal(4, 2))
    for ends in ([2, 2, 4, 4], [0, 0, 0, 3], [3, 3, 3, 3]):
        rows = ends[-1]
        yield case("grouped_linear", normal(rows, 3), np.array(ends), normal(4, 2, 3), normal(4, 2))
        yield case("grouped_linear", normal(2, rows, 3), np.array(ends), normal(4, 3, 2), transposed=True)
    for shape in ((2, 3, 2), (1, 2, 1, 3), (2, 2, 3, 2)):
        yield from both("combine", normal(*shape), normal(*shape[:-1]))
        yield from both("combine", np.abs(normal(*shape)), positive(*shape[:-1]))
    yield case("combine", np.zeros((2, 2, 3)), positive(2, 2))
    yield case("route_topk", normal(2, 3, 4), k=2)
    yield case("route_topk", normal(3, 4), k=1)
    yield case("route_topk", normal(2, 4), normal(2, 4), k=3)
    yield case("route_topk", normal(2, 2), k=2)


CASES: dict[str, list[Case]] = {}
for _cases in (_mixtures, _linear_maps, _elementwise, _selections, _moves, _norms, _attention, _recurrent):
    for _case in _cases():
        CASES.setdefault(_case.op, []).append(_case)
load_rules()
PAIRS = sorted(RULES)


OTHER: dict[str, tuple[str, ...]] = {
    "absolute": ("absolute(-0.8, 0.8)", "absolute(low=0)", "absolute(high=1)"),
    "contrastive": ("contrastive(-0.8, 0.8)", "contrastive(low=0)"),
    "alpha_beta": ("alpha_beta(1, 0)", "alpha_beta(3.5, 2.5)"), "gamma": ("gamma(0)", "gamma(3)"),
    "zbox": ("zbox(-2, 2)", "zbox(-3, 2.5)")}
"""Rules with parameters unlike their defaults."""


def fitting(name: str, rule: str) -> list[tuple[Case, Rule]]:
    """The cases that a rule may meet, with its parameters as they are, others and, for epsilon, a large one."""
    params = tuple(RULES[name, rule].params.items())
    rules = [Rule(rule, params), *([Rule(rule, (("eps", 0.3),))] if ("eps", 1e-9) in params else []),
             *(completed(name, parse_rule(text)) for text in OTHER.get(rule, ()) if params)]
    return [(one, chosen) for one in CASES.get(name, ()) for chosen in rules
            if _fits(next(one.graph()[0].forward.ops), chosen, len(one.carried) == 1)]


@pytest.mark.parametrize(("name", "rule"), PAIRS, ids=map("-".join, PAIRS))
def test_a_rule_equals_its_formula(name: str, rule: str) -> None:
    """Alone (relevance comes in), and behind a function whose rule passes multipliers."""
    cases = fitting(name, rule)
    assert cases, f"no case for {name} {rule}"
    for number, (one, chosen) in enumerate(cases):
        for after in ("", "neg"):
            graph, inputs, weights = one.graph(after)
            composite = Composite([(name, chosen), ("neg", "identity"), ("move", "move")])
            paired = Pair(rules=composite).run(graph)
            y = graph.forward.results[0]
            streams = RULES[name, rule].streams
            count = streams * (3 if number % 2 else 1)
            seed = np.random.default_rng(number).normal(size=(count, *map(int, y.type.shape)))  # type: ignore[arg-type]
            seed = np.abs(seed) if streams > 1 else seed  # two relevances that are never negative
            found = interpret(
                EliminateDead().run(Lower().run(paired)), inputs, weights, {f"R.{y.name}": seed}
            ).relevance
            expected = dense.explain(graph, composite, inputs, weights, seed)
            for own, other in zip(found, expected, strict=True):
                scale = max(np.abs(other).max(), 1e-3)
                tolerance = 1e-8 if "gradient" in rule else 1e-9
                np.testing.assert_allclose(
                    own / scale, other / scale, atol=tolerance, err_msg=f"{one} {chosen} {after}"
                )
            if number < 2:
                level_2 = interpret(paired, inputs, weights, {f"R.{y.name}": seed}, expand=expand).relevance
                for own, other in zip(found, level_2, strict=True):
                    np.testing.assert_array_equal(own, other)


def test_every_op_with_a_rule_has_cases() -> None:
    assert {name for name, _ in PAIRS} == set(CASES)
    assert not [pair for pair in PAIRS if not fitting(*pair)]
    assert not [(name, rule) for name, rule in PAIRS if (dense.FAMILY.get(name), rule) not in dense.FORMULAS]


def test_attention_weights_are_found_behind_moves() -> None:
    """`signal` gives all to v: also where P was reshaped, and whichever operand it is."""
    s, v = Value("s", Type("f32", (2, 3, 3))), Value("v", Type("f32", (2, 3, 4)))
    at = Builder(["s", "v"])
    p = at.cast(at.softmax(s, dim=-1), dtype="f32")
    y = at.matmul(p, v, result="y")
    graph = Graph(
        "probabilities", Section((s, v), tuple(at.ops), (y,)), attrs={"inputs": ("s", "v"), "outputs": ("y",)}
    )
    composite = Composite([("matmul", "signal"), ("softmax", "taylor")], base="cp-lrp")
    inputs, seed = {"s": normal(2, 3, 3), "v": normal(2, 3, 4)}, normal(2, 2, 3, 4)
    found = interpret(Lower().run(Pair(rules=composite).run(graph)), inputs, {}, {"R.y": seed}).relevance
    expected = dense.explain(graph, composite, inputs, {}, seed)
    assert not found[0].any()
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-9)


@pytest.mark.parametrize("interleaved", [False, True])
def test_sizes_of_turned_channels_are_those_of_pairs(interleaved: bool) -> None:
    """`dlb` of attention finds the channels that rotary embedding turned behind moves, casts, scales and joins; the
    position, an angle the same for all tokens, changes nothing."""
    found = {}
    for shift in (0, 5):
        rng = np.random.default_rng(3)
        params = [Value(name, Type("f32", shape)) for name, shape in (
            ("q", (2, 3, 4, 6)), ("k", (2, 3, 2, 6)), ("v", (2, 2, 3, 4)))]
        at = Builder([p.name for p in params])
        angles = np.outer(np.arange(3) + shift, [1.0, 0.3]) + rng.uniform(size=(1, 2))
        order = np.repeat(angles, 2, axis=1) if interleaved else np.concatenate([angles, angles], axis=1)
        weights = {"cos": np.cos(order), "sin": np.sin(order)}
        cos, sin = (Weight(name, Type("f32", (3, 4))) for name in weights)

        def turned(x: Value, at: Builder = at, cos: Weight = cos, sin: Weight = sin) -> Value:
            first, rest = at.slice_(x, dim=-1, start=0, stop=4), at.slice_(x, dim=-1, start=4, stop=6)
            heads = at.permute(at.neg(first), dims=(0, 2, 1, 3))
            pair = at.cast(at.mul(at.rotary(heads, cos, sin, interleaved=interleaved), 0.5), dtype="f32")
            return at.cat(at.permute(rest, dims=(0, 2, 1, 3)), pair, dim=-1)

        y = at.attention(turned(params[0]), turned(params[1]), params[2], scale=0.4, causal=True, result="y")
        graph = Graph("turned", Section(tuple(params), tuple(at.ops), (y,)), weights={"cos": cos, "sin": sin},
                      attrs={"inputs": ("q", "k", "v"), "outputs": ("y",), "explain": ("q", "k", "v")})
        inputs = {p.name: rng.normal(size=p.type.shape) for p in params}
        seed = rng.normal(size=(2, *y.type.shape))
        composite = Composite((), base="dlb")
        lowered = Lower().run(Pair(rules=composite).run(graph))
        found[shift] = interpret(lowered, inputs, weights, {"R.y": seed}).relevance
        for own, other in zip(found[shift], dense.explain(graph, composite, inputs, weights, seed), strict=True):
            np.testing.assert_allclose(own, other, atol=1e-9)
    for own, other in zip(found[0], found[5], strict=True):
        np.testing.assert_allclose(own, other, atol=1e-12)


def test_which_channels_were_turned() -> None:
    """Through what keeps channels, in their order; not through what mixes, splits or moves them to another axis."""
    x = Value("x", Type("f32", (2, 4, 4)))
    at = Builder(["x"])
    y = at.rotary(x, at.cos(x), at.sin(x), interleaved=True, result="y")
    at.permute(y, dims=(1, 0, 2), result="heads")
    at.permute(y, dims=(0, 2, 1), result="swapped")
    at.reshape(y, shape=(8, 4), result="rows")
    at.reshape(y, shape=(2, 4, 2, 2), result="split")
    at.slice_(y, dim=1, start=0, stop=2, result="tokens")
    at.slice_(y, dim=-1, start=1, stop=4, result="cut")
    at.cat(x, y, dim=-1, result="joined")
    at.cat(x, y, dim=0, result="mixed")
    at.cat(y, y, dim=0, result="batch")
    at.relu(y, result="bent")
    graph = Graph("turned", Section((x,), tuple(at.ops), (y,)), attrs={"inputs": ("x",), "outputs": ("y",)})
    whole = (Turned(0, 4, True),)
    assert rotations(graph) == {"y": whole, "heads": whole, "rows": whole, "tokens": whole, "batch": whole,
                                "joined": (Turned(4, 8, True),)}
