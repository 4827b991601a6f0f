"""Secants: how relevance of differences to a reference passes ops that are not linear.

x and y = f(x) are the numbers of the input, x' and y' those of the reference, dx = x - x' and dy = y - y', and a bar is
the mean of both. A secant gives each operand a multiplier so that `sum_i m_i dx_i = m dy`: exactly, not to first
order. Of a function of one number it is `m dy / dx` (DeepLIFT's rescale rule, Shrikumar et al. 2017); of a product
`m b̄` and `m ā`, since d(a b) = da b̄ + db ā (its Shapley value); what is made of sums, products and functions of one
number follows. Rules that carry relevance itself share it out by the sizes of these contributions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TypeAlias

from dlbc.ir.core import Attr, Op, Operand, Value
from dlbc.ir.ops import attr, axes, definition
from dlbc.passes.rules import Contributions, Expansion, only
from dlbc.passes.rules.activations import STEPS, UNARY, _carrying, _narrowed, derivative, prelu_weight
from dlbc.passes.rules.norms import NORMS, _back, _mean, _rows, _scaled, _statistics
from dlbc.passes.rules.products import _activation

SecantFunction: TypeAlias = Callable[..., Contributions]

NEAR = 5e-3
"""Differences of x below this part of the function's scale take the derivative in the middle: there `dy / dx` would be
rounding, and the derivative is wrong by NEAR ** 2 / 24 of itself. What it misses is absorbed as `stabiliser`."""


@dataclass(frozen=True, slots=True)
class Secant:
    """What stands in for a rule of an op on differences. `doc`: its formula."""

    expand: SecantFunction
    doc: str


SECANTS: dict[tuple[str, str], Secant] = {}


def secant(ops: str | Iterable[str], rules: str | Iterable[str]) -> Callable[[SecantFunction], SecantFunction]:
    """Register the decorated expansion for rules of op kinds; it gets `(at, op, op at the reference, incoming...)`."""

    def register(expand: SecantFunction) -> SecantFunction:
        for op in (ops,) if isinstance(ops, str) else ops:
            for name in (rules,) if isinstance(rules, str) else rules:
                SECANTS[op, name] = Secant(expand, expand.__doc__ or "")
        return expand

    return register


def load_secants() -> dict[tuple[str, str], Secant]:
    """Every secant, after importing the files that define them."""
    import_module("dlbc.passes.rules.secants_attention")
    return SECANTS


def part(at: Expansion, operand: Operand, m: Value) -> Value | None:
    """A contribution M [S, *y] to an operand that broadcast to y; what one that carries nothing would get ends here."""
    if at.carries(operand):
        assert isinstance(operand, Value)
        return at.unbroadcast(m, operand.type)
    if at.varies(operand):
        at.absorb("constant", at.mul(m, at.difference(operand)))
    return None


def by_size(at: Expansion, r: Value, contributions: list[Value]) -> list[Value]:
    """r in proportion to the sizes of two contributions to dy; half each where both are 0."""
    a, b = map(at.abs, contributions)
    total = at.add(a, b)
    share, none = at.safe_div(r, total), at.eq(total, 0.0)
    return [at.where(none, at.mul(r, 0.5), at.mul(size, share)) for size in (a, b)]


# --- functions of one number -----------------------------------------------------------------------------

_KINKED = frozenset({"hardsigmoid", "hardswish", "elu"})
"""Functions with kinks away from 0, or none that a derivative could step over: `dy / dx` wherever dx is not 0."""
_RELATIVE: dict[str, Callable[[Expansion, Value], Value]] = {
    "log": lambda at, size: size, "pow": lambda at, size: size, "log1p": lambda at, size: at.add(size, 1.0)}
"""Functions whose scale grows with |x| + |x'|."""

_LEAST = 1e-30
"""Added to |dx|, so that 0 / 0 is 0."""


def relu_slope(at: Expansion, x: Operand, x0: Operand) -> Value:
    """`d relu(x) / dx = max(x, x') / |dx|` held to 0 ... 1: 1 where both are positive, 0 where neither is."""
    found: Value = at.clamp(at.div(at.maximum(x, x0), at.add(at.abs(at.sub(x, x0)), _LEAST)), low=0.0, high=1.0)
    return found


def abs_slope(at: Expansion, x: Operand, x0: Operand) -> Value:
    """`d|x| / dx = (x + x') / |dx|` held to -1 ... 1."""
    found: Value = at.clamp(at.div(at.add(x, x0), at.add(at.abs(at.sub(x, x0)), _LEAST)), low=-1.0, high=1.0)
    return found


