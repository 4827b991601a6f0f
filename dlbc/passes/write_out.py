"""Ops whose weight, bias or mask is computed from an explained input, written out in ops whose rules share with it.

Rules of `linear`, `attention` and the like take weights, biases and masks as given. Where a model computes one from its
input (a bias of attention from the values, the layers of one network by another), relevance must reach it as well: the
op becomes products, sums and a softmax. What is written out nowhere else, such as a convolution with a computed kernel,
stays, and pairing refuses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand, Value
from dlbc.ir.dims import Dim
from dlbc.ir.ops import attr
from dlbc.passes import Pass, register
from dlbc.passes.carriers import carriers, constant_operands
from dlbc.passes.match import Dataflow, replace_ops, type_of


@register
@dataclass(frozen=True)
class WriteOut(Pass):
    """`linear`, `embedding`, `layer_norm`, `rms_norm` and `attention` with a weight, bias or mask that carries
    relevance become products, sums, selections and a softmax."""

    name: ClassVar[str] = "write_out"

    def run(self, graph: Graph) -> Graph:
        """The graph with those ops written out."""
        carrying = carriers(graph)

        def step(op: Op, flow: Dataflow, at: Builder) -> Operand:
            known = any(operand.name in carrying for operand in constant_operands(op))
            return WRITTEN[op.name](at, op, carrying) if known and op.name in WRITTEN else None

        return replace_ops(graph, step)


def _linear(at: Builder, op: Op, carrying: set[str]) -> Operand:
    """x W^T + b."""
    x, weight, bias = (*op.operands, None)[:3]
    if isinstance(weight, Value) and weight.name in carrying:
        shape = type_of(x).shape
        rows = x if len(shape) > 1 else at.reshape(x, shape=(1, *shape))
        y = at.reshape(at.matmul(rows, at.permute(weight, dims=(1, 0))), shape=op.result.type.shape)
    else:
        y = at.linear(x, weight)
    return y if bias is None else at.add(y, bias)


def _embedding(at: Builder, op: Op, carrying: set[str]) -> Operand:
    """Rows of a table; None where the ids are explained too: which of both the relevance is of, nobody says."""
    ids, table = op.operands[:2]
    return None if isinstance(ids, Value) and ids.name in carrying else at.index(table, ids, dims=(0,))


def _norm(at: Builder, op: Op, _: set[str]) -> Operand:
    """The norm, then weight and bias."""
    x, weight, bias = (*op.operands, None, None)[:3]
    y: Value = getattr(at, op.name)(x, **op.attrs)
    y = y if weight is None else at.mul(y, weight)
    return y if bias is None else at.add(y, bias)


def _attention(at: Builder, op: Op, _: set[str]) -> Operand:
    """softmax(q k^T scale + mask) v; 0 for a query that sees nothing."""
    q, k, v, mask = op.operands[:4]
    heads, groups = type_of(q).shape[1], type_of(k).shape[1]
    if any(o is not None for o in op.operands[4:]) or attr(op, "causal") or attr(op, "window") or attr(op, "softcap"):
        return None  # only an additive mask carries, and what reads those into these attributes comes later
    if groups != heads:
        k, v = (_repeated(at, x, heads) for x in (k, v))
    scores = at.mul(at.matmul(q, at.permute(k, dims=(0, 1, 3, 2))), attr(op, "scale"))
    scores = at.add(scores, mask)
    blind = at.eq(at.amax(scores, dims=(-1,), keepdim=True), -math.inf)
    weights = at.where(blind, 0.0, at.softmax(at.where(blind, 0.0, scores), dim=-1))
    return at.matmul(weights, v)


def _repeated(at: Builder, x: Operand, heads: Dim) -> Value:
    """Each group of heads as often as there are heads that read it."""
    batch, groups, *rest = type_of(x).shape
    times = heads // groups
    wide = at.expand(at.reshape(x, shape=(batch, groups, 1, *rest)), shape=(batch, groups, times, *rest))
    return at.reshape(wide, shape=(batch, groups * times, *rest))


WRITTEN: dict[str, Callable[[Builder, Op, set[str]], Operand]] = {
    "linear": _linear, "embedding": _embedding, "layer_norm": _norm, "rms_norm": _norm, "attention": _attention}
