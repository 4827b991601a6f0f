"""Experts of transformers' models by an implementation that can be exported, while a model is captured.

Since its version 5, transformers' mixtures of experts run by one of several implementations, which
`config._experts_implementation` names: a Python loop over the experts that were hit ("eager", no exporter takes it),
grouped kernels, or "batched_mm", plain operators that `raise_experts` knows. All compute the same function.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

PORTABLE = "batched_mm"
_MODULE = "transformers.integrations.moe"
_SETTINGS = ("_experts_implementation_internal", "_experts_implementation")
"""The attribute of a config that holds the name: transformers' configs have the first, behind a property."""


@contextmanager
def portable_experts(model: nn.Module) -> Iterator[None]:
    """While it is entered, the model's experts run by "batched_mm"; afterwards by what was set, also after errors.

    The setting belongs to the config objects that the experts hold, which other modules share; each is set once. It
    is not one thread's alone: who runs the model in another thread meanwhile gets "batched_mm", the same numbers but
    for rounding. What another thread sets meanwhile stays. Callers hold `quiet.EXPORTING`, so that captures of
    models with a common config follow each other. Does not import transformers.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for attributes, name in _settings(model):
            before.append((attributes, name, attributes[name]))
            attributes[name] = PORTABLE
        yield
    finally:
        for attributes, name, setting in before:
            if attributes.get(name) == PORTABLE:
                attributes[name] = setting


def switches(model: nn.Module) -> bool:
    """Whether `portable_experts` changes a setting of the model."""
    return any(True for _ in _settings(model))


def switchable(module: nn.Module) -> bool:
    """Whether a module runs its experts by the implementation that its config names, "batched_mm" among them."""
    if _MODULE not in sys.modules:
        return False
    forward: Any = type(module).forward
    if getattr(forward, "__globals__", {}).get("__name__") != _MODULE:
        return False
    cells = zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True)
    return any(name == "experts_interface" and isinstance(cell.cell_contents, Mapping)
               and PORTABLE in cell.cell_contents for name, cell in cells)


def _settings(model: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Every config that names another implementation of the model's experts than ours: its attributes, and which."""
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None or id(config) in seen or not switchable(module):
            continue
        seen.add(id(config))
        attributes: dict[str, Any] = vars(config)
        name = next((name for name in _SETTINGS if name in attributes), "")
        if name and attributes[name] != PORTABLE:
            yield attributes, name
