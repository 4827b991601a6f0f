"""Functions of single numbers in numpy, and what meets them per channel or pair. Part of `numpy_kernels`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from dlbc_runtime.arrays import Array


def erf(x: Array) -> Array:
    """The error function: to 1e-7 in float32, by polynomials; to the last bits in float64."""
    if x.dtype == np.float64:
        return np.asarray(np.frompyfunc(math.erf, 1, 1)(x), np.float64)
    wide = x.astype(np.float32, copy=False)
    size, square = np.abs(wide), wide * wide
    tail = 1 - np.exp(_horner(np.minimum(size, 4), _ERF_TAIL))
    near = wide * _horner(np.minimum(square, 1), _ERF_NEAR) + wide
    return np.asarray(np.where(size > _ERF_SPLIT, np.copysign(tail, wide), near).astype(x.dtype, copy=False))


_ERF_SPLIT = 0.927734375  # below it erf(x) = x + x P(x^2), above it 1 - exp(Q(x))
_ERF_NEAR = (-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1)
_ERF_TAIL = (-1.72853470e-5, 3.83197126e-4, -3.88396438e-3, 2.42546219e-2, -1.06777877e-1, -6.34846687e-1,
             -1.28717512e-1 - 1.0, 0.0)


def _horner(x: Array, coefficients: Sequence[float]) -> Array:
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total *= x
        total += coefficient
    return total


def sigmoid(x: Array) -> Array:
    """`1 / (1 + exp(-x))`."""
    return np.asarray(1 / (1 + np.exp(-x)))


def log_sigmoid(x: Array) -> Array:
    """`log(sigmoid(x))`."""
    return np.asarray(np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))))


def silu(x: Array) -> Array:
    """`x * sigmoid(x)`."""
    return np.asarray(x / (1 + np.exp(-x)))


def mish(x: Array) -> Array:
    """`x * tanh(softplus(x))`."""
    return np.asarray(x * np.tanh(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))))


def hardsigmoid(x: Array) -> Array:
    """`relu6(x + 3) / 6`."""
    return np.asarray(np.clip(x + 3, 0, 6) / 6)


def hardswish(x: Array) -> Array:
    """`x * relu6(x + 3) / 6`."""
    return np.asarray(x * hardsigmoid(x))


def softsign(x: Array) -> Array:
    """`x / (1 + |x|)`."""
    return np.asarray(x / (1 + np.abs(x)))


def softplus(x: Array, beta: float, threshold: float) -> Array:
    """`log(1 + exp(beta x)) / beta`, x itself where `beta x > threshold`."""
    scaled = x * beta
    soft = (np.maximum(scaled, 0) + np.log1p(np.exp(-np.abs(scaled)))) / beta
    return np.where(scaled > threshold, x, soft)


def elu(x: Array, alpha: float, scale: float, input_scale: float) -> Array:
    """`scale * x` where x > 0, else `scale * alpha * (exp(input_scale x) - 1)`."""
    return np.where(x > 0, x * scale, np.expm1(np.minimum(x, 0) * input_scale) * (alpha * scale))


def gelu(x: Array, approximate: str) -> Array:
    """`x * Phi(x)`, or one of its approximations."""
    if approximate == "quick":
        return np.asarray(x / (1 + np.exp(-1.702 * x)))
    if approximate == "tanh":
        return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x)))))
    return np.asarray(0.5 * x * (1 + erf(x * math.sqrt(0.5))))


_GATES: dict[str, Callable[[Array], Array]] = {
    "silu": silu, "gelu": lambda x: gelu(x, "none"), "gelu_tanh": lambda x: gelu(x, "tanh"),
    "gelu_quick": lambda x: gelu(x, "quick"), "relu": lambda x: np.maximum(x, 0), "sigmoid": sigmoid, "tanh": np.tanh,
}


def glu(gate: Array, up: Array, activation: str) -> Array:
    """`activation(gate) * up`."""
    return np.asarray(_GATES[activation](gate) * up)


def prelu(x: Array, slope: Array) -> Array:
    """`x` where x > 0, else `slope * x`; one slope, or one per channel (axis 1)."""
    return np.where(x > 0, x, channels(slope, x) * x)


def relu_adjoint(r: Array, x: Array) -> Array:
    """r where x > 0, else 0."""
    return np.where(x > 0, r, r.dtype.type(0))


def threshold(x: Array, threshold: float, value: float) -> Array:
    """`x` where larger than the threshold, else `value`; NaN stays NaN."""
    return np.where(x <= threshold, x.dtype.type(value), x)


def damp(m: Array, y: Array, eps: float) -> Array:
    """`m |y| / (|y| + eps)`."""
    size = np.abs(y)
    size /= size + eps
    return m * size


def safe_div(a: Array | float, b: Array | float) -> Array:
    """`a / b`, 0 where b is 0."""
    zero = np.equal(b, 0)
    return np.where(zero, _zero_of(a, b), a / np.where(zero, _one_of(a, b), b))


def _zero_of(a: Array | float, b: Array | float) -> Array:
    return np.zeros((), np.result_type(a, b))


def _one_of(a: Array | float, b: Array | float) -> Array:
    return np.ones((), np.result_type(a, b))


def rotary(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """`x * cos + rotate(x) * sin`; rotate is (-x2, x1) of the two halves, or of each pair."""
    if interleaved:
        turned = np.stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape)
    else:
        half = x.shape[-1] // 2
        turned = np.concatenate((-x[..., half:], x[..., :half]), -1)
    return np.asarray(x * cos + turned * sin)


def channels(numbers: Array, x: Array) -> Array:
    """Numbers per channel in the shape that meets axis 1 of x."""
    return numbers.reshape(-1) if numbers.size == 1 else numbers.reshape(-1, *(1,) * (x.ndim - 2))
