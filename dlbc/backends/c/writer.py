"""Writes elements of values as C expressions: each made of those that it depends on, at an index.

A value from outside and one that was stored are read from memory without gaps; others are written where they are
needed, once for each index. An index is one expression for each axis (`dlbc/backends/moves.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dlbc.backends.c.table import expression, number
from dlbc.backends.moves import MOVED, ZERO, At, Index, Move, aligned, grouped
from dlbc.backends.site import Scope
from dlbc.ir.core import Attr, Op, Operand, Type, Value, Weight
from dlbc.ir.dims import Dim, Sym, product
from dlbc.ir.fusible import LOOP_POINTWISE
from dlbc.ir.ops import attr, axes, axis

TYPES = {"f64": "double", "f32": "float", "i64": "int64_t", "i32": "int32_t", "bool": "uint8_t"}
"""C's element types."""


class Elsewhere(Exception):
    """A loop needs an element that the same loop makes in another turn."""


@dataclass
class _Level:
    """The lines of one depth of loops, and the elements that they hold."""

    lines: list[str] = field(default_factory=list)
    known: dict[object, At] = field(default_factory=dict)


class Writer:
    """The text of one C function while it is written, and its arguments."""

    def __init__(self, ops: Sequence[Op], scope: Scope) -> None:
        self.scope = scope
        self.definitions = {result.name: op for op in ops for result in op.results}
        self.sizes: dict[Sym, str] = {}
        self.pointers: dict[Value | Weight, str] = {}
        self.memory: dict[str, str] = {}
        """The name of the memory of each stored value."""
        self.made: dict[str, tuple[Index, At]] = {}
        """What the present loop stores: at its own index, and as which variable."""
        self.anew: Callable[[Op, Value, Index, tuple[At, ...]], At] | None = None
        """Writes the element of a value that is stored, where it is made."""
        self.levels = [_Level()]
        self.count = 0

    # --- text ------------------------------------------------------------------------------------------

    @property
    def lines(self) -> list[str]:
        """The lines of the present depth."""
        return self.levels[-1].lines

    def name(self, stem: str = "v") -> str:
        """A new name."""
        self.count += 1
        return f"{stem}{self.count}"

    def enter(self) -> None:
        """Go one loop deeper."""
        self.levels.append(_Level())

    def leave(self) -> list[str]:
        """The lines of the loop; what they hold is not known outside of it."""
        return self.levels.pop().lines

    def let(self, at: At, key: object = None, ctype: str = "__auto_type") -> At:
        """A variable for an expression; the same for the same expression."""
        if at.text.isidentifier() or at.text.isdigit():
            return at
        key = at.text if key is None else key
        found = next((level.known[key] for level in reversed(self.levels) if key in level.known), None)
        if found is None:
            found = self.levels[-1].known[key] = At(self.name())
            self.lines.append(f"const {ctype} {found.text} = {at.text};")
        return found

    def size(self, dim: Dim) -> str:
        """A dim: a number, or an argument of the function."""
        if isinstance(dim, int):
            return str(dim) if dim >= 0 else f"({dim})"
        if dim not in self.sizes:
            text = str(dim)
            self.sizes[dim] = f"n_{text}" if text.isidentifier() else f"n{len(self.sizes)}"
        return self.sizes[dim]

    def number(self, value: float, type: Type) -> str:
        """A literal of a type."""
        return number(value, type.dtype)

    def either(self, condition: str, yes: str, no: str) -> str:
        """One expression or another."""
        return f"(({condition}) ? {yes} : {no})"

    def quotient(self, left: str, right: str) -> str:
        """Of two whole numbers, without the rest."""
        return f"{left} / {right}"

    # --- values ----------------------------------------------------------------------------------------

    def value(self, operand: Operand, index: Index, conds: tuple[At, ...] = ()) -> At:
        """The element of an operand at an index, where `conds` hold."""
        if isinstance(operand, Sym):
            return At(self.size(operand))
        assert isinstance(operand, Value | Weight), operand
        if isinstance(operand, Weight) or operand.name not in self.definitions:
            return self.loaded(operand, self.pointer(operand), index, conds)
        if operand.name in self.made:
            own, at = self.made[operand.name]
            if index != own:
                raise Elsewhere(operand.name)
            return at
        if operand.name in self.memory:
            return self.loaded(operand, self.memory[operand.name], index, conds)
        return self.computed(operand, index, conds)

    def computed(self, value: Value, index: Index, conds: tuple[At, ...] = ()) -> At:
        """The element of a value that is made here."""
        op, key = self.definitions[value.name], (value.name, index, conds)
        for level in reversed(self.levels):
            if key in level.known:
                return level.known[key]
        if op.name in LOOP_POINTWISE:
            return self.let(self.pointwise(op, index, conds), key, TYPES[op.result.type.dtype])
        if op.name in MOVES:
            return self.let(MOVES[op.name](self, op, index, conds), key)
        assert self.anew is not None
        return self.anew(op, value, index, conds)

    def pointwise(self, op: Op, index: Index, conds: tuple[At, ...]) -> At:
        """The expression of a pointwise op."""
        texts, types = [], []
        for operand in op.operands:
            at = self.value(operand, aligned(index, operand.type), conds) if isinstance(operand, Value | Weight) else (
                At(self.size(operand)) if isinstance(operand, Sym) else At(""))
            texts.append(at.text)
            types.append(operand.type.dtype if isinstance(operand, Value | Weight) else "i64")
        return At(expression(op, texts, types))

    def loaded(self, operand: Value | Weight, memory: str, index: Index, conds: tuple[At, ...]) -> At:
        """An element in memory; 0 where it must not be read."""
        text = f"{memory}[{self.offset(operand.type, index)}]"
        if conds:
            text = f"({' && '.join(f'({cond.text})' for cond in conds)}) ? {text} : 0"
        return self.let(At(text))

    def pointer(self, operand: Value | Weight) -> str:
        """The argument that points to a value from outside."""
        if operand not in self.pointers:
            self.pointers[operand] = f"x{len(self.pointers)}"
        return self.pointers[operand]

    def offset(self, type: Type, index: Index) -> str:
        """Where an element lies in memory without gaps."""
        terms: list[str] = []
        for place, (at, dim) in enumerate(zip(index, type.shape, strict=True)):
            if at.text == "0" or dim == 1:
                continue
            inner = product(type.shape[place + 1:])
            factor = "" if inner == 1 else f" * {self.times(type.shape[place + 1:])}"
            terms.append(f"{grouped(at.text)}{factor}")
        return " + ".join(terms) or "0"

    def times(self, shape: Sequence[Dim]) -> str:
        """How many elements a shape has."""
        fixed = product(tuple(dim for dim in shape if isinstance(dim, int)))
        free = [self.size(dim) for dim in shape if not isinstance(dim, int)]
        return " * ".join([*([str(fixed)] if fixed != 1 or not free else []), *free])


