"""Divisions by what is never negative need one guard, and no test: zeros of the denominator become infinity.

Rules of absolute values divide by `|x| |W|^T + |b|`. `safe_div` takes denominators of any sign, and on a CPU that costs
five passes over memory; a threshold is one, and a denominator that dies is guarded in place. `a / inf` is 0, as
`safe_div` says, and NaN stays NaN. What is stabilised, such as what a ReLU gave, gets `+ eps` with no look at its sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand, Value
from dlbc.ir.ops import attr
from dlbc.passes import Pass, register
from dlbc.passes.match import Dataflow, replace_ops
from dlbc.passes.rewrite import with_saves
from dlbc.passes.signs import known, never_negative


@register
@dataclass(frozen=True)
class GuardDenominators(Pass):
    """Write `safe_div(a, b)` as `div(a, threshold(b))` and `stabilise(b)` as `b + eps` where b is known to be >= 0."""

    name: ClassVar[str] = "guard_denominators"

    def run(self, graph: Graph) -> Graph:
        """The graph with the divisions of its relevance section rewritten."""
        if graph.relevance is None:
            return graph
        found: set[str] = set()
        for _, section in graph.sections():
            never_negative(section.ops, found)

        def guarded(op: Op, flow: Dataflow, at: Builder) -> Operand:
            if op.name == "stabilise" and known(op.operands[0], found):
                return at.add(op.operands[0], attr(op, "eps"))
            if op.name != "safe_div":
                return None
            numerator, denominator = op.operands
            if not isinstance(denominator, Value) or denominator.name not in found \
                    or denominator.type.dtype != op.result.type.dtype:
                return None
            return at.div(numerator, at.threshold(denominator, value=math.inf))

        return with_saves(replace_ops(graph, guarded, "relevance"))
