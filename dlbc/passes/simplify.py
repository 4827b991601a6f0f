"""Algebraic clean-up of the lowered relevance: what moves nothing, multiplies by one or is zero goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand, Value
from dlbc.ir.ops import attr, axes
from dlbc.passes import Pass, register
from dlbc.passes.canonicalise import local
from dlbc.passes.match import Dataflow, floating, replace_ops, type_of
from dlbc.passes.rewrite import with_saves

_ZERO_TO_ZERO = frozenset({
    "reshape", "permute", "expand", "slice", "slice_adjoint", "select", "select_adjoint", "flip", "roll",
    "triangle", "gather", "take", "take_adjoint", "index", "index_adjoint", "sum", "mean", "cast", "neg", "abs",
    "relu", "avg_pool", "avg_pool_adjoint", "adaptive_avg_pool", "adaptive_avg_pool_adjoint", "max_pool_adjoint",
    "adaptive_max_pool_adjoint", "interpolate", "interpolate_adjoint", "cumsum",
    "relu_adjoint",
})
"""Ops that return zeros for a first operand of zeros, whatever else they read."""

_BILINEAR = frozenset({"mul", "matmul", "einsum", "linear", "rotary",
                       *(f"conv{rank}d" for rank in (1, 2, 3)), *(f"conv_transpose{rank}d" for rank in (1, 2, 3))})
"""Ops that return zeros where any factor is zeros (finite numbers taken for granted), biases apart."""


@register
@dataclass(frozen=True)
class Simplify(Pass):
    """Exact rewrites only: the rules of `canonicalise`, and zeros carried through moves, products and sums.

    Reductions over axes of size 1 become reshapes, a slice of what a slice_adjoint put there is the thing itself.
    `abs` of what is never negative goes, and so does a ReLU's way back for what is 0 wherever the ReLU was. Nothing is
    fused and no sum is reordered.
    """

    name: ClassVar[str] = "simplify"

    def run(self, graph: Graph) -> Graph:
        """The graph with its relevance section simplified."""
        if graph.relevance is None:
            return graph
        return with_saves(replace_ops(graph, _simplified, "relevance"))


def _simplified(op: Op, flow: Dataflow, at: Builder) -> Operand:
    if op.name.startswith("rel.") or op.name == "full":
        return None
    rule = _RULES.get(op.name)
    new = rule(op, flow, at) if rule is not None else None
    if new is None and _is_zero(op, flow):
        new = at.zeros(op.result.type)
    return new if new is not None else local(op, flow, at)


def _zero(operand: Operand, flow: Dataflow) -> bool:
    """True for tensors filled with 0 and for the literal 0."""
    filled = flow.op(operand, "full")
    value = filled.attrs["value"] if filled is not None else operand
    return isinstance(value, (int, float)) and value == 0


def _is_zero(op: Op, flow: Dataflow) -> bool:
    if not op.operands or not op.result.type.floating:
        return False
    if op.name in _ZERO_TO_ZERO or op.name in ("div", "safe_div"):
        return isinstance(op.operands[0], Value) and _zero(op.operands[0], flow)
    if op.name == "expert_linear":
        return len(op.operands) == 3 and _zero(op.operands[0], flow)
    if op.name in _BILINEAR:
        biased = op.name not in ("mul", "matmul", "einsum", "rotary") and len(op.operands) > 2
        return not biased and any(_zero(o, flow) for o in op.operands)
    return op.name in ("add", "sub", "cat") and all(_zero(o, flow) for o in op.operands)


def _sum(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """Over axes of size 1 only; mean, amax and amin alike."""
    x = type_of(op.operands[0])
    if any(x.shape[a] != 1 for a in axes(x.rank, attr(op, "dims"))) or x.dtype != op.result.type.dtype:
        return None
    same = op.result.type == x
    return op.operands[0] if same else at.reshape(op.operands[0], shape=op.result.type.shape)


def _add(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """x + 0, where the zeros may broadcast x."""
    for x, zero in (op.operands, op.operands[::-1]) if op.name == "add" else (op.operands,):
        if _zero(zero, flow) and floating(x) and type_of(x).dtype == op.result.type.dtype:
            same = type_of(x) == op.result.type
            return x if same else at.expand(x, shape=op.result.type.shape)
    return at.neg(op.operands[1]) if op.name == "sub" and _zero(op.operands[0], flow) and type_of(
        op.operands[1]) == op.result.type else None


def _slice(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """The slice that a slice_adjoint has just put into zeros."""
    put = flow.op(op.operands[0], "slice_adjoint", "select_adjoint")
    if put is None or put.name[:-8] != op.name:
        return None
    names = ("dim", "start", "stop", "step") if op.name == "slice" else ("dim", "index")
    same = all(attr(op, name) == attr(put, name) for name in names)
    return put.operands[0] if same else None


def _slice_adjoint(op: Op, flow: Dataflow, at: Builder) -> Operand:
    return op.operands[0] if type_of(op.operands[0]) == op.result.type and attr(op, "step") == 1 else None


def _abs(op: Op, flow: Dataflow, at: Builder) -> Operand:
    positive = flow.op(op.operands[0], "abs", "relu", "exp", "sigmoid", "softmax", "sqrt", "rsqrt")
    return op.operands[0] if positive is not None and floating(positive.operands[0]) else None


def _where(op: Op, flow: Dataflow, at: Builder) -> Operand:
    _, a, b = op.operands
    return a if a == b and type_of(a) == op.result.type else None


def _relu_adjoint(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """Of a product with what the ReLU gave: that is 0 there already."""
    r, x = op.operands
    product = flow.op(r, "mul")
    for factor in product.operands if product is not None else ():
        relu = flow.op(factor, "relu")
        if relu is not None and x in (factor, *relu.operands) and type_of(r) == op.result.type:
            return r
    return None


_RULES: dict[str, Callable[[Op, Dataflow, Builder], Operand]] = {
    "sum": _sum, "mean": _sum, "amax": _sum, "amin": _sum, "add": _add, "sub": _add, "slice": _slice,
    "select": _slice, "slice_adjoint": _slice_adjoint, "abs": _abs, "where": _where,
    "relu_adjoint": _relu_adjoint,
}
