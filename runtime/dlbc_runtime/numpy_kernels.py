"""What generated numpy code calls where one line of numpy is not enough. No torch here.

Element types are kept: a float32 array stays float32 (Python numbers do not widen it). float16 is
computed in float32 where numpy has no fast or exact way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from dlbc_runtime import interpolation, streams
from dlbc_runtime.numpy_experts import (  # noqa: F401  generated code calls them
    combine,
    expert_linear,
    expert_order,
    grouped_linear,
    route_topk,
)
from dlbc_runtime.numpy_recurrent import gru, lstm, recurrence_adjoint, rnn  # noqa: F401  generated code calls them

Array: TypeAlias = "NDArray[Any]"


# --- elementwise -------------------------------------------------------------------------------------

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
    return np.where(x > 0, x, _channels(slope, x) * x)


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


# --- reductions and scans ----------------------------------------------------------------------------

def softmax(x: Array, dim: int) -> Array:
    """`exp(x) / sum(exp(x))` along an axis."""
    raised = np.exp(x - x.max(axis=dim, keepdims=True))
    return np.asarray(raised / raised.sum(axis=dim, keepdims=True))


def log_softmax(x: Array, dim: int) -> Array:
    """`log(softmax(x))` along an axis."""
    lowered = x - x.max(axis=dim, keepdims=True)
    return np.asarray(lowered - np.log(np.exp(lowered).sum(axis=dim, keepdims=True)))


def logsumexp(x: Array, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Array:
    """`log(sum(exp(x)))` over axes."""
    top = x.max(axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0).astype(x.dtype)
    total = np.log(np.exp(x - top).sum(axis=axis, keepdims=True)) + top
    return np.asarray(total if keepdims else total.squeeze(axis))


def sort(x: Array, dim: int, descending: bool) -> tuple[Array, Array]:
    """Sorted along an axis, and the indices that sort; equal elements keep their order."""
    if descending:
        order = np.flip(x.shape[dim] - 1 - np.argsort(np.flip(x, dim), axis=dim, kind="stable"), dim)
    else:
        order = np.argsort(x, axis=dim, kind="stable")
    return np.take_along_axis(x, order, axis=dim), order


def topk(x: Array, k: int, dim: int, largest: bool) -> tuple[Array, Array]:
    """The k largest (or smallest) along an axis in order, and their indices."""
    _, order = sort(x, dim, largest)
    first = np.take(order, np.arange(k), axis=dim)
    return np.take_along_axis(x, first, axis=dim), first


def max_with_index(x: Array, dim: int, keepdim: bool) -> tuple[Array, Array]:
    """The largest along an axis, and its first index."""
    return np.max(x, axis=dim, keepdims=keepdim), np.argmax(x, axis=dim, keepdims=keepdim)


def min_with_index(x: Array, dim: int, keepdim: bool) -> tuple[Array, Array]:
    """The smallest along an axis, and its first index."""
    return np.min(x, axis=dim, keepdims=keepdim), np.argmin(x, axis=dim, keepdims=keepdim)


# --- linear maps -------------------------------------------------------------------------------------

def matmul(a: Array, b: Array) -> Array:
    """Matrix product over the last two axes; by one matrix in one product."""
    if a.dtype == np.float16:
        return matmul(a.astype(np.float32), b.astype(np.float32)).astype(np.float16)
    if b.ndim == 2 and a.ndim > 2:
        return (a.reshape(-1, a.shape[-1]) @ b).reshape(*a.shape[:-1], b.shape[1])
    return np.asarray(_strided(a) @ _strided(b))


def _strided(x: Array) -> Array:
    """x, copied where its strides would keep numpy from calling BLAS."""
    return x if x.itemsize in x.strides[-2:] else np.ascontiguousarray(x)


def linear_rows(x: Array, rows: Array, bias: Array | None = None) -> Array:
    """`sum_d x[..., d] rows[..., k, d] + bias[..., k]`."""
    y: Array = np.matmul(rows, x[..., None])[..., 0]
    return y if bias is None else y + bias


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """`x @ weight.T + bias` over the last axis."""
    rows = matmul(x.reshape(-1, x.shape[-1]), weight.T)
    if bias is not None:
        rows += bias
    return rows.reshape(*x.shape[:-1], weight.shape[0])


def conv(x: Array, weight: Array, bias: Array | None, *, stride: Sequence[int], padding: Sequence[int],
         dilation: Sequence[int], groups: int) -> Array:
    """Convolution: x [B, C, ...], weight [out, C / groups, ...]; windows as columns of one product."""
    rank = weight.ndim - 2
    batch, out = x.shape[0], weight.shape[0]
    windows = _windows(_padded(x, padding, 0), weight.shape[2:], stride, dilation)
    size = windows.shape[2:2 + rank]
    order = (0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank))  # batch, channel, kernel, place
    columns = windows.transpose(order).reshape(batch, groups, -1, math.prod(size))
    y = matmul(weight.reshape(groups, out // groups, -1), columns).reshape(batch, out, *size)
    return y if bias is None else y + _channels(bias, y)


def conv_transpose(x: Array, weight: Array, bias: Array | None, *, stride: Sequence[int], padding: Sequence[int],
                   output_padding: Sequence[int], dilation: Sequence[int], groups: int) -> Array:
    """Transposed convolution: x [B, C, ...], weight [C, out / groups, ...]."""
    kernel, batch, size = weight.shape[2:], x.shape[0], x.shape[2:]
    out = weight.shape[1]
    parts = x.reshape(batch, groups, -1, math.prod(size))
    rows = weight.reshape(groups, weight.shape[0] // groups, -1).swapaxes(1, 2)
    columns = matmul(rows, parts).reshape(batch, groups * out, *kernel, *size)
    whole = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(size, stride, dilation, kernel, strict=True)]
    final = [n - 2 * p + o for n, p, o in zip(whole, padding, output_padding, strict=True)]
    y = np.zeros((batch, groups * out, *(max(n, f + p) for n, f, p in zip(whole, final, padding, strict=True))),
                 x.dtype)
    for at in product(*map(range, kernel)):
        y[_last(_places(at, size, stride, dilation))] += columns[_from(2, *at)]
    y = np.asarray(y[_last([slice(p, p + f) for p, f in zip(padding, final, strict=True)])])
    return y if bias is None else y + _channels(bias, y)


def _channels(numbers: Array, x: Array) -> Array:
    """Numbers per channel in the shape that meets axis 1 of x."""
    return numbers.reshape(-1) if numbers.size == 1 else numbers.reshape(-1, *(1,) * (x.ndim - 2))


def _padded(x: Array, padding: Sequence[int], value: float, behind: Sequence[int] | None = None) -> Array:
    """x with its last axes padded on both sides."""
    if not any(padding) and not any(behind or ()):
        return x
    pairs = [(0, 0)] * (x.ndim - len(padding)) + list(zip(padding, behind or padding, strict=True))
    return np.pad(x, pairs, constant_values=value)


def _windows(x: Array, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Array:
    """Windows over the last axes: [..., *places, *kernel], a view."""
    rank = len(kernel)
    spans = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    view = sliding_window_view(x, spans, tuple(range(-rank, 0)))
    return np.asarray(view[_last([slice(None, None, step) for step in (*stride, *dilation)])])


def _places(at: Sequence[int], count: Sequence[int], stride: Sequence[int],
            dilation: Sequence[int]) -> tuple[slice, ...]:
    """Where the element `at` of each window lies, per axis."""
    return tuple(slice(a * d, a * d + (n - 1) * s + 1, s)
                 for a, n, s, d in zip(at, count, stride, dilation, strict=True))


def _last(places: Sequence[slice | int]) -> tuple[Any, ...]:
    """The index that puts `places` at the last axes."""
    return (..., *places)


def _from(dim: int, *places: Any) -> tuple[Any, ...]:
    """The index that puts `places` at axis `dim` and those after it."""
    return (*(slice(None),) * dim, *places)


# --- pooling -----------------------------------------------------------------------------------------

def _window_matrix(start: Array, end: Array, size: int, divisor: Array, dtype: Any) -> Array:
    """Row i holds 1 / divisor[i] from start[i] to end[i]."""
    at = np.arange(size)
    inside = (at >= start[:, None]) & (at < end[:, None])
    return (inside / divisor[:, None]).astype(dtype)


def _mean_matrices(pooled: Sequence[int], size: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
                   padding: Sequence[int], count_include_pad: bool, divide: bool, dtype: Any) -> list[Array]:
    """Average pooling as one matrix [pooled, size] per axis."""
    found = []
    for count, n, k, s, p in zip(pooled, size, kernel, stride, padding, strict=True):
        start = np.arange(count) * s - p
        end = np.minimum(start + k, n + p)
        shown = end - start if count_include_pad else np.minimum(end, n) - np.maximum(start, 0)
        found.append(_window_matrix(start, end, n, shown if divide else np.ones_like(shown), dtype))
    return found


def _adaptive(size: int, count: int) -> tuple[Array, Array]:
    """Where the windows of adaptive pooling start and end along an axis."""
    at = np.arange(count)
    return at * size // count, ((at + 1) * size + count - 1) // count


def _adaptive_matrices(pooled: Sequence[int], size: Sequence[int], dtype: Any) -> list[Array]:
    found = []
    for count, n in zip(pooled, size, strict=True):
        start, end = _adaptive(n, count)
        found.append(_window_matrix(start, end, n, end - start, dtype))
    return found


def _by_axes(x: Array, matrices: Sequence[Array]) -> Array:
    """x with each of its last axes taken through a matrix [axis, new]."""
    for back, matrix in enumerate(reversed(matrices), 1):
        x = np.swapaxes(matmul(np.swapaxes(x, -back, -1), matrix), -back, -1)
    return x


def avg_pool(x: Array, pooled: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
             count_include_pad: bool, divisor: int | None) -> Array:
    """Mean of each window: x [..., *size] to [..., *pooled]."""
    size = x.shape[-len(kernel):]
    matrices = _mean_matrices(pooled, size, kernel, stride, padding, count_include_pad, divisor is None, x.dtype)
    y = _by_axes(x, [matrix.T for matrix in matrices])
    return y if divisor is None else y / divisor


def avg_pool_adjoint(r: Array, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
                     padding: Sequence[int], count_include_pad: bool, divisor: int | None) -> Array:
    """The adjoint of average pooling: r [..., *pooled] to [..., *size]."""
    pooled = r.shape[-len(kernel):]
    matrices = _mean_matrices(pooled, size, kernel, stride, padding, count_include_pad, divisor is None, r.dtype)
    x = _by_axes(r, matrices)
    return x if divisor is None else x / divisor


def adaptive_avg_pool(x: Array, size: Sequence[int]) -> Array:
    """Mean over windows from floor(i in / out) to ceil((i + 1) in / out)."""
    return _by_axes(x, [m.T for m in _adaptive_matrices(size, x.shape[-len(size):], x.dtype)])


def adaptive_avg_pool_adjoint(r: Array, size: Sequence[int]) -> Array:
    """The adjoint of adaptive average pooling: r [..., *pooled] to [..., *size]."""
    return _by_axes(r, _adaptive_matrices(r.shape[-len(size):], size, r.dtype))


def interpolate(x: Array, size: Sequence[int], mode: str, align_corners: bool, scales: Sequence[float] | None,
                antialias: bool, absolute: bool) -> Array:
    """x [..., *spatial] resampled to `size`; see the op `interpolate`."""
    matrices = interpolation.matrices(x.shape[-len(size):], size, mode, align_corners, scales, antialias, absolute)
    return _by_axes(x, [each.T.astype(x.dtype) for each in matrices])


def interpolate_adjoint(r: Array, size: Sequence[int], mode: str, align_corners: bool,
                        scales: Sequence[float] | None, antialias: bool, absolute: bool) -> Array:
    """The adjoint of interpolation: r [..., *resampled] to [..., *size]."""
    matrices = interpolation.matrices(size, r.shape[-len(size):], mode, align_corners, scales, antialias, absolute)
    return _by_axes(r, [each.astype(r.dtype) for each in matrices])


def max_pool(x: Array, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
             dilation: Sequence[int], ceil_mode: bool) -> Array:
    """Largest in each window."""
    rank = len(kernel)
    behind = []
    for n, k, s, p, d in zip(x.shape[-rank:], kernel, stride, padding, dilation, strict=True):
        span = n + 2 * p - d * (k - 1) - 1
        count = (-(-span // s) if ceil_mode else span // s) + 1
        count -= ceil_mode and (count - 1) * s >= n + p
        behind.append(max(0, (count - 1) * s + d * (k - 1) + 1 - n - p))
    padded = _padded(x, padding, -math.inf, behind)
    return np.asarray(_windows(padded, kernel, stride, dilation).max(axis=tuple(range(-rank, 0))))


def max_pool_adjoint(r: Array, x: Array, y: Array, kernel: Sequence[int], stride: Sequence[int],
                     padding: Sequence[int], dilation: Sequence[int]) -> Array:
    """r [S, *y] to the winner of each window of x, in equal parts to those that tie: [S, *x]."""
    rank = len(kernel)
    pooled, size = y.shape[-rank:], x.shape[-rank:]
    behind = [max(0, (m - 1) * s + d * (k - 1) + 1 - n - p) for m, s, d, k, n, p in
              zip(pooled, stride, dilation, kernel, size, padding, strict=True)]
    padded = _padded(x, padding, -math.inf, behind)
    windows = [_places(at, pooled, stride, dilation) for at in product(*map(range, kernel))]
    count = sum((padded[_last(window)] == y).astype(r.dtype) for window in windows)
    share = r / np.maximum(count, 1)
    out = np.zeros((r.shape[0], *padded.shape), r.dtype)
    for window in windows:
        out[_last(window)] += share * (padded[_last(window)] == y)
    return np.asarray(out[_last([slice(p, p + n) for p, n in zip(padding, size, strict=True)])])


def adaptive_max_pool(x: Array, size: Sequence[int]) -> Array:
    """Largest over windows from floor(i in / out) to ceil((i + 1) in / out)."""
    y = np.empty((*x.shape[:-len(size)], *size), x.dtype)
    for at, window in _adaptive_windows(size, x.shape[-len(size):]):
        y[_last(at)] = x[_last(window)].max(axis=tuple(range(-len(size), 0)))
    return y


def adaptive_max_pool_adjoint(r: Array, x: Array, y: Array) -> Array:
    """r [S, *y] to the winner of each window of x, in equal parts to those that tie: [S, *x]."""
    rank = x.ndim - 2
    out = np.zeros((r.shape[0], *x.shape), r.dtype)
    for at, window in _adaptive_windows(y.shape[-rank:], x.shape[-rank:]):
        corner = _last([slice(i, i + 1) for i in at])
        won = (x[_last(window)] == y[corner]).astype(r.dtype)
        count = won.sum(axis=tuple(range(-rank, 0)), keepdims=True)
        out[_last(window)] += r[corner] / np.maximum(count, 1) * won
    return out


def _adaptive_windows(pooled: Sequence[int],
                      size: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Each place of the pooled axes, and its window."""
    bounds = [_adaptive(n, m) for n, m in zip(size, pooled, strict=True)]
    return [(at, tuple(slice(int(start[i]), int(end[i])) for (start, end), i in zip(bounds, at, strict=True)))
            for at in product(*map(range, pooled))]


