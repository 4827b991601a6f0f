"""Selections: relevance goes to what was selected: where, clamp, maximum, max pooling, amax, embedding."""

from __future__ import annotations

from dlbc.ir.core import Op, Operand, Value
from dlbc.ir.ops import attr, axes
from dlbc.passes.rules import Contributions, Expansion, only, rule

SELECTIONS = ("where", "clamp", "maximum", "minimum", "max_pool", "adaptive_max_pool", "amax", "amin",
              "max_with_index", "min_with_index")


@rule("where", "select", form="any")
def where(at: Expansion, op: Op, r: Value) -> Contributions:
    """To the selected branch; a constant branch absorbs."""
    condition, a, b = op.operands
    return None, _branch(at, at.where(condition, r, 0.0), a), _branch(at, at.where(condition, 0.0, r), b)


@rule("clamp", "select", form="any")
def clamp(at: Expansion, op: Op, r: Value) -> Contributions:
    """To x where it lies within the bounds; a bound is a constant and absorbs."""
    x, low, high = op.operands[0], attr(op, "low"), attr(op, "high")
    inside = at.ge(x, low) if low is not None else None
    if high is not None:
        below = at.le(x, high)
        inside = below if inside is None else at.logical_and(inside, below)
    return only(op, 0, r if inside is None else at.where(inside, r, 0.0))


@rule(("maximum", "minimum"), "select", form="any")
def extremum(at: Expansion, op: Op, r: Value) -> Contributions:
    """To the larger (smaller) operand, equally where they tie."""
    a, b = op.operands
    wins = at.gt if op.name == "maximum" else at.lt
    tie = at.mul(r, at.where(at.eq(a, b), 0.5, 0.0))
    return (_branch(at, at.add(at.where(wins(a, b), r, 0.0), tie), a),
            _branch(at, at.add(at.where(wins(b, a), r, 0.0), tie), b))


@rule(("max_pool", "adaptive_max_pool"), "select", form="any")
def max_pool(at: Expansion, op: Op, r: Value) -> Contributions:
    """To the winner of each window, equally among ties."""
    attrs = dict(op.attrs) if op.name == "max_pool" else {}
    return only(op, 0, getattr(at, f"{op.name}_adjoint")(r, at.read(op.operands[0]), at.read(op.result), **attrs))


@rule(("amax", "amin", "max_with_index", "min_with_index"), "select", form="any")
def reduce_extremum(at: Expansion, op: Op, r: Value, *_: Value | None) -> Contributions:
    """To the winner along the axes, equally among ties."""
    x = op.operands[0]
    assert isinstance(x, Value)
    gone = axes(x.type.rank, attr(op, "dims" if op.name in ("amax", "amin") else "dim"))
    kept = tuple(1 if i in gone else d for i, d in enumerate(x.type.shape))
    winners = at.cast(at.eq(x, at.reshape(op.result, shape=kept)), dtype="f32")
    share = at.div(winners, at.sum(winners, dims=gone, keepdim=True))
    return only(op, 0, at.mul(at.reshape(r, shape=(r.type.shape[0], *kept)), share))


@rule("embedding", "sum", form="R")
def embedding(at: Expansion, op: Op, r: Value) -> Contributions:
    """R of an id is the sum over its vector's components."""
    return only(op, 0, at.sum(r, dims=(-1,)))


def _branch(at: Expansion, r: Value, operand: Operand) -> Value | None:
    if at.carries(operand):
        assert isinstance(operand, Value)
        return at.unbroadcast(r, operand.type)
    return None
