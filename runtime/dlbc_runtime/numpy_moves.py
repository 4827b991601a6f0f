"""Elements moved in numpy, and moved back: padding, slices, gathers and scatters. Part of `numpy_kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dlbc_runtime.arrays import Array


def pad(x: Array, pads: Sequence[tuple[int, int]], value: float) -> Array:
    """x with `value` before and after along each axis; negative pads crop."""
    kept = tuple(slice(max(0, -before), n - max(0, -after)) for n, (before, after) in zip(x.shape, pads, strict=True))
    return np.pad(x[kept], [(max(0, before), max(0, after)) for before, after in pads], constant_values=value)


def slice_adjoint(r: Array, dim: int, size: int, start: int, stop: int, step: int) -> Array:
    """Zeros of `size` along an axis with r at start, start + step, ..."""
    out = np.zeros((*r.shape[:dim], size, *r.shape[dim + 1:]), r.dtype)
    out[from_axis(dim, slice(start, stop, step))] = r
    return out


def select_adjoint(r: Array, dim: int, index: int, size: int) -> Array:
    """Zeros with a new axis of `size`, r at `index`."""
    out = np.zeros((*r.shape[:dim], size, *r.shape[dim:]), r.dtype)
    out[from_axis(dim, index)] = r
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
    np.add.at(out, from_axis(dim, index), r)
    return out


def index_adjoint(r: Array, indices: Sequence[Array], dim: int, sizes: Sequence[int]) -> Array:
    """Zeros of `sizes` from axis `dim` on with r added at the indices."""
    rank = len(np.broadcast_shapes(*(index.shape for index in indices)))
    out = np.zeros((*r.shape[:dim], *sizes, *r.shape[dim + rank:]), r.dtype)
    np.add.at(out, from_axis(dim, *indices), r)
    return out


def index_put(base: Array, source: Array | float, indices: Sequence[Array], dim: int,
              accumulate: bool = False) -> Array:
    """base with source written, or added, at indices from axis `dim` on."""
    out, places = base.copy(), from_axis(dim, *indices)
    if accumulate:
        np.add.at(out, places, source)
    else:
        out[places] = source
    return out


def from_axis(dim: int, *places: Any) -> tuple[Any, ...]:
    """The index that puts `places` at axis `dim` and those after it."""
    return (*(slice(None),) * dim, *places)
