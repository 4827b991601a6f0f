"""Unary functions: relevance passes unchanged; and their derivatives, for input x gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from dlbc.ir.core import Attr, Op, Operand, Value, Weight
from dlbc.ir.ops import definition
from dlbc.passes.rules import Contributions, Expansion, only, rule

UNARY = ("exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan", "tanh", "atan", "erf",
         "sigmoid", "log_sigmoid", "silu", "mish", "hardswish", "hardsigmoid", "softsign", "neg", "abs", "relu",
         "negative_part", "gelu", "softplus", "elu", "leaky_relu", "prelu", "pow")
STEPS = ("floor", "ceil", "round", "sign")


@rule("relu", "identity", form="any")
def rectified(at: Expansion, op: Op, found: Value) -> Contributions:
    """R_x = R_y where x > 0, else 0; M_x likewise.  Bach et al. 2015."""
    passed = at.relu_adjoint(found, at.read(op.operands[0]))
    if at.form == "R":
        at.absorb("stabiliser", at.sub(found, passed))  # relevance of a 0, as if it had been divided by it
    return only(op, 0, _narrowed(at, op, 0, passed))


@rule([name for name in (*UNARY, *STEPS) if name != "relu"], "identity", form="M")
def identity(at: Expansion, op: Op, m: Value) -> Contributions:
    """R_x = R_y; M_x = M_y f(x) / x, at x = 0 its limit where there is one.  Bach et al. 2015."""
    position = _carrying(at, op)
    x, y = at.read(op.operands[position]), at.read(op.result)
    if op.name == "prelu":
        return only(op, 0, at.mul(m, _prelu_slope(at, op, x)))
    found = at.mul(m, slope(at, op.name, op.attrs, x, y))
    if op.name not in CLOSED:
        at.absorb("stabiliser", at.sub(at.mul(at.finite(y), m), at.mul(at.finite(x), found)))
    return only(op, position, _narrowed(at, op, position, found))


@rule((*UNARY, *STEPS), "pass", form="R")
def unchanged(at: Expansion, op: Op, r: Value) -> Contributions:
    """R_x = R_y on relevance itself.  Bach et al. 2015."""
    position = _carrying(at, op)
    return only(op, position, _narrowed(at, op, position, r))


@rule(STEPS, "gradient", form="M", conserves=False)
def step_gradient(at: Expansion, op: Op, m: Value) -> Contributions:
    """M_x = 0: a step function is flat."""
    return only(op, 0, at.mul(m, 0.0))


@rule(UNARY, "gradient", form="M", conserves=False)
def gradient(at: Expansion, op: Op, m: Value) -> Contributions:
    """M_x = M_y f'(x): the true adjoint."""
    x, y = at.read(op.operands[0]), at.read(op.result)
    if op.name == "prelu":
        return only(op, 0, at.mul(m, _prelu_slope(at, op, x)))
    if op.name == "pow":
        return _pow_gradient(at, op, m)
    if op.name == "relu":
        return only(op, 0, at.relu_adjoint(m, x))
    return only(op, 0, at.mul(m, derivative(at, op.name, op.attrs, x, y)))


def slope(at: Expansion, name: str, attrs: Mapping[str, Attr], x: Operand, y: Operand) -> Value:
    """`f(x) / x`: in closed form where f(0) = 0, else with a stabilised denominator."""
    if name in CLOSED:
        return CLOSED[name](at, attrs, x, y)
    return at.div(y, at.stabilise(x))


def derivative(at: Expansion, name: str, attrs: Mapping[str, Attr], x: Operand, y: Operand) -> Value:
    """`f'(x)` of a unary op, from x and y = f(x)."""
    return _DERIVATIVES[name](at, {**definition(name).attrs, **attrs}, x, y)


def _step(at: Expansion, x: Operand) -> Value:
    return at.cast(at.gt(x, 0.0), dtype="f32")


def _normal_cdf(at: Expansion, x: Operand) -> Value:
    return at.mul(at.add(at.erf(at.mul(x, math.sqrt(0.5))), 1.0), 0.5)


def _tanh_inner(at: Expansion, x: Operand) -> Value:
    cube = at.mul(at.mul(at.mul(x, x), x), 0.044715)
    return at.tanh(at.mul(at.add(x, cube), math.sqrt(2 / math.pi)))


def _gelu_slope(at: Expansion, attrs: Mapping[str, Attr], x: Operand, y: Operand) -> Value:
    approximate = attrs.get("approximate", "none")
    if approximate == "tanh":
        return at.mul(at.add(_tanh_inner(at, x), 1.0), 0.5)
    return at.sigmoid(at.mul(x, 1.702)) if approximate == "quick" else _normal_cdf(at, x)


