"""Batch norm after a convolution or linear layer becomes part of that layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand, Value
from dlbc.ir.dims import Dim
from dlbc.ir.ops import attr
from dlbc.passes import Pass, register
from dlbc.passes.hoist_constants import HoistConstants
from dlbc.passes.match import Dataflow, build, replace_ops, type_of

_LINEAR = {"linear", *(f"conv{rank}d" for rank in (1, 2, 3)), *(f"conv_transpose{rank}d" for rank in (1, 2, 3))}


@register
@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """`batch_norm(conv(x, W, b))` is `conv(x, W s, (b - mean) s + beta)` with `s = gamma / sqrt(var + eps)`.

    The new weight and bias are computed in `prepare`, so they follow the model's weights. Only where the
    batch norm is the one reader of the layer; the joined layer keeps the layer's place in the model.
    Before a convolution, and after anything else, batch norm stays.
    """

    name: ClassVar[str] = "fold_batch_norm"

    def run(self, graph: Graph) -> Graph:
        """The graph with batch norms folded."""
        folded = replace_ops(graph, _fold)
        return folded if folded is graph else HoistConstants().run(folded)


def _fold(op: Op, flow: Dataflow, at: Builder) -> Operand:
    if op.name != "batch_norm":
        return None
    layer = flow.op(op.operands[0], *sorted(_LINEAR))
    if layer is None or not flow.single(op.operands[0]) or not all(map(flow.constant, op.operands[1:])):
        return None
    if not all(flow.constant(o) for o in layer.operands[1:]):
        return None
    if layer.name == "linear" and layer.result.type.rank != 2:
        return None
    x, weight, *rest = layer.operands
    mean, variance, *affine = op.operands[1:]
    at.place = op.place
    dtype = type_of(weight).dtype
    wide = "f32" if dtype in ("f16", "bf16") else dtype
    scale = at.rsqrt(at.add(_as(at, variance, wide), attr(op, "eps")))
    if affine and affine[0] is not None:
        scale = at.mul(scale, _as(at, affine[0], wide))
    shift = at.neg(_as(at, mean, wide)) if not rest or rest[0] is None else at.sub(
        _as(at, rest[0], wide), _as(at, mean, wide))
    shift = at.mul(shift, scale)
    if len(affine) > 1 and affine[1] is not None:
        shift = at.add(shift, _as(at, affine[1], wide))
    joined = _as(at, _scaled(at, layer, _as(at, weight, wide), scale), dtype)
    return build(at, layer.name, x, joined, _as(at, shift, dtype), attrs=layer.attrs, place=layer.place)


def _scaled(at: Builder, layer: Op, weight: Operand, scale: Value) -> Value:
    """The weight with each output channel scaled."""
    shape = type_of(weight).shape
    ones: tuple[Dim, ...] = (1,) * (len(shape) - 2)
    if not layer.name.startswith("conv_transpose"):
        return at.mul(weight, at.reshape(scale, shape=(shape[0], 1, *ones)))
    groups = attr(layer, "groups")
    assert isinstance(groups, int)
    inputs = shape[0] // groups
    grouped = at.reshape(weight, shape=(groups, inputs, *shape[1:]))
    product = at.mul(grouped, at.reshape(scale, shape=(groups, 1, shape[1], *ones)))
    return at.reshape(product, shape=shape)


def _as(at: Builder, operand: Operand, dtype: str) -> Operand:
    return operand if type_of(operand).dtype == dtype else at.cast(operand, dtype=dtype)
