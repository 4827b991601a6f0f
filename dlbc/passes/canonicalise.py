"""Local rewrites that make one form out of many, so that the patterns of the raising passes are few.

Each rule looks at one op and what defines its operands. `simplify` applies the same rules to lowered
relevance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from dlbc.errors import IRError
from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand, Value, Weight
from dlbc.ir.dims import Dim, product
from dlbc.ir.ops import OPS, attr, axis, infer
from dlbc.passes import Pass, register
from dlbc.passes.match import Dataflow, build, floating, orders, replace_ops, split, type_of

_ROUNDS = 10
"""A graph that is not settled by then is correct all the same."""

Local = Callable[[Op, Dataflow, Builder], Operand]


@register
@dataclass(frozen=True)
class Canonicalise(Pass):
    """Remove moves and arithmetic that do nothing, join chains of moves, make literals of filled scalars.

    Also: a product with a constant matrix is a `linear`, a constant vector added to it is its bias, and
    reshapes around it that only fold its leading axes (GPT-2's Conv1D) go. Heads are split off before a
    permute, and q, k, v that one layer gives are slices of its result.
    """

    name: ClassVar[str] = "canonicalise"

    def run(self, graph: Graph) -> Graph:
        """The graph to which no rule applies any more (in practice after two or three rounds)."""
        for _ in range(_ROUNDS):
            before = graph
            for section in ("prepare", "forward"):
                graph = replace_ops(graph, local, section)
            if (graph.prepare.body, graph.forward.body) == (before.prepare.body, before.forward.body):
                return graph
        return graph


def local(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """What stands for an op's result after the first rule that applies, None when none does."""
    if op.operands and type_of(op.operands[0]) == op.result.type:
        same = _does_nothing(op, flow)
        if same is not None:
            return same
    rule = _RULES.get(op.name)
    new = rule(op, flow, at) if rule is not None else None
    if new is None and op.name in OPS and OPS[op.name].elementwise:
        new = _literal_operands(op, flow, at)
    return new


def _does_nothing(op: Op, flow: Dataflow) -> Operand:
    """The first operand, where the op returns it unchanged (its type is known to be the result's)."""
    x = op.operands[0]
    if op.name in ("cast", "reshape", "expand"):
        return x
    if op.name == "slice":
        return x if attr(op, "start") == 0 and attr(op, "step") == 1 else None
    if op.name == "permute":
        dims = op.attrs["dims"]
        return x if isinstance(dims, tuple) and _axes(op) == tuple(range(len(dims))) else None
    if op.name == "cat":
        return x if len(op.operands) == 1 else None
    if op.name == "pad":
        return x if not any(before or after for before, after in op.attrs["pads"]) else None  # type: ignore
    if op.name in ("add", "sub") and flow.number(op.operands[1]) == 0:
        return x
    if op.name in ("mul", "div", "pow") and flow.number(op.operands[1]) == 1:
        return x
    if op.name in ("bitwise_and", "logical_and") and type_of(x).dtype == "bool":
        return x if _truth(op.operands[1], flow) is True else None
    if op.name in ("bitwise_or", "logical_or") and type_of(x).dtype == "bool":
        return x if _truth(op.operands[1], flow) is False else None
    if op.name in ("maximum", "minimum", "clamp") and not type_of(x).floating:
        return x if _in_bounds(op, flow) else None
    return None


def _in_bounds(op: Op, flow: Dataflow) -> bool:
    """Whether bounds leave places of an axis (the experts that topk chose) as they are: 0 to its size less 1."""
    size = _places(op.operands[0], flow)
    low, high = attr(op, "low") if op.name == "clamp" else None, attr(op, "high") if op.name == "clamp" else None
    if op.name == "maximum":
        low = flow.number(op.operands[1])
    if op.name == "minimum":
        high = flow.number(op.operands[1])
    stated = op.name == "clamp" or low is not None or high is not None
    return size is not None and stated and (not isinstance(low, int | float) or low <= 0) and (
        not isinstance(high, int | float) or high >= size - 1)


def _places(x: Operand, flow: Dataflow) -> int | None:
    """The size of the axis that integers are places of; None where they may be others."""
    while (move := flow.op(x, "reshape", "cast", "permute", "expand", "slice", "select")) is not None:
        x = move.operands[0]
    op = flow.op(x, "topk", "sort", "max_with_index", "min_with_index", "argmax", "argmin", "route_topk")
    if op is None or x != op.results[-1] or type_of(x).floating:
        return None
    shape, dim = type_of(op.operands[0]).shape, -1 if op.name == "route_topk" else attr(op, "dim")
    size = shape[axis(len(shape), dim)] if isinstance(dim, int) and shape else None
    return size if isinstance(size, int) else None


def _truth(operand: Operand, flow: Dataflow) -> bool | None:
    if isinstance(operand, bool):
        return operand
    filled = flow.op(operand, "full")
    value = filled.attrs["value"] if filled is not None else None
    return value if isinstance(value, bool) else None


def _axes(op: Op) -> tuple[int, ...]:
    dims = op.attrs["dims"]
    assert isinstance(dims, tuple)
    return tuple(axis(len(dims), d) for d in dims if isinstance(d, int))


# --- one rule per op ---------------------------------------------------------------------------------

def _swapped(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """`1 * x`, `0 + x`, `true and x`: the literal goes to the right, where `_does_nothing` looks."""
    a, b = op.operands
    if type_of(b) != op.result.type:
        return None
    return _does_nothing(Op(op.name, (b, a), op.results, op.attrs), flow)


def _reshape(op: Op, flow: Dataflow, at: Builder) -> Operand:
    inner = flow.op(op.operands[0], "reshape")
    if inner is not None:
        return _viewed(at, inner.operands[0], op.result.type.shape)
    filled = flow.op(op.operands[0], "full")
    if filled is not None:
        return build(at, "full", attrs={**filled.attrs, "shape": op.result.type.shape})
    return _unfolded_linear(op, flow, at) or _split_first(op, flow, at) or _dropped_first(op, flow, at)


def _viewed(at: Builder, x: Operand, shape: tuple[Dim, ...]) -> Operand:
    return x if type_of(x).shape == shape else at.reshape(x, shape=shape)


def _unfolded_linear(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """reshape(linear(reshape(x, [-1, in])), [..., out]) is linear of x in the shape [..., in]."""
    linear = flow.op(op.operands[0], "linear")
    folded = flow.op(linear.operands[0], "reshape") if linear is not None and flow.single(linear.result) else None
    if linear is None or folded is None or op.result.type.shape[-1:] != linear.result.type.shape[-1:]:
        return None
    x = _viewed(at, folded.operands[0], (*op.result.type.shape[:-1], folded.result.type.shape[-1]))
    return at.linear(x, *linear.operands[1:], place=linear.place)


def _split_first(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """Heads split off after a permute (nn.MultiheadAttention folds them into the batch) split off before it."""
    permute = flow.op(op.operands[0], "permute")
    groups = split(permute.result.type.shape, op.result.type.shape) if permute is not None else None
    if permute is None or groups is None or not any(sum(size != 1 for size in group) > 1 for group in groups):
        return None
    order = _axes(permute)
    before = [groups[order.index(a)] for a in range(len(order))]
    starts = [sum(map(len, before[:a])) for a in range(len(order))]
    x = _viewed(at, permute.operands[0], tuple(size for group in before for size in group))
    return at.permute(x, dims=tuple(starts[a] + k for a in order for k in range(len(before[a]))))


def _dropped_first(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """Axes of size 1 that go after a permute go before it, where they came from a reshape."""
    permute = flow.op(op.operands[0], "permute")
    if permute is None or flow.op(permute.operands[0], "reshape") is None:
        return None
    order, before = _axes(permute), type_of(permute.operands[0]).shape
    left = [a for a in order if before[a] != 1]
    if tuple(before[a] for a in left) != op.result.type.shape:
        return None
    kept = sorted(left)
    x = _viewed(at, permute.operands[0], tuple(before[a] for a in kept))
    return x if kept == left else at.permute(x, dims=tuple(kept.index(a) for a in left))


def _select(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """Of a permute: before it. Of the parts that an axis was split into (q, k, v in one layer): a slice."""
    inner = flow.op(op.operands[0], "permute", "reshape")
    index, rank = op.attrs["index"], op.result.type.rank + 1
    dim = axis(rank, op.attrs["dim"]) if isinstance(op.attrs["dim"], int) else 0
    if inner is None or not isinstance(index, int):
        return None
    x = inner.operands[0]
    if inner.name == "permute":
        order = _axes(inner)
        part = _selected(x, order[dim], index, flow, at) or at.select(x, dim=order[dim], index=index)
        dims = tuple(a - (a > order[dim]) for k, a in enumerate(order) if k != dim)
        return part if dims == tuple(range(rank - 1)) else at.permute(part, dims=dims)
    return _selected(op.operands[0], dim, index, flow, at)


def _selected(x: Operand, dim: int, index: int, flow: Dataflow, at: Builder) -> Operand:
    """select(x) where x is a reshape that split an axis, this being the outermost part."""
    reshape = flow.op(x, "reshape")
    if reshape is None:
        return None
    whole, after = reshape.operands[0], reshape.result.type.shape
    kept = tuple(size for size in after if size != 1)
    groups = split(tuple(size for size in type_of(whole).shape if size != 1), kept)
    parts = after[dim]
    if groups is None or not isinstance(parts, int) or parts == 1 or 1 in type_of(whole).shape:
        return None
    starts = [sum(map(len, groups[:g])) for g in range(len(groups))]
    place = sum(size != 1 for size in after[:dim])
    if place not in starts:
        return None
    along = starts.index(place)
    step = product(groups[along][1:])
    index = index + parts if index < 0 else index
    part = at.slice_(whole, dim=along, start=index * step, stop=(index + 1) * step)
    return _viewed(at, part, (*after[:dim], *after[dim + 1:]))


def _permute(op: Op, flow: Dataflow, at: Builder) -> Operand:
    inner = flow.op(op.operands[0], "permute")
    if inner is None:
        return None
    first, second = _axes(inner), _axes(op)
    dims = tuple(first[d] for d in second)
    x = inner.operands[0]
    return x if dims == tuple(range(len(dims))) else at.permute(x, dims=dims)


def _expand(op: Op, flow: Dataflow, at: Builder) -> Operand:
    inner = flow.op(op.operands[0], "expand")
    return at.expand(inner.operands[0], shape=op.attrs["shape"]) if inner is not None else None


def _slice(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """A part of a cat is what was laid there (DeepSeek fills a buffer part by part)."""
    joined = flow.op(op.operands[0], "cat")
    rank = op.result.type.rank
    if joined is None or attr(op, "step") != 1:
        return None
    dim, along = (axis(rank, each.attrs["dim"]) for each in (op, joined))  # type: ignore[arg-type]
    start, stop, place = attr(op, "start"), attr(op, "stop"), 0
    if dim != along or not isinstance(start, int) or not isinstance(stop, int):
        return None
    for part in joined.operands:
        size = type_of(part).shape[dim]
        if not isinstance(size, int):
            return None
        if place <= start and stop <= place + size:
            whole = (start, stop) == (place, place + size)
            return part if whole else at.slice_(part, dim=dim, start=start - place, stop=stop - place)
        place += size
    return None


_EXACT_IN = {"bf16": ("bf16", "f32", "f64"), "f16": ("f16", "f32", "f64"), "f32": ("f32", "f64"), "f64": ("f64",),
             "bool": ("bool", "u8", "i8", "i16", "i32", "i64", "bf16", "f16", "f32", "f64")}


def _cast(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """A cast to a wider type and back, and a cast by way of a wider type."""
    inner = flow.op(op.operands[0], "cast")
    if inner is None:
        return None
    x = inner.operands[0]
    if inner.result.type.dtype not in _EXACT_IN.get(type_of(x).dtype, ()):
        return None
    return x if type_of(x) == op.result.type else at.cast(x, dtype=op.attrs["dtype"])


def _neg(op: Op, flow: Dataflow, at: Builder) -> Operand:
    inner = flow.op(op.operands[0], "neg")
    return inner.operands[0] if inner is not None else None


def _not(op: Op, flow: Dataflow, at: Builder) -> Operand:
    inner = flow.op(op.operands[0], "logical_not", "bitwise_not")
    boolean = inner is not None and type_of(inner.operands[0]).dtype == "bool"
    return inner.operands[0] if inner is not None and boolean else None


def _matmul(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """x @ W with a constant matrix W; relevance, which multiplies by forward weights as they lie, keeps it."""
    x, weight = op.operands
    if not flow.constant(weight) or type_of(weight).rank != 2 or not floating(x):
        return None
    transposed = flow.op(weight, "permute")
    if transposed is not None:
        return at.linear(x, transposed.operands[0])
    return None if op.of else at.linear(x, at.permute(weight, dims=(1, 0)))


def _add(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """linear(x, W) + b with a constant vector b."""
    for x, bias in orders(op):
        linear = flow.op(x, "linear")
        if (linear is not None and len(linear.operands) == 2 and flow.single(x) and flow.constant(bias)
                and type_of(bias).shape == type_of(linear.operands[1]).shape[:1]):
            return at.linear(*linear.operands, bias, place=linear.place)
    return _swapped(op, flow, at)


def _literal_operands(op: Op, flow: Dataflow, at: Builder) -> Operand:
    """Filled tensors among the operands of an elementwise op as literals, where the type stays."""
    operands = tuple(_as_literal(o, flow) for o in op.operands)
    if operands == op.operands or not any(isinstance(o, (Value, Weight)) for o in operands):
        return None
    try:
        fits = infer(op.name, operands, dict(op.attrs)) == (op.result.type,)
    except IRError:
        return None
    return build(at, op.name, *operands, attrs=op.attrs) if fits else None


def _as_literal(operand: Operand, flow: Dataflow) -> Operand:
    filled = flow.op(operand, "full")
    value = filled.attrs["value"] if filled is not None else None
    if filled is None or not isinstance(value, (int, float)):
        return operand
    dtype = filled.result.type.dtype
    return bool(value) if dtype == "bool" else float(value) if floating(operand) else int(value)


_RULES: dict[str, Local] = {
    "reshape": _reshape, "slice": _slice, "select": _select, "permute": _permute, "expand": _expand, "cast": _cast,
    "neg": _neg, "logical_not": _not, "bitwise_not": _not, "matmul": _matmul, "add": _add, "mul": _swapped,
    "bitwise_and": _swapped, "logical_and": _swapped, "bitwise_or": _swapped, "logical_or": _swapped,
}
