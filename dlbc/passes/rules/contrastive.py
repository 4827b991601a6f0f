"""Contrastive DL-Backtrace: two relevances, for the target (R+) and for its rivals (R-), through one program.

The seed dimension holds both: rows [0, S/2) are R+, rows [S/2, S) the R- that belong to them. All other rules
treat rows alike; the rules here compare the two. An output is a sum of contributions z_i, with a positive side
p = sum z+ and a negative side n = sum |z-|; its sign says which of them won.

    only one side has contributions          both relevances go through it
    y = 0                                    both end here
    y > 0 and R+ > R-, or y < 0 and R+ < R-  R+ goes through the positive side, R- through the negative side
    otherwise                                R- goes through the positive side, R+ through the negative side

Through a side means in proportion: z+ / p or |z-| / n. A bias or a constant term lies on the side of its sign
and takes its share there, which is absorbed; alone it makes no side, since nothing would come through. Both
relevances stay non-negative, and each keeps its total but for what is absorbed. Not linear in the seed.

Sides are computed from non-negative parts, x+ W+ + x- W- and x+ W- + x- W+ (two products each way where x is known to
be >= 0, four otherwise): nothing cancels, so an empty side is exactly 0, and nothing is larger than the operands.
DL-Backtrace, arXiv 2411.12643, its contrastive mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeAlias

from dlbc.errors import RuleError
from dlbc.ir.core import Attr, Op, Operand, Value, Weight
from dlbc.ir.ops import attr
from dlbc.passes.rules import SEEDS, Contributions, Expansion, only, rule
from dlbc.passes.rules.attention import _absorb_constants, _none, _swapped, grouped, is_weight
from dlbc.passes.rules.linear import LINEAR, LinearMap, _bias_shaped, exchanged, linear_map
from dlbc.passes.rules.sums import ADDED, SUMS, _added, _parts

STREAMS = 2


@dataclass(frozen=True)
class Sides:
    """The positive and the negative side of something, both >= 0; None is 0."""

    positive: Value | None
    negative: Value | None

    def mapped(self, change: Callable[[Value], Value]) -> Sides:
        """Both sides changed; 0 stays 0."""
        return Sides(*(None if side is None else change(side) for side in (self.positive, self.negative)))


def _check(params: Mapping[str, Attr]) -> None:
    low, high = params["low"], params["high"]
    if not (isinstance(low, int | float) and isinstance(high, int | float) and low < high):
        raise RuleError(f"`low` of rule `contrastive` is {low!r} and `high` is {high!r}; low must be below high",
                        hint="between them the following activation is not saturated: contrastive(low=-4, high=4)")


@rule(LINEAR, "contrastive", form="R", streams=STREAMS, check=_check)
def contrastive(at: Expansion, op: Op, r: Value, *, low: float = -math.inf, high: float = math.inf) -> Contributions:
    """The larger of R+ and R- goes through the contributions z+ or z- of the sign of y, the smaller through the others,
    both through all where there is one sign; where y < low only z-, where y > high only z+ count.  DL-Backtrace's
    contrastive mode and its activation-aware form, arXiv 2411.12643.
    """
    linear = linear_map(at, op)
    return only(op, linear.position, _through(linear, r, low, high))


@rule("attention", "contrastive", form="R", streams=STREAMS)
def attention(at: Expansion, op: Op, r: Value) -> Contributions:
    """All to v, by the sides of the terms P_ij v_jd; nothing to q and k: P is a weight."""
    parts = grouped(at, op)
    weights, v, r = parts.weights, _sides(at, parts.v), parts.group(r)
    sums = v.mapped(lambda side: at.matmul(weights, side))
    share, back = _handed(at, r, sums, sums), _swapped(at, weights)
    to_v = _products(at, v, share.mapped(lambda side: at.matmul(back, side)), r)
    _absorb_constants(at, op, (None, None, to_v))
    return None, None, to_v, *_none(op)


@rule(("matmul", "einsum"), "contrastive_product", form="R", streams=STREAMS)
def between_carriers(at: Expansion, op: Op, r: Value) -> Contributions:
    """All to the factor that is no attention weight, else the same to each, by the sides of the terms a_ik b_kj."""
    carrying = [i for i, o in enumerate(op.operands) if at.carries(o)]
    signals = [i for i in carrying if not is_weight(at, op.operands[i])]
    chosen = signals if len(signals) == len(carrying) - 1 else carrying
    r = at.mul(r, 1 / len(chosen))
    factors = [at.read(o) for o in op.operands]
    return tuple(_through(LinearMap(at, op, i, tuple(f for j, f in enumerate(factors) if j != i)), r)
                 if i in chosen else None for i in range(len(op.operands)))


@rule(SUMS, "contrastive", form="R", streams=STREAMS)
def terms(at: Expansion, op: Op, r: Value) -> Contributions:
    """R+ and R- each go through one side, the positive or the negative terms.  DL-Backtrace's contrastive mode."""
    found = [_sides(at, operand) for operand in op.operands]
    if op.name == "sub":
        found[1] = Sides(found[1].negative, found[1].positive)
    carrying = [side for operand, side in zip(op.operands, found, strict=True) if at.carries(operand)]
    share = _handed(at, r, _total(at, carrying), _total(at, found))
    amounts = [_products(at, share, side, r) for side in found]
    _absorb_constants(at, op, amounts)
    return tuple(at.unbroadcast(amount, operand.type) if at.carries(operand) else None  # type: ignore[union-attr]
                 for operand, amount in zip(op.operands, amounts, strict=True))


