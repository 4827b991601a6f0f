"""Products: by a constant all relevance goes to the carrier; between carriers by halves or to the signal."""

from __future__ import annotations

from dlbc.ir.core import Op, Operand, Value
from dlbc.ir.ops import attr
from dlbc.passes.rules import Contributions, Expansion, only, rule
from dlbc.passes.rules.activations import derivative, slope


@rule("mul", "half", form="M")
def half(at: Expansion, op: Op, m: Value) -> Contributions:
    """R_a = R_b = R_y / 2; M_a = M_y b / 2.  Uniform rule, Achtibat et al. 2024.  A constant factor: all to
    the carrier."""
    a, b = op.operands
    both = at.carries(a) and at.carries(b)
    m = at.mul(m, 0.5) if both else m
    return tuple(at.unbroadcast(at.mul(m, at.read(other)), own.type)  # type: ignore[union-attr]
                 if at.carries(own) else None for own, other in ((a, b), (b, a)))


@rule("mul", "uniform", form="R")
def uniform(at: Expansion, op: Op, r: Value) -> Contributions:
    """R_a = R_b = R_y / 2 on relevance itself.  DL-Backtrace.  A constant factor: all to the carrier."""
    a, b = op.operands
    r = at.mul(r, 0.5) if at.carries(a) and at.carries(b) else r
    return tuple(at.unbroadcast(r, own.type) if at.carries(own) else None  # type: ignore[union-attr]
                 for own in (a, b))


@rule("mul", "gradient", form="M", conserves=False)
def product_gradient(at: Expansion, op: Op, m: Value) -> Contributions:
    """M_a = M_y b, M_b = M_y a: the true adjoint."""
    a, b = op.operands
    return tuple(at.unbroadcast(at.mul(m, at.read(other)), own.type)  # type: ignore[union-attr]
                 if at.carries(own) else None for own, other in ((a, b), (b, a)))


@rule("div", "numerator", form="M")
def numerator(at: Expansion, op: Op, m: Value) -> Contributions:
    """R_a = R_y: the divisor is a weight; M_a = M_y / b.  A constant numerator: all to the divisor."""
    a, b = op.operands
    if at.carries(a):
        return only(op, 0, at.unbroadcast(at.safe_div(m, at.read(b)), a.type))  # type: ignore[union-attr]
    y, divisor = at.read(op.result), at.read(b)
    share = at.mul(m, at.div(y, at.stabilise(divisor)))
    at.absorb("stabiliser", at.sub(at.mul(m, y), at.mul(share, divisor)))
    return only(op, 1, at.unbroadcast(share, b.type))  # type: ignore[union-attr]


@rule("div", "numerator_relevance", form="R")
def numerator_relevance(at: Expansion, op: Op, r: Value) -> Contributions:
    """R_a = R_y on relevance itself: the divisor is a weight.  A constant numerator: all to the divisor."""
    position = 0 if at.carries(op.operands[0]) else 1
    return only(op, position, at.unbroadcast(r, op.operands[position].type))  # type: ignore[union-attr]


@rule("div", "gradient", form="M", conserves=False)
def quotient_gradient(at: Expansion, op: Op, m: Value) -> Contributions:
    """M_a = M_y / b, M_b = -M_y y / b: the true adjoint."""
    a, b = op.operands
    share = at.div(m, at.read(b))
    to_a = at.unbroadcast(share, a.type) if at.carries(a) else None  # type: ignore[union-attr]
    to_b = at.unbroadcast(at.neg(at.mul(share, at.read(op.result))), b.type) if at.carries(b) else None  # type: ignore[union-attr]
    return to_a, to_b


# --- gated products: y = activation(gate) * up -------------------------------------------------------

@rule("glu", "half", form="M")
def gate_half(at: Expansion, op: Op, m: Value) -> Contributions:
    """Half to the gate (through its activation unchanged), half to up.  Uniform rule, Achtibat et al. 2024.  A
    constant factor: all to the carrier."""
    gate, up = map(at.read, op.operands)
    m = at.mul(m, 0.5) if _both(at, op) else m
    activated = _activated(at, op, gate)
    return (_to_gate(at, op, m, gate, up, activated) if at.carries(op.operands[0]) else None,
            at.unbroadcast(at.mul(m, activated), up.type) if at.carries(op.operands[1]) else None)  # type: ignore[union-attr]


@rule("glu", "uniform", form="R")
def gate_uniform(at: Expansion, op: Op, r: Value) -> Contributions:
    """Half to the gate, half to up, on relevance itself.  DL-Backtrace.  A constant factor: all to the carrier."""
    share = at.mul(r, 0.5) if _both(at, op) else r
    return tuple(at.unbroadcast(share, o.type) if at.carries(o) else None  # type: ignore[union-attr]
                 for o in op.operands)


@rule("glu", "signal", form="M")
def gate_signal(at: Expansion, op: Op, m: Value) -> Contributions:
    """All to up, nothing to the gate.  Arras et al. 2017.  A constant factor: all to the carrier."""
    gate, up = map(at.read, op.operands)
    activated = _activated(at, op, gate)
    if not at.carries(op.operands[1]):
        return only(op, 0, _to_gate(at, op, m, gate, up, activated))
    return only(op, 1, at.unbroadcast(at.mul(m, activated), up.type))  # type: ignore[union-attr]


@rule("glu", "signal_relevance", form="R")
def gate_signal_relevance(at: Expansion, op: Op, r: Value) -> Contributions:
    """All to up, nothing to the gate, on relevance itself.  Arras et al. 2017.  A constant up: all to the gate."""
    position = 1 if at.carries(op.operands[1]) else 0
    return only(op, position, at.unbroadcast(r, op.operands[position].type))  # type: ignore[union-attr]


@rule("glu", "gradient", form="M", conserves=False)
def gate_gradient(at: Expansion, op: Op, m: Value) -> Contributions:
    """The true adjoint."""
    gate, up = map(at.read, op.operands)
    activated = _activated(at, op, gate)
    to_gate = at.mul(at.mul(m, up), derivative(at, *_activation(op), gate, activated))
    return (at.unbroadcast(to_gate, gate.type) if at.carries(op.operands[0]) else None,  # type: ignore[union-attr]
            at.unbroadcast(at.mul(m, activated), up.type) if at.carries(op.operands[1]) else None)  # type: ignore[union-attr]


def _both(at: Expansion, op: Op) -> bool:
    return all(at.carries(o) for o in op.operands)


def _to_gate(at: Expansion, op: Op, m: Value, gate: Operand, up: Operand, activated: Value) -> Value:
    """M_gate = M_y up activation(gate) / gate."""
    share = at.mul(at.mul(m, up), slope(at, *_activation(op), gate, activated))
    at.absorb("stabiliser", at.sub(at.mul(at.mul(m, up), activated), at.mul(share, gate)))
    return at.unbroadcast(share, gate.type)  # type: ignore[union-attr]


def _activation(op: Op) -> tuple[str, dict[str, str]]:
    name = str(attr(op, "activation"))
    kind, _, approximate = name.partition("_")
    return (kind, {"approximate": approximate}) if kind == "gelu" and approximate else (name, {})


def _activated(at: Expansion, op: Op, gate: Operand) -> Value:
    name, attrs = _activation(op)
    return at.op(name, gate, **attrs)[0]
