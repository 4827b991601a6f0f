"""dlbc: the compiler for explanations.

`explainer = dlbc.compile(model, example_inputs)` returns code that runs the model and carries relevance from
an output back to the inputs: which tokens, pixels or features made the model say this.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlbc import compat, evaluate, moe
    from dlbc.api import compile, load
    from dlbc.composite import Composite
    from dlbc.moe import register_moe
    from dlbc.pipelines import pipeline
    from dlbc_runtime.calibration import fit_temperature
    from dlbc_runtime.deterministic import deterministic
    from dlbc_runtime.explainer import Explainer
    from dlbc_runtime.explanation import Explanation
    from dlbc_runtime.generation import GenerationExplanation
    from dlbc_runtime.reference import Reference
    from dlbc_runtime.sampler import GenerationInterrupted, Sampler
    from dlbc_runtime.target import Target

__version__ = "0.1.0"
_HOMES = {"compile": "dlbc.api", "load": "dlbc.api", "Composite": "dlbc.composite",
          "deterministic": "dlbc_runtime.deterministic", "fit_temperature": "dlbc_runtime.calibration",
          "pipeline": "dlbc.pipelines", "register_moe": "dlbc.moe",
          "Explainer": "dlbc_runtime.explainer", "Explanation": "dlbc_runtime.explanation",
          "GenerationExplanation": "dlbc_runtime.generation", "GenerationInterrupted": "dlbc_runtime.sampler",
          "Reference": "dlbc_runtime.reference", "Sampler": "dlbc_runtime.sampler", "Target": "dlbc_runtime.target"}
__all__ = ["Composite", "Explainer", "Explanation", "GenerationExplanation", "GenerationInterrupted", "Reference",
           "Sampler", "Target", "compat", "compile", "deterministic", "evaluate", "fit_temperature", "load", "moe",
           "pipeline", "register_moe"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `import dlbc` itself imports nothing heavy."""
    if name in ("compat", "evaluate", "moe"):
        return import_module(f"dlbc.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
