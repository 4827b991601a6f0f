"""Baselines in plain torch, and controls: maps that explain nothing and that a method must beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlbc.errors import InputError
from dlbc.evaluate.items import Item
from dlbc.evaluate.methods import Method, Scene
from dlbc.evaluate.units import Tokens
from dlbc_runtime.arrays import Array


@dataclass(frozen=True, eq=False)
class _Random:
    seed: int
    name: str = "random"
    control = True

    def maps(self, scene: Scene, item: Item, targets: Sequence[int]) -> Array:
        count, number = scene.units.count(item), scene.number(item)
        return np.stack([np.random.default_rng((self.seed, number, int(target))).random(count) for target in targets])


@dataclass(frozen=True, eq=False)
class _LatestFirst:
    name: str = "latest first"
    control = True

    def maps(self, scene: Scene, item: Item, targets: Sequence[int]) -> Array:
        if not isinstance(scene.units, Tokens):
            raise InputError(f"{scene.units.kind} have no latest one", where=self.name, hint="it is for tokens")
        return np.tile(np.arange(scene.units.count(item), dtype=np.float64), (len(targets), 1))


@dataclass(frozen=True, eq=False)
class _CentreFirst:
    name: str = "centre first"
    control = True

    def maps(self, scene: Scene, item: Item, targets: Sequence[int]) -> Array:
        members = scene.units.members(item)
        if members.ndim != 3:
            raise InputError(f"{scene.units.kind} of an input [1, ...] with {members.ndim} axes have no centre",
                             where=self.name, hint="it is for pictures [1, C, H, W]")
        rows, columns = (np.arange(size) - (size - 1) / 2 for size in members.shape[1:])
        inside = members >= 0
        sizes = np.bincount(members[inside])
        middle = [np.bincount(members[inside], np.broadcast_to(place, members.shape)[inside]) / sizes
                  for place in (rows[:, None], columns)]
        return np.tile(-np.hypot(*middle), (len(targets), 1))


@dataclass(frozen=True, eq=False)
class _GradientTimesInput:
    name: str = "gradient x input"
    control = False

    def maps(self, scene: Scene, item: Item, targets: Sequence[int]) -> Array:
        from dlbc.evaluate.running import gradients

        value, slopes = gradients(scene.model, item, scene.units.key(item), None, targets)
        return _summed(scene, item, (slopes * value))


@dataclass(frozen=True, eq=False)
class _IntegratedGradients:
    steps: int
    baseline: Any
    name: str = "integrated gradients"
    control = False

    def maps(self, scene: Scene, item: Item, targets: Sequence[int]) -> Array:
        import torch

        from dlbc.evaluate.running import gradients

        key = scene.units.key(item)
        given = scene.units.value(item)
        value = given if given.is_floating_point() else gradients(scene.model, item, key, None, targets[:1])[0]
        start = torch.as_tensor(self.baseline).to(value).expand_as(value)
        places = (np.arange(self.steps) + 0.5) / self.steps
        total = sum(gradients(scene.model, item, key, start + float(place) * (value - start), targets)[1]
                    for place in places)
        return _summed(scene, item, (value - start) * total / self.steps)


def random(seed: int) -> Method:
    """Control: random relevance, drawn anew for every item and target from `seed`."""
    return _Random(int(seed))


def latest_first() -> Method:
    """Control: the later a token, the more relevant. Next-token predictions hang on the last words of the context."""
    return _LatestFirst()


def centre_first() -> Method:
    """Control: the nearer to the centre of the picture, the more relevant. Photographers put things there."""
    return _CentreFirst()


def gradient_x_input() -> Method:
    """`x * dy_t/dx`, by autograd; for tokens on the output of the embedding, summed over its elements."""
    return _GradientTimesInput()


def integrated_gradients(steps: int = 16, baseline: object = 0.0) -> Method:
    """`(x - x0) * mean of dy_t/dx on the straight line from x0 to x`, at the middles of `steps` equal parts.

    `baseline`: x0, a number or a tensor that broadcasts to the input [1, ...] (for tokens: to their embedding).
    Sundararajan et al. 2017.
    """
    if steps < 1:
        raise InputError(f"{steps} steps", where="integrated_gradients", hint="give at least 1")
    return _IntegratedGradients(int(steps), baseline)


NAMED: dict[str, Callable[[], Method]] = {
    "random": lambda: random(0), "latest first": latest_first, "centre first": centre_first,
    "gradient x input": gradient_x_input, "integrated gradients": integrated_gradients}
"""Baselines by name."""


def controls_for(scene: Scene, seed: int = 0) -> list[Method]:
    """The controls that make sense for the units."""
    found: list[Method] = [random(seed)]
    if isinstance(scene.units, Tokens):
        found.append(latest_first())
    elif scene.units.value(scene.items[0]).ndim == 4:
        found.append(centre_first())
    return found


@dataclass(frozen=True, eq=False)
class Renamed:
    """A method under another name."""

    name: str
    method: Method

    @property
    def control(self) -> bool:
        """Of the method."""
        return self.method.control

    def maps(self, scene: Scene, item: Item, targets: Sequence[int]) -> Array:
        """Of the method."""
        return self.method.maps(scene, item, targets)


def renamed(method: Method, name: str) -> Method:
    """The same method under another name."""
    return method if method.name == name else Renamed(name, method)


def _summed(scene: Scene, item: Item, relevance: Any) -> Array:
    """Relevance [targets, 1, ...] per unit; for tokens, that of an embedding is the sum over its elements."""
    shape = tuple(scene.units.value(item).shape[1:])
    rows = relevance.cpu().double().numpy()
    return np.stack([scene.units.summed(item, row.reshape(*shape, -1).sum(-1)) for row in rows])
