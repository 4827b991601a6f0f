"""The laws that hold for every rule set (design: rules), as properties of random graphs. All in float64, lowered.

`dlb-0.1` reproduces a system that breaks laws 4 and 7 and is excepted there.
"""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dlbc.composite import Composite, preset
from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Section, Type, Value, Weight
from dlbc.ir.dims import symbol
from dlbc.ir.interpreter import interpret
from dlbc.ir.verifier import verify
from dlbc.passes.lower import Lower
from dlbc.passes.pair import Pair
from dlbc.passes.rules import RULES
from dlbc.presets import PRESETS

sys.path.insert(0, str(Path(__file__).parent))
import dense
from random_graphs import Model, make, models

Array = NDArray[Any]
ALL = sorted(PRESETS)
ONE_STREAM = [name for name in ALL if name != "dlb-contrastive"]
SEED_BY_SEED = ["attnlrp-conserving"]
"""How much a head of attention hands on depends on what came in: the explanation of a sum is no sum of explanations."""
KEEPS_LAWS = [name for name in ALL if name != "dlb-0.1"]
B, T, S = symbol("B"), symbol("T"), symbol("S")

EXPERTS = make("ids", [("linear", 0, 0), ("experts", 1, 0), ("add", 1, 2), ("experts", 2, 1)], 2, 3)
"""Tokens that go to experts twice, the second time to those that the first ones chose."""

few = settings(
    max_examples=int(os.environ.get("DLBC_EXAMPLES", "20")), deadline=None, suppress_health_check=list(HealthCheck)
)


def explain(
    graph: Graph,
    rules: str | Composite,
    inputs: Mapping[str, Array],
    weights: Mapping[str, Array],
    seeds: Array,
    *,
    keep: str = "inputs",
) -> list[Array]:
    """Relevance of each explained input (and what `keep` asks for), [S, *shape]."""
    pair = Pair(composite=rules, keep=keep) if isinstance(rules, str) else Pair(rules=rules, keep=keep)
    lowered = Lower().run(pair.run(graph))
    assert lowered.relevance is not None
    return list(interpret(lowered, inputs, weights, {lowered.relevance.params[0].name: seeds}).relevance)


def assert_close(own: Array, other: Array, tolerance: float = 1e-7) -> None:
    assert own.shape == other.shape
    assert np.abs(own - other).max(initial=0.0) <= tolerance * max(np.abs(other).max(initial=0.0), 1e-3)


# --- 1: finite in, finite out ------------------------------------------------------------------------

@few
@given(models(), st.sampled_from(["inputs", "weights", "both", "neither"]))
@example(EXPERTS, "inputs")
@example(EXPERTS, "weights")
def test_finite(model: Model, zero: str) -> None:
    inputs, weights = model.inputs(), dict(model.weights)
    if zero in ("inputs", "both"):
        inputs = {name: np.zeros_like(array) for name, array in inputs.items()}
    if zero in ("weights", "both"):  # a mask stays: it is no learned weight
        weights = {name: array if np.isinf(array).any() else np.zeros_like(array) for name, array in weights.items()}
    for rules in ALL:
        assert all(np.isfinite(r).all() for r in explain(model.graph, rules, inputs, weights, model.seeds(2))), rules


@pytest.mark.parametrize("exponent", [0, 0.5, 1, 2, 3])
def test_powers_of_zero_have_finite_relevance(exponent: float) -> None:
    x, at = Value("x", Type("f32", (B, 3))), Builder(["x"])
    y = at.pow(x, exponent, result="y")
    graph = Graph(
        "power", Section((x,), tuple(at.ops), (y,)), dims={"B": (1, 8)}, attrs={"inputs": ("x",), "outputs": ("y",)}
    )
    numbers = np.array([[0.0, 1.0, 2.0]])
    for rules in ALL:
        assert np.isfinite(explain(graph, rules, {"x": numbers}, {}, np.ones((1, 1, 3)))).all()


def test_infinite_masks_are_harmless_where_multipliers_become_relevance() -> None:
    model = make("sequence", [("written out", 0, 0), ("layer norm", 1, 1)], 1, 5)
    for composite in (Composite([("add", "absolute")], base="attnlrp"), Composite([("softmax", "taylor")], base="dlb")):
        assert np.isfinite(explain(model.graph, composite, model.inputs(), model.weights, model.seeds())[0]).all()


