"""The parameter randomisation check: a map that stays when the weights are shuffled does not explain the model.

A copy of the model loses what it learned, layer by layer from the output down: the numbers of each weight are
shuffled, which keeps their distribution (Adebayo et al. 2018 draw them anew). After each stage the maps are made anew
and compared with the original ones. The rank correlation should fall towards 0; edge detectors and other functions of
the input alone stay at 1.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dlbc.errors import InputError
from dlbc.evaluate.methods import Method, Scene, Several, per_model
from dlbc.evaluate.progress import followed
from dlbc.evaluate.report import Better, Curve, Report, Result
from dlbc.evaluate.setting import maps_of, methods_of, scene_of
from dlbc.evaluate.statistics import rank_correlation
from dlbc.evaluate.units import Units
from dlbc_runtime.arrays import Array

if TYPE_CHECKING:
    import torch

METRICS: dict[str, Better] = {"randomised": "lower", "randomised |map|": "lower"}


def randomisation(model: torch.nn.Module, items: object, methods: Several, *, targets: Sequence[int] | None = None,
                  units: str | Units = "auto", stages: int = 1, controls: bool = False, seed: int = 0, data: str = "",
                  progress: bool = False) -> Report:
    """Rank correlation of the original maps with those of a copy of the model with shuffled weights.

    `stages`: the layers are shuffled in so many steps from the output down, of equal numbers of layers; 1: all at once.
    Results are of the last stage, signed (`randomised`) and of absolute relevance (`randomised |map|`); the curve
    `randomisation` has every stage. NaN where a map is constant.

    Methods that need rules are compiled for every stage, so give them by name or as a `Composite`; an explainer that is
    compiled already holds the weights of its own model and is an InputError. The user's model is only copied.
    The other parameters are those of `faithfulness`.
    """
    from dlbc.evaluate.running import look

    if stages < 1:
        raise InputError(f"{stages} stages", where="randomisation", hint="give at least 1")
    scene = scene_of(model, items, targets, units)
    chosen = methods_of(methods, scene, controls)
    for method in chosen:
        if not per_model(method):
            raise InputError(f"`{method.name}` is compiled for the model as it is", where="randomisation",
                             hint='give the name of its rules, e.g. "attnlrp", or its Composite, to be compiled for '
                                  "every randomised copy")
    explained = [look(scene.model, item).target for item in scene.items]
    original = _maps(chosen, scene, explained)
    broken = copy.deepcopy(scene.model)
    layers = layers_from_the_top(broken, scene)
    stages = min(stages, len(layers))
    generator = np.random.default_rng(seed)
    shuffled: set[int] = set()
    similar = [{one.name: np.ones((len(scene.items), 2)) for one in chosen}]
    with followed("randomising", range(stages), progress) as numbers:
        for stage in numbers:
            for layer in layers[len(layers) * stage // stages:len(layers) * (stage + 1) // stages]:
                shuffle(layer, generator, shuffled)
            maps = _maps(chosen, Scene(copy.deepcopy(broken), scene.items, scene.units), explained)
            similar.append({name: np.array([[rank_correlation(a, b), rank_correlation(abs(a), abs(b))]
                                            for a, b in zip(original[name], found, strict=True)])
                            for name, found in maps.items()})
    how, grid = f"shuffled weights, {stages} stage{'s' * (stages > 1)}", np.linspace(0, 1, stages + 1)
    results = [Result(data, one.name, metric, tuple(map(float, similar[-1][one.name][:, column])), how, better,
                      one.control) for one in chosen for column, (metric, better) in enumerate(METRICS.items())]
    curves = [Curve(data, one.name, "randomisation", tuple(map(float, grid)), tuple(
        tuple(float(stage[one.name][row, 0]) for stage in similar) for row in range(len(scene.items))), how,
        one.control) for one in chosen]
    return Report(tuple(results), tuple(curves), {"items": len(scene.items), "units": scene.units.kind,
                                                  "stages": stages, "layers": len(layers), "seed": seed})


def layers_from_the_top(model: torch.nn.Module, scene: Scene) -> list[torch.nn.Module]:
    """Modules with weights of their own that run for the first item, the last to run first. Hooks `model`, a copy."""
    from dlbc.evaluate.running import outputs

    order: dict[int, torch.nn.Module] = {}

    def ran(module: torch.nn.Module, *_: Any) -> None:
        order.pop(id(module), None)
        order[id(module)] = module

    hooks = [module.register_forward_hook(ran) for module in model.modules()
             if next(module.parameters(recurse=False), None) is not None]
    try:
        outputs(model, *scene.items[0].call())
    finally:
        for hook in hooks:
            hook.remove()
    if not order:
        raise InputError("no module of the model has weights and runs", where="randomisation",
                         hint="this check is for models of modules with weights")
    return list(order.values())[::-1]


def shuffle(layer: torch.nn.Module, generator: np.random.Generator, done: set[int]) -> None:
    """Shuffle the numbers of each weight of a layer in place; weights in `done` (shared ones) are left."""
    import torch

    for weight in layer.parameters(recurse=False):
        if id(weight) not in done:
            done.add(id(weight))
            order = torch.as_tensor(generator.permutation(weight.numel()), device=weight.device)
            with torch.no_grad():
                weight.copy_(weight.reshape(-1)[order].reshape(weight.shape))


def _maps(methods: Sequence[Method], scene: Scene, targets: Sequence[int]) -> dict[str, list[Array]]:
    return {method.name: [maps_of(method, scene, item, [target])[0]
                          for item, target in zip(scene.items, targets, strict=True)] for method in methods}
