"""From level 3 to level 4 for a CPU: what loops can compute becomes functions of loops, as few as can be.

An array library takes a microsecond or two for each op, however small its arrays. So ops that loops have code for are
grouped as far as what stands between them allows: ops that are read, directly or not, by what lies behind the same
number of other ops are one kernel (template `loops`). Large products, convolutions and what else there is no loop for
stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from dlbc.ir.core import Graph, Kernel, Op, Value, Weight
from dlbc.ir.fusible import VIEWS, loops
from dlbc.passes import Pass, register
from dlbc.passes.fuse_groups import Groups, read, rewritten_bodies


@register
@dataclass(frozen=True)
class FuseLoops(Pass):
    """Group ops of the forward and relevance sections, and of functions, into kernels of loops.

    `fewest`: ops, other than views, that are worth a function. `most`: values and weights that one may read or make, of
    which each may be an argument; ctypes passes 1024.
    """

    name: ClassVar[str] = "fuse_loops"
    fewest: int = 2
    most: int = 900

    def run(self, graph: Graph) -> Graph:
        """The graph with kernels."""
        return rewritten_bodies(graph, self._grouped)

    def _grouped(self, items: Sequence[Op | Kernel], escaping: set[str], prefix: str,
                 numbers: Iterator[int]) -> tuple[Op | Kernel, ...]:
        groups = Groups(items, escaping)
        found: list[int] = []
        open_: dict[int, tuple[int, set[Value | Weight]]] = {}  # turn: the group of its loops, and what they touch
        for at, turn in enumerate(_turns(groups)):
            if turn is None:
                continue
            own = {o for o in (*read(items[at]), *items[at].results) if isinstance(o, Value | Weight)}
            group, touched = open_.get(turn, (at, own))
            if group == at or len(touched | own) > self.most:
                found.append(at)
                open_[turn] = at, own
            else:
                groups.join(group, at)
                touched |= own
        kernels: dict[int, Kernel] = {}
        for group in found:
            ops = [op for at in groups.members[group] if isinstance(op := items[at], Op)]
            results = tuple(r for op in ops for r in op.results if groups.seen_outside(r.name, group))
            if results and sum(op.name not in VIEWS and op.name != "full" for op in ops) >= self.fewest:
                kernels[group] = Kernel(f"{prefix}{next(numbers)}", "loops", tuple(ops), results)
        return tuple(groups.ordered(kernels))


def _turns(groups: Groups) -> list[int | None]:
    """For each item of loops the last turn at which it can be computed: before the others that read it, of which each
    has the turn after all that it needs. None for those others."""
    able = [isinstance(item, Op) and loops(item) for item in groups.items]
    earliest: list[int] = []
    for at in range(len(groups.items)):
        earliest.append(max((earliest[before] for before in groups.before[at]), default=0) + (not able[at]))
    latest = [max(earliest, default=0)] * len(able)
    for at in reversed(range(len(groups.items))):
        bounds = [latest[after] if able[after] else earliest[after] - 1 for after in groups.after[at]]
        latest[at] = min(bounds, default=latest[at])
    return [turn if own else None for turn, own in zip(latest, able, strict=True)]
