"""Checkpoint: less is kept of the forward pass, and relevance computes it again, block by block, where it reads it.

The forward section is cut where little lives: between the layers of a transformer that is the residual stream, in a
CNN the narrow maps. What lives at the cuts is kept. Of the rest, what relevance reads is computed again from the cut
before it, just before its first use; so at any time only one block is held in full. The last block, which relevance
reads first, is kept as it is. The ops are the same on the same numbers: so are the results.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from dlbc.ir.core import Graph, Kernel, Op, Operand, Section, Value, values
from dlbc.ir.dims import Sym, evaluate, product, symbols
from dlbc.passes import Pass, register
from dlbc.passes.rewrite import names, substitute_op, with_saves

if TYPE_CHECKING:
    import numpy as np

_BYTES = {"f64": 8, "i64": 8, "f16": 2, "bf16": 2, "i16": 2, "i8": 1, "u8": 1, "bool": 1}
_FEW = frozenset({"S", "P", "K"})  # targets and explained positions
_CUTS = 400
"""Places considered for cuts: those where least lives."""


@register
@dataclass(frozen=True)
class Checkpoint(Pass):
    """Keep what lives at cuts of the forward section; compute the rest of what relevance reads again.

    Cuts are chosen so that what is kept, and the most that one block computes again, take the least together, at
    `length` for each size that is not fixed; or after `every` so many ops, whatever that costs. For lowered graphs
    (level 3) without functions in their forward section; others stay as they are.
    """

    name: ClassVar[str] = "checkpoint"
    length: int = 128
    every: int = 0

    def run(self, graph: Graph) -> Graph:
        """The graph with a forward section that keeps less and a relevance section that computes more."""
        relevance = graph.relevance
        plain = not any(isinstance(item, Kernel) or item.name in ("call", "stream")
                        for item in graph.forward.body) and relevance is not None
        if relevance is None or not plain or any(op.name.startswith("rel.") for op in relevance.ops):
            return graph
        ops = list(graph.forward.ops)
        read = _read(graph)
        sizes = Sizes(graph, self.length)
        cuts = list(range(self.every - 1, len(ops) - 1, self.every)) if self.every else _cuts(ops, read, sizes)
        if not cuts:
            return graph
        again = Again(ops, _kept(ops, cuts, graph.forward), cuts[-1], names(graph))
        return with_saves(replace(graph, relevance=replace(relevance, body=tuple(again.body(relevance.ops)))))


@dataclass
class Again:
    """The forward ops that are written again into the relevance section: all up to `last` but what is `kept`.

    `near`: at the place of the op that reads them first, not at their own.
    """

    ops: list[Op]
    kept: Collection[str]
    last: int
    taken: set[str]
    near: bool = False

    def __post_init__(self) -> None:
        # Values of the last block stay, whoever reads them.
        self.definitions = {r.name: op for op in self.ops[:self.last + 1] for r in op.results}
        self.replaced: dict[str, Operand] = {}

    def body(self, ops: Iterable[Op]) -> Iterator[Op]:
        """Relevance, with what it reads computed before its first use."""
        for op in ops:
            for value in values(op.inputs):
                for again in self.computed(value.name):
                    yield replace(again, place=op.place) if self.near else again
            yield replace(substitute_op(replace(op, of=""), self.replaced), of=op.of)

    def computed(self, name: str) -> Iterator[Op]:
        """The ops that give a value again, from values that are kept; none where it is there."""
        pending: list[tuple[str, bool]] = [(name, False)]
        while pending:
            current, ready = pending.pop()
            if current in self.kept or current in self.replaced or current not in self.definitions:
                continue
            op = self.definitions[current]
            if not ready:
                pending.append((current, True))
                pending += [(v.name, False) for v in reversed(list(values(op.inputs)))]
                continue
            results = tuple(Value(self.fresh(r.name), r.type) for r in op.results)
            yield replace(substitute_op(op, self.replaced), results=results)
            self.replaced |= {old.name: new for old, new in zip(op.results, results, strict=True)}

    def fresh(self, name: str) -> str:
        """A name that is not taken."""
        found, number = f"{name}.again", 1
        while found in self.taken:
            found, number = f"{name}.again.{number}", number + 1
        self.taken.add(found)
        return found


class Sizes:
    """Bytes of values at sizes that stand for all: `length`, and 1 for those that are `few`."""

    def __init__(self, graph: Graph, length: int, few: Collection[str] = _FEW) -> None:
        self.length, self.known = length, {
            name: min(max(1 if name in few else length, low), high) for name, (low, high) in graph.dims.items()}

    def __call__(self, value: Value) -> int:
        """The bytes of a value."""
        count = product(value.type.shape)
        missing = (symbols(count) if isinstance(count, Sym) else set()) - set(self.known)
        sizes: Mapping[str, int] = {**self.known, **dict.fromkeys(missing, self.length)}
        return max(evaluate(count, sizes), 0) * _BYTES.get(value.type.dtype, 4)


def _read(graph: Graph) -> set[str]:
    """The forward values that relevance reads."""
    own = {r.name for op in graph.forward.ops for r in op.results}
    assert graph.relevance is not None
    return {v.name for op in graph.relevance.ops for v in values(op.inputs) if v.name in own}


def _cuts(ops: list[Op], read: set[str], sizes: Sizes) -> list[int]:
    """The ops after which to cut: with what is kept there, and the largest block, as small as can be."""
    import numpy as np  # here: dlbc-opt starts without it

    count = len(ops)
    bytes_of = {r.name: sizes(r) for op in ops for r in op.results}
    made = {r.name: number for number, op in enumerate(ops) for r in op.results}
    last = {v.name: number for number, op in enumerate(ops) for v in values(op.inputs)}
    at = np.array([made[name] for name in bytes_of], np.int64)
    until = np.array([last.get(name, -1) for name in bytes_of], np.int64)
    size = np.array(list(bytes_of.values()), np.int64)
    saved = size * np.array([name in read for name in bytes_of], np.int64)

    def summed(chosen: np.ndarray) -> np.ndarray:
        """What is made up to each op (0: none), of these bytes."""
        found = np.zeros(count + 1, np.int64)
        np.add.at(found, at + 1, chosen)
        return found.cumsum()

    living = np.array([int(size[(at <= number) & (until > number)].sum()) for number in range(count)])
    places = sorted(sorted(range(count - 1), key=lambda number: int(living[number]))[:_CUTS])
    stops = [*places, count - 1]
    starts = np.array([-1, *places])
    kept, inner = [], []
    for stop in stops:
        through = until > stop
        one, other = summed(np.where(through, size, 0)), summed(np.where(through, 0, saved))
        before = starts[starts < stop]
        kept.append(one[stop + 1] - one[before + 1])
        inner.append(other[stop + 1] - other[before + 1])
    whole = int(saved.sum())
    best: tuple[int, list[int]] = (whole, [])
    for share in range(1, 17):
        found = _within(stops, kept, inner, whole / 1.5**share)
        if found is not None and found[0] < best[0]:
            best = found
    return best[1]


def _within(stops: list[int], kept: list[np.ndarray], inner: list[np.ndarray], limit: float
            ) -> tuple[int, list[int]] | None:
    """The cuts that keep least while no block has more than `limit` besides; with the bytes of both."""
    import numpy as np

    cost = np.full(len(stops) + 1, np.inf)
    largest, before = np.zeros(len(stops) + 1), np.zeros(len(stops) + 1, np.int64)
    cost[0] = 0
    for number in range(len(stops)):
        reach = len(inner[number])
        total = np.where(inner[number] <= limit, cost[:reach] + kept[number], np.inf)
        chosen = int(total.argmin())
        cost[number + 1], before[number + 1] = total[chosen], chosen
        largest[number + 1] = max(largest[chosen], inner[number][chosen])
    if not np.isfinite(cost[-1]):
        return None
    path, number = [], int(before[-1])
    while number:
        path.append(stops[number - 1])
        number = int(before[number])
    return int(cost[-1] + largest[-1]), path[::-1]


def _kept(ops: list[Op], cuts: list[int], forward: Section) -> set[str]:
    """What lives at any cut, and what is returned."""
    made = {r.name: number for number, op in enumerate(ops) for r in op.results}
    last = {v.name: number for number, op in enumerate(ops) for v in values(op.inputs)}
    return {v.name for v in forward.results} | {
        name for name, number in made.items() if any(number <= cut < last.get(name, -1) for cut in cuts)}
