"""Activations written as formulas become the op of that name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand
from dlbc.ir.ops import attr
from dlbc.passes import Pass, register
from dlbc.passes.match import Dataflow, close, floating, orders, replace_ops


@register
@dataclass(frozen=True)
class RaiseActivations(Pass):
    """Formulas of one value that the catalogue has a name for.

    gelu (erf, tanh in both usual forms, quick), silu, mish, hardswish, hardsigmoid, sigmoid as
    `1 / (1 + exp(-x))`, softsign, log_sigmoid, relu as clamp or maximum; softmax and its logarithm with
    `x - logsumexp(x)`. Products may be associated and
    ordered in any way; constants may differ from the exact ones by rounding (1e-6).
    """

    name: ClassVar[str] = "raise_activations"

    def run(self, graph: Graph) -> Graph:
        """The graph with activations raised."""
        return replace_ops(graph, _raise)


def _raise(op: Op, flow: Dataflow, at: Builder) -> Operand:
    if not op.result.type.floating:
        return None
    for pattern in _PATTERNS.get(op.name, ()):
        found = pattern(op, flow, at)
        if found is not None:
            return found
    return None


# --- products ----------------------------------------------------------------------------------------

def _product(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """A product of x with a function of x: the gelus, silu, mish, hardswish."""
    for gate in flow.factors(op.result)[1]:
        for x in _arguments(gate, flow):
            coefficient, parts = flow.factors(op.result, x)
            name = _named(coefficient, x, gate, flow) if parts in ([x, gate], [gate, x]) else ""
            if name.startswith("gelu"):
                return at.gelu(x, approximate=name[5:])
            if name:
                return at.op(name, x)[0]
    return None


def _arguments(gate: Operand, flow: Dataflow) -> list[Operand]:
    """What the gate may be a function of."""
    op = flow.op(gate, "sigmoid", "hardsigmoid", "tanh", "add", "clamp")
    if op is None:
        return []
    if op.name == "clamp":
        return [_relu6_of(gate, flow)]
    if op.name == "add":  # 1 + erf(...), 1 + tanh(...)
        shifted = flow.with_number(op)
        function = flow.op(shifted[0], "erf", "tanh") if shifted is not None else None
        if function is None:
            return []
        inside = flow.op(function.operands[0], "mul", "div")
        operands = inside.operands if inside is not None else ()
        return [o for operand in operands for o in (operand, *getattr(flow.op(operand, "add", "mul"), "operands", ()))]
    inside = flow.op(op.operands[0], "mul", "softplus")
    return [op.operands[0], *(inside.operands if inside is not None else ())]


def _named(coefficient: float, x: Operand, gate: Operand, flow: Dataflow) -> str:
    """The name of `coefficient * x * gate` (`gelu.<approximation>` for a gelu), or nothing."""
    if close(coefficient, 1 / 6):
        return "hardswish" if _relu6_of(gate, flow) == x else ""
    if close(coefficient, 0.5):
        return _gelu(x, gate, flow)
    op = flow.op(gate, "sigmoid", "tanh", "hardsigmoid")
    if op is None or not close(coefficient, 1.0):
        return ""
    if op.name == "tanh":
        inner = flow.op(op.operands[0], "softplus")
        return "mish" if inner is not None and inner.operands[0] == x and attr(inner, "beta") == 1 else ""
    if op.name == "hardsigmoid":
        return "hardswish" if op.operands[0] == x else ""
    scale, inside = flow.factors(op.operands[0], x)
    if inside != [x]:
        return ""
    return "silu" if scale == 1 else "gelu.quick" if close(scale, 1.702) else ""


def _gelu(x: Operand, gate: Operand, flow: Dataflow) -> str:
    """The approximation, where gate is `1 + erf(x / sqrt 2)` or `1 + tanh(...)`."""
    shifted = flow.with_number(flow.op(gate, "add"))
    op = flow.op(shifted[0], "erf", "tanh") if shifted is not None and shifted[1] == 1 else None
    if op is None:
        return ""
    scale, inside = flow.factors(op.operands[0], x)
    if op.name == "erf":
        return "gelu.none" if inside == [x] and close(scale, math.sqrt(0.5)) else ""
    if not close(scale, math.sqrt(2 / math.pi)):
        return ""
    if len(inside) == 1:  # sqrt(2 / pi) * (x + 0.044715 x ** 3)
        return "gelu.tanh" if _cubic(inside[0], x, x, 3, flow) else ""
    if len(inside) == 2 and x in inside:  # sqrt(2 / pi) * x * (1 + 0.044715 x ** 2)
        other = inside[1] if inside[0] == x else inside[0]
        return "gelu.tanh" if _cubic(other, 1, x, 2, flow) else ""
    return ""


def _cubic(operand: Operand, first: Operand, x: Operand, power: int, flow: Dataflow) -> bool:
    """True for `first + 0.044715 * x ** power`."""
    total = flow.op(operand, "add")
    for a, b in orders(total) if total is not None else ():
        if a == first or (isinstance(first, int) and flow.number(a) == first):
            scale, parts = flow.factors(b, x)
            if parts == [x] * power and close(scale, 0.044715):
                return True
    return False


def _relu6_of(operand: Operand, flow: Dataflow) -> Operand:
    """x where the operand is `clamp(x + 3, 0, 6)`."""
    clamp = flow.op(operand, "clamp")
    if clamp is None or (attr(clamp, "low"), attr(clamp, "high")) != (0, 6):
        return None
    shifted = flow.with_number(flow.op(clamp.operands[0], "add"))
    return shifted[0] if shifted is not None and shifted[1] == 3 else None


# --- quotients and the rest --------------------------------------------------------------------------

def _quotient(op: Op, flow: Dataflow, at: Builder) -> Operand:
    x, divisor = op.operands if op.name == "div" else (1, op.operands[0])
    number = flow.number(divisor)
    if number is not None:
        inner = _relu6_of(x, flow)
        return at.hardsigmoid(inner) if inner is not None and close(number, 6.0) else None
    shifted = flow.with_number(flow.op(divisor, "add"))
    if shifted is None or shifted[1] != 1:
        return None
    magnitude = flow.op(shifted[0], "abs")
    if magnitude is not None and magnitude.operands[0] == x:
        return at.softsign(x)
    power = flow.op(shifted[0], "exp")
    negative = flow.op(power.operands[0], "neg") if power is not None else None
    if negative is None:
        return None
    if flow.number(x) == 1:
        return at.sigmoid(negative.operands[0])
    return at.silu(x) if negative.operands[0] == x else None


def _hardsigmoid(op: Op, flow: Dataflow, at: Builder) -> Operand:
    coefficient, parts = flow.factors(op.result)
    inner = _relu6_of(parts[0], flow) if len(parts) == 1 and close(coefficient, 1 / 6) else None
    return at.hardsigmoid(inner) if inner is not None else None


def _relu(op: Op, flow: Dataflow, at: Builder) -> Operand:
    if op.name == "clamp":
        plain = attr(op, "low") == 0 and attr(op, "high") is None
        return at.relu(op.operands[0]) if plain else None
    for x, zero in orders(op):
        if flow.number(zero) == 0 and floating(x):
            return at.relu(x)
    return None


def _log_sigmoid(op: Op, flow: Dataflow, at: Builder) -> Operand:
    inner = flow.op(op.operands[0], "sigmoid")
    return at.log_sigmoid(inner.operands[0]) if inner is not None else None


def _log_softmax(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """x - logsumexp(x) along one axis."""
    x, whole = op.operands[0], flow.op(op.operands[1], "logsumexp")
    dims = attr(whole, "dims") if whole is not None else ()
    if whole is None or whole.operands[0] != x or not isinstance(dims, tuple) or len(dims) != 1:
        return None
    return at.log_softmax(x, dim=dims[0]) if attr(whole, "keepdim") else None


def _softmax(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """The exponential of log_softmax."""
    inner = flow.op(op.operands[0], "log_softmax")
    return None if inner is None else at.softmax(inner.operands[0], dim=attr(inner, "dim"))


_PATTERNS: dict[str, tuple[Callable[[Op, Dataflow, Builder], Operand], ...]] = {
    "mul": (_product, _hardsigmoid), "div": (_product, _quotient), "reciprocal": (_quotient,),
    "clamp": (_relu,), "maximum": (_relu,), "log": (_log_sigmoid,), "sub": (_log_softmax,), "exp": (_softmax,),
}