@rule(ADDED, "contrastive", form="R", streams=STREAMS)
def added_terms(at: Expansion, op: Op, r: Value) -> Contributions:
    """As for a sum, of the terms that were added into y at an index."""
    base, source = _parts(op)
    places = {0: base, source: op.operands[source]}
    whole = {place: _sides(at, operand) for place, operand in places.items()}
    own = {place: side if at.carries(places[place]) else Sides(None, None) for place, side in whole.items()}
    share = _handed(at, r, _into(at, op, own), _into(at, op, whole))
    up, down = (_added(at, op, part, {place: _or_0(at, getattr(side, name)) for place, side in whole.items()})
                for part, name in ((_or_0(at, share.positive), "positive"), (_or_0(at, share.negative), "negative")))
    return tuple(None if a is None or b is None else at.add(a, b) for a, b in zip(up, down, strict=True))


@rule("combine", "contrastive", form="R", streams=STREAMS)
def experts(at: Expansion, op: Op, r: Value) -> Contributions:
    """R+ and R- each go through the positive or the negative products w_k u_k, all to the experts."""
    u, weights = op.operands
    assert isinstance(weights, Value | Weight)
    products = at.mul(at.read(u), at.reshape(at.read(weights), shape=(*weights.type.shape, 1)))
    side = _sides(at, products)
    sums = side.mapped(lambda part: at.sum(part, dims=(-2,)))
    share = _handed(at, r, sums, sums).mapped(
        lambda part: at.reshape(part, shape=(*part.type.shape[:-1], 1, part.type.shape[-1])))
    found = _products(at, share, side, r)
    return (found, None) if at.carries(u) else (None, at.sum(found, dims=(-1,)))


def _into(at: Expansion, op: Op, terms: Mapping[int, Sides]) -> Sides:
    """The sides of what was added by index."""
    def summed(parts: Mapping[int, Value | None]) -> Value:
        own = [_zeros(at, o) if parts.get(i, o) is None else parts.get(i, o) for i, o in enumerate(op.operands)]
        found: Value = getattr(at, op.name)(*own, **op.attrs)
        return found

    return Sides(summed({i: side.positive for i, side in terms.items()}),
                 summed({i: side.negative for i, side in terms.items()}))


def _sides(at: Expansion, x: Operand) -> Sides:
    """x+ and |x-| in float32, of a value, a weight or a number."""
    if not isinstance(x, Value | Weight):
        x = at.full(shape=(), value=x, dtype="f32")
    always = isinstance(x, Value) and x.name in at.facts.nonnegative
    x = at.read(x) if x.type.floating else at.cast(x, dtype="f32")
    return Sides(x, None) if always and isinstance(x, Value) else Sides(at.relu(x), at.relu(at.neg(x)))


@dataclass(frozen=True)
class _Half:
    """The positive (sign 1) or the negative part (-1, as sizes) of a map whose weights are not at hand: half of |W|
    and W. What is left of rounding where there is no such part is cleared."""

    linear: LinearMap
    sign: float

    def __call__(self, x: Operand) -> Value:
        at, whole = self.linear.at, self.linear.absolute(x)
        part = at.mul(at.add(whole, at.mul(self.linear(x), self.sign)), 0.5)
        return at.where(at.gt(part, at.mul(whole, 1e-6)), part, 0.0)

    def adjoint(self, r: Value) -> Value:
        at = self.linear.at
        signed = at.mul(self.linear.adjoint(r), self.sign)
        return at.relu(at.mul(at.add(self.linear.absolute.adjoint(r), signed), 0.5))


_Map: TypeAlias = LinearMap | _Half


def _through(linear: LinearMap, r: Value, low: float = -math.inf, high: float = math.inf) -> Value:
    """Relevance of the carrying operand of a linear map."""
    at, x = linear.at, _sides(linear.at, linear.op.operands[linear.position])
    plus, minus = _maps(linear)
    own = whole = _applied(at, plus, minus, x)
    bias = None if linear.bias is None else _sides(at, _bias_shaped(linear))
    if bias is not None:
        whole = _total(at, [own, bias])
    own, whole = (_open(at, sides, at.read(linear.op.result), low, high) for sides in (own, whole))
    share = _handed(at, r, own, whole)
    if bias is not None:
        at.absorb("bias", _products(at, share, bias, r))
    back = Sides(*(_summed(at, [*(m.adjoint(up) for m in plus if up), *(m.adjoint(down) for m in minus if down)])
                   for up, down in ((share.positive, share.negative), (share.negative, share.positive))))
    return _products(at, x, back, r)