# --- 2: linear in the seed ---------------------------------------------------------------------------

@few
@given(models())
@example(EXPERTS)
def test_linear_in_the_seed(model: Model) -> None:
    s, t = model.seeds(2)
    for rules in ONE_STREAM:
        def run(*seeds: Array) -> Array:
            return explain(model.graph, rules, model.inputs(), model.weights, np.stack(seeds))[0]  # noqa: B023

        one, other, both = run(s, t, 2 * s - 3 * t)
        if rules not in SEED_BY_SEED:
            assert_close(both, 2 * one - 3 * other, 1e-6)
        assert_close(np.concatenate([run(s), run(t)]), np.stack([one, other]), 1e-12)


# --- 3: once per use ---------------------------------------------------------------------------------

@few
@given(models())
@example(EXPERTS)
def test_an_input_gets_the_sum_over_its_uses(model: Model) -> None:
    """Every use of the input reads a copy of its own; the copies' relevance adds up to the input's."""
    (x,) = model.graph.forward.params
    copies: list[Value] = []

    def own_copy(operand: Any) -> Any:
        if operand != x:
            return operand
        copies.append(Value(f"{x.name}.{len(copies)}", x.type))
        return copies[-1]

    body = tuple(replace(op, operands=tuple(map(own_copy, op.operands))) for op in model.graph.forward.ops)
    split = replace(model.graph, forward=replace(model.graph.forward, params=tuple(copies), body=body),
                    attrs={**model.graph.attrs, "inputs": tuple(c.name for c in copies)})
    verify(split)
    array = model.inputs()[x.name]
    for rules in ALL:
        whole = explain(model.graph, rules, {x.name: array}, model.weights, model.seeds(2))[0]
        parts = explain(split, rules, {c.name: array for c in copies}, model.weights, model.seeds(2))
        assert_close(sum(parts, np.zeros_like(whole)), whole)


@few
@given(models())
@example(EXPERTS)
def test_a_shared_value_may_as_well_be_computed_twice(model: Model) -> None:
    ops = list(model.graph.forward.ops)
    uses = Counter(o.name for op in ops for o in op.operands if isinstance(o, Value))
    twice: list[Op] = []
    shared = next((op for op in ops if uses[op.result.name] > 1 and len(op.results) == 1), None)
    if shared is None:
        return
    renamed, first = Value("again", shared.result.type), True
    for op in ops:
        if not first:
            op = replace(op, operands=tuple(renamed if o == shared.result else o for o in op.operands))
        elif shared.result in op.operands:
            first = False
        twice.append(op)
        if op is shared:
            twice.append(replace(shared, results=(renamed,)))
    graph = replace(model.graph, forward=replace(model.graph.forward, body=tuple(twice)))
    verify(graph)
    for rules in ONE_STREAM:
        assert_close(explain(graph, rules, model.inputs(), model.weights, model.seeds())[0],
                     explain(model.graph, rules, model.inputs(), model.weights, model.seeds())[0], 1e-4)


@few
@given(models())
@example(EXPERTS)
def test_keeping_inner_relevance_changes_nothing(model: Model) -> None:
    for rules in ALL:
        plain = explain(model.graph, rules, model.inputs(), model.weights, model.seeds())[0]
        assert_close(
            explain(model.graph, rules, model.inputs(), model.weights, model.seeds(), keep="all")[0], plain, 1e-12
        )


# --- 4: masks ----------------------------------------------------------------------------------------

