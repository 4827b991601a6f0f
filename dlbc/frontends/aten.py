"""ATen operators as catalogue ops: the table, and how a handler is written.

A handler gets the `Tracer` (a Builder that knows the node being translated) and the node's arguments as
ATen's schema has them, tensors as operands and sizes as dims. It appends ops and returns the result, or a
tuple of results with None for those we cannot give. The tracer then checks the result's type against the
exporter's and casts where only the element type differs (ATen's own promotions).

    @aten("lerp")                                    # every overload; "max.dim" is one overload
    def lerp(at: Tracer, x: Operand, end: Operand, weight: Operand) -> Operand:
        return at.add(x, at.mul(weight, at.sub(end, x)))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

import torch

from dlbc.errors import IRError, UnsupportedOpError
from dlbc.ir.builder import Builder
from dlbc.ir.core import Attr, Operand, Type, Value, Weight
from dlbc.ir.dims import Dim
from dlbc_runtime.signature import UNBOUNDED

Result: TypeAlias = "Operand | tuple[Operand, ...]"
Handler: TypeAlias = "Callable[..., Result]"
H = TypeVar("H", bound=Handler)

TABLE: dict[str, Handler] = {}
UNSUPPORTED: dict[str, str] = {}
"""Operators known not to be supported, with what to do about it."""

WHOLE = 2**62
"""From here on an ATen slice bound means "to the end"."""


def aten(*names: str) -> Callable[[H], H]:
    """Register the decorated handler for ATen operators (`add`) or single overloads (`max.dim`)."""

    def register(handler: H) -> H:
        TABLE.update(dict.fromkeys(names, handler))
        return handler

    return register


class Tracer(Builder):
    """The builder of handlers: `expected` are the types of the node's results as the exporter has them."""

    def __init__(self) -> None:
        super().__init__()
        self.expected: tuple[Type | None, ...] = ()
        self.target = ""
        self.origin = ""
        self.dtypes: Mapping[torch.dtype, str] = {}

    @property
    def shape(self) -> tuple[Dim, ...]:
        """Shape of the node's (first) result."""
        return self.out.shape

    @property
    def out(self) -> Type:
        """Type of the node's (first) result."""
        found = self.expected[0] if self.expected else None
        if found is None:
            raise IRError(f"`{self.target}` has no tensor result", where=self.origin)
        return found

    def unsupported(self, fact: str, hint: str = "") -> UnsupportedOpError:
        """The error for what this node asks and we cannot give; raise it."""
        return UnsupportedOpError(f"`aten.{self.target}`: {fact}", where=self.origin,
                                  hint=hint or "rewrite this part of the model with supported operators, or report it")

    def viewed(self, x: Operand, shape: Sequence[Dim]) -> Operand:
        """x under another shape; x itself where that is its shape."""
        return x if type_of(x).shape == tuple(shape) else self.reshape(x, shape=tuple(shape))

    def converted(self, x: Operand, dtype: str) -> Operand:
        """x in another element type; x itself where it has that type."""
        return x if type_of(x).dtype == dtype else self.cast(x, dtype=dtype)

    def expanded(self, x: Operand, shape: Sequence[Dim]) -> Operand:
        """x broadcast to a shape; x itself where that is its shape."""
        return x if type_of(x).shape == tuple(shape) else self.expand(x, shape=tuple(shape))

    def permuted(self, x: Operand, dims: Sequence[int]) -> Operand:
        """x with its axes in another order; x itself where the order stays."""
        rank = type_of(x).rank
        order = tuple(d % rank for d in dims)
        return x if order == tuple(range(rank)) else self.permute(x, dims=order)

    def tensor(self, x: Operand, dtype: str = "f32") -> Value | Weight:
        """A literal as a tensor of rank 0; a tensor as it is."""
        return x if isinstance(x, Value | Weight) else self.full(shape=(), value=_literal(x), dtype=dtype)

    def dtype(self, asked: object, default: str) -> str:
        """Our name of a torch dtype argument, `default` for None."""
        if asked is None:
            return default
        if not isinstance(asked, torch.dtype) or asked not in self.dtypes:
            raise self.unsupported(f"the element type {asked} is not supported",
                                   hint=f"supported: {', '.join(map(str, self.dtypes))}")
        return self.dtypes[asked]


def type_of(x: Operand) -> Type:
    """The type of an operand that must be a tensor."""
    if not isinstance(x, Value | Weight):
        raise IRError(f"`{x}` is not a tensor")
    return x.type


def is_tensor(x: object) -> bool:
    """Whether an operand is a tensor rather than a literal or None."""
    return isinstance(x, Value | Weight)


def positive(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    return axis % rank if rank else 0


def listed(x: int | Sequence[int] | None) -> tuple[int, ...]:
    """An int, a list of ints or None as a tuple of ints."""
    return () if x is None else (x,) if isinstance(x, int) else tuple(x)


def spread(x: Sequence[int], rank: int, default: int | Sequence[int] = 1) -> tuple[int, ...]:
    """One number per spatial axis: a list of one is repeated, an empty one gives the default."""
    chosen = listed(x) or listed(default)
    return chosen * rank if len(chosen) == 1 else chosen


def larger_than_any(size: Dim) -> bool:
    """Whether a size stands for "to the end"."""
    return isinstance(size, int) and size >= UNBOUNDED


def _literal(x: Operand) -> Attr:
    if x is None or isinstance(x, Value | Weight):
        raise IRError(f"`{x}` is not a literal")
    return x
