"""Recompute: what a few cheap ops make of values that are kept anyway is not kept, but made again for relevance.

Rules read what a layer gave and what its activation made of that, or sums of residual streams and their norms. Both
would be kept from the forward pass to the end. An elementwise op, a norm or reading rows of a table take one or two
passes over memory: the value is computed again just before relevance reads it first, and may then be written over. The
ops are the same on the same numbers: so are the results.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from dlbc.ir.core import Graph, Kernel, Op, Value, values
from dlbc.ir.fusible import POINTWISE, fits, is_row
from dlbc.ir.ops import OPS
from dlbc.passes import Pass, register
from dlbc.passes.checkpoint import Again, Sizes
from dlbc.passes.rewrite import names, with_saves

_PASSES = frozenset({"layer_norm", "rms_norm", "embedding"})
"""Ops that are no more than one or two passes over their result."""
_VIEWS = frozenset({"reshape", "permute", "expand", "slice", "select"})
_FEW = frozenset({"B", "S", "P", "K"})


@register
@dataclass(frozen=True)
class Recompute(Pass):
    """Do not keep values of the forward section that at most `longest` cheap ops make of others that are kept.

    Of values that are made of each other, every other one is kept. A value counts from `least` bytes on, of one row of
    the batch and 128 positions. For lowered graphs (level 3) without kernels; others stay as they are.

    `kernels`: what comes after writes kernels, in whose registers values are computed where pointwise ops and rows read
    them. One that a product, a convolution or attention reads, too, would be written to memory again: it is kept.
    """

    name: ClassVar[str] = "recompute"
    least: int = 65536
    longest: int = 3
    kernels: bool = False

    def run(self, graph: Graph) -> Graph:
        """The graph with a forward section that keeps less."""
        relevance = graph.relevance
        if relevance is None or any(isinstance(item, Kernel) or item.name.startswith("rel.")
                                    for item in (*graph.forward.body, *relevance.body)):
            return graph
        again = _Choice(graph, self.longest, Sizes(graph, 128, _FEW), self.least, self.kernels).chosen()
        if not again:
            return graph
        ops = list(graph.forward.ops)
        kept = {r.name for op in ops for r in op.results} - again
        body = Again(ops, kept, len(ops) - 1, names(graph), near=True).body(relevance.ops)
        return with_saves(replace(graph, relevance=replace(relevance, body=tuple(body))))


class _Choice:
    """Which forward values are computed again."""

    def __init__(self, graph: Graph, longest: int, sizes: Sizes, least: int, kernels: bool) -> None:
        assert graph.relevance is not None
        self.written = {value.name for op in graph.relevance.ops for value in values(op.inputs)
                        if kernels and not _in_kernel(op)}
        """Values that would be written to memory, whatever computes them."""
        self.longest, self.sizes, self.least = longest, sizes, least
        self.definitions = graph.forward.definitions()
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}
        """The first and the last op of relevance that reads a value."""
        for number, op in enumerate(graph.relevance.ops):
            for value in values(op.inputs):
                self.first.setdefault(value.name, number)
                self.last[value.name] = number
        self.there = {v.name for v in (*graph.forward.params, *graph.forward.results, *graph.prepare.results)}
        """Values that are held to the end, whatever relevance reads."""
        self.returned = {v.name for v in graph.relevance.results}
        self.shared = {self.base(op.operands[0]) for name, op in self.definitions.items()
                       if op.name in _VIEWS and name in self.first}
        """Values of which views are kept: their memory is, too."""
        self.free = set[str]()
        """Values that are computed again from what is held to the end."""

    def chosen(self) -> set[str]:
        """The names of values that are computed again: those that relevance reads, and what stands between."""
        read = [name for name, op in reversed(self.definitions.items()) if self.wanted(name, op)]
        found, needed = set[str](), set[str]()
        for name in read:  # of inputs alone: others can be made of them, whether they are kept or not
            made = self.made_of(name)
            if made is not None and not made[1]:
                found |= made[0]
                self.free.add(name)
        for name in read:
            made = None if name in needed or name in self.free else self.made_of(name)
            if made is not None:
                found |= made[0]
                needed |= made[1]
        return found

    def wanted(self, name: str, op: Op) -> bool:
        """Whether relevance reads a value that would be kept for it alone, and is large enough."""
        return not (name in self.there or name in self.returned or name not in self.first or name in self.shared
                    or name in self.written or op.name in _VIEWS or self.sizes(op.result) < self.least)

    def made_of(self, name: str) -> tuple[set[str], set[str]] | None:
        """The values to compute for this one (it among them), and the kept values they are made of; None where it is
        made of others, by too many ops, or where one of those would be kept for it longer than relevance needs it."""
        inner, leaves, waiting, cost = {name}, set[str](), [name], 0
        while waiting:
            op = self.definitions[waiting.pop()]
            cost += op.name not in _VIEWS
            if not _cheap(op) or cost > self.longest:
                return None
            for value in values(op.operands):
                if value.name in self.there or value.name not in self.definitions:
                    continue
                if self.last.get(value.name, -1) >= self.first[name]:
                    leaves |= {value.name} - self.free
                elif value.name in self.first:
                    return None
                elif value.name not in inner:
                    inner.add(value.name)
                    waiting.append(value.name)
        return inner, leaves

    def base(self, operand: object) -> str:
        """The value that a view is one of."""
        while isinstance(operand, Value):
            op = self.definitions.get(operand.name)
            if op is None or op.name not in _VIEWS:
                return operand.name
            operand = op.operands[0]
        return ""


def _cheap(op: Op) -> bool:
    return op.name in OPS and len(op.results) == 1 and (
        OPS[op.name].elementwise or op.name in _PASSES or op.name in _VIEWS)


def _in_kernel(op: Op) -> bool:
    """Whether a kernel that has this op may compute its operands as well."""
    return is_row(op) or (op.name in POINTWISE and fits(op))
