"""Rules of linear maps that treat positive and negative contributions, or weights alone, apart.

The contribution of x_i to y_j is z_ij = w_ij x_i; z+ and z- are its positive and negative part; a bias is one more
contribution. Nothing of the shape of z is formed: with the parts of x and W, all as sizes,

    sum_i z+ = W+ x+ + W- x-        sum_j (z+ A_j + |z-| B_j) = x+ (W+^T A + W-^T B) + x- (W-^T A + W+^T B)
    sum_i |z-| = W- x+ + W+ x-      sum_i |z| = T = |W| |x| + |b|,  so sum z+ = (T + y) / 2

Only what nothing is divided by is taken from T and y, where small sides would be lost to rounding: gamma, zbox, and
maps whose weights are no plain factors (rotary embedding, products of several constants, interpolation). Where x is
known to be >= 0 (after a ReLU), all products with x- fall away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from dlbc.errors import RuleError
from dlbc.ir.core import Attr, Op, Operand, Value
from dlbc.ir.ops import STABILISER
from dlbc.passes.rules import Contributions, Expansion, only, rule
from dlbc.passes.rules.linear import EXPERTS, LINEAR, LinearMap, _bias_shaped, channel_axis, linear_map

EMPTY = 1e-5
"""The part of all contributions below which a difference of sums in float32 is taken for rounding."""


def _numbers(what: str, params: Mapping[str, Attr], *names: str) -> list[float]:
    """Parameters that must be numbers; RuleError otherwise."""
    found = []
    for name in names:
        value = params[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RuleError(f"`{name}` of rule `{what}` is {value!r}; it must be a number")
        found.append(float(value))
    return found


def _result(at: Expansion, linear: LinearMap) -> Operand:
    """y in float32: computed anew where the model's own is narrower, since it is compared with sums in float32."""
    return at.read(linear.op.result) if linear.op.result.type.dtype in ("f32", "f64") else linear(linear.x)


class _Parts:
    """A linear map by the parts of its weights and of x, all as sizes: what comes in by sign, and what goes back."""

    def __init__(self, linear: LinearMap, plus: LinearMap, minus: LinearMap) -> None:
        at = linear.at
        self.linear, self.plus, self.minus = linear, plus, minus
        self.x = (linear.x, None) if linear.nonnegative else (at.relu(linear.x), at.relu(at.neg(linear.x)))

    def side(self, *, positive: bool) -> Value:
        """The sum of the positive (of the sizes of the negative) contributions, with that part of the bias."""
        own, other = (self.plus, self.minus) if positive else (self.minus, self.plus)
        total, below = own(self.x[0]), self.x[1]
        return total if below is None else self.linear.at.add(total, replace(other, bias=None)(below))

    def back(self, up: Value | None, down: Value | None) -> Contributions:
        """Relevance of x for A = up and B = down (None: 0), after the share of the bias is absorbed."""
        at, linear = self.linear.at, self.linear
        for share, part in ((up, self.plus), (down, self.minus)):
            if share is not None and part.bias is not None:
                at.absorb("bias", at.mul(_bias_shaped(part), share))
        found = at.mul(self.x[0], self._adjoint(up, down))
        if self.x[1] is not None:
            found = at.add(found, at.mul(self.x[1], self._adjoint(down, up)))
        return only(linear.op, linear.position, found)

    def _adjoint(self, plus: Value | None, minus: Value | None) -> Value:
        """W+^T plus + W-^T minus."""
        parts = [part.adjoint(share) for part, share in ((self.plus, plus), (self.minus, minus)) if share is not None]
        return parts[0] if len(parts) == 1 else self.linear.at.add(*parts)


