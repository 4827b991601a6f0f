"""Contrast: explain each output minus the mean of all of them.

A single logit also holds what raises every logit alike. Seeding `y - mean(y)` leaves that out: at a linear
head, `R_h = h * (w_t - mean_v w_v)`, with the mean row computed once from the weights. What is seeded is
`%centred`; the model's own output stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand, Section, Value
from dlbc.passes import Pass, register
from dlbc.passes.outputs import FINAL, explained_output
from dlbc.passes.rewrite import names

LINEAR_IN_X = frozenset({"mul", "div", "add", "sub", "neg", "cast"})
"""Elementwise ops with literals that commute with a mean."""


@register
@dataclass(frozen=True)
class Contrast(Pass):
    """Seed the explained output minus its mean over the last axis; nothing changes where that axis has one entry, and
    at probabilities (after a final softmax or sigmoid), which are relative already.

    `graph.attrs["scores"]` names what is seeded, `graph.attrs["contrast"]` says "mean".
    """

    name: ClassVar[str] = "contrast"
    output: str = ""

    def run(self, graph: Graph) -> Graph:
        """The graph with `%centred`."""
        output = explained_output(graph, self.output)
        if output is None or output.type.rank < 2 or output.type.shape[-1] == 1:
            return graph
        made_by = graph.forward.definitions().get(output.name)
        if made_by is not None and made_by.name in FINAL:
            return graph
        at = Builder(names(graph))
        if "scores" in graph.attrs:
            scores, mean = _of_targets(graph, at)
        else:
            scores, mean = output, at.mean(output, dims=(-1,), keepdim=True, result="mean")
        centred = at.sub(scores, mean, result="centred")
        forward = graph.forward
        section = Section(forward.params, (*forward.body, *at.ops), forward.results)
        return replace(graph, forward=section).with_attrs(scores=centred.name, contrast="mean")


def averageable(after: list[Op]) -> bool:
    """Whether the mean of a head's outputs can be had from the mean row of its weight, through the ops after it."""
    return all(op.name in LINEAR_IN_X for op in after)


def _of_targets(graph: Graph, at: Builder) -> tuple[Value, Value]:
    """The sparse scores of `sink_targets`, and the mean of all outputs by the mean row of the head."""
    definitions = graph.forward.definitions()
    op = definitions[str(graph.attrs["scores"])]
    scores, after = op.result, list[Op]()
    while op.name != "linear_rows":
        after.insert(0, op)
        op = definitions[next(o.name for o in op.operands if isinstance(o, Value))]
    at.place = op.place
    x, *rows = op.operands
    means: list[Operand] = []
    for row in rows:  # the weight's rows, and the bias's entries
        assert isinstance(row, Value)
        means.append(at.mean(definitions[row.name].operands[0], dims=(0,), keepdim=True))
    mean = at.linear(x, *means, result="mean")
    for op in after:
        operands = [mean if isinstance(o, Value) else o for o in op.operands]
        mean = at.op(op.name, *operands, place=op.place, result="mean", **op.attrs)[0]
    return scores, mean
