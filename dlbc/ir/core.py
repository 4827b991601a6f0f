"""The relevance IR. Read this first.

A `Graph` is typed SSA in up to three sections:

* `prepare` computes values from weights alone (folded batch norm, constant tables). It runs once for
  the weights' present values, not once per call.
* `forward` is the user's model.
* `relevance` carries relevance from the outputs back to the inputs. Every value it defines has one
  more leading dimension, S: S explanations share one forward pass.

Everything here is immutable: a pass builds a new graph (`dataclasses.replace`, `passes/rewrite.py`).
A `Value` is defined once, by a section's parameters or by one op, and is known by its name.

Sigils of the text form: `%` value, `@` weight, function or kernel, `#` place in the model, `<>` rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from dlbc.ir.dims import Dim, Sym

FLOATS = ("f64", "f32", "f16", "bf16")
INTEGERS = ("i64", "i32", "i16", "i8", "u8")
DTYPES = (*FLOATS, *INTEGERS, "bool")

Attr: TypeAlias = "int | float | bool | str | Sym | None | tuple[Attr, ...]"
Attrs: TypeAlias = Mapping[str, Attr]


@dataclass(frozen=True, slots=True)
class Type:
    """Element type (one of `DTYPES`) and shape, outermost dimension first."""

    dtype: str
    shape: tuple[Dim, ...]

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def floating(self) -> bool:
        """True for element types that can carry relevance."""
        return self.dtype in FLOATS

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(str(dim).replace(' ', '') for dim in self.shape)}]"


@dataclass(frozen=True, slots=True)
class Value:
    """An SSA value: `%name`. Relevance of `%h` is `%R.h`; its multiplier (relevance / value) is `%M.h`."""

    name: str
    type: Type

    def __str__(self) -> str:
        return f"%{self.name}"

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True, slots=True)
class Weight:
    """A reference to one of the model's tensors, `@name`; the numbers are bound at run time."""

    name: str
    type: Type

    def __str__(self) -> str:
        return f"@{self.name}"

    def __hash__(self) -> int:
        return hash(self.name)


Operand: TypeAlias = "Value | Weight | int | float | bool | Sym | None"
"""What an op reads: a value, a weight, a literal scalar, or None for an optional operand left out."""


@dataclass(frozen=True, slots=True)
class Rule:
    """The relevance rule of a `rel.*` op: `<epsilon(1e-06)>`. Named parameters, in the rule's order."""

    name: str
    params: tuple[tuple[str, Attr], ...] = ()

    def __str__(self) -> str:
        """As users write it: `epsilon(1e-09)`, `gamma(gamma=0.25,eps=1e-09)`; bounds at infinity are left out."""
        named = len(self.params) > 1
        params = ",".join((f"{name}=" if named else "") + _shown(value) for name, value in self.params
                          if not (isinstance(value, float) and math.isinf(value)))
        return f"{self.name}({params})" if params else self.name


def _shown(value: Attr) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(_shown, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. `operands` are in the catalogue's order (`ir/ops.py`), variadic ones flat.

    A relevance op (level 2, `rel.*`) has the incoming relevance as `operands`, one per result of the
    forward op it belongs to (None where none arrives); `reads` are the forward values it reads; `of`
    names the first result of that forward op. `of` is a pairing, not a read: it keeps nothing alive.
    """

    name: str
    operands: tuple[Operand, ...]
    results: tuple[Value, ...]
    attrs: Attrs = field(default_factory=dict)
    place: str = ""
    rule: Rule | None = None
    reads: tuple[Operand, ...] = ()
    of: str = ""

    @property
    def result(self) -> Value:
        """The only (or first) result."""
        return self.results[0]

    @property
    def inputs(self) -> tuple[Operand, ...]:
        """All that the op reads: operands, then reads."""
        return self.operands + self.reads


@dataclass(frozen=True, slots=True)
class Kernel:
    """Ops that run as one generated kernel (level 4). Only `results` are visible outside."""

    name: str
    template: str
    body: tuple[Op, ...]
    results: tuple[Value, ...]
    config: Attrs = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Section:
    """Parameters, ops in execution order, results; `saves` (forward only) is what relevance may read."""

    params: tuple[Value, ...] = ()
    body: tuple[Op | Kernel, ...] = ()
    results: tuple[Value, ...] = ()
    saves: tuple[Value, ...] = ()

    @property
    def ops(self) -> Iterator[Op]:
        """Every op in execution order, kernels opened."""
        for item in self.body:
            if isinstance(item, Kernel):
                yield from item.body
            else:
                yield item

    def definitions(self) -> dict[str, Op]:
        """The op that defines each value, by value name (parameters have none)."""
        return {result.name: op for op in self.ops for result in op.results}


@dataclass(frozen=True, slots=True)
class Function:
    """A named block, called as `call @name(...)` with values and weights in place of its parameters."""

    name: str
    params: tuple[Value | Weight, ...]
    body: tuple[Op | Kernel, ...]
    results: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Location:
    """Where a `#place` is: the module's class, and `file.py:line:column` where known."""

    cls: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Graph:
    """A model and, from level 2 on, its explanation. `dims` gives each symbolic size its range.

    `attrs` of note: `inputs` and `outputs`, the user's names of the forward section's parameters and
    results in order; `composite`, the preset; `target`, the backend.
    """

    name: str
    forward: Section
    dims: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    weights: Mapping[str, Weight] = field(default_factory=dict)
    functions: Mapping[str, Function] = field(default_factory=dict)
    prepare: Section = Section()
    relevance: Section | None = None
    locations: Mapping[str, Location] = field(default_factory=dict)
    attrs: Attrs = field(default_factory=dict)

    def sections(self) -> Iterator[tuple[str, Section]]:
        """The sections present, in execution order, with their names."""
        yield "prepare", self.prepare
        yield "forward", self.forward
        if self.relevance is not None:
            yield "relevance", self.relevance

    def with_attrs(self, **attrs: Attr) -> Graph:
        """The same graph with attributes added or replaced."""
        return replace(self, attrs={**self.attrs, **attrs})


def values(operands: tuple[Operand, ...]) -> Iterator[Value]:
    """The values among operands."""
    return (operand for operand in operands if isinstance(operand, Value))
