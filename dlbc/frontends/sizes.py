"""Sizes: the exporter's sympy expressions as our dims, and the names our dims get.

The exporter gives each dynamic axis a symbol of its own unless the model proves two of them equal.
A batch axis of one input and that of another are one size to us, `B`; likewise sequence axes, `T`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch

from dlbc.errors import ExportError
from dlbc.ir.core import Type
from dlbc.ir.dims import Dim, evaluate, maximum, minimum, symbol, symbols
from dlbc_runtime.signature import UNBOUNDED

DTYPES = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
          torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
          torch.bool: "bool"}
PARTS = {torch.complex64: "f32", torch.complex128: "f64"}
"""Element types of the real and the imaginary parts of complex numbers."""


@dataclass
class Sizes:
    """Names of the exporter's symbols: `names[symbol text]` is our size; `ranges` its smallest and largest value;
    `conditions` what else the program takes for granted of them, as text."""

    names: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    conditions: list[str] = field(default_factory=list)

    def add(self, expression: Any, name: str, bounds: tuple[int, int]) -> None:
        """Call a symbol `name`; a name's range is the common part of its symbols' ranges."""
        self.names[str(expression)] = name
        low, high = self.ranges.get(name, (1, UNBOUNDED))
        self.ranges[name] = (max(low, bounds[0]), min(high, bounds[1]))

    def dim(self, size: Any) -> Dim:
        """A size as a dim: an int, a SymInt, or a sympy expression. ExportError when only the data knows it."""
        if isinstance(size, bool | int):
            return int(size)
        if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self.dim(size.node.expr)
        kind = type(size).__name__
        if size.is_Integer:
            return int(size)
        if size.is_Symbol:
            if str(size) not in self.names:
                raise ExportError(f"a size or number depends on the content of a tensor (`{size}`)",
                                  hint="use torch.where or a mask in place of boolean indexing and nonzero, "
                                       "and tensors in place of `.item()`")
            return symbol(self.names[str(size)])
        if kind == "Pow":
            base, exponent = size.args
            return reduce(lambda a, b: a * b, [self.dim(base)] * _natural(exponent), _one())
        if kind in ("CeilToInt", "FloorToInt", "TruncToInt", "floor", "ceiling") and _is_quotient(size.args[0]):
            above, below = (self.dim(arg) for arg in size.args[0].args)
            return -(-above // below) if kind in ("CeilToInt", "ceiling") else above // below
        if kind in ("FloorToInt", "TruncToInt", "floor") and (found := self._scaled(size.args[0])) is not None:
            return found
        parts = [self.dim(arg) for arg in size.args]
        return _combined(kind, parts, size)

    def _scaled(self, product: Any) -> Dim | None:
        """The whole part of a size times a factor such as 1.5, whose product float64 has exactly; None for others."""
        numbers = [arg for arg in product.args if arg.is_number]
        if type(product).__name__ != "Mul" or len(numbers) != 1:
            return None
        above, below = float(numbers[0]).as_integer_ratio()
        rest = reduce(lambda a, b: a * b, (self.dim(arg) for arg in product.args if not arg.is_number), _one())
        return rest * above // below if 0 < above < 2 ** 16 and below < 2 ** 16 else None

    def condition(self, guard: Any) -> str:
        """A comparison of sizes as text. ExportError for what is none."""
        if not getattr(guard, "is_Relational", False):
            raise ExportError(f"the model decides by its sizes: `{guard}`", hint="compile with dynamic=False")
        return f"{self.dim(guard.lhs)} {guard.rel_op} {self.dim(guard.rhs)}"

    def type(self, tensor: torch.Tensor) -> Type:
        """The type of a (fake) tensor."""
        if tensor.dtype not in DTYPES:
            inside = "; complex numbers only within the model" if tensor.dtype in PARTS else ""
            raise ExportError(f"a tensor of element type {tensor.dtype}",
                              hint=f"supported element types: {', '.join(map(str, DTYPES))}{inside}")
        return Type(DTYPES[tensor.dtype], tuple(self.dim(size) for size in tensor.shape))

    def inner_type(self, tensor: torch.Tensor) -> Type:
        """The type of a (fake) tensor within the model, where complex numbers are pairs along a last axis of 2."""
        if tensor.dtype in PARTS:
            return Type(PARTS[tensor.dtype], (*(self.dim(size) for size in tensor.shape), 2))
        return self.type(tensor)

    def samples(self) -> Iterable[Mapping[str, int]]:
        """A few assignments of numbers to all sizes, for comparing expressions that look different."""
        for spread in (3, 7, 17):
            yield {name: min(high, max(low, 2) + spread * (i + 1)) for i, (name, (low, high))
                   in enumerate(self.ranges.items())}

    def same(self, left: Dim, right: Dim) -> bool:
        """Whether two dims are equal, as expressions or else for every sample."""
        return left == right or all(evaluate(left, sizes) == evaluate(right, sizes) for sizes in self.samples())


def _combined(kind: str, parts: list[Dim], size: Any) -> Dim:
    if kind == "Add":
        return reduce(lambda a, b: a + b, parts)
    if kind == "Mul":
        return reduce(lambda a, b: a * b, parts)
    if kind == "Max":
        return reduce(maximum, parts)
    if kind == "Min":
        return reduce(minimum, parts)
    if kind in ("FloorDiv", "CleanDiv"):
        return parts[0] // parts[1]
    if kind in ("Mod", "PythonMod"):
        return parts[0] % parts[1]
    if kind == "ModularIndexing":
        return (parts[0] // parts[1]) % parts[2]
    if kind == "PowByNatural":
        return reduce(lambda a, b: a * b, [parts[0]] * _natural(parts[1]), _one())
    if kind in ("Identity", "ToFloat", "TruncToInt", "FloorToInt", "CeilToInt"):
        return parts[0]
    raise ExportError(f"a size is the expression `{size}`, which has no integer form here ({kind})",
                      hint="compile with dynamic=False, or make fewer axes dynamic")


def _one() -> Dim:
    return 1


def _natural(exponent: Any) -> int:
    if getattr(exponent, "is_Integer", isinstance(exponent, int)) and int(exponent) >= 0:
        return int(exponent)
    raise ExportError(f"a size is raised to the power `{exponent}`", hint="compile with dynamic=False")


def _is_quotient(expression: Any) -> bool:
    return type(expression).__name__ in ("IntTrueDiv", "FloatTrueDiv")


def plain(dim: Dim) -> str:
    """The name of a dim that is one named size and nothing else, or ""."""
    found = symbols(dim)
    name = next(iter(found), "")
    return name if len(found) == 1 and dim == symbol(name) else ""
