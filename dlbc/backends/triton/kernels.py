"""What every Triton template shares: from a `Kernel` of the IR to the text of a jit function and of its launch.

A template is a module with `emit(site)`: it gets the kernel where it is written (`KernelSite`) and returns `Emitted`.
Kernels that come out as the same text are one function: names of functions are hashes of their text (`named`), and
nothing in a jit function tells where it is used (arguments are called `x0`, `x1` ..., results `y0` ..., sizes as in
the IR).
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from dlbc.backends.liveness import inputs_of
from dlbc.backends.names import listed
from dlbc.backends.site import Scope
from dlbc.backends.triton.choices import Choice
from dlbc.backends.triton.config import Device
from dlbc.errors import IRError
from dlbc.ir.core import Kernel, Operand, Value, Weight, values
from dlbc.ir.dims import Dim

TEMPLATES: dict[str, str] = {
    "attention": "dlbc.backends.triton.attention",
    "elementwise": "dlbc.backends.triton.elementwise",
    "row": "dlbc.backends.triton.row",
    "gemm": "dlbc.backends.triton.gemm",
    "grouped": "dlbc.backends.triton.grouped",
}
"""Where each template is: the module that has its `emit(site: KernelSite) -> Emitted`. Add a template here."""

POINTERS = {"f64": "tl.float64", "f32": "tl.float32", "f16": "tl.float16", "bf16": "tl.bfloat16", "i64": "tl.int64",
            "i32": "tl.int32", "i16": "tl.int16", "i8": "tl.int8", "u8": "tl.uint8", "bool": "tl.int1"}
"""Triton's name of each element type."""


@dataclass(frozen=True)
class Emitted:
    """A kernel as text. `source`: jit functions, with a name that `named` made; `lines`: of the Python function that
    launches it: they allocate the results under their names in that function, then launch. `choices`: what each jit
    function chooses its tile from, by name."""

    source: str
    lines: tuple[str, ...]
    choices: Mapping[str, Choice]


@dataclass(frozen=True)
class KernelSite:
    """A kernel where it is launched."""

    kernel: Kernel
    scope: Scope
    device: Device
    dense: frozenset[str] = frozenset()
    """The values outside that are known to lie in memory without gaps, in the order of their axes."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """`precision`: of products of float32 numbers, "auto", "ieee", "tf32x3" or "tf32"."""

    @property
    def inputs(self) -> tuple[Value | Weight, ...]:
        """What the kernel reads from outside, each once, in the order of reading."""
        return inputs_of(self.kernel)

    @property
    def results(self) -> tuple[Value, ...]:
        """What the kernel computes for others."""
        return self.kernel.results

    def text(self, operand: Operand) -> str:
        """An operand, or a size, as the launching function writes it."""
        return self.scope.operand(operand)

    def sizes(self, *dims: Dim) -> list[str]:
        """Dims as the launching function writes them; the sizes in them are noted as needed."""
        return [self.scope.text(dim) for dim in dims]

    def empty(self, result: Value) -> str:
        """The line that allocates a result."""
        shape = self.scope.text(result.type.shape)
        dtype = self.scope.dialect.dtype(result.type.dtype)
        self.scope.device = True
        return f"{self.scope.names[result.name]} = torch.empty({shape}, dtype={dtype}, device=device)"


def emit_kernel(site: KernelSite) -> Emitted:
    """The text of a kernel. IRError where its template is none of this backend's."""
    module = TEMPLATES.get(site.kernel.template)
    if module is None:
        raise IRError(f"the triton backend has no template `{site.kernel.template}`", where=f"@{site.kernel.name}",
                      hint=f"it has {', '.join(TEMPLATES)}")
    found = import_module(module).emit(site)
    assert isinstance(found, Emitted)
    return found


def render(template: str, **parts: object) -> str:
    """A jit function from `templates/<template>.py.jinja`; the function is called `KERNEL` until `named`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=False,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                              keep_trailing_newline=True)
    return environment.get_template(f"{template}.py.jinja").render(**parts)


def named(source: str, stem: str) -> tuple[str, str]:
    """The source with `KERNEL` replaced by a name that is `stem` and a hash of it; and that name."""
    name = f"{stem}_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    return source.replace("KERNEL", name), name


def launched(name: str, size: str, grid: str, arguments: Sequence[str]) -> list[str]:
    """The lines of a launch: the tile for a size, which the text of the grid calls `tile`; the kernel, the grid, its
    arguments."""
    return [f"tile = chosen({name}_tiles, {size})", *listed([name, grid, *arguments, "**tile"], "launch(", ")")]


def parameters(names: Sequence[str]) -> str:
    """The parameters of a jit function, over several lines where they are many, with a comma behind."""
    return "".join(f"{line}{chr(10)}           " for line in textwrap.wrap(", ".join(names) + ",", 96))


def reads(kernel: Kernel) -> frozenset[str]:
    """The names of the values that a kernel reads from outside."""
    return frozenset(v.name for v in values(inputs_of(kernel)))