class _Whole:
    """The same by |W| and W, for weights that are no plain factors."""

    def __init__(self, linear: LinearMap) -> None:
        at = linear.at
        self.linear, self.size, self.magnitude = linear, linear.size, linear.absolute
        self.total, self.y = at.mul(self.magnitude(self.size), 0.5), at.mul(_result(at, linear), 0.5)

    def side(self, *, positive: bool) -> Value:
        """As of `_Parts`: (T + y) / 2 or (T - y) / 2, 0 where that is rounding."""
        at = self.linear.at
        found = at.add(self.total, self.y) if positive else at.sub(self.total, self.y)
        return at.where(at.gt(found, at.mul(self.total, EMPTY)), found, 0.0)

    def back(self, up: Value | None, down: Value | None) -> Contributions:
        """As of `_Parts`: |x| |W|^T (A + B) / 2 + x W^T (A - B) / 2."""
        at, linear = self.linear.at, self.linear
        up, down = (None if share is None else at.mul(share, 0.5) for share in (up, down))
        whole = up if down is None else down if up is None else at.add(up, down)
        signed = up if down is None else at.neg(down) if up is None else at.sub(up, down)
        assert whole is not None and signed is not None
        if linear.bias is not None:
            at.absorb("bias", at.add(at.mul(_bias_shaped(self.magnitude), whole), at.mul(_bias_shaped(linear), signed)))
        return only(linear.op, linear.position, at.add(
            at.mul(self.size, self.magnitude.adjoint(whole)), at.mul(linear.x, linear.adjoint(signed))))


def _sides(linear: LinearMap) -> _Parts | _Whole:
    at, plus = linear.at, linear.positive
    if plus is None or not linear.weights:
        return _Whole(linear)
    return _Parts(linear, plus, linear.mapped(lambda w: at.relu(at.neg(w))))


# --- absolute ----------------------------------------------------------------------------------------

def _check_absolute(params: Mapping[str, Attr]) -> None:
    low, high = _numbers("absolute", params, "low", "high")
    if not low < high:
        raise RuleError(f"`low` of rule `absolute` is {low:g} and `high` is {high:g}; low must be below high",
                        hint="between them the following activation is not saturated, as in absolute(low=-4, high=4)")


@rule(LINEAR, "absolute", form="R", check=_check_absolute)
def absolute(at: Expansion, op: Op, r: Value, *, low: float = -math.inf, high: float = math.inf) -> Contributions:
    """R_x = |x| * |W|^T (R_y / (|W| |x| + |b|)); where y < low only negative, where y > high only positive
    contributions count.  DL-Backtrace default mode and its activation-aware form, arXiv 2411.12643.
    """
    linear = linear_map(at, op)
    if low == -math.inf and high == math.inf:
        size, magnitude = at.abs(linear.x), linear.absolute  # x first: it may be freed before |W| is made
        share = at.shared(r, magnitude(size))
        if magnitude.bias is not None:
            at.absorb("bias", at.mul(_bias_shaped(magnitude), share))
        return only(op, linear.position, at.mul(size, magnitude.adjoint(share)))
    y, sides = _result(at, linear), _sides(linear)
    below = at.lt(y, low) if low > -math.inf else None
    above = at.gt(y, high) if high < math.inf else None
    positive, negative = sides.side(positive=True), sides.side(positive=False)
    if below is not None:
        positive = at.where(below, 0.0, positive)
    if above is not None:
        negative = at.where(above, 0.0, negative)
    share = at.shared(r, at.add(positive, negative))
    return sides.back(share if below is None else at.where(below, 0.0, share),
                      share if above is None else at.where(above, 0.0, share))


@rule(LINEAR, "absolute_0_1", form="R", conserves=False)
def absolute_0_1(at: Expansion, op: Op, r: Value) -> Contributions:
    """As `absolute`; where all contributions to an output of a linear layer have one sign, the denominator is 1
    larger, and a mean gives each element the same.  dl-backtrace 0.1.24.

    Kept to reproduce old reports; what the surplus takes is recorded as the rule's.
    """
    if op.name == "mean":
        return only(op, 0, linear_map(at, op).adjoint(r))
    if op.name not in ("linear", "linear_rows", "matmul", "einsum", *EXPERTS):
        return absolute(at, op, r)
    linear = linear_map(at, op)
    size, magnitude = at.abs(linear.x), linear.absolute
    total = replace(magnitude, bias=None)(size)
    signed = replace(linear, bias=None)(linear.x)
    mixed = at.gt(at.sub(total, at.abs(signed)), at.mul(total, 1e-6))
    one_sided = at.where(mixed, 0.0, 1.0)
    share = at.safe_div(r, at.add(magnitude(size) if magnitude.bias is not None else total, one_sided))
    if magnitude.bias is not None:
        at.absorb("bias", at.mul(_bias_shaped(magnitude), share))
    return only(op, linear.position, at.mul(size, magnitude.adjoint(share)))


