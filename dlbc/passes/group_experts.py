"""Experts on rows sorted by expert: one grouped product for each layer, and no weight copied for a row.

`expert_linear` gives each row the matrix of its expert. Here the rows of a layer are sorted by expert once
(`expert_order`), each matrix multiplies the rows that lie together (`grouped_linear`), and what is computed between two
such products stays sorted: activations, gates, denominators and relevance alike. Rows go back to their places where
something else reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Attr, Graph, Op, Operand, Section, Value, Weight
from dlbc.ir.dims import Dim, product
from dlbc.ir.ops import OPS, attr, axis
from dlbc.passes import Pass, register
from dlbc.passes.rewrite import names, with_saves

PARTS = {"abs": "abs", "relu": "positive"}
"""Ops on weights that a grouped product does by itself, for the experts that have rows."""

_ALONG_FEATURES = ("slice", "slice_adjoint", "cat")


@register
@dataclass(frozen=True)
class GroupExperts(Pass):
    """`expert_linear` becomes `grouped_linear` on sorted rows; what stands between two of them is computed sorted.

    `whole_weights`: sizes, parts and squares of weights stay ops on all weights (which may be computed once and kept).
    Else they are taken of the weights of experts that have rows, within the product.
    """

    name: ClassVar[str] = "group_experts"
    whole_weights: bool = False

    def run(self, graph: Graph) -> Graph:
        """The graph without `expert_linear`."""
        if not any(op.name == "expert_linear" for _, section in graph.sections() for op in section.ops):
            return graph
        grouping = _Grouping(graph, self.whole_weights)
        forward = grouping.section(graph.forward)
        relevance = None if graph.relevance is None else grouping.section(graph.relevance)
        return with_saves(replace(graph, forward=forward, relevance=relevance))


@dataclass(frozen=True)
class _Order:
    """The sorting of one layer's rows: `ids` [*rows, K], their order, places and ends; `rows` is what each sorted row
    came from, order // K."""

    ids: Value
    order: Value
    places: Value
    ends: Value
    rows: Value

    @property
    def count(self) -> Dim:
        """All rows, one for each chosen expert."""
        return product(self.ids.type.shape)


