"""Moves as arithmetic of indices: an element of a `permute`, `slice`, `cat`, ... as an element of its operand.

What backends that write loops or blocks of elements share. An index is one expression for each axis (`At`), in the
language of the `Mover` that writes: Triton's or C's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dlbc.ir.core import Attr, Op, Operand, Type, Value, Weight
from dlbc.ir.dims import Dim, Sym, product
from dlbc.ir.ops import attr, axis


@dataclass(frozen=True)
class At:
    """An expression, and the axes of a block that it varies over (of single elements: none)."""

    text: str
    axes: frozenset[str] = frozenset()


Index = tuple[At, ...]
ZERO = At("0")


class Mover(Protocol):
    """Writes the elements of values in one language."""

    def value(self, operand: Operand, index: Index, conds: tuple[At, ...]) -> At:
        """The element of an operand at an index, where `conds` hold: elsewhere nothing may be read."""

    def let(self, at: At) -> At:
        """A name for an expression."""

    def size(self, dim: Dim) -> str:
        """A dim as an expression that needs no parentheses."""

    def number(self, value: float, type: Type) -> str:
        """A literal of a type."""

    def either(self, condition: str, yes: str, no: str) -> str:
        """One expression or another."""

    def quotient(self, left: str, right: str) -> str:
        """Of two numbers that are not negative, without the rest."""


def aligned(index: Index, type: Type) -> Index:
    """The index of an operand that is broadcast: its axes are the last ones, those of size 1 are at 0."""
    own = index[len(index) - type.rank:] if type.rank else ()
    return tuple(ZERO if dim == 1 else at for at, dim in zip(own, type.shape, strict=True))


def grouped(text: str) -> str:
    """An expression that binds tightly enough for an operator."""
    return text if text.isidentifier() or text.isdigit() else f"({text})"


Move = Callable[["Mover", Op, Index, tuple[At, ...]], At]
MOVED: dict[str, Move] = {}
"""How the element of a move is written, by op."""


def _move(name: str) -> Callable[[Move], Move]:
    def register(function: Move) -> Move:
        MOVED[name] = function
        return function

    return register


def _type(op: Op, position: int = 0) -> Type:
    operand = op.operands[position]
    assert isinstance(operand, Value | Weight)
    return operand.type


def _dim(value: Attr) -> Dim:
    assert isinstance(value, int | Sym)
    return value


def _put(index: Index, at: int, entry: At) -> Index:
    return (*index[:at], entry, *index[at + 1:])


def _plus(w: Mover, at: At, dim: Dim) -> At:
    if dim == 0:
        return at
    if at.text.isdigit() and isinstance(dim, int):
        return At(str(int(at.text) + dim))
    return w.let(At(f"{at.text} + {w.size(dim)}", at.axes))


@_move("reshape")
def _reshape(w: Mover, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    return w.value(op.operands[0], reshaped(w, index, op.result.type.shape, _type(op).shape), conds)


def reshaped(w: Mover, index: Index, shape: tuple[Dim, ...], before: tuple[Dim, ...]) -> Index:
    """An index of `shape` as one of `before`, which has the same elements in the same order."""
    outer = [(dim, at) for dim, at in zip(shape, index, strict=True) if dim != 1]
    inner = [i for i, dim in enumerate(before) if dim != 1]
    found: dict[int, At] = {}
    a = b = 0
    while a < len(outer) or b < len(inner):
        i, j = _segment([dim for dim, _ in outer[a:]], [before[k] for k in inner[b:]])
        left, right = outer[a:a + i], inner[b:b + j]
        a, b = a + i, b + j
        if len(left) == 1 and len(right) == 1:
            found[right[0]] = left[0][1]
            continue
        flat, over = ZERO.text, frozenset[str]()
        for dim, at in left:
            flat = at.text if flat == "0" else f"({flat}) * {w.size(dim)} + {at.text}"
            over |= at.axes
        rest = w.let(At(flat, over))
        for k in reversed(right[1:]):
            found[k] = w.let(At(f"{rest.text} % {w.size(before[k])}", over))
            rest = w.let(At(f"{w.quotient(rest.text, w.size(before[k]))}", over))
        for k in right[:1]:
            found[k] = rest
    return tuple(found.get(i, ZERO) for i in range(len(before)))


def _segment(left: Sequence[Dim], right: Sequence[Dim]) -> tuple[int, int]:
    """The fewest leading axes of two shapes that hold the same number of elements; all of them where none do."""
    for total in range(2, len(left) + len(right)):
        for i in range(max(1, total - len(right)), min(len(left), total - 1) + 1):
            if product(tuple(left[:i])) == product(tuple(right[:total - i])):
                return i, total - i
    return len(left), len(right)


@_move("permute")
def _permute(w: Mover, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    dims, rank = op.attrs["dims"], len(index)
    assert isinstance(dims, tuple)
    back = {int(str(dim)) % rank: at for dim, at in zip(dims, index, strict=True)}
    return w.value(op.operands[0], tuple(back[i] for i in range(rank)), conds)


@_move("expand")
def _expand(w: Mover, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    return w.value(op.operands[0], aligned(index, _type(op)), conds)


@_move("slice")
def _slice(w: Mover, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    at = axis(len(index), int(str(op.attrs["dim"])))
    return w.value(op.operands[0], _put(index, at, _plus(w, index[at], _dim(attr(op, "start")))), conds)


@_move("select")
def _select(w: Mover, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    whole = _type(op)
    at, chosen = axis(whole.rank, int(str(op.attrs["dim"]))), _dim(op.attrs["index"])
    if isinstance(chosen, int) and chosen < 0:
        chosen = chosen + whole.shape[at]
    return w.value(op.operands[0], (*index[:at], At(w.size(chosen)), *index[at:]), conds)


@_move("cat")
def _cat(w: Mover, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    at = axis(len(index), int(str(op.attrs["dim"])))
    own, start, found = index[at], _dim(0), None
    for position in range(len(op.operands)):
        stop = start + _type(op, position).shape[at]
        inside = f"({own.text} >= {w.size(start)}) & ({own.text} < {w.size(stop)})"
        entry = _plus(w, own, -start)
        part = w.value(op.operands[position], aligned(_put(index, at, entry), _type(op, position)),
                       (*conds, At(inside, own.axes)))
        found = part if found is None else w.let(At(
            w.either(f"{own.text} < {w.size(start)}", found.text, part.text), found.axes | part.axes | own.axes))
        start = stop
    assert found is not None
    return found


@_move("slice_adjoint")
def _slice_adjoint(w: Mover, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    at = axis(len(index), int(str(op.attrs["dim"])))
    start, stop, own = _dim(attr(op, "start")), _dim(op.attrs["stop"]), index[at]
    inside = w.let(At(f"({own.text} >= {w.size(start)}) & ({own.text} < {w.size(stop)})", own.axes))
    part = w.value(op.operands[0], _put(index, at, _plus(w, own, -start)), (*conds, inside))
    return w.let(At(w.either(inside.text, part.text, w.number(0, op.result.type)), part.axes | own.axes))


@_move("select_adjoint")
def _select_adjoint(w: Mover, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    at = axis(len(index), int(str(op.attrs["dim"])))
    chosen, own = _dim(op.attrs["index"]), index[at]
    if isinstance(chosen, int) and chosen < 0:
        chosen = chosen + op.result.type.shape[at]
    inside = w.let(At(f"{own.text} == {w.size(chosen)}", own.axes))
    part = w.value(op.operands[0], (*index[:at], *index[at + 1:]), (*conds, inside))
    return w.let(At(w.either(inside.text, part.text, w.number(0, op.result.type)), part.axes | own.axes))


@_move("full")
def _full(w: Mover, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    value = op.attrs["value"]
    if isinstance(value, Sym):
        return At(w.size(value))
    assert isinstance(value, int | float)
    return At(w.number(value, op.result.type))


@_move("rotary")
def _rotary(w: Mover, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    x, cos, sin = op.operands
    last, half = index[-1], op.result.type.shape[-1] // 2
    first = w.let(At(f"{last.text} < {w.size(half)}", last.axes))
    there = w.either(first.text, f"{last.text} + {w.size(half)}", f"{last.text} - {w.size(half)}")
    other = w.let(At(there, last.axes))
    types = [o.type for o in op.operands if isinstance(o, Value | Weight)]
    here, away = (w.value(x, aligned(_put(index, len(index) - 1, at), types[0]), conds) for at in (last, other))
    c, s = (w.value(o, aligned(index, t), conds) for o, t in zip((cos, sin), types[1:], strict=True))
    text = f"{here.text} * {c.text} + {w.either(first.text, f'-{away.text}', away.text)} * {s.text}"
    return w.let(At(text, here.axes | away.axes | c.axes | s.axes | last.axes))
