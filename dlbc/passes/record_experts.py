"""Which experts were chosen, and what relevance they got: kept beside the explanation of a mixture of experts.

A mixture is a `combine` of what the chosen experts make of a value. Its ids and weights are returned with the outputs,
for every row, also where all else is computed at some positions only; what relevance the terms of its sum get, `pair`
returns with that of the inputs. An expert that all rows go to (shared), added to the sum, is one more column.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand, Value, Weight, values
from dlbc.ir.dims import Sym
from dlbc.ir.ops import OPS, attr
from dlbc.passes import Pass, register
from dlbc.passes.carriers import carriers
from dlbc.passes.rewrite import live, users

_ACROSS_ROWS = ("attention", "attention_weights", "matmul", "einsum")
"""Ops in which rows know of each other: what has gone through one is no expert's answer to a row."""


@dataclass(frozen=True)
class Mixture:
    """A layer of experts by the names of its values: `combine` is the weighted sum, `total` (as `shared`, "" without)
    the sum with the shared expert. `experts`: how many there are."""

    place: str
    experts: int
    ids: str
    weights: str
    combine: str
    shared: str = ""
    total: str = ""

    def to_attr(self) -> tuple[str | int, ...]:
        """As an attribute of a graph."""
        return (self.place, self.experts, self.ids, self.weights, self.combine, self.shared, self.total)


def mixtures_of(graph: Graph) -> tuple[Mixture, ...]:
    """The mixtures that `RecordExperts` found."""
    found = graph.attrs.get("experts", ())
    assert isinstance(found, tuple)
    return tuple(Mixture(*entry) for entry in found)  # type: ignore[misc]


@register
@dataclass(frozen=True)
class RecordExperts(Pass):
    """Return ids and weights of every mixture after the outputs; `graph.attrs["experts"]` names the mixtures."""

    name: ClassVar[str] = "record_experts"

    def run(self, graph: Graph) -> Graph:
        """The graph with its mixtures named."""
        if graph.relevance is not None or "experts" in graph.attrs:
            return graph
        found = find_mixtures(graph)
        if not found:
            return graph
        defined = {p.name: p for p in graph.forward.params} | {
            r.name: r for op in graph.forward.ops for r in op.results}
        returned = tuple(defined[name] for mixture in found for name in (mixture.ids, mixture.weights))
        forward = replace(graph.forward, results=(*graph.forward.results, *returned))
        return replace(graph, forward=forward).with_attrs(experts=tuple(mixture.to_attr() for mixture in found))


def find_mixtures(graph: Graph) -> tuple[Mixture, ...]:
    """The mixtures of a canonical graph that carry relevance, in order."""
    definitions, readers, carrying = graph.forward.definitions(), users(graph.forward), carriers(graph)
    found: list[Mixture] = []
    places: dict[str, int] = {}
    for op in live(tuple(graph.forward.ops), graph.forward.results):
        u, weights = (*op.operands, None, None)[:2]
        if op.name != "combine" or op.result.name not in carrying or not isinstance(weights, Value):
            continue
        first, last = _experts(u, definitions)
        if first is None or last is None or not isinstance(ids := last.operands[1], Value):
            continue
        table = last.operands[2]
        assert isinstance(table, Value | Weight)
        count = table.type.shape[0]
        assert isinstance(count, int)
        shared, total = _shared(op, first, definitions, readers, carrying)
        number = places[op.place] = places.get(op.place, 0) + 1
        place = op.place if number == 1 else f"{op.place}@{number - 1}"
        found.append(Mixture(place, count, ids.name, weights.name, op.result.name, shared, total))
    return tuple(found)


def _experts(u: Operand, definitions: dict[str, Op]) -> tuple[Op | None, Op | None]:
    """The first and the last `expert_linear` on the way to what the experts say."""
    first: Op | None = None
    last: Op | None = None
    todo, seen = [u], set[str]()
    while todo:
        operand = todo.pop()
        op = definitions.get(operand.name) if isinstance(operand, Value) else None
        if op is None or op.result.name in seen:
            continue
        seen.add(op.result.name)
        if op.name == "expert_linear":
            first, last = op, last or op
            todo.append(op.operands[0])
        elif OPS[op.name].elementwise or op.name in ("reshape", "slice", "expand", "rms_norm", "layer_norm"):
            todo += values(op.operands)
    return first, last


