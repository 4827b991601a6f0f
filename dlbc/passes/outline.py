"""Outline: repeated blocks of ops become one function, called with different weights and values.

Where blocks may be is told by the module paths of ops: `model.layers.3.mlp` belongs to block 3 of `model.layers`.
Whether two are alike is told by their structure alone: kinds, attributes, types and dataflow of their ops, in order.

    %y = call @layers_forward(%x, %cos, @model.layers.3.mlp.up.weight, ...)   #model.layers.3

A function shows its ops at `#model.layers.*.mlp`. The order of ops stays as it was wherever it can.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from typing import ClassVar, TypeAlias

from dlbc.ir.core import Attr, Function, Graph, Kernel, Location, Op, Operand, Section, Value, Weight, values
from dlbc.passes import Pass, register
from dlbc.passes.rewrite import with_section

_NUMBERED = re.compile(r"(?<![^.])\d+(?![^.])")
Key: TypeAlias = "tuple[object, ...]"


@register
@dataclass(frozen=True)
class Outline(Pass):
    """Make functions of blocks that occur at least twice where that makes the text shorter, by `least` ops or more.

    What a block computes for others (saved forward values, too) are the function's results; what it reads of others,
    and its weights, are its parameters. Blocks that differ in an attribute, a type or a result are not alike. Graphs
    with rules (level 2) or kernels (level 4) stay as they are.
    """

    name: ClassVar[str] = "outline"
    least: int = 8

    def run(self, graph: Graph) -> Graph:
        """The graph with functions and calls in place of repeated blocks."""
        if any(isinstance(item, Kernel) for _, section in graph.sections() for item in section.body) or any(
                op.rule is not None or op.name.startswith("rel.") for _, s in graph.sections() for op in s.ops):
            return graph
        before, taken = graph, {graph.name, *graph.weights, *graph.functions}
        for name, section in list(graph.sections()):
            found = _Outlining(name, section, _read_elsewhere(graph, name), taken, self.least).run()
            if found.functions:
                graph = with_section(graph, name, replace(section, body=found.items))
                graph = replace(graph, functions={**graph.functions, **found.functions})
        return _tidied(graph, before) if graph is not before else graph


@dataclass
class _Block:
    """One occurrence: the ops at one numbered place."""

    place: str
    ops: list[tuple[int, Op]]
    """With their positions in the section."""
    results: tuple[Value, ...] = ()
    params: dict[Value | Weight, None] = field(default_factory=dict)


class _Outlining:
    """The blocks of one section."""

    def __init__(self, name: str, section: Section, read_elsewhere: set[str], taken: set[str], least: int) -> None:
        self.name, self.items = name, section.body
        self.read_elsewhere = read_elsewhere | {v.name for v in (*section.results, *section.saves)}
        self.taken, self.least = taken, least
        self.functions: dict[str, Function] = {}

    def run(self) -> _Outlining:
        """Blocks of the outermost numbered places first, then of those inside of what is left."""
        depth = 0
        while blocks := self.blocks(depth):
            if len(blocks) > 1:
                self.outline(blocks)
            depth += 1
        return self

    def blocks(self, depth: int) -> list[_Block]:
        """The ops of each place with `depth` numbered places around it."""
        found: dict[str, _Block] = {}
        for position, op in enumerate(self.ops()):
            numbers = [m.end() for m in _NUMBERED.finditer(op.place)] if op.name != "call" else []
            if len(numbers) > depth:
                place = op.place[:numbers[depth]]
                found.setdefault(place, _Block(place, [])).ops.append((position, op))
        return list(found.values())

    def ops(self) -> Iterator[Op]:
        """The items; `Outline` runs on no kernels."""
        return (item for item in self.items if isinstance(item, Op))

    def outline(self, blocks: list[_Block]) -> None:
        """Replace those blocks that are alike by calls."""
        readers = _readers(self.ops())
        owner = {position: number for number, block in enumerate(blocks) for position, _ in block.ops}
        for number, block in enumerate(blocks):
            _leave_shared(block, lambda name, own=number: {  # type: ignore[misc]
                owner[at] for at in readers[name] if owner.get(at, own) != own})
        alike: dict[Key, list[_Block]] = defaultdict(list)
        for block in blocks:
            if len(block.ops) > 1:
                alike[self.described(block, readers)].append(block)
        chosen = [group for group in alike.values() if self.pays(group)]
        order = _ordered(list(self.ops()), [block for group in chosen for block in group])
        chosen = [kept for group in chosen if self.pays(kept := [b for b in group if id(b) in order.whole])]
        if not chosen:
            return
        calls = {id(block): call for group in chosen for block, call in self.function(group)}
        items: list[Op | Kernel] = []
        for item in order.items:
            if isinstance(item, Op):
                items.append(item)
            else:
                items += [calls[id(item)]] if id(item) in calls else [op for _, op in item.ops]
        self.items = tuple(items)

    def pays(self, group: Sequence[_Block]) -> bool:
        """Whether one function and calls are less text than what they replace, a call counted by what it hands over."""
        if len(group) < 2:
            return False
        first = group[0]
        call = 1 if self.name == "prepare" else 3 + (len(first.params) + len(first.results)) / 4
        return (len(group) - 1) * len(first.ops) - len(group) * call >= self.least

    def described(self, block: _Block, readers: Mapping[str, list[int]]) -> Key:
        """The structure of a block, without names; its parameters and results are noted on the way."""
        inside = {position for position, _ in block.ops}
        own: dict[Value | Weight, int] = {}
        params: dict[Value | Weight, None] = {}
        results, told = [], []
        for _, op in block.ops:
            inputs: list[Key] = []
            for operand in op.inputs:
                if isinstance(operand, (Value, Weight)):
                    if operand not in own:
                        own[operand] = len(own)
                        params[operand] = None
                    inputs.append((own[operand],))
                else:
                    inputs.append(_typed(operand))
            for result in op.results:
                own[result] = len(own)
                if result.name in self.read_elsewhere or any(at not in inside for at in readers[result.name]):
                    results.append(result)
            attrs = tuple(sorted((name, _typed(value)) for name, value in op.attrs.items()))
            told.append((op.name, len(op.operands), tuple(inputs), attrs, tuple(r.type for r in op.results)))
        block.params, block.results = params, tuple(results)
        return (tuple(told), tuple((own[p], isinstance(p, Weight), p.type) for p in params),
                tuple(own[r] for r in results))

    def function(self, group: Sequence[_Block]) -> Iterator[tuple[_Block, Op]]:
        """Write the function of blocks that are alike, as the first has it; the call for each of them."""
        first, pattern = group[0], _pattern([block.place for block in group])
        name = _free(f"{_stem(pattern)}_{self.name}", self.taken)
        self.taken.add(name)
        own: dict[Operand, Weight] = {}
        names: set[str] = set()
        for param in first.params:
            if isinstance(param, Weight):
                own[param] = Weight(_free(param.name.removeprefix(first.place + "."), names), param.type)
                names.add(own[param].name)
        body = tuple(replace(op, operands=tuple(own.get(o, o) for o in op.operands), of="",
                             reads=tuple(own.get(o, o) for o in op.reads),
                             place=pattern + op.place.removeprefix(first.place)) for _, op in first.ops)
        params = tuple(own.get(param, param) for param in first.params)
        self.functions[name] = Function(name, params, body, first.results)
        for block in group:
            yield block, Op("call", tuple(block.params), block.results, {"function": name}, block.place)


# --- what belongs to a block ---------------------------------------------------------------------------


def _readers(ops: Iterable[Op]) -> dict[str, list[int]]:
    """The positions of the ops that read each value."""
    found: dict[str, list[int]] = defaultdict(list)
    for position, op in enumerate(ops):
        for value in values(op.inputs):
            found[value.name].append(position)
    return found


def _leave_shared(block: _Block, others: Callable[[str], set[int]]) -> None:
    """Take out of a block what it only computes first: equal in all blocks, it was left in one (`eliminate_common`).

    That is a value that several other blocks read, and the few ops that it is made of.
    """
    defined = {result.name: (position, op) for position, op in block.ops for result in op.results}
    shared: set[int] = set()
    for position, op in block.ops:
        if any(len(others(result.name)) > 1 for result in op.results):
            needed, waiting = {position}, [op]
            while waiting and len(needed) <= len(block.ops) // 4:
                for value in values(waiting.pop().inputs):
                    if value.name in defined and defined[value.name][0] not in needed:
                        needed.add(defined[value.name][0])
                        waiting.append(defined[value.name][1])
            shared |= needed if len(needed) <= len(block.ops) // 4 else set()
    block.ops = [(position, op) for position, op in block.ops if position not in shared]


def _read_elsewhere(graph: Graph, name: str) -> set[str]:
    """The values that the other sections read, return or explain."""
    found = {v.name for other, section in graph.sections() if other != name
             for v in (*section.results, *section.saves, *(v for op in section.ops for v in values(op.inputs)))}
    seeds = graph.relevance.params if graph.relevance is not None else ()
    return found | {seed.name.partition(".")[2] for seed in seeds}


def _typed(attr: Attr | Operand) -> Key:
    """1, 1.0 and True are equal in Python, 0.0 and -0.0 too, but not in the IR."""
    if isinstance(attr, tuple):
        return "tuple", *map(_typed, attr)
    return type(attr).__name__, repr(attr) if isinstance(attr, float) else attr


# --- order ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Order:
    items: tuple[Op | _Block, ...]
    whole: frozenset[int]
    """The blocks (by `id`) that stand in one piece."""


def _ordered(ops: Sequence[Op], blocks: Sequence[_Block]) -> _Order:
    """The ops in an order in which each block is in one piece, as close to what it was as dataflow permits.

    A block that something depends on which it depends on itself cannot be in one piece: it is given up.
    """
    blocks = list(blocks)
    while True:
        items, left = _sorted(ops, blocks)
        if not left:
            return _Order(tuple(items), frozenset(map(id, blocks)))
        blocks = [block for block in blocks if block is not left[0]]


def _sorted(ops: Sequence[Op], blocks: Sequence[_Block]) -> tuple[list[Op | _Block], list[_Block]]:
    """Topological order by position; and the blocks that are part of a cycle or behind one, in order."""
    node = list(range(len(ops)))  # the position of the first op of the block, or of the op itself
    block_at = {block.ops[0][0]: block for block in blocks}
    for first, block in block_at.items():
        for position, _ in block.ops:
            node[position] = first
    defined = {result.name: node[position] for position, op in enumerate(ops) for result in op.results}
    before: dict[int, set[int]] = {at: set() for at in node}
    after: dict[int, list[int]] = defaultdict(list)
    for position, op in enumerate(ops):
        for value in values(op.inputs):
            source = defined.get(value.name, node[position])
            if source != node[position] and source not in before[node[position]]:
                before[node[position]].add(source)
                after[source].append(node[position])
    missing = {at: len(sources) for at, sources in before.items()}
    ready = [at for at, count in missing.items() if not count]
    heapify(ready)
    items: list[Op | _Block] = []
    while ready:
        at = heappop(ready)
        del missing[at]
        items.append(block_at.get(at, ops[at]))
        for following in after[at]:
            missing[following] -= 1
            if not missing[following]:
                heappush(ready, following)
    return items, [block_at[at] for at in sorted(missing) if at in block_at]


# --- names and places ----------------------------------------------------------------------------------


def _pattern(places: Sequence[str]) -> str:
    """`model.layers.*` of `model.layers.0`, `model.layers.1`; the last number becomes a star where they have no form
    in common."""
    parts = [place.split(".") for place in places]
    if len({len(part) for part in parts}) > 1:
        return ".".join([*parts[0][:-1], "*"])
    return ".".join(first if len({first, *others}) == 1 else "*" for first, *others in zip(*parts, strict=True))


def _stem(pattern: str) -> str:
    """`layers` of `model.layers.*`."""
    named = [part for part in pattern.split(".") if part != "*" and not part.isdigit()]
    return named[-1] if named else "block"


def _free(name: str, taken: set[str]) -> str:
    number, candidate = 0, name
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def _tidied(graph: Graph, before: Graph) -> Graph:
    """Without pairing with values that are now inside of functions; with the places that are now named."""
    known = {p.name for p in graph.forward.params}
    known |= {r.name for _, section in graph.sections() for op in section.ops for r in op.results}
    for name, section in list(graph.sections()):
        graph = with_section(graph, name, replace(section, body=tuple(
            replace(op, of="") if isinstance(op, Op) and op.of and op.of not in known else op for op in section.body)))
    if not graph.locations:
        return graph
    stated = dict(before.locations)
    for _, section in graph.sections():
        for call in (op for op in section.ops if op.name == "call"):
            stated.setdefault(call.place, Location("Module"))
            for op in graph.functions[str(call.attrs["function"])].body:
                assert isinstance(op, Op)
                own = call.place + _below(op.place, call.place)
                stated.setdefault(op.place, before.locations.get(own, Location("Module")))
    used = {op.place for f in graph.functions.values() for op in Section(body=f.body).ops}
    used |= {op.place for _, section in graph.sections() for op in section.ops}
    return replace(graph, locations={place: at for place, at in stated.items() if place in used})


def _below(place: str, outer: str) -> str:
    """What of `model.layers.*.mlp` is below a place with as many parts as `model.layers.3`."""
    rest = place.split(".")[outer.count(".") + 1:]
    return "." + ".".join(rest) if rest else ""
