"""The rules by their textbook formulas, with explicit matrices and loops: the oracle of `test_rules.py`.

Everything is relevance itself (never a multiplier), float64, and written from the formulas, not from the rules'
expansions. A linear map is its matrix, found by applying the op to basis vectors; a move is found by applying
the op to the numbers of the elements; attention is loops over heads, queries and keys. `e(z) = z + eps sign(z)`.
Where relevance enters a rule that carries multipliers, R / e(y) with eps = 1e-9 stands for R / y.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dense_recurrent
import numpy as np
from numpy.typing import NDArray

from dlbc.composite import Composite
from dlbc.ir.core import Graph, Op, Rule, Value
from dlbc.ir.dims import Sym, evaluate
from dlbc.ir.interpreter import Run, interpret
from dlbc.ir.ops import definition
from dlbc.ir.reference import REFERENCE
from dlbc.passes.carriers import carriers, data_operands, explained_inputs
from dlbc.passes.rules import RULES

Array = NDArray[Any]
TINY = 1e-9
CLOSED = {"relu", "silu", "mish", "gelu", "hardswish", "leaky_relu", "neg", "abs", "negative_part", "softsign", "tanh",
          "atan", "sin", "erf", "prelu"}
"""Functions with f(0) = 0 and a finite slope there: the identity rule has no stabiliser for them."""


def e(z: Array, eps: float = TINY) -> Array:
    return z + np.where(z >= 0, eps, -eps)


def over(a: Array, b: Array) -> Array:
    """a / b, 0 where b = 0."""
    return np.where(b == 0, 0.0, a / np.where(b == 0, 1.0, b))


@dataclass
class Site:
    """One op with its numbers: operands x, results y, and which operands carry."""

    name: str
    rule: str
    params: dict[str, Any]
    attrs: dict[str, Any]
    x: list[Any]
    y: Array
    results: list[Array]
    carried: list[bool]
    softmaxes: list[bool]
    pairs: list[Array]
    """Of each operand, a number for each element: the same for two that rotary embedding turned into each other."""
    tiny: float = TINY
    """0 where relevance comes in as a multiplier already: it was divided by its value before."""

    def multiplier(self, r: Array) -> Array:
        """R / y."""
        return over(r, e(self.y, self.tiny))

    def forward(self, *operands: Any) -> Array:
        found = REFERENCE[self.name](*operands, **self.attrs)
        return found[0] if isinstance(found, tuple) else found

    def matrix(self, position: int) -> Array:
        """d y / d x[position] [*y, *x] of an op that is linear in that operand, from basis vectors."""
        own = np.asarray(self.x[position])
        def at(value: Array) -> Array:
            return self.forward(*(value if i == position else o for i, o in enumerate(self.x)))
        origin = at(np.zeros(own.shape))
        columns = []
        for place in range(own.size):
            unit = np.zeros(own.size)
            unit[place] = 1
            columns.append(at(unit.reshape(own.shape)) - origin)
        return np.stack(columns, axis=-1).reshape(*self.y.shape, *own.shape)

    def bias(self, position: int) -> Array:
        own = np.asarray(self.x[position])
        return self.forward(*(np.zeros(own.shape) if i == position else o for i, o in enumerate(self.x)))

    @property
    def only(self) -> int:
        return self.carried.index(True)


def contributions(site: Site, r: Array) -> list[Array | None]:
    """Relevance [S, *operand] of each operand that carries, None for the others; r is [S, *y]."""
    if RULES[site.name, site.rule].streams > 1:
        found: list[Array | None] = FORMULAS[FAMILY[site.name], site.rule](site, r)
        return found
    per_seed = [_one_seed(site, one) for one in r]
    return [np.stack([parts[i] for parts in per_seed]) if carries and per_seed[0][i] is not None else None
            for i, carries in enumerate(site.carried)]


def _one_seed(site: Site, r: Array) -> list[Any]:
    found = FORMULAS[FAMILY[site.name], site.rule](site, r)
    if isinstance(found, list):
        return found
    return [found if i == site.only else None for i in range(len(site.x))]


def _through(a: Array, r: Array) -> Array:
    """sum_j a[j, i] r[j]."""
    return np.tensordot(r, a, axes=r.ndim)


# --- linear maps -------------------------------------------------------------------------------------

def epsilon(s: Site, r: Array) -> Array:
    return s.x[s.only] * _through(s.matrix(s.only), _stabilised(s, r))


def linear_gradient(s: Site, r: Array) -> Array:
    return s.x[s.only] * _through(s.matrix(s.only), s.multiplier(r))


def _stabilised(s: Site, r: Array) -> Array:
    return r / e(s.y, s.params["eps"]) if "eps" in s.params else s.multiplier(r)


def absolute(s: Site, r: Array, one_sided: bool = False) -> Array:
    low, high = s.params.get("low", -np.inf), s.params.get("high", np.inf)
    if low > -np.inf or high < np.inf:
        return _activation_aware(s, r, low, high)
    x = s.x[s.only]
    sizes = s if s.name != "einsum" else Site(**{**s.__dict__, "x": [np.abs(o) for o in s.x]})
    z = np.abs(sizes.matrix(s.only)) * np.abs(x)  # each product of weights by its size, also where they are summed
    last = tuple(range(s.y.ndim, z.ndim))
    total = z.sum(axis=last)
    if one_sided:
        total = total + (total - np.abs(s.y - s.bias(s.only)) < 1e-9)
    return _through(z, over(r, total + np.abs(s.bias(s.only))))


def absolute_0_1(s: Site, r: Array) -> Array:
    if s.name == "mean":
        return _through(s.matrix(0), r)
    return absolute(s, r, one_sided=s.name in ("linear", "linear_rows", "matmul", "einsum", "expert_linear",
                                                     "grouped_linear"))


def _terms_by_sign(s: Site) -> tuple[Array, Array, Array]:
    """z+, z- [*y, *x] and the bias [*y]."""
    x = s.x[s.only]
    plus, minus = _maps_by_sign(s, s.only)
    up = np.maximum(x, 0) * plus - np.minimum(x, 0) * minus
    down = np.minimum(x, 0) * plus - np.maximum(x, 0) * minus
    return up, down, s.bias(s.only)


def _summed(z: Array, s: Site) -> Array:
    """Over the contributions to each output."""
    return np.asarray(z.sum(axis=tuple(range(s.y.ndim, z.ndim))))


def _per_output(mask: Array, z: Array) -> Array:
    return mask.reshape(*mask.shape, *(1,) * (z.ndim - mask.ndim))


def _activation_aware(s: Site, r: Array, low: float, high: float) -> Array:
    up, down, b = _terms_by_sign(s)
    counts_up, counts_down = s.y >= low, s.y <= high
    z = up * _per_output(counts_up, up) - down * _per_output(counts_down, down)
    bias = np.maximum(b, 0) * counts_up - np.minimum(b, 0) * counts_down
    return _through(z, over(r, _summed(z, s) + bias))


def gamma(s: Site, r: Array) -> Array:
    """Contributions of the sign of y count 1 + gamma times; y = 0 hands on nothing."""
    up, down, b = _terms_by_sign(s)
    sign, g = _per_output(s.y > 0, up), s.params["gamma"]
    z = np.where(sign, (1 + g) * up + down, up + (1 + g) * down)
    total = _summed(z, s) + b + g * np.where(s.y > 0, np.maximum(b, 0), np.minimum(b, 0))
    return _through(z, np.where(s.y == 0, 0, r) / e(total, s.params["eps"]))


def alpha_beta(s: Site, r: Array) -> Array:
    up, down, b = _terms_by_sign(s)
    alpha, beta = s.params.get("alpha", 1), s.params.get("beta", 0)
    return alpha * _through(up, over(r, _summed(up, s) + np.maximum(b, 0))) - beta * _through(
        down, over(r, _summed(down, s) + np.minimum(b, 0)))


UNWEIGHTED = {"avg_pool", "adaptive_avg_pool", "interpolate", "mean", "sum", "cumsum"}


def w_square(s: Site, r: Array) -> Array:
    if s.name in UNWEIGHTED:
        weights = np.abs(s.matrix(0))
    elif s.name == "einsum":
        weights = Site(**{**s.__dict__, "x": [o if i == s.only else o ** 2 for i, o in enumerate(s.x)]}).matrix(s.only)
    else:
        weights = s.matrix(s.only) ** 2
    return _through(weights, over(r, _summed(weights, s) + s.bias(s.only) ** 2))


def flat(s: Site, r: Array) -> Array:
    """Weights of ones where there are weights; each output's part is the same for all that it reads."""
    if s.name in UNWEIGHTED:
        weights = np.abs(s.matrix(0))
    elif s.name == "batch_norm":
        weights = (s.matrix(0) != 0).astype(float)
    else:
        known = {"rotary": (1, 2), "expert_linear": (2,), "grouped_linear": (2,)}
        factors = known.get(s.name, [i for i in range(len(s.x)) if i != s.only and np.ndim(s.x[i]) > 1])
        ones = Site(**{**s.__dict__, "x": [np.ones_like(o) if i in factors else o for i, o in enumerate(s.x)]})
        weights = np.abs(ones.matrix(s.only))
    return _through(weights, over(r, _summed(weights, s)))


