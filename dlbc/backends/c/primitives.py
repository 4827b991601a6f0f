"""Ops of whole rows as the ones that loops are written for: sums, extremes and what is pointwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from dlbc.ir.builder import Builder
from dlbc.ir.core import Op, Operand, Type, Value, Weight, values
from dlbc.ir.dims import Dim, product
from dlbc.ir.ops import attr, axes


def written_out(ops: Sequence[Op], taken: Iterable[str]) -> list[Op]:
    """The ops with every op of `WRITTEN` in simpler ones; `taken` are names that new values must not have."""
    found: list[Op] = []
    names = {*taken, *(value.name for op in ops for value in (*op.results, *values(op.operands)))}
    for op in ops:
        if op.name not in WRITTEN:
            found.append(op)
            continue
        at = Builder(names, place=op.place)
        made = dict(zip((v.name for v in WRITTEN[op.name](at, op)), op.results, strict=True))
        found += [_renamed(each, made) for each in at.ops]
        names |= {value.name for each in at.ops for value in each.results}
    return found


def _renamed(op: Op, made: dict[str, Value]) -> Op:
    """An op whose values are called as those of the op that it is part of."""
    operands = tuple(made.get(o.name, o) if isinstance(o, Value) else o for o in op.operands)
    return replace(op, operands=operands, results=tuple(made.get(r.name, r) for r in op.results))


def _type(operand: Operand) -> Type:
    assert isinstance(operand, Value | Weight)
    return operand.type


def _count(x: Type, over: Sequence[int]) -> Dim:
    return product(tuple(x.shape[axis] for axis in over))


def _mean(at: Builder, op: Op) -> tuple[Value, ...]:
    x, dims = _type(op.operands[0]), axes(_type(op.operands[0]).rank, attr(op, "dims"))
    total = at.sum(op.operands[0], dims=dims, keepdim=attr(op, "keepdim"))
    return (at.div(total, _count(x, dims)),)


def _var(at: Builder, op: Op) -> tuple[Value, ...]:
    x, dims = op.operands[0], axes(_type(op.operands[0]).rank, attr(op, "dims"))
    count, correction = _count(_type(x), dims), attr(op, "correction")
    assert isinstance(correction, int)
    off = at.sub(x, at.div(at.sum(x, dims=dims, keepdim=True), count))
    return (at.div(at.sum(at.mul(off, off), dims=dims, keepdim=attr(op, "keepdim")), count - correction),)


def _logsumexp(at: Builder, op: Op) -> tuple[Value, ...]:
    x, dims, keep = op.operands[0], axes(_type(op.operands[0]).rank, attr(op, "dims")), attr(op, "keepdim")
    tops = []
    for kept in (True, keep):
        top = at.amax(x, dims=dims, keepdim=kept)
        tops.append(at.where(at.isinf(top), 0.0, top))
    total = at.sum(at.exp(at.sub(x, tops[0])), dims=dims, keepdim=keep)
    return (at.add(at.log(total), tops[1]),)


def _softmax(at: Builder, op: Op) -> tuple[Value, ...]:
    x, dims = op.operands[0], axes(_type(op.operands[0]).rank, attr(op, "dim"))
    powers = at.exp(at.sub(x, at.amax(x, dims=dims, keepdim=True)))
    return (at.div(powers, at.sum(powers, dims=dims, keepdim=True)),)


def _log_softmax(at: Builder, op: Op) -> tuple[Value, ...]:
    x, dims = op.operands[0], axes(_type(op.operands[0]).rank, attr(op, "dim"))
    below = at.sub(x, at.amax(x, dims=dims, keepdim=True))
    return (at.sub(below, at.log(at.sum(at.exp(below), dims=dims, keepdim=True))),)


def _statistics(at: Builder, op: Op, *, centred: bool) -> tuple[Value | None, Value, Value]:
    """The mean of rows (None unless centred), 1 / sqrt(variance + eps), and rows less their mean."""
    x, last = op.operands[0], attr(op, "dims")
    assert isinstance(last, int) and isinstance(x, Value | Weight)
    dims = tuple(range(x.type.rank - last, x.type.rank))
    count = _count(x.type, dims)
    mean = at.div(at.sum(x, dims=dims, keepdim=True), count) if centred else None
    off = x if mean is None else at.sub(x, mean)
    square = at.div(at.sum(at.mul(off, off), dims=dims, keepdim=True), count)
    scale = at.reciprocal(at.sqrt(at.add(square, attr(op, "eps"))))
    return mean, scale, off  # type: ignore[return-value]  # a weight is read as a value is


def _row_statistics(at: Builder, op: Op) -> tuple[Value, ...]:
    mean, scale, _ = _statistics(at, op, centred=bool(attr(op, "centred")))
    return mean if mean is not None else at.zeros(op.results[0].type), scale


def _norm(at: Builder, op: Op) -> tuple[Value, ...]:
    _, scale, off = _statistics(at, op, centred=op.name == "layer_norm")
    return (_affine(at, at.mul(off, scale), op.operands[1:]),)


def _affine(at: Builder, y: Value, operands: Sequence[Operand]) -> Value:
    """`y * weight + bias`, of those there are."""
    for combine, operand in zip((at.mul, at.add), operands, strict=False):
        y = y if operand is None else combine(y, operand)
    return y


def _batch_norm(at: Builder, op: Op) -> tuple[Value, ...]:
    x, mean, variance, *affine = op.operands
    shape = (-1, *(1,) * (_type(x).rank - 2))

    def channels(operand: Operand) -> Operand:
        return None if operand is None else at.reshape(operand, shape=(_type(operand).shape[0], *shape[1:]))

    y = at.mul(at.sub(x, channels(mean)), at.reciprocal(at.sqrt(at.add(channels(variance), attr(op, "eps")))))
    return (_affine(at, y, [channels(each) for each in affine]),)


WRITTEN: dict[str, Callable[[Builder, Op], tuple[Value, ...]]] = {
    "mean": _mean, "var": _var, "logsumexp": _logsumexp, "softmax": _softmax, "log_softmax": _log_softmax,
    "row_statistics": _row_statistics, "layer_norm": _norm, "rms_norm": _norm, "batch_norm": _batch_norm,
}
"""How an op is written in simpler ones: the ops are appended, their results returned."""