def _leaky(at: Expansion, x: Operand, x0: Operand, below: Operand) -> Value:
    """Slope 1 above 0, `below` under it."""
    above = 1.0 - below if isinstance(below, float) else at.sub(1.0, below)
    found: Value = at.add(at.mul(relu_slope(at, x, x0), above), below)
    return found


_Closed: TypeAlias = Callable[[Expansion, Op, Operand, Operand, Operand, Operand], Value]
_CLOSED: dict[str, _Closed] = {
    "relu": lambda at, op, x, x0, y, y0: relu_slope(at, x, x0),
    "abs": lambda at, op, x, x0, y, y0: abs_slope(at, x, x0),
    "negative_part": lambda at, op, x, x0, y, y0: at.sub(1.0, relu_slope(at, x, x0)),
    "leaky_relu": lambda at, op, x, x0, y, y0: _leaky(at, x, x0, float(str(attr(op, "negative_slope")))),
    "prelu": lambda at, op, x, x0, y, y0: _leaky(at, x, x0, prelu_weight(at, op)),
    "sqrt": lambda at, op, x, x0, y, y0: at.safe_div(1.0, at.add(y, y0)),
    "reciprocal": lambda at, op, x, x0, y, y0: at.neg(at.mul(y, y0)),
    "rsqrt": lambda at, op, x, x0, y, y0: at.neg(at.safe_div(at.pow(at.mul(y, y0), 2.0), at.add(y, y0))),
    "neg": lambda at, op, x, x0, y, y0: at.full(shape=(), value=-1.0, dtype="f32"),
}
"""Secants in closed form, from x, x', y and y'."""


@secant((*UNARY, *STEPS), "identity")
def unary(at: Expansion, op: Op, ref: Op, m: Value) -> Contributions:
    """M_x = M_y dy / dx, the derivative where dx is 0 or next to it."""
    position = _carrying(at, op)
    x, y, x0, y0 = (at.read(o) for o in (op.operands[position], op.result, ref.operands[position], ref.result))
    assert isinstance(x, Value) and isinstance(x0, Value)
    if op.name == "pow" and position == 0 and not at.varies(op.operands[1]) and op.operands[1] in (2, 2.0):
        found = at.mul(m, at.add(x, x0))
    else:
        found = at.mul(m, slope(at, op, (x, x0), (y, y0), position))
    if op.name not in _CLOSED and op.name not in _KINKED:
        at.absorb("stabiliser", at.sub(at.mul(m, at.difference(op.result)),
                                       at.mul(found, at.difference(op.operands[position]))))
    return only(op, position, _narrowed(at, op, position, found))


def slope(at: Expansion, op: Op, x: tuple[Operand, Operand], y: tuple[Operand, Operand], position: int = 0) -> Value:
    """`dy / dx` of an op of one number between x = (x, x'), safe where dx is small."""
    if op.name in _CLOSED:
        return _CLOSED[op.name](at, op, *x, *y)
    dx = at.difference(op.operands[position])
    ratio = at.safe_div(at.difference(op.result), dx)
    if op.name in STEPS:
        return at.where(_near(at, dx, at.add(at.abs(x[0]), at.abs(x[1]))), 0.0, ratio)
    if op.name == "pow":
        return _power(at, op, x, dx, ratio, position)
    return function_slope(at, op.name, op.attrs, x, dx, ratio)


def function_slope(at: Expansion, name: str, attrs: Mapping[str, Attr], x: tuple[Operand, Operand], dx: Value,
                   ratio: Value) -> Value:
    """The ratio dy / dx, or the function's derivative where dx is next to 0."""
    if name in _KINKED:
        at_x = derivative(at, name, attrs, x[0], getattr(at, name)(x[0], **attrs))
        return at.where(at.eq(dx, 0.0), at_x, ratio)
    middle = at.mul(at.add(*x), 0.5)
    tangent = derivative(at, name, attrs, middle, getattr(at, name)(middle, **attrs))
    scale: Operand = 1.0
    if name in _RELATIVE:
        scale = _RELATIVE[name](at, at.add(at.abs(x[0]), at.abs(x[1])))
    elif name == "softplus":
        scale = 1.0 / float(str({**definition(name).attrs, **attrs}["beta"]))
    return at.where(_near(at, dx, scale), tangent, ratio)


