"""Faithfulness: perturb units in the order of their relevance, and watch the score of what was explained.

With f(k) the score when the k most relevant units are gone and g(k) when the k least relevant are (Samek et al. 2017):

- area: mean of g - f over the fraction of units that are gone. 0 for an order by chance; higher is better;
- deletion, insertion: the areas under f and g. (Insertion puts the most relevant units into the empty input first;
  its states are those of g from the other end, hence the same area. Petsiuk et al. 2018);
- aopc: mean over the steps of f(0) - f(k);
- comprehensiveness: f(0) - f(k), sufficiency: f(0) - g(n - k) (only the k most relevant are left), each the mean over
  k = 1, 5, 10, 20 and 50 % of the units, rounded up (DeYoung et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dlbc.errors import InputError
from dlbc.evaluate.fills import Fill, fill_for
from dlbc.evaluate.methods import Method, Scene, Several
from dlbc.evaluate.progress import followed
from dlbc.evaluate.report import Better, Curve, Report, Result
from dlbc.evaluate.scores import Score, check_score, score_named
from dlbc.evaluate.setting import maps_of, methods_of, scene_of
from dlbc.evaluate.units import Tokens, Units
from dlbc_runtime.arrays import Array

if TYPE_CHECKING:
    import torch

ERASER = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Fractions of units at which comprehensiveness and sufficiency are taken."""

METRICS: dict[str, Better] = {"area": "higher", "comprehensiveness": "higher", "sufficiency": "lower", "aopc": "higher",
                              "deletion": "lower", "insertion": "higher"}
"""What `faithfulness` measures, and which way is better."""


def faithfulness(model: torch.nn.Module, items: object, methods: Several, *, targets: Sequence[int] | None = None,
                 units: str | Units = "auto", fill: str | Fill = "auto", score: str = "probability", steps: int = 20,
                 controls: bool = True, batch: int = 32, data: str = "", progress: bool = False) -> Report:
    """Perturbation curves and their areas for each method, on the same items, targets and fills.

    `items`: a batched tensor (each row an item), a mapping of batched tensors, or a list of inputs or `Item`s.
    `methods`: one, several, or a mapping by name: explainers, presets by name, baselines by name, functions
    (`dlbc.evaluate.methods`). `targets`: what to explain of each item; default: what the model predicts.
    `units`: "auto", "tokens", "patches", "features", or `Tokens(...)`, `Patches(...)`, `Segments(...)`.
    `fill`: what takes the place of units, by name or a `Fill` (`dlbc.evaluate.fills`).
    `score`: probability, log_probability, centred_logit, sigmoid or output. `steps`: points of a curve after the
    first, at equal fractions of the units. `controls`: also measure random order, latest or centre first.
    `batch`: perturbed copies per run of the model. `data`: a name of the data set, for the report. `progress`: show
    a bar on stderr where it is a terminal.

    Units of equal relevance are ordered by chance, the same for all methods. InputError for inputs that do not fit.
    The model, its mode, its hooks and torch's random numbers are left as they are.
    """
    if steps < 1 or batch < 1:
        raise InputError(f"{steps} steps, batches of {batch}", where="faithfulness", hint="give at least 1")
    score_named(score)
    scene = scene_of(model, items, targets, units)
    filling = fill_for(fill, scene.units, scene.items)
    if filling.name == "delete":
        scene = _with_something_left(scene, named=isinstance(units, str))
    watch = Watch(scene, filling, score, batch)
    chosen = methods_of(methods, scene, controls)
    measured: list[list[_Measured]] = []
    with followed("perturbing", range(len(scene.items)), progress) as numbers:
        measured = [watch.measure(number, chosen, steps) for number in numbers]
    how = f"{watch.fill.name}, {score.replace('_', ' ')}"
    grid = tuple(float(place) for place in np.linspace(0, 1, steps + 1))
    results, curves = [], []
    for place, method in enumerate(chosen):
        own = [of_item[place] for of_item in measured]
        results += [Result(data, method.name, metric, tuple(one.metrics[metric] for one in own), how, better,
                           method.control) for metric, better in METRICS.items()]
        curves += [Curve(data, method.name, name, grid, tuple(getattr(one, name).at(grid) for one in own), how,
                         method.control) for name in ("morf", "lerf")]
    return Report(tuple(results), tuple(curves), {
        "items": len(scene.items), "units": scene.units.kind, "fill": watch.fill.name, "score": score, "steps": steps})


