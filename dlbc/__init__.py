"""dlbc: the compiler for explanations.

`explainer = dlbc.compile(model, example_inputs)` returns code that runs the model and carries relevance from
an output back to the inputs: which tokens, pixels or features made the model say this.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlbc import evaluate
    from dlbc.api import compile, load
    from dlbc.composite import Composite
    from dlbc_runtime.explainer import Explainer
    from dlbc_runtime.explanation import Explanation
    from dlbc_runtime.reference import Reference
    from dlbc_runtime.target import Target

__version__ = "0.1.0"
_HOMES = {"compile": "dlbc.api", "load": "dlbc.api", "Composite": "dlbc.composite",
          "Explainer": "dlbc_runtime.explainer", "Explanation": "dlbc_runtime.explanation",
          "Reference": "dlbc_runtime.reference", "Target": "dlbc_runtime.target"}
__all__ = ["Composite", "Explainer", "Explanation", "Reference", "Target", "compile", "evaluate", "load"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `import dlbc` itself imports nothing heavy."""
    if name == "evaluate":
        return import_module("dlbc.evaluate")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
