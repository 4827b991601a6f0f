"""Measuring one method on one set: areas, target sensitivity, conservation, known answers, cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from benchmarks._measure import input_gradient, interleaved
from benchmarks.faithfulness.arithmetic import flops
from benchmarks.faithfulness.dataset import DataSet
from benchmarks.faithfulness.methods import Explained, Measured, method_for
from dlbc.evaluate import Item, rank_correlation
from dlbc.evaluate.methods import Scene
from dlbc.evaluate.perturbation import Watch
from dlbc.evaluate.running import gradients
from dlbc_runtime.arrays import Array, Json

SCORE = "probability"
SENSITIVE, LEDGERS, TIMED = 40, 6, 5
"""Items on which target sensitivity and conservation are measured, and turns of the clock."""

Record = dict[str, Json]


class Scores:
    """Scores of perturbed items of a set. Each state is run once, whichever methods come to it: the ends of a curve are
    the same for all, and methods that order alike are alike."""

    def __init__(self, data: DataSet) -> None:
        self.scene = Scene(data.model, data.items, data.units)
        self.watches = {fill.name: Watch(self.scene, fill, SCORE, data.batch) for fill in data.fills}
        self.known: dict[tuple[str, int, bytes], float] = {}

    def of(self, fill: str, number: int, target: int, gone: Array) -> Array:
        """Float64 [K] of an item with the units `gone` taken away, bool [K, units]."""
        keys = [(fill, number, np.packbits(row).tobytes()) for row in gone]
        new = {key: row for key, row in zip(keys, gone, strict=True) if key not in self.known}
        if new:
            scores = self.watches[fill].scores(number, target, np.stack(list(new.values())))
            self.known |= dict(zip(new, map(float, scores), strict=True))
        return np.array([self.known[key] for key in keys])


def measure(data: DataSet, name: str, scores: Scores, tick: Callable[[], None] = lambda: None) -> Record:
    """The record of a method: lists have one value for each item, in the order of the set's items. `tick` is called
    after each item. DlbcError when the method does not work on the model, ArithmeticError for maps that are not finite.
    """
    started = time.perf_counter()
    method = method_for(name, data)
    compiled = time.perf_counter()
    scene = scores.scene
    areas: dict[str, list[float]] = {fill: [] for fill in scores.watches}
    sensitive: dict[str, list[float]] = {"sr": [], "rr": []}
    hits: list[float] = []
    seconds = 0.0
    for number, item in enumerate(data.items):
        assert item.target is not None
        others = _others(data, item, number) if number < SENSITIVE and not method.control else []
        begun = time.perf_counter()
        maps = np.asarray(method.maps(scene, item, [item.target, *others]), np.float64)
        seconds += time.perf_counter() - begun
        if not np.isfinite(maps).all():
            raise ArithmeticError(f"relevance of item {number} is not finite")
        for fill, own_areas in areas.items():
            own_areas.append(_area(scores, fill, number, item.target, maps[0], data.steps))
        if others:
            own, *rest = maps
            sensitive["sr"].append(float(np.mean([rank_correlation(own, one) for one in rest])))
            sensitive["rr"].append(rank_correlation(*rest) if len(rest) == 2 else float("nan"))
        if data.truth:
            hits.append(_hit(scene, item, maps[0], data.truth[number]))
        tick()
    record: Record = {"area": _rounded(areas), **{key: _rounded(values) for key, values in sensitive.items() if values},
                      **({"pointing": _rounded(hits)} if hits else {})}
    if isinstance(method, Explained):
        record |= {"conservation": _conservation(method, data), "rules": method.explainer.rules().reason}
    if not method.control:
        record["cost"] = _cost(method, data, scene)
    return record | {"seconds": {"compiling": round(compiled - started, 1), "explaining": round(seconds, 1),
                                 "all": round(time.perf_counter() - started, 1)}}


def _area(scores: Scores, fill: str, number: int, target: int, relevance: Array, steps: int) -> float:
    """Between the curves of least and of most relevant units first, over the fraction of units gone."""
    count = len(relevance)
    gone = np.unique(np.round(np.linspace(0, count, min(steps, count) + 1)).astype(int))
    order = np.lexsort((np.random.default_rng((1, number)).random(count), -relevance))
    rank = np.empty(count, int)
    rank[order] = np.arange(count)
    both = np.concatenate([rank < gone[:, None], (count - 1 - rank) < gone[:, None]])
    most, least = scores.of(fill, number, target, both).reshape(2, len(gone))
    return float(np.trapezoid(least - most, gone / count))


def _others(data: DataSet, item: Item, number: int) -> list[int]:
    """Two targets drawn at random, the same for all methods; fewer where there are no more classes."""
    from dlbc.evaluate.running import look

    count = len(look(data.model, item).outputs)
    rest = np.array([one for one in range(count) if one != item.target])
    return [int(one) for one in np.random.default_rng((2, number)).choice(rest, min(2, len(rest)), replace=False)]


def _hit(scene: Scene, item: Item, relevance: Array, truth: tuple[int, ...]) -> float:
    """1 where the most relevant token is one that decides the answer."""
    return float(bool(np.isin(np.flatnonzero(scene.units.members(item) == int(relevance.argmax())), truth).any()))


def _conservation(method: Explained, data: DataSet) -> Json:
    """Of the first items: what arrives at the inputs by the seed, and the largest amount that no ledger row accounts
    for by the amounts in play (`Ledger.closes` asks for at most 1e-4)."""
    shares: list[float] = []
    residuals: list[float] = []
    for item in data.items[:LEDGERS]:
        assert item.target is not None
        ledger = method.explain(item.inputs, item.target).conservation()
        scale = ledger.size or 1.0
        shares.append(ledger.at_inputs / (ledger.seed or 1.0))
        residuals.append(max([abs(ledger.residual) / scale,
                              *(abs(row.residual) / max(row.size, scale) for row in ledger.rows)]))
    return {"at inputs": _rounded(shares), "residual": _rounded(residuals)}


def _cost(method: Measured, data: DataSet, scene: Scene) -> Json:
    """Time and arithmetic (FLOPs of matrix products, convolutions and attention) of a map, by those of plain forward
    and input-gradient. Nets on single small tensors are timed in batches, for their time is all overhead otherwise."""
    item = sorted(data.items, key=lambda one: data.units.value(one).numel())[len(data.items) // 2]
    assert item.target is not None
    target, key = item.target, data.units.key(item)

    def plain() -> object:
        return gradients(data.model, item, key, None, [target])

    def explained() -> object:
        return method.maps(scene, item, [target])

    cases: dict[str, Callable[[], object]] = {"plain": plain, "map": explained}
    if isinstance(method, Explained) and isinstance(item.inputs, torch.Tensor) and data.kind != "lm":
        batch = torch.cat([one.inputs for one in data.items[:4 if item.inputs.numel() > 10_000 else 32]])
        cases = {"plain": lambda: input_gradient(data.model, batch),
                 "map": lambda: dict(method.explainer(batch, reference=method.reference or None).relevance)}
    seconds = interleaved(cases, runs=TIMED, warmup=1)
    ratio = statistics.median(a / b for a, b in zip(seconds["map"], seconds["plain"], strict=True))
    counted = {name: flops(case) for name, case in cases.items()}
    return {"time": round(ratio, 2), "flops": round(counted["map"] / counted["plain"], 3) if counted["plain"] else None}


def _rounded(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _rounded(value) for key, value in values.items()}
    return [None if not np.isfinite(value) else float(f"{value:.4g}") for value in values]
