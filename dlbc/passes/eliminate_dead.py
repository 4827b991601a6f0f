"""Dead code: ops that nothing returned or saved depends on, weights and places that nothing names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from dlbc.ir.core import Graph, Section, Value, Weight, values
from dlbc.passes import Pass, register
from dlbc.passes.differences import with_references
from dlbc.passes.rewrite import live, with_saves


@register
@dataclass(frozen=True)
class EliminateDead(Pass):
    """Remove ops without effect, from the last section to the first; then tighten `saves`."""

    name: ClassVar[str] = "eliminate_dead"

    def run(self, graph: Graph) -> Graph:
        """The graph without dead ops, saves, weights and locations."""
        if graph.relevance is not None:
            body = live(graph.relevance.ops, graph.relevance.results)
            graph = with_references(with_saves(replace(graph, relevance=replace(graph.relevance, body=body))))
        relevance, forward = graph.relevance, graph.forward
        forward = replace(forward, body=live(forward.ops, (*forward.results, *forward.saves, *_explained(graph))))
        relevance = _unpaired(relevance, forward) if relevance is not None else None
        prepare = _prepared(graph.prepare, [forward] + ([relevance] if relevance else []))
        graph = replace(graph, prepare=prepare, forward=forward, relevance=relevance)
        ops = [op for _, section in graph.sections() for op in section.ops]
        weights = {o.name for op in ops for o in op.inputs if isinstance(o, Weight)}
        called = [op for f in graph.functions.values() for op in Section(body=f.body).ops]
        weights |= {o.name for op in called for o in op.inputs if isinstance(o, Weight)}
        places = {op.place for op in (*ops, *called)}
        return replace(graph,
                       weights={n: w for n, w in graph.weights.items() if n in weights},
                       locations={p: at for p, at in graph.locations.items() if p in places})


def _explained(graph: Graph) -> tuple[Value, ...]:
    """The forward values whose ops have a `rel.*` op, which is lowered by looking at them."""
    defined = {r.name: r for op in graph.forward.ops for r in op.results}
    rules = graph.relevance.ops if graph.relevance is not None else ()
    return tuple(defined[op.of] for op in rules if op.name.startswith("rel.") and op.of in defined)


def _unpaired(relevance: Section, forward: Section) -> Section:
    """Without the pairing with forward values that are gone: primitives need none, `rel.*` ops keep theirs alive."""
    known = {p.name for p in forward.params} | {r.name for op in forward.ops for r in op.results}
    return replace(relevance, body=tuple(
        replace(op, of="") if op.of and op.of not in known and not op.name.startswith("rel.") else op
        for op in relevance.ops))


def _prepared(prepare: Section, readers: list[Section]) -> Section:
    read = {v.name for section in readers for op in section.ops for v in values(op.inputs)}
    read |= {v.name for section in readers for v in (*section.results, *section.saves)}
    results = tuple({r.name: r for op in prepare.ops for r in op.results if r.name in read}.values())
    return replace(prepare, body=live(prepare.ops, results), results=results)
