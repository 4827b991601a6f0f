"""How long an H200 takes at least for bytes and products: the figures behind the floors of LLaMA-3.2-3B in `gpu.py`.

Memory is read and written at its full rate, products run at four fifths of what the card's tensor cores can do.
Launches, synchronisation, and reading a tile more than once are not in it: a floor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

BANDWIDTH = 4.8e12
"""Bytes per second."""

RATES = {"16 bits": 0.8 * 989e12, "tf32": 0.8 * 494e12, "float32": 0.8 * 67e12}
"""Operations per second, by what is multiplied: on tensor cores, the last without."""


@dataclass(frozen=True)
class Step:
    """What one launch reads, writes and multiplies."""

    runs: str
    """What runs it: `triton gemm`, ..., or `torch`."""
    op: str
    place: str
    bytes: int
    products: float = 0.0
    """Seconds of its products."""
    launches: int = 1

    @property
    def seconds(self) -> float:
        """Its floor: whichever takes longer."""
        return max(self.bytes / BANDWIDTH, self.products)


@dataclass(frozen=True)
class Total:
    """All launches of a run together. `seconds`: the sum of their floors."""

    seconds: float
    bytes: int
    products: float
    launches: int

    @staticmethod
    def of(steps: Iterable[Step]) -> Total:
        """The sums."""
        found = list(steps)
        return Total(sum(s.seconds for s in found), sum(s.bytes for s in found), sum(s.products for s in found),
                     sum(s.launches for s in found))
