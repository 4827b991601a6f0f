"""One op where it is emitted: the text of its operands, attributes and sizes; and what a dialect is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from dlbc.backends.names import NUMBER, Names, grouped, literal
from dlbc.errors import UnsupportedOpError
from dlbc.ir import ops
from dlbc.ir.core import Attr, Graph, Kernel, Op, Operand, Type, Value, Weight, values
from dlbc.ir.dims import Sym, symbols

Expression: TypeAlias = "str | Callable[[Site], str]"
"""How an op is written: a template, `{a}.exp()`, or a function of the site. In templates:

`{a}`, `{b}`, `{c}`: the operands; `{a:i}` fit for an operator, `{a:t}` in the result's element type,
`{a:b}` as a bool, `{a:l}` as int64; `{eps}`: an attribute; `{args}`: all operands; `{dtype}`: the
result's element type.
"""

COMBINED = frozenset({"add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge"})
"""Ops of two tensors, one of which may be a number."""

KernelWriter: TypeAlias = "Callable[[Kernel, Scope], tuple[str, tuple[str, ...]] | None]"
"""Writes a kernel: a function of the module as text, and the lines that call it; None: op by op, after all."""


@dataclass(frozen=True)
class Dialect:
    """How one array library is written. `overwriting`: expressions that put the result over `{a}`."""

    name: str
    imports: tuple[str, ...]
    table: Mapping[str, Expression]
    overwriting: Mapping[str, Expression]
    dtypes: Mapping[str, str]
    cast: str
    scalar: str
    device: str = ""
    no_device: str = ""
    decorators: tuple[str, ...] = ()
    reserved: tuple[str, ...] = ()
    """Names of the module that no variable may have."""
    kernel: KernelWriter | None = None
    """How whole kernels are written; None: op by op."""
    joined: Callable[[Sequence[str]], Sequence[str]] = tuple
    """What the module holds for the functions that kernels are written as."""
    number: str = ""
    """How a float32 number that tensors are combined with is written, as a constant of the module; "": where it is
    used. Torch makes a tensor of a plain number and converts it, at each use: longer than a small op takes."""

    def dtype(self, dtype: str, where: str = "") -> str:
        """The library's name of an element type. UnsupportedOpError where it has none."""
        if dtype not in self.dtypes:
            raise UnsupportedOpError(f"the {self.name} backend has no element type {dtype}", where=where,
                                     hint="convert the model to float32, or use backend=\"torch\"")
        return self.dtypes[dtype]


@dataclass
class Scope:
    """A Python function being written: its names, and what it turned out to need."""

    graph: Graph
    dialect: Dialect
    names: Names
    parameters: frozenset[str]
    """Weights that are parameters of the function, by name; others are read from `w`."""
    definitions: Mapping[str, Op]
    """The op that defines each value, wherever it can be seen."""
    sizes: dict[str, None] = field(default_factory=dict)
    device: bool = False
    weights: bool = False
    made: frozenset[str] = frozenset()
    """The values that kernels compute: they lie in memory without gaps."""
    numbers: dict[str, str] = field(default_factory=dict)
    """The module's constants by name."""

    def operand(self, operand: Operand) -> str:
        """The text of anything an op reads."""
        match operand:
            case Value(name):
                return self.names[name]
            case Weight(name):
                if name in self.parameters:
                    return self.names[f"@{name}"]
                self.weights = True
                return f"w[{literal(name)}]"
        return self.text(operand)

    def number(self, value: float) -> str:
        """The name of the constant that holds a number, which is made at its first use."""
        name = NUMBER + re.sub(r"[^0-9a-z]", "_", repr(value).replace("-", "m"))
        self.numbers[name] = self.dialect.number.format(literal(value))
        return name

    def text(self, value: Attr) -> str:
        """The text of an attribute, its sizes noted as needed."""
        self.sizes |= dict.fromkeys(sorted(_sizes(value)))
        return literal(value)


def _sizes(value: Attr) -> Iterator[str]:
    if isinstance(value, Sym):
        yield from symbols(value)
    elif isinstance(value, tuple):
        for item in value:
            yield from _sizes(item)


