"""Sparse targets: of a wide head, only the explained rows take part in relevance.

A language model's head has a row per token of the vocabulary, and an explanation is about one or two of
them. This pass adds the input `%targets : i64[B,P,K]` (`[B,K]` for a classifier) and computes those K
numbers once more, from the K rows of the head's weight: what is seeded is `%scores`, and relevance of the
head costs a row lookup. The model's own output stays as it is; `defer` moves the scores to the relevance
section, so that targets may be chosen after the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Section, Type, Value, Weight
from dlbc.ir.dims import symbol
from dlbc.ir.ops import OPS
from dlbc.passes import Pass, register
from dlbc.passes.contrast import averageable
from dlbc.passes.outputs import explained_output
from dlbc.passes.rewrite import names

TARGETS = symbol("K")


@register
@dataclass(frozen=True)
class SinkTargets(Pass):
    """Seed `%scores`, the output at `%targets`, where the explained output is a linear layer of `at_least`
    rows, followed by nothing but elementwise ops with literals. `graph.attrs["scores"]` names it.

    `contrast`: the mean of all outputs will be asked for, too; then those ops must commute with it.
    """

    name: ClassVar[str] = "sink_targets"
    output: str = ""
    at_least: int = 4096
    contrast: bool = False

    def run(self, graph: Graph) -> Graph:
        """The graph with `%targets` and `%scores`, or as it was where there is no such head."""
        output = explained_output(graph, self.output)
        found = _head(graph, output) if output is not None else None
        if output is None or found is None or not isinstance(output.type.shape[-1], int) \
                or output.type.shape[-1] < self.at_least or (self.contrast and not averageable(found[1])):
            return graph
        head, after = found
        x, weight, *bias = head.operands
        at = Builder(names(graph), place=head.place)
        targets = Value(at.name("targets"), Type("i64", (*output.type.shape[:-1], TARGETS)))
        rows = at.take(weight, targets, dim=0, result="rows")
        scores = at.linear_rows(x, rows, *(at.take(b, targets, dim=0, result="row_bias") for b in bias),
                                result="scores")
        for op in after:
            operands = [scores if isinstance(o, Value) else o for o in op.operands]
            scores = at.op(op.name, *operands, place=op.place, result="scores", **op.attrs)[0]
        forward = graph.forward
        section = Section((*forward.params, targets), (*forward.body, *at.ops), forward.results)
        inputs = graph.attrs.get("inputs")
        graph = replace(graph, forward=section, dims={**graph.dims, "K": (1, 1024)})
        named = (*inputs, targets.name) if isinstance(inputs, tuple) else (targets.name,)
        return graph.with_attrs(inputs=named, targets=targets.name, scores=scores.name)


def _head(graph: Graph, output: Value) -> tuple[Op, list[Op]] | None:
    """The linear layer that makes an output, and the elementwise ops with literals that follow it."""
    definitions = graph.forward.definitions()
    after: list[Op] = []
    op = definitions.get(output.name)
    while op is not None and OPS[op.name].elementwise and sum(isinstance(o, Value | Weight) for o in op.operands) == 1:
        after.insert(0, op)
        source = next(o for o in op.operands if isinstance(o, Value | Weight))
        op = definitions.get(source.name)
    return (op, after) if op is not None and op.name == "linear" else None
