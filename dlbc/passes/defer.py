"""Defer: what depends on the targets moves from the forward to the head of the relevance section.

`sink_targets` computes `%scores` from `%targets`, which are chosen when the outputs are known. Nothing the
forward returns depends on them, so those ops, and the parameter itself, belong to relevance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from dlbc.ir.core import Graph, values
from dlbc.passes import Pass, register
from dlbc.passes.rewrite import with_saves


@register
@dataclass(frozen=True)
class Defer(Pass):
    """Move the parameter `graph.attrs["targets"]` and all that depends on it into the relevance section."""

    name: ClassVar[str] = "defer"

    def run(self, graph: Graph) -> Graph:
        """The graph with a forward section that knows no targets."""
        targets, forward, relevance = graph.attrs.get("targets"), graph.forward, graph.relevance
        param = next((p for p in forward.params if p.name == targets), None)
        if param is None or relevance is None:
            return graph
        late = of_targets(graph)
        if any(r.name in late for r in forward.results):
            return graph  # what is returned is wanted with the outputs
        moved = tuple(op for op in forward.ops if op.result.name in late)
        stays = tuple(op for op in forward.ops if op.result.name not in late)
        body = tuple(replace(op, of="") if op.of in late else op for op in relevance.ops)  # no forward value any more
        inputs = graph.attrs.get("inputs")
        graph = replace(
            graph,
            forward=replace(forward, params=tuple(p for p in forward.params if p != param), body=stays),
            relevance=replace(relevance, params=(*relevance.params, param), body=(*moved, *body)))
        if isinstance(inputs, tuple):
            graph = graph.with_attrs(inputs=tuple(name for name in inputs if name != param.name))
        return with_saves(graph)


def of_targets(graph: Graph) -> set[str]:
    """Names of the parameter `graph.attrs["targets"]` and of the forward values that depend on it."""
    targets = graph.attrs.get("targets")
    late = {str(targets)} if targets is not None else set[str]()
    for op in graph.forward.ops if late else ():
        if any(v.name in late for v in values(op.inputs)):
            late |= {r.name for r in op.results}
    return late
