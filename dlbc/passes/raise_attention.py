"""Attention written as matrix products and a softmax becomes `attention`; repeated key and value heads go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dlbc.errors import IRError
from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand, Type, Value, Weight
from dlbc.ir.dims import Dim
from dlbc.ir.ops import attr, axis, broadcast
from dlbc.passes import Pass, register
from dlbc.passes.carriers import carriers
from dlbc.passes.match import Dataflow, as_type, build, last, orders, replace_ops, type_of

MASKED = -1e4
"""A number added to a score hides the key from here on downwards: its weight is 0 even in float64."""


@register
@dataclass(frozen=True)
class RaiseAttention(Pass):
    """`matmul(softmax(softcap(q k^T scale) + mask), v)` over four axes [B, heads, T, D] is `attention`.

    Scores may be multiplied or divided by the scale, capped by tanh, masked by adding (transformers, T5's
    position bias) or by `where` with -inf or a very negative number; casts around the softmax go, and so does
    the largest score of a row that is subtracted first. A mask must not carry relevance. One more score per
    head, laid beside the others and cut off after the softmax, is the head's sink; so is c where weights, or what
    they give, are multiplied by sigmoid(logsumexp(scores) - c) (Granite SWA). k and v repeated for groups
    of query heads (expand, reshape) are read unrepeated, in front of an `attention` too. What has no head axis
    stays as it is.

    A row that sees no key is 0 in `attention`. Eager code that adds a very negative number gives the
    mean of all values there, and -inf gives NaN: numbers that models throw away (rows of padding).
    """

    name: ClassVar[str] = "raise_attention"

    def run(self, graph: Graph) -> Graph:
        """The graph with attention raised."""
        carrying = carriers(graph)
        scores: dict[str, Operand] = {}

        def step(op: Op, flow: Dataflow, at: Builder) -> Operand:
            if op.name == "matmul" and op.result.type.rank == 4:
                return _eager(op, flow, at, carrying, scores)
            if op.name == "mul" and op.result.type.rank == 4:
                return _scaled(op, flow, at, carrying, scores)
            return _grouped(op, flow, at) if op.name == "attention" else None

        return replace_ops(graph, step)


@dataclass
class _Scores:
    """What a softmax is taken of: `softcap(q k^T scale)` plus biases, where the conditions hold."""

    q: Operand
    k: Operand
    scale: float = 1.0
    softcap: float | None = None
    biases: list[Operand] = field(default_factory=list)
    keep: list[Operand] = field(default_factory=list)
    drop: list[Operand] = field(default_factory=list)


def _eager(op: Op, flow: Dataflow, at: Builder, carrying: set[str], known: dict[str, Operand]) -> Operand:
    """`known`: of each attention found so far, what its softmax is taken of; by name."""
    weights, v = op.operands
    found = _softmax_of(flow.uncast(weights), flow, at)
    if found is None:
        return None
    scores, sinks = _scores(found[0], flow, at, type_of(weights).shape), found[1]
    if scores is None or any(isinstance(m, Value) and m.name in carrying for m in (*scores.biases, sinks)):
        return None
    q, k = flow.uncast(scores.q), flow.uncast(scores.k)
    if type_of(q).dtype != type_of(v).dtype or type_of(k).dtype != type_of(v).dtype:
        q, k = scores.q, scores.k
    grouped = _without_repeats(k, v, flow, at)
    k, v = grouped if grouped is not None else (k, v)
    if not _heads_fit(type_of(q), type_of(k), type_of(v)):
        return None
    mask = _mask(scores, at)
    if sinks is not None:
        sinks = _of_heads(sinks, type_of(q).shape[1], flow, at)
        if sinks is None:
            return None
    found_op = at.attention(q, k, v, mask, sinks, scale=scores.scale, softcap=scores.softcap)
    known[found_op.name] = found[0]
    return as_type(at, found_op, op.result.type)


def _scaled(op: Op, flow: Dataflow, at: Builder, carrying: set[str], known: dict[str, Operand]) -> Operand:
    """Attention times sigmoid(logsumexp(scores) - c), which is attention with the sink c."""
    for result, gate in orders(op):
        inner = flow.op(flow.uncast(result), "attention")
        if inner is None or inner.result.name not in known or len(inner.operands) > 4:
            continue
        column = _sink_of(gate, known[inner.result.name], flow, at)
        if column is None or (isinstance(column, Value) and column.name in carrying):
            continue
        sinks = _of_heads(column, inner.result.type.shape[1], flow, at)
        if sinks is not None:
            q, k, v, mask = (*inner.operands, None)[:4]
            return as_type(at, build(at, "attention", q, k, v, mask, sinks, attrs=inner.attrs), op.result.type)
    return None


def _sink_of(gate: Operand, scores: Operand, flow: Dataflow, at: Builder) -> Operand:
    """c as a column [..,H,1,1] where gate [B,H,T,1] is sigmoid(logsumexp(scores) - c); None where it is not."""
    x = flow.uncast(gate)
    inner, flat = flow.op(x, "reshape"), False
    if inner is not None and type_of(x).shape == (*type_of(inner.operands[0]).shape, 1):
        x, flat = flow.uncast(inner.operands[0]), True
    sigmoid = flow.op(x, "sigmoid")
    less = flow.op(flow.uncast(sigmoid.operands[0]), "sub") if sigmoid is not None else None
    whole = flow.op(flow.uncast(less.operands[0]), "logsumexp") if less is not None else None
    if less is None or whole is None or flow.uncast(whole.operands[0]) != scores:
        return None
    dims, column = attr(whole, "dims"), less.operands[1]
    alone = isinstance(dims, tuple) and len(dims) == 1 and last(scores, dims[0]) and attr(whole, "keepdim") is not flat
    if not alone or not isinstance(column, Value | Weight):
        return None
    return at.reshape(column, shape=(*column.type.shape, 1)) if flat else column


def _softmax_of(weights: Operand, flow: Dataflow, at: Builder) -> tuple[Operand, Operand] | None:
    """The scores that a softmax over the last axis is taken of, and the column laid beside them (None: there is none)
    that is cut off again, or that it is multiplied for."""
    scaled = flow.op(weights, "mul")
    if scaled is not None:
        for result, gate in orders(scaled):
            found = _softmax_of(flow.uncast(result), flow, at)
            if found is not None and found[1] is None and (column := _sink_of(gate, found[0], flow, at)) is not None:
                return found[0], column
        return None
    cut = flow.op(weights, "slice")
    softmax = flow.op(weights if cut is None else flow.uncast(cut.operands[0]), "softmax")
    if softmax is None or not last(softmax.result, attr(softmax, "dim")):
        return None
    scores = _unshifted(flow.uncast(softmax.operands[0]), flow)
    if cut is None:
        return scores, None
    joined = flow.op(scores, "cat")
    if joined is None or len(joined.operands) != 2 or not all(
            last(x.result, attr(x, "dim")) for x in (cut, joined)) or attr(cut, "step") != 1:
        return None
    first, second = joined.operands
    keys, front = type_of(weights).shape[-1], attr(cut, "start")
    scores, column = (first, second) if front == 0 else (second, first)
    fits = front in (0, 1) and type_of(scores).shape[-1] == keys and type_of(column).shape[-1] == 1
    return (scores, column) if fits else None


def _unshifted(x: Operand, flow: Dataflow) -> Operand:
    """x where the largest number of each row was subtracted: softmax is the same."""
    shifted = flow.op(x, "sub")
    if shifted is None:
        return x
    inner, top = map(flow.uncast, shifted.operands)
    largest = flow.op(top, "amax", "max_with_index")
    if largest is None or largest.results[0] != top or flow.uncast(largest.operands[0]) != inner:
        return x
    dims = attr(largest, "dims") if largest.name == "amax" else (attr(largest, "dim"),)
    alone = isinstance(dims, tuple) and len(dims) == 1 and last(inner, dims[0]) and attr(largest, "keepdim") is True
    return inner if alone else x


def _of_heads(column: Operand, heads: Dim, flow: Dataflow, at: Builder) -> Operand:
    """[H] where a column [B,H,T,1] has one number for each head; None where it has more."""
    flow.follow(at)
    number, kind = flow.number(column), type_of(column)
    if number is not None:
        return at.full(shape=(heads,), value=float(number), dtype=kind.dtype)
    x = flow.uncast(column)
    while (wide := flow.op(x, "expand")) is not None:
        x = flow.uncast(wide.operands[0])
    shape = type_of(x).shape
    if ((1,) * (4 - len(shape)) + shape) != (1, heads, 1, 1):
        return None
    inner = x
    while (shaped := flow.op(inner, "reshape")) is not None:
        inner = shaped.operands[0]
    return inner if type_of(inner).shape == (heads,) else at.reshape(x, shape=(heads,))


def _heads_fit(q: Type, k: Type, v: Type) -> bool:
    """True for q [B,H,T,D], k and v [B,G,U,D] with H a multiple of G."""
    if not q.rank == k.rank == v.rank == 4 or not q.shape[0] == k.shape[0] == v.shape[0]:
        return False
    heads, groups = q.shape[1], k.shape[1]
    if groups != v.shape[1] or k.shape[2] != v.shape[2]:
        return False
    return heads == groups or (isinstance(heads, int) and isinstance(groups, int) and heads % groups == 0)


def _scores(x: Operand, flow: Dataflow, at: Builder, shape: tuple[Dim, ...]) -> _Scores | None:
    """Masks first, from the outside in; then the capped, scaled product."""
    x = flow.uncast(x)
    if type_of(x).shape != shape:
        return None
    op = flow.op(x, "add", "sub", "where")
    if op is None:
        return _product(x, flow, at)
    if op.name == "where":
        for branch, other, conditions in ((1, 2, "keep"), (2, 1, "drop")):
            number = flow.number(op.operands[other])
            found = _scores(op.operands[branch], flow, at, shape) if number is not None and number <= MASKED else None
            if found is not None:
                getattr(found, conditions).append(op.operands[0])
                return found
        return None
    for inner, bias in orders(op) if op.name == "add" else (op.operands,):
        found = _scores(inner, flow, at, shape)
        if found is not None:
            found.biases.append(bias if op.name == "add" else at.neg(bias))
            return found
    return None


def _product(x: Operand, flow: Dataflow, at: Builder) -> _Scores | None:
    """`q k^T scale`, or `cap * tanh(q k^T scale / cap)`."""
    scale, parts = flow.factors(x)
    inner = flow.op(flow.uncast(parts[0]), "matmul", "tanh") if len(parts) == 1 else None
    softcap = None
    if inner is not None and inner.name == "tanh":
        softcap = scale
        scale, parts = flow.factors(inner.operands[0])
        scale *= softcap
        inner = flow.op(flow.uncast(parts[0]), "matmul") if len(parts) == 1 and softcap > 0 else None
    if inner is None or inner.result.type.rank != 4:
        return None
    q, transposed = inner.operands
    return _Scores(q, _transposed(transposed, flow, at), scale, softcap)


def _transposed(x: Operand, flow: Dataflow, at: Builder) -> Operand:
    """The last two axes of x swapped (back, where x is a permute)."""
    rank = type_of(x).rank
    dims = (*range(rank - 2), rank - 1, rank - 2)
    inner = flow.op(x, "permute")
    if inner is not None:
        before = inner.attrs["dims"]
        assert isinstance(before, tuple)
        order = [axis(rank, d) for d in before if isinstance(d, int)]
        x, dims = inner.operands[0], tuple(order[d] for d in dims)
    return x if dims == tuple(range(rank)) else at.permute(x, dims=dims)


def _mask(scores: _Scores, at: Builder) -> Operand:
    """One mask out of biases and conditions: boolean where there are only conditions."""
    keep: Value | None = None
    for condition in (*reversed(scores.keep), *(at.logical_not(c) for c in reversed(scores.drop))):
        keep = condition if keep is None else at.logical_and(keep, condition)  # type: ignore[assignment]
    bias: Operand = None
    for other in reversed(scores.biases):
        bias = other if bias is None else at.add(bias, other)
    if keep is None or bias is None:
        return bias if keep is None else keep
    return at.where(keep, bias, float("-inf"))


# --- grouped heads -----------------------------------------------------------------------------------

def _grouped(op: Op, flow: Dataflow, at: Builder) -> Operand:
    q, k, v, *mask = op.operands
    found = _without_repeats(k, v, flow, at)
    if found is None or not _heads_fit(type_of(q), type_of(found[0]), type_of(found[1])):
        return None
    return build(at, op.name, q, *found, *mask, attrs=op.attrs)


def _without_repeats(k: Operand, v: Operand, flow: Dataflow, at: Builder) -> tuple[Operand, Operand] | None:
    """k and v before their heads were repeated, if both were, alike."""
    keys, values = _repeated(k, flow), _repeated(v, flow)
    if keys is None or values is None or keys[1][1] != values[1][1]:
        return None
    first, second = (x if type_of(x).shape == shape else at.reshape(x, shape=shape) for x, shape in (keys, values))
    return first, second


def _repeated(x: Operand, flow: Dataflow) -> tuple[Operand, tuple[Dim, ...]] | None:
    """A tensor with the elements of [B,G,U,D], and that shape, where x is [B,G*n,U,D]: each head n times in a row."""
    op = flow.op(x, "reshape", "expand")
    if op is None:
        return None
    batch, heads, *rest = op.result.type.shape
    source = type_of(op.operands[0]).shape
    if op.name == "expand":
        return (op.operands[0], source) if source == (batch, 1, *rest) else None
    repeated = flow.op(op.operands[0], "expand")
    if repeated is None or repeated.result.type.rank != 5 or type_of(repeated.operands[0]).rank != 5:
        return None
    groups, count = repeated.result.type.shape[1:3]
    fits = repeated.result.type.shape == (batch, groups, count, *rest) and groups * count == heads
    fits = fits and type_of(repeated.operands[0]).shape == (batch, groups, 1, *rest)
    return (repeated.operands[0], (batch, groups, *rest)) if fits else None


def fits_scores(mask: Operand, q: Operand, k: Operand) -> bool:
    """True for a mask that broadcasts to [B,H,T,U]."""
    shape = (*type_of(q).shape[:3], type_of(k).shape[2])
    try:
        return broadcast(type_of(mask).shape, shape) == shape
    except IRError:
        return False