def transformer(*, causal: bool = False, written_out: bool = False, window: int | None = None, place: int = 0,
                layers: int = 2) -> tuple[Graph, dict[str, Array]]:
    """Ids and a padding mask to the logits of one place; two query heads share a key head."""
    rng = np.random.default_rng(7)
    weights: dict[str, Array] = {}
    declared: dict[str, Weight] = {}

    def weight(*shape: int) -> Weight:
        name = f"w{len(weights)}"
        weights[name] = rng.normal(size=shape) * 0.6
        declared[name] = Weight(name, Type("f32", shape))
        return declared[name]

    ids, mask = Value("ids", Type("i64", (B, T))), Value("attention_mask", Type("bool", (B, T)))
    at = Builder(["ids", "attention_mask"])
    h = at.embedding(ids, weight(11, 4))
    seen = at.reshape(mask, shape=(B, 1, 1, T))

    def heads(x: Value, n: int) -> Value:
        return at.permute(at.reshape(x, shape=(B, T, n, 2)), dims=(0, 2, 1, 3))

    for _ in range(layers):
        n = at.layer_norm(h, weight(4), weight(4))
        q, k, v = (heads(at.linear(n, weight(2 * c, 4), weight(2 * c)), c) for c in (2, 1, 1))
        if written_out:
            scores = at.mul(at.matmul(q, at.permute(k, dims=(0, 1, 3, 2))), 0.7)
            o = at.matmul(at.softmax(at.add(scores, at.where(seen, 0.0, -np.inf)), dim=-1), v)
        else:
            o = at.attention(q, k, v, seen, scale=0.7, causal=causal, window=window)
        h = at.add(h, at.linear(at.reshape(at.permute(o, dims=(0, 2, 1, 3)), shape=(B, T, 4)), weight(4, 4)))
        h = at.add(h, at.linear(at.gelu(at.linear(at.rms_norm(h, weight(4)), weight(6, 4), weight(6))), weight(4, 6)))
    logits = at.linear(at.select(h, dim=1, index=place), weight(3, 4), weight(3), result="logits")
    graph = Graph(
        "transformer",
        Section((ids, mask), tuple(at.ops), (logits,)),
        dims={"B": (1, 8), "T": (1, 64)},
        weights=declared,
        attrs={"inputs": ("ids", "attention_mask"), "outputs": ("logits",)},
    )
    verify(graph)
    return graph, weights


IDS = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
SEEN = np.array([[True] * 5, [True] * 3 + [False] * 2])
SEEDS = np.random.default_rng(3).normal(size=(2, 2, 3))


@pytest.mark.parametrize("rules", KEEPS_LAWS)
@pytest.mark.parametrize("written_out", [False, True], ids=["fused", "written out"])
def test_padding_gets_nothing_and_changes_nothing(rules: str, written_out: bool) -> None:
    graph, weights = transformer(written_out=written_out)
    found = explain(graph, rules, {"ids": IDS, "attention_mask": SEEN}, weights, SEEDS)[0]
    assert np.isfinite(found).all()
    assert not found[:, 1, 3:].any()
    assert found[:, 1, :3].all()
    alone = explain(graph, rules, {"ids": IDS[1:, :3], "attention_mask": SEEN[1:, :3]}, weights, SEEDS[:, 1:])[0]
    assert_close(found[:, 1:, :3], alone, 1e-9)


@pytest.mark.parametrize("rules", KEEPS_LAWS)
def test_the_future_gets_nothing(rules: str) -> None:
    graph, weights = transformer(causal=True, place=2)
    found = explain(graph, rules, {"ids": IDS, "attention_mask": SEEN | True}, weights, SEEDS)[0]
    assert not found[:, :, 3:].any()
    assert found[:, :, :3].all()


@pytest.mark.parametrize("rules", KEEPS_LAWS)
def test_outside_the_window_is_nothing(rules: str) -> None:
    graph, weights = transformer(causal=True, window=2, place=3, layers=1)
    found = explain(graph, rules, {"ids": IDS, "attention_mask": SEEN | True}, weights, SEEDS)[0]
    assert not found[:, :, [0, 1, 4]].any()
    assert found[:, :, 2:4].all()


# --- 5: batch invariance -----------------------------------------------------------------------------

@few
@given(models())
@example(EXPERTS)
def test_a_row_is_explained_as_if_alone(model: Model) -> None:
    inputs, seeds = model.inputs(3), model.seeds(2, 3)
    for rules in ALL:
        together = explain(model.graph, rules, inputs, model.weights, seeds)[0]
        for row in (0, 2):
            alone = explain(model.graph, rules, {name: array[row:row + 1] for name, array in inputs.items()},
                            model.weights, seeds[:, row:row + 1])[0]
            assert_close(together[:, row:row + 1], alone, 1e-9)


