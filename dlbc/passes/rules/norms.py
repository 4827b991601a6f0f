"""Normalisations: layer, rms and group norm."""

from __future__ import annotations

from dlbc.ir.core import Op, Operand, Value
from dlbc.ir.dims import Dim
from dlbc.ir.ops import attr
from dlbc.passes.rules import Contributions, Expansion, only, rule

NORMS = ("layer_norm", "rms_norm", "group_norm")


@rule(NORMS, "detach", form="M")
def detach(at: Expansion, op: Op, m: Value) -> Contributions:
    """1 / std as a constant: g = M_y w / std, M_x = g - mean(g) (rms: g); the bias absorbs.  Ali et al. 2022."""
    _absorb_bias(at, op, m)
    g = _scaled(at, op, m)
    _, inverse = _statistics(at, op)
    g = at.mul(g, inverse)
    return only(op, 0, _back(at, op, g if op.name == "rms_norm" else at.sub(g, _mean(at, op, g))))


@rule(NORMS, "gradient", form="M", conserves=False)
def gradient(at: Expansion, op: Op, m: Value) -> Contributions:
    """The true adjoint: g = M_y w, M_x = (g - mean(g) - n mean(g n)) / std with n the normalised x."""
    _absorb_bias(at, op, m)
    g = _scaled(at, op, m)
    mean, inverse = _statistics(at, op)
    x = _rows(at, op, at.read(op.operands[0]))
    normal = at.mul(x if op.name == "rms_norm" else at.sub(x, mean), inverse)
    inner = at.mul(normal, _mean(at, op, at.mul(g, normal)))
    inner = inner if op.name == "rms_norm" else at.add(inner, _mean(at, op, g))
    return only(op, 0, _back(at, op, at.mul(at.sub(g, inner), inverse)))


@rule(NORMS, "identity", form="R")
def identity(at: Expansion, op: Op, r: Value) -> Contributions:
    """R_x = R_y.  DL-Backtrace."""
    return only(op, 0, r)


def _absorb_bias(at: Expansion, op: Op, m: Value) -> None:
    if len(op.operands) > 2:
        at.absorb("bias", at.mul(m, _affine(at, op, op.operands[2])))


def _scaled(at: Expansion, op: Op, m: Value) -> Value:
    """M_y times the affine weight, with the normalised axes laid out as rows."""
    weight = op.operands[1] if len(op.operands) > 1 else None
    return _rows(at, op, m if weight is None else at.mul(m, _affine(at, op, weight)))


def _affine(at: Expansion, op: Op, weight: Operand) -> Operand:
    weight = at.read(weight)
    if op.name != "group_norm":
        return weight
    shape = op.result.type.shape
    return at.reshape(weight, shape=(shape[1], *(1,) * (len(shape) - 2)))


def _statistics(at: Expansion, op: Op) -> tuple[Value, Value]:
    x = _rows(at, op, at.read(op.operands[0]))
    mean, inverse = at.op("row_statistics", x, dims=_depth(op), eps=attr(op, "eps"), centred=op.name != "rms_norm")
    return mean, inverse


def _mean(at: Expansion, op: Op, value: Value) -> Value:
    return at.mean(value, dims=tuple(range(-_depth(op), 0)), keepdim=True)


def _depth(op: Op) -> int:
    depth = 1 if op.name == "group_norm" else attr(op, "dims")
    assert isinstance(depth, int)
    return depth


def _rows(at: Expansion, op: Op, value: Operand) -> Value:
    """Group norm: [..., C, rest] as [..., groups, C / groups * rest]; others as they are."""
    assert isinstance(value, Value)
    if op.name != "group_norm":
        return value
    batch = value.type.rank - op.result.type.rank + 1
    total: Dim = 1
    for size in value.type.shape[batch:]:
        total = total * size
    groups = op.attrs["groups"]
    assert isinstance(groups, int)
    return at.reshape(value, shape=(*value.type.shape[:batch], groups, total // groups))


def _back(at: Expansion, op: Op, value: Value) -> Value:
    shape = (value.type.shape[0], *op.result.type.shape)
    return at.reshape(value, shape=shape) if op.name == "group_norm" else value
