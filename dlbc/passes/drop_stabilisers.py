"""Drop stabilisers too small to matter: `y / e(y)` is 1 but for |y| of the order of epsilon.

In the multiplier form the epsilon rule is `M_x = W^T (M_y y / e(y))`. With eps = 1e-6 the factor differs
from 1 only where y itself, and with it the relevance y M_y, is negligible; without it the epsilon family
costs what a gradient costs. This is the one pass that is not exact: it stays within the tolerances under
Numerics in `docs/rules.md`, which its validation checks. Larger epsilons, which users choose to denoise, stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand, Value
from dlbc.ir.ops import attr
from dlbc.passes import Pass, register
from dlbc.passes.rewrite import rewrite


@register
@dataclass(frozen=True)
class DropStabilisers(Pass):
    """Replace `m * (y / stabilise(y, eps))` by `m` in the relevance section where eps <= `below`."""

    name: ClassVar[str] = "drop_stabilisers"
    below: float = 1e-6

    def run(self, graph: Graph) -> Graph:
        """The graph without negligible stabilisers."""
        if graph.relevance is None:
            return graph
        stabilised: dict[str, Operand] = {}
        ratios: set[str] = set()

        def step(op: Op, at: Builder) -> Sequence[Operand] | None:
            if op.name == "stabilise" and _eps(op) <= self.below:
                stabilised[op.result.name] = op.operands[0]
            elif op.name == "div" and isinstance(op.operands[1], Value) \
                    and stabilised.get(op.operands[1].name) == op.operands[0]:
                ratios.add(op.result.name)
            elif op.name == "mul" and isinstance(op.operands[1], Value) and op.operands[1].name in ratios \
                    and isinstance(op.operands[0], Value) and op.operands[0].type == op.result.type:
                return (op.operands[0],)
            return None

        return rewrite(graph, step, "relevance")


def _eps(op: Op) -> float:
    eps = attr(op, "eps")
    assert isinstance(eps, float)
    return eps
