"""Interpolation along one axis as a matrix [outputs, inputs]: what both kernel libraries resample with.

An interpolation is one such matrix per axis, so its adjoint is the transposed matrices, and its absolute map the
matrices' absolute values. Numbers are torch's: where a coordinate is rounded, it is a float32 as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def matrices(before: Sequence[int], after: Sequence[int], mode: str, align_corners: bool,
             scales: Sequence[float] | None, antialias: bool, absolute: bool) -> list[Array]:
    """The matrix [after, before] of each axis."""
    found = []
    for inputs, outputs, scale in zip(before, after, scales or (None,) * len(before), strict=True):
        kept = inputs == outputs and mode == "nearest" and len(before) == 2  # a copy in torch, of pictures only
        found.append(matrix(inputs, outputs, mode, align_corners, None if kept else scale, antialias, absolute))
    return found


@lru_cache(maxsize=128)
def matrix(inputs: int, outputs: int, mode: str, align_corners: bool, scale: float | None, antialias: bool,
           absolute: bool) -> Array:
    """The matrix, float64, read-only; `scale` is the user's factor, None for the ratio of the sizes."""
    if inputs == outputs and (antialias or mode == "linear"):
        found = np.eye(inputs)  # whatever the factor says, as torch
    elif mode in ("nearest", "nearest_exact"):
        found = _nearest(inputs, outputs, scale, mode == "nearest_exact")
    elif antialias:
        found = _antialiased(inputs, outputs, _step(inputs, outputs, align_corners, scale), mode == "cubic")
    else:
        found = _smooth(inputs, outputs, _step(inputs, outputs, align_corners, scale), align_corners, mode == "cubic")
    found = np.abs(found) if absolute else found
    found.setflags(write=False)
    return np.asarray(found)


def _step(inputs: int, outputs: int, align_corners: bool, scale: float | None) -> float:
    """How far apart neighbouring outputs lie, in inputs."""
    if align_corners:
        return (inputs - 1) / (outputs - 1) if outputs > 1 else 0.0
    return 1 / scale if scale is not None and scale > 0 else inputs / outputs


def _nearest(inputs: int, outputs: int, scale: float | None, exact: bool) -> Array:
    at = np.arange(outputs, dtype=np.float32)
    step = np.float32(_step(inputs, outputs, False, scale))
    place = np.floor((at + np.float32(0.5)) * step if exact else at * step).astype(np.int64)
    return _scattered(inputs, [(np.minimum(place, inputs - 1), np.ones(outputs))])


def _smooth(inputs: int, outputs: int, step: float, align_corners: bool, cubic: bool) -> Array:
    """Two or four neighbours; those beyond an edge are the edge."""
    at = np.arange(outputs)
    source = at * step if align_corners else (at + 0.5) * step - 0.5
    source = source if cubic or align_corners else np.maximum(source, 0)
    first = np.minimum(np.floor(source), inputs - 1)
    part = np.clip(source - first, 0, 1)
    if cubic:
        taps = [(first + offset, _cubic(part - offset, -0.75)) for offset in (-1, 0, 1, 2)]
    else:
        taps = [(first, 1 - part), (first + 1, part)]
    return _scattered(inputs, [(np.clip(place, 0, inputs - 1).astype(np.int64), weight) for place, weight in taps])


def _antialiased(inputs: int, outputs: int, step: float, cubic: bool) -> Array:
    """The kernel as wide as an output is, its weights scaled to a sum of 1."""
    wide = max(step, 1.0)
    centre = step * (np.arange(outputs) + 0.5)
    reach = (2 if cubic else 1) * wide
    start = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    stop = np.minimum((centre + reach + 0.5).astype(np.int64), inputs)
    at = np.arange(inputs)
    distance = (at - centre[:, None] + 0.5) / wide
    weight = _cubic(distance, -0.5) if cubic else np.maximum(1 - np.abs(distance), 0)
    weight = np.where((at >= start[:, None]) & (at < stop[:, None]), weight, 0)
    return np.asarray(weight / weight.sum(1, keepdims=True))


def _cubic(distance: Array, a: float) -> Array:
    """Keys' cubic kernel.  Keys 1981."""
    d = np.abs(distance)
    near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.asarray(np.where(d <= 1, near, np.where(d < 2, far, 0)))


def _scattered(inputs: int, taps: list[tuple[Array, Array]]) -> Array:
    """A matrix of the places and weights of each output's neighbours; those at one place add up."""
    found = np.zeros((len(taps[0][0]), inputs))
    for place, weight in taps:
        np.add.at(found, (np.arange(len(place)), place), weight)
    return found
