"""Target sensitivity: does a map depend on what it explains?

Rank correlation of the maps of one item for two targets; 1 means that the map is the same whatever is explained.
`sr` compares the item's own target (what the model says) with targets drawn at random, `rr` two of those with each
other. Both matter: a seed such as "the target rather than all others" gives every other target the same map, the
negative of the own one, and then only `rr` shows it. (After Sixt et al. 2020, "When explanations lie".)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from dlbc.errors import InputError
from dlbc.evaluate.methods import Several
from dlbc.evaluate.progress import followed
from dlbc.evaluate.report import Better, Report, Result
from dlbc.evaluate.setting import maps_of, methods_of, scene_of
from dlbc.evaluate.statistics import mean, rank_correlation
from dlbc.evaluate.units import Units

if TYPE_CHECKING:
    import torch

METRICS: dict[str, Better] = {"sr": "lower", "rr": "lower"}


def target_sensitivity(model: torch.nn.Module, items: object, methods: Several, *, targets: Sequence[int] | None = None,
                       units: str | Units = "auto", others: int = 2, controls: bool = False, seed: int = 0,
                       data: str = "", progress: bool = False) -> Report:
    """Rank correlation of maps for different targets: `sr`, own against random, and `rr`, random against random.

    Means over `others` random targets (and their pairs) for each item, drawn from `seed`, the same for all methods.
    NaN, and left out of the mean, where there are not enough other targets or a map is constant. The other parameters
    are those of `faithfulness`. InputError for a model with one output, and for inputs that do not fit.
    """
    from dlbc.evaluate.running import look

    if others < 1:
        raise InputError(f"{others} other targets", where="target_sensitivity", hint="give at least 1, better 2")
    scene = scene_of(model, items, targets, units)
    chosen = methods_of(methods, scene, controls)
    found: dict[tuple[str, str], list[float]] = {(one.name, metric): [] for one in chosen for metric in METRICS}
    with followed("comparing targets", range(len(scene.items)), progress) as numbers:
        for number in numbers:
            item = scene.items[number]
            seen = look(scene.model, item)
            rest = np.delete(np.arange(len(seen.outputs)), seen.target)
            if not rest.size:
                raise InputError("the model has one output: there is no other target", where="target_sensitivity",
                                 hint="this is for models with several classes, tokens or outputs")
            drawn = np.random.default_rng((seed, number)).choice(rest, min(others, len(rest)), replace=False)
            for method in chosen:
                own, *random = maps_of(method, scene, item, [seen.target, *map(int, drawn)])
                found[method.name, "sr"].append(mean(np.array([rank_correlation(own, one) for one in random])))
                pairs = [rank_correlation(one, other) for one, other in combinations(random, 2)]
                found[method.name, "rr"].append(mean(np.array(pairs)))
    results = tuple(Result(data, one.name, metric, tuple(found[one.name, metric]), "rank correlation of two targets",
                           better, one.control) for one in chosen for metric, better in METRICS.items())
    return Report(results, (), {"items": len(scene.items), "units": scene.units.kind, "others": others, "seed": seed})