# --- 6: what carries no relevance --------------------------------------------------------------------

@pytest.mark.parametrize("rules", ALL)
def test_masks_integers_and_shapes_carry_nothing(rules: str) -> None:
    """Only the floating input and the ids that choose rows of an embedding are explained."""
    params = {name: Value(name, Type(kind, (B, 4))) for name, kind in
              (("x", "f32"), ("ids", "i64"), ("attention_mask", "f32"), ("flags", "bool"), ("order", "i64"))}
    table, last = Weight("table", Type("f32", (4, 4))), Weight("last", Type("f32", (3, 4)))
    at = Builder(params)
    h = at.gather(at.add(at.mul(params["x"], params["attention_mask"]), 0.1), params["order"], dim=1)
    e = at.sum(at.embedding(at.flip(params["ids"], dims=(1,)), table), dims=(1,))
    h = at.where(params["flags"], at.add(h, e), at.cast(params["order"], dtype="f32"))
    y = at.linear(at.mul(h, symbol("B")), last, result="y")
    graph = Graph("kinds", Section(tuple(params.values()), tuple(at.ops), (y,)), dims={"B": (1, 8)},
                  weights={"table": table, "last": last}, attrs={"inputs": tuple(params), "outputs": ("y",)})
    verify(graph)
    paired = Pair(composite=rules).run(graph)
    assert paired.relevance is not None
    assert [n for n in paired.attrs["explained"] if n not in ("order",)] == ["x", "ids"]
    rng = np.random.default_rng(0)
    inputs = {"x": rng.normal(size=(2, 4)), "ids": rng.integers(0, 4, (2, 4)), "attention_mask": np.ones((2, 4)),
              "flags": rng.random((2, 4)) < 0.7, "order": rng.permuted(np.tile(np.arange(4), (2, 1)), axis=1)}
    weights = {"table": rng.normal(size=(4, 4)), "last": rng.normal(size=(3, 4))}
    found = dict(
        zip(paired.attrs["explained"], explain(graph, rules, inputs, weights, rng.normal(size=(1, 2, 3))), strict=True)
    )
    assert found["x"].any()
    assert found["ids"].any()
    assert not found.get("order", np.zeros(1)).any()


# --- 7: the ledger -----------------------------------------------------------------------------------

def ledger(graph: Graph, rules: str, inputs: Mapping[str, Array], weights: Mapping[str, Array], seeds: Array
           ) -> tuple[list[Array], list[tuple[tuple[str, ...], Array]]]:
    """Relevance of the inputs, and the ledger's entries with their values [S]."""
    lowered = Lower(ledger=True).run(Pair(composite=rules).run(graph))
    verify(lowered)
    assert lowered.relevance is not None
    entries: tuple[tuple[str, ...], ...] = lowered.attrs["ledger"]  # type: ignore[assignment]
    found = list(interpret(lowered, inputs, weights, {lowered.relevance.params[0].name: seeds}).relevance)
    at = len(found) - len(entries)
    return found[:at], list(zip(entries, found[at:], strict=True))


def assert_closes(relevance: Sequence[Array], entries: Sequence[tuple[tuple[str, ...], Array]], seeds: Array) -> None:
    """Each op's in = out + absorbed, split by its declared causes; and over the graph seed = inputs + absorbed."""
    balance: dict[tuple[str, ...], Array] = defaultdict(lambda: np.zeros(len(seeds)))
    size: dict[tuple[str, ...], float] = defaultdict(lambda: 1e-3)
    total, given = np.zeros(len(seeds)), np.zeros(len(seeds))
    for (_, kind, of, side, rule), value in entries:
        assert np.isfinite(value).all()
        assert side in ("seed", "gross", "in", "out", "bias", "constant", "stabiliser", "rule")
        if kind == "seed":
            given = value if side == "seed" else given
            continue
        if side == "rule":
            assert not RULES[kind, rule].conserves
        if kind != "to_multiplier":  # a conversion only absorbs
            balance[kind, of, rule] += value if side == "in" else -value
            size[kind, of, rule] = max(size[kind, of, rule], float(np.abs(value).max()))
        total += value if side not in ("in", "out") else 0
    for key, rest in balance.items():
        assert np.abs(rest).max() <= 1e-6 * size[key], key
    whole = total + sum(r.reshape(len(seeds), -1).sum(axis=1) for r in relevance)
    assert given.any()
    assert np.abs(whole - given).max() <= 1e-6 * max(*size.values(), 1.0)


