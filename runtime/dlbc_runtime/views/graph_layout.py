"""A layered layout (Sugiyama, Tagawa and Toda, 1981): items in ranks from the top down, few crossings, straight lines.

Every item has a size and stands in a rank below all that it reads. An edge over several ranks passes each between its
items, where a dummy keeps room for it; edges of one source share their dummies. Positions within a rank are the least
squares that keep their order and distance.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Key: TypeAlias = Hashable
Point: TypeAlias = tuple[float, float]
Wire: TypeAlias = tuple[Key, Key]
"""A wire leads from the item that it starts from, or from a dummy, to the next."""

ACROSS, DOWN, ROOM = 20.0, 26.0, 12.0
SWEEPS = 12


@dataclass(frozen=True)
class Size:
    """How large an item is, and where, from its left edge, wires of a source enter and leave (default: the middle)."""

    width: float
    height: float
    enters: Mapping[Key, float] = field(default_factory=dict)
    leaves: Mapping[Key, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Arc:
    """An edge from `start` to `end`, which carries what `source` gives: arcs of one source share their way."""

    source: Key
    start: Key
    end: Key


@dataclass(frozen=True)
class Layout:
    """Upper left corners of the items, the points that each arc passes, and the size of it all."""

    places: dict[Key, Point]
    ways: dict[Arc, list[Point]]
    width: float
    height: float


def layered(items: Mapping[Key, Size], arcs: Sequence[Arc], first: Sequence[Key] = (), last: Sequence[Key] = ()
            ) -> Layout:
    """Where items stand. `first` and `last` are alone in the top and the bottom rank. The arcs have no cycle."""
    ranks = _ranks(items, arcs, set(first), set(last))
    sizes, wires, chains = dict(items), [], {}
    for arc in arcs:
        chain = [arc.start, *((arc.source, arc.start, rank) for rank in range(ranks[arc.start] + 1, ranks[arc.end])),
                 arc.end]
        for dummy, rank in zip(chain[1:-1], range(ranks[arc.start] + 1, ranks[arc.end]), strict=True):
            sizes.setdefault(dummy, Size(ROOM, 0.0))
            ranks.setdefault(dummy, rank)
        chains[arc] = chain
        wires += [(arc, pair) for pair in itertools.pairwise(chain)]
    rows: list[list[Key]] = [[] for _ in range(max(ranks.values(), default=-1) + 1)]
    for key, rank in ranks.items():
        rows[rank].append(key)
    links = {(pair, _end(sizes, arc, pair[0], leaving=True), _end(sizes, arc, pair[1], leaving=False)): None
             for arc, pair in wires}
    above: dict[Key, list[tuple[Key, float, float]]] = {key: [] for key in sizes}
    below: dict[Key, list[tuple[Key, float, float]]] = {key: [] for key in sizes}
    for (start, end), out, into in links:
        below[start].append((end, out, into))
        above[end].append((start, into, out))
    rows = _ordered(rows, above, below)
    left = _across(rows, sizes, above, below, set(items))
    low = min(left.values(), default=0.0)
    heights = [max((sizes[key].height for key in row), default=0.0) for row in rows]
    tops, y = [], 0.0
    for height, after in zip(heights, [*heights[1:], 0.0], strict=True):
        tops.append(y)
        y += height + (DOWN if height and after else DOWN / 2)
    places = {key: (left[key] - low, tops[rank] + (heights[rank] - sizes[key].height) / 2)
              for rank, row in enumerate(rows) for key in row}
    ways = {arc: _way(arc, chain, sizes, places, ranks, tops, heights) for arc, chain in chains.items()}
    return Layout({key: places[key] for key in items}, ways,
                  max((places[key][0] + sizes[key].width for key in sizes), default=0.0),
                  tops[-1] + heights[-1] if rows else 0.0)


def _ranks(items: Mapping[Key, Size], arcs: Sequence[Arc], first: set[Key], last: set[Key]) -> dict[Key, int]:
    """The longest way from the top; what nothing leads to stands right above its first reader."""
    import networkx

    graph = networkx.DiGraph()
    graph.add_nodes_from(items)
    graph.add_edges_from((arc.start, arc.end) for arc in arcs)
    ranks: dict[Key, int] = {}
    order = list(networkx.lexicographical_topological_sort(graph, key=list(items).index))
    for key in order:
        ranks[key] = max((ranks[one] + 1 for one in graph.predecessors(key)), default=int(bool(first)))
        if key in first:
            ranks[key] = 0
    for key in reversed(order):
        if not graph.in_degree(key) and graph.out_degree(key) and key not in first:
            ranks[key] = min(ranks[one] for one in graph.successors(key)) - 1
    bottom = max((rank for key, rank in ranks.items() if key not in last), default=-1) + 1
    return {key: bottom if key in last else rank for key, rank in ranks.items()}


def _end(sizes: Mapping[Key, Size], arc: Arc, key: Key, *, leaving: bool) -> float:
    size = sizes[key]
    return (size.leaves if leaving else size.enters).get(arc.source, size.width / 2)


Neighbours: TypeAlias = Mapping[Key, list[tuple[Key, float, float]]]


def _ordered(rows: list[list[Key]], above: Neighbours, below: Neighbours) -> list[list[Key]]:
    """Each rank by the mean place of what it is linked to, up and down in turn; the order with the fewest crossings."""
    best, fewest = rows, _crossings(rows, below)
    for sweep in range(SWEEPS):
        if not fewest:
            break
        rows, links = [list(row) for row in rows], below if sweep % 2 else above
        for rank in reversed(range(len(rows))) if sweep % 2 else range(len(rows)):
            near = rank + (1 if sweep % 2 else -1)
            if 0 <= near < len(rows):
                at = {key: place for place, key in enumerate(rows[near])}
                rows[rank].sort(key=_mean_place(links, at, {key: i for i, key in enumerate(rows[rank])}))
        if (count := _crossings(rows, below)) < fewest:
            best, fewest = rows, count
    return best


def _mean_place(links: Neighbours, at: Mapping[Key, int], own: Mapping[Key, int]) -> Callable[[Key], float]:
    def mean(key: Key) -> float:
        found = [at[one] for one, _, _ in links[key] if one in at]
        return sum(found) / len(found) if found else own[key]
    return mean


def _crossings(rows: Sequence[Sequence[Key]], below: Neighbours) -> int:
    count = 0
    for row, under in itertools.pairwise(rows):
        at = {key: place for place, key in enumerate(under)}
        pairs = [(i, at[end]) for i, key in enumerate(row) for end, _, _ in below[key]]
        count += sum((a < c and b > d) or (a > c and b < d) for n, (a, b) in enumerate(pairs) for c, d in pairs[:n])
    return count


def _across(rows: Sequence[Sequence[Key]], sizes: Mapping[Key, Size], above: Neighbours, below: Neighbours,
            real: set[Key]) -> dict[Key, float]:
    """Left edges: each item as near below, or above, its neighbours as the others leave it room."""
    left: dict[Key, float] = {}
    for row in rows:
        x = -sum(sizes[key].width + ACROSS for key in row) / 2
        for key in row:
            left[key], x = x, x + sizes[key].width + ACROSS
    for sweep in range(SWEEPS):
        for row in reversed(rows) if sweep % 2 else rows:
            wanted, weights = [], []
            for key in row:
                links = [*above[key], *below[key]] if sweep > SWEEPS // 2 else (below if sweep % 2 else above)[key]
                ideal = [left[one] + theirs - own for one, own, theirs in links]
                wanted.append(sum(ideal) / len(ideal) if ideal else left[key])
                weights.append((1.0 if key in real else 4.0) if ideal else 0.1)
            for key, x in zip(row, _apart(wanted, weights, [sizes[key].width + ACROSS for key in row]), strict=True):
                left[key] = x
    return left


def _apart(wanted: Sequence[float], weights: Sequence[float], widths: Sequence[float]) -> list[float]:
    """The places nearest to the wanted ones, by weighted squares, at which each is its width left of the next."""
    offsets = [sum(widths[:i]) for i in range(len(widths))]
    blocks: list[tuple[float, float, int]] = []  # mean, weight, how many: pooled until they ascend
    for want, weight, offset in zip(wanted, weights, offsets, strict=True):
        mean, heavy, count = want - offset, weight, 1
        while blocks and blocks[-1][0] > mean:
            other, other_weight, other_count = blocks.pop()
            mean = (mean * heavy + other * other_weight) / (heavy + other_weight)
            heavy, count = heavy + other_weight, count + other_count
        blocks.append((mean, heavy, count))
    pooled = [mean for mean, _, count in blocks for _ in range(count)]
    return [mean + offset for mean, offset in zip(pooled, offsets, strict=True)]


def _way(arc: Arc, chain: Sequence[Key], sizes: Mapping[Key, Size], places: Mapping[Key, Point],
         ranks: Mapping[Key, int], tops: Sequence[float], heights: Sequence[float]) -> list[Point]:
    """From the lower edge of the first item to the upper edge of the last, straight down through each rank between."""
    start, end = chain[0], chain[-1]
    way = [(places[start][0] + _end(sizes, arc, start, leaving=True), places[start][1] + sizes[start].height)]
    for dummy in chain[1:-1]:
        x, rank = places[dummy][0] + sizes[dummy].width / 2, ranks[dummy]
        way += [(x, tops[rank]), (x, tops[rank] + heights[rank])]
    return [*way, (places[end][0] + _end(sizes, arc, end, leaving=False), places[end][1])]
