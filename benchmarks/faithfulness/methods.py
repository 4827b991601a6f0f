"""What is measured: presets, baselines and controls, by name; which of them make sense for which kind of model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import dlbc
from benchmarks.faithfulness.dataset import DataSet, Kind
from dlbc import evaluate
from dlbc.errors import DlbcError
from dlbc.evaluate.methods import Scene
from dlbc.presets import PRESETS, find
from dlbc_runtime.arrays import Array
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.explanation import Explanation

GRADIENT_STEPS = 8
CONTROLS = ("random", "latest first", "centre first")
BASELINES = ("integrated gradients",)
TRANSFORMERS: tuple[Kind, ...] = ("lm", "encoder", "vit")
CONVOLUTIONAL: tuple[Kind, ...] = ("cnn",)

ONLY: dict[str, tuple[Kind, ...]] = {
    "attnlrp": TRANSFORMERS, "attnlrp-conserving": TRANSFORMERS, "cp-lrp": TRANSFORMERS, "epsilon": ("mlp", "cnn"),
    "epsilon-plus": CONVOLUTIONAL,
    "epsilon-plus-flat": CONVOLUTIONAL, "epsilon-gamma-box": CONVOLUTIONAL, "alpha2-beta1": CONVOLUTIONAL,
    "latest first": ("lm", "encoder"), "centre first": ("cnn", "vit")}
"""Kinds of models that a method is for, where it is not for all: on others it is the same as another method
(`attnlrp` without attention is `epsilon`, `epsilon` with attention is `cp-lrp`) or is not defined."""


def names_for(data: DataSet) -> tuple[str, ...]:
    """All methods that make sense for a set: presets first (`auto`, and not by name what it chooses), then baselines
    and controls."""
    flat = data.items[0].tensors()[data.units.key(data.items[0])].ndim == 2 and data.kind in ("mlp", "cnn")
    presets = [name for name, preset in PRESETS.items() if name == "auto" or not preset.plan]
    return tuple(name for name in (*presets, *BASELINES, *CONTROLS)
                 if data.kind in ONLY.get(name, (data.kind,)) and not (flat and name == "centre first"))


def fingerprint(name: str) -> str:
    """What a method does, as far as its name does not say: changes when the entries of its preset do, or the file
    that plans `auto`. (A change inside a rule does not show here: measure such a change with `--again`.)"""
    rules = name.partition("@")[0]
    if rules in (*BASELINES, *CONTROLS):
        return f"{GRADIENT_STEPS} steps" if rules in BASELINES else ""
    preset = find(rules)
    text = f"{preset.entries} {preset.seed} {preset.contrast} {preset.plan}"
    plan = Path(dlbc.__file__).parent / "auto.py"
    if preset.plan and plan.is_file():
        text += plan.read_text(encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, eq=False)
class Explained:
    """A preset compiled for the model of a set; `epsilon@mean` explains differences to the reference "mean"."""

    name: str
    explainer: Explainer
    reference: str = ""
    control = False

    def explain(self, inputs: object, targets: int | Sequence[int]) -> Explanation:
        """The explanation of inputs as an item has them."""
        args, kwargs = evaluate.Item(inputs).call()
        return self.explainer(*args, **kwargs, reference=self.reference or None,
                              target=targets if isinstance(targets, int) else list(targets))

    def maps(self, scene: Scene, item: evaluate.Item, targets: Sequence[int]) -> Array:
        """Relevance float64 [targets, units]."""
        try:
            found = list(self._relevance(scene, item, targets))
        except DlbcError:
            if len(targets) == 1:
                raise
            found = [self._relevance(scene, item, [target])[0] for target in targets]  # rules for one target only
        return np.stack([scene.units.summed(item, relevance[0]) for relevance in found])

    def _relevance(self, scene: Scene, item: evaluate.Item, targets: Sequence[int]) -> Array:
        explained = self.explain(item.inputs, targets).relevance
        key = scene.units.key(item)
        name = key if isinstance(key, str) and key in explained else next(iter(explained))
        return np.asarray(explained[name])


Measured = Explained | evaluate.Method


def method_for(name: str, data: DataSet) -> Measured:
    """The method of a name for the model of a set. DlbcError when the preset cannot be compiled for it."""
    rules, _, reference = name.partition("@")
    if rules == "random":
        return evaluate.random(0)
    if rules == "latest first":
        return evaluate.latest_first()
    if rules == "centre first":
        return evaluate.centre_first()
    if rules == "integrated gradients":
        return evaluate.integrated_gradients(GRADIENT_STEPS)
    return Explained(name, dlbc.compile(data.model, data.example, rules=rules), reference)
