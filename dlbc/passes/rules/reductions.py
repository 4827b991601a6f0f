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
    """M_x = M_y y / x, 0 where x is 0."""
    x, _, m = _parts(at, op, m)
    return (at.mul(m, at.safe_div(at.reshape(at.read(op.result), shape=m.type.shape[1:]), x)),)


def _parts(at: Expansion, op: Op, m: Value) -> tuple[Value, tuple[int, ...], Value]:
    """x, the axes that went, and M_y with size 1 in their place."""
    x = at.read(op.operands[0])
    assert isinstance(x, Value)
    gone = axes(x.type.rank, attr(op, "dims"))
    kept = tuple(1 if i in gone else d for i, d in enumerate(x.type.shape))
    return x, gone, at.reshape(m, shape=(m.type.shape[0], *kept))