def _with_something_left(scene: Scene, *, named: bool) -> Scene:
    """The scene, with the last token of each item protected if one item has none that is. (Of units that the user made,
    it is the user who says which.)"""
    if all((scene.units.members(item) < 0).any() for item in scene.items):
        return scene
    if not named or not isinstance(scene.units, Tokens):
        raise InputError("with all tokens deleted nothing is left for the model to read", where="fill",
                         hint="protect one: Tokens(special=tokenizer.all_special_ids), or Tokens(last=1)")
    kept = replace(scene, units=replace(scene.units, last=1))
    for item in kept.items:
        kept.units.members(item)
    return kept


@dataclass(frozen=True, eq=False)
class _Points:
    """A curve of one item: scores float64 [points] where so many of its units are gone."""

    gone: Array
    scores: Array

    @property
    def fractions(self) -> Array:
        found: Array = self.gone / self.gone[-1]
        return found

    def area(self) -> float:
        """Under the curve, by trapezia, over the fraction of units."""
        return float(np.trapezoid(self.scores, self.fractions))

    def at(self, grid: Sequence[float]) -> tuple[float, ...]:
        """The curve at other fractions, between its points in straight lines."""
        return tuple(float(score) for score in np.interp(grid, self.fractions, self.scores))


@dataclass(frozen=True, eq=False)
class _Measured:
    """What one method reached on one item."""

    morf: _Points
    lerf: _Points
    metrics: dict[str, float]


@dataclass(frozen=True, eq=False)
class Watch:
    """Scores of perturbed copies of the items of a scene."""

    scene: Scene
    fill: Fill
    score: str
    batch: int

    def scores(self, number: int, target: int, gone: Array) -> Array:
        """Scores float64 [K] of item `number` with the units `gone` filled, bool [K, units]. Equal copies run once."""
        from dlbc.evaluate.running import outputs

        distinct, place = np.unique(gone, axis=0, return_inverse=True)
        members = self.scene.units.members(self.scene.items[number])
        elements = np.concatenate([distinct, np.zeros((len(distinct), 1), bool)], 1)[:, members]
        found = np.empty(len(distinct))
        score: Score = score_named(self.score)
        for copies in self.fill.copies(self.scene.units, self.scene.items, number, elements, self.batch):
            found[copies.rows] = score(outputs(self.scene.model, copies.args, copies.kwargs, ids=copies.ids,
                                               kept=copies.kept), target)
        if not np.isfinite(found).all():
            raise InputError("scores of perturbed inputs hold NaN or infinity", where=f"item {number}",
                             hint="choose another fill or score")
        return np.asarray(found[place.ravel()])

    def measure(self, number: int, methods: Sequence[Method], steps: int) -> list[_Measured]:
        """All methods on one item."""
        from dlbc.evaluate.running import look

        item = self.scene.items[number]
        seen = look(self.scene.model, item)
        check_score(self.score, outputs=len(seen.outputs), language_model=seen.language_model)
        count = self.scene.units.count(item)
        places = np.unique(np.round(np.linspace(0, count, steps + 1)).astype(int))
        few = np.array([max(1, math.ceil(fraction * count - 1e-9)) for fraction in ERASER])
        numbers = np.unique(np.concatenate([places, few, count - few]))
        ties = np.random.default_rng((1, number)).random(count)
        gone = []
        for method in methods:
            relevance = maps_of(method, self.scene, item, [seen.target])[0]
            order = np.lexsort((ties, -relevance))
            for way in (order, order[::-1]):
                rank = np.empty(count, int)
                rank[way] = np.arange(count)
                gone.append(rank < numbers[:, None])
        scores = self.scores(number, seen.target, np.concatenate(gone)).reshape(len(methods), 2, len(numbers))
        return [_measured(numbers, most, least, places, few) for most, least in scores]


def _measured(numbers: Array, most: Array, least: Array, places: Array, few: Array) -> _Measured:
    """Metrics from the scores with so many of the most, and of the least, relevant units gone."""
    at = {int(number): place for place, number in enumerate(numbers)}

    def of(scores: Array, wanted: Array) -> Array:
        return scores[[at[int(number)] for number in wanted]]

    morf, lerf = _Points(places, of(most, places)), _Points(places, of(least, places))
    whole = float(most[0])
    return _Measured(morf, lerf, {
        "area": lerf.area() - morf.area(), "comprehensiveness": whole - float(of(most, few).mean()),
        "sufficiency": whole - float(of(least, numbers[-1] - few).mean()), "aopc": whole - float(morf.scores.mean()),
        "deletion": morf.area(), "insertion": lerf.area()})
