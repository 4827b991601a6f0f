"""Functions that generated Triton kernels call: those the language lacks, without libdevice.

Each is as exact near 0 as elsewhere (a few units of the last place of float32). They take and return float32 blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1(x):  # type: ignore[no-untyped-def]
    """`e ** x - 1`: a series where |x| < 0.35, where `exp(x) - 1` would lose digits."""
    series = x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * (0.008333334 + x * (
        0.0013888889 + x * (0.0001984127 + x * 0.0000248016)))))))
    return tl.where(tl.abs(x) < 0.35, series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):  # type: ignore[no-untyped-def]
    """`log(1 + x)`: what rounding took from `1 + x` is put back by the factor x / ((1 + x) - 1)."""
    y = 1.0 + x
    lost = y - 1.0
    small = lost == 0.0
    factor = x / tl.where(small, 1.0, lost)
    return tl.where(small, x, tl.where(y == float("inf"), y, tl.log(y) * factor))


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """Hyperbolic tangent, of `e ** (-2 |x|) - 1`, which keeps its digits near 0."""
    e = expm1(-2.0 * tl.abs(x))
    y = -e / (2.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def sign(x):  # type: ignore[no-untyped-def]
    """-1, 0 or 1."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x * 0.0))


@triton.jit
def log_sigmoid(x):  # type: ignore[no-untyped-def]
    """`log(sigmoid(x))`."""
    return tl.where(x < 0, x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def softplus(x, beta, threshold):  # type: ignore[no-untyped-def]
    """`log(1 + e ** (beta x)) / beta`, x itself where `beta x > threshold`."""
    y = x * beta
    return tl.where(y > threshold, x, log1p(tl.exp(tl.where(y > threshold, 0.0, y))) / beta)


@triton.jit
def mish(x):  # type: ignore[no-untyped-def]
    """`x tanh(softplus(x))`."""
    return x * tanh(softplus(x, 1.0, 20.0))


@triton.jit
def hardsigmoid(x):  # type: ignore[no-untyped-def]
    """`min(max(x + 3, 0), 6) / 6`."""
    y = x + 3.0
    return tl.where(y < 0, 0.0, tl.where(y > 6.0, 6.0, y)) * 0.16666667


@triton.jit
def gelu(x):  # type: ignore[no-untyped-def]
    """`x Phi(x)`."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.70710678))


@triton.jit
def gelu_tanh(x):  # type: ignore[no-untyped-def]
    """The tanh form of gelu."""
    return 0.5 * x * (1.0 + tanh(0.7978845608 * (x + 0.044715 * x * x * x)))


@triton.jit
def gelu_quick(x):  # type: ignore[no-untyped-def]
    """`x sigmoid(1.702 x)`."""
    return x * tl.sigmoid(1.702 * x)


@triton.jit
def safe_div(a, b):  # type: ignore[no-untyped-def]
    """`a / b`, 0 where b is 0."""
    return tl.where(b == 0, 0.0, a / tl.where(b == 0, 1.0, b))
