"""The questions that every method should be asked, in one report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dlbc.evaluate.fills import Fill
from dlbc.evaluate.methods import Several
from dlbc.evaluate.perturbation import faithfulness
from dlbc.evaluate.report import Report
from dlbc.evaluate.setting import methods_of, scene_of
from dlbc.evaluate.targets import target_sensitivity
from dlbc.evaluate.units import Units

if TYPE_CHECKING:
    import torch


def measure(model: torch.nn.Module, items: object, methods: Several, *, targets: Sequence[int] | None = None,
            units: str | Units = "auto", fill: str | Fill = "auto", score: str = "probability", steps: int = 20,
            batch: int = 32, data: str = "", progress: bool = False) -> Report:
    """`faithfulness` with its controls, and `target_sensitivity`: a perturbation score alone must not choose a method,
    for a map that does not depend on the target can score well. A model with one output has only one target:
    then only the former is measured. The parameters are those of `faithfulness`."""
    from dlbc.evaluate.running import look

    scene = scene_of(model, items, targets, units)
    chosen = methods_of(methods, scene, True)
    report = faithfulness(scene.model, scene.items, chosen, units=units, fill=fill, score=score, steps=steps,
                          controls=False, batch=batch, data=data, progress=progress)
    if len(look(scene.model, scene.items[0]).outputs) > 1:
        report += target_sensitivity(scene.model, scene.items, chosen, units=units, data=data, progress=progress)
    return report
