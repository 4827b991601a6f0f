"""Attention in numpy, by blocks of rows. Part of `numpy_kernels`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dlbc_runtime import streams
from dlbc_runtime.arrays import Array
from dlbc_runtime.numpy_linear import matmul


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