class Site:
    """One op where it is emitted."""

    def __init__(self, op: Op, scope: Scope) -> None:
        self.op, self.scope, self.dialect = op, scope, scope.dialect

    def __getitem__(self, key: str) -> object:
        """What a template's field stands for (see `Expression`)."""
        if key in ("a", "b", "c"):
            return _Field(self, "abc".index(key))
        if key == "args":
            return ", ".join(self.args())
        if key == "dtype":
            return self.dtype(self.result.dtype)
        return self.text(key)

    @property
    def result(self) -> Type:
        """The type of the (first) result."""
        return self.op.result.type

    def has(self, position: int) -> bool:
        """True where an optional operand is given."""
        return position < len(self.op.operands) and self.op.operands[position] is not None

    def type(self, position: int) -> Type:
        """The type of a tensor operand; a literal's is the result's element type without dimensions."""
        operand = self.op.operands[position]
        return operand.type if isinstance(operand, (Value, Weight)) else Type(self.result.dtype, ())

    def tensor(self, position: int) -> bool:
        """True where an operand is a tensor, not a literal."""
        return isinstance(self.op.operands[position], (Value, Weight))

    def x(self, position: int) -> str:
        """The text of an operand, `None` where it is left out."""
        operand = self.op.operands[position] if self.has(position) else None
        if self.dialect.number and self.op.name in COMBINED and type(operand) in (int, float) and self._of_f32():
            assert isinstance(operand, int | float)
            return self.scope.number(float(operand))
        return self.scope.operand(self.op.operands[position]) if self.has(position) else "None"

    def _of_f32(self) -> bool:
        """Whether an op combines numbers with a float32 tensor that has axes."""
        types = [operand.type for operand in self.op.operands if isinstance(operand, Value | Weight)]
        return bool(types) and all(each.dtype == "f32" and each.rank for each in types)

    def typed(self, position: int, dtype: str = "") -> str:
        """An operand in an element type, the result's unless stated; literals and None as they are."""
        wanted = dtype or self.result.dtype
        if not self.has(position) or not self.tensor(position) or self.type(position).dtype == wanted:
            return self.x(position)
        return self.dialect.cast.format(grouped(self.x(position)), self.dtype(wanted))

    def truth(self, position: int) -> str:
        """An operand as a bool."""
        operand, text = self.op.operands[position], self.x(position)
        if not self.tensor(position):
            return str(bool(operand)) if not isinstance(operand, Sym) else f"bool({text})"
        return text if self.type(position).dtype == "bool" else f"({text} != 0)"

    def args(self, start: int = 0) -> list[str]:
        """The texts of all operands from one on."""
        return [self.x(i) for i in range(start, len(self.op.operands))]

    def attr(self, name: str) -> Attr:
        """An attribute, or its default."""
        return ops.attr(self.op, name)

    def text(self, name: str) -> str:
        """The text of an attribute."""
        return self.scope.text(self.attr(name))

    def options(self, *names: str) -> str:
        """`, name=value` for the attributes that differ from the catalogue's default."""
        defaults = ops.definition(self.op.name).attrs
        return "".join(f", {name}={self.text(name)}" for name in names
                       if name not in defaults or self.attr(name) != defaults[name])

    def dtype(self, dtype: str) -> str:
        """The library's name of an element type."""
        return self.dialect.dtype(dtype, f"#{self.op.place}" if self.op.place else "")

    def device(self) -> str:
        """`, device=device` where the library has devices."""
        self.scope.device = self.scope.device or bool(self.dialect.device)
        return ", device=device" if self.dialect.device else ""

    def axis(self, name: str = "dim", position: int = 0) -> int:
        """An axis attribute, counted from the front of an operand."""
        value = self.attr(name)
        assert isinstance(value, int)
        return ops.axis(self.type(position).rank, value)

    def axes(self, name: str = "dims", position: int = 0) -> tuple[int, ...]:
        """An attribute of axes, counted from the front, all of them where it is None."""
        return ops.axes(self.type(position).rank, self.attr(name))

    def measured(self, value: Value) -> bool:
        """True for a bool that comes from comparing floating values: true and false are mixed at random."""
        found = self.scope.definitions.get(value.name)
        if found is None or value.type.dtype != "bool":
            return False
        if found.name in ("eq", "ne", "lt", "le", "gt", "ge"):
            return any(v.type.floating and v.type.rank for v in values(found.operands))
        return all(self.measured(v) for v in values(found.operands))


class _Field:
    """An operand in a template; the format's letters say in what form."""

    def __init__(self, site: Site, position: int) -> None:
        self.site, self.position = site, position

    def __format__(self, form: str) -> str:
        if "b" in form:
            return self.site.truth(self.position)
        wanted = "i64" if "l" in form else "" if "t" in form else None
        text = self.site.x(self.position) if wanted is None else self.site.typed(self.position, wanted)
        return grouped(text) if "i" in form else text
