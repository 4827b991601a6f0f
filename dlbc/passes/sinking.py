"""What is read at some positions of a sequence is computed only there: how the choice moves up.

Everything that works on each position by itself is computed at the chosen positions alone: norms, linear layers,
elementwise ops, an attention's queries. What other positions need (keys and values) stays whole. Which positions, a
`Choice` says: those of an input (`sink_positions`), or a fixed slice (`sink_slices`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import replace

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand, Type, Value, values
from dlbc.ir.dims import Dim
from dlbc.ir.ops import OPS, attr, axes, axis
from dlbc.passes.rewrite import users


class Choice(ABC):
    """Some positions of a sequence, `count` of them."""

    def __init__(self, at: Builder, batch: Dim, length: Dim, count: Dim) -> None:
        self.at, self.batch, self.length, self.count = at, batch, length, count

    @abstractmethod
    def rows(self, value: Value) -> Value:
        """A value [B, T, ...] at the positions: [B, count, ...]."""

    @abstractmethod
    def queries(self) -> Value:
        """The positions themselves, i64 [B or 1, 1, count, 1]."""


class Sinking:
    """One run: which values are wanted only at the positions, and their selected versions.

    `output` is what the positions are chosen of; `choosing` are its readers that want nothing else of it.
    """

    def __init__(self, graph: Graph, output: Value, choice: Choice, choosing: Collection[Op] = ()) -> None:
        self.graph, self.output, self.choice, self.choosing = graph, output, choice, choosing
        self.at, self.batch, self.length = choice.at, choice.batch, choice.length
        self.selected: dict[str, Value] = {}
        self.region = self._region()
        self.at.taken -= self.region  # what is computed at the positions keeps its name

    def visit(self, op: Op) -> bool:
        """Write an op of the region at the positions, into the builder; False: it is none."""
        if op.result.name not in self.region:
            return False
        self.at.place = op.place
        self.selected[op.result.name] = self._rebuild(op)
        return True

    def select(self, value: Operand) -> Value:
        """A value at the positions."""
        assert isinstance(value, Value)
        if value.name not in self.selected:
            place = self._position_axis(value)
            assert place is not None
            self.selected[value.name] = self._indexed(value, place)
        return self.selected[value.name]

    def _region(self) -> set[str]:
        """Results of the ops that work position by position and whose readers are all in the region."""
        readers = users(self.graph.forward)
        needed = {r.name for r in self.graph.forward.results} - (set() if self.choosing else {self.output.name})
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
        """The reader chooses, or is in the region and reads the value as something selected (a query, not a key)."""
        if value == self.output and reader in self.choosing:
            return True
        if reader.result.name not in region:
            return False
        return reader.name != "attention" or value not in reader.operands[1:]

    def _position_axis(self, value: Value) -> int | None:
        """The axis of T in [B, T, ...] or [B, H, T, ...]."""
        shape = value.type.shape
        if not shape or shape[0] != self.batch:
            return None
        if len(shape) == 4 and shape[1] == shape[2] == self.length:
            return None  # heads or positions: the sizes do not tell
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
        if op.name in ("expert_linear", "combine"):
            return place == 1 and all(isinstance(v, Value) and self._position_axis(v) == 1 for v in op.operands[:2])
        if op.name in ("sum", "slice"):
            first = op.operands[0]
            assert isinstance(first, Value)
            worked_on = axes(first.type.rank, attr(op, "dims" if op.name == "sum" else "dim"))
            return place == 1 and self._position_axis(first) == 1 and min(worked_on) > 1
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
        operands = [self.select(o) if isinstance(o, Value) and self._position_axis(o) is not None
                    and not (op.name == "attention" and i > 0) else o for i, o in enumerate(op.operands)]
        attrs = dict(op.attrs)
        if op.name == "reshape":
            shape = attrs["shape"]
            assert isinstance(shape, tuple)
            attrs["shape"] = (shape[0], self.choice.count, *shape[2:])
        if op.name == "attention":
            return self._attention(op, operands)
        if op.name == "rotary":
            operands = [self._select_table(o) for o in op.operands]
        return self.at.op(op.name, *operands, result=op.result.name, **attrs)[0]  # type: ignore[arg-type]

    def _attention(self, op: Op, operands: list[Operand]) -> Value:
        """Attention with selected queries: what `causal` and `window` said becomes a mask by position."""
        at, (q, k, v, *rest) = self.at, operands
        mask, *sinks = rest or [None]
        causal, window = attr(op, "causal"), attr(op, "window")
        if isinstance(mask, Value) and mask.type.rank >= 2 and mask.type.shape[-2] != 1:
            mask = self._select_mask(mask)
        if causal or window is not None:
            query = self.choice.queries()
            key = at.arange(stop=self.length)
            seen = at.le(key, query) if causal else None
            if window is not None:
                near = at.lt(at.sub(query, key), window)
                seen = near if seen is None else at.logical_and(seen, near)
            mask = self._joined(seen, mask)
        kept = {n: v for n, v in op.attrs.items() if n not in ("causal", "window")}
        return at.attention(q, k, v, mask, *sinks, result=op.result.name, **kept)

    def _joined(self, seen: Value | None, mask: Operand) -> Operand:
        if not isinstance(mask, Value) or seen is None:
            return seen
        if mask.type.dtype == "bool":
            return self.at.logical_and(seen, mask)
        return self.at.where(seen, mask, float("-inf"))

    def _select_table(self, value: Operand) -> Value:
        assert isinstance(value, Value)
        if self._position_axis(value) is not None:
            return self.select(value)
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

    def _indexed(self, value: Value, place: int) -> Value:
        at = self.at
        if place == 2:
            moved = at.permute(value, dims=(0, 2, 1, *range(3, value.type.rank)))
            return at.permute(self._indexed(moved, 1), dims=(0, 2, 1, *range(3, value.type.rank)))
        return self.choice.rows(value)


def _int(op: Op, name: str) -> int:
    found = attr(op, name)
    assert isinstance(found, int)
    return found
