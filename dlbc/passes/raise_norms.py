"""Norms that arrive as arithmetic become `layer_norm` and `rms_norm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand, Type
from dlbc.ir.ops import attr, axes, promote
from dlbc.passes import Pass, register
from dlbc.passes.match import Dataflow, build, floating, orders, replace_ops, type_of

_NORMS = ("layer_norm", "rms_norm")


@register
@dataclass(frozen=True)
class RaiseNorms(Pass):
    """`x * rsqrt(mean(x ** 2) + eps)` is `rms_norm`; the same of `x - mean(x)`, or with var(x), is `layer_norm`.

    Over the last axes, written with pow or a product, rsqrt or a division by sqrt, with or without casts
    to float32 and back. A constant factor over those axes becomes the weight (Gemma's `1 + weight` is
    one, computed in `prepare`), a constant added to a layer_norm its bias, if nothing else reads the norm.
    """

    name: ClassVar[str] = "raise_norms"

    def run(self, graph: Graph) -> Graph:
        """The graph with norms raised."""
        return replace_ops(graph, _raise)


def _raise(op: Op, flow: Dataflow, at: Builder) -> Operand:
    if op.name in ("mul", "div"):
        return _normalised(op, flow, at) or _weighted(op, flow, at)
    if op.name == "add":
        return _biased(op, flow, at)
    if op.name == "cast":
        return _narrowed(op, flow, at)
    return None


def _normalised(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """The norm itself: x (or weight * x) times the inverse root of its mean square plus eps."""
    for x, scale in orders(op) if op.name == "mul" else (op.operands,):
        statistics = _inverse_root(scale, op.name == "div", flow)
        if statistics is None or not floating(x):
            continue
        moment, eps = statistics
        norm = _norm(x, moment, eps, flow, at)
        if norm is not None:
            return norm
        product = flow.op(x, "mul")  # weight * (x - mean) / sqrt(variance + eps)
        for inner, weight in orders(product) if product is not None else ():
            if flow.constant(weight) and floating(inner):
                norm = _norm(inner, moment, eps, flow, at)
                if norm is not None:
                    plain = at.ops.pop() if _fits(at.ops[-1], weight) else None
                    return (build(at, plain.name, *plain.operands, weight, attrs=plain.attrs) if plain is not None
                            else at.mul(norm, weight))
    return None


def _inverse_root(operand: Operand, divided: bool, flow: Dataflow) -> tuple[Operand, float] | None:
    """`(m, eps)` where the operand is `1 / sqrt(m + eps)` (`sqrt(m + eps)` when it divides)."""
    root = flow.op(operand, "sqrt" if divided else "rsqrt")
    if root is None and (power := flow.op(operand, "pow")) is not None:
        root = power if flow.number(power.operands[1]) == (0.5 if divided else -0.5) else None
    if root is None and not divided:
        inverse = flow.op(operand, "reciprocal", "div")
        if inverse is not None and (inverse.name == "reciprocal" or flow.number(inverse.operands[0]) == 1):
            root = flow.op(inverse.operands[-1], "sqrt")
    if root is None:
        return None
    return flow.with_number(flow.op(root.operands[0], "add"))


def _norm(x: Operand, moment: Operand, eps: float, flow: Dataflow, at: Builder) -> Operand:
    """rms_norm or layer_norm of what `moment` is a mean square of, if that is x."""
    found = flow.op(moment, "mean", "var")
    if found is None or not attr(found, "keepdim"):
        return None
    centred = _centred(x, flow)
    if found.name == "var":
        if centred is None or found.operands[0] != centred[0] or attr(found, "correction") != 0:
            return None
        dims = _last_axes(found)
        return at.layer_norm(centred[0], dims=dims, eps=eps) if dims and dims == centred[1] else None
    square = flow.op(found.operands[0], "pow", "mul")
    if square is None or square.operands[0] != x:
        return None
    if square.operands[1] != x if square.name == "mul" else flow.number(square.operands[1]) != 2:
        return None
    dims = _last_axes(found)
    if not dims:
        return None
    if centred is not None and centred[1] == dims:
        return at.layer_norm(centred[0], dims=dims, eps=eps)
    return at.rms_norm(x, dims=dims, eps=eps)


def _centred(x: Operand, flow: Dataflow) -> tuple[Operand, int] | None:
    """`(y, dims)` where x is `y - mean(y)` over the last `dims` axes."""
    difference = flow.op(x, "sub")
    mean = flow.op(difference.operands[1], "mean") if difference is not None else None
    if difference is None or mean is None or mean.operands[0] != difference.operands[0] or not attr(mean, "keepdim"):
        return None
    return difference.operands[0], _last_axes(mean)


def _last_axes(op: Op) -> int:
    """How many axes at the end a reduction is over; 0 when it is over others."""
    rank = type_of(op.operands[0]).rank
    dims = axes(rank, attr(op, "dims"))
    return len(dims) if dims == tuple(range(rank - len(dims), rank)) else 0


def _weighted(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """A norm without weight, times a constant over its axes. Casts between the two go."""
    if op.name != "mul":
        return None
    for x, weight in orders(op):
        norm = flow.op(flow.uncast(x), *_NORMS)
        if norm is None or not flow.constant(weight) or not flow.single(x) or len(norm.operands) > 1:
            continue
        if not _fits(norm, weight) or (flow.uncast(x) != x and not flow.single(norm.result)):
            continue
        source = flow.uncast(norm.operands[0])
        for data in (source, norm.operands[0]):
            dtype = promote(type_of(data), type_of(weight)) if norm.name == "rms_norm" else type_of(data).dtype
            if Type(dtype, type_of(data).shape) == op.result.type:
                return build(at, norm.name, data, weight, attrs=norm.attrs)
    return None


def _biased(op: Op, flow: Dataflow, at: Builder) -> Operand:
    for x, bias in orders(op):
        norm = flow.op(x, "layer_norm")
        if norm is not None and len(norm.operands) < 3 and flow.constant(bias) and flow.single(x) and _fits(norm, bias):
            weight = norm.operands[1] if len(norm.operands) > 1 else None
            return build(at, "layer_norm", norm.operands[0], weight, bias, attrs=norm.attrs)
    return None


def _narrowed(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """cast(norm(cast(x, f32)), type of x): the norm computes in float32 anyway."""
    norm = flow.op(op.operands[0], *_NORMS)
    if norm is None or len(norm.operands) > 1 or not flow.single(op.operands[0]):
        return None
    x = flow.uncast(norm.operands[0])
    return build(at, norm.name, x, attrs=norm.attrs) if type_of(x) == op.result.type else None


def _fits(norm: Op, constant: Operand) -> bool:
    dims = attr(norm, "dims")
    assert isinstance(dims, int)
    return type_of(constant).shape == norm.result.type.shape[-dims:]
