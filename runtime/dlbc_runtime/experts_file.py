"""Experts in files: their arrays as `experts/NUMBER.NAME`, and what each layer is among the description."""

from __future__ import annotations

from collections.abc import Mapping

from dlbc_runtime.arrays import Array, Arrays, Json
from dlbc_runtime.experts import ExpertLayer, Experts, ExpertSpec

GROUP = "experts"
_KINDS = {"ids": "iu", "weights": "f", "relevance": "f", "shared": "f"}


def arrays_of(experts: Experts | None) -> dict[str, Array]:
    """The arrays to write, by `group/name`."""
    layers = experts.layers if experts is not None else ()
    return {f"{GROUP}/{number}.{name}": getattr(layer, name)
            for number, layer in enumerate(layers) for name in layer.arrays}


def described(experts: Experts | None) -> dict[str, Json]:
    """What each layer is, as a part of the description; nothing for a model without experts."""
    return {} if experts is None else {GROUP: [layer.spec.to_json() for layer in experts.layers]}


def experts_of(stored: Mapping[str, Json], arrays: Mapping[str, Array], *, many: bool) -> Experts | None:
    """The experts that were written; None where there are none. ValueError where they do not fit."""
    specs = stored.get(GROUP)
    if specs is None and not arrays:
        return None
    if not isinstance(specs, list):
        raise ValueError("the layers of experts are not described")
    by_layer: dict[str, dict[str, Array]] = {str(number): {} for number in range(len(specs))}
    for key, array in arrays.items():
        number, _, name = key.partition(".")
        if number not in by_layer or name not in _KINDS or array.dtype.kind not in _KINDS[name]:
            raise ValueError(f"unknown array 'experts/{key}'")
        by_layer[number][name] = array
    layers = []
    for spec, own in zip(specs, by_layer.values(), strict=True):
        if not {"ids", "weights", "relevance"} <= set(own):
            raise ValueError("arrays of experts are missing")
        layers.append(ExpertLayer(ExpertSpec.from_json(spec), Arrays(own), many))
        layers[-1].check()
    return Experts(tuple(layers))