def _gelu_derivative(at: Expansion, attrs: Mapping[str, Attr], x: Operand, y: Operand) -> Value:
    base = _gelu_slope(at, attrs, x, y)
    if attrs.get("approximate") == "tanh":
        t = _tanh_inner(at, x)
        inner = at.mul(at.add(at.mul(at.mul(x, x), 3 * 0.044715), 1.0), math.sqrt(2 / math.pi))
        return at.add(base, at.mul(at.mul(at.mul(x, 0.5), at.sub(1.0, at.mul(t, t))), inner))
    if attrs.get("approximate") == "quick":
        return at.add(base, at.mul(at.mul(x, 1.702), at.mul(base, at.sub(1.0, base))))
    density = at.mul(at.exp(at.mul(at.mul(x, x), -0.5)), 1 / math.sqrt(2 * math.pi))
    return at.add(base, at.mul(x, density))


def _elu_derivative(at: Expansion, attrs: Mapping[str, Attr], x: Operand, y: Operand) -> Value:
    alpha, scale, inner = (float(attrs[k]) for k in ("alpha", "scale", "input_scale"))  # type: ignore[arg-type]
    below = at.mul(at.exp(at.mul(at.negative_part(x), inner)), scale * alpha * inner)
    return at.where(at.gt(x, 0.0), scale, below)


def _softplus_derivative(at: Expansion, attrs: Mapping[str, Attr], x: Operand, y: Operand) -> Value:
    beta, threshold = float(attrs["beta"]), float(attrs["threshold"])  # type: ignore[arg-type]
    scaled = at.mul(x, beta)
    return at.where(at.gt(scaled, threshold), 1.0, at.sigmoid(scaled))


def _mish_derivative(at: Expansion, attrs: Mapping[str, Attr], x: Operand, y: Operand) -> Value:
    t, s = at.tanh(at.softplus(x)), at.sigmoid(x)
    return at.add(t, at.mul(at.mul(x, s), at.sub(1.0, at.mul(t, t))))


def _band(at: Expansion, x: Operand, low: float, high: float) -> Value:
    return at.logical_and(at.gt(x, low), at.lt(x, high))


def _prelu_slope(at: Expansion, op: Op, x: Operand) -> Value:
    return at.where(at.gt(x, 0.0), 1.0, prelu_weight(at, op))


def prelu_weight(at: Expansion, op: Op) -> Value | Weight:
    """The slopes below 0 of a prelu, aligned with x."""
    weight = at.read(op.operands[1])
    assert isinstance(weight, (Value, Weight))
    shape = op.result.type.shape
    single = weight.type.rank == 0 or weight.type.shape == (1,)
    return weight if single else at.reshape(weight, shape=(shape[1], *(1,) * (len(shape) - 2)))


def _pow_gradient(at: Expansion, op: Op, m: Value) -> Contributions:
    """M_x = M_y p x^(p - 1), 0 where that is infinite; M_p = M_y y log(x), 0 where x <= 0."""
    (base, power), y = op.operands, at.read(op.result)
    x, p = at.read(base), at.read(power)
    to_base = to_power = None
    if at.carries(base):
        apart = at.where(at.eq(x, 0.0), 1.0, x)
        at_zero = at.where(at.eq(p, 1.0), 1.0, 0.0) if hasattr(p, "type") else float(p == 1)
        lower = at.sub(p, 1.0) if hasattr(p, "type") else p - 1  # type: ignore[operator]
        rate = at.where(at.eq(x, 0.0), at_zero, at.mul(at.pow(apart, lower), p))
        to_base = _narrowed(at, op, 0, at.mul(m, rate))
    if at.carries(power):
        positive = at.gt(x, 0.0) if hasattr(x, "type") else bool(x > 0)  # type: ignore[operator]
        logarithm = at.log(at.where(positive, x, 1.0))
        to_power = _narrowed(at, op, 1, at.mul(m, at.mul(y, logarithm)))
    return to_base, to_power


def _carrying(at: Expansion, op: Op) -> int:
    """The operand that the function is of: the first that carries (`2 ** x`: the exponent)."""
    return next(i for i, operand in enumerate(op.operands) if at.carries(operand))


def _narrowed(at: Expansion, op: Op, position: int, value: Value) -> Value:
    operand = op.operands[position]
    assert isinstance(operand, Value)
    return at.unbroadcast(value, operand.type)


