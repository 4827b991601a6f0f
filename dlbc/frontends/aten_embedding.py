"""ATen's embedding bags: rows of a table summed, averaged or maximised per bag."""

from __future__ import annotations

import math

from dlbc.frontends.aten import Tracer, aten, is_tensor, type_of
from dlbc.ir.core import Op, Operand
from dlbc.ir.dims import Dim, Sym
from dlbc.ir.ops import attr

SUM, MEAN, MAX = 0, 1, 2


@aten("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(at: Tracer, weight: Operand, ids: Operand, offsets: Operand, scale_grad_by_freq: bool = False,
                  mode: int = SUM, sparse: bool = False, per_sample_weights: Operand = None,
                  include_last_offset: bool = False, padding_idx: int | None = None) -> tuple[Operand, ...]:
    """Bags of one length each (ids [bags, length], which the exporter flattens), or bags that start at offsets.

    Ids equal to padding_idx count for nothing; an empty bag is 0.
    """
    rows = at.embedding(ids, weight)
    rows = rows if per_sample_weights is None else at.mul(rows, _column(at, per_sample_weights))
    kept = None
    if padding_idx is not None and padding_idx >= 0:
        kept = at.ne(ids, padding_idx)
        rows = at.where(_column(at, kept), rows, -math.inf if mode == MAX else 0.0)
    bags, columns = at.shape
    length = _length(at, offsets, bags)
    if length is not None and not include_last_offset:
        return _even(at, rows, kept, mode, (bags, length, columns)), None, None, None
    if mode == MAX:
        raise at.unsupported("the largest of bags that start at offsets",
                             hint="give ids as [bags, length], filled up with padding_idx")
    if not include_last_offset:
        return _uneven(at, rows, kept, mode, offsets, bags), None, None, None
    with_rest = _uneven(at, rows, kept, mode, offsets, bags + 1)  # what comes after the last bag's end
    return at.slice(with_rest, dim=0, stop=bags), None, None, None


def _column(at: Tracer, x: Operand) -> Operand:
    return at.reshape(x, shape=(*type_of(x).shape, 1))


def _length(at: Tracer, offsets: Operand, bags: Dim) -> Dim | None:
    """The length of each bag where all have one: the offsets count up from 0 in steps of it."""
    found = _defining(at, offsets)
    while found is not None and (found.name in ("reshape", "cast") or (found.name == "add" and found.operands[1] == 0)):
        found = _defining(at, found.operands[0])
    if found is None or found.name not in ("arange", "mul"):
        return None
    if found.name == "arange":
        return _step(found)
    counting, factor = _defining(at, found.operands[0]), found.operands[1]
    plain = counting is not None and counting.name == "arange" and _step(counting) == 1
    return factor if plain and isinstance(factor, int | Sym) else None


def _defining(at: Tracer, x: Operand) -> Op | None:
    return next((op for op in at.ops if x in op.results), None)


def _step(counting: Op) -> Dim | None:
    step = attr(counting, "step")
    return step if attr(counting, "start") == 0 and isinstance(step, int | Sym) else None


def _even(at: Tracer, rows: Operand, kept: Operand, mode: int, shape: tuple[Dim, ...]) -> Operand:
    rows = at.reshape(rows, shape=shape)
    if mode == MAX:
        largest = at.amax(rows, dims=(1,))
        return largest if kept is None else at.where(at.eq(largest, -math.inf), 0.0, largest)
    if kept is None:
        return at.mean(rows, dims=(1,)) if mode == MEAN else at.sum(rows, dims=(1,))
    total = at.sum(rows, dims=(1,))
    if mode == SUM:
        return total
    return _shared(at, total, at.sum(at.reshape(kept, shape=shape[:2]), dims=(1,)))


def _uneven(at: Tracer, rows: Operand, kept: Operand, mode: int, offsets: Operand, bags: Dim) -> Operand:
    """Each row added to its bag: the last that starts at or before it."""
    assert is_tensor(offsets)
    places, columns = type_of(rows).shape
    dtype = type_of(rows).dtype
    started = at.ge(_column(at, at.arange(stop=places)), at.slice(offsets, dim=0, stop=bags))
    bag = at.sub(at.sum(started, dims=(1,)), 1)
    base = at.full(shape=(bags, columns), value=0.0, dtype=dtype)
    total = at.index_put(base, rows, bag, dims=(0,), accumulate=True)
    if mode == SUM:
        return total
    present = at.full(shape=(places,), value=1.0, dtype=dtype) if kept is None else at.cast(kept, dtype=dtype)
    none = at.full(shape=(bags,), value=0.0, dtype=dtype)
    return _shared(at, total, at.index_put(none, present, bag, dims=(0,), accumulate=True))


def _shared(at: Tracer, total: Operand, count: Operand) -> Operand:
    """The mean of `count` rows, 0 of none."""
    return at.div(total, _column(at, at.maximum(count, 1)))
