"""Which blocks kernels of rows and of pointwise ops get, and which others may be faster.

They read and write memory once, so all depends on how much of it is asked for at a time. By Little's law that is what
programs that run together ask for, against the bandwidth times the time that memory takes to answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from dlbc.backends.triton.choices import BOUNDS, Choice, Options
from dlbc.backends.triton.config import Device

LATENCY = 1e-6
"""Seconds that memory takes to answer when many ask."""
THREADS = 2048
"""Threads of one processor, at most."""
PROGRAMS = 32
"""Programs of one processor, at most."""
NUMBERS = (4, 32)
"""How many numbers of a block a thread has: fewer are not read 16 bytes at a time, more do not fit into registers where
a kernel has several of them."""

_POWERS = tuple(1 << i for i in range(11))


@dataclass(frozen=True)
class Block:
    """Rows and columns that a program writes, and its warps."""

    rows: int
    columns: int
    warps: int

    def options(self) -> Options:
        """As the launch takes it."""
        return {"BM": self.rows, "BN": self.columns, "num_warps": self.warps}


def row_blocks(device: Device, length: int, *, single: bool) -> Choice:
    """The blocks of whole rows of a length; `single`: there is one row."""
    columns = 1 << (length - 1).bit_length()
    own = Block(1 if single else max(1, min(16, 2048 // columns)), columns,
                4 if columns <= 2048 else 8 if columns <= 8192 else 16)
    others = [Block(rows, columns, warps) for rows in ((1,) if single else _POWERS[:7])
              for warps in _POWERS[:6]]
    return _choice(device, own, others, length)


def pointwise_blocks(device: Device, width: int | None, *, single: bool) -> Choice:
    """The blocks of results of a width (None: known when launched only); `single`: there is one row.

    A kernel is written for its own block: one that holds whole rows has no loop over columns, and one that divides rows
    does not look for their end. Others are alike.
    """
    columns = 128 if width is None else min(1 << (width - 1).bit_length(), 256)
    own = Block(1 if single else max(1, 1024 // columns), columns, 4)
    across = [columns]
    if width is None or width > columns:
        across = [each for each in (64, 128, 256, 512, 1024, *((2048, 4096) if single else ()))
                  if width is None or (each < 2 * width and (width % columns != 0 or width % each == 0))]
    others = [Block(rows, each, warps) for each in across for rows in ((1,) if single else _POWERS)
              for warps in _POWERS[:4]]
    return _choice(device, own, others, columns if width is None else width)


def _choice(device: Device, own: Block, others: Sequence[Block], width: int) -> Choice:
    fitting = [each for each in others if NUMBERS[0] <= each.rows * each.columns / (device.warp * each.warps)
               <= NUMBERS[1]]
    return Choice([(None, own.options())], partial(_ordered, device, own, fitting, width))


def _ordered(device: Device, own: Block, others: Sequence[Block], width: int, bound: int | None) -> Iterator[Options]:
    rows = BOUNDS[-1] if bound is None else bound
    for block in sorted(others, key=lambda each: (_seconds(device, each, rows, width), _apart(each, own))):
        yield block.options()


def _seconds(device: Device, block: Block, rows: int, width: int) -> float:
    """To read and to write a float32 number for each result. It orders blocks; it does not tell times."""
    programs = -(-rows // block.rows) * -(-width // block.columns)
    together = device.processors * min(PROGRAMS, THREADS // (device.warp * block.warps))
    asked = 4 * min(rows * width, min(programs, together) * block.rows * block.columns)
    # A processor alone draws at most a few times its share of the memory's bandwidth.
    share = min(1.0, 4 * programs / device.processors, asked / (device.bandwidth * LATENCY))
    return 8 * rows * width / (device.bandwidth * share)


def _apart(one: Block, other: Block) -> float:
    """How many times numbers are doubled or halved from one block to the other."""
    return sum(abs(math.log2(a / b)) for a, b in (
        (one.rows * one.columns, other.rows * other.columns), (one.columns, other.columns), (one.warps, other.warps)))