@few
@given(models(), st.booleans())
@example(EXPERTS, False)
@example(EXPERTS, True)
def test_the_ledger_closes(model: Model, zero: bool) -> None:
    inputs = {name: np.zeros_like(x) if zero else x for name, x in model.inputs().items()}
    for rules in ALL:
        assert_closes(*ledger(model.graph, rules, inputs, model.weights, model.seeds(2)), model.seeds(2))


@pytest.mark.parametrize("rules", ALL)
@pytest.mark.parametrize("written_out", [False, True], ids=["fused", "written out"])
def test_the_ledger_closes_under_masks(rules: str, written_out: bool) -> None:
    graph, weights = transformer(written_out=written_out)
    assert_closes(*ledger(graph, rules, {"ids": IDS, "attention_mask": SEEN}, weights, SEEDS), SEEDS)


@pytest.mark.parametrize("rules", ALL)
@pytest.mark.parametrize("constants", [(0,), (0, 1), (1,), (2,)])
def test_constant_operands_of_attention_absorb(rules: str, constants: tuple[int, ...]) -> None:
    """Learned queries, keys or values."""
    x, at = Value("x", Type("f32", (2, 2, 3, 4))), Builder(["x"])
    kept = {f"w{i}": Weight(f"w{i}", Type("f32", (2, 2, 3, 4))) for i in constants}
    rng = np.random.default_rng(5)
    weights = {name: rng.normal(size=(2, 2, 3, 4)) for name in kept}
    y = at.attention(*(kept.get(f"w{i}") or at.tanh(x) for i in range(3)), scale=0.5, result="y")
    graph = Graph(
        "learned", Section((x,), tuple(at.ops), (y,)), weights=kept, attrs={"inputs": ("x",), "outputs": ("y",)}
    )
    verify(graph)
    seeds = rng.normal(size=(2, 2, 2, 3, 4))
    assert_closes(*ledger(graph, rules, {"x": rng.normal(size=(2, 2, 3, 4))}, weights, seeds), seeds)


@pytest.mark.parametrize("rules", [name for name in ALL if name != "dlb-contrastive"])
def test_a_gate_with_a_constant_passes_everything(rules: str) -> None:
    for carried in (0, 1):
        x, w, at = Value("x", Type("f32", (2, 3))), Weight("w", Type("f32", (2, 3))), Builder(["x"])
        y = at.glu(*((x, w) if carried == 0 else (w, x)), activation="silu", result="y")
        graph = Graph(
            "gate", Section((x,), tuple(at.ops), (y,)), weights={"w": w}, attrs={"inputs": ("x",), "outputs": ("y",)}
        )
        array, seeds = np.array([[1.0, -2.0, 0.5], [2.0, 1.0, -1.0]]), np.ones((1, 2, 3))
        found = explain(graph, rules, {"x": array}, {"w": array + 0.3}, seeds)[0]
        if rules != "input-x-gradient":
            assert_close(found, seeds, 1e-4)


# --- 8: the same function however written ------------------------------------------------------------

Write = Callable[[Builder, Value, dict[str, Weight]], Value]
CONVOLUTIONS_APART = ("epsilon-plus", "epsilon-plus-flat", "epsilon-gamma-box", "alpha2-beta1", "auto", "auto-cnn",
                      "auto-vit")
"""Presets that treat convolutions and linear layers differently, as their authors define them."""
GATES_KNOWN_ONCE_RAISED = ("cp-lrp", "epsilon", "dlb-contrastive", "attnlrp-conserving", "auto", "auto-cnn",
                           "auto-encoder", "auto-lm", *CONVOLUTIONS_APART, "gamma")
"""Presets that give a gate's product to `up`: before it is raised, it is any product."""

BY_SIZE = ("dlb", "dlb-0.1", "dlb-contrastive", "auto-vit")
"""Presets that carry relevance itself: a function of one number passes it on, a choice gives it to what was chosen."""