# --- norms -------------------------------------------------------------------------------------------

def _normal(x: Array, axes: tuple[int, ...], eps: float, centred: bool = True) -> Array:
    wide = x.astype(np.float32, copy=False) if x.dtype == np.float16 else x
    wide = wide - wide.mean(axis=axes, keepdims=True) if centred else wide
    return np.asarray(wide / np.sqrt(np.mean(wide * wide, axis=axes, keepdims=True) + eps))


def _affine(y: Array, weight: Array | None, bias: Array | None, dtype: Any) -> Array:
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return np.asarray(y.astype(dtype, copy=False))


def layer_norm(x: Array, weight: Array | None, bias: Array | None, dims: int, eps: float) -> Array:
    """Zero mean and unit variance over the last `dims` axes, then `* weight + bias`."""
    return _affine(_normal(x, tuple(range(-dims, 0)), eps), weight, bias, x.dtype)


def rms_norm(x: Array, weight: Array | None, dims: int, eps: float) -> Array:
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last `dims` axes."""
    return _affine(_normal(x, tuple(range(-dims, 0)), eps, centred=False), weight, None, x.dtype)


def group_norm(x: Array, weight: Array | None, bias: Array | None, groups: int, eps: float) -> Array:
    """Zero mean and unit variance over each group of channels and all later axes, then affine."""
    y = _normal(x.reshape(x.shape[0], groups, -1), (-1,), eps).reshape(x.shape)
    return _affine(y, None if weight is None else _channels(weight, x),
                   None if bias is None else _channels(bias, x), x.dtype)


def batch_norm(x: Array, mean: Array, variance: Array, weight: Array | None, bias: Array | None,
               eps: float) -> Array:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` per channel."""
    scale = 1 / np.sqrt(variance + eps)
    scale = scale if weight is None else scale * weight
    y = (x - _channels(mean, x)) * _channels(scale, x)
    return np.asarray(y if bias is None else y + _channels(bias, x))


