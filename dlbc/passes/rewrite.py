"""What passes share: rebuild a graph op by op, replace values everywhere, ask who uses what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Kernel, Op, Operand, Section, Type, Value, values

_NO_TYPE = Type("bool", ())

Step = Callable[[Op, Builder], "Sequence[Operand] | None"]
"""Gets an op (operands already replaced) and a builder; returns what replaces its results, None to keep it."""


def names(graph: Graph) -> set[str]:
    """Every value name in the graph: what new names must avoid."""
    found: set[str] = set()
    for _, section in graph.sections():
        found |= {p.name for p in section.params}
        found |= {r.name for op in section.ops for r in op.results}
    return found


def users(section: Section) -> dict[str, list[Op]]:
    """The ops that read each value, by value name, in execution order."""
    found: dict[str, list[Op]] = {}
    for op in section.ops:
        for name in dict.fromkeys(v.name for v in values(op.inputs)):
            found.setdefault(name, []).append(op)
    return found


def rewrite(graph: Graph, step: Step, section: str = "forward") -> Graph:
    """Rebuild one section with `step`; replaced values are replaced in all later sections too."""
    builder = Builder(names(graph))
    replaced: dict[str, Operand] = {}
    for op in getattr(graph, section).ops:
        op = substitute_op(op, replaced)
        builder.place, builder.of = op.place, op.of
        new = step(op, builder)
        if new is None:
            builder.ops.append(op)
        else:
            replaced |= {old.name: value for old, value in zip(op.results, new, strict=True)}
    rebuilt = substitute_section(replace(getattr(graph, section), body=tuple(builder.ops)), replaced, body=False)
    graph = with_section(graph, section, rebuilt)
    return substitute(graph, replaced, after=section) if replaced else graph


def with_section(graph: Graph, name: str, section: Section) -> Graph:
    """The graph with the section called `name` replaced."""
    if name == "prepare":
        return replace(graph, prepare=section)
    return replace(graph, forward=section) if name == "forward" else replace(graph, relevance=section)


def substitute(graph: Graph, replaced: dict[str, Operand], *, after: str = "") -> Graph:
    """Replace values in every section (in those after the one named `after`)."""
    order = ["prepare", "forward", "relevance"]
    for name in order[order.index(after) + 1 if after else 0:]:
        section = getattr(graph, name)
        if section is not None:
            graph = with_section(graph, name, substitute_section(section, replaced))
    return graph


def substitute_section(section: Section, replaced: dict[str, Operand], *, body: bool = True) -> Section:
    """Replace values in a section's ops (unless body=False), results and saves."""
    def swap(value: Value) -> Value:
        new = resolve(value, replaced)
        return new if isinstance(new, Value) else value

    items = tuple(replace(item, body=tuple(substitute_op(op, replaced) for op in item.body),
                          results=tuple(map(swap, item.results))) if isinstance(item, Kernel)
                  else substitute_op(item, replaced) for item in section.body) if body else section.body
    return replace(section, body=items, results=tuple(map(swap, section.results)),
                   saves=tuple(dict.fromkeys(map(swap, section.saves))))


def substitute_op(op: Op, replaced: dict[str, Operand]) -> Op:
    """Replace values that an op reads or is paired with."""
    if not replaced:
        return op
    paired = resolve(Value(op.of, _NO_TYPE), replaced) if op.of in replaced else None
    operands = tuple(resolve(o, replaced) for o in op.operands)
    reads = tuple(resolve(o, replaced) for o in op.reads)
    of = paired.name if isinstance(paired, Value) else op.of
    return op if (operands, reads, of) == (op.operands, op.reads, op.of) else replace(
        op, operands=operands, reads=reads, of=of)


def resolve(operand: Operand, replaced: dict[str, Operand]) -> Operand:
    """What an operand stands for after replacements, followed to the end."""
    while isinstance(operand, Value) and operand.name in replaced:
        operand = replaced[operand.name]
    return operand


def live(ops: Iterable[Op], wanted: Iterable[Value]) -> tuple[Op, ...]:
    """The ops that `wanted` depends on, in order."""
    needed = {v.name for v in wanted}
    kept = []
    for op in reversed(list(ops)):
        if any(r.name in needed for r in op.results):
            needed |= {v.name for v in values(op.inputs)}
            kept.append(op)
    return tuple(reversed(kept))


def with_saves(graph: Graph) -> Graph:
    """The graph with `saves` that hold exactly the forward values its relevance section reads."""
    if graph.relevance is None:
        return graph
    own = {p.name for p in graph.forward.params} | {r.name for op in graph.forward.ops for r in op.results}
    read = {v.name: v for op in graph.relevance.ops for v in values(op.inputs) if v.name in own}
    return replace(graph, forward=replace(graph.forward, saves=tuple(read.values())))


def with_prepared(graph: Graph) -> Graph:
    """The graph whose prepare section returns all that the sections after it read."""
    own = {r.name: r for op in graph.prepare.ops for r in op.results}
    if not own:
        return graph
    sections = [s for s in (graph.forward, graph.relevance) if s is not None]
    read = {v.name for s in sections for op in s.ops for v in values(op.inputs)}
    read |= {v.name for s in sections for v in (*s.results, *s.saves)}
    missing = tuple(own[name] for name in own if name in read - {v.name for v in graph.prepare.results})
    prepare = replace(graph.prepare, results=(*graph.prepare.results, *missing))
    return replace(graph, prepare=prepare) if missing else graph
