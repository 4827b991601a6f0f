"""Measured faithfulness of explanations: does what is called relevant matter to the model?

    report = dlbc.evaluate.faithfulness(model, inputs, ["attnlrp", "cp-lrp"])
    print(report)

`faithfulness` perturbs the units (tokens, patches, features) in the order of their relevance and watches the
output; `target_sensitivity` asks whether the map depends on what it explains, `randomisation` whether it depends on
what the model learned, `input_sensitivity` whether it jumps about; `measure` does the first two. Each returns a
`Report`: numbers per data set, method and metric with standard errors over items, beside controls that every
method must beat. Importing this package imports neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlbc.evaluate.baselines import (
        centre_first,
        gradient_x_input,
        integrated_gradients,
        latest_first,
        random,
    )
    from dlbc.evaluate.fills import Fill, blur, constant, delete, mask, mean, replace, zero
    from dlbc.evaluate.items import Item
    from dlbc.evaluate.measure_all import measure
    from dlbc.evaluate.methods import Method, compiled, function
    from dlbc.evaluate.noise import input_sensitivity
    from dlbc.evaluate.perturbation import faithfulness
    from dlbc.evaluate.quantus import quantus_explain
    from dlbc.evaluate.randomise import randomisation
    from dlbc.evaluate.report import Curve, Report, Result
    from dlbc.evaluate.statistics import Paired, rank_correlation
    from dlbc.evaluate.targets import target_sensitivity
    from dlbc.evaluate.units import Features, Patches, Segments, Tokens, Units

_HOMES = {
    **dict.fromkeys(("centre_first", "gradient_x_input", "integrated_gradients", "latest_first", "random"),
                    "baselines"),
    **dict.fromkeys(("Fill", "blur", "constant", "delete", "mask", "mean", "replace", "zero"), "fills"),
    "Item": "items", "measure": "measure_all", "Method": "methods", "compiled": "methods", "function": "methods",
    "input_sensitivity": "noise", "faithfulness": "perturbation", "quantus_explain": "quantus",
    "randomisation": "randomise", "target_sensitivity": "targets",
    **dict.fromkeys(("Curve", "Report", "Result"), "report"),
    **dict.fromkeys(("Paired", "rank_correlation"), "statistics"),
    **dict.fromkeys(("Features", "Patches", "Segments", "Tokens", "Units"), "units"),
}
__all__ = ["Curve", "Features", "Fill", "Item", "Method", "Paired", "Patches", "Report", "Result", "Segments",
           "Tokens", "Units", "blur", "centre_first", "compiled", "constant", "delete", "faithfulness", "function",
           "gradient_x_input", "input_sensitivity", "integrated_gradients", "latest_first", "mask", "mean", "measure",
           "quantus_explain", "random", "randomisation", "rank_correlation", "replace", "target_sensitivity", "zero"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
