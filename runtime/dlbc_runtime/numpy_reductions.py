"""Reductions, scans and norms in numpy: softmax, sorting, layers that normalise. Part of `numpy_kernels`."""

from __future__ import annotations

from typing import Any

import numpy as np

from dlbc_runtime.arrays import Array
from dlbc_runtime.numpy_elementwise import channels


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
    return _affine(y, None if weight is None else channels(weight, x),
                   None if bias is None else channels(bias, x), x.dtype)


def batch_norm(x: Array, mean: Array, variance: Array, weight: Array | None, bias: Array | None,
               eps: float) -> Array:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` per channel."""
    scale = 1 / np.sqrt(variance + eps)
    scale = scale if weight is None else scale * weight
    y = (x - channels(mean, x)) * channels(scale, x)
    return np.asarray(y if bias is None else y + channels(bias, x))


def row_statistics(x: Array, dims: int, eps: float, centred: bool) -> tuple[Array, Array]:
    """Mean (0 when not centred) and `1 / sqrt(variance + eps)` over the last `dims` axes, kept as size 1."""
    axes = tuple(range(-dims, 0))
    mean = x.mean(axis=axes, keepdims=True) if centred else np.zeros((*x.shape[:-dims], *(1,) * dims), x.dtype)
    lowered = (x - mean).astype(np.result_type(x.dtype, np.float32), copy=False)
    scale = 1 / np.sqrt(np.mean(lowered * lowered, axis=axes, keepdims=True) + eps)
    return mean, scale.astype(x.dtype, copy=False)