def zbox(s: Site, r: Array) -> Array:
    x = s.x[s.only]
    channels = s.name.startswith(("conv", "batch_norm", "avg_pool", "adaptive_avg_pool", "interpolate"))
    shape = (-1, *(1,) * (x.ndim - 2)) if channels else (-1,)
    low, high = (np.reshape(s.params[name], shape) if np.ndim(s.params[name]) else s.params[name]
                 for name in ("low", "high"))
    plus, minus = _maps_by_sign(s, s.only)
    z = (x - low) * plus + (high - x) * minus
    return _through(z, over(r, _summed(z, s)))


# --- products of carriers ----------------------------------------------------------------------------

def _each(s: Site, share: Callable[[int], Array]) -> list[Any]:
    return [share(i) if carries else None for i, carries in enumerate(s.carried)]


def half(s: Site, r: Array, part: float = 0.0) -> list[Any]:
    part = part or 1 / sum(s.carried)
    return _each(s, lambda i: part * s.x[i] * _through(s.matrix(i), _stabilised(s, r)))


def product_gradient(s: Site, r: Array) -> list[Any]:
    return half(s, r, part=1.0)


def signal(s: Site, r: Array) -> list[Any]:
    if sum(s.softmaxes) != 1:
        return half(s, r)
    return [None if weight else found for weight, found in zip(s.softmaxes, half(s, r, part=1.0), strict=True)]


def share(s: Site, r: Array) -> list[Any]:
    """Half each by the share of each term |a_ik b_kj|."""
    sizes = Site(**{**s.__dict__, "x": [np.abs(o) for o in s.x]})
    total = sizes.forward(*sizes.x)
    return _each(s, lambda i: sizes.x[i] * _through(sizes.matrix(i), over(r, total)) / sum(s.carried))


def signal_relevance(s: Site, r: Array) -> list[Any]:
    """All to the factor that is no softmax."""
    found = share(s, r)
    if sum(s.softmaxes) != 1:
        return found
    return [None if weight else part * sum(s.carried) for weight, part in zip(s.softmaxes, found, strict=True)]


def _summed_to(a: Array, shape: tuple[int, ...]) -> Array:
    while a.ndim > len(shape):
        a = a.sum(axis=0)
    for axis, size in enumerate(shape):
        if size == 1 and a.shape[axis] != 1:
            a = a.sum(axis=axis, keepdims=True)
    return a


