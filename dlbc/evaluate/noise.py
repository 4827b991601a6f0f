"""Input sensitivity: how far does a map move when the input hardly does?

`max over draws of |m(x + noise) - m(x)|` with m the map divided by its norm (methods have different scales), and noise
uniform within `radius` standard deviations of the input's elements (max-sensitivity, Yeh et al. 2019). Low is good only
together with low target sensitivity: a map that never changes is perfectly stable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dlbc.errors import InputError
from dlbc.evaluate.items import Item
from dlbc.evaluate.methods import Several
from dlbc.evaluate.progress import followed
from dlbc.evaluate.report import Report, Result
from dlbc.evaluate.setting import maps_of, methods_of, scene_of
from dlbc.evaluate.units import Units
from dlbc_runtime.arrays import Array

if TYPE_CHECKING:
    import torch


def input_sensitivity(model: torch.nn.Module, items: object, methods: Several, *, targets: Sequence[int] | None = None,
                      units: str | Units = "auto", radius: float = 0.05, draws: int = 8, controls: bool = False,
                      seed: int = 0, data: str = "", progress: bool = False) -> Report:
    """The largest change of the direction of each map (`sensitivity`, 0 to 2) over `draws` slightly changed copies.

    What is explained stays the target of the unchanged input. NaN where the map is 0. The other parameters are those
    of `faithfulness`. InputError for tokens: an id has no small change.
    """
    from dlbc.evaluate.running import look

    if draws < 1 or not radius > 0:
        raise InputError(f"{draws} draws within {radius}", where="input_sensitivity",
                         hint="give at least one draw and a radius above 0")
    scene = scene_of(model, items, targets, units)
    if not scene.units.value(scene.items[0]).is_floating_point():
        raise InputError("a token has no small change: its id is a name, not an amount", where="input_sensitivity",
                         hint="this is for pictures and features; for texts see target_sensitivity and randomisation")
    chosen = methods_of(methods, scene, controls)
    found: dict[str, list[float]] = {one.name: [] for one in chosen}
    with followed("shaking inputs", range(len(scene.items)), progress) as numbers:
        for number in numbers:
            item = scene.items[number]
            target = look(scene.model, item).target
            shaken = [_shaken(scene.units, item, radius, np.random.default_rng((seed, number, draw)))
                      for draw in range(draws)]
            for method in chosen:
                own, change = _direction(maps_of(method, scene, item, [target])[0]), 0.0
                for one in shaken:
                    there = replace(scene, items=(*scene.items[:number], one, *scene.items[number + 1:]))
                    change = max(change, float(np.linalg.norm(
                        _direction(maps_of(method, there, one, [target])[0]) - own)))
                found[method.name].append(change if own.any() else math.nan)
    return Report(tuple(Result(data, one.name, "sensitivity", tuple(found[one.name]), f"noise of {radius:g} deviations",
                               "lower", one.control) for one in chosen), (),
                  {"items": len(scene.items), "units": scene.units.kind, "radius": radius, "draws": draws,
                   "seed": seed})


def _direction(relevance: Array) -> Array:
    """The map divided by its norm; one that is 0 as it is."""
    size = float(np.linalg.norm(relevance))
    return relevance / size if size else relevance


def _shaken(units: Units, item: Item, radius: float, generator: np.random.Generator) -> Item:
    """The item with noise on its explained input; where that does not vary at all, noise is relative to 1."""
    import torch

    key, value = units.key(item), units.value(item)
    spread = float(value.cpu().double().std(correction=0)) or 1.0
    noise = torch.as_tensor(generator.uniform(-radius * spread, radius * spread, tuple(value.shape))).to(value)
    return item.with_input(key, value + noise)