def row_statistics(x: Array, dims: int, eps: float, centred: bool) -> tuple[Array, Array]:
    """Mean (0 when not centred) and `1 / sqrt(variance + eps)` over the last `dims` axes, kept as size 1."""
    axes = tuple(range(-dims, 0))
    mean = x.mean(axis=axes, keepdims=True) if centred else np.zeros((*x.shape[:-dims], *(1,) * dims), x.dtype)
    lowered = (x - mean).astype(np.result_type(x.dtype, np.float32), copy=False)
    scale = 1 / np.sqrt(np.mean(lowered * lowered, axis=axes, keepdims=True) + eps)
    return mean, scale.astype(x.dtype, copy=False)


# --- attention ---------------------------------------------------------------------------------------

def stream(function: Callable[..., Sequence[Array]], given: list[Array], **how: Any) -> tuple[Array, ...]:
    """The results of a function of blocks of rows, put together. See `streams.stream`."""
    return streams.stream(function, given, _zeros_like, **how)


def _zeros_like(shape: tuple[int, ...], x: Array) -> Array:
    return np.zeros(shape, x.dtype)


def attention(q: Array, k: Array, v: Array, mask: Array | None, sinks: Array | None = None, *, scale: float,
              causal: bool = False, window: int | None = None, softcap: float | None = None) -> Array:
    """`softmax(softcap(q k^T scale) + mask) v`, by blocks of rows; a row that sees nothing is 0. See `attention`."""
    def block(given: list[Array]) -> tuple[Array]:
        (q, k, v), mask = given[:3], given[3] if len(given) == 4 else None
        weights = attention_weights(q, k, mask, sinks, scale=scale, causal=causal, window=window, softcap=softcap)
        return (_grouped(weights, v),)

    return np.asarray(streams.attend(block, q, k, v, mask, _zeros_like, width=q.shape[0] * q.shape[1] * k.shape[2],
                                     causal=causal, window=window))


