"""What every measurement starts with: items, units, methods and the model in eval mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dlbc.errors import InputError
from dlbc.evaluate.items import Item, as_items
from dlbc.evaluate.methods import Method, Scene, Several, as_methods
from dlbc.evaluate.units import Units, units_for
from dlbc_runtime.arrays import Array

if TYPE_CHECKING:
    import torch


def scene_of(model: torch.nn.Module, given: object, targets: Sequence[int] | None, units: str | Units) -> Scene:
    """The model in eval mode, the items and their units. InputError where they do not fit together."""
    from dlbc.evaluate.running import in_eval

    items = as_items(given, targets)
    scene = Scene(in_eval(model), items, units_for(units, items[0]))
    for item in items:
        scene.units.members(item)
    return scene


def methods_of(given: Several, scene: Scene, controls: bool) -> list[Method]:
    """The methods, and with `controls` the controls of the units."""
    return as_methods(given, scene, controls=controls)


def maps_of(method: Method, scene: Scene, item: Item, targets: Sequence[int]) -> Array:
    """The maps of a method, float64 [targets, units], checked: InputError for another shape, NaN or infinity."""
    found = np.asarray(method.maps(scene, item, targets), np.float64)
    wanted = (len(targets), scene.units.count(item))
    if found.shape != wanted:
        raise InputError(f"maps have shape {list(found.shape)}", where=method.name,
                         hint=f"{wanted[0]} targets and {wanted[1]} units: {list(wanted)}")
    if not np.isfinite(found).all():
        raise InputError("relevance holds NaN or infinity", where=method.name,
                         hint="its rules divide by 0 on this model; choose others, or a larger stabiliser")
    return found
