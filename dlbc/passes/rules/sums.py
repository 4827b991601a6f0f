"""Sums of several values: add, sub, and what is added into a tensor by index. A constant term absorbs its share."""

from __future__ import annotations

from dlbc.ir.core import Op, Operand, Type, Value, Weight
from dlbc.ir.ops import STABILISER, attr
from dlbc.passes.rules import Contributions, Expansion, rule

SUMS = ("add", "sub")
ADDED = ("scatter_add", "index_put")
"""Sums of a base (operand 0) and what is added into it; `index_put` only where it accumulates."""


@rule(SUMS, "epsilon", form="M")
def epsilon(at: Expansion, op: Op, m: Value, *, eps: float = STABILISER) -> Contributions:
    """R_a = a R_y / e(y); M_a = M_y y / e(y), the same for every term.  Bach et al. 2015."""
    y = at.read(op.result)
    kept = at.stabilised(m, at.finite(y) if _may_be_infinite(at, op) else y, eps)
    return _signed_terms(at, op, kept)


@rule(SUMS, "gradient", form="M", conserves=False)
def gradient(at: Expansion, op: Op, m: Value) -> Contributions:
    """M_a = M_y: the true adjoint."""
    return _signed_terms(at, op, m)


@rule(SUMS, "absolute", form="R")
def absolute(at: Expansion, op: Op, r: Value) -> Contributions:
    """R_a = |a| R_y / (|a| + |b|).  DL-Backtrace default mode, arXiv 2411.12643."""
    sizes = [_size(at, o, _may_be_infinite(at, op)) for o in op.operands]
    share = at.shared(r, at.add(*sizes))
    return tuple(_term(at, o, at.mul(size, share)) for o, size in zip(op.operands, sizes, strict=True))


@rule(SUMS, "equal", form="R")
def equal(at: Expansion, op: Op, r: Value) -> Contributions:
    """R_a = R_y / n for n terms.  dl-backtrace 0.1.24."""
    share = at.div(r, float(len(op.operands)))
    return tuple(_term(at, o, share) for o in op.operands)


def _signed_terms(at: Expansion, op: Op, m: Value) -> Contributions:
    found: list[Value | None] = []
    for position, operand in enumerate(op.operands):
        own = at.neg(m) if op.name == "sub" and position == 1 else m
        if at.carries(operand):
            assert isinstance(operand, Value)
            found.append(at.unbroadcast(own, operand.type))
        else:
            at.absorb("constant", at.mul(own, at.finite(at.read(operand))))
            found.append(None)
    return tuple(found)


def _term(at: Expansion, operand: Operand, share: Value) -> Value | None:
    if at.carries(operand):
        assert isinstance(operand, Value)
        return at.unbroadcast(share, operand.type)
    at.absorb("constant", share)
    return None


def _size(at: Expansion, operand: Operand, may_be_infinite: bool) -> Operand:
    if not hasattr(operand, "type"):
        return abs(operand) if isinstance(operand, (int, float)) else operand
    size = at.abs(at.read(operand))
    return at.finite(size) if may_be_infinite else size


def _may_be_infinite(at: Expansion, op: Op) -> bool:
    """A mask of -inf was added, here or before, or the largest score is subtracted from masked scores."""
    return op.name == "sub" or op.result.name in at.facts.infinite or any(
        isinstance(kind := getattr(o, "type", None), Type) and kind.rank > 0 and not at.carries(o) for o in op.operands)


# --- added by index: y = base, and y[index] += source ------------------------------------------------

@rule(ADDED, "epsilon", form="M")
def added_epsilon(at: Expansion, op: Op, m: Value, *, eps: float = STABILISER) -> Contributions:
    """R_a = a R_y / e(y) for every term that was added into y.  Bach et al. 2015."""
    return _added(at, op, at.stabilised(m, at.read(op.result), eps))


@rule(ADDED, "gradient", form="M", conserves=False)
def added_gradient(at: Expansion, op: Op, m: Value) -> Contributions:
    """M_a = M_y for every term: the true adjoint."""
    return _added(at, op, m)


@rule(ADDED, "absolute", form="R")
def added_absolute(at: Expansion, op: Op, r: Value) -> Contributions:
    """R_a = |a| R_y / sum |terms|, over the terms that were added into y.  DL-Backtrace, arXiv 2411.12643."""
    base, source = _parts(op)
    sizes = {i: _size(at, o, False) for i, o in ((0, base), (source, op.operands[source]))}
    total: Value = getattr(at, op.name)(*(sizes.get(i, o) for i, o in enumerate(op.operands)), **op.attrs)
    return _added(at, op, at.shared(r, total), sizes)


def _added(at: Expansion, op: Op, m: Value, factors: dict[int, Operand] | None = None) -> Contributions:
    """m as it is to the base and fetched at the indices to the source, times `factors` where given."""
    base, source = _parts(op)
    if op.name == "scatter_add":
        index, dim = op.operands[1], attr(op, "dim")
        assert isinstance(index, (Value, Weight)) and isinstance(dim, int)
        wide = at.expand(index, shape=(m.type.shape[0], *index.type.shape))
        fetched = at.gather(m, wide, dim=dim + 1 if dim >= 0 else dim)
    else:
        dims = tuple(d + 1 for d in attr(op, "dims"))  # type: ignore[union-attr, operator]
        fetched = at.index(m, *op.operands[2:], dims=dims)
    found: list[Value | None] = [None] * len(op.operands)
    for position, operand, amount in ((0, base, m), (source, op.operands[source], fetched)):
        amount = amount if factors is None else at.mul(amount, factors[position])
        if at.carries(operand):
            assert isinstance(operand, Value)
            found[position] = at.unbroadcast(amount, operand.type)
        else:
            at.absorb("constant", at.mul(amount, at.read(operand)) if factors is None else amount)
    return tuple(found)


def _parts(op: Op) -> tuple[Operand, int]:
    """The base, and the position of what is added."""
    return op.operands[0], 2 if op.name == "scatter_add" else 1
