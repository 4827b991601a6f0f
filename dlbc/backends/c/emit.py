"""Emits a module of C functions, with torch for everything outside of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from dlbc.backends.c.nests import Nests
from dlbc.backends.names import listed
from dlbc.backends.python_module import emit_module
from dlbc.backends.site import Scope
from dlbc.backends.torch.emit import TORCH
from dlbc.ir.core import Graph, Kernel, Value

LIBRARY = "C"
"""What generated code calls its C functions."""


PAYS = 12_000
"""Steps that loops may take to save one call of torch: about as long, on one thread."""


def emit(graph: Graph) -> str:
    """The source of the module of a graph with loops; one without is torch code throughout.

    UnsupportedOpError names an op that it cannot write.
    """
    return emit_module(graph, DIALECT)


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
    scope.device = True
    for result in kernel.results:
        shape, dtype = scope.text(result.type.shape), scope.dialect.dtype(result.type.dtype)
        lines.append(f"{scope.names[result.name]} = torch.empty({shape}, dtype={dtype}, device=device)")
        addresses.append(f"{scope.names[result.name]}.data_ptr()")
    sizes = [scope.text(size) for size in nests.writer.sizes]
    return source.replace("KERNEL", name, 1), (*lines, *listed([*sizes, *addresses], f"{LIBRARY}.{name}(", ")"))


def _joined(functions: Sequence[str]) -> list[str]:
    """All functions of a module as one library."""
    names = {text.split("(")[0].split()[-1]: text.split(")")[0].count("int64_t n") for text in functions}
    counted = {name: (sizes, text.split(")")[0].count(",") + 1 - sizes)
               for (name, sizes), text in zip(names.items(), functions, strict=True)}
    text = "\n\n".join(functions)
    return [f'{LIBRARY} = library(r"""\n{text}\n""", {counted})\n'] if functions else []


DIALECT = replace(
    TORCH, name="c",
    imports=(*TORCH.imports[:4], "from dlbc_runtime import torch_kernels as kernels",
             "from dlbc_runtime.c_library import KernelError, library"),
    reserved=(LIBRARY, "library", "KernelError"), kernel=_written, joined=_joined)
"""Torch's dialect, besides kernels."""