@dataclass
class _Grouping:
    """One run: `orders` by the names of ids, and the sorted version of each value that has one, with its order."""

    graph: Graph
    whole_weights: bool
    orders: dict[tuple[str, Dim], _Order] = field(default_factory=dict)
    sorted_of: dict[tuple[str, str], Value] = field(default_factory=dict)
    definitions: dict[str, Op] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.at = Builder(names(self.graph))
        self.definitions = {r.name: op for op in self.graph.prepare.ops for r in op.results}

    def section(self, section: Section) -> Section:
        """A section with its products grouped."""
        self.at.ops = []
        for op in section.ops:
            self.at.place, self.at.of = op.place, op.of
            if op.name == "expert_linear":
                self._grouped(op)
            else:
                self.at.ops.append(op)
                self.definitions |= {r.name: op for r in op.results}
        return replace(section, body=tuple(self.at.ops))

    # --- products ---------------------------------------------------------------------------------------

    def _grouped(self, op: Op) -> None:
        """One product on sorted rows, and its rows at their places under the op's name."""
        x, ids, weight, *bias = op.operands
        assert isinstance(x, Value) and isinstance(ids, Value) and isinstance(weight, Value | Weight)
        order = self._order(ids, weight.type.shape[0])
        weight, attrs = self._part(weight)
        rows = self._sorted(x, order)
        found = self.at.grouped_linear(rows, order.ends, weight, *bias, **attrs, transposed=attr(op, "transposed"))
        if found.type.dtype != op.result.type.dtype:
            found = self.at.cast(found, dtype=op.result.type.dtype)
        lead = found.type.rank - 2
        back = self.at.index(found, order.places, dims=(lead,))
        self.at.ops.append(Op("reshape", (back,), op.results, {"shape": op.result.type.shape}, op.place, of=op.of))
        self.definitions[op.result.name] = self.at.ops[-1]
        self.sorted_of[op.result.name, ids.name] = found

    def _part(self, weight: Value | Weight) -> tuple[Value | Weight, dict[str, Attr]]:
        """The weight that a size, a part or a cast was taken of, and what the product then does itself."""
        found, part = weight, ""
        while isinstance(found, Value) and not self.whole_weights:
            op = self.definitions.get(found.name)
            source = op.operands[0] if op is not None and op.operands else None
            if op is None or not isinstance(source, Value | Weight):
                break
            if op.name in PARTS and not part:
                part = PARTS[op.name]
            elif op.name == "mul" and op.operands[1] is source and not part:
                part = "square"
            elif op.name == "neg" and part == "positive":
                part = "negative"
            elif op.name == "cast" and source.type.floating:
                pass
            else:
                break
            found = source
        return (found, {"part": part} if part else {})

    def _order(self, ids: Value, experts: Dim) -> _Order:
        if (ids.name, experts) not in self.orders:
            order, places, ends = self.at.op("expert_order", ids, experts=experts)
            several = ids.type.shape[-1] != 1
            rows = self.at.floor_divide(order, ids.type.shape[-1]) if several else order
            self.orders[ids.name, experts] = _Order(ids, order, places, ends, rows)
        return self.orders[ids.name, experts]

    # --- rows in order ------------------------------------------------------------------------------------

    def _sorted(self, x: Value, order: _Order) -> Value:
        """A value [*lead, *rows, K or 1, D] with its rows in order, [*lead, N, D]."""
        known = self.sorted_of.get((x.name, order.ids.name))
        if known is not None:
            return known
        found = self._again(x, order) if self._follows(x, order) else None
        if found is None:
            found = self._fetched(x, order)
        self.sorted_of[x.name, order.ids.name] = found
        return found

    def _fetched(self, x: Value, order: _Order) -> Value:
        """The rows themselves, fetched in order."""
        lead, shape = self._lead(x, order), x.type.shape
        assert lead is not None
        one = x.type.rank == lead + order.ids.type.rank + 1 and shape[-2] == 1 and order.ids.type.shape[-1] != 1
        rows = product(order.ids.type.shape[:-1]) if one else order.count
        flat = self.at.reshape(x, shape=(*shape[:lead], rows, shape[-1]))
        return self.at.index(flat, order.rows if one else order.order, dims=(lead,))

    def _lead(self, x: Value | Weight, order: _Order) -> int | None:
        """How many axes stand before the rows of a value [*lead, *rows, K, D] or [*lead, *rows, 1, D]; where one expert
        is chosen for each row, also of [*lead, *rows, D]. None for other values."""
        shape, (*rows, k) = x.type.shape, order.ids.type.shape
        lead = len(shape) - len(rows) - 2
        if lead >= 0 and shape[lead:-2] == tuple(rows) and shape[-2] in (1, k):
            return lead
        return lead + 1 if lead >= -1 and k == 1 and shape[lead + 1:-1] == tuple(rows) else None

    def _follows(self, x: Operand, order: _Order, depth: int = 12) -> bool:
        """Whether a value is made of sorted rows, row by row."""
        if not isinstance(x, Value) or self._lead(x, order) is None:
            return False
        if (x.name, order.ids.name) in self.sorted_of:
            return True
        op = self.definitions.get(x.name)
        if op is not None and op.name == "reshape" and op.result.type.shape[-1:] == _last(op.operands[0]):
            return self._follows(op.operands[0], order, depth - 1)  # the axis of the one choice comes or goes
        return bool(depth and op is not None and self._by_row(op, x)
                    and any(self._follows(o, order, depth - 1) for o in op.operands))

    def _by_row(self, op: Op, x: Value) -> bool:
        """An op on each number of rows, or along their last axis."""
        if OPS[op.name].elementwise:
            return all(not isinstance(o, Value | Weight) or o.type.rank <= 1 or o.type.rank <= x.type.rank
                       for o in op.operands)
        if op.name not in _ALONG_FEATURES:
            return False
        dim = attr(op, "dim")
        return isinstance(dim, int) and axis(x.type.rank, dim) == x.type.rank - 1

    def _again(self, x: Value, order: _Order) -> Value | None:
        """The op that makes a value, on sorted rows; None where one of its operands has rows that do not tell."""
        op = self.definitions[x.name]
        if op.name == "reshape":
            source = op.operands[0]
            return self._sorted(source, order) if isinstance(source, Value) else None
        operands: list[Operand] = []
        for operand in op.operands:
            if not isinstance(operand, Value | Weight) or operand.type.rank <= 1:
                operands.append(operand)
            elif isinstance(operand, Value) and self._lead(operand, order) is not None:
                operands.append(self._sorted(operand, order))
            else:
                return None
        attrs = dict(op.attrs)
        if "dim" in attrs:
            attrs["dim"] = -1
        place, of = self.at.place, self.at.of
        self.at.place, self.at.of = op.place, op.of
        found = self.at.op(op.name, *operands, result=f"{x.name}.sorted", **attrs)[0]  # type: ignore[arg-type]
        self.at.place, self.at.of = place, of
        return found if found.type.shape[-2:] == (order.count, x.type.shape[-1]) else None


def _last(operand: Operand) -> tuple[Dim, ...]:
    """The size of the last axis."""
    return operand.type.shape[-1:] if isinstance(operand, Value | Weight) else ()