def _split(s: Site, parts: Sequence[Array]) -> list[Any]:
    """Elementwise amounts [*y] as relevance of broadcast operands."""
    return _each(s, lambda i: _summed_to(np.broadcast_to(parts[i], s.y.shape), np.shape(s.x[i])))


def kept(s: Site, r: Array) -> Array:
    """What is left of relevance that became a multiplier: R y / e(y)."""
    return s.multiplier(r) * s.y


def halves(s: Site, r: Array) -> list[Any]:
    return _split(s, [kept(s, r) / sum(s.carried)] * 2)


def uniform(s: Site, r: Array) -> list[Any]:
    return _split(s, [r / sum(s.carried)] * 2)


def whole(s: Site, r: Array) -> list[Any]:
    return _split(s, [kept(s, r)] * 2)


def numerator(s: Site, r: Array) -> list[Any]:
    if s.carried[0]:
        return [_summed_to(kept(s, r), np.shape(s.x[0])), None]
    return _split(s, [kept(s, r), kept(s, r) * s.x[1] / e(np.asarray(s.x[1]))])


def numerator_relevance(s: Site, r: Array) -> list[Any]:
    return [_summed_to(r, np.shape(s.x[0])), None] if s.carried[0] else _split(s, [r, r])


def quotient_gradient(s: Site, r: Array) -> list[Any]:
    return _split(s, [kept(s, r), -kept(s, r)])


GATES: dict[str, Callable[[Array], Array]] = {
    "silu": REFERENCE["silu"], "gelu": REFERENCE["gelu"],
    "gelu_tanh": lambda x: REFERENCE["gelu"](x, approximate="tanh"),
    "gelu_quick": lambda x: REFERENCE["gelu"](x, approximate="quick"), "relu": lambda x: np.maximum(x, 0),
    "sigmoid": REFERENCE["sigmoid"], "tanh": np.tanh}


def _gate(s: Site, r: Array) -> Array:
    """What reaches the gate of the relevance r: all, but for functions that need a stabiliser at 0."""
    gate = s.x[0]
    return r * gate / e(gate) if s.attrs["activation"] == "sigmoid" else r


def gate_half(s: Site, r: Array) -> list[Any]:
    r = kept(s, r) / sum(s.carried)
    return _split(s, [_gate(s, r), r])


def gate_signal(s: Site, r: Array) -> list[Any]:
    r = kept(s, r)
    return [None, _split(s, [r, r])[1]] if s.carried[1] else _split(s, [_gate(s, r), r])


def gate_signal_relevance(s: Site, r: Array) -> list[Any]:
    position = 1 if s.carried[1] else 0
    return [part if i == position else None for i, part in enumerate(_split(s, [r, r]))]


def gate_gradient(s: Site, r: Array) -> list[Any]:
    gate, up = s.x
    to_gate = gate * up * _slope(GATES[s.attrs["activation"]], gate) * s.multiplier(r)
    return _split(s, [to_gate, kept(s, r)])


# --- sums --------------------------------------------------------------------------------------------

def _terms(s: Site) -> list[int]:
    """The operands that are terms of the sum."""
    return {"scatter_add": [0, 2], "index_put": [0, 1]}.get(s.name, [0, 1])


def sum_epsilon(s: Site, r: Array) -> list[Any]:
    return _each(s, lambda i: s.x[i] * _through(s.matrix(i), _stabilised(s, r)))


def sum_absolute(s: Site, r: Array) -> list[Any]:
    sizes = {i: np.abs(s.matrix(i)) * np.abs(s.x[i]) for i in _terms(s)}
    total = sum(z.sum(axis=tuple(range(s.y.ndim, z.ndim))) for z in sizes.values())
    return _each(s, lambda i: _through(sizes[i], over(r, np.asarray(total))))


def equal(s: Site, r: Array) -> list[Any]:
    return _split(s, [r / 2, r / 2])


# --- unary functions ---------------------------------------------------------------------------------

def identity(s: Site, r: Array) -> list[Any]:
    if s.name == "relu":  # of relevance as it is; where it comes as a multiplier, the next rule divides by the same x
        return _split(s, [np.where(s.x[s.only] > 0, r, 0.0)])
    r, x = kept(s, r), s.x[s.only]
    return _split(s, [np.where(x == 0, 0.0, r) if s.name in CLOSED else r * x / e(x)] * len(s.x))


def passed(s: Site, r: Array) -> list[Any]:
    return _split(s, [r] * len(s.x))


def _slope(f: Callable[[Array], Array], x: Array, h: float = 1e-3) -> Array:
    """f'(x) by a five-point stencil: exact to about 1e-11 away from kinks."""
    return (8 * (f(x + h) - f(x - h)) - f(x + 2 * h) + f(x - 2 * h)) / (12 * h)


def gradient(s: Site, r: Array) -> list[Any]:
    def rate(i: int) -> Array:
        return _slope(lambda v: s.forward(*(v if j == i else o for j, o in enumerate(s.x))), s.x[i])
    return _each(s, lambda i: _summed_to(s.x[i] * rate(i) * s.multiplier(r), np.shape(s.x[i])))


def reduction_gradient(s: Site, r: Array) -> Array:
    """x dy/dx R / y, with dy/dx by stencils, one element of x after the other."""
    x, found = s.x[0], np.zeros(s.x[0].shape)
    for place in np.ndindex(*x.shape):
        unit = np.zeros(x.shape)
        unit[place] = 1
        found[place] = (_slope(lambda t: s.forward(x + t * unit), np.zeros(())) * s.multiplier(r)).sum()  # noqa: B023
    return x * found


# --- selections and moves ----------------------------------------------------------------------------

def where(s: Site, r: Array) -> list[Any]:
    condition = np.broadcast_to(s.x[0], s.y.shape)
    return _split(s, [np.zeros(()), np.where(condition, r, 0), np.where(condition, 0, r)])


