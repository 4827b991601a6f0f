"""Slice-sinking: what is computed per position is computed only at the positions that are explained.

A language model's head turns [B, T, D] into [B, T, V] and one position of it is read. This pass adds the
input `%positions : i64[B,P]`, selects those positions from the output, and moves the selection up through
everything that works on each position by itself: head, final norm, the last block's MLP, its attention's
queries. What other positions need (keys and values) stays whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand, Section, Type, Value, values
from dlbc.ir.dims import Dim, symbol
from dlbc.ir.ops import OPS, attr, axis
from dlbc.passes import Pass, register
from dlbc.passes.rewrite import names, users

POSITIONS = symbol("P")


@register
@dataclass(frozen=True)
class SinkPositions(Pass):
    """Compute the output called `output` (default: `logits`, else the only one) at `%positions` only.

    Applies to an output [B, T, V] whose T is the sequence of an integer input [B, T]; other graphs are left
    alone. `graph.attrs["positions"]` tells the run time.
    """

    name: ClassVar[str] = "sink_positions"
    output: str = ""

    def run(self, graph: Graph) -> Graph:
        """The graph with the selection at the highest places it can stand."""
        found = sequence_output(graph, self.output)
        if found is None or isinstance(found[2], int):
            return graph  # of a sequence of fixed length, all positions are computed
        return _Sinking(graph, *found).run()


def sequence_output(graph: Graph, wanted: str) -> tuple[Value, Dim, Dim] | None:
    """The output [B, T, V] that has a number per position of an integer input [B, T], with B and T; else None."""
    outputs = graph.attrs.get("outputs")
    named = dict(zip(outputs, graph.forward.results, strict=False)) if isinstance(outputs, tuple) else {}
    chosen = named.get(wanted or "logits") or (graph.forward.results[0] if len(graph.forward.results) == 1 else None)
    if chosen is None or chosen.type.rank != 3 or not chosen.type.floating:
        return None
    batch, length, _ = chosen.type.shape
    for param in graph.forward.params:
        if not param.type.floating and param.type.shape == (batch, length):
            return chosen, batch, length
    return None


class _Sinking:
    """One run: which values are wanted only at the positions, and their selected versions."""

    def __init__(self, graph: Graph, output: Value, batch: Dim, length: Dim) -> None:
        self.graph, self.output, self.batch, self.length = graph, output, batch, length
        self.at = Builder(names(graph))
        self.positions = Value(self.at.name("positions"), Type("i64", (batch, POSITIONS)))
        self.selected: dict[str, Value] = {}
        self.region = self._region()
        self.rows: Value | None = None

    def run(self) -> Graph:
        forward = self.graph.forward
        for op in forward.ops:
            if op.result.name in self.region:
                self.at.place = op.place
                self.selected[op.result.name] = self._rebuild(op)
            else:
                self.at.ops.append(op)
        chosen = self._select(self.output)
        results = tuple(chosen if r == self.output else r for r in forward.results)
        section = Section((*forward.params, self.positions), tuple(self.at.ops), results)
        inputs = self.graph.attrs.get("inputs")
        inputs = (*inputs, self.positions.name) if isinstance(inputs, tuple) else (self.positions.name,)
        graph = replace(self.graph, forward=section, dims={**self.graph.dims, "P": (1, 1024)})
        return graph.with_attrs(inputs=inputs, positions=self.positions.name)

    def _region(self) -> set[str]:
        """Results of the ops that work position by position and whose readers are all in the region."""
        readers = users(self.graph.forward)
        needed = {r.name for r in self.graph.forward.results} - {self.output.name}
        region: set[str] = set()
        for op in reversed(list(self.graph.forward.ops)):
            result = op.result
            wanted = result == self.output or bool(readers.get(result.name))
            alone = result.name not in needed and all(
                self._only_selected(reader, result, region) for reader in readers.get(result.name, ()))
            if wanted and alone and len(op.results) == 1 and self._position_axis(result) is not None \
                    and self._by_position(op):
                region.add(result.name)
        return region

    def _only_selected(self, reader: Op, value: Value, region: set[str]) -> bool:
        """The reader is in the region, and reads the value as something selected (a query, not a key)."""
        if reader.result.name not in region:
            return False
        return reader.name != "attention" or value not in reader.operands[1:]

    def _position_axis(self, value: Value) -> int | None:
        """The axis of T in [B, T, ...] or [B, H, T, ...]."""
        shape = value.type.shape
        if not shape or shape[0] != self.batch:
            return None
        if len(shape) >= 2 and shape[1] == self.length:
            return 1
        return 2 if len(shape) == 4 and shape[2] == self.length and shape[1] != self.length else None

    def _table_axis(self, value: Value) -> int | None:
        """As `_position_axis`, for tables that all rows of the batch may share: [B or 1, ..., T, ...]."""
        batch, *rest = value.type.shape or (0,)
        return self._position_axis(replace(value, type=Type(value.type.dtype, (self.batch, *rest)))) \
            if batch in (1, self.batch) else None

    def _by_position(self, op: Op) -> bool:
        place = self._position_axis(op.result)
        moving = [v for v in values(op.operands) if self._position_axis(v) is not None]
        if op.name == "attention":
            query, key = op.operands[:2]
            return isinstance(query, Value) and isinstance(key, Value) and query != key \
                and self._position_axis(query) == 2 and key.type.shape[2] == self.length
        if op.name == "rotary":
            return place is not None and all(self._table_axis(v) == place for v in values(op.operands))
        if OPS[op.name].elementwise:
            return bool(moving) and all((v in moving and v.type.rank == op.result.type.rank
                                         and self._position_axis(v) == place) or self._constant_along(v, op.result)
                                        for v in values(op.operands))
        if op.name in ("linear", "softmax", "layer_norm", "rms_norm"):
            depth = attr(op, "dims") if op.name.endswith("norm") else 1
            last = op.name != "softmax" or axis(op.result.type.rank, _int(op, "dim")) == op.result.type.rank - 1
            first = op.operands[0]
            return bool(last and isinstance(depth, int) and isinstance(first, Value) and place is not None
                        and op.result.type.rank - depth > place and self._position_axis(first) == place
                        and all(not isinstance(v, Value) or self._position_axis(v) is None for v in op.operands[1:]))
        if op.name == "permute":
            first = op.operands[0]
            return isinstance(first, Value) and self._position_axis(first) is not None and \
                op.attrs["dims"] == (0, 2, 1, 3)
        if op.name == "reshape":
            first = op.operands[0]
            return isinstance(first, Value) and place == 1 and self._position_axis(first) == 1
        return False

    def _constant_along(self, value: Value, result: Value) -> bool:
        """The operand broadcasts over batch and positions: nothing in it depends on either."""
        place = self._position_axis(result)
        offset = result.type.rank - value.type.rank
        return place is not None and all(
            value.type.shape[i - offset] == 1 for i in (0, place) if i >= offset)

    def _rebuild(self, op: Op) -> Value:
        operands = [self._select(o) if isinstance(o, Value) and self._position_axis(o) is not None
                    and not (op.name == "attention" and i > 0) else o for i, o in enumerate(op.operands)]
        attrs = dict(op.attrs)
        if op.name == "reshape":
            shape = attrs["shape"]
            assert isinstance(shape, tuple)
            attrs["shape"] = (shape[0], POSITIONS, *shape[2:])
        if op.name == "attention":
            return self._attention(op, operands)
        if op.name == "rotary":
            operands = [self._select_table(o) for o in op.operands]
        return self.at.op(op.name, *operands, result=op.result.name, **attrs)[0]  # type: ignore[arg-type]

    def _attention(self, op: Op, operands: list[Operand]) -> Value:
        """Attention with selected queries: what `causal` and `window` said becomes a mask by position."""
        at, (q, k, v, *rest) = self.at, operands
        mask = rest[0] if rest else None
        causal, window = attr(op, "causal"), attr(op, "window")
        if isinstance(mask, Value) and mask.type.rank >= 2 and mask.type.shape[-2] != 1:
            mask = self._select_mask(mask)
        if causal or window is not None:
            query = at.reshape(self.positions, shape=(self.batch, 1, POSITIONS, 1))
            key = at.arange(stop=self.length)
            seen = at.le(key, query) if causal else None
            if window is not None:
                near = at.lt(at.sub(query, key), window)
                seen = near if seen is None else at.logical_and(seen, near)
            mask = self._joined(seen, mask)
        kept = {n: v for n, v in op.attrs.items() if n not in ("causal", "window")}
        return at.attention(q, k, v, mask, result=op.result.name, **kept)

    def _joined(self, seen: Value | None, mask: Operand) -> Operand:
        if not isinstance(mask, Value) or seen is None:
            return seen
        if mask.type.dtype == "bool":
            return self.at.logical_and(seen, mask)
        return self.at.where(seen, mask, float("-inf"))

    def _select_table(self, value: Operand) -> Value:
        assert isinstance(value, Value)
        if self._position_axis(value) is not None:
            return self._select(value)
        wide = self.at.expand(value, shape=(self.batch, *value.type.shape[1:]))
        place = self._position_axis(wide)
        assert place is not None
        return self._indexed(wide, place)

    def _select_mask(self, mask: Value) -> Value:
        """Rows of a mask [B or 1, H or 1, T, U] (or of lower rank) at the positions."""
        at = self.at
        shape = (1,) * (4 - mask.type.rank) + mask.type.shape
        wide = at.expand(at.reshape(mask, shape=shape), shape=(self.batch, *shape[1:]))
        return self._indexed(wide, 2)

    def _select(self, value: Operand) -> Value:
        assert isinstance(value, Value)
        if value.name not in self.selected:
            place = self._position_axis(value)
            assert place is not None
            self.selected[value.name] = self._indexed(value, place)
        return self.selected[value.name]

    def _indexed(self, value: Value, place: int) -> Value:
        at = self.at
        if place == 2:
            moved = at.permute(value, dims=(0, 2, 1, *range(3, value.type.rank)))
            return at.permute(self._indexed(moved, 1), dims=(0, 2, 1, *range(3, value.type.rank)))
        if self.rows is None:
            self.rows = at.reshape(at.arange(stop=self.batch), shape=(self.batch, 1))
        return at.index(value, self.rows, self.positions, dims=(0, 1), result=f"{value.name}.at")


def _int(op: Op, name: str) -> int:
    found = attr(op, name)
    assert isinstance(found, int)
    return found
