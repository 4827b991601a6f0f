"""Slice-sinking for fixed positions: a classifier that reads one token computes its last block for that token alone.

BERT, ViT and their kin turn [B, T, D] into [B, D] by taking the first position. This pass moves such a selection up
through everything that works on each position by itself (`sinking.py`): the last norm, the last block's MLP, its
attention's queries. Relevance follows: other positions of those values carry none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand, Section, Value
from dlbc.ir.dims import Dim, Sym
from dlbc.ir.ops import attr
from dlbc.passes import Pass, register
from dlbc.passes.rewrite import names, users
from dlbc.passes.sinking import Choice, Sinking


@register
@dataclass(frozen=True)
class SinkSlices(Pass):
    """Move each `select`, or `slice` of fixed bounds, of a value [B, T, ...] that nothing else reads above the layers
    that make it."""

    name: ClassVar[str] = "sink_slices"

    def run(self, graph: Graph) -> Graph:
        """The graph with the selections at the highest places they can stand; as it was once it is paired."""
        if graph.relevance is not None:
            return graph
        for name, choosing in users(graph.forward).items():
            bounds = _bounds(choosing[0])
            source = choosing[0].operands[0]
            if bounds is not None and isinstance(source, Value) and source.name == name \
                    and all(_bounds(other) == bounds for other in choosing):
                sunk = _sunk(graph, source, bounds, choosing)
                if sunk is not None:
                    return self.run(sunk)  # what reads what is another now
        return graph


class _Slice(Choice):
    """The positions from `start` on."""

    def __init__(self, at: Builder, source: Value, bounds: tuple[Dim, Dim]) -> None:
        self.start, self.stop = bounds
        super().__init__(at, source.type.shape[0], source.type.shape[1], self.stop - self.start)

    def rows(self, value: Value) -> Value:
        return self.at.slice(value, dim=1, start=self.start, stop=self.stop, result=f"{value.name}.at")

    def queries(self) -> Value:
        return self.at.reshape(self.at.arange(start=self.start, stop=self.stop), shape=(1, 1, self.count, 1))


def _bounds(op: Op) -> tuple[Dim, Dim] | None:
    """The positions that a selection along axis 1 takes; None for another op."""
    source = op.operands[0] if op.operands else None
    if op.name not in ("select", "slice") or not isinstance(source, Value) or source.type.rank < 3 \
            or attr(op, "dim") not in (1, 1 - source.type.rank):
        return None
    length = source.type.shape[1]
    if op.name == "slice":
        start, stop = _dim(op, "start"), _dim(op, "stop")
        return (start, stop) if attr(op, "step") == 1 and stop - start != length else None
    index = _dim(op, "index")
    index = length + index if isinstance(index, int) and index < 0 else index
    return None if length == 1 else (index, index + 1)


def _sunk(graph: Graph, source: Value, bounds: tuple[Dim, Dim], choosing: list[Op]) -> Graph | None:
    """The graph with one selection moved up; None where that saves no layer any work."""
    at = Builder(names(graph))
    sinking = Sinking(graph, source, _Slice(at, source, bounds), choosing)
    if not any(op.name in ("linear", "attention") and op.result.name in sinking.region for op in graph.forward.ops):
        return None
    replaced: dict[str, Value] = {}
    for op in graph.forward.ops:
        if sinking.visit(op):
            continue
        if op in choosing:
            chosen = sinking.select(source)
            if op.name == "slice":
                replaced[op.result.name] = chosen
            else:
                at.ops.append(replace(op, operands=(chosen,), attrs={"dim": 1, "index": 0}))
            continue
        at.ops.append(replace(op, operands=tuple(_of(o, replaced) for o in op.operands)))
    results = tuple(replaced.get(r.name, r) for r in graph.forward.results)
    return replace(graph, forward=Section(graph.forward.params, tuple(at.ops), results))


def _dim(op: Op, name: str) -> Dim:
    found = attr(op, name)
    assert isinstance(found, int | Sym)
    return found


def _of(operand: Operand, replaced: dict[str, Value]) -> Operand:
    return replaced.get(operand.name, operand) if isinstance(operand, Value) else operand
