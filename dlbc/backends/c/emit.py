"""Emits a module of C functions, with torch for everything outside of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace

from dlbc.backends.c.nests import Nests
from dlbc.backends.names import listed
from dlbc.backends.python_module import emit_module
from dlbc.backends.site import Scope
from dlbc.backends.torch.emit import TORCH
from dlbc.ir.core import Graph, Kernel, Type, Value

LIBRARY = "C"
"""What generated code calls its C functions."""


PAYS = 24_000
"""Steps that loops may take to save one call of torch: about as long, on one thread."""


def emit(graph: Graph) -> str:
    """The source of the module of a graph with loops; one without is torch code throughout.

    UnsupportedOpError names an op that it cannot write.
    """
    return emit_module(graph, DIALECT)


def refused(graph: Graph) -> dict[str, str]:
    """The kernels that no code is written for, and why: they run op by op."""
    found: dict[str, str] = {}

    def noted(kernel: Kernel, scope: Scope) -> tuple[str, tuple[str, ...]] | None:
        made = _written(kernel, scope)
        found.update({} if made else {kernel.name: "torch is faster for arrays of this size"})
        return made

    emit_module(graph, replace(DIALECT, kernel=noted))
    return found


def _written(kernel: Kernel, scope: Scope) -> tuple[str, tuple[str, ...]] | None:
    """A kernel's function, and the lines that call it where it takes less time than its ops would; None where it never
    does."""
    nests = Nests(kernel, scope)
    steps, most = nests.steps, PAYS * nests.calls
    if isinstance(steps, int) and steps > most:
        return None
    source = nests.text()
    name = f"{kernel.name}_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    lines = [] if isinstance(steps, int) else [f"if {scope.text(steps)} > {most}:", "    raise KernelError"]
    addresses: list[str] = []
    for operand in nests.writer.pointers:
        text = scope.operand(operand)
        known = isinstance(operand, Value) and operand.name in scope.made
        own = text if isinstance(operand, Value) else scope.names[f"dense.{operand.name}"]
        lines += [] if known else [f"{own} = {text}.contiguous()"]
        addresses.append(f"{own}.data_ptr()")
    for place, result in enumerate(kernel.results):
        lines.append(f"{scope.names[result.name]} = {_empty(result.type, kernel.results[:place], scope)}")
        addresses.append(f"{scope.names[result.name]}.data_ptr()")
    sizes = [scope.text(size) for size in nests.writer.sizes]
    return source.replace("KERNEL", name, 1), (*lines, *listed([*sizes, *addresses], f"{LIBRARY}.{name}(", ")"))


def _empty(type_: Type, made: Sequence[Value], scope: Scope) -> str:
    """A tensor without numbers: as one that was just made, where that has its shape or element type. Torch takes half a
    microsecond less for it."""
    shape, dtype = scope.text(type_.shape), scope.dialect.dtype(type_.dtype)
    for value in made:
        if value.type == type_:
            return f"torch.empty_like({scope.names[value.name]})"
    for value in made:
        if value.type.dtype == type_.dtype:
            return f"{scope.names[value.name]}.new_empty({shape})"
    scope.device = True
    return f"torch.empty({shape}, dtype={dtype}, device=device)"


def _joined(functions: Sequence[str]) -> list[str]:
    """All functions of a module as one library, with how many sizes and pointers each takes."""
    counts: dict[str, tuple[int, int]] = {}
    for text in functions:
        head = re.match(r"int32_t (\w+)\(([^)]*)\)", text)
        assert head is not None
        pointers, params = head[2].count("*"), head[2].count(",") + 1
        counts[head[1]] = params - pointers, pointers
    text = "\n\n".join(functions)
    return [f'{LIBRARY} = library(r"""\n{text}\n""", {counts})\n'] if functions else []


DIALECT = replace(
    TORCH, name="c",
    imports=(*TORCH.imports[:4], "from dlbc_runtime import torch_kernels as kernels",
             "from dlbc_runtime.c_library import KernelError, library"),
    reserved=(LIBRARY, "library", "KernelError"), kernel=_written, joined=_joined)
"""Torch's dialect, besides kernels."""