def _near(at: Expansion, dx: Value, scale: Operand) -> Value:
    limit = scale * NEAR if isinstance(scale, float) else at.mul(scale, NEAR)
    return at.le(at.abs(dx), limit)


def _power(at: Expansion, op: Op, x: tuple[Operand, Operand], dx: Value, ratio: Value, position: int) -> Value:
    """x ** p in x: p x̄ ** (p - 1) near by; b ** x in x: log(b) b ** x̄."""
    middle, constant = at.mul(at.add(*x), 0.5), at.read(op.operands[1 - position])
    if position == 1:
        base: Operand = at.log(constant) if hasattr(constant, "type") else at.log(
            at.full(shape=(), value=float(str(constant)), dtype="f32"))
        return at.where(_near(at, dx, 1.0), at.mul(at.pow(constant, middle), base), ratio)
    lower = at.sub(constant, 1.0) if hasattr(constant, "type") else constant - 1  # type: ignore[operator]
    apart = at.where(at.eq(middle, 0.0), 1.0, middle)
    tangent = at.where(at.eq(middle, 0.0), 0.0, at.mul(at.pow(apart, lower), constant))
    return at.where(_near(at, dx, _RELATIVE["pow"](at, at.add(at.abs(x[0]), at.abs(x[1])))), tangent, ratio)


@secant("clamp", "select")
def clamp(at: Expansion, op: Op, ref: Op, r: Value) -> Contributions:
    """M_x = M_y dy / dx; relevance itself passes unchanged."""
    if at.form != "M":
        return only(op, 0, r)
    x = op.operands[0]
    dx, low, high = at.difference(x), attr(op, "low"), attr(op, "high")
    inside = at.eq(at.clamp(at.read(x), low=low, high=high), at.read(x))
    ratio = at.safe_div(at.difference(op.result), dx)
    return only(op, 0, at.mul(r, at.where(at.eq(dx, 0.0), at.cast(inside, dtype="f32"), ratio)))


# --- products and quotients ------------------------------------------------------------------------------

@secant("mul", "half")
def product(at: Expansion, op: Op, ref: Op, m: Value) -> Contributions:
    """M_a = M_y b̄, M_b = M_y ā."""
    a, b = op.operands
    return tuple(part(at, own, at.mul(m, at.middle(other))) if at.varies(own) else None
                 for own, other in ((a, b), (b, a)))


@secant("mul", "uniform")
def product_by_size(at: Expansion, op: Op, ref: Op, r: Value) -> Contributions:
    """R_a : R_b = |da b̄| : |db ā|."""
    a, b = op.operands
    return _shared_out(at, op, r, [at.mul(at.difference(own), at.middle(other)) if at.varies(own) else None
                                   for own, other in ((a, b), (b, a))])


@secant("div", "numerator")
def quotient(at: Expansion, op: Op, ref: Op, m: Value) -> Contributions:
    """M_a = M_y mean(1/b, 1/b'), M_b = -M_y ā / (b b')."""
    a, b = op.operands
    if not at.varies(b):
        return only(op, 0, part(at, a, at.safe_div(m, at.read(b))))
    return tuple(part(at, own, at.mul(m, rate)) if at.varies(own) else None
                 for own, rate in zip(op.operands, _quotient_rates(at, op, ref), strict=True))


@secant("div", "numerator_relevance")
def quotient_by_size(at: Expansion, op: Op, ref: Op, r: Value) -> Contributions:
    """R_a : R_b = |da mean(1/b, 1/b')| : |db ā / (b b')|."""
    a, b = op.operands
    if not at.varies(b):
        return _shared_out(at, op, r, [at.difference(a), None])
    return _shared_out(at, op, r, [at.mul(at.difference(own), rate) if at.varies(own) else None
                                   for own, rate in zip(op.operands, _quotient_rates(at, op, ref), strict=True)])


def _quotient_rates(at: Expansion, op: Op, ref: Op) -> tuple[Value, Value]:
    new, old = (at.safe_div(1.0, at.read(one.operands[1])) for one in (op, ref))
    return at.mul(at.add(new, old), 0.5), at.neg(at.mul(at.middle(op.operands[0]), at.mul(new, old)))