def _applied(at: Expansion, plus: Sequence[_Map], minus: Sequence[_Map], x: Sides) -> Sides:
    """The sides of a linear map of x."""
    return Sides(*(_summed(at, [*(m(up) for m in plus if up), *(m(down) for m in minus if down)])
                   for up, down in ((x.positive, x.negative), (x.negative, x.positive))))


def _open(at: Expansion, own: Sides, y: Operand, low: float, high: float) -> Sides:
    """The sides that count: below `low` only the negative, above `high` only the positive one."""
    positive, negative = own.positive, own.negative
    if low > -math.inf and positive is not None:
        positive = at.where(at.lt(y, low), 0.0, positive)
    if high < math.inf and negative is not None:
        negative = at.where(at.gt(y, high), 0.0, negative)
    return Sides(positive, negative)


def _maps(linear: LinearMap) -> tuple[Sequence[_Map], Sequence[_Map]]:
    """Maps with non-negative weights: W is the sum of the first less the sum of the others."""
    at, weights = linear.at, linear.weights
    if linear.op.name == "interpolate" and attr(linear.op, "mode") == "cubic":
        return [_Half(linear, 1.0)], [_Half(linear, -1.0)]
    if linear.op.name == "rotary":  # y = x cos + x' (sin, the first of each pair negated), x' the pairs exchanged
        cos, sin = weights
        ones = at.full(shape=sin.type.shape, value=1.0, dtype="f32")  # type: ignore[union-attr]
        weights = cos, at.mul(sin, exchanged(at, ones, bool(attr(linear.op, "interleaved")), 1))
    parts = [(side.positive, side.negative) for side in (_sides(at, weight) for weight in weights)]
    signs = [(0, 0), (1, 1)] if linear.op.name == "rotary" else product((0, 1), repeat=len(parts))
    found: tuple[list[LinearMap], list[LinearMap]] = [], []
    for chosen in signs:
        picked = tuple(part[sign] for part, sign in zip(parts, chosen, strict=True))
        odd = chosen[0] if linear.op.name == "rotary" else sum(chosen) % 2
        if None not in picked:
            found[odd].append(replace(linear, weights=picked, bias=None, signed=False))
    return found


def _handed(at: Expansion, r: Value, own: Sides, whole: Sides) -> Sides:
    """What a unit of each side gets of r: [S, *y]. `own` are the sides without bias and constant terms, which say
    whether there are two; `whole` those with them."""
    if own.positive is None or own.negative is None:
        share = at.shared(r, _or_0(at, whole.negative if own.positive is None else whole.positive))
        return Sides(None, share) if own.positive is None else Sides(share, None)
    assert whole.positive is not None and whole.negative is not None
    mixed = at.logical_and(at.gt(own.positive, 0.0), at.gt(own.negative, 0.0))
    balanced = at.logical_and(mixed, at.eq(whole.positive, whole.negative))
    at.absorb("stabiliser", at.where(balanced, r, 0.0))
    r = at.where(balanced, 0.0, r)
    up = at.where(at.where(mixed, _rises(at, r, whole.positive, whole.negative), at.eq(own.negative, 0.0)), r, 0.0)
    return Sides(at.shared(up, whole.positive), at.shared(at.sub(r, up), whole.negative))


def _rises(at: Expansion, r: Value, positive: Value, negative: Value) -> Value:
    """Whether r, where there are two sides, goes through the positive one: bool [S, *y]."""
    half = SEEDS // STREAMS
    other = at.roll(r, shifts=(half,), dims=(0,))
    lead = at.where(at.gt(positive, negative), at.sub(r, other), at.sub(other, r))
    rows = at.reshape(at.arange(stop=SEEDS), shape=(SEEDS, *(1,) * (r.type.rank - 1)))
    return at.logical_or(at.gt(lead, 0.0), at.logical_and(at.ge(rows, half), at.eq(lead, 0.0)))


def _total(at: Expansion, found: Sequence[Sides]) -> Sides:
    return Sides(_summed(at, [side.positive for side in found]), _summed(at, [side.negative for side in found]))


def _products(at: Expansion, a: Sides, b: Sides, r: Value) -> Value:
    """a+ b+ + a- b-; zeros like r where neither has two factors."""
    found = _summed(at, [at.mul(x, y) for x, y in ((a.positive, b.positive), (a.negative, b.negative))
                         if x is not None and y is not None])
    return at.mul(r, 0.0) if found is None else found


def _summed(at: Expansion, parts: Sequence[Value | None]) -> Value | None:
    """The sum of what is there."""
    total: Value | None = None
    for part in parts:
        total = part if total is None else total if part is None else at.add(total, part)
    return total


def _zeros(at: Expansion, like: Operand) -> Operand:
    return at.zeros(like.type) if isinstance(like, Value | Weight) else 0.0


def _or_0(at: Expansion, side: Value | None) -> Value:
    return at.full(shape=(), value=0.0, dtype="f32") if side is None else side
