"""What slides over the last axes in numpy: convolutions, pooling and resampling. Part of `numpy_kernels`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from dlbc_runtime import interpolation
from dlbc_runtime.arrays import Array
from dlbc_runtime.numpy_elementwise import channels
from dlbc_runtime.numpy_linear import matmul
from dlbc_runtime.numpy_moves import from_axis


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
    return y if bias is None else y + channels(bias, y)


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
        y[_last(_places(at, size, stride, dilation))] += columns[from_axis(2, *at)]
    y = np.asarray(y[_last([slice(p, p + f) for p, f in zip(padding, final, strict=True)])])
    return y if bias is None else y + channels(bias, y)


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
