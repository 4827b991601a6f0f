"""Inline: the ops of functions stand where the functions are called; the inverse of `outline`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from dlbc.ir.core import Graph, Kernel, Op, Operand, Value
from dlbc.passes import Pass, register
from dlbc.passes.rewrite import names, with_section


@register
@dataclass(frozen=True)
class Inline(Pass):
    """Open every call. What a function computes for itself gets new names; stars in places become the caller's part.

    The graph has no functions after it.
    """

    name: ClassVar[str] = "inline"

    def run(self, graph: Graph) -> Graph:
        """The graph without functions."""
        if not graph.functions:
            return graph
        inlining = _Inlining(graph)
        for name, section in list(graph.sections()):
            body = tuple(opened for item in section.body for opened in inlining.opened(item))
            graph = with_section(graph, name, replace(section, body=body))
        ops = [op for _, section in graph.sections() for op in section.ops]
        places = {op.place for op in ops}
        streamed = {op.attrs["function"] for op in ops if op.name == "stream"}
        functions = {name: function for name, function in graph.functions.items() if name in streamed}
        return replace(graph, functions=functions, locations={
            place: at for place, at in inlining.locations.items() if place in places})


class _Inlining:
    """The names that are taken, and the places that are known."""

    def __init__(self, graph: Graph) -> None:
        self.functions, self.taken = graph.functions, names(graph)
        self.locations = dict(graph.locations)
        self.numbers: dict[str, int] = {}

    def opened(self, item: Op | Kernel) -> list[Op | Kernel]:
        """What stands in place of an item."""
        if isinstance(item, Kernel) or item.name != "call":
            return [item]
        function = self.functions[str(item.attrs["function"])]
        known: dict[Operand, Operand] = dict(zip(function.params, item.operands, strict=True))
        returned = dict(zip(reversed(function.results), reversed(item.results), strict=True))
        found: list[Op | Kernel] = []
        for inner in function.body:
            if isinstance(inner, Kernel):
                ops = tuple(self.renamed(op, item, known, returned) for op in inner.body)
                found.append(replace(inner, body=ops, results=tuple(_value(r, known) for r in inner.results)))
            else:
                found += self.opened(self.renamed(inner, item, known, returned))
        # A function may return a parameter, or one value twice.
        return found + [Op("reshape", (_value(inside, known),), (outside,), {"shape": outside.type.shape}, item.place)
                        for inside, outside in zip(function.results, item.results, strict=True)
                        if known[inside] != outside]

    def renamed(self, op: Op, call: Op, known: dict[Operand, Operand], returned: dict[Value, Value]) -> Op:
        """An op of a function as the caller sees it; what it computes is noted in `known`."""
        operands, reads = tuple(known.get(o, o) for o in op.operands), tuple(known.get(o, o) for o in op.reads)
        for result in op.results:
            known[result] = returned.get(result) or Value(self.fresh(result.name), result.type)
        place = _placed(op.place, call.place)
        if op.place in self.locations:
            self.locations.setdefault(place, self.locations[op.place])
        return replace(op, operands=operands, reads=reads, place=place,
                       results=tuple(_value(r, known) for r in op.results))

    def fresh(self, stem: str) -> str:
        """A name that nothing in the graph has: `abs`, `abs.1`, ..."""
        name, number = stem, self.numbers.get(stem, 0)
        while name in self.taken:
            number += 1
            name = f"{stem}.{number}"
        self.numbers[stem] = number
        self.taken.add(name)
        return name


def _value(value: Value, known: dict[Operand, Operand]) -> Value:
    found = known[value]
    assert isinstance(found, Value)
    return found


def _placed(place: str, caller: str) -> str:
    """`model.layers.3.mlp` of `model.layers.*.mlp` called at `model.layers.3`."""
    own, outer = place.split("."), caller.split(".")
    if "*" not in own[:len(outer)] or len(own) < len(outer):
        return place
    return ".".join([*outer, *own[len(outer):]])