WAYS: dict[str, tuple[Write, Write, tuple[str, ...]]] = {
    "x + x, 2 x": (lambda at, x, w: at.add(x, x), lambda at, x, w: at.mul(2.0, x), ()),
    "x / 2, x * 0.5": (lambda at, x, w: at.div(x, 2.0), lambda at, x, w: at.mul(x, 0.5), ()),
    "x - w, x + (-w)": (lambda at, x, w: at.sub(x, w["w"]), lambda at, x, w: at.add(x, at.neg(w["w"])), ()),
    "softmax": (lambda at, x, w: at.softmax(x, dim=-1), lambda at, x, w: at.softmax(x, dim=2), ()),
    "sum": (lambda at, x, w: at.sum(x, dims=(-1, -2)), lambda at, x, w: at.sum(x, dims=(1, 2)), ()),
    "mean": (
        lambda at, x, w: at.mean(x, dims=(-2,)),
        lambda at, x, w: at.reshape(at.mean(x, dims=(1,), keepdim=True), shape=(B, 4)),
        (),
    ),
    "cumsum": (lambda at, x, w: at.cumsum(x, dim=-2), lambda at, x, w: at.cumsum(x, dim=1), ()),
    "amax": (lambda at, x, w: at.amax(x, dims=(-1,)), lambda at, x, w: at.max_with_index(x, dim=2), ()),
    "cut": (
        lambda at, x, w: at.select(x, dim=-2, index=-1),
        lambda at, x, w: at.reshape(at.slice_(x, dim=1, start=2, stop=3), shape=(B, 4)),
        (),
    ),
    "there and back": (
        lambda at, x, w: at.permute(at.permute(x, dims=(2, 0, 1)), dims=(1, 2, 0)),
        lambda at, x, w: at.cat(at.slice_(x, dim=1, stop=1), at.slice_(x, dim=1, start=1, stop=3), dim=1),
        (),
    ),
    "relu": (
        lambda at, x, w: at.relu(x),
        lambda at, x, w: at.maximum(x, 0.0),
        BY_SIZE,
    ),  # a relu is `identity`
    "relu6": (
        lambda at, x, w: at.clamp(x, low=0.0, high=6.0),
        lambda at, x, w: at.minimum(at.relu(x), 6.0),
        BY_SIZE,
    ),
    "linear, einsum": (
        lambda at, x, w: at.linear(x, w["m"]),
        lambda at, x, w: at.einsum(x, w["m"], equation="btd,od->bto"),
        (),
    ),
    "linear, matmul": (
        lambda at, x, w: at.linear(x, w["m"]),
        lambda at, x, w: at.matmul(x, at.permute(w["m"], dims=(1, 0))),
        (),
    ),
    "linear, conv": (
        lambda at, x, w: at.linear(x, w["m"], w["w"]),
        lambda at, x, w: at.permute(
            at.conv1d(at.permute(x, dims=(0, 2, 1)), at.reshape(w["m"], shape=(4, 4, 1)), w["w"]), dims=(0, 2, 1)
        ),
        CONVOLUTIONS_APART,
    ),
    "avg pool": (
        lambda at, x, w: at.avg_pool(x, kernel=(4,), stride=(4,), padding=(0,)),
        lambda at, x, w: at.adaptive_avg_pool(x, size=(1,)),
        (),
    ),
    "linear, one expert": (
        lambda at, x, w: at.linear(x, w["m"], w["w"]),
        lambda at, x, w: at.combine(at.expert_linear(
            at.reshape(x, shape=(B, 3, 1, 4)), at.full(shape=(B, 3, 1), value=0, dtype="i64"),
            at.reshape(w["m"], shape=(1, 4, 4)), at.reshape(w["w"], shape=(1, 4))),
            at.full(shape=(B, 3, 1), value=1.0, dtype="f32")),
        (),
    ),
    "silu u, glu": (
        lambda at, x, w: at.mul(at.silu(x), at.linear(x, w["m"])),
        lambda at, x, w: at.glu(x, at.linear(x, w["m"])),
        GATES_KNOWN_ONCE_RAISED,
    ),
    "batch norm": (
        lambda at, x, w: at.batch_norm(x, w["c"], w["v"], w["c"], w["c"]),
        lambda at, x, w: at.add(
            at.mul(x, at.reshape(at.mul(w["c"], at.rsqrt(at.add(w["v"], 1e-5))), shape=(3, 1))),
            at.reshape(at.sub(w["c"], at.mul(w["c"], at.mul(w["c"], at.rsqrt(at.add(w["v"], 1e-5))))), shape=(3, 1)),
        ),
        ("auto-cnn",),  # which asks for batch norms by name
    ),
}
SHAPES = {"w": (4,), "m": (4, 4), "c": (3,), "v": (3,)}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_function_however_written(way: str) -> None:
    rng = np.random.default_rng(11)
    weights = {
        name: np.abs(rng.normal(size=shape)) + 0.1 if name == "v" else rng.normal(size=shape)
        for name, shape in SHAPES.items()
    }
    kept = {name: Weight(name, Type("f32", shape)) for name, shape in SHAPES.items()}
    x = Value("x", Type("f32", (B, 3, 4)))

    def graph(write: Write) -> Graph:
        at = Builder(["x"])
        y = at.tanh(write(at, at.tanh(x), kept), result="y")
        return Graph("way", Section((x,), tuple(at.ops), (y,)), dims={"B": (1, 8)}, weights=kept,
                     attrs={"inputs": ("x",), "outputs": ("y",)})

    one, other, excepted = WAYS[way]
    array = rng.normal(size=(2, 3, 4))
    seeds = rng.normal(size=(2, *interpret(graph(one), {"x": array}, weights).outputs[0].shape))
    flat = interpret(graph(other), {"x": array}, weights).outputs[0].shape
    for rules in ALL:
        if rules not in excepted and not (rules == "dlb-0.1" and way in ("linear, conv", "batch norm")):
            assert_close(explain(graph(other), rules, {"x": array}, weights, seeds.reshape(2, *flat))[0],
                         explain(graph(one), rules, {"x": array}, weights, seeds)[0], 1e-4)


