"""The model at the reference input: run once, and kept for the next call that asks for the same."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dlbc_runtime.arrays import Array, as_numpy
from dlbc_runtime.engines import Engine
from dlbc_runtime.errors import InputError
from dlbc_runtime.program import Manifest
from dlbc_runtime.reference import Reference

KEPT = 2
"""References of a program whose activations are kept; each takes about the memory of a forward pass."""


@dataclass(frozen=True)
class AtReference:
    """What a program needs of the reference: the explained value there [1 or B, ...], and its activations."""

    explained: Array
    values: tuple[Any, ...]


@dataclass(eq=False)
class ReferenceRuns:
    """The activations at the references that were last asked for."""

    runs: OrderedDict[object, AtReference] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def at(self, key: object, make: Callable[[], AtReference]) -> AtReference:
        """What `make` gives, kept under `key` unless that is None."""
        with self.lock:
            if key is not None and key in self.runs:
                self.runs.move_to_end(key)
                return self.runs[key]
        found = make()
        if key is not None:
            with self.lock:
                self.runs[key] = found
                while len(self.runs) > KEPT:
                    self.runs.popitem(last=False)
        return found


def reference_arguments(manifest: Manifest, reference: Reference, arguments: Mapping[str, Any], engine: Engine
                        ) -> dict[str, Any]:
    """The forward's arguments with the explained inputs replaced: one row where the program allows it and the reference
    has one, else as many as the inputs have."""
    parts = reference.by_input(manifest.inputs, manifest.explained)
    numbers = {name: part.numbers(name, arguments[name]) for name, part in parts.items()}
    one = manifest.reference == "row" and all(array.ndim and len(array) == 1 for array in numbers.values())
    found = dict(arguments)
    for name, array in numbers.items():
        shape = tuple(int(size) for size in arguments[name].shape)
        wide = array if one else np.broadcast_to(array, shape)
        found[name] = engine.like(wide, arguments[name])
    return found


def reference_key(manifest: Manifest, reference: Reference, arguments: Mapping[str, Any], weights: object
                  ) -> object | None:
    """What the activations at a reference depend on; None where that is the input itself."""
    if not reference.fixed:
        return None
    others = hashlib.blake2b()
    for name, value in arguments.items():
        if name not in manifest.explained:
            others.update(name.encode() + as_numpy(value).tobytes())
    # A reference of one row is the same for every batch: its number of rows then does not count.
    first = 1 if manifest.reference == "row" and _single(reference) else 0
    shapes = tuple((name, tuple(map(int, value.shape))[first:] if name in manifest.explained else tuple(
        map(int, value.shape))) for name, value in arguments.items())
    return reference.digest, others.digest(), shapes, weights


def _single(reference: Reference) -> bool:
    """Whether a fixed reference has one row."""
    if reference.parts:
        return all(_single(part) for part in reference.parts.values())
    return reference.array is None or (reference.array.ndim > 0 and len(reference.array) == 1)


def at_reference(manifest: Manifest, results: Sequence[Any], explained: Array) -> AtReference:
    """What is kept of a forward pass on the reference. InputError where the model gives no finite output there."""
    if not np.isfinite(explained).all():
        raise InputError(f"`{manifest.output}` is NaN or infinite at the reference", where="reference",
                         hint="differences to it would mean nothing; choose another reference")
    count = len(manifest.references)
    return AtReference(explained, tuple(results[len(results) - count:]))


def reference_values(manifest: Manifest, found: AtReference, batch: int, engine: Engine) -> tuple[Any, ...]:
    """The activations at the reference for a batch: those of one row stand for all."""
    return tuple(engine.rows(value, batch) if by_row and batch != 1 else value
                 for value, by_row in zip(found.values, manifest.references, strict=True))


def differences_of(seeds: Array, output: Array, reference: Array, *, signed: bool) -> Array:
    """Seeds [S, *output] of the difference of an output to the reference, from those of the output itself.

    A seed weights outputs y: what is explained is f = sum(w y) of a row. `signed`: for rules that divide by differences
    the relevance of y is w dy / |df|, so that it sums to the sign of df. Where there is no difference it is 0.
    """
    change = np.broadcast_to(output - reference, output.shape)
    if not signed:
        plain: Array = np.where(change == 0, 0, seeds).astype(np.float32)
        return plain
    inner = tuple(range(2, seeds.ndim))
    total = np.abs(seeds).max(inner, keepdims=True, initial=0.0)  # the multiplier, and its sign aside
    parts = (seeds / np.where(total == 0, 1, total)).astype(np.float64) * change
    size = np.abs(parts.sum(inner, keepdims=True))
    least = 1e-6 * np.abs(parts).max(inner, keepdims=True, initial=0.0)
    size = np.maximum(size, least)
    found: Array = (total * np.divide(parts, size, out=np.zeros_like(parts), where=size > 0)).astype(np.float32)
    return found