def attention_weights(q: Array, k: Array, mask: Array | None, sinks: Array | None = None, *, scale: float,
                      causal: bool = False, window: int | None = None, softcap: float | None = None) -> Array:
    """The softmax of `attention`, [B, H, T, U]; 0 where masked, a row that sees nothing included."""
    scores = _grouped(q, k.swapaxes(-1, -2)) * scale
    if softcap is not None:
        scores = np.tanh(scores / softcap) * softcap
    visible = _visible(q.shape[-2], k.shape[-2], causal, window)
    if mask is not None and mask.dtype == np.bool_:
        visible = visible & mask
    elif mask is not None:
        scores = scores + mask.astype(scores.dtype, copy=False)
    scores = np.where(visible, scores, np.asarray(-math.inf, scores.dtype))
    top = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(scores.dtype, copy=False)[:, None, None]
        top = np.maximum(top, sinks)
    top = np.where(np.isfinite(top), top, np.zeros((), top.dtype))
    raised = np.exp(scores - top)
    total = raised.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks - top)
    return np.asarray(raised / np.where(total == 0, np.ones((), total.dtype), total))


def _grouped(a: Array, b: Array) -> Array:
    """a [B, H, T, N] @ b [B, G, N, M], the heads of a group stacked as rows of one product."""
    (batch, heads, rows, inner), groups = a.shape, b.shape[1]
    stacked = a.reshape(batch, groups, heads // groups * rows, inner)
    return matmul(stacked, b).reshape(batch, heads, rows, b.shape[-1])


def _visible(queries: int, keys: int, causal: bool, window: int | None) -> Array:
    """True where query i sees key j: [T, U]."""
    ahead = np.arange(keys - queries, keys)[:, None] - np.arange(keys)
    seen = ahead >= 0 if causal else np.ones_like(ahead, np.bool_)
    return np.asarray(seen if window is None else seen & (ahead < window))


# --- moves -------------------------------------------------------------------------------------------

def pad(x: Array, pads: Sequence[tuple[int, int]], value: float) -> Array:
    """x with `value` before and after along each axis; negative pads crop."""
    kept = tuple(slice(max(0, -before), n - max(0, -after)) for n, (before, after) in zip(x.shape, pads, strict=True))
    return np.pad(x[kept], [(max(0, before), max(0, after)) for before, after in pads], constant_values=value)


def slice_adjoint(r: Array, dim: int, size: int, start: int, stop: int, step: int) -> Array:
    """Zeros of `size` along an axis with r at start, start + step, ..."""
    out = np.zeros((*r.shape[:dim], size, *r.shape[dim + 1:]), r.dtype)
    out[_from(dim, slice(start, stop, step))] = r
    return out


def select_adjoint(r: Array, dim: int, index: int, size: int) -> Array:
    """Zeros with a new axis of `size`, r at `index`."""
    out = np.zeros((*r.shape[:dim], size, *r.shape[dim:]), r.dtype)
    out[_from(dim, index)] = r
    return out


def _grid(index: Array, dim: int) -> tuple[Array, ...]:
    """The places that an index of one axis names, as an index of all axes."""
    places = list(np.ogrid[tuple(slice(n) for n in index.shape)])
    places[dim] = index
    return tuple(places)


def gather(x: Array, index: Array, dim: int) -> Array:
    """`x[..., index[..., i, ...], ...]` along an axis; index may be shorter along the others."""
    return np.asarray(x[_grid(index, dim)])


def scatter(base: Array, index: Array, source: Array | float, dim: int) -> Array:
    """base with source written at index along an axis."""
    out = base.copy()
    out[_grid(index, dim)] = _cropped(source, index)
    return out


def scatter_add(base: Array, index: Array, source: Array, dim: int) -> Array:
    """base with source added at index along an axis."""
    out = base.copy()
    np.add.at(out, _grid(index, dim), _cropped(source, index))
    return out


def _cropped(source: Array | float, index: Array) -> Array | float:
    """The part of source that index has places for."""
    return source[tuple(slice(n) for n in index.shape)] if isinstance(source, np.ndarray) and source.ndim else source


def take_adjoint(r: Array, index: Array, dim: int, size: int) -> Array:
    """Zeros of `size` along an axis with slices of r added at index."""
    out = np.zeros((*r.shape[:dim], size, *r.shape[dim + index.ndim:]), r.dtype)
    np.add.at(out, _from(dim, index), r)
    return out


def index_adjoint(r: Array, indices: Sequence[Array], dim: int, sizes: Sequence[int]) -> Array:
    """Zeros of `sizes` from axis `dim` on with r added at the indices."""
    rank = len(np.broadcast_shapes(*(index.shape for index in indices)))
    out = np.zeros((*r.shape[:dim], *sizes, *r.shape[dim + rank:]), r.dtype)
    np.add.at(out, _from(dim, *indices), r)
    return out


def index_put(base: Array, source: Array | float, indices: Sequence[Array], dim: int,
              accumulate: bool = False) -> Array:
    """base with source written, or added, at indices from axis `dim` on."""
    out, places = base.copy(), _from(dim, *indices)
    if accumulate:
        np.add.at(out, places, source)
    else:
        out[places] = source
    return out
