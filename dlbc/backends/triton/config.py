"""What is known about each GPU that kernels are written for, and how fast it is.

Memory is per program, the rest per card. What tiles a kernel gets from these numbers is in `tiles.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from dlbc.errors import InputError


@dataclass(frozen=True)
class Device:
    """A GPU architecture."""

    name: str
    """`sm_90`, or `gfx942`."""
    kind: str
    """`cuda` or `hip`, as Triton calls it."""
    arch: int | str
    """As Triton's GPUTarget takes it."""
    warp: int
    """Threads of a warp."""
    shared: int
    """Bytes of shared memory that one program may use."""
    processors: int
    """Streaming multiprocessors of the usual card."""
    stages: int
    """How many tiles of a product are in flight, at most."""
    bandwidth: float
    """Bytes per second from memory, of the usual card."""
    cores: float
    """Operations per second of its tensor cores on 16-bit numbers."""
    plain: float
    """Operations per second on float32 without them."""

    @property
    def hopper(self) -> bool:
        """Whether blocks of 64 rows and more are multiplied from shared memory, by four warps together."""
        return self.kind == "cuda" and self.arch == 90


DEVICES = {device.name: device for device in (
    Device("sm_80", "cuda", 80, 32, 166_912, 108, 3, 1.6e12, 312e12, 19e12),
    Device("sm_86", "cuda", 86, 32, 101_376, 82, 2, 0.94e12, 142e12, 36e12),
    Device("sm_89", "cuda", 89, 32, 101_376, 128, 2, 1.0e12, 330e12, 83e12),
    Device("sm_90", "cuda", 90, 32, 232_448, 132, 3, 4.8e12, 989e12, 67e12),
    Device("gfx942", "hip", "gfx942", 64, 65_536, 304, 2, 5.3e12, 1300e12, 163e12),
)}
"""The architectures that kernels are written and checked for; gfx942 is only compiled, never run."""


def device(name: str) -> Device:
    """The architecture of that name. InputError where there is none."""
    if name not in DEVICES:
        raise InputError(f"kernels cannot be written for `{name}`", where="target",
                         hint=f"there are {', '.join(DEVICES)}; backend=\"torch\" runs on anything torch runs on")
    return DEVICES[name]