def _shared_out(at: Expansion, op: Op, r: Value, contributions: list[Value | None]) -> Contributions:
    """Relevance to the operands by the sizes of their contributions to dy; all of it to the only one."""
    present = [c for c in contributions if c is not None]
    shares = iter(by_size(at, r, present) if len(present) == 2 else [at.widen(r, op.result.type)])
    found: list[Value | None] = []
    for operand, contribution in zip(op.operands, contributions, strict=True):
        share = None if contribution is None else next(shares)
        if share is not None and not at.carries(operand):
            at.absorb("constant", share)
        carried = share is not None and at.carries(operand)
        found.append(at.unbroadcast(share, operand.type) if carried else None)  # type: ignore[union-attr, arg-type]
    return tuple(found)


# --- gates: y = activation(gate) * up --------------------------------------------------------------------

@secant("glu", "half")
def gate(at: Expansion, op: Op, ref: Op, m: Value) -> Contributions:
    """M_up = M_y ḡ, M_gate = M_y ū dg / dgate, with g = activation(gate)."""
    parts = _Gate(at, op, ref)
    return parts.to_gate(m), part(at, parts.up, at.mul(m, parts.middle)) if at.varies(parts.up) else None


@secant("glu", "signal")
def gate_signal(at: Expansion, op: Op, ref: Op, m: Value) -> Contributions:
    """M_up = M_y ḡ; what the gate's change makes, M_y ū dg, is absorbed as the rule's.  A constant up: all to the
    gate."""
    parts = _Gate(at, op, ref)
    if not at.varies(parts.up):
        return parts.to_gate(m), None
    if at.varies(parts.gate):
        at.absorb("rule", at.mul(m, at.mul(at.middle(parts.up), parts.change)))
    return None, part(at, parts.up, at.mul(m, parts.middle))


@secant("glu", "uniform")
def gate_by_size(at: Expansion, op: Op, ref: Op, r: Value) -> Contributions:
    """R_gate : R_up = |dg ū| : |dup ḡ|."""
    parts = _Gate(at, op, ref)
    return _shared_out(at, op, r, [
        at.mul(parts.change, at.middle(parts.up)) if at.varies(parts.gate) else None,
        at.mul(at.difference(parts.up), parts.middle) if at.varies(parts.up) else None])


class _Gate:
    """A gated product: its operands, and the activated gate at the input and at the reference."""

    def __init__(self, at: Expansion, op: Op, ref: Op) -> None:
        self.at, self.op = at, op
        self.gate, self.up = op.operands
        self.name, self.attrs = _activation(op)
        self.x = (at.read(self.gate), at.read(ref.operands[0]))
        self.new, self.old = (at.op(self.name, x, **self.attrs)[0] for x in self.x)
        self.middle: Value = at.mul(at.add(self.new, self.old), 0.5)
        self.change: Value = at.sub(self.new, self.old)

    def to_gate(self, m: Value) -> Value | None:
        """M_y ū dg / dgate."""
        at = self.at
        if not at.varies(self.gate):
            return None
        dx = at.difference(self.gate)
        rate = function_slope(at, self.name, self.attrs, self.x, dx, at.safe_div(self.change, dx))
        m = at.mul(m, at.middle(self.up))
        at.absorb("stabiliser", at.mul(m, at.sub(self.change, at.mul(rate, dx))))
        return part(at, self.gate, at.mul(m, rate))


# --- norms -----------------------------------------------------------------------------------------------

@secant(NORMS, "detach")
def norm(at: Expansion, op: Op, ref: Op, m: Value) -> Contributions:
    """With c = x - mean(x) (rms: x), r = 1 / std, g = M_y w: M_c = g r̄ - 2 k c̄ mean(g c̄), k = (r r')^2 / (r + r');
    M_x = M_c - mean(M_c) (rms: M_c).  From dn = dc r̄ + c̄ dr, dr = -2 k mean(c̄ dc).
    """
    g = _scaled(at, op, m)
    (mean, inverse), (mean0, inverse0) = _statistics(at, op), _statistics(at, ref)
    middle = _rows(at, op, at.middle(op.operands[0]))
    if op.name != "rms_norm":
        middle = at.sub(middle, at.mul(at.add(mean, mean0), 0.5))
    k = at.safe_div(at.pow(at.mul(inverse, inverse0), 2.0), at.mul(at.add(inverse, inverse0), 0.5))
    found = at.sub(at.mul(g, at.mul(at.add(inverse, inverse0), 0.5)),
                   at.mul(middle, at.mul(_mean(at, op, at.mul(g, middle)), k)))
    return only(op, 0, _back(at, op, found if op.name == "rms_norm" else at.sub(found, _mean(at, op, found))))


