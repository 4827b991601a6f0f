"""How large the tiles of an attention region are on which GPU, and how products of float32 numbers are computed.

What limits a tile are registers: what a program holds must fit, or it spills to memory. The tables were found by
compiling the regions of presets with grouped heads, largest tile first, with Triton 3.6.0 and 3.7.1, whose compilers
give a kernel different registers (tests/test_triton_attention.py holds the tables to it for the widths that models have
most). Float32 heads of 128 numbers keep 8 to 24 bytes of a thread in memory under dlb, with every tile that was tried.
Ampere and Ada GPUs share one table, of tiles that fit the least shared memory among them.
"""

from __future__ import annotations

from dataclasses import dataclass

from dlbc.backends.triton.attention_writer import HALVES, padded
from dlbc.backends.triton.config import Device
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


def precision(asked: str, region: Region, device: Device) -> str:
    """How `tl.dot` multiplies tiles of float32, and of float32 beside float16, for "ieee", "tf32x3" or "tf32".

    On CUDA "ieee" is three products in tf32, as exact but for the last bits: one without tensor cores would not fit
    into registers. Where queries and keys are halves it is three in bfloat16, which are exact to 16 bits.
    """
    if device.kind != "cuda":
        return "ieee"
    if asked == "ieee":
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