@pytest.mark.parametrize("rules", [name for name in KEEPS_LAWS if name != "attnlrp-conserving"])  # which needs heads
def test_attention_fused_and_written_out(rules: str) -> None:
    (fused, weights), (written_out, _) = transformer(), transformer(written_out=True)
    inputs = {"ids": IDS, "attention_mask": SEEN}
    assert_close(
        explain(written_out, rules, inputs, weights, SEEDS)[0], explain(fused, rules, inputs, weights, SEEDS)[0], 1e-4
    )


@few
@given(models())
@example(EXPERTS)
def test_static_and_symbolic_sizes_agree(model: Model) -> None:
    def static(operand: Any) -> Any:
        if isinstance(operand, Value):
            return Value(
                operand.name, Type(operand.type.dtype, tuple(2 if d == symbol("B") else d for d in operand.type.shape))
            )
        return operand

    def attrs(op: Op) -> dict[str, Any]:
        return {
            k: tuple(2 if d == symbol("B") else d for d in v) if isinstance(v, tuple) else v
            for k, v in op.attrs.items()
        }

    forward = model.graph.forward
    fixed = replace(
        model.graph,
        dims={},
        forward=Section(
            tuple(map(static, forward.params)),
            tuple(
                replace(
                    op,
                    operands=tuple(map(static, op.operands)),
                    attrs=attrs(op),
                    results=tuple(map(static, op.results)),
                )
                for op in forward.ops
            ),
            tuple(map(static, forward.results)),
        ),
    )
    verify(fixed)
    for rules in ALL:
        np.testing.assert_array_equal(explain(fixed, rules, model.inputs(), model.weights, model.seeds())[0],
                                      explain(model.graph, rules, model.inputs(), model.weights, model.seeds())[0])


# --- whole graphs: the textbook, and the true gradient -----------------------------------------------

MIXED = (
    ("mul", "uniform"),
    ("add", "absolute"),
    ("linear", "epsilon(0.3)"),
    ("conv2d", "epsilon(0.2)"),
    ("norm", "identity"),
    ("matmul", "share"),
    ("relu", "pass"),
)


