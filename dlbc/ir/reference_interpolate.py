"""Reference functions of interpolation (see `reference.py`): the neighbours of each output, one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"


def interpolate(x: Array, *, size: tuple[int, ...], **how: Any) -> Array:
    """One axis after the other: each output a weighted sum of its neighbours."""
    for axis, matrix in _matrices(x.shape[-len(size):], size, **how):
        x = np.moveaxis(np.moveaxis(x, axis, -1) @ matrix.T, -1, axis)
    return x


def interpolate_adjoint(r: Array, *, size: tuple[int, ...], **how: Any) -> Array:
    """The transposed sums along one axis after the other."""
    for axis, matrix in _matrices(size, r.shape[-len(size):], **how):
        r = np.moveaxis(np.moveaxis(r, axis, -1) @ matrix, -1, axis)
    return r


def _matrices(before: tuple[int, ...], after: tuple[int, ...], *, mode: str, align_corners: bool,
              scales: tuple[float, ...] | None, antialias: bool, absolute: bool) -> Iterator[tuple[int, Array]]:
    """For each axis, counted from the back, the interpolation as a matrix [after, before]."""
    for axis in range(-len(before), 0):
        inputs, outputs, scale = before[axis], after[axis], None if scales is None else scales[axis]
        if inputs == outputs and mode == "nearest" and len(before) == 2:
            scale = None  # torch copies pictures of the same size
        matrix = np.zeros((outputs, inputs))
        for i in range(outputs):
            for place, weight in _neighbours(i, inputs, outputs, mode, align_corners, scale, antialias):
                matrix[i, min(max(place, 0), inputs - 1)] += weight
        yield axis, abs(matrix) if absolute else matrix


def _neighbours(i: int, inputs: int, outputs: int, mode: str, align_corners: bool, scale: float | None,
                antialias: bool) -> list[tuple[int, float]]:
    """The inputs that output i is made of, with their weights; places beyond an edge stand for the edge."""
    if align_corners:
        step = (inputs - 1) / (outputs - 1) if outputs > 1 else 0.0
    else:
        step = 1 / scale if scale else inputs / outputs
    if mode.startswith("nearest"):  # torch finds these places in float32
        middle = np.float32(i + 0.5) if mode == "nearest_exact" else np.float32(i)
        return [(math.floor(middle * np.float32(step)), 1.0)]
    if inputs == outputs and (antialias or mode == "linear"):
        return [(i, 1.0)]
    if antialias:
        return _wide(i, inputs, step, mode == "cubic")
    source = i * step if align_corners else (i + 0.5) * step - 0.5
    if mode == "linear":
        source = max(source, 0.0)
        first = min(math.floor(source), inputs - 1)
        part = min(source - first, 1.0)
        return [(first, 1 - part), (first + 1, part)]
    first = min(math.floor(source), inputs - 1)
    part = min(source - first, 1.0)
    return [(first + offset, _cubic(abs(part - offset), -0.75)) for offset in (-1, 0, 1, 2)]


def _wide(i: int, inputs: int, step: float, cubic: bool) -> list[tuple[int, float]]:
    """The kernel made as wide as an output is, within the edges, its weights summing to 1."""
    wide, centre = max(step, 1.0), step * (i + 0.5)
    reach = (2 if cubic else 1) * wide
    places = range(max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), inputs))
    distances = [abs(place - centre + 0.5) / wide for place in places]
    found = [_cubic(d, -0.5) if cubic else max(1 - d, 0.0) for d in distances]
    return [(place, weight / sum(found)) for place, weight in zip(places, found, strict=True)]


def _cubic(d: float, a: float) -> float:
    """Keys' cubic kernel at distance d.  Keys 1981."""
    if d <= 1:
        return (a + 2) * d ** 3 - (a + 3) * d ** 2 + 1
    return a * d ** 3 - 5 * a * d ** 2 + 8 * a * d - 4 * a if d < 2 else 0.0
