"""Backends: each turns a lowered graph into the source of one Python module.

Adding a backend: a folder with `name`, `overwriting` and `emit(graph)`, and one line in `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Protocol, cast

from dlbc.errors import InputError
from dlbc.ir.core import Graph

BACKENDS = {
    "c": "dlbc.backends.c",
    "numpy": "dlbc.backends.numpy",
    "torch": "dlbc.backends.torch",
    "triton": "dlbc.backends.triton",
}
"""Where each backend is: the module that has its `name`, `overwriting` and `emit`."""


class Backend(Protocol):
    """What a backend's module offers."""

    name: str
    overwriting: Mapping[str, object]
    """The ops that it can write over an operand that dies."""

    def emit(self, graph: Graph) -> str:
        """The source of a module with `prepare`, `forward` and, where the graph has it, `relevance`."""


class KernelBackend(Backend, Protocol):
    """What the module of a backend offers that writes kernels."""

    def refused(self, graph: Graph) -> dict[str, str]:
        """The kernels of a fused graph that there is no code for, and why: they run op by op."""


def load(name: str) -> Backend:
    """The backend of that name. InputError, with the nearest names, when there is none."""
    if name not in BACKENDS:
        near = get_close_matches(name, BACKENDS, 3)
        raise InputError(f"unknown backend `{name}`",
                         hint=f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(BACKENDS)}")
    return cast(Backend, import_module(BACKENDS[name]))
