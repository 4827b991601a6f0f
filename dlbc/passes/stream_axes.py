"""Which axes of an op's operands and result run together: what makes it legal to run an op on some of the rows.

`links(op)` numbers the axes as an einsum does: `matmul` is `(b,i,k),(b,k,j)->(b,i,j)`. Taking some of the positions of
an index in every tensor that has it gives those positions of the result if the result has the index; if not, the op
must be a sum over it (`SUMMED`) for the results of parts to add up. None stands for an axis that cannot be cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from dlbc.ir.core import Attr, Op, Operand, Type, Value, Weight
from dlbc.ir.dims import Dim
from dlbc.ir.ops import OPS, attr, axes, axis

Indices: TypeAlias = "tuple[int | None, ...]"

SUMMED = frozenset({"matmul", "sum"})
"""Ops that are sums over the indices that their result lacks."""


@dataclass(frozen=True)
class Links:
    """The indices of the axes of each operand (`()`: no tensor) and of the result."""

    operands: tuple[Indices, ...]
    result: Indices


def links(op: Op) -> Links | None:
    """How the axes of an op run together; None for an op of which nothing is known."""
    if len(op.results) != 1 or op.reads or op.name == "prelu":
        return None
    if OPS[op.name].elementwise if op.name in OPS else False:
        return _elementwise(op)
    write = _LINKS.get(op.name)
    return None if write is None else write(op)


def _shape(operand: Operand) -> tuple[Dim, ...]:
    return operand.type.shape if isinstance(operand, Value | Weight) else ()


def _broadcast(shape: tuple[Dim, ...], result: tuple[Dim, ...]) -> Indices:
    """The indices of an operand aligned at the back with a result numbered 0, 1, ..."""
    skipped = len(result) - len(shape)
    return tuple(skipped + i if dim == result[skipped + i] else None for i, dim in enumerate(shape))


def _elementwise(op: Op) -> Links:
    shape = op.result.type.shape
    return Links(tuple(_broadcast(_shape(o), shape) for o in op.operands), tuple(range(len(shape))))


def _matmul(op: Op) -> Links | None:
    a, b = (_shape(o) for o in op.operands)
    if min(len(a), len(b)) < 2:
        return None
    shape = op.result.type.shape
    rank = len(shape)
    batch = shape[:-2]
    return Links(((*_broadcast(a[:-2], batch), rank - 2, rank), (*_broadcast(b[:-2], batch), rank, rank - 1)),
                 tuple(range(rank)))


def _weights(op: Op) -> Links | None:
    q, k, *rest = op.operands
    if len(_shape(q)) != 4 or len(_shape(k)) != 4:
        return None
    (b, h, t, _), (_, _, u, _) = _shape(q), _shape(k)
    masks = tuple(_broadcast(_shape(mask), (b, h, t, u)) for mask in rest[:1])
    return Links(((0, 1, 2, None), (0, None, 3, None), *masks, *((1,) for _ in rest[1:])), (0, 1, 2, 3))


def _permute(op: Op) -> Links:
    dims = op.attrs["dims"]
    assert isinstance(dims, tuple)
    rank = op.result.type.rank
    result = tuple(axis(rank, dim) for dim in dims if isinstance(dim, int))
    return Links((tuple(range(rank)),), result)


def _reduced(op: Op) -> Links:
    rank = len(_shape(op.operands[0]))
    gone, keepdim = axes(rank, attr(op, "dims")), attr(op, "keepdim")
    result = [None if i in gone else i for i in range(rank) if keepdim or i not in gone]
    return Links((tuple(range(rank)),), tuple(result))


def _along(*names: str) -> Callable[[Op], Links]:
    """Ops that do something along some axes, the same for each position of the others."""
    def write(op: Op) -> Links:
        rank = op.result.type.rank
        stated: list[Attr] = [op.attrs[name] for name in names if name in op.attrs]
        own = {i for dims in stated for i in axes(rank, dims)}
        indices = tuple(None if i in own else i for i in range(rank))
        return Links((indices,) * len(op.operands), indices)
    return write


def _expand(op: Op) -> Links:
    shape = op.result.type.shape
    return Links((_broadcast(_shape(op.operands[0]), shape),), tuple(range(len(shape))))


def _full(op: Op) -> Links:
    return Links((), tuple(range(op.result.type.rank)))


def _reshape(op: Op) -> Links:
    """Equal sizes in front and at the back are the same axes; between them, heads may be stacked as rows or back."""
    before, after = _shape(op.operands[0]), op.result.type.shape
    short = min(len(before), len(after))
    front = next((i for i in range(short) if before[i] != after[i]), short)
    back = next((i for i in range(short - front) if before[-1 - i] != after[-1 - i]), short - front)
    inner, outer = before[front:len(before) - back], after[front:len(after) - back]
    stacked = len(inner) == len(outer) == 2 and (stacks(inner, outer) or stacks(outer, inner))
    middle: Indices = (None, -1) if stacked else ()
    last = tuple(range(front, front + back))
    ends = tuple(range(front)), last
    return Links(((*ends[0], *(middle or (None,) * len(inner)), *ends[1]),),
                 (*ends[0], *(middle or (None,) * len(outer)), *ends[1]))


def stacks(apart: tuple[Dim, ...], stacked: tuple[Dim, ...]) -> bool:
    """True if [H, T] becomes [G, H / G * T] for whole H / G: the rows of some heads one after the other."""
    (heads, rows), (groups, all_rows) = apart, stacked
    if not isinstance(heads, int) or not isinstance(groups, int) or not groups or heads % groups:
        return False
    return all_rows == rows * (heads // groups)


_LINKS: dict[str, Callable[[Op], Links | None]] = {
    "matmul": _matmul, "attention_weights": _weights, "permute": _permute, "expand": _expand, "full": _full,
    "reshape": _reshape, **dict.fromkeys(("sum", "mean", "amax", "amin", "any", "all"), _reduced),
    "cat": _along("dim"), "slice": _along("dim"), "roll": _along("dims"), "flip": _along("dims"),
}


def cut(type_: Type, sizes: dict[int, Dim]) -> Type:
    """A type with the sizes of some axes replaced."""
    return Type(type_.dtype, tuple(sizes.get(i, dim) for i, dim in enumerate(type_.shape)))
