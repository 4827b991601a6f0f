"""Groups of ops that may become one, in a body that stays without cycles."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush
from typing import TypeAlias

from dlbc.ir.core import Graph, Kernel, Op, Operand, Section, Value, Weight, values
from dlbc.ir.fusible import CHEAP, POINTWISE, factors, fits, is_product, is_row
from dlbc.passes.rewrite import with_section


class Groups:
    """The items of a body, at first each a group of its own (called by its position)."""

    def __init__(self, items: Sequence[Op | Kernel], escaping: set[str]) -> None:
        self.items, self.escaping = items, escaping
        self.of = list(range(len(items)))
        self.members: dict[int, list[int]] = {at: [at] for at in self.of}
        self.definition = {r.name: at for at, item in enumerate(items) for r in results(item)}
        self.readers: dict[str, list[int]] = defaultdict(list)
        self.after: list[set[int]] = [set() for _ in items]
        self.before: list[set[int]] = [set() for _ in items]
        for at, item in enumerate(items):
            for value in dict.fromkeys(values(read(item))):
                self.readers[value.name].append(at)
                source = self.definition.get(value.name)
                if source is not None:
                    self.after[source].add(at)
                    self.before[at].add(source)

    def next(self, group: int) -> Iterator[int]:
        """The groups that read what a group computes."""
        return (self.of[reader] for at in self.members[group] for reader in self.after[at] if self.of[reader] != group)

    def can_join(self, one: int, other: int) -> bool:
        """Whether two groups as one leave the graph without cycles: no way from one to the other leads over a third."""
        return one != other and not self._way_round(one, other) and not self._way_round(other, one)

    def _way_round(self, start: int, end: int) -> bool:
        waiting = [group for group in self.next(start) if group != end]
        known = set(waiting)
        while waiting:
            for group in self.next(waiting.pop()):
                if group == end:
                    return True
                if group not in known:
                    known.add(group)
                    waiting.append(group)
        return False

    def join(self, group: int, other: int) -> None:
        """Make the members of `other` members of `group`."""
        moved = self.members.pop(other)
        self.members[group] = sorted([*self.members[group], *moved])
        for at in moved:
            self.of[at] = group

    def seen_outside(self, name: str, group: int) -> bool:
        """Whether anything outside of a group reads a value."""
        return name in self.escaping or any(self.of[at] != group for at in self.readers[name])

    def pointers(self, members: Sequence[int]) -> int:
        """How many tensors the members read from outside and compute for it."""
        inside = set(members)
        found: set[Value | Weight] = set()
        for at in members:
            item = self.items[at]
            found |= {o for o in read(item) if isinstance(o, Weight) or (
                isinstance(o, Value) and self.definition.get(o.name) not in inside)}
            found |= {r for r in results(item) if r.name in self.escaping or not inside.issuperset(
                self.readers[r.name])}
        return len(found)

    def ordered(self, kernels: Mapping[int, Kernel]) -> list[Op | Kernel]:
        """Kernels, and the ops in none of them, in an order in which everything comes before its readers."""
        owner = [self.of[at] if self.of[at] in kernels else -1 - at for at in range(len(self.items))]
        last: dict[int, int] = {}
        for at, node in enumerate(owner):
            last[node] = at
        missing: dict[int, int] = dict.fromkeys(last, 0)
        edges: dict[int, set[int]] = defaultdict(set)
        for at, node in enumerate(owner):
            for reader in self.after[at]:
                if owner[reader] != node and owner[reader] not in edges[node]:
                    edges[node].add(owner[reader])
                    missing[owner[reader]] += 1
        ready = [(last[node], node) for node, count in missing.items() if not count]
        heapify(ready)
        found: list[Op | Kernel] = []
        while ready:
            _, node = heappop(ready)
            found.append(kernels[node] if node in kernels else self.items[-1 - node])
            for following in edges[node]:
                missing[following] -= 1
                if not missing[following]:
                    heappush(ready, (last[following], following))
        assert len(found) == len(last), "groups depend on each other in a circle"
        return found


Grouping: TypeAlias = "Callable[[Sequence[Op | Kernel], set[str], str, Iterator[int]], tuple[Op | Kernel, ...]]"
"""From the items of a body, the names that are read outside of it, and the first letter and the numbers of its kernels'
names, to the items with kernels."""


def rewritten_bodies(graph: Graph, grouped: Grouping) -> Graph:
    """The forward and relevance sections and the functions with what `grouped` makes of their bodies. Functions that
    are run on blocks of rows (`stream`) stay as they are."""
    numbers = iter(range(10**9))
    for name, section in list(graph.sections()):
        if name == "prepare":
            continue
        escaping = {v.name for other, part in graph.sections() if other != name
                    for v in (*part.results, *(v for op in part.ops for v in values(op.inputs)))}
        escaping |= {v.name for v in (*section.results, *section.saves)}
        graph = with_section(graph, name, replace(section, body=grouped(section.body, escaping, name[0], numbers)))
    bodies = [section.ops for _, section in graph.sections()]
    bodies += [Section(body=function.body).ops for function in graph.functions.values()]
    streamed = {op.attrs["function"] for body in bodies for op in body if op.name == "stream"}
    return replace(graph, functions={
        name: function if name in streamed else replace(
            function, body=grouped(function.body, {v.name for v in function.results}, "b", numbers))
        for name, function in graph.functions.items()})


def read(item: Op | Kernel) -> tuple[Operand, ...]:
    """All that an item reads from outside."""
    if isinstance(item, Op):
        return item.inputs
    inside = {r.name for op in item.body for r in op.results}
    return tuple(o for op in item.body for o in op.inputs if not (isinstance(o, Value) and o.name in inside))


def results(item: Op | Kernel) -> tuple[Value, ...]:
    """What an item computes for others."""
    return item.results


def spread(items: Sequence[Op | Kernel], escaping: set[str], taken: set[str]) -> list[Op | Kernel]:
    """The items with a copy of each cheap op of a value from outside for each of its readers that could be in a kernel.

    So |x| is computed where it is read, from x, and no reader waits for another's.
    """
    found, changed = list(items), True
    while changed:
        changed = False
        inside = {r.name for item in found for r in results(item) if not _is_cheap(item)}
        readers: dict[str, list[int]] = defaultdict(list)
        for at, item in enumerate(found):
            for value in dict.fromkeys(values(read(item))):
                readers[value.name].append(at)
        before: dict[int, list[Op]] = defaultdict(list)  # copies that stand in front of an item
        gone: set[int] = set()
        for at, op in enumerate(found):
            if not isinstance(op, Op) or not _is_cheap(op) or inside & {v.name for v in values(op.operands)}:
                continue
            reading = readers[op.result.name]
            able = [reader for reader in reading if _could_hold(found[reader], op.result)]
            kept = op.result.name in escaping or len(able) < len(reading)
            if not able or (not kept and len(able) < 2):
                continue
            changed = True
            gone |= set() if kept else {at}
            for reader in able:
                copy = Value(_free(f"{op.result.name}.copy", taken), op.result.type)
                before[reader].append(replace(op, results=(copy,)))
                item = found[reader]
                assert isinstance(item, Op)
                found[reader] = replace(item, operands=tuple(copy if o == op.result else o for o in item.operands))
        found = [part for at, item in enumerate(found)
                 for part in (*before[at], *(() if at in gone else (item,)))]
    return found


def _is_cheap(item: Op | Kernel) -> bool:
    return isinstance(item, Op) and item.name in CHEAP and fits(item)


def _could_hold(item: Op | Kernel, value: Value) -> bool:
    """Whether an item could be in a kernel that computes the value itself."""
    if not isinstance(item, Op) or value in item.reads:
        return False
    if is_product(item):
        return value in factors(item)
    return (item.name in POINTWISE and fits(item)) or is_row(item)


def _free(name: str, taken: set[str]) -> str:
    number, candidate = 0, name
    while candidate in taken:
        number += 1
        candidate = f"{name}.{number}"
    taken.add(candidate)
    return candidate


def one_of_each(ops: Sequence[Op], wanted: tuple[Value, ...]) -> tuple[tuple[Op, ...], tuple[Value, ...]]:
    """The ops of a kernel with equal ones once, as far as others do not ask for both."""
    kept: list[Op] = []
    known: dict[object, Op] = {}
    same: dict[Value, Value] = {}
    for op in ops:
        op = replace(op, operands=tuple(same.get(o, o) if isinstance(o, Value) else o for o in op.operands))
        key = (op.name, tuple((type(o), o) for o in op.operands), tuple(sorted(op.attrs.items(), key=str)),
               tuple(r.type for r in op.results))
        if key in known and not any(r in wanted for r in op.results):
            same |= dict(zip(op.results, known[key].results, strict=True))
            continue
        known.setdefault(key, op)
        kept.append(op)
    return tuple(kept), wanted
