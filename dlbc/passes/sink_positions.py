"""Slice-sinking: what is computed per position is computed only at the positions that are explained.

A language model's head turns [B, T, D] into [B, T, V] and one position of it is read. This pass adds the
input `%positions : i64[B,P]`, selects those positions from the output, and moves the selection up through
everything that works on each position by itself (`sinking.py`): head, final norm, the last block's MLP, its
attention's queries. What other positions need (keys and values) stays whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Section, Type, Value
from dlbc.ir.dims import Dim, symbol
from dlbc.passes import Pass, register
from dlbc.passes.rewrite import names
from dlbc.passes.sinking import Choice, Sinking

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
        return _at_positions(graph, *found)


def sequence_output(graph: Graph, wanted: str) -> tuple[Value, Dim, Dim] | None:
    """The output [B, T, V] that has a number per position of an integer input [B, T], with B and T; else None."""
    outputs = graph.attrs.get("outputs")
    named = dict(zip(outputs, graph.forward.results, strict=False)) if isinstance(outputs, tuple) else {}
    only = (*named.values(), *graph.forward.results)[0] if 1 in (len(named), len(graph.forward.results)) else None
    chosen = named.get(wanted or "logits") or only
    if chosen is None or chosen.type.rank != 3 or not chosen.type.floating:
        return None
    batch, length, _ = chosen.type.shape
    for param in graph.forward.params:
        if not param.type.floating and param.type.shape == (batch, length):
            return chosen, batch, length
    return None


class _Positions(Choice):
    """The positions that a value i64 [B, P] lists for each row of the batch."""

    def __init__(self, at: Builder, positions: Value, length: Dim) -> None:
        super().__init__(at, positions.type.shape[0], length, POSITIONS)
        self.positions = positions
        self._every: Value | None = None

    def rows(self, value: Value) -> Value:
        if self._every is None:
            self._every = self.at.reshape(self.at.arange(stop=self.batch), shape=(self.batch, 1))
        return self.at.index(value, self._every, self.positions, dims=(0, 1), result=f"{value.name}.at")

    def queries(self) -> Value:
        return self.at.reshape(self.positions, shape=(self.batch, 1, POSITIONS, 1))


def _at_positions(graph: Graph, output: Value, batch: Dim, length: Dim) -> Graph:
    """The graph with the output at `%positions`, a new input."""
    at = Builder(names(graph))
    positions = Value(at.name("positions"), Type("i64", (batch, POSITIONS)))
    sinking, forward = Sinking(graph, output, _Positions(at, positions, length)), graph.forward
    for op in forward.ops:
        if not sinking.visit(op):
            at.ops.append(op)
    chosen = sinking.select(output)
    results = tuple(chosen if r == output else r for r in forward.results)
    section = Section((*forward.params, positions), tuple(at.ops), results)
    inputs = graph.attrs.get("inputs")
    inputs = (*inputs, positions.name) if isinstance(inputs, tuple) else (positions.name,)
    graph = replace(graph, forward=section, dims={**graph.dims, "P": (1, 1024)})
    return graph.with_attrs(inputs=inputs, positions=positions.name)
