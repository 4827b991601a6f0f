"""How large the tiles of an attention region are on which GPU, and how products of float32 numbers are computed.

What limits a tile are registers: what a program holds must fit, or it spills to memory. The tables were found by
compiling the regions of presets with grouped heads, largest tile first, with Triton 3.6.0 and 3.7.1, whose compilers
give a kernel different registers (tests/test_triton_attention.py holds the tables to it for the widths that models have
most). Float32 heads of 128 numbers keep 8 to 24 bytes of a thread in memory under dlb, with every tile that was tried.
Ampere and Ada GPUs share one table, of tiles that fit the least shared memory among them.

Which other tiles may be faster is told from these: those with which a thread holds no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from dlbc.backends.triton.attention_writer import HALVES, padded
from dlbc.backends.triton.choices import BOUNDS, Choice, Options
from dlbc.backends.triton.config import Device
from dlbc.backends.triton.tiles import BYTES
from dlbc.ir.attention_tiles import Kind, Region


@dataclass(frozen=True)
class Shape:
    """Query rows and keys of a tile, warps of a program, tiles in flight.

    `apart`: each result that is summed over rows has a program of its own, which holds less and computes scores again.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    apart: bool = False

    def options(self, exact: str) -> Options:
        """As the launch takes it, with how float32 is multiplied."""
        return {"BLOCK_R": self.rows, "BLOCK_K": self.keys, "PRECISION": exact, "num_warps": self.warps,
                "num_stages": self.stages}


Table = dict[tuple[str, int], Shape]
"""By the element type of queries and keys, and the most numbers in a head."""

_HALVES = {("f16", 256): Shape(16, 16, 4, 1), ("bf16", 256): Shape(16, 32, 4, 1)}

_ROWS: dict[str, Table] = {
    "hopper": {
        ("bf16", 64): Shape(128, 64, 8, 2), ("bf16", 128): Shape(16, 32, 4, 2), ("f16", 64): Shape(128, 32, 8, 2),
        ("f16", 128): Shape(16, 32, 4, 2), ("f32", 64): Shape(64, 32, 8, 2), ("f32", 128): Shape(16, 32, 4, 2),
        ("f32", 256): Shape(16, 16, 4, 1), **_HALVES},
    "ampere": {
        ("bf16", 64): Shape(128, 32, 8, 2), ("bf16", 128): Shape(32, 16, 4, 2), ("f16", 64): Shape(32, 32, 4, 2),
        ("f16", 128): Shape(16, 32, 4, 1), ("f32", 64): Shape(32, 32, 4, 1), ("f32", 128): Shape(16, 32, 4, 2),
        ("f32", 256): Shape(16, 16, 4, 1), **_HALVES},
}

_APART: Table = {
    ("bf16", 256): Shape(16, 16, 8, 1, apart=True), ("f16", 128): Shape(32, 32, 8, 1, apart=True),
    ("f16", 256): Shape(16, 16, 8, 1, apart=True), ("f32", 128): Shape(16, 16, 8, 1, apart=True),
    ("f32", 256): Shape(16, 16, 8, 1, apart=True)}

_KEYS: dict[str, Table] = {
    "hopper": {("bf16", 64): Shape(32, 64, 8, 1), ("bf16", 128): Shape(32, 128, 8, 1, apart=True),
               ("f16", 64): Shape(32, 64, 8, 1, apart=True), ("f32", 64): Shape(16, 64, 4, 1), **_APART},
    "ampere": {("bf16", 64): Shape(32, 32, 8, 2), ("bf16", 128): Shape(32, 32, 8, 1, apart=True),
               ("f16", 64): Shape(32, 32, 8, 1, apart=True), ("f32", 64): Shape(16, 32, 8, 1, apart=True), **_APART},
}

_LIGHT_ROWS: dict[str, Table] = {
    "hopper": {("bf16", 128): Shape(128, 64, 8, 2)},
    "ampere": {("bf16", 128): Shape(64, 32, 4, 2)},
}
_LIGHT_KEYS: dict[str, Table] = {
    "hopper": {("bf16", 64): Shape(32, 128, 8, 1)},
    "ampere": {("bf16", 128): Shape(32, 32, 8, 1)},
}
"""Larger tiles of regions with fewer products (`_light`), where they are known to fit."""


def rows_shape(region: Region, device: Device) -> Shape:
    """The tiles of the program that holds query rows."""
    return _shape(region, _ROWS[_family(device)], _LIGHT_ROWS[_family(device)])


def keys_shape(region: Region, device: Device) -> Shape:
    """The tiles of the program that holds keys."""
    return _shape(region, _KEYS[_family(device)], _LIGHT_KEYS[_family(device)])