# --- gamma -------------------------------------------------------------------------------------------

def _check_gamma(params: Mapping[str, Attr]) -> None:
    (gamma,) = _numbers("gamma", params, "gamma")
    if not 0 <= gamma < math.inf:
        raise RuleError(f"`gamma` of rule `gamma` is {gamma:g}; it must be 0 or more, and finite",
                        hint="0 is the epsilon rule, 0.25 is usual, and large numbers come close to zplus")


@rule(LINEAR, "gamma", form="M", check=_check_gamma)
def gamma(at: Expansion, op: Op, m: Value, *, gamma: float = 0.25, eps: float = STABILISER) -> Contributions:
    """R_i = sum_j (z_ij + g z'_ij) R_j / e(sum_i (z_ij + g z'_ij)), z' the contributions of the sign of y_j.

    The generalised gamma rule (Andeol et al. 2021, after Montavon et al. 2019) for inputs of both signs. The
    denominator is `z = y + g/2 (y + sgn(y) T)`: of the sign of y and never smaller, where the plain one,
    `y + g (W+ x + b+)`, crosses 0. As a multiplier: `s = M_y y / e(z)`,
    `M_x = (1 + g/2) W^T s + sgn(x) g/2 |W|^T (s sgn(y))`. An output that is 0 hands on nothing. All by 1 + g/2, so that
    only one of the two shares has a factor: `z' = |y| + c T`, `M_x = W^T |s'| + sgn(x) c |W|^T s'`, c = g / (2 + g).
    """
    linear = linear_map(at, op)
    y = at.read(op.result)
    plain = linear.positive is not None and linear.weights and op.name not in EXPERTS
    if m.name in at.facts.rectified and linear.nonnegative and plain:
        return _gamma_rectified(at, linear, m, y, gamma, eps)
    size, magnitude, common, share = linear.size, linear.absolute, 1 + gamma / 2, gamma / (2 + gamma)
    z = at.add(at.abs(y), at.mul(magnitude(size), share))  # |z| / (1 + g/2)
    divisor, r = at.add(z, eps / common), at.facts.divided.get(m.name)
    if r is None:
        part = at.div(y, divisor)
        s, t = at.mul(m, at.abs(part)), at.mul(m, at.mul(part, share))  # (1 + g/2) s, and g/2 s sgn(y)
        at.absorb("stabiliser", at.mul(m, at.sub(y, at.mul(part, z))))
    else:  # M = R / e(y), and R is shared out by z in its place
        side = at.sign(y)
        s = at.mul(at.div(r, divisor), side)
        t = at.mul(s, at.mul(side, share))
        at.absorb("stabiliser", at.sub(at.mul(m, y), at.mul(at.mul(s, side), z)))
    if linear.bias is not None:
        at.absorb("bias", at.add(at.mul(_bias_shaped(linear), s), at.mul(_bias_shaped(magnitude), t)))
    favoured = magnitude.adjoint(t)
    if not linear.nonnegative:
        favoured = at.mul(at.sign(linear.x), favoured)
    return only(op, linear.position, at.add(linear.adjoint(s), favoured))


def _gamma_rectified(at: Expansion, linear: LinearMap, m: Value, y: Operand, gamma: float, eps: float
                     ) -> Contributions:
    """Where x >= 0 and a ReLU took relevance from all y < 0: plain gamma, with the one map V = W + g W+."""
    raised = linear.mapped(lambda w: at.add(w, at.mul(at.relu(w), gamma)))
    z = raised(linear.x)
    part = at.div(y, at.stabilise(z, eps=eps))
    at.absorb("stabiliser", at.mul(m, at.sub(y, at.mul(part, z))))
    s = at.mul(m, part)
    if raised.bias is not None:
        at.absorb("bias", at.mul(_bias_shaped(raised), s))
    return only(linear.op, linear.position, raised.adjoint(s))