@settings(few, max_examples=12)
@given(models(most=5))
@example(EXPERTS)
@example(make("sequence", [("linear", 0, 0), ("mul", 1, 1), ("add", 1, 2), ("layer norm", 1, 1), ("sub", 4, 1)], 3, 1))
def test_whole_graphs_equal_the_textbook(model: Model) -> None:
    """Presets of one form, and a composite in which relevance and multipliers meet."""
    weights = {name: np.maximum(array, -1e4) for name, array in model.weights.items()}
    for composite in (
        preset("attnlrp"),
        preset("cp-lrp"),
        preset("dlb"),
        preset("dlb-0.1"),
        Composite(MIXED, base="attnlrp"),
    ):
        found = explain(model.graph, composite, model.inputs(), weights, model.seeds(2))
        expected = dense.explain(model.graph, composite, model.inputs(), weights, model.seeds(2))
        assert_close(found[0], expected[0], 1e-4 if composite.name == "attnlrp+" else 1e-8)


@settings(few, max_examples=8)
@given(models(kinds=("sequence", "image"), most=5))
@example(make("sequence", [("experts", 0, 0), ("experts", 1, 0)], 1, 4))
def test_input_x_gradient_is_that(model: Model) -> None:
    """R = x dF/dx where F = sum_j y_j seed_j: by central differences, kinks left out."""
    graph, weights = model.graph, model.weights
    inputs, seeds = model.inputs(1), model.seeds(1, 1)
    found = explain(graph, "input-x-gradient", inputs, weights, seeds)[0][0]
    ((name, x),) = inputs.items()
    y, m = interpret(graph, inputs, weights).outputs[0], seeds[0]

    def value(place: tuple[int, ...], step: float) -> float:
        moved = x.copy()
        moved[place] += step
        return float((interpret(graph, {name: moved}, weights).outputs[0] * m).sum())

    h, middle = 1e-5, float((y * m).sum())
    for place in list(np.ndindex(*x.shape))[::3]:
        up, down = (value(place, h) - middle) / h, (middle - value(place, -h)) / h
        if abs(up - down) < 1e-2 * (1 + abs(up)):  # smooth here
            assert abs(x[place] * (up + down) / 2 - found[place]) < 1e-4 * max(
                1.0, np.abs(found).max(), abs(middle) / h * 1e-10
            )


def test_input_x_gradient_equals_autograd() -> None:
    """One network with every smooth op of a transformer, in torch's float64."""
    torch = pytest.importorskip("torch")
    graph, weights = transformer(causal=True)
    functional = torch.nn.functional
    w = {name: torch.tensor(array, dtype=torch.float64) for name, array in weights.items()}
    at = iter(f"w{i}" for i in range(len(weights)))
    embedded = w[next(at)][torch.tensor(IDS)].requires_grad_()
    h = embedded
    for _ in range(2):
        names = [next(at) for _ in range(12)]
        a = [w[name] for name in names]
        n = functional.layer_norm(h, (4,), a[0], a[1])
        q, k, v = (
            functional.linear(n, a[2 + 2 * i], a[3 + 2 * i]).reshape(2, 5, -1, 2).transpose(1, 2) for i in range(3)
        )
        s = q @ k.transpose(-1, -2) * 0.7
        seen = torch.tensor(SEEN)[:, None, None] & torch.ones(5, 5, dtype=torch.bool).tril()
        o = torch.softmax(s.masked_fill(~seen, -torch.inf), -1) @ v
        h = h + functional.linear(o.transpose(1, 2).reshape(2, 5, 4), a[8])
        normal = h * torch.rsqrt((h ** 2).mean(-1, keepdim=True) + 1e-6) * a[9]
        h = h + functional.linear(functional.gelu(functional.linear(normal, a[10], a[11])), w[next(at)])
    logits = functional.linear(h[:, 0], w[next(at)], w[next(at)])
    (logits * torch.tensor(SEEDS[0])).sum().backward()
    expected = (embedded.grad * embedded.detach()).sum(-1).numpy()
    inputs = {"ids": IDS, "attention_mask": SEEN}
    assert_close(explain(graph, "input-x-gradient", inputs, weights, SEEDS[:1])[0][0], expected, 1e-9)
