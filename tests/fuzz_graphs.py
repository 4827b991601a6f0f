"""Random graphs for fuzzing passes: the models of `random_graphs.py` with many more kinds of steps.

What passes look for is there in the forms that models write it in, and in forms that nearly are it: norms, activations,
rotary positions, attention and masks by hand, batch norms after layers, constants made of weights, moves that do
nothing, equal and dead ops, casts. A fourth kind of model, "text", has ids and a mask of any length [B,T] and logits
[B,T,K], or [B,K].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Section, Type, Value, Weight
from dlbc.ir.dims import Dim, symbol
from dlbc.ir.verifier import verify
from tests.random_graphs import IMAGE, SEQUENCE, WORDS, B, D, K, Making, Model, Step, T, merged, split

ANY = symbol("T")
KINDS = ("ids", "sequence", "image", "text")

UNARY = ("relu", "gelu", "silu", "tanh", "sigmoid", "softplus", "elu", "leaky_relu", "mish", "hardswish", "softsign",
         "abs", "neg", "sin", "atan", "erf", "log_sigmoid", "hardsigmoid", "negative_part")


def length(x: Value) -> Dim:
    """The second axis of a sequence."""
    return x.type.shape[1]


def _any_of(m: Making, *ways: Callable[[], Value]) -> Value:
    return ways[int(m.rng.integers(len(ways)))]()


# --- steps for values of any shape -------------------------------------------------------------------

def _again(m: Making, a: Value, b: Value) -> Value:
    """The last op that gave a value like `a`, once more."""
    for op in reversed(m.at.ops):
        if op.result.type == a.type:
            return m.at.op(op.name, *op.operands, **op.attrs)[0]  # type: ignore[arg-type]
    return m.at.add(a, b)


def _neutral(m: Making, a: Value, b: Value) -> Value:
    """Arithmetic that does nothing."""
    return _any_of(
        m, lambda: m.at.mul(m.at.add(a, 0.0), 1.0), lambda: m.at.div(m.at.sub(a, 0.0), 1.0), lambda: m.at.pow(a, 1.0),
        lambda: m.at.neg(m.at.neg(a)), lambda: m.at.mul(1.0, m.at.add(0.0, a)), lambda: m.at.mul(m.at.mul(a, 2.0), 0.5),
        lambda: m.at.reshape(a, shape=a.type.shape), lambda: m.at.expand(a, shape=a.type.shape),
        lambda: m.at.cast(a, dtype="f32"),
        lambda: m.at.add(a, m.at.full(shape=a.type.shape[-1:], value=0.0, dtype="f32")))


def _gelu(m: Making, a: Value, b: Value) -> Value:
    at = m.at
    cube = at.mul(math.sqrt(2 / math.pi), at.add(a, at.mul(0.044715, at.pow(a, 3.0))))
    return _any_of(
        m, lambda: at.mul(at.mul(a, 0.5), at.add(at.erf(at.div(a, math.sqrt(2))), 1.0)),
        lambda: at.mul(at.mul(0.5, a), at.add(1.0, at.erf(at.mul(b, 1 / math.sqrt(2))))),  # not gelu, unless a is b
        lambda: at.mul(at.mul(0.5, a), at.add(1.0, at.tanh(cube))),
        lambda: at.mul(a, at.sigmoid(at.mul(1.702, a))), lambda: at.gelu(a, approximate="tanh"))


def _gate(m: Making, a: Value, b: Value) -> Value:
    at = m.at
    return _any_of(m, lambda: at.mul(at.silu(a), b), lambda: at.mul(b, at.mul(a, at.sigmoid(a))),
                   lambda: at.mul(a, at.sigmoid(b)), lambda: at.mul(at.gelu(a), b),
                   lambda: at.mul(at.relu(a), at.relu(b)),
                   lambda: at.glu(a, b, activation="gelu_tanh"), lambda: at.mul(a, at.tanh(at.softplus(a))))


def _chosen(m: Making, a: Value, b: Value) -> Value:
    at = m.at
    return _any_of(m, lambda: at.where(at.gt(a, 0.1), a, b), lambda: at.where(at.le(a, b), a, 0.0),
                   lambda: at.mul(a, at.cast(at.gt(b, 0.0), dtype="f32")), lambda: at.where(at.isnan(a), b, a),
                   lambda: at.where(at.logical_and(at.gt(a, 0.0), at.lt(b, 1.0)), b, a),
                   lambda: at.minimum(a, at.clamp(b, low=0.0)), lambda: at.clamp(at.clamp(a, high=2.0), low=-1.0))


def _constant(m: Making, a: Value, b: Value) -> Value:
    """What is made of weights and literals."""
    at = m.at
    return _any_of(
        m, lambda: at.mul(a, at.add(m.weight(4), 1.0)), lambda: at.add(a, at.full(shape=(4,), value=0.5, dtype="f32")),
        lambda: at.mul(a, at.arange(stop=4, dtype="f32")), lambda: at.add(a, at.tanh(at.mul(m.weight(4), m.weight(1)))),
        lambda: at.where(at.gt(m.weight(4), 0.0), a, b), lambda: at.add(a, at.sub(at.exp(m.weight(4)), at.full(
            shape=(1,), value=2, dtype="i64"))), lambda: at.mul(a, at.cast(m.weight(4, kind="bool"), dtype="f32")))


def _moved(m: Making, a: Value, b: Value) -> Value:
    """Chains of moves that end in the shape they began with."""
    at, rank, shape = m.at, a.type.rank, a.type.shape
    turn = tuple(int(i) for i in m.rng.permutation(rank))
    back = tuple(turn.index(i) for i in range(rank))
    flat = (shape[0], math.prod(shape[1:])) if all(isinstance(d, int) for d in shape[1:]) else (*shape[:-1], 2, 2)
    return _any_of(
        m, lambda: at.permute(at.permute(a, dims=turn), dims=back),
        lambda: at.reshape(at.reshape(a, shape=flat), shape=shape),
        lambda: at.roll(a, shifts=(1,), dims=(-1,)), lambda: at.flip(at.flip(a, dims=(1,)), dims=(1,)),
        lambda: at.cat(at.slice_(a, dim=-1, stop=1), at.slice_(a, dim=-1, start=1, stop=4), dim=-1),
        lambda: at.select(at.reshape(a, shape=(1, *shape)), dim=0, index=0),
        lambda: at.slice_(at.slice_(at.cat(a, b, dim=-1), dim=-1, start=1, stop=7), dim=-1, start=1, stop=5),
        lambda: at.slice_(at.pad(a, pads=(*((0, 0),) * (rank - 1), (1, 1)), value=1.0), dim=-1, stop=4),
        lambda: at.cat(at.slice_(a, dim=-1, stop=4, step=2), at.slice_(b, dim=-1, start=1, stop=4, step=2), dim=-1))


def _stacked(m: Making, a: Value, b: Value) -> Value:
    at, shape = m.at, a.type.shape
    both = at.cat(*(at.reshape(x, shape=(shape[0], 1, *shape[1:])) for x in (a, b)), dim=1)
    return _any_of(m, lambda: at.sum(both, dims=(1,)), lambda: at.mean(both, dims=(1,)),
                   lambda: at.select(both, dim=1, index=int(m.rng.integers(-2, 2))), lambda: at.amax(both, dims=(1,)))


def _reduced(m: Making, a: Value, b: Value) -> Value:
    """A reduction over the last axis, of one of its kinds, broadcast back."""
    at = m.at
    name = str(m.rng.choice(["mean", "sum", "amax", "amin", "logsumexp", "var", "prod"]))
    found = at.op(name, b, dims=(-1,), keepdim=True)[0]
    return _any_of(m, lambda: at.add(a, found), lambda: at.sub(a, found), lambda: at.mul(a, at.sigmoid(found)))


def _ranked(m: Making, a: Value, b: Value) -> Value:
    """Ops with two results."""
    at, shape = m.at, a.type.shape
    top, where = at.op("topk", a, k=2, dim=-1)
    return _any_of(
        m, lambda: at.cat(top, top, dim=-1), lambda: at.cat(at.gather(b, where, dim=-1), top, dim=-1),
        lambda: at.add(a, at.reshape(at.op("max_with_index", b, dim=-1)[0], shape=(*shape[:-1], 1))),
        lambda: at.gather(a, at.op("sort", b, dim=-1)[1], dim=-1))


def _dead(m: Making, a: Value, b: Value) -> Value:
    m.at.mul(m.at.tanh(a), m.weight(4))
    return a


def _everywhere() -> dict[str, Step]:
    return {
        "unary": lambda m, a, b: m.at.op(str(m.rng.choice(UNARY)), a)[0],
        "twice": lambda m, a, b: m.at.add(a, a), "square": lambda m, a, b: m.at.mul(a, a),
        "nothing": lambda m, a, b: m.at.sub(a, a), "power": lambda m, a, b: m.at.pow(a, float(m.rng.integers(4))),
        "exp": lambda m, a, b: m.at.exp(m.at.minimum(a, 3.0)), "minimum": lambda m, a, b: m.at.minimum(a, b),
        "cast": lambda m, a, b: m.at.cast(m.at.cast(a, dtype=str(m.rng.choice(["f64", "f16"]))), dtype="f32"),
        "by one": lambda m, a, b: m.at.div(a, m.at.add(1.0, m.at.exp(m.at.neg(m.at.abs(b))))),
        "again": _again, "neutral": _neutral, "gelu by hand": _gelu, "gate": _gate, "chosen": _chosen,
        "constant": _constant, "moved": _moved, "stacked": _stacked, "reduced": _reduced, "ranked": _ranked,
        "dead": _dead,
    }


# --- steps for sequences -----------------------------------------------------------------------------

def _shared(m: Making, a: Value, b: Value) -> Value:
    """A layer with the weight of another layer, plain, transposed or scaled."""
    at, same = m.at, Type("f32", (D, D))
    known = [w for w in m.declared.values() if w.type == same] or [m.weight(D, D)]
    w = known[int(m.rng.integers(len(known)))]
    return _any_of(m, lambda: at.linear(a, w), lambda: at.linear(a, at.permute(w, dims=(1, 0)), m.weight(D)),
                   lambda: at.matmul(a, w), lambda: at.linear(a, at.mul(w, 0.5), at.neg(m.weight(D))),
                   lambda: at.add(at.linear(a, w), at.linear(b, w)))


def _layer_norm(m: Making, a: Value, b: Value) -> Value:
    at = m.at
    mean = at.mean(a, dims=(-1,), keepdim=True)
    centred = at.sub(a, mean)
    square = _any_of(m, lambda: at.pow(centred, 2.0), lambda: at.mul(centred, centred))
    variance = _any_of(m, lambda: at.mean(square, dims=(-1,), keepdim=True),
                       lambda: at.var(a, dims=(-1,), keepdim=True))
    y = _any_of(m, lambda: at.mul(centred, at.rsqrt(at.add(variance, 1e-5))),
                lambda: at.div(centred, at.sqrt(at.add(variance, 1e-5))))
    return _any_of(m, lambda: at.add(at.mul(y, m.weight(D)), m.weight(D)), lambda: y, lambda: at.mul(m.weight(D), y))


def _rms_norm(m: Making, a: Value, b: Value) -> Value:
    at = m.at
    x = _any_of(m, lambda: a, lambda: at.cast(a, dtype="f64"))
    square = at.mean(_any_of(m, lambda: at.pow(x, 2.0), lambda: at.mul(x, x)), dims=(-1,), keepdim=True)
    y = at.mul(x, at.rsqrt(at.add(square, 1e-6)))
    y = y if y.type.dtype == "f32" else at.cast(y, dtype="f32")
    return _any_of(m, lambda: at.mul(m.weight(D), y), lambda: at.mul(y, at.add(1.0, m.weight(D))), lambda: y)


def _angles(m: Making, x: Value, width: int) -> tuple[Value, Value]:
    """cos and sin [T,width] of positions."""
    at = m.at
    places = at.reshape(at.arange(stop=length(x), dtype="f32"), shape=(length(x), 1))
    angle = at.mul(places, m.weight(1, width))
    return at.cos(angle), at.sin(angle)


def _rotary(m: Making, a: Value, b: Value) -> Value:
    """Rotary positions written out, by halves or by pairs."""
    at = m.at
    x = split(m, a) if m.rng.integers(2) else at.permute(at.reshape(a, shape=(B, length(a), 1, 4)), dims=(0, 2, 1, 3))
    width = x.type.shape[-1]
    assert isinstance(width, int)
    half, way = width // 2, int(m.rng.integers(4))
    cos, sin = _angles(m, a, width if way < 2 else half)
    if way == 0:
        turned = at.cat(at.neg(at.slice_(x, dim=-1, start=half, stop=width)), at.slice_(x, dim=-1, stop=half), dim=-1)
        y = at.add(at.mul(x, cos), at.mul(turned, sin))
    elif way == 1:
        y = at.rotary(x, cos, sin, interleaved=bool(m.rng.integers(2)))
    elif way == 2:
        one, two = at.slice_(x, dim=-1, stop=half), at.slice_(x, dim=-1, start=half, stop=width)
        y = at.cat(at.sub(at.mul(one, cos), at.mul(two, sin)), at.add(at.mul(two, cos), at.mul(one, sin)), dim=-1)
    else:
        one, two = at.slice_(x, dim=-1, stop=width, step=2), at.slice_(x, dim=-1, start=1, stop=width, step=2)
        first, second = at.sub(at.mul(one, cos), at.mul(two, sin)), at.add(at.mul(one, sin), at.mul(two, cos))
        y = at.reshape(at.cat(*(at.reshape(v, shape=(*v.type.shape, 1)) for v in (first, second)), dim=-1),
                       shape=x.type.shape)
    return at.reshape(at.permute(y, dims=(0, 2, 1, 3)), shape=(B, length(a), D))


def _mask(m: Making, x: Value) -> Value:
    """A mask over keys [..,T], or over queries and keys [..,T,T]: boolean, or additive."""
    at, t = m.at, length(x)
    query = at.reshape(at.arange(stop=t), shape=(1, 1, t, 1))
    key = at.reshape(at.arange(stop=t), shape=(1, 1, 1, t))
    order = _any_of(m, lambda: at.le(key, query), lambda: at.ge(query, key),
                    lambda: at.logical_and(at.le(key, query), at.gt(at.add(key, 2), query)),
                    lambda: at.lt(at.abs(at.sub(key, query)), 2),
                    lambda: at.triangle(at.full(shape=(t, t), value=True, dtype="bool"), upper=False))
    if m.mask is not None and m.rng.integers(2):
        seen = at.reshape(m.mask if m.mask.type.dtype == "bool" else at.ne(m.mask, 0), shape=(B, 1, 1, t))
        order = _any_of(m, lambda: seen, lambda: at.logical_and(order, seen))
    return order


def _attention(m: Making, a: Value, b: Value) -> Value:
    """Attention by hand or as one op, with a mask, grouped keys, caps, and queries of another value than keys."""
    at, t = m.at, length(a)
    if m.rng.integers(2):
        joined = at.linear(b, m.weight(3 * D, D), m.weight(3 * D))
        q, k, v = (split(m, at.slice_(joined, dim=-1, start=i * D, stop=(i + 1) * D)) for i in range(3))
    else:
        q = split(m, at.linear(a, m.weight(D, D)))
        k, v = (split(m, at.linear(b, m.weight(2, D)), heads=1) for _ in range(2))
        if m.rng.integers(2):  # repeated for each query head, as Hugging Face writes it
            wide = (at.expand(at.reshape(x, shape=(B, 1, 1, t, 2)), shape=(B, 1, 2, t, 2)) for x in (k, v))
            k, v = (at.reshape(x, shape=(B, 2, t, 2)) for x in wide)
    mask = _mask(m, a) if m.rng.integers(3) else None
    if m.rng.integers(2):
        return merged(m, at.attention(q, k, v, mask, scale=0.7, **({"softcap": 2.0} if m.rng.integers(3) == 0 else {})))
    scores = at.matmul(q, at.permute(at.expand(k, shape=q.type.shape), dims=(0, 1, 3, 2)))
    scores = _any_of(m, lambda: at.mul(scores, 0.7), lambda: at.div(scores, math.sqrt(2)))
    if m.rng.integers(4) == 0:
        scores = at.mul(at.tanh(at.div(scores, 2.0)), 2.0)
    if mask is None:
        return merged(m, at.matmul(at.softmax(scores, dim=-1), v))
    scores = _any_of(m, lambda: at.add(scores, at.where(mask, 0.0, -math.inf)),
                     lambda: at.where(at.logical_not(mask), -math.inf, scores),
                     lambda: at.where(mask, scores, -1e30),
                     lambda: at.add(scores, at.mul(at.sub(1.0, at.cast(mask, dtype="f32")), -1e30)))
    # What a row that sees nothing gets is not told: `raise_attention` makes it 0.
    seen = at.any(mask, dims=(-1,), keepdim=True)
    return merged(m, at.where(seen, at.matmul(at.softmax(scores, dim=-1), v), 0.0))


def _sunk(m: Making, a: Value, b: Value) -> Value:
    """Attention in which each head has one more score, by hand or as one op."""
    at, t = m.at, length(a)
    q, k, v = (split(m, at.linear(x, m.weight(D, D))) for x in (a, b, b))
    mask, sinks = _mask(m, a) if m.rng.integers(2) else None, m.weight(2)
    if m.rng.integers(2):
        return merged(m, at.attention(q, k, v, mask, sinks, scale=0.7))
    scores = at.mul(at.matmul(q, at.permute(k, dims=(0, 1, 3, 2))), 0.7)
    scores = scores if mask is None else at.where(mask, scores, -1e30)
    column = at.expand(at.reshape(sinks, shape=(1, 2, 1, 1)), shape=(B, 2, t, 1))
    front = int(m.rng.integers(2))
    both = at.cat(*((column, scores) if front else (scores, column)), dim=-1)
    both = _any_of(m, lambda: both, lambda: at.sub(both, at.amax(both, dims=(-1,), keepdim=True)))
    weights = at.slice_(at.softmax(both, dim=-1), dim=-1, start=front, stop=t + front)
    return merged(m, at.matmul(weights, v))


def _mixed(m: Making, a: Value, b: Value) -> Value:
    """Products of two values that both carry relevance."""
    at = m.at
    scores = at.matmul(a, at.permute(b, dims=(0, 2, 1)))
    return _any_of(m, lambda: at.matmul(at.softmax(scores, dim=-1), a), lambda: at.matmul(scores, b),
                   lambda: at.einsum(scores, a, equation="bts,bsd->btd"))


def _recurrent(m: Making, a: Value, b: Value) -> Value:
    at, name = m.at, str(m.rng.choice(["lstm", "gru", "rnn"]))
    x, gates = at.permute(a, dims=(1, 0, 2)), {"lstm": 4, "gru": 3, "rnn": 1}[name]
    states = [at.full(shape=(B, D), value=0.0, dtype="f32") for _ in range(2 if name == "lstm" else 1)]
    weights = [m.weight(gates * D, D), m.weight(gates * D, D), m.weight(gates * D), m.weight(gates * D)]
    return at.permute(at.op(name, x, *states, *weights, reverse=bool(m.rng.integers(2)))[0], dims=(1, 0, 2))


def _layers(m: Making, a: Value, b: Value) -> Value:
    """The same block several times, each with weights and a numbered place of its own."""
    at, name = m.at, f"layers{len(m.pool)}"
    ways: tuple[Callable[[Value], Value], ...] = (
        lambda h: at.linear(at.gelu(at.linear(h, m.weight(6, D), m.weight(6))), m.weight(D, 6)),
        lambda h: at.mul(at.tanh(at.rms_norm(h, m.weight(D))), at.sigmoid(at.linear(h, m.weight(D, D)))),
        lambda h: merged(m, at.attention(*(split(m, at.linear(h, m.weight(D, D))) for _ in range(3)), scale=0.7,
                                         causal=True)))
    way = ways[int(m.rng.integers(len(ways)))]
    for number in range(int(m.rng.integers(2, 6))):
        at.place = f"{name}.{number}"
        a = at.add(a, way(way(a)))
    at.place = ""
    return a


def _place(m: Making, a: Value, b: Value) -> Value:
    at = m.at
    row = at.reshape(at.select(b, dim=1, index=int(m.rng.integers(-1, 1))), shape=(B, 1, D))
    return _any_of(m, lambda: at.add(a, row), lambda: at.mul(a, at.expand(row, shape=a.type.shape)),
                   lambda: at.add(a, at.slice_(b, dim=1, stop=1)))


def _mixture(m: Making, a: Value, b: Value) -> Value:
    """Experts as models write them: tokens in a list or not, weights copied for each choice or rows sorted by expert,
    several ways to choose; and forms that nearly are it."""
    at, t = m.at, length(a)
    k, flat, width = int(m.rng.integers(1, 4)), bool(m.rng.integers(2)), 3
    lead: tuple[Dim, ...] = (B * t,) if flat else (B, t)
    x, y = (at.reshape(v, shape=(*lead, D)) for v in (a, b))
    weights, ids = _routed(m, y, k)
    if m.rng.integers(2):
        weights = at.div(weights, at.add(at.sum(weights, dims=(-1,), keepdim=True), 1e-9))
    count = B * t * k
    copies = at.expand(at.reshape(x, shape=(*lead, 1, D)), shape=(*lead, k, D))
    pairs, chosen = at.reshape(copies, shape=(count, D)), at.reshape(ids, shape=(count,))
    gates = at.reshape(weights, shape=(count, 1))
    if flat and m.rng.integers(2):
        return _sorted_mixture(m, x, chosen, gates, k, (B, t))
    if m.rng.integers(2):
        pairs, chosen, gates = copies, ids, at.reshape(weights, shape=(*lead, k, 1))
    rows = chosen.type.shape
    h = _copied(m, pairs, chosen, width * 2, bool(m.rng.integers(2)))
    if m.rng.integers(2):
        h = at.add(h, at.index(m.weight(4, width * 2), chosen, dims=(0,)))
    gate, up = (at.slice_(h, dim=-1, start=i * width, stop=(i + 1) * width) for i in range(2))
    h = _any_of(m, lambda: at.mul(at.silu(gate), up), lambda: at.relu(gate), lambda: at.mul(gate, up))
    u = at.mul(_copied(m, h, chosen, D, bool(m.rng.integers(2))), gates)
    assert u.type.shape == (*rows, D)
    u = at.reshape(u, shape=(*lead, k, D))
    summed = _any_of(m, lambda: at.sum(u, dims=(-2,)), lambda: at.sum(u, dims=(len(lead),)), lambda: at.reshape(
        at.sum(u, dims=(-2,), keepdim=True), shape=(*lead, D)), lambda: at.amax(u, dims=(-2,)))
    return at.reshape(summed, shape=(B, t, D))


def _routed(m: Making, y: Value, k: int) -> tuple[Value, Value]:
    """Weights and numbers [..., k] of the experts chosen for rows y [..., D]."""
    at = m.at
    scores = at.linear(y, m.weight(4, D))
    way = int(m.rng.integers(5))
    if way == 0:
        weights, ids = at.op("topk", at.softmax(scores, dim=-1), k=k, dim=-1)
    elif way == 1:
        best, ids = at.op("topk", scores, k=k, dim=-1)
        weights = at.softmax(best, dim=-1)
    elif way == 2:
        scores = at.sigmoid(scores)
        _, ids = at.op("topk", at.add(scores, m.weight(4)), k=k, dim=-1)
        weights = at.gather(scores, ids, dim=-1)
    elif way == 3:  # the smallest: no choice of experts that a router makes
        weights, ids = at.op("topk", scores, k=k, dim=-1, largest=False)
    else:
        found = []
        for _ in range(k):
            found.append(at.op("max_with_index", scores, dim=-1, keepdim=True))
            scores = at.scatter(scores, found[-1][1], -9.0, dim=-1)
        weights, ids = (at.cat(*parts, dim=-1) for parts in zip(*found, strict=True))
    return weights, ids


def _copied(m: Making, x: Value, ids: Value, size: int, transposed: bool) -> Value:
    """Rows x [..., in] by the matrices that ids choose, copied out for each of them."""
    at, width = m.at, x.type.shape[-1]
    assert isinstance(width, int)
    if transposed:
        found = at.matmul(at.reshape(x, shape=(*x.type.shape[:-1], 1, width)),
                          at.index(m.weight(4, width, size), ids, dims=(0,)))
    else:
        found = at.matmul(at.index(m.weight(4, size, width), ids, dims=(0,)), at.reshape(x, shape=(*x.type.shape, 1)))
    return at.reshape(found, shape=(*x.type.shape[:-1], size))


def _sorted_mixture(m: Making, x: Value, ids: Value, gates: Value, k: int, lead: tuple[Dim, Dim]) -> Value:
    """Rows sorted by expert, products group by group, results added at their tokens."""
    at, count = m.at, ids.type.shape[0]
    order = at.op("sort", ids, dim=0)[1]
    column = at.reshape(ids, shape=(count, 1))
    marks = _any_of(m, lambda: at.scatter(at.full(shape=(count, 4), value=0, dtype="i64"), column, 1, dim=1),
                    lambda: at.eq(column, at.arange(start=0, stop=4)))
    ends = at.cumsum(at.sum(marks, dims=(0,)), dim=0)
    token = at.floor_divide(order, k)
    h = at.relu(at.grouped_linear(at.index(x, token, dims=(0,)), ends, m.weight(4, 3, D), m.weight(4, 3)))
    u = at.mul(at.grouped_linear(h, ends, m.weight(4, 3, D), transposed=True), at.index(gates, order, dims=(0,)))
    zeros = at.full(shape=x.type.shape, value=0.0, dtype="f32")
    return at.reshape(at.index_put(zeros, u, token, dims=(0,), accumulate=True), shape=(*lead, D))


MORE_SEQUENCE: dict[str, Step] = {
    **_everywhere(), "mixture": _mixture, "routed": _mixture,
    "shared": _shared, "layer norm by hand": _layer_norm, "rms norm by hand": _rms_norm,
    "rotary by hand": _rotary, "masked": _attention, "attends": _attention, "sunk": _sunk, "mixed": _mixed,
    "recurrent": _recurrent, "place": _place, "layers": _layers,
    "log softmax": lambda m, a, b: m.at.log_softmax(a, dim=-1),
    "scores": lambda m, a, b: m.at.div(m.at.exp(a), m.at.sum(m.at.exp(a), dims=(-1,), keepdim=True)),
}


# --- steps for images --------------------------------------------------------------------------------

def _normed(m: Making, a: Value, b: Value) -> Value:
    """A convolution of some kind and the batch norm after it (or before)."""
    at = m.at
    w, bias = m.weight, m.weight(4)
    y = _any_of(
        m, lambda: at.conv2d(a, w(4, 4, 3, 3), bias, padding=(1, 1)), lambda: at.conv2d(a, w(4, 4, 1, 1)),
        lambda: at.conv2d(a, w(4, 2, 3, 3), padding=(1, 1), groups=2), lambda: at.conv_transpose2d(
            a, w(4, 4, 3, 3), bias, padding=(1, 1)), lambda: at.conv_transpose2d(a, w(4, 2, 1, 1), groups=2),
        lambda: at.add(a, b))
    affine = (m.weight(4), m.weight(4)) if m.rng.integers(2) else ()
    return at.batch_norm(y, m.weight(4), m.weight(4, low=0.5), *affine)


def _pooled(m: Making, a: Value, b: Value) -> Value:
    at = m.at
    small = _any_of(m, lambda: at.adaptive_avg_pool(a, size=(2, 2)), lambda: at.max_pool(
        a, kernel=(2, 2), stride=(2, 2), padding=(0, 0), dilation=(1, 1)), lambda: at.avg_pool(
            a, kernel=(2, 2), stride=(2, 2), padding=(0, 0)), lambda: at.conv2d(a, m.weight(4, 4, 2, 2), stride=(2, 2)))
    mode = str(m.rng.choice(["nearest", "linear"]))
    return _any_of(m, lambda: at.interpolate(small, size=(4, 4), mode=mode),
                   lambda: at.reshape(at.expand(at.reshape(small, shape=(B, 4, 2, 1, 2, 1)), shape=(B, 4, 2, 2, 2, 2)),
                                      shape=(B, 4, 4, 4)))


def _channels(m: Making, a: Value, b: Value) -> Value:
    at = m.at
    one = m.at.reshape(m.weight(4), shape=(4, 1, 1))
    both = at.cat(a, b, dim=1)
    return _any_of(m, lambda: at.conv2d(both, m.weight(4, 8, 1, 1)), lambda: at.slice_(both, dim=1, start=2, stop=6),
                   lambda: at.add(at.mul(a, one), m.weight(4, 1, 1)), lambda: at.prelu(a, m.weight(4)),
                   lambda: at.group_norm(at.add(a, b), groups=4), lambda: at.permute(at.layer_norm(at.permute(
                       a, dims=(0, 2, 3, 1)), m.weight(4), m.weight(4)), dims=(0, 3, 1, 2)))


MORE_IMAGE: dict[str, Step] = {**_everywhere(), "normed": _normed, "folded": _normed, "pooled": _pooled,
                               "channels": _channels}
FIXED = frozenset({"einsum", "turned", "written out"})
"""Steps whose weights know the length."""
STEPS: dict[str, dict[str, Step]] = {
    "image": {**IMAGE, **MORE_IMAGE}, "sequence": {**SEQUENCE, **MORE_SEQUENCE}, "ids": {**SEQUENCE, **MORE_SEQUENCE},
    "text": {name: step for name, step in {**SEQUENCE, **MORE_SEQUENCE}.items() if name not in FIXED},
}


# --- models ------------------------------------------------------------------------------------------

def make(kind: str, steps: list[tuple[str, int, int]], end: int, seed: int) -> Model:
    """The model of some steps: each takes two values picked from those that exist. `end` chooses how it ends."""
    m, params = _begun(kind, seed)
    for name, a, b in steps:
        m.pool.append(STEPS[kind][name](m, m.pool[a % len(m.pool)], m.pool[b % len(m.pool)]))
    last = m.at.add(m.pool[-1], m.pool[end % len(m.pool)])
    results = [_logits(m, last, kind, end)]
    if end in (3, 6):
        results.append(m.at.tanh(m.pool[-1], result="extra") if end == 3 else results[0])
    graph = Graph("random", Section(params, tuple(m.at.ops), tuple(results)), dims={"B": (1, 64), "T": (1, 64)},
                  weights=m.declared, attrs={"inputs": tuple(p.name for p in params),
                                             "outputs": ("logits", "extra")[:len(results)]})
    if kind != "text":
        graph = Graph(graph.name, graph.forward, {"B": (1, 64)}, graph.weights, attrs=graph.attrs)
    verify(graph)
    return Model(graph, m.weights, seed)


def _begun(kind: str, seed: int) -> tuple[Making, tuple[Value, ...]]:
    rng = np.random.default_rng(seed)
    t: Dim = ANY if kind == "text" else T
    x = Value("x", Type("f32", (B, D, 4, 4) if kind == "image" else (B, T, D)))
    ids = Value("ids", Type("i64", (B, t)))
    mask = Value("attention_mask", Type("bool" if seed % 2 else "i64", (B, t)))
    params = {"text": (ids, mask), "ids": (ids,)}.get(kind, (x,))
    m = Making(Builder([p.name for p in params]), rng, [])
    m.pool.append(m.at.embedding(ids, m.weight(WORDS, D)) if kind in ("ids", "text") else x)
    if kind == "text":
        m.mask = mask
    return m, params


def _logits(m: Making, last: Value, kind: str, end: int) -> Value:
    at = m.at
    if kind == "image":
        last = at.mean(last, dims=(2, 3)) if end % 2 else at.amax(last, dims=(-1, -2))
    elif kind != "text" or end % 4 == 3:
        last = at.mean(last, dims=(-2,)) if end % 2 else at.select(last, dim=1, index=-1)
    head: tuple[Weight, ...] = (m.weight(K, D), *((m.weight(K),) if end != 5 else ()))
    if end == 4:
        return at.mul(at.linear(last, *head), 0.5, result="logits")
    if end == 7:
        return at.softmax(at.linear(last, *head), dim=-1, result="logits")
    return at.linear(last, *head, result="logits")


@st.composite
def models(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, most: int = 8) -> Model:
    """Random models; they shrink towards few and simple steps."""
    kind = draw(st.sampled_from(kinds))
    picks = st.integers(0, 7)
    steps = draw(st.lists(st.tuples(st.sampled_from(list(STEPS[kind])), picks, picks), min_size=1, max_size=most))
    return make(kind, steps, draw(picks), draw(st.integers(0, 2**16)))