def _shape(region: Region, table: Table, light: Table) -> Shape:
    what = _what(region)
    return light[what] if what in light and _light(region) else table[what]


def _light(region: Region) -> bool:
    """Whether a region has no more products than the relevance of a bilinear rule: five."""
    return sum(kind in (Kind.SCORES, Kind.OVER_KEYS, Kind.OVER_ROWS) for kind in region.kinds.values()) <= 5


def attention_tiles(region: Region, device: Device, own: Shape, across: str, exact: str) -> Choice:
    """What the program that holds tiles of rows ("r") or of keys ("k") chooses from, `own` first.

    Others have threads hold no more numbers than it, and fit into shared memory. Programs apart stay apart: other
    results in a program are another kernel.
    """
    sizes, width = (16, 32, 64, 128), _what(region)[1]
    shapes = [Shape(rows, keys, warps, stages, own.apart) for rows in sizes for keys in sizes for warps in (4, 8)
              for stages in range(1, device.stages + 1)]
    fitting = [each for each in shapes if _held(each, width) <= _held(own, width)
               and _shared(region, each, across) <= device.shared]
    return Choice([(None, own.options(exact))], partial(_ordered, region, device, own, fitting, across, exact))


def _ordered(region: Region, device: Device, own: Shape, shapes: list[Shape], across: str, exact: str,
             bound: int | None) -> Iterator[Options]:
    length = BOUNDS[-1] if bound is None else bound

    def order(each: Shape) -> tuple[float, int]:
        return _seconds(region, device, each, across, length), abs(each.stages - own.stages)

    for shape in sorted(shapes, key=order):
        yield shape.options(exact)


def _held(shape: Shape, width: int) -> float:
    """Numbers of a tile of scores, and of one value of its rows and one of its keys, that a warp holds."""
    return (shape.rows * shape.keys + (shape.rows + shape.keys) * width) / shape.warps


def _shared(region: Region, shape: Shape, across: str) -> int:
    """Bytes of what is read: of each value that is held one tile, of each that the program walks over as many as
    stages; and of a tile of scores on its way from one product to the next."""
    sizes = {"r": shape.rows, "k": shape.keys}
    total = 4 * shape.rows * shape.keys
    for name, tile in region.tiles.items():
        if region.kinds[name] is Kind.GIVEN and "d" in tile.axes:
            copies = 1 if across in tile.axes else shape.stages
            total += copies * math.prod(sizes.get(axis, padded(tile.width)) for axis in tile.axes) * BYTES[tile.dtype]
    return total


def _seconds(region: Region, device: Device, shape: Shape, across: str, length: int) -> float:
    """For as many queries as keys, one batch row and one target: waves of programs, each as many steps as there are
    tiles to walk over. It orders tiles; it does not tell times."""
    held, walked = (shape.rows, shape.keys) if across == "r" else (shape.keys, shape.rows)
    programs = (region.heads if across == "r" else region.groups) * -(-length // held)
    together = max(1, 8 // shape.warps)
    waves = -(-programs // (device.processors * together))
    steps = -(-length // walked) * (1 if across == "r" else region.repeats)
    products = sum(kind in (Kind.SCORES, Kind.OVER_KEYS, Kind.OVER_ROWS) for kind in region.kinds.values())
    rate = device.cores / device.processors / together * math.sqrt(min(1.0, held / 64))
    computing = 2 * shape.rows * shape.keys * _what(region)[1] * products / rate
    return waves * steps * (computing + 1e-6 / min(shape.stages, 2))


def precision(asked: str, region: Region, device: Device) -> str:
    """How `tl.dot` multiplies tiles of float32, and of float32 beside float16, for "auto", "ieee", "tf32x3" or "tf32".

    On CUDA "ieee" is three products in tf32, as exact but for the last bits: one without tensor cores would not fit
    into registers. Where queries and keys are halves it is three in bfloat16, which are exact to 16 bits;
    "auto" is the same: one in tf32 takes two thirds of the time, and more registers than the tables leave.
    """
    if device.kind != "cuda":
        return "ieee"
    if asked in ("auto", "ieee"):
        return "tf32x3" if _what(region)[0] == "f32" else "bf16x3"
    return asked


def _family(device: Device) -> str:
    return "hopper" if device.name == "sm_90" else "ampere"


def _what(region: Region) -> tuple[str, int]:
    """The element type in which queries are stored, and the width of the widest head, rounded up."""
    name = region.reads(region.softmaxes[0].result.name)[0].name
    while region.kinds[name] is not Kind.GIVEN:
        name = region.reads(name)[0].name
    dtype = region.tiles[name].dtype
    width = max(padded(tile.width) for tile in region.tiles.values())
    return dtype if dtype in HALVES else "f32", 64 if width <= 64 else 128 if width <= 128 else 256
