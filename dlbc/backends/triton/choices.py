"""What every kernel chooses when it is launched: a tile, by the size of what it works on.

A tile is what a launch says beside arguments: blocks (`BM`, `BLOCK_R`, ...), warps, stages. Generated code has a table
`<kernel>_tiles` of `(bound, tile)` behind each kernel: the first tile whose bound is no less than the size is taken. An
estimate writes the table, one for each kind of kernel; measuring (`dlbc/tuning.py`) changes it. So what measuring needs
of a kind is here, and the same for all: which tiles may be faster, and which numbers are legal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Options = dict[str, "int | str"]
"""A tile as the launch takes it."""

Table = list[tuple["int | None", Options]]

BOUNDS = (16, 32, 64, 128, 256, 512, 1024, 4096)
"""The sizes up to which a tile is chosen: numbers of rows, of an expert's rows on average, for attention of queries or
of keys. The last is for all beyond."""

CANDIDATES = 8
"""Tiles that are measured for a kernel and a size, at most: those first that the estimate likes best."""

_WARPS = {"num_warps": (1, 32)}
_PRODUCT = {"BM": (16, 1024), "BN": (16, 1024), "BK": (16, 1024), **_WARPS, "num_stages": (1, 16)}

MEASURED: dict[str, Mapping[str, tuple[int, int]]] = {
    "gemm": _PRODUCT,
    "grouped": _PRODUCT,
    "row": {"BM": (1, 64), **_WARPS},
    "elementwise": {"BM": (1, 1024), "BN": (1, 4096), **_WARPS},
    "attention": {"BLOCK_R": (16, 256), "BLOCK_K": (16, 256), **_WARPS, "num_stages": (1, 16)},
}
"""By kind of kernel, what of a tile is measured and kept: the least and the most that each number may be. What else a
tile has (a row's length, how numbers are multiplied) belongs to the kernel."""


@dataclass(frozen=True)
class Choice:
    """A kernel's table before measuring, and what else may be the fastest up to a bound (None: beyond all), best
    first."""

    table: Table
    others: Callable[[int | None], Iterable[Options]]

    def candidates(self, bound: int | None) -> list[Options]:
        """The tiles to measure; the first is that of the table."""
        own = at(self.table, bound)
        return [own, *(each for each in self.others(bound) if each != own)][:CANDIDATES]


def table(chosen: Sequence[Options]) -> Table:
    """One tile for each of `BOUNDS`, with bounds in a row that have the same tile as one."""
    found: Table = []
    for bound, tile in zip(BOUNDS, chosen, strict=True):
        if found and found[-1][1] == tile:
            found.pop()
        found.append((bound, tile))
    return [*found[:-1], (None, found[-1][1])]


def at(tiles: Iterable[tuple[int | None, Options]], bound: int | None) -> Options:
    """The tile that a table has for a bound."""
    return next(tile for most, tile in tiles if most is None or (bound is not None and bound <= most))


def bound_of(size: int) -> int | None:
    """The bound that a size belongs to; None beyond the last but one."""
    return next((bound for bound in BOUNDS[:-1] if size <= bound), None)


def bounds() -> tuple[int | None, ...]:
    """`BOUNDS`, with None for the last."""
    return (*BOUNDS[:-1], None)


def tabled(source: str, tiles: Table, name: str = "KERNEL") -> str:
    """A jit function with its table behind it."""
    return f"{source.rstrip()}\n\n\n{name}_tiles = (\n{lines(tiles)})\n"


def lines(tiles: Table) -> str:
    """The rows of a table as text."""
    return "".join(f"    ({bound}, {json.dumps(tile)}),\n" for bound, tile in tiles)


def legal(name: str, tile: object) -> bool:
    """Whether something that was kept for a kernel is a tile of its kind: it becomes code."""
    limits = MEASURED.get(_kind(name))
    return limits is not None and isinstance(tile, dict) and tile.keys() == limits.keys() and all(
        type(n) is int and limits[part][0] <= n <= limits[part][1] and (part == "num_stages" or n & (n - 1) == 0)
        for part, n in tile.items())


def measured(name: str, tile: Options) -> Options:
    """What of a tile is kept."""
    return {part: tile[part] for part in MEASURED[_kind(name)]}


def _kind(name: str) -> str:
    return name.partition("_")[0]