def clamp(s: Site, r: Array) -> Array:
    low, high = s.attrs["low"], s.attrs["high"]
    inside = (s.x[0] >= (-np.inf if low is None else low)) & (s.x[0] <= (np.inf if high is None else high))
    return np.where(inside, r, 0.0)


def extremum(s: Site, r: Array) -> list[Any]:
    wins = [np.broadcast_to(np.asarray(o) == s.y, s.y.shape).astype(float) for o in s.x]
    return _split(s, [r * win / (wins[0] + wins[1]) for win in wins])


def _windows(s: Site, place: tuple[int, ...], size: tuple[int, ...]) -> list[range]:
    """The input elements that one output element of a pooling op looks at, per axis."""
    if s.name == "adaptive_max_pool":
        return [range(p * n // m, -(-(p + 1) * n // m)) for p, n, m in zip(place, size, s.attrs["size"], strict=True)]
    numbers = zip(place, size, *(s.attrs[name] for name in ("kernel", "stride", "padding", "dilation")), strict=True)
    return [range(p * st - pad, p * st - pad + k * d, d) for p, n, k, st, pad, d in numbers]


def max_pool(s: Site, r: Array) -> Array:
    x, rank = s.x[0], len(s.attrs["size" if s.name == "adaptive_max_pool" else "kernel"])
    found = np.zeros(x.shape)
    for place in np.ndindex(*s.y.shape):
        front, inner = place[:-rank], place[-rank:]
        cells = [c for c in itertools.product(*_windows(s, inner, x.shape[-rank:]))
                 if all(0 <= i < n for i, n in zip(c, x.shape[-rank:], strict=True))]
        best = max(x[(*front, *c)] for c in cells)
        winners = [c for c in cells if x[(*front, *c)] == best]
        for c in winners:
            found[(*front, *c)] += r[place] / len(winners)
    return found


def reduce_extremum(s: Site, r: Array) -> Array:
    x = s.x[0]
    dims = s.attrs.get("dims", s.attrs.get("dim"))
    axes = tuple(range(x.ndim)) if dims is None else tuple(d % x.ndim for d in np.atleast_1d(dims))
    shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    wins = x == s.y.reshape(shape)
    return wins * (r.reshape(shape) / wins.sum(axis=axes, keepdims=True))


def embedding(s: Site, r: Array) -> Array:
    return r.sum(axis=-1)


def move(s: Site, r: Array) -> list[Any]:
    """Apply the op to the numbers of the elements: each output element says where it came from."""
    numbers, start, spans = [], 1.0, []
    for operand, carries in zip(s.x, s.carried, strict=True):
        size = np.size(operand) if carries else 0
        spans.append((int(start), size))
        is_data = carries or (s.name in ("cat",) and operand is not None)
        numbers.append((start + np.arange(size)).reshape(np.shape(operand)) if carries
                       else np.zeros(np.shape(operand)) if is_data else operand)
        start += size
    if s.name in ("topk", "sort", "route_topk"):
        source = np.take_along_axis(numbers[0], s.results[1], axis=s.attrs.get("dim", -1))
    else:
        for i in {"scatter": (0, 2), "index_put": (0, 1)}.get(s.name, ()):
            numbers[i] = numbers[i] if s.carried[i] else np.zeros(np.shape(s.x[i]))
        attrs = {**s.attrs, "value": 0.0} if s.name == "pad" else s.attrs
        source = REFERENCE[s.name](*numbers, **attrs)
    amounts = np.bincount(np.asarray(source).astype(int).ravel(), r.ravel(), minlength=int(start))
    return [amounts[at:at + size].reshape(np.shape(o)) if carries else None
            for (at, size), o, carries in zip(spans, s.x, s.carried, strict=True)]


# --- softmax, norms ----------------------------------------------------------------------------------

def softmax_taylor(s: Site, r: Array) -> Array:
    """R_s = s (R_P - P sum R_P); log-softmax: s (M - P sum M)."""
    dim = s.attrs["dim"]
    if s.name == "softmax":
        r = kept(s, r)
        return s.x[0] * (r - s.y * r.sum(axis=dim, keepdims=True))
    m = s.multiplier(r)
    return s.x[0] * (m - np.exp(s.y) * m.sum(axis=dim, keepdims=True))


def _norm_rows(s: Site) -> tuple[Array, Array, tuple[int, ...]]:
    """x as [rows, n], the affine weight as [rows, n], and the shape to go back to."""
    x = s.x[0]
    weight = np.ones(()) if len(s.x) < 2 or s.x[1] is None else s.x[1]
    if s.name == "group_norm":
        weight = weight.reshape(-1, *(1,) * (x.ndim - 2)) if weight.ndim else weight
        n = x[0].size // s.attrs["groups"]
    else:
        n = math.prod(x.shape[x.ndim - s.attrs["dims"]:])
    return x.reshape(-1, n), np.broadcast_to(weight, x.shape).reshape(-1, n), x.shape


def _norm(s: Site, r: Array, through_statistics: bool) -> Array:
    x, weight, shape = _norm_rows(s)
    m, n = s.multiplier(r).reshape(x.shape), x.shape[1]
    found = np.zeros(x.shape)
    for row in range(len(x)):
        mean = 0.0 if s.name == "rms_norm" else x[row].mean()
        inverse = 1 / math.sqrt(((x[row] - mean) ** 2).mean() + s.attrs["eps"])
        normal = (x[row] - mean) * inverse
        jacobian = np.eye(n) - (0 if s.name == "rms_norm" else 1 / n)  # of x - mean
        if through_statistics:
            jacobian = jacobian - np.outer(normal, normal) / n
        found[row] = x[row] * ((weight[row] * m[row] * inverse) @ jacobian)
    return found.reshape(shape)


# --- attention ---------------------------------------------------------------------------------------

def _scores(s: Site) -> tuple[Array, Array, Array]:
    """Raw scores q k scale, P, and softcap's slopes (identity and derivative) [2, ...], per head."""
    q, k = s.x[0], s.x[1]
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1], k.shape[2]
    mask = s.x[3] if len(s.x) > 3 else None
    mask = None if mask is None else np.broadcast_to(mask, (batch, heads, queries, keys))
    raw, p = np.zeros((2, batch, heads, queries, keys))
    slopes = np.ones((2, batch, heads, queries, keys))
    cap, window = s.attrs["softcap"], s.attrs["window"]
    sinks = s.x[4] if len(s.x) > 4 else np.full(heads, -np.inf)
    for b, h, i in np.ndindex(batch, heads, queries):
        weights = np.zeros(keys)
        for j in range(keys):
            score = raw[b, h, i, j] = float(q[b, h, i] @ k[b, h // (heads // groups), j]) * s.attrs["scale"]
            if cap is not None:
                slopes[:, b, h, i, j] = cap * math.tanh(score / cap) / score, 1 - math.tanh(score / cap) ** 2
                score = cap * math.tanh(score / cap)
            back = i + keys - queries - j
            seen = not (s.attrs["causal"] and back < 0) and not (window is not None and back >= window)
            if mask is not None and mask.dtype == bool:
                seen = seen and bool(mask[b, h, i, j])
            elif mask is not None:
                score += mask[b, h, i, j]
            weights[j] = math.exp(score) if seen else 0.0
        p[b, h, i] = weights / (weights.sum() + math.exp(sinks[h])) if weights.any() else 0.0
    return raw, p, slopes


def _attention(s: Site, r: Array, *, part: float, derivative: bool = False) -> list[Any]:
    _, p, slopes = _scores(s)
    q, k, v = s.x[:3]
    m = _stabilised(s, r)
    to_q, to_k, to_v = (np.zeros(o.shape) for o in (q, k, v))
    per = q.shape[1] // k.shape[1]
    for b, h, i in np.ndindex(*q.shape[:3]):
        g = h // per
        u = part * m[b, h, i]
        to_p = np.array([p[b, h, i, j] * float(u @ v[b, g, j]) for j in range(k.shape[2])])
        to_s = (to_p - p[b, h, i] * to_p.sum()) * slopes[int(derivative), b, h, i]  # R_s / s
        for j in range(k.shape[2]):
            to_v[b, g, j] += v[b, g, j] * p[b, h, i, j] * u
            both = part * to_s[j] * s.attrs["scale"] * q[b, h, i] * k[b, g, j]
            to_q[b, h, i] += both
            to_k[b, g, j] += both
    return [to_q, to_k, to_v, *(None,) * (len(s.x) - 3)]


def attnlrp(s: Site, r: Array) -> list[Any]:
    return _attention(s, r, part=0.5)


def attnlrp_conserving(s: Site, r: Array) -> list[Any]:
    """Head by head: v gets what softmax absorbs, between none and three times its own."""
    raw, p, slopes = _scores(s)
    k, v = s.x[1:3]
    m, per = 0.5 * _stabilised(s, r), s.x[0].shape[1] // k.shape[1]
    to_q, to_k, _, *rest = _attention(s, r, part=0.5)
    to_v = np.zeros(v.shape)
    for b, h in np.ndindex(*s.x[0].shape[:2]):
        g = h // per
        of_head = v[b, g] * (p[b, h].T @ m[b, h])
        to_p = p[b, h] * (m[b, h] @ v[b, g].T)
        to_s = raw[b, h] * (to_p - p[b, h] * to_p.sum(-1, keepdims=True)) * slopes[0, b, h]
        absorbed, own = to_p.sum() - to_s.sum(), of_head.sum()
        to_v[b, g] += of_head * (np.clip(1 + absorbed / own, 0, 3) if own else 1.0)
    return [to_q, to_k, to_v, *rest]


def attention_gradient(s: Site, r: Array) -> list[Any]:
    return _attention(s, r, part=1.0, derivative=True)


def cp(s: Site, r: Array) -> list[Any]:
    return [None, None, *_attention(s, r, part=1.0)[2:]]


def _lengths(x: Array, pairs: Array) -> Array:
    """|x|, of pairs the root mean square."""
    same = pairs[..., :, None] == pairs[..., None, :]
    return np.sqrt((same * (x ** 2)[..., None, :]).sum(axis=-1) / same.sum(axis=-1))


def energy(s: Site, r: Array) -> Array:
    found = np.zeros(s.x[0].shape)
    r, pairs = _summed_to(r, found.shape), _rotated(s.attrs, s.x[0])
    for row in np.ndindex(*found.shape[:-1]):
        for pair in np.unique(pairs[row]):
            both = pairs[row] == pair
            squares = s.x[0][row][both] ** 2
            found[row][both] = over(squares * r[row][both].sum(), np.full(2, squares.sum()))
    return found


def _rotated(attrs: Mapping[str, Any], y: Array) -> Array:
    """Elements of a rotary embedding numbered by pairs, within each row."""
    size = y.shape[-1]
    own = np.arange(size) // 2 if attrs["interleaved"] else np.arange(size) % (size // 2)
    return np.broadcast_to(own, y.shape) + size // 2 * np.arange(y.size // size).reshape(*y.shape[:-1], 1)


def attention_absolute(s: Site, r: Array, part: float = 1.0) -> list[Any]:
    return [None, None, *_dlb(s, r, part)[2:]]


def dlb(s: Site, r: Array) -> list[Any]:
    return _dlb(s, r, 0.5)


def _dlb(s: Site, r: Array, part: float) -> list[Any]:
    _, p, _ = _scores(s)
    q, k, v = (_lengths(*both) for both in zip(s.x[:3], s.pairs, strict=False))
    to_q, to_k, to_v = (np.zeros(o.shape) for o in (q, k, v))
    per = q.shape[1] // k.shape[1]
    for b, h, i in np.ndindex(*q.shape[:3]):
        g = h // per
        terms = p[b, h, i][:, None] * v[b, g]  # |P_ij v_jd|
        shares = part * over(terms * r[b, h, i], np.broadcast_to(terms.sum(axis=0), terms.shape))
        to_v[b, g] += shares
        for j in range(k.shape[2]):
            both = q[b, h, i] * k[b, g, j]
            both = over(both * shares[j].sum(), np.full(both.shape, both.sum())) / 2
            to_q[b, h, i] += both
            to_k[b, g, j] += both
    return [to_q, to_k, to_v, *(None,) * (len(s.x) - 3)]


def dlb_0_1(s: Site, r: Array) -> list[Any]:
    q, k, v = (np.abs(o) for o in s.x[:3])
    to_q, to_k, to_v = (np.zeros(o.shape) for o in (q, k, v))
    per = q.shape[1] // k.shape[1]
    for b, h in np.ndindex(*q.shape[:2]):
        g, total = h // per, r[b, h].sum()
        to_q[b, h] += 0.25 * total * over(q[b, h], q[b, h].sum())
        to_k[b, g] += 0.25 * total * over(k[b, g], k[b, g].sum())
        to_v[b, g] += 0.5 * total * over(v[b, g], v[b, g].sum())
    return [to_q, to_k, to_v, *(None,) * (len(s.x) - 3)]


# --- mixtures of experts -----------------------------------------------------------------------------

def _mixed(s: Site, share: Callable[[Array, tuple[Any, ...]], Array]) -> Array:
    """What each product w_k u_kd gets, [..., *rows, K, D]: `share` says it of the products of one number of y."""
    u, w = s.x
    found = None
    for *row, d in np.ndindex(*s.y.shape):
        z = np.array([w[(*row, k)] * u[(*row, k, d)] for k in range(u.shape[-2])])
        parts = share(z, (*row, d))
        found = np.zeros((*parts.shape[:-1], *u.shape)) if found is None else found
        found[(..., *row, slice(None), d)] = parts
    assert found is not None
    return found


def _to_experts(s: Site, products: Array) -> list[Any]:
    """All to the experts; to their weights where experts carry none."""
    return [products, None] if s.carried[0] else [None, products.sum(axis=-1)]


def mixture_half(s: Site, r: Array, part: float = 0.0) -> list[Any]:
    m = _stabilised(s, r)
    products = (part or 1 / sum(s.carried)) * _mixed(s, lambda z, at: z * m[at])
    return _each(s, lambda i: products.sum(axis=-1) if i else products)


def mixture_gradient(s: Site, r: Array) -> list[Any]:
    return mixture_half(s, r, part=1.0)


def mixture_signal(s: Site, r: Array) -> list[Any]:
    m = _stabilised(s, r)
    return _to_experts(s, _mixed(s, lambda z, at: z * m[at]))


def mixture_absolute(s: Site, r: Array) -> list[Any]:
    return _to_experts(s, _mixed(s, lambda z, at: over(np.abs(z) * r[at], np.abs(z).sum())))


def mixture_equal(s: Site, r: Array) -> list[Any]:
    return _to_experts(s, _mixed(s, lambda z, at: np.full(z.shape, r[at] / len(z))))


def mixture_contrastive(s: Site, r: Array) -> list[Any]:
    return _to_experts(s, _mixed(s, lambda z, at: _sided(
        r[(slice(None), *at)], np.maximum(z, 0), np.maximum(-z, 0), np.zeros(1))))


# --- contrastive: rows [0, S/2) of r are R+, the others their R- ---------------------------------------

def _sided(r: Array, up: Array, down: Array, constants: Array) -> Array:
    """Relevance [S, *terms] of the terms of each output: `up` and `down` [*y, *terms] are its contributions of either
    sign, both as sizes; `constants` [*y, n] are added to it besides. Output by output, as the rule is told."""
    found = np.zeros((len(r), *up.shape[r.ndim - 1:]))
    for j in np.ndindex(*r.shape[1:]):
        p, n, c = up[j].sum(), down[j].sum(), constants[j]
        through_p, through_n = up[j] / (p + c[c > 0].sum() or 1.0), down[j] / (n - c[c < 0].sum() or 1.0)
        for plus in range(len(r) // 2):
            minus = plus + len(r) // 2
            ours, theirs, y = r[(plus, *j)], r[(minus, *j)], p - n + c.sum()
            if p == 0 or n == 0:
                ways = (through_n, through_n) if p == 0 else (through_p, through_p)
            elif y == 0:
                continue
            elif (y > 0 and ours > theirs) or (y < 0 and ours < theirs):
                ways = through_p, through_n
            else:
                ways = through_n, through_p
            found[plus] += ours * ways[0]
            found[minus] += theirs * ways[1]
    return found


def _maps_by_sign(s: Site, position: int) -> tuple[Array, Array]:
    """The positive and the negative part of an operand's matrix, as sizes; each product of constant factors has a sign
    of its own, also where such products are summed."""
    found = [np.zeros((*s.y.shape, *np.shape(s.x[position]))) for _ in range(2)]
    others = [i for i in range(len(s.x)) if i != position] if s.name == "einsum" else []
    for signs in itertools.product((1, -1), repeat=len(others)):
        x = [np.maximum(signs[others.index(i)] * o, 0) if i in others else o for i, o in enumerate(s.x)]
        matrix = Site(**{**s.__dict__, "x": x}).matrix(position) * math.prod(signs)
        found[0] += np.maximum(matrix, 0)
        found[1] += np.maximum(-matrix, 0)
    return found[0], found[1]


def _in_operand(s: Site, r: Array, position: int) -> Array:
    x = s.x[position]
    plus, minus = _maps_by_sign(s, position)
    up = np.maximum(x, 0) * plus + np.maximum(-x, 0) * minus
    down = np.maximum(x, 0) * minus + np.maximum(-x, 0) * plus
    constants, wide = s.bias(position)[..., None], s.y.reshape(*s.y.shape, *(1,) * (up.ndim - s.y.ndim))
    below, above = wide < s.params.get("low", -np.inf), wide > s.params.get("high", np.inf)
    constants = np.where(s.y[..., None] < s.params.get("low", -np.inf), np.minimum(constants, 0), constants)
    constants = np.where(s.y[..., None] > s.params.get("high", np.inf), np.maximum(constants, 0), constants)
    return _sided(r, np.where(below, 0, up), np.where(above, 0, down), constants)


def contrastive_linear(s: Site, r: Array) -> list[Any]:
    """Of a product of two carriers, all to the one that is no softmax, or the same part to each."""
    chosen = list(s.carried)
    if sum(s.softmaxes) == 1 and sum(s.carried) > 1:
        chosen = [carries and not weight for carries, weight in zip(s.carried, s.softmaxes, strict=True)]
    return [_in_operand(s, r / sum(chosen), i) if one else None for i, one in enumerate(chosen)]


def contrastive_sum(s: Site, r: Array) -> list[Any]:
    z = {i: s.matrix(i) * s.x[i] for i in _terms(s)}
    flat = {i: part.reshape(*s.y.shape, -1) for i, part in z.items()}
    own = np.concatenate([flat[i] for i in z if s.carried[i]], axis=-1)
    constants = np.concatenate([np.zeros((*s.y.shape, 1)), *(flat[i] for i in z if not s.carried[i])], axis=-1)
    shares, start, found = _sided(r, np.maximum(own, 0), np.maximum(-own, 0), constants), 0, [None] * len(s.x)
    for i in z:
        if s.carried[i]:
            stop = start + np.size(s.x[i])
            found[i] = shares[:, start:stop].reshape(len(r), *np.shape(s.x[i]))  # type: ignore[call-overload]
            start = stop
    return found


def contrastive_attention(s: Site, r: Array) -> list[Any]:
    _, p, _ = _scores(s)
    v = s.x[2]
    found, per = np.zeros((len(r), *v.shape)), p.shape[1] // v.shape[1]
    for b, h in np.ndindex(*p.shape[:2]):
        z = p[b, h][:, None, :] * v[b, h // per].T  # [T, D, U]
        shares = np.zeros((len(r), *z.shape))
        for i, d in np.ndindex(*z.shape[:2]):
            shares[:, i, d] = _sided(r[:, b, h, i, d], np.maximum(z[i, d], 0), np.maximum(-z[i, d], 0), np.zeros(1))
        found[:, b, h // per] += shares.sum(axis=1).swapaxes(-1, -2)
    return [None, None, found, *(None,) * (len(s.x) - 3)]


# --- which formula is which --------------------------------------------------------------------------

_KINDS: dict[str, str] = {
    "linear": "linear linear_rows conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul "
    "einsum avg_pool adaptive_avg_pool interpolate mean sum cumsum rotary batch_norm expert_linear grouped_linear",
    "sum": "add sub scatter_add",
    "mul": "mul",
    "div": "div",
    "glu": "glu",
    "norm": "layer_norm rms_norm group_norm",
    "softmax": "softmax log_softmax",
    "attention": "attention",
    "embedding": "embedding",
    "where": "where",
    "clamp": "clamp",
    "extremum": "maximum minimum",
    "pool": "max_pool adaptive_max_pool",
    "reduce": "amax amin max_with_index min_with_index",
    "index_put": "index_put",
    "move": "reshape permute expand slice select cat pad flip roll triangle gather take index scatter cast topk sort "
    "route_topk",
    "unary": "exp expm1 log log1p sqrt rsqrt reciprocal sin cos tan tanh atan erf sigmoid log_sigmoid silu mish "
    "hardswish hardsigmoid softsign neg abs relu negative_part gelu softplus elu leaky_relu prelu pow floor ceil round "
    "sign",
    "reduction": "var logsumexp prod",
    "recurrent": "lstm gru rnn",
    "mixture": "combine",
}
FAMILY = {name: kind for kind, names in _KINDS.items() for name in names.split()}

FORMULAS: dict[tuple[str, str], Callable[[Site, Array], Any]] = {
    **dense_recurrent.FORMULAS,
    ("linear", "epsilon"): epsilon, ("linear", "gradient"): linear_gradient, ("linear", "absolute"): absolute,
    ("linear", "energy"): energy,
    **{("linear", rule.__name__): rule for rule in (gamma, alpha_beta, w_square, flat, zbox)},
    ("linear", "zplus"): alpha_beta,
    ("linear", "absolute_0_1"): absolute_0_1, ("linear", "half"): half, ("linear", "signal"): signal,
    ("linear", "product_gradient"): product_gradient, ("linear", "share"): share,
    ("linear", "signal_relevance"): signal_relevance,
    ("sum", "epsilon"): sum_epsilon, ("sum", "gradient"): sum_epsilon, ("sum", "absolute"): sum_absolute,
    ("sum", "equal"): equal, ("index_put", "epsilon"): sum_epsilon, ("index_put", "gradient"): sum_epsilon,
    ("index_put", "absolute"): sum_absolute, ("index_put", "move"): move,
    ("mul", "half"): halves, ("mul", "uniform"): uniform, ("mul", "gradient"): whole,
    ("div", "numerator"): numerator, ("div", "numerator_relevance"): numerator_relevance,
    ("div", "gradient"): quotient_gradient, ("glu", "half"): gate_half, ("glu", "uniform"): uniform,
    ("glu", "signal"): gate_signal, ("glu", "gradient"): gate_gradient,
    ("glu", "signal_relevance"): gate_signal_relevance,
    ("linear", "contrastive"): contrastive_linear, ("linear", "contrastive_product"): contrastive_linear,
    ("sum", "contrastive"): contrastive_sum, ("index_put", "contrastive"): contrastive_sum,
    ("attention", "contrastive"): contrastive_attention,
    ("mixture", "half"): mixture_half, ("mixture", "gradient"): mixture_gradient,
    ("mixture", "signal"): mixture_signal, ("mixture", "absolute"): mixture_absolute,
    ("mixture", "equal"): mixture_equal, ("mixture", "contrastive"): mixture_contrastive,
    ("unary", "identity"): identity, ("unary", "pass"): passed, ("unary", "gradient"): gradient,
    ("reduction", "gradient"): reduction_gradient,
    ("where", "select"): where, ("clamp", "select"): clamp, ("extremum", "select"): extremum,
    ("pool", "select"): max_pool, ("reduce", "select"): reduce_extremum, ("embedding", "sum"): embedding,
    ("move", "move"): move, ("softmax", "taylor"): softmax_taylor, ("softmax", "pass"): passed,
    ("norm", "identity"): passed, ("norm", "detach"): lambda s, r: _norm(s, r, False),
    ("norm", "gradient"): lambda s, r: _norm(s, r, True),
    ("attention", "attnlrp"): attnlrp, ("attention", "attnlrp_conserving"): attnlrp_conserving,
    ("attention", "gradient"): attention_gradient, ("attention", "cp"): cp,
    ("attention", "absolute"): attention_absolute, ("attention", "dlb"): dlb, ("attention", "dlb_0_1"): dlb_0_1,
}


# --- a whole graph -----------------------------------------------------------------------------------

def explain(graph: Graph, composite: Composite, inputs: Mapping[str, Array], weights: Mapping[str, Array],
            seed: Array) -> list[Array]:
    """Relevance [S, *input] of each explained input: seed [S, *y] at the first result, from the last op back."""
    run = interpret(graph, inputs, weights)
    carrying = carriers(graph)
    softmaxes: set[str] = set()
    for op in graph.forward.ops:
        if op.name == "softmax" or (
            op.name in _KINDS["move"].split() and getattr(op.operands[0], "name", "") in softmaxes
        ):
            softmaxes |= {v.name for v in op.results}
    pairs = _pairs(graph, run)
    relevance: dict[str, Array] = {graph.forward.results[0].name: seed}
    divided: dict[str, bool] = {graph.forward.results[0].name: False}
    for op in reversed(list(graph.forward.ops)):
        if not any(v.name in relevance for v in op.results):
            continue
        count = sum(isinstance(o, Value) and o.name in carrying for o in op.operands)
        rule = composite.rule_for(op, constant_factor=count == 1)
        site = _site(op, rule, run, weights, carrying, softmaxes, pairs)
        site.tiny = 0.0 if divided[op.result.name] else TINY
        found = contributions(site, relevance[op.result.name])
        form = RULES[op.name, rule.name].form
        out_divided = form == "M" or (form == "any" and divided[op.result.name])
        for operand, part in zip(op.operands, found, strict=True):
            if part is not None and isinstance(operand, Value):
                relevance[operand.name] = relevance.get(operand.name, 0) + part
                divided[operand.name] = divided.get(operand.name, True) and out_divided
    return [relevance.get(p.name, np.zeros((len(seed), *run.values[p.name].shape)))
            for p in explained_inputs(graph) if p.name in carrying]


def _pairs(graph: Graph, run: Run) -> dict[str, Array]:
    """Turned elements numbered by pairs, as `rotary` makes them and moves carry them; all others have a number of
    their own."""
    found: dict[str, Array] = {}
    fresh = 1 << 32

    def numbers(o: Any) -> Array:
        nonlocal fresh
        size = np.size(run.values[o.name])
        fresh += size
        return found.get(o.name, fresh + np.arange(size).reshape(np.shape(run.values[o.name])))

    for op in graph.forward.ops:
        attrs = {name: _number(a, run) for name, a in op.attrs.items()}
        known = [getattr(o, "name", "") in found for o in op.operands]
        if op.name == "rotary":
            y = run.values[op.result.name]
            fresh += y.size
            found[op.result.name] = fresh + _rotated({"interleaved": False, **attrs}, y)
        elif any(known) and op.name in ("reshape", "permute", "expand", "slice", "cat"):
            found[op.result.name] = REFERENCE[op.name](*(numbers(o) for o in op.operands), **attrs)
        elif any(known) and op.name in ("cast", "neg", "mul", "div") and np.size(op.operands[-1]) == 1:
            found[op.result.name] = found[op.operands[0].name]  # type: ignore[union-attr]
    return found


def _site(op: Op, rule: Rule, run: Run, weights: Mapping[str, Array], carrying: set[str], softmaxes: set[str],
          pairs: Mapping[str, Array]) -> Site:
    assert (op.name, rule.name) in RULES
    values = run.values

    def read(o: Any) -> Any:
        if isinstance(o, Value):
            return values[o.name]
        return np.asarray(weights[o.name]) if hasattr(o, "type") else _number(o, run)

    return Site(
        op.name,
        rule.name,
        dict(rule.params),
        {name: _number(a, run) for name, a in {**definition(op.name).attrs, **op.attrs}.items()},
        [read(o) for o in op.operands],
        values[op.result.name],
        [values[v.name] for v in op.results],
        [isinstance(o, Value) and o.name in carrying for o in data_operands(op)],
        [getattr(o, "name", "") in softmaxes for o in op.operands],
        [pairs.get(getattr(o, "name", ""), _numbered(read(o))) for o in op.operands],
    )


def _number(a: Any, run: Run) -> Any:
    if isinstance(a, tuple):
        return tuple(_number(one, run) for one in a)
    return evaluate(a, run.sizes) if isinstance(a, Sym) else a


def _numbered(o: Any) -> Array:
    return np.arange(np.size(o)).reshape(np.shape(o)) if isinstance(o, np.ndarray) else np.zeros(())
