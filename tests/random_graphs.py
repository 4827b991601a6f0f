"""Random valid level-1 graphs with weights and inputs, for property tests.

A model starts from token ids, from vectors at T places or from an image, applies some steps to values picked
from all that exist so far (so values fan out and are shared), and ends in logits [B, K]. The batch is symbolic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Section, Type, Value, Weight
from dlbc.ir.dims import symbol
from dlbc.ir.verifier import verify

Array = NDArray[Any]
B, T, D, K, WORDS = symbol("B"), 3, 4, 3, 7


@dataclass
class Model:
    """A graph, its weights, and its inputs for any batch size."""

    graph: Graph
    weights: dict[str, Array]
    seed: int

    def inputs(self, batch: int = 2) -> dict[str, Array]:
        rng = np.random.default_rng(self.seed)
        return {p.name: self._array(rng, p, batch) for p in self.graph.forward.params}

    def seeds(self, count: int = 1, batch: int = 2) -> Array:
        return np.random.default_rng(self.seed + 1).normal(size=(count, batch, K))

    def _array(self, rng: np.random.Generator, param: Value, batch: int) -> Array:
        shape = (batch, *param.type.shape[1:])
        if param.type.floating:
            return rng.normal(size=shape)  # type: ignore[arg-type]
        return rng.integers(0, 2 if param.type.dtype == "bool" else WORDS, shape)  # type: ignore[arg-type]


@dataclass
class Making:
    """A model in the making: its builder, its weights, and the values of one shape that steps may pick."""

    at: Builder
    rng: np.random.Generator
    pool: list[Value]
    weights: dict[str, Array] = field(default_factory=dict)
    declared: dict[str, Weight] = field(default_factory=dict)
    mask: Value | None = None
    """The input that says which tokens are there, of models that have one."""

    def weight(self, *shape: int, low: float | None = None, kind: str = "f32") -> Weight:
        name = f"w{len(self.weights)}"
        numbers = self.rng.normal(size=shape) * 0.7 if low is None else self.rng.uniform(low, low + 1, size=shape)
        self.weights[name] = self.rng.random(shape) < 0.6 if kind == "bool" else numbers
        self.declared[name] = Weight(name, Type(kind, shape))
        return self.declared[name]


Step = Callable[[Making, Value, Value], Value]


def split(m: Making, x: Value, heads: int = 2) -> Value:
    return m.at.permute(m.at.reshape(x, shape=(B, x.type.shape[1], heads, 2)), dims=(0, 2, 1, 3))


def merged(m: Making, x: Value) -> Value:
    return m.at.reshape(m.at.permute(x, dims=(0, 2, 1, 3)), shape=(B, x.type.shape[2], D))


def _attention(m: Making, a: Value, b: Value) -> Value:
    """Self- or cross-attention, fused; two query heads share one key head."""
    q = split(m, m.at.linear(a, m.weight(D, D)))
    k, v = (split(m, m.at.linear(b, m.weight(2, D)), heads=1) for _ in range(2))
    return merged(m, m.at.attention(q, k, v, scale=0.7, causal=bool(m.rng.integers(2))))


def _sunk(m: Making, a: Value, b: Value) -> Value:
    """Attention in which each head has a score that no key has."""
    q, k, v = (split(m, m.at.linear(x, m.weight(D, D))) for x in (a, b, b))
    return merged(m, m.at.attention(q, k, v, None, m.weight(2), scale=0.7, causal=bool(m.rng.integers(2))))


def _turned(m: Making, a: Value, b: Value) -> Value:
    """Attention with rotary positions on all channels, or on some of them."""
    q, k, v = (split(m, m.at.linear(x, m.weight(D, D))) for x in (a, b, b))
    width = q.type.shape[-1]
    assert isinstance(width, int)
    cos, sin = m.weight(T, width), m.weight(T, width)
    interleaved = bool(m.rng.integers(2))
    q, k = (m.at.rotary(x, cos, sin, interleaved=interleaved) for x in (q, k))
    if m.rng.integers(2):
        q, k, v = (m.at.cat(x, m.at.abs(x), dim=-1) if x is not v else x for x in (q, k, v))
    return merged(m, m.at.attention(q, k, v, scale=0.7))


def _written_out(m: Making, a: Value, b: Value) -> Value:
    """Attention from its parts, with a mask of -inf."""
    q, k, v = (split(m, m.at.linear(x, m.weight(D, D))) for x in (a, b, b))
    scores = m.at.mul(m.at.matmul(q, m.at.permute(k, dims=(0, 1, 3, 2))), 0.7)
    mask = m.weight(T, T)
    m.weights[mask.name] = np.triu(np.full((T, T), -np.inf), 1)
    return merged(m, m.at.matmul(m.at.softmax(m.at.add(scores, mask), dim=-1), v))


def experts(m: Making, a: Value, b: Value) -> Value:
    """A mixture of experts: each place of `a` goes to some of four experts, chosen by `b`."""
    at, (batch, length, size) = m.at, a.type.shape
    k = int(m.rng.integers(1, 4))
    scores = at.softmax(at.linear(b, m.weight(4, D)), dim=-1)
    if m.rng.integers(2):
        weights, ids = at.op("route_topk", scores, k=k)
    else:
        weights, ids = at.op("route_topk", scores, at.add(scores, m.weight(4)), k=k)
    if m.rng.integers(2):
        weights = at.div(weights, at.sum(weights, dims=(-1,), keepdim=True))
    row = at.reshape(a, shape=(batch, length, 1, size))
    h = at.expert_linear(row, ids, m.weight(4, 3, D), m.weight(4, 3))
    h = at.glu(at.expert_linear(row, ids, m.weight(4, D, 3), transposed=True), h) if m.rng.integers(2) else at.relu(h)
    return at.combine(at.expert_linear(h, ids, m.weight(4, D, 3)), weights)


def _everywhere() -> dict[str, Step]:
    """Steps for values of any shape."""
    return {
        "add": lambda m, a, b: m.at.add(a, b),
        "sub": lambda m, a, b: m.at.sub(a, b),
        "mul": lambda m, a, b: m.at.mul(a, b),
        "divide": lambda m, a, b: m.at.div(a, m.at.add(m.at.mul(b, b), 1.0)),
        "scale": lambda m, a, b: m.at.mul(m.at.add(a, 0.5), -1.3),
        "weighted": lambda m, a, b: m.at.mul(m.at.add(a, m.weight(4)), m.weight(4)),
        "relu": lambda m, a, b: m.at.relu(a),
        "gelu": lambda m, a, b: m.at.gelu(a),
        "tanh": lambda m, a, b: m.at.tanh(a),
        "sigmoid": lambda m, a, b: m.at.sigmoid(a),
        "glu": lambda m, a, b: m.at.glu(a, b, activation="silu"),
        "maximum": lambda m, a, b: m.at.maximum(a, b),
        "clamp": lambda m, a, b: m.at.clamp(a, low=-0.5, high=1.0),
        "where": lambda m, a, b: m.at.where(m.weight(4, kind="bool"), a, b),
        "flip": lambda m, a, b: m.at.flip(a, dims=(-1, 1)),
        "cut": lambda m, a, b: m.at.cat(
            m.at.slice_(a, dim=-1, stop=2), m.at.slice_(b, dim=-1, start=1, stop=3), dim=-1
        ),
        "pad": lambda m, a, b: m.at.slice_(
            m.at.pad(a, pads=(*((0, 0),) * (a.type.rank - 1), (2, 0))), dim=-1, start=1, stop=5
        ),
        "sort": lambda m, a, b: m.at.sort(a, dim=1),
    }


SEQUENCE: dict[str, Step] = {
    **_everywhere(),
    "linear": lambda m, a, b: m.at.linear(a, m.weight(D, D), m.weight(D)),
    "linear without bias": lambda m, a, b: m.at.linear(a, m.weight(D, D)),
    "einsum": lambda m, a, b: m.at.einsum(a, m.weight(D, T, T), equation="btd,dts->bsd"),
    "layer norm": lambda m, a, b: m.at.layer_norm(a, m.weight(D), m.weight(D)),
    "rms norm": lambda m, a, b: m.at.rms_norm(a, m.weight(D)),
    "softmax": lambda m, a, b: m.at.softmax(a, dim=1),
    "mean": lambda m, a, b: m.at.add(a, m.at.mean(b, dims=(1,), keepdim=True)),
    "sum": lambda m, a, b: m.at.add(a, m.at.sum(b, dims=(-2,), keepdim=True)),
    "cumsum": lambda m, a, b: m.at.cumsum(a, dim=-2),
    "attention": _attention,
    "sunk": _sunk,
    "turned": _turned,
    "written out": _written_out,
    "experts": experts,
}
IMAGE: dict[str, Step] = {
    **_everywhere(),
    "conv": lambda m, a, b: m.at.conv2d(a, m.weight(4, 4, 3, 3), m.weight(4), padding=(1, 1)),
    "grouped": lambda m, a, b: m.at.conv2d(a, m.weight(4, 1, 3, 3), padding=(2, 2), dilation=(2, 2), groups=4),
    "up and down": lambda m, a, b: m.at.conv2d(
        m.at.conv_transpose2d(a, m.weight(4, 2, 2, 2), m.weight(2), stride=(2, 2)), m.weight(4, 2, 2, 2), stride=(2, 2)
    ),
    "batch norm": lambda m, a, b: m.at.batch_norm(a, m.weight(4), m.weight(4, low=0.5), m.weight(4), m.weight(4)),
    "group norm": lambda m, a, b: m.at.group_norm(a, m.weight(4), m.weight(4), groups=2),
    "max pool": lambda m, a, b: m.at.max_pool(a, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)),
    "avg pool": lambda m, a, b: m.at.avg_pool(a, kernel=(3, 3), stride=(1, 1), padding=(1, 1)),
    "squeeze": lambda m, a, b: m.at.mul(a, m.at.sigmoid(m.at.adaptive_avg_pool(b, size=(1, 1)))),
}


def make(kind: str, steps: list[tuple[str, int, int]], end: int, seed: int) -> Model:
    """The model of some steps: each takes two values picked from those that exist."""
    rng = np.random.default_rng(seed)
    image = kind == "image"
    param = (
        Value("ids", Type("i64", (B, T)))
        if kind == "ids"
        else Value("x", Type("f32", (B, D, 4, 4) if image else (B, T, D)))
    )
    m = Making(Builder([param.name]), rng, [])
    m.pool.append(m.at.embedding(param, m.weight(WORDS, D)) if kind == "ids" else param)
    for name, a, b in steps:
        found = (IMAGE if image else SEQUENCE)[name](m, m.pool[a % len(m.pool)], m.pool[b % len(m.pool)])
        m.pool.append(found)
    last = m.at.add(m.pool[-1], m.pool[end % len(m.pool)])
    if image:
        pooled = m.at.mean(last, dims=(2, 3)) if end % 2 else m.at.amax(last, dims=(-1, -2))
    else:
        pooled = m.at.mean(last, dims=(-2,)) if end % 2 else m.at.select(last, dim=1, index=-1)
    logits = m.at.linear(pooled, m.weight(K, D), m.weight(K), result="logits")
    graph = Graph("random", Section((param,), tuple(m.at.ops), (logits,)), dims={"B": (1, 64)}, weights=m.declared,
                  attrs={"inputs": (param.name,), "outputs": ("logits",)})
    verify(graph)
    return Model(graph, m.weights, seed)


@st.composite
def models(draw: st.DrawFn, kinds: tuple[str, ...] = ("ids", "sequence", "image"), most: int = 7) -> Model:
    """Random models; they shrink towards few and simple steps."""
    kind = draw(st.sampled_from(kinds))
    names = st.sampled_from(list(IMAGE if kind == "image" else SEQUENCE))
    picks = st.integers(0, 7)
    steps = draw(st.lists(st.tuples(names, picks, picks), min_size=1, max_size=most))
    return make(kind, steps, draw(picks), draw(st.integers(0, 2**16)))
