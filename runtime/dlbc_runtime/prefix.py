"""Causal models: what stands after the last explained position has no part in it, so it is not computed.

The compiler proves which models are causal (`Manifest.causal`). Relevance of what is left out is 0, exactly, and which
experts it would be routed to is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dlbc_runtime.arrays import Array, Arrays
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.program import Manifest
from dlbc_runtime.signature import TensorSpec

if TYPE_CHECKING:
    from dlbc_runtime.call import Call


def shortened(call: Call, manifest: Manifest) -> Call:
    """The call up to the last position that any target explains in any row; the call itself where that is the whole.

    Its targets name their positions, which would otherwise be counted from another end.
    """
    if not manifest.causal or not manifest.positions or manifest.nodes or call.reference is not None:
        return call
    length, columns = call.columns(manifest)
    sizes, conditions = manifest.inputs.sizes or {}, manifest.inputs.conditions
    wanted = max(int(columns.max()) + 1, sizes.get(manifest.causal, (1, 0))[0])
    whole = [_axes(spec, manifest.causal) for spec in manifest.inputs.tensors]
    if wanted >= length or any(manifest.causal in condition for condition in conditions) or None in whole:
        return call
    axes = {spec.name: found for spec, found in zip(manifest.inputs.tensors, whole, strict=True) if found is not None}
    return replace(call, inputs={name: value[_first(axes[name], wanted)] for name, value in call.inputs.items()},
                   targets=tuple(replace(target, position=tuple(own.tolist()))
                                 for target, own in zip(call.targets, columns, strict=True)))


def lengthened(found: Explanation, call: Call, manifest: Manifest) -> Explanation:
    """The explanation of a shortened call for the whole inputs: relevance 0 of what was left out."""
    specs = {spec.name: spec for spec in manifest.inputs.tensors}

    def whole(arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        return Arrays({name: _filled(array, call.inputs[name], int(call.many)) if _axes(specs[name], manifest.causal)
                       else array for name, array in arrays.items()})

    length = next(call.inputs[spec.name].shape[axes[0]] for spec in manifest.inputs.tensors
                  if (axes := _axes(spec, manifest.causal)))
    return replace(found, inputs=Arrays(call.inputs), relevance=whole(found.relevance), positive=whole(found.positive),
                   negative=whole(found.negative),
                   experts=None if found.experts is None else found.experts.lengthened(length))


def _axes(spec: TensorSpec, size: str) -> tuple[int, ...] | None:
    """The axes of an input that have a size; None where one depends on it in another way."""
    names = [str(dim) for dim in spec.shape]
    if any(size in name and size != name for name in names):
        return None
    return tuple(axis for axis, name in enumerate(names) if name == size)


def _first(axes: tuple[int, ...], count: int) -> tuple[slice, ...]:
    return tuple(slice(0, count) if axis in axes else slice(None) for axis in range(max(axes, default=-1) + 1))


def _filled(array: Array, like: Any, lead: int) -> Array:
    """The array with zeros up to the shape of an input; `lead` axes stand before it."""
    after = [(0, 0)] * lead + [(0, size - own) for size, own in zip(like.shape, array.shape[lead:], strict=True)]
    return np.pad(array, after)
