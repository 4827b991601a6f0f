"""Matrix products in numpy. Part of `numpy_kernels`."""

from __future__ import annotations

import numpy as np

from dlbc_runtime.arrays import Array


def matmul(a: Array, b: Array) -> Array:
    """Matrix product over the last two axes; by one matrix in one product."""
    if a.dtype == np.float16:
        return matmul(a.astype(np.float32), b.astype(np.float32)).astype(np.float16)
    if b.ndim == 2 and a.ndim >= 2:  # np.dot calls BLAS whatever the strides are, and sooner than `@` does
        found: Array = np.dot(a if a.ndim == 2 else a.reshape(-1, a.shape[-1]), b)
        return found if a.ndim == 2 else found.reshape(*a.shape[:-1], b.shape[1])
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
    rows = matmul(x, weight.T)
    if bias is not None:
        rows += bias
    return rows
