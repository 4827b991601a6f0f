"""Which tiles a product gets: a short list, and the least estimated time by number of rows.

The estimate counts waves of programs, bytes read and products on one architecture. It orders tiles; it does not tell
times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from dlbc.backends.triton.choices import BOUNDS, Choice, Options, table
from dlbc.backends.triton.config import Device

BYTES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1, "bool": 1}


@dataclass(frozen=True)
class Tile:
    """A block of results, the depth of one step, and how many warps compute it."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self) -> Options:
        """As the launch takes it."""
        return {"BM": self.rows, "BN": self.columns, "BK": self.depth, "num_warps": self.warps,
                "num_stages": self.stages}


@dataclass(frozen=True)
class Product:
    """What a kernel multiplies: results per row, depth, accumulators, products of tiles in a step, the bytes read for
    one row and for one column at one depth, and whether tensor cores compute."""

    columns: int
    depth: int
    accumulators: int
    dots: int
    left: int
    right: int
    cores: bool
    operands: int = 0
    """Values of one number for each result that are read after the products."""
    groups: int = 1
    """Matrices that each have rows of their own: tiles are for the rows of one."""
    held: float = 0.0
    """Numbers that a thread keeps for each number of an operand it multiplies, where operands go through registers:
    what is made of it (|x|), or its parts (a float32 number as two of 16 bits). 0: from shared memory as they are."""


SHAPES = ((16, 32, 64, 4), (16, 64, 32, 4), (16, 64, 64, 4), (16, 128, 64, 4), (32, 32, 64, 4), (32, 64, 32, 4),
          (32, 64, 64, 4), (64, 32, 64, 4),
          (64, 64, 32, 4), (64, 64, 32, 8), (64, 64, 64, 4), (64, 128, 32, 4), (64, 128, 64, 4), (64, 128, 64, 8),
          (128, 64, 32, 4), (128, 64, 64, 4), (128, 128, 32, 8), (128, 128, 64, 8))
"""Rows, columns, depth and warps."""

SHALLOW = ((16, 64, 16, 4), (32, 64, 16, 4), (64, 64, 16, 4), (64, 128, 16, 8), (64, 128, 32, 8),
           (128, 64, 16, 8))
"""The same, where threads hold operands: less of them in a step."""

REGISTERS = 112
"""Numbers of a block that a thread can hold without keeping some in memory, as compiling showed (sm_80 to sm_90)."""

OPERANDS = {True: 200, False: 224}
"""The same for the block and what is multiplied in one step, with tensor cores and without."""


def product_tiles(device: Device, what: Product) -> Choice:
    """The tiles by number of rows, and others.

    A kernel is written for its tiles: where all of them divide its columns (or its depth), it does not look whether
    there is an end inside of a block. So others have to divide them too.
    """
    fitting = _fitting(device, what)
    chosen = [min(fitting, key=lambda tile: _order(device, what, tile, bound)) for bound in BOUNDS]
    columns = all(what.columns % tile.columns == 0 for tile in chosen)
    depth = all(what.depth % tile.depth == 0 for tile in chosen)
    alike = [tile for tile in fitting if not (columns and what.columns % tile.columns) and not (
        depth and what.depth % tile.depth)]
    return Choice(table([tile.options() for tile in chosen]), partial(_ordered, device, what, alike))


def _ordered(device: Device, what: Product, found: list[Tile], bound: int | None) -> Iterator[Options]:
    rows = BOUNDS[-1] if bound is None else bound
    for tile in sorted(found, key=lambda tile: _order(device, what, tile, rows)):
        yield tile.options()


def _fitting(device: Device, what: Product) -> list[Tile]:
    shapes = (*SHAPES, *(SHALLOW if what.held else ()))
    return [tile for shape in shapes if (tile := _staged(device, what, *shape)) is not None]


def _order(device: Device, what: Product, tile: Tile, rows: int) -> tuple[float, int]:
    return _seconds(device, what, tile, rows), -tile.rows * tile.columns


def _staged(device: Device, what: Product, rows: int, columns: int, depth: int, warps: int) -> Tile | None:
    """The tile with as many steps in flight as shared memory holds; None where it holds none, or registers do not."""
    # What a thread holds of a block: accumulators, and beside them what they are combined with, as it arrives.
    threads = warps * device.warp
    results = rows * columns // threads
    registers = results * (what.accumulators + min(2, what.operands))
    if what.held and not (what.cores and device.hopper and rows >= 64):
        if results * what.accumulators + _operands(what, rows, columns, depth, warps) > OPERANDS[what.cores]:
            return None
    elif min(what.left, what.right) >= 4:  # float32 by float32: through registers, in parts for tensor cores
        copies = max(1, int(what.held) // 2)
        registers += 3 * depth * copies * (rows * what.left + columns * what.right) // (8 * threads)
    if registers > REGISTERS:
        return None
    if (rows > 16 and columns > 4 * max(16, what.columns)) or depth > 2 * max(16, what.depth):
        return None
    step = depth * (rows * what.left + columns * what.right)
    stages = min(device.stages, device.shared * 3 // 4 // step, max(1, -(-what.depth // depth)))
    return Tile(rows, columns, depth, warps, stages) if stages >= 1 else None


def _operands(what: Product, rows: int, columns: int, depth: int, warps: int) -> float:
    """Numbers of operands that a thread holds in one step: those of its own rows and columns, which threads share.

    Tensor cores take 16 rows by 8 columns from a warp, the block is cut among warps as Triton does. Without them a
    thread has 4 columns, and as many rows as its part of the block gives it.
    """
    if not what.cores:
        return what.held * depth * (max(1, rows * columns // (128 * warps)) + 4)
    down = across = 1
    while down * across < warps:
        if rows // (16 * down) >= columns // (16 * across) and down < rows // 16:
            down *= 2
        else:
            across *= 2
    return what.held * depth * (rows // down + columns // across) / 32


def _seconds(device: Device, what: Product, tile: Tile, rows: int) -> float:
    programs = what.groups * -(-rows // tile.rows) * -(-what.columns // tile.columns)
    waves = -(-programs // device.processors)
    together = min(programs, device.processors)
    read = what.depth * (tile.rows * what.left + tile.columns * what.right)
    rate = (device.cores if what.cores else device.plain) / device.processors
    # A program alone draws at most a few times its share of the memory's bandwidth.
    reading = read * waves / (device.bandwidth * min(1.0, 4 * together / device.processors) / together)
    steps = -(-what.depth // tile.depth)
    computing = 2 * tile.rows * tile.columns * what.depth * what.dots / rate * (1.0 if tile.rows >= 64 else 1.5)
    return max(reading, waves * computing) + waves * steps * 4e-8
