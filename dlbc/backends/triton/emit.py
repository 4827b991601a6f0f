"""Emits a module of Triton kernels, with torch for everything outside of them."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

from dlbc.backends.python_module import emit_module
from dlbc.backends.site import Scope
from dlbc.backends.torch.emit import TORCH
from dlbc.backends.triton.choices import Choice
from dlbc.backends.triton.config import device
from dlbc.backends.triton.kernels import KernelSite, emit_kernel
from dlbc.errors import UnsupportedOpError
from dlbc.ir.core import Graph, Kernel

log = logging.getLogger(__name__)

TRITON = replace(
    TORCH, name="triton",
    imports=(*TORCH.imports[:2], *TORCH.imports[2:4], "import triton", "import triton.language as tl",
             "from dlbc_runtime import torch_kernels as kernels", "from dlbc_runtime import triton_math as math",
             "from dlbc_runtime.triton_launch import KernelError, blocks, chosen, expert_blocks, launch"),
    reserved=("triton", "tl", "math", "blocks", "chosen", "expert_blocks", "launch", "tile", "KernelError"))
"""Torch's dialect, besides kernels."""


def emit(graph: Graph) -> str:
    """The source of the module of a fused graph; one without kernels is torch code throughout.

    The graph's attribute `target` names the architecture ("triton:sm_90"), `precision` how products of float32 numbers
    are computed. UnsupportedOpError names an op that it cannot write.
    """
    return emit_module(graph, replace(TRITON, kernel=partial(_written, graph, {}, {})))


def choices(graph: Graph) -> dict[str, Choice]:
    """What each jit function of a fused graph's module chooses its tile from, by name."""
    found: dict[str, Choice] = {}
    emit_module(graph, replace(TRITON, kernel=partial(_written, graph, {}, found)))
    return found


def refused(graph: Graph) -> dict[str, str]:
    """The kernels that no code can be written for, and why: they run op by op."""
    found: dict[str, str] = {}
    emit_module(graph, replace(TRITON, kernel=partial(_written, graph, found, {})))
    return found


def _written(graph: Graph, problems: dict[str, str], found: dict[str, Choice], kernel: Kernel,
             scope: Scope) -> tuple[str, tuple[str, ...]] | None:
    """A kernel's function and the lines that launch it; None where its template has no code for it after all."""
    architecture = str(graph.attrs.get("target", "")).removeprefix("triton:") or "sm_90"
    options = {"precision": graph.attrs.get("precision", "ieee")}
    try:
        made = emit_kernel(KernelSite(kernel, scope, device(architecture), scope.made, options))
    except UnsupportedOpError as problem:
        log.info("kernel %s is left to torch: %s", kernel.name, problem.fact)
        problems[kernel.name] = problem.fact
        return None
    found |= made.choices
    return made.source, made.lines
