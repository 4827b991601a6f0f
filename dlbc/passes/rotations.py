"""Which channels of a value rotary embedding turned into each other.

The angle depends on where a token stands, so single turned channels do too; the length of a turned pair does not.
Rules that weigh channels by their size read pairs here, or left padding would change what they say of the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain, pairwise

from dlbc.ir.core import Graph, Op, Operand, Value, Weight
from dlbc.ir.ops import attr, axes


@dataclass(frozen=True, slots=True)
class Turned:
    """Channels start..stop of the last axis, turned in pairs: neighbours (interleaved), or half against half."""

    start: int
    stop: int
    interleaved: bool


Rotations = dict[str, tuple[Turned, ...]]


def rotations(graph: Graph) -> Rotations:
    """The turned channels of each forward value that has some, in order; values that mix channels have none."""
    found: Rotations = {}
    for op in graph.forward.ops:
        turned = _turned(op, found)
        if turned:
            found[op.result.name] = turned
    return found


def _turned(op: Op, found: Rotations) -> tuple[Turned, ...]:
    first, *others = op.operands or (None,)
    before = _of(first, found)
    if op.name == "rotary":
        size = op.result.type.shape[-1]
        return (Turned(0, size, bool(attr(op, "interleaved"))),) if isinstance(size, int) else ()
    if op.name == "cat" and any(_of(o, found) for o in op.operands):
        return _joined(op, found)
    if not before or not isinstance(first, Value):
        return ()
    rank, width = first.type.rank, first.type.shape[-1]
    if op.name in ("cast", "neg") or (op.name in ("mul", "div") and all(isinstance(o, int | float) for o in others)):
        return before
    if op.name == "permute":
        order = op.attrs["dims"]
        return before if isinstance(order, tuple) and order[-1] in (-1, rank - 1) else ()
    if op.name in ("reshape", "expand"):
        return before if op.result.type.shape[-1:] == (width,) else ()
    if op.name == "slice":
        return _sliced(op, before) if axes(rank, attr(op, "dim")) == (rank - 1,) else before
    return ()


def _of(operand: Operand | None, found: Rotations) -> tuple[Turned, ...]:
    return found.get(operand.name, ()) if isinstance(operand, Value) else ()


def _joined(op: Op, found: Rotations) -> tuple[Turned, ...]:
    rank = op.result.type.rank
    if axes(rank, attr(op, "dim")) != (rank - 1,):
        parts = {_of(o, found) for o in op.operands}
        return parts.pop() if len(parts) == 1 else ()
    joined: list[Turned] = []
    start = 0
    for operand in op.operands:
        width = operand.type.shape[-1] if isinstance(operand, Value | Weight) else None
        if not isinstance(width, int):
            return ()
        joined += (_moved(t, start) for t in _of(operand, found))
        start += width
    return tuple(joined)


def _sliced(op: Op, before: tuple[Turned, ...]) -> tuple[Turned, ...]:
    start, stop = attr(op, "start"), attr(op, "stop")
    if attr(op, "step") != 1 or not isinstance(start, int) or not isinstance(stop, int):
        return ()
    return tuple(_moved(t, -start) for t in before if start <= t.start and t.stop <= stop)


def _moved(turned: Turned, by: int) -> Turned:
    return replace(turned, start=turned.start + by, stop=turned.stop + by)


def cuts(turned: tuple[Turned, ...], width: int) -> list[tuple[int, int, Turned | None]]:
    """The last axis of `width` channels cut into ranges, each with how it was turned or None, in order."""
    known = {t.start: t for t in turned}
    edges = sorted({0, width, *chain.from_iterable((t.start, t.stop) for t in turned)})
    return [(start, stop, known.get(start)) for start, stop in pairwise(edges)]
