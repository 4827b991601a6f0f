"""Reductions that are no linear map and no selection: variance, logsumexp, product. Only their true adjoint exists."""

from __future__ import annotations

from dlbc.ir.core import Op, Value
from dlbc.ir.dims import product
from dlbc.ir.ops import attr, axes
from dlbc.passes.rules import Contributions, Expansion, rule

REDUCTIONS = ("var", "logsumexp", "prod")


@rule("var", "gradient", form="M", conserves=False)
def variance(at: Expansion, op: Op, m: Value) -> Contributions:
    """M_x = 2 M_y (x - mean) / (n - correction)."""
    x, gone, m = _parts(at, op, m)
    correction = attr(op, "correction")
    assert isinstance(correction, int)
    count = product(tuple(x.type.shape[i] for i in gone)) - correction
    return (at.mul(m, at.mul(at.div(at.sub(x, at.mean(x, dims=gone, keepdim=True)), count), 2.0)),)


@rule("logsumexp", "gradient", form="M", conserves=False)
def logsumexp(at: Expansion, op: Op, m: Value) -> Contributions:
    """M_x = M_y exp(x - y)."""
    x, _, m = _parts(at, op, m)
    return (at.mul(m, at.exp(at.sub(x, at.reshape(at.read(op.result), shape=m.type.shape[1:])))),)


@rule("prod", "gradient", form="M", conserves=False)
def prod(at: Expansion, op: Op, m: Value) -> Contributions:
    """M_x = M_y times the product of the other factors."""
    x, gone, m = _parts(at, op, m)
    zero = at.eq(x, 0.0)
    nonzero = at.where(zero, 1.0, x)
    zeros = at.sum(at.cast(zero, dtype="f32"), dims=gone, keepdim=True)
    product_of_nonzero = at.prod(nonzero, dims=gone, keepdim=True)
    others = at.where(zero, at.where(at.eq(zeros, 1.0), product_of_nonzero, 0.0),
                      at.where(at.eq(zeros, 0.0), at.div(product_of_nonzero, nonzero), 0.0))
    return (at.mul(m, others),)


def _parts(at: Expansion, op: Op, m: Value) -> tuple[Value, tuple[int, ...], Value]:
    """x, the axes that went, and M_y with size 1 in their place."""
    x = at.read(op.operands[0])
    assert isinstance(x, Value)
    gone = axes(x.type.rank, attr(op, "dims"))
    kept = tuple(1 if i in gone else d for i, d in enumerate(x.type.shape))
    return x, gone, at.reshape(m, shape=(m.type.shape[0], *kept))
