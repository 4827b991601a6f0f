"""Reference functions of the layers: linear maps, pooling, norms and attention (see `reference.py`).

Windows are walked by kernel element, not by output: `_meets` is the slice of the padded input that one
kernel element meets, over all outputs at once. An adjoint adds into the same slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dlbc.ir.reference_interpolate import interpolate, interpolate_adjoint

Array: TypeAlias = "NDArray[Any]"
Dims: TypeAlias = "tuple[int, ...]"
Index: TypeAlias = "tuple[Any, ...]"


def safe_div(a: Array, b: Array) -> Array:
    """`a / b`, 0 where b = 0."""
    return np.where(b == 0, 0.0, a / np.where(b == 0, 1, b))


# --- linear maps -------------------------------------------------------------------------------------

def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """`x @ weight.T + bias`."""
    y: Array = x @ weight.T
    return y if bias is None else y + bias


def linear_rows(x: Array, rows: Array, bias: Array | None = None) -> Array:
    """`sum_d x[..., d] rows[..., k, d] + bias[..., k]`."""
    y: Array = (x[..., None, :] * rows).sum(-1)
    return y if bias is None else y + bias


def einsum(*xs: Array, equation: str) -> Array:
    """Sum of products."""
    return np.asarray(np.einsum(equation, *xs, optimize=True))


def convolution(x: Array, weight: Array, bias: Array | None = None, *, stride: Dims, padding: Dims,
                dilation: Dims, groups: int) -> Array:
    """The sum over kernel elements of that element's matrix times the inputs it meets."""
    batch, channels, *_ = x.shape
    outputs, kernel = weight.shape[0], weight.shape[2:]
    x = _padded(x, [(p, p) for p in padding], 0.0)
    size = tuple((n - d * (k - 1) - 1) // s + 1
                 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True))
    weight = weight.reshape(groups, outputs // groups, channels // groups, *kernel)
    y = np.zeros((batch, groups, outputs // groups, math.prod(size)))
    for element in np.ndindex(*kernel):
        met = x[_meets(element, size, stride, dilation)]
        y += weight[(..., *element)] @ met.reshape(batch, groups, channels // groups, math.prod(size))
    return _plus_bias(y.reshape(batch, outputs, *size), bias)


def transposed_convolution(x: Array, weight: Array, bias: Array | None = None, *, stride: Dims, padding: Dims,
                           output_padding: Dims, dilation: Dims, groups: int) -> Array:
    """Each kernel element's matrix times the inputs, added where that element meets the output."""
    batch, channels, *size = x.shape
    outputs, kernel = weight.shape[1] * groups, weight.shape[2:]
    full = tuple((n - 1) * s + d * (k - 1) + extra + 1
                 for n, k, s, d, extra in zip(size, kernel, stride, dilation, output_padding, strict=True))
    weight = weight.reshape(groups, channels // groups, outputs // groups, *kernel)
    x = x.reshape(batch, groups, channels // groups, math.prod(size))
    y = np.zeros((batch, outputs, *full))
    for element in np.ndindex(*kernel):
        part = weight[(..., *element)].swapaxes(-1, -2) @ x
        y[_meets(element, size, stride, dilation)] += part.reshape(batch, outputs, *size)
    return _plus_bias(_cropped(y, [(p, p) for p in padding]), bias)


def _plus_bias(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + _per_channel(bias, y.ndim)


def _per_channel(numbers: Array, rank: int) -> Array:
    """One number per channel (axis 1), shaped to broadcast over a tensor of `rank` axes."""
    return numbers.reshape(-1, *(1,) * (rank - 2))


def embedding(ids: Array, weight: Array) -> Array:
    """Rows of weight."""
    return weight[ids]


def rotary(x: Array, cos: Array, sin: Array, *, interleaved: bool) -> Array:
    """`x * cos + rotate(x) * sin`."""
    if interleaved:
        rotated = np.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    else:
        half = x.shape[-1] // 2
        rotated = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    y: Array = x * cos + rotated * sin
    return y


# --- windows -----------------------------------------------------------------------------------------

def _meets(element: Sequence[int], size: Sequence[int], stride: Dims,
           dilation: Dims) -> Index:
    """Where one kernel element lies in the padded input, for all `size` outputs."""
    return (..., *(slice(e * d, e * d + (n - 1) * s + 1, s)
                   for e, n, s, d in zip(element, size, stride, dilation, strict=True)))


def _padded(x: Array, pads: Sequence[tuple[int, int]], value: float) -> Array:
    """x with `value` around its last axes, one (before, after) pair for each."""
    return np.pad(x, [(0, 0)] * (x.ndim - len(pads)) + list(pads), constant_values=value)


def _cropped(x: Array, pads: Sequence[tuple[int, int]]) -> Array:
    """The inverse of `_padded`."""
    sizes = x.shape[x.ndim - len(pads):]
    kept: Index = (..., *(slice(p, n - after) for n, (p, after) in zip(sizes, pads, strict=True)))
    return x[kept]


def _layout(size: Sequence[int], kernel: Dims, stride: Dims, padding: Dims, dilation: Dims,
            ceil_mode: bool) -> tuple[Dims, list[tuple[int, int]]]:
    """Pooled sizes, and the padding that makes every window complete (ceil_mode needs more at the end).

    A window of ceil_mode that would start in the padding at the end is left out, as in torch.
    """
    pooled, pads = [], []
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        span = n + 2 * p - d * (k - 1) - 1
        count = (-(-span // s) if ceil_mode else span // s) + 1
        if ceil_mode and (count - 1) * s >= n + p:
            count -= 1
        pooled.append(count)
        pads.append((p, max(p, (count - 1) * s + d * (k - 1) + 1 - n - p)))
    return tuple(pooled), pads


# --- pooling -----------------------------------------------------------------------------------------

def max_pool(x: Array, *, kernel: Dims, stride: Dims, padding: Dims, dilation: Dims,
             ceil_mode: bool) -> Array:
    """Largest in each window."""
    pooled, pads = _layout(x.shape[-len(kernel):], kernel, stride, padding, dilation, ceil_mode)
    x = _padded(x, pads, -np.inf)
    y = np.full((*x.shape[:-len(kernel)], *pooled), -np.inf)
    for element in np.ndindex(*kernel):
        y = np.maximum(y, x[_meets(element, pooled, stride, dilation)])
    return y


def max_pool_adjoint(r: Array, x: Array, y: Array, *, kernel: Dims, stride: Dims, padding: Dims,
                     dilation: Dims, ceil_mode: bool) -> Array:
    """r to the winner of each window, shared equally among ties. Padding (NaN here) never wins."""
    pooled, pads = _layout(x.shape[-len(kernel):], kernel, stride, padding, dilation, ceil_mode)
    x = _padded(x, pads, np.nan)
    windows = [_meets(element, pooled, stride, dilation) for element in np.ndindex(*kernel)]
    winners = sum((x[window] == y).astype(np.int64) for window in windows)
    carried = np.zeros((r.shape[0], *x.shape))
    for window in windows:
        carried[window] += np.where(x[window] == y, r / winners, 0.0)
    return _cropped(carried, pads)


def avg_pool(x: Array, *, kernel: Dims, stride: Dims, padding: Dims, ceil_mode: bool, count_include_pad: bool,
             divisor: int | None) -> Array:
    """Sum of each window over its divisor."""
    ones, size = (1,) * len(kernel), x.shape[-len(kernel):]
    pooled, pads = _layout(size, kernel, stride, padding, ones, ceil_mode)
    x = _padded(x, pads, 0.0)
    total = sum(x[_meets(element, pooled, stride, ones)] for element in np.ndindex(*kernel))
    return np.asarray(total / _divisors(size, pooled, kernel, stride, padding, count_include_pad, divisor))


def avg_pool_adjoint(r: Array, *, size: Dims, kernel: Dims, stride: Dims, padding: Dims, ceil_mode: bool,
                     count_include_pad: bool, divisor: int | None) -> Array:
    """r over the window's divisor, added to each element of the window."""
    ones = (1,) * len(kernel)
    pooled, pads = _layout(size, kernel, stride, padding, ones, ceil_mode)
    share = r / _divisors(size, pooled, kernel, stride, padding, count_include_pad, divisor)
    carried = _padded(np.zeros((*r.shape[:-len(size)], *size)), pads, 0.0)
    for element in np.ndindex(*kernel):
        carried[_meets(element, pooled, stride, ones)] += share
    return _cropped(carried, pads)


def _divisors(size: Sequence[int], pooled: Dims, kernel: Dims, stride: Dims, padding: Dims,
              count_include_pad: bool, divisor: int | None) -> Array:
    """What each window's sum is divided by: how many elements it has (in the input, or padding included)."""
    if divisor is not None:
        return np.array(divisor)
    counts = np.ones(())
    for n, count, k, s, p in zip(size, pooled, kernel, stride, padding, strict=True):
        start = np.arange(count) * s - p
        stop = np.minimum(start + k, n + p)
        if not count_include_pad:
            start, stop = np.maximum(start, 0), np.minimum(stop, n)
        counts = counts[..., None] * (stop - start)
    return counts


def _adaptive(size: int, pooled: int) -> list[tuple[int, int]]:
    """The windows of adaptive pooling along one axis: floor(i in / out) to ceil((i + 1) in / out)."""
    return [(i * size // pooled, -(-(i + 1) * size // pooled)) for i in range(pooled)]


def _averages(size: int, pooled: int) -> Array:
    """Adaptive average pooling along one axis, as a matrix [pooled, size]."""
    matrix = np.zeros((pooled, size))
    for row, (start, stop) in enumerate(_adaptive(size, pooled)):
        matrix[row, start:stop] = 1 / (stop - start)
    return matrix


def adaptive_avg_pool(x: Array, *, size: Dims) -> Array:
    """Mean over windows: averages along one axis after the other."""
    for axis, pooled in zip(range(-len(size), 0), size, strict=True):
        x = np.moveaxis(np.moveaxis(x, axis, -1) @ _averages(x.shape[axis], pooled).T, -1, axis)
    return x


def adaptive_avg_pool_adjoint(r: Array, *, size: Dims) -> Array:
    """The transposed averages along one axis after the other."""
    for axis, before in zip(range(-len(size), 0), size, strict=True):
        r = np.moveaxis(np.moveaxis(r, axis, -1) @ _averages(before, r.shape[axis]), -1, axis)
    return r


def _adaptive_windows(size: Sequence[int], pooled: Dims) -> dict[Dims, Index]:
    """The window of x for each element of the pooled tensor."""
    spans = [_adaptive(n, count) for n, count in zip(size, pooled, strict=True)]
    return {at: (..., *(slice(*spans[i][place]) for i, place in enumerate(at))) for at in np.ndindex(*pooled)}


def adaptive_max_pool(x: Array, *, size: Dims) -> Array:
    """Largest over windows."""
    y: Array = np.zeros((*x.shape[:-len(size)], *size))
    for at, window in _adaptive_windows(x.shape[-len(size):], size).items():
        here: Index = (..., *at)
        y[here] = np.max(x[window], axis=tuple(range(-len(size), 0)))
    return y


def adaptive_max_pool_adjoint(r: Array, x: Array, y: Array) -> Array:
    """r to the winner of each window, shared equally among ties. Axes 0 and 1 of x are not pooled."""
    rank = x.ndim - 2
    carried = np.zeros((r.shape[0], *x.shape))
    for at, window in _adaptive_windows(x.shape[2:], y.shape[2:]).items():
        here: Index = (..., *at, *(None,) * rank)
        wins = x[window] == y[here]
        carried[window] += wins * (r[here] / np.sum(wins, axis=tuple(range(-rank, 0)), keepdims=True))
    return carried


# --- norms -------------------------------------------------------------------------------------------

def batch_norm(x: Array, mean: Array, variance: Array, weight: Array | None = None,
               bias: Array | None = None, *, eps: float) -> Array:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` per channel."""
    y = (x - _per_channel(mean, x.ndim)) / np.sqrt(_per_channel(variance, x.ndim) + eps)
    y = y if weight is None else y * _per_channel(weight, x.ndim)
    return _plus_bias(y, bias)


def row_statistics(x: Array, *, dims: int, eps: float, centred: bool) -> tuple[Array, Array]:
    """Mean (0 unless centred) and `1 / sqrt(variance + eps)` over the last axes."""
    last = tuple(range(-dims, 0))
    mean = np.mean(x, axis=last, keepdims=True)
    mean = mean if centred else np.zeros_like(mean)
    return mean, 1 / np.sqrt(np.mean((x - mean) ** 2, axis=last, keepdims=True) + eps)


def layer_norm(x: Array, weight: Array | None = None, bias: Array | None = None, *, dims: int,
               eps: float) -> Array:
    """Zero mean and unit variance over the last axes, then affine."""
    mean, scale = row_statistics(x, dims=dims, eps=eps, centred=True)
    y = (x - mean) * scale
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def rms_norm(x: Array, weight: Array | None = None, *, dims: int, eps: float) -> Array:
    """`x / sqrt(mean(x ** 2) + eps) * weight`."""
    _, scale = row_statistics(x, dims=dims, eps=eps, centred=False)
    return x * scale if weight is None else x * scale * weight


def group_norm(x: Array, weight: Array | None = None, bias: Array | None = None, *, groups: int,
               eps: float) -> Array:
    """Zero mean and unit variance over each group of channels, then affine per channel."""
    y = layer_norm(x.reshape(x.shape[0], groups, -1), dims=1, eps=eps).reshape(x.shape)
    y = y if weight is None else y * _per_channel(weight, x.ndim)
    return _plus_bias(y, bias)


# --- attention ---------------------------------------------------------------------------------------

def attention_weights(q: Array, k: Array, mask: Array | None = None, sinks: Array | None = None, *, scale: float,
                      causal: bool, window: int | None, softcap: float | None) -> Array:
    """The softmax of `attention`: 0 where masked, a row of zeros where nothing is visible."""
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    score = q @ k.swapaxes(-1, -2) * scale
    if softcap is not None:
        score = softcap * np.tanh(score / softcap)
    queries, keys = score.shape[-2:]
    back = np.arange(queries)[:, None] + (keys - queries) - np.arange(keys)  # how far the key lies back
    if causal:
        score = np.where(back >= 0, score, -np.inf)
    if window is not None:
        score = np.where(back < window, score, -np.inf)
    if mask is not None:
        score = np.where(mask, score, -np.inf) if mask.dtype == bool else score + mask
    if sinks is not None:
        score = np.concatenate([score, np.broadcast_to(sinks[:, None, None], (*score.shape[:-1], 1))], axis=-1)
    top = np.max(score, axis=-1, keepdims=True)
    e = np.exp(score - np.where(top == -np.inf, 0.0, top))
    return safe_div(e, np.sum(e, axis=-1, keepdims=True))[..., :keys]


def attention(q: Array, k: Array, v: Array, mask: Array | None = None, sinks: Array | None = None, *, scale: float,
              causal: bool, window: int | None, softcap: float | None) -> Array:
    """`softmax(...) v`."""
    weights = attention_weights(q, k, mask, sinks, scale=scale, causal=causal, window=window, softcap=softcap)
    y: Array = weights @ np.repeat(v, q.shape[1] // v.shape[1], axis=1)
    return y


LAYERS: dict[str, Callable[..., Array | tuple[Array, Array]]] = {
    "linear": linear, "linear_rows": linear_rows, "matmul": np.matmul, "einsum": einsum,
    "conv1d": convolution, "conv2d": convolution, "conv3d": convolution,
    "conv_transpose1d": transposed_convolution, "conv_transpose2d": transposed_convolution,
    "conv_transpose3d": transposed_convolution,
    "embedding": embedding, "rotary": rotary,
    "max_pool": max_pool, "max_pool_adjoint": max_pool_adjoint, "avg_pool": avg_pool,
    "avg_pool_adjoint": avg_pool_adjoint, "adaptive_avg_pool": adaptive_avg_pool,
    "adaptive_avg_pool_adjoint": adaptive_avg_pool_adjoint, "adaptive_max_pool": adaptive_max_pool,
    "adaptive_max_pool_adjoint": adaptive_max_pool_adjoint,
    "interpolate": interpolate, "interpolate_adjoint": interpolate_adjoint,
    "batch_norm": batch_norm, "layer_norm": layer_norm, "rms_norm": rms_norm, "group_norm": group_norm,
    "row_statistics": row_statistics, "attention": attention, "attention_weights": attention_weights,
}