def _shared(combine: Op, first: Op, definitions: dict[str, Op], readers: dict[str, list[Op]], carrying: set[str]
            ) -> tuple[str, str]:
    """The value that a shared expert adds to the sum, and the sum of both: what it adds is made of the same rows that
    the experts are given, row by row. (A residual is what these rows are made of.)"""
    given = _base(first.operands[0], definitions)
    value = combine.result
    while len(own := readers.get(value.name, [])) == 1 and own[0].name in ("cast", "reshape", "mul") and len(
            [v for v in values(own[0].operands) if v.name in carrying]) == 1:
        value = own[0].result
    if len(own) != 1 or own[0].name != "add" or given is None:
        return "", ""
    other = next((o for o in values(own[0].operands) if o != value), None)
    if other is None or other.name not in carrying or not _made_of(other, given, definitions):
        return "", ""
    return other.name, own[0].result.name


def _base(operand: Operand, definitions: dict[str, Op]) -> Value | None:
    """A value before it was reshaped or cast."""
    while isinstance(operand, Value) and (op := definitions.get(operand.name)) is not None and op.name in (
            "reshape", "cast", "expand"):
        operand = op.operands[0]
    return operand if isinstance(operand, Value) else None


def _made_of(value: Value, given: Value, definitions: dict[str, Op]) -> bool:
    """Whether a value is made of `given` by layers, row by row."""
    todo, seen = [(value, False)], set[tuple[str, bool]]()
    while todo:
        one, layered = todo.pop()
        if one == given and layered:
            return True
        op = definitions.get(one.name)
        if op is not None and (one.name, layered) not in seen and op.name not in _ACROSS_ROWS:
            seen.add((one.name, layered))
            todo += [(v, layered or op.name in ("linear", "expert_linear")) for v in values(op.operands)]
    return False


# --- in the relevance section -------------------------------------------------------------------------

def share_of_experts(at: Builder, forms: str, to_u: Value, u: Value, to_weights: Value | None, weights: Value) -> Value:
    """Relevance of each chosen expert [S, *rows, K]: what it gets, and what its weight gets for it. Form "M":
    multipliers come in, of u [*rows, K, D] and weights [*rows, K]."""
    found = at.sum(_amount(at, forms, to_u, u), dims=(-1,))
    return found if to_weights is None else at.add(found, _amount(at, forms, to_weights, weights))


def share_of_shared(at: Builder, form: str, given: Value, value: Value) -> Value:
    """Relevance of a shared expert at each row [S, *rows], of what its answer [*rows, D] gets."""
    return at.sum(_amount(at, form, given, value), dims=(-1,))


def for_all_rows(at: Builder, found: Value, chosen: Op) -> Value:
    """Relevance of experts at some positions as that at all, 0 at the others. `chosen`: the op that took the weights
    at these positions."""
    source = chosen.operands[0]
    assert isinstance(source, Value)
    if chosen.name == "index":
        dims = attr(chosen, "dims")
        assert isinstance(dims, tuple)
        own = tuple(int(str(d)) for d in dims)
        return at.index_adjoint(found, *chosen.operands[1:], dims=tuple(d + 1 for d in own),
                                sizes=tuple(source.type.shape[d] for d in own))
    dim = attr(chosen, "dim")
    assert chosen.name == "slice" and isinstance(dim, int) and dim >= 0
    start, stop = attr(chosen, "start"), attr(chosen, "stop")
    assert isinstance(start, int | Sym)
    return at.slice_adjoint(found, dim=dim + 1, size=source.type.shape[dim], start=start, stop=stop)


def _amount(at: Builder, form: str, given: Value, value: Value) -> Value:
    if form != "M":
        return given
    return at.mul(given, value if value.type.dtype == "f32" else at.cast(value, dtype="f32"))