# --- selections ------------------------------------------------------------------------------------------

@secant("where", "select")
def where(at: Expansion, op: Op, ref: Op, r: Value) -> Contributions:
    """To the branch that is selected; where the condition is another at the reference, M / 2 to both, and what the
    choice itself makes is absorbed."""
    condition, a, b = op.operands
    other = ref.operands[0]
    if at.form != "M" or not at.varies(condition):
        to_a, to_b = at.where(condition, r, 0.0), at.where(condition, 0.0, r)
    else:
        half = at.mul(r, 0.5)
        to_a = at.add(at.where(condition, half, 0.0), at.where(other, half, 0.0))
        to_b = at.add(at.where(condition, 0.0, half), at.where(other, 0.0, half))
    return None, _own(at, to_a, a), _own(at, to_b, b)


@secant(("maximum", "minimum"), "select")
def extremum(at: Expansion, op: Op, ref: Op, r: Value) -> Contributions:
    """M_a = M_y (1 + s) / 2, M_b = M_y (1 - s) / 2, s = d|a - b| / d(a - b) (minimum: -s), since
    max(a, b) = (a + b + |a - b|) / 2; relevance by the sizes of the contributions."""
    apart, apart0 = (at.sub(*(at.finite(at.read(o)) for o in one.operands)) for one in (op, ref))
    s = abs_slope(at, apart, apart0)
    s = s if op.name == "maximum" else at.neg(s)
    rates = (at.mul(at.add(s, 1.0), 0.5), at.mul(at.sub(1.0, s), 0.5))
    if at.form == "M":
        return tuple(part(at, o, at.mul(r, rate)) if at.varies(o) else None
                     for o, rate in zip(op.operands, rates, strict=True))
    return _shared_out(at, op, r, [at.mul(rate, at.difference(o)) if at.varies(o) else None
                                   for o, rate in zip(op.operands, rates, strict=True)])


@secant(("max_pool", "adaptive_max_pool"), "select")
def max_pool(at: Expansion, op: Op, ref: Op, r: Value) -> Contributions:
    """Where y >= y', to the winner of the input's window, else to that of the reference's: M_y dy / dx_winner, which is
    M_y times 0 to 1 since the other one is no larger there."""
    attrs = dict(op.attrs) if op.name == "max_pool" else {}

    def to_winner(amount: Value, of: Op) -> Value:
        found: Value = getattr(at, f"{op.name}_adjoint")(amount, at.read(of.operands[0]), at.read(of.result), **attrs)
        return found

    return only(op, 0, _by_winner(at, op, ref, r, at.ge(op.result, ref.result), to_winner))


@secant(("amax", "amin", "max_with_index", "min_with_index"), "select")
def reduce_extremum(at: Expansion, op: Op, ref: Op, r: Value, *_: Value | None) -> Contributions:
    """As max pooling, along axes."""
    x = op.operands[0]
    assert isinstance(x, Value)
    gone = axes(x.type.rank, attr(op, "dims" if op.name in ("amax", "amin") else "dim"))
    kept = tuple(1 if i in gone else d for i, d in enumerate(x.type.shape))

    def to_winner(amount: Value, of: Op) -> Value:
        winners = at.cast(at.eq(of.operands[0], at.reshape(of.result, shape=kept)), dtype="f32")
        share = at.div(winners, at.sum(winners, dims=gone, keepdim=True))
        found: Value = at.mul(at.reshape(amount, shape=(amount.type.shape[0], *kept)), share)
        return found

    first = (at.ge if op.name in ("amax", "max_with_index") else at.le)(op.result, ref.result)
    return only(op, 0, _by_winner(at, op, ref, r, first, to_winner))


def _by_winner(at: Expansion, op: Op, ref: Op, r: Value, first: Value,
               to_winner: Callable[[Value, Op], Value]) -> Value:
    """Relevance to the winners of the input where `first`, else of the reference; a multiplier by way of relevance."""
    multiplier = at.form == "M"
    amount = at.mul(r, at.difference(op.result)) if multiplier else r
    found = at.add(to_winner(at.where(first, amount, 0.0), op), to_winner(at.where(first, 0.0, amount), ref))
    return at.safe_div(found, at.difference(op.operands[0])) if multiplier else found


def _own(at: Expansion, r: Value, operand: Operand) -> Value | None:
    if not at.carries(operand):
        return None
    assert isinstance(operand, Value)
    return at.unbroadcast(r, operand.type)
