"""What a compiled explainer needs to run: explainer, explanation, targets, artifact, views. Never imports dlbc."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlbc_runtime.artifact import load
    from dlbc_runtime.explainer import Explainer
    from dlbc_runtime.explanation import Explanation
    from dlbc_runtime.generation import GenerationExplanation
    from dlbc_runtime.reference import Reference
    from dlbc_runtime.target import Target

_HOMES = {"Explainer": "explainer", "Explanation": "explanation", "GenerationExplanation": "generation",
          "Reference": "reference", "Target": "target", "load": "artifact"}
__all__ = ["Explainer", "Explanation", "GenerationExplanation", "Reference", "Target", "load"]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