# --- alpha-beta --------------------------------------------------------------------------------------

def _check_alpha_beta(params: Mapping[str, Attr]) -> None:
    alpha, beta = _numbers("alpha_beta", params, "alpha", "beta")
    if not (alpha >= 0 and beta >= 0 and math.isclose(alpha - beta, 1, abs_tol=1e-6) and alpha < math.inf):
        raise RuleError(f"`alpha` of rule `alpha_beta` is {alpha:g} and `beta` is {beta:g}; "
                        "neither may be negative, and alpha - beta must be 1",
                        hint="as in alpha_beta(2, 1), or alpha_beta(1, 0), which is zplus")


@rule(LINEAR, "alpha_beta", form="R", check=_check_alpha_beta)
def alpha_beta(at: Expansion, op: Op, r: Value, *, alpha: float = 2.0, beta: float = 1.0) -> Contributions:
    """R_i = sum_j (alpha z+_ij / sum_i z+_ij - beta z-_ij / sum_i z-_ij) R_j, the bias on the side of its sign.

    A side without contributions cannot hand on its part, which is absorbed.  Bach et al. 2015.
    """
    if beta == 0:
        return zplus(at, op, r)
    sides = _sides(linear_map(at, op))
    return sides.back(at.shared(at.mul(r, alpha), sides.side(positive=True)),
                      at.shared(at.mul(r, -beta), sides.side(positive=False)))


@rule(LINEAR, "zplus", form="R")
def zplus(at: Expansion, op: Op, r: Value) -> Contributions:
    """R_i = sum_j z+_ij / sum_i z+_ij R_j, with the positive part of the bias.  Montavon et al. 2017.

    As in zennit, x may have either sign: z+ = x+ W+ + x- W-. The same as alpha_beta(1, 0).
    """
    sides = _sides(linear_map(at, op))
    return sides.back(at.shared(r, sides.side(positive=True)), None)


# --- by weights alone --------------------------------------------------------------------------------

@rule(LINEAR, "w_square", form="R")
def w_square(at: Expansion, op: Op, r: Value) -> Contributions:
    """R_i = sum_j w_ij^2 / (sum_i w_ij^2 + b_j^2) R_j, whatever x is; the bias absorbs its part.  Montavon et al. 2017.

    Weights that are products of several constants are squared factor by factor. Maps without weights keep theirs.
    """
    return _by_weights(at, linear_map(at, op), lambda w: at.mul(w, w), r)


@rule(LINEAR, "flat", form="R")
def flat(at: Expansion, op: Op, r: Value) -> Contributions:
    """R_i = sum_j R_j / n_j over the outputs j that read x_i, n_j the inputs that y_j reads: w, x := 1, b := 0.

    Lapuschkin et al. 2019. Padding gets nothing. Maps without weights keep theirs.
    """
    if op.name in EXPERTS:  # every output reads all inputs of its row: no weights of experts are asked
        linear = linear_map(at, op)
        share = at.div(at.sum(r, dims=(-1,), keepdim=True), linear.type.shape[-1])
        return only(op, linear.position, at.widen(at.unbroadcast(share, linear.type), linear.type))

    def ones(w: Operand) -> Value:
        found: Value = at.full(shape=w.type.shape, value=1.0, dtype="f32")  # type: ignore[union-attr]
        return found

    return _by_weights(at, replace(linear_map(at, op), bias=None), ones, r)


def _by_weights(at: Expansion, linear: LinearMap, change: Callable[[Operand], Value], r: Value) -> Contributions:
    changed = replace(linear.mapped(change) if linear.weights else linear.absolute, signed=False)
    share = at.shared(r, changed(at.full(shape=changed.span, value=1.0, dtype="f32")))
    if changed.bias is not None:
        at.absorb("bias", at.mul(_bias_shaped(changed), share))
    return only(linear.op, linear.position, changed.adjoint(share))