# --- moves that read memory better than by index arithmetic alone, and those that only C has --------------------------

def _reshape(w: Writer, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    """What lies in memory lies there under every shape."""
    x = op.operands[0]
    assert isinstance(x, Value | Weight)
    outside = isinstance(x, Weight) or x.name not in w.definitions
    if outside or (x.name in w.memory and x.name not in w.made):
        memory = w.pointer(x) if outside else w.memory[x.name]
        return w.loaded(op.result, memory, index, conds)
    return MOVED["reshape"](w, op, index, conds)


def _roll(w: Writer, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    shifts, found = _dims(attr(op, "shifts")), list(index)
    for shift, dim in zip(shifts, _dims(attr(op, "dims")), strict=True):
        assert isinstance(dim, int)
        at = axis(len(index), dim)
        size = op.result.type.shape[at]
        moved = w.let(At(f"({index[at].text} - {w.size(shift)}) % {w.size(size)}"))
        found[at] = w.let(At(f"{moved.text} < 0 ? {moved.text} + {w.size(size)} : {moved.text}"))
    return w.value(op.operands[0], tuple(ZERO if d == 1 else at for at, d in zip(found, op.result.type.shape,
                                                                                   strict=True)), conds)


def _flip(w: Writer, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    found = list(index)
    for at in axes(len(index), attr(op, "dims")):
        if op.result.type.shape[at] != 1:
            found[at] = w.let(At(f"{w.size(op.result.type.shape[at])} - 1 - {index[at].text}"))
    return w.value(op.operands[0], tuple(found), conds)


def _arange(w: Writer, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    start, step = _dims((attr(op, "start"), attr(op, "step")))
    return w.let(At(f"({TYPES[op.result.type.dtype]})({w.size(start)} + {index[0].text} * {w.size(step)})"))


def _triangle(w: Writer, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    below, diagonal = f"{index[-1].text} - {index[-2].text}", _dims((attr(op, "diagonal"),))[0]
    kept = f"{below} {'>=' if attr(op, 'upper') else '<='} {w.size(diagonal)}"
    x = w.value(op.operands[0], index, conds)
    return w.let(At(w.either(kept, x.text, w.number(0, op.result.type))))


def _full(w: Writer, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    value = op.attrs["value"]
    if isinstance(value, Sym):
        return w.let(At(f"({TYPES[op.result.type.dtype]}){w.size(value)}"))
    assert isinstance(value, int | float)
    return At(w.number(value, op.result.type))


def _dims(value: Attr) -> tuple[Dim, ...]:
    assert isinstance(value, tuple)
    return tuple(each for each in value if isinstance(each, int | Sym))


MOVES: Mapping[str, Callable[[Writer, Op, Index, tuple[At, ...]], At] | Move] = {
    **MOVED, "reshape": _reshape, "roll": _roll, "flip": _flip, "arange": _arange, "triangle": _triangle,
    "full": _full,
}
"""How the element of a move is written, by op."""
