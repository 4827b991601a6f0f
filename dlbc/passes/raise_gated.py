"""Gated products `activation(gate) * up` become `glu`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand, Value
from dlbc.ir.ops import attr
from dlbc.passes import Pass, register
from dlbc.passes.match import Dataflow, floating, orders, replace_ops

_LINEAR = ("linear", "conv1d", "conv2d", "conv3d", "expert_linear")
_MOVES = ("reshape", "permute", "slice", "select")
_BENT = ("clamp", "add")
"""What may stand between a linear map and a gated product; of sums those with constants."""


@register
@dataclass(frozen=True)
class RaiseGated(Pass):
    """`silu(gate) * up` is `glu` where gate and up are linear maps of one value, or parts of one map.

    Both may be clamped and moved, with a number or a constant added (GPT-OSS's `clamp(up) + 1`).
    Activations: silu, gelu, tanh-gelu, quick gelu, relu, sigmoid, tanh. Any other product (squeeze and excitation, an
    LSTM's gates, a value times a function of itself) stays a product.
    """

    name: ClassVar[str] = "raise_gated"

    def run(self, graph: Graph) -> Graph:
        """The graph with gated products raised."""
        return replace_ops(graph, _raise)


def _raise(op: Op, flow: Dataflow, at: Builder) -> Operand:
    if op.name != "mul" or not op.result.type.floating:
        return None
    for activated, up in orders(op):
        activation = _activation(flow.op(activated))
        if not activation or not floating(up):
            continue
        gate = flow.definitions[_named(activated)].operands[0]
        own = _through(gate, flow, _BENT) == _through(up, flow, _BENT)
        if not own and _source(gate, flow) is not None and _source(gate, flow) == _source(up, flow):
            return at.glu(gate, up, activation=activation)
    return None


def _activation(op: Op | None) -> str:
    if op is None:
        return ""
    if op.name == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh", "quick": "gelu_quick"}.get(str(attr(op, "approximate")), "")
    return op.name if op.name in ("silu", "relu", "sigmoid", "tanh") else ""


def _source(operand: Operand, flow: Dataflow) -> str | None:
    """What a linear map, seen through moves, clamps and sums with constants, reads."""
    operand = _through(operand, flow, (*_MOVES, *_BENT))
    linear = flow.op(operand, *_LINEAR)
    if linear is None:
        product = flow.op(operand, "matmul")
        linear = product if product is not None and flow.constant(product.operands[1]) else None
    return _named(linear.operands[0]) if linear is not None else None


def _through(operand: Operand, flow: Dataflow, names: tuple[str, ...]) -> Operand:
    """What an operand is computed from through ops of these names."""
    while (step := flow.op(operand, *names)) is not None:
        parts = orders(step) if step.name == "add" else [(step.operands[0], 0)]
        inner = next((x for x, other in parts if flow.constant(other) or flow.number(other) is not None), None)
        if inner is None:
            break
        operand = inner
    return operand


def _named(operand: Operand) -> str:
    return operand.name if isinstance(operand, Value) else ""