# --- bounded inputs ----------------------------------------------------------------------------------

def bounds(params: Mapping[str, Attr]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`low` and `high` as equally many numbers; RuleError where they make no box."""
    bounds = [value if isinstance(value, tuple) else (value,) for value in (params["low"], params["high"])]
    count = max(map(len, bounds))
    if any(len(bound) not in (1, count) or not bound for bound in bounds):
        raise RuleError(f"`low` of rule `zbox` has {len(bounds[0])} numbers and `high` has {len(bounds[1])}",
                        hint="give one number, or one for each channel")
    low, high = ([*bound] * (count // len(bound)) for bound in bounds)
    for i in range(count):
        least, largest = _numbers("zbox", {"low": low[i], "high": high[i]}, "low", "high")
        if not -math.inf < least < largest < math.inf:
            channel = f" (channel {i})" if count > 1 else ""
            raise RuleError(f"`low` of rule `zbox` is {least:g} and `high` is {largest:g}{channel}; "
                            "both must be finite, and low below high",
                            hint="they are the smallest and largest values that the input can have")
    return tuple(map(float, low)), tuple(map(float, high))  # type: ignore[arg-type]


def _check_zbox(params: Mapping[str, Attr]) -> None:
    bounds(params)


@rule(LINEAR, "zbox", form="R", check=_check_zbox)
def zbox(at: Expansion, op: Op, r: Value, *, low: float | tuple[float, ...] = -1.0,
         high: float | tuple[float, ...] = 1.0) -> Contributions:
    """R_x = x W^T s - l W+^T s - h W-^T s, s = R_y / sum_i (x_i w_ij - l_i w+_ij - h_i w-_ij).  Montavon et al. 2017.

    For inputs l <= x <= h, as numbers or one per channel. No bias: it drops out. With the middle c and half width d of
    the box both are `W (x - c) + |W| d`; what is constant in that is computed once.
    """
    linear = linear_map(at, op)
    plain = replace(linear, bias=None)
    magnitude = plain.absolute
    lowest, highest = bounds({"low": low, "high": high})
    middle = [(a + b) / 2 for a, b in zip(lowest, highest, strict=True)]
    width = _box(at, linear, [(b - a) / 2 for a, b in zip(lowest, highest, strict=True)])
    y, x, reach = _result(at, linear), linear.x, magnitude(width)
    y, scale = (y, reach) if linear.bias is None else (
        at.sub(y, _bias_shaped(linear)), at.add(reach, at.abs(_bias_shaped(linear))))
    if any(middle):
        centre = _box(at, linear, middle)
        y, x = at.sub(y, plain(centre)), at.sub(x, centre)
    total = at.add(y, reach)
    share = at.shared(r, at.where(at.gt(at.abs(total), at.mul(scale, EMPTY)), total, 0.0))
    return only(op, linear.position, at.add(at.mul(x, plain.adjoint(share)), at.mul(width, magnitude.adjoint(share))))


def _box(at: Expansion, linear: LinearMap, numbers: list[float]) -> Value:
    """A number, or one per channel, in the shape of x as far as the map tells positions apart."""
    def full(shape: tuple[object, ...], value: float) -> Value:
        found: Value = at.full(shape=shape, value=value, dtype="f32")
        return found

    if len(set(numbers)) == 1 and len(numbers) == 1:
        return full(linear.span, numbers[0])
    axis, shape = channel_axis(linear.op, linear.position), list(linear.span)
    if linear.type.shape[axis] != len(numbers):
        raise RuleError(f"rule `zbox` has bounds for {len(numbers)} channels, and `{linear.op.name}` reads "
                        f"{linear.type.shape[axis]}", where=f"#{linear.op.place or 'model'}",
                        hint="give one number, or one for each channel (axis 1 of images, the last axis otherwise)")
    shape[axis] = 1
    found: Value = at.cat(*(full(tuple(shape), number) for number in numbers), dim=axis)
    return found
