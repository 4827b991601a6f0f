"""Float32 products with a matrix, by the library that has the faster ones on this processor.

torch multiplies float32 matrices by MKL, which leaves AVX-512 unused on processors that are not Intel's: there oneDNN,
which torch has too, takes half the time. Which of both multiplies depends on the processor and on sizes alone, so that
the same call gives the same bits. Everything else is torch's own product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WORTH = 2**20
"""Products of two numbers from which on oneDNN is the faster one; making its call takes longer than MKL's."""
ROWS = 4
"""Rows from which on it is; for fewer, both only read the matrix."""
CPUINFO = Path("/proc/cpuinfo")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`: x [..., in], weight [out, in]."""
    product = _faster(x, weight, bias)
    if product is None:
        return F.linear(x, weight, bias)
    found: Tensor = product(x.reshape(-1, x.shape[-1]), weight, bias, "none", [], "")
    return found.view(*x.shape[:-1], len(weight))


def matmul(x: Tensor, matrix: Tensor) -> Tensor:
    """`x M`: x [..., in], matrix [in, out]."""
    product = _faster(x, matrix)
    if product is None:
        return torch.matmul(x, matrix)
    found: Tensor = product(x.reshape(-1, x.shape[-1]), matrix.t(), None, "none", [], "")
    return found.view(*x.shape[:-1], matrix.shape[1])


def _faster(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Callable[..., Tensor] | None:
    """oneDNN's product where it is the faster one."""
    rows = x.numel() // max(x.shape[-1], 1)
    if rows < ROWS or rows * matrix.numel() < WORTH or not x.is_cpu or not (
            x.dtype is matrix.dtype is torch.float32 and (bias is None or bias.dtype is torch.float32)):
        return None
    plain = matrix.is_contiguous() or matrix.t().is_contiguous()
    return onednn() if plain and torch.backends.mkldnn.enabled else None


@functools.cache
def onednn() -> Callable[..., Tensor] | None:
    """oneDNN's product of this torch, on a processor where MKL's is slower; else None."""
    libraries: Any = torch.backends
    if not (libraries.mkl.is_available() and libraries.mkldnn.is_available()):
        return None
    if libraries.cpu.get_cpu_capability() != "AVX512" or vendor() in ("", "GenuineIntel"):
        return None
    found: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return found


def vendor() -> str:
    """Who made the processor, as it says itself; "" where that is not known."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