Closed = Callable[[Expansion, Mapping[str, Attr], Operand, Operand], Value]

CLOSED: dict[str, Closed] = {
    "relu": lambda at, attrs, x, y: _step(at, x),
    "silu": lambda at, attrs, x, y: at.sigmoid(x),
    "mish": lambda at, attrs, x, y: at.tanh(at.softplus(x)),
    "gelu": _gelu_slope,
    "hardswish": lambda at, attrs, x, y: at.hardsigmoid(x),
    "leaky_relu": lambda at, attrs, x, y: at.where(
        at.gt(x, 0.0), 1.0, attrs.get("negative_slope", definition("leaky_relu").attrs["negative_slope"])),
    "neg": lambda at, attrs, x, y: at.full(shape=(), value=-1.0, dtype="f32"),
    "abs": lambda at, attrs, x, y: at.sign(x),
    "negative_part": lambda at, attrs, x, y: at.sub(1.0, _step(at, x)),
    "softsign": lambda at, attrs, x, y: at.reciprocal(at.add(at.abs(x), 1.0)),
    "tanh": lambda at, attrs, x, y: at.where(at.eq(x, 0.0), 1.0, at.safe_div(y, x)),
    "atan": lambda at, attrs, x, y: at.where(at.eq(x, 0.0), 1.0, at.safe_div(y, x)),
    "sin": lambda at, attrs, x, y: at.where(at.eq(x, 0.0), 1.0, at.safe_div(y, x)),
    "erf": lambda at, attrs, x, y: at.where(at.eq(x, 0.0), 2 / math.sqrt(math.pi), at.safe_div(y, x)),
}
"""`f(x) / x` with its limit at 0, for the functions with f(0) = 0."""

_DERIVATIVES: dict[str, Closed] = {
    "exp": lambda at, attrs, x, y: y,  # type: ignore[dict-item,return-value]
    "expm1": lambda at, attrs, x, y: at.add(y, 1.0),
    "log": lambda at, attrs, x, y: at.reciprocal(x),
    "log1p": lambda at, attrs, x, y: at.reciprocal(at.add(x, 1.0)),
    "sqrt": lambda at, attrs, x, y: at.safe_div(0.5, y),
    "rsqrt": lambda at, attrs, x, y: at.mul(at.mul(y, at.mul(y, y)), -0.5),
    "reciprocal": lambda at, attrs, x, y: at.neg(at.mul(y, y)),
    "sin": lambda at, attrs, x, y: at.cos(x),
    "cos": lambda at, attrs, x, y: at.neg(at.sin(x)),
    "tan": lambda at, attrs, x, y: at.add(at.mul(y, y), 1.0),
    "tanh": lambda at, attrs, x, y: at.sub(1.0, at.mul(y, y)),
    "atan": lambda at, attrs, x, y: at.reciprocal(at.add(at.mul(x, x), 1.0)),
    "erf": lambda at, attrs, x, y: at.mul(at.exp(at.neg(at.mul(x, x))), 2 / math.sqrt(math.pi)),
    "sigmoid": lambda at, attrs, x, y: at.mul(y, at.sub(1.0, y)),
    "log_sigmoid": lambda at, attrs, x, y: at.sigmoid(at.neg(x)),
    "silu": lambda at, attrs, x, y: at.mul(at.sigmoid(x), at.add(at.sub(x, y), 1.0)),
    "mish": _mish_derivative,
    "hardswish": lambda at, attrs, x, y: at.where(
        _band(at, x, -3.0, 3.0), at.add(at.mul(x, 1 / 3), 0.5), at.cast(at.ge(x, 3.0), dtype="f32")),
    "hardsigmoid": lambda at, attrs, x, y: at.where(_band(at, x, -3.0, 3.0), 1 / 6, 0.0),
    "softsign": lambda at, attrs, x, y: at.reciprocal(at.pow(at.add(at.abs(x), 1.0), 2.0)),
    "neg": lambda at, attrs, x, y: at.full(shape=(), value=-1.0, dtype="f32"),
    "abs": lambda at, attrs, x, y: at.sign(x),
    "relu": lambda at, attrs, x, y: _step(at, x),
    "negative_part": lambda at, attrs, x, y: at.cast(at.lt(x, 0.0), dtype="f32"),
    "gelu": _gelu_derivative,
    "softplus": _softplus_derivative,
    "elu": _elu_derivative,
    "leaky_relu": lambda at, attrs, x, y: at.where(at.gt(x, 0.0), 1.0, attrs["negative_slope"]),
}
"""f'(x) from x and y = f(x)."""

