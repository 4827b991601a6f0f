"""What is computed apart, so that a call may be made in parts: proved op by op, or not at all.

Rows of a batch: no row depends on another. Positions of a text: none depends on a later one, so what comes after the
last explained one need not be there at all.

Each value has at most one axis that rows (or positions) lie along: an axis of their number, or one whose outermost part
they are (`B*T` after a reshape). An op must treat that axis row by row. Ops that are not known to do so say no.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dlbc.ir.core import Attr, Graph, Op, Operand, Type, Value, Weight, values
from dlbc.ir.dims import Dim, Sym, product, symbol, symbols
from dlbc.ir.ops import OPS
from dlbc.passes.carriers import explained_inputs
from dlbc.passes.record_experts import mixtures_of
from dlbc.passes.sink_positions import sequence_output

NO = -1
"""No axis: the value is the same for every row."""


class _Mixed(Exception):
    """Rows may depend on each other."""


@dataclass(frozen=True)
class _At:
    """One op: the axis of rows of each operand (NO: none), the types, and how many rows there are.

    `ordered`: rows are positions, of which none may depend on a later one.
    """

    op: Op
    axes: tuple[int, ...]
    batch: Dim
    rows: frozenset[str]
    ordered: bool = False

    def type(self, position: int) -> Type:
        operand = self.op.operands[position]
        assert isinstance(operand, Value | Weight)
        return operand.type

    @property
    def first(self) -> int:
        """The axis of the first operand, which alone has one."""
        if any(axis != NO for axis in self.axes[1:]):
            raise _Mixed
        return self.axes[0]

    def attr(self, name: str) -> Attr:
        """An attribute, stated or by default."""
        return self.op.attrs.get(name, OPS[self.op.name].attrs.get(name))

    def numbers(self, name: str, rank: int) -> tuple[int, ...]:
        """An attribute that holds axes, counted from the front."""
        stated = self.attr(name)
        listed = stated if isinstance(stated, tuple) else (stated,) if stated is not None else tuple(range(rank))
        return tuple(int(str(axis)) % max(rank, 1) for axis in listed)


def batch_of(graph: Graph) -> str:
    """The size of the batch, where all explained inputs and all outputs have it in front and rows are computed apart;
    else "" (nothing)."""
    explained = explained_inputs(graph)
    sizes = {str(p.type.shape[0]) for p in explained if p.type.shape}
    if len(sizes) != 1 or not all(p.type.shape for p in explained) or not next(iter(sizes)).isidentifier():
        return ""
    name = next(iter(sizes))
    try:
        axes = _axes(graph, symbol(name))
        outputs = all(v.type.rank and axes[v.name] == 0 and v.type.shape[0] == symbol(name)
                      for v in graph.forward.results)
    except (_Mixed, AssertionError, ValueError, TypeError):
        return ""
    return name if outputs else ""


def causal_length(graph: Graph, output: str = "") -> str:
    """The size T of an output [B, T, V] of which no position depends on a later one, where nothing else that the graph
    returns has positions, but for the experts that they were routed to; else ""."""
    found = sequence_output(graph, output)
    if found is None or not isinstance(found[2], Sym) or not str(found[2]).isidentifier():
        return ""
    chosen, _, length = found
    try:
        axes = _axes(graph, length, ordered=True)
    except (_Mixed, AssertionError, ValueError, TypeError):
        return ""
    routed = {name for mixture in mixtures_of(graph) for name in (mixture.ids, mixture.weights)}
    others = all(axes[v.name] == (1 if v.name in routed else NO) for v in graph.forward.results if v != chosen)
    return str(length) if axes[chosen.name] == 1 and others else ""


def _axes(graph: Graph, batch: Dim, *, ordered: bool = False) -> dict[str, int]:
    """The axis of each value along which rows lie."""
    found = {v.name: NO for v in graph.prepare.results}
    for param in graph.forward.params:
        found[param.name] = _declared(param.type, batch)
        if found[param.name] not in (NO, int(ordered)):
            raise _Mixed
    rows: set[str] = set()  # row numbers: arange over the batch, reshaped
    for op in graph.forward.ops:
        axes = tuple(found[o.name] if isinstance(o, Value) else NO for o in op.operands)
        if any(isinstance(o, Sym) and _has(o, batch) for o in op.operands):
            raise _Mixed
        counts = not ordered and op.name == "arange" and op.attrs.get("stop") == batch and op.attrs.get("start", 0) == 0
        if counts or (op.name == "reshape" and op.operands and _name(op.operands[0]) in rows):
            rows.add(op.result.name)
            found[op.result.name] = _declared(op.result.type, batch)
            continue
        if any(v.name in rows for v in values(op.operands)) and op.name != "index":
            raise _Mixed
        at = _At(op, axes, batch, frozenset(rows), ordered)
        axis = _result_axis(at)
        for result in op.results:
            dim = result.type.shape[axis] if axis != NO else None
            others = [d for i, d in enumerate(result.type.shape) if i != axis]
            if any(_has(d, batch) for d in others) or (dim is not None and not _leads(dim, batch)):
                raise _Mixed
            found[result.name] = axis
    return found


def _result_axis(at: _At) -> int:
    op = at.op
    if at.ordered and all(axis == NO for axis in at.axes) and _begins(at):
        return _declared(op.result.type, at.batch)
    _check_attrs(at)
    if all(axis == NO for axis in at.axes):
        if op.name not in ("full", "expand") and any(_has(d, at.batch) for r in op.results for d in r.type.shape):
            raise _Mixed
        return _declared(op.result.type, at.batch)
    if OPS[op.name].elementwise:
        return _aligned(at, 0)
    rules = _ORDERED if at.ordered else _RULES
    if op.name not in rules:
        raise _Mixed
    return rules[op.name](at)


def _begins(at: _At) -> bool:
    """Whether an op makes the first rows of something that goes on: a count, or the beginning of a table."""
    return at.op.name in ("arange", "slice") and at.attr("stop") == at.batch and not _attr_has(
        at.attr("start"), at.batch) and at.attr("step") == 1


def _check_attrs(at: _At) -> None:
    for name, value in at.op.attrs.items():
        if name != "shape" and _attr_has(value, at.batch):
            raise _Mixed


def _aligned(at: _At, matrix: int) -> int:
    """Operands broadcast against each other, but for their last `matrix` axes."""
    rank = at.op.result.type.rank
    found = {rank - at.type(i).rank + axis for i, axis in enumerate(at.axes) if axis != NO}
    if len(found) != 1 or next(iter(found)) >= rank - matrix:
        raise _Mixed
    return next(iter(found))


def _kept(at: _At, inner: int) -> int:
    """The last `inner` axes are worked on."""
    if at.first >= at.type(0).rank - inner:
        raise _Mixed
    return at.first


def _along(at: _At) -> int:
    """One axis, `dim`, is worked on."""
    if at.attr("dim") is None or at.first in at.numbers("dim", at.type(0).rank):
        raise _Mixed
    return at.first


def _reduced(at: _At) -> int:
    rank = at.type(0).rank
    name = "dim" if at.op.name in ("argmax", "argmin", "max_with_index", "min_with_index") else "dims"
    dims = at.numbers(name, rank)
    if at.first in dims:
        raise _Mixed
    return at.first if at.attr("keepdim") else at.first - sum(d < at.first for d in dims)


def _reshaped(at: _At) -> int:
    """The batch stays the outermost part of an axis, behind as many elements as before."""
    old, new, axis = at.type(0).shape, at.op.result.type.shape, at.first
    for place, dim in enumerate(new):
        if product(new[:place]) == product(old[:axis]) and _leads(dim, at.batch):
            return place
    raise _Mixed


def _selected(at: _At) -> int:
    dim = at.numbers("dim", at.type(0).rank)[0]
    if at.first == dim:
        raise _Mixed
    return at.first - (dim < at.first)


def _taken(at: _At) -> int:
    """Rows of a table that no batch goes through, or of another axis by numbers that are the same for all."""
    dim = at.numbers("dim", at.type(0).rank)[0]
    x, index = at.axes
    if x == NO:
        return dim + index
    if index != NO or x == dim:
        raise _Mixed
    return x if x < dim else x - 1 + at.type(1).rank


def _indexed(at: _At) -> int:
    dims, x = at.numbers("dims", at.type(0).rank), at.axes[0]
    rank = max(at.type(i).rank for i in range(1, len(at.op.operands)))
    own = {rank - at.type(i).rank + axis for i, axis in enumerate(at.axes) if i and axis != NO}
    if x in dims:  # row i of the batch goes with row i of the other indices
        if _name(at.op.operands[1 + dims.index(x)]) not in at.rows or len(own) != 1:
            raise _Mixed
        return dims[0] + next(iter(own))
    if any(_name(o) in at.rows for o in at.op.operands) or (own and (x != NO or len(own) != 1)):
        raise _Mixed
    return dims[0] + next(iter(own)) if own else x if x < dims[0] else x - len(dims) + rank


def _gathered(at: _At) -> int:
    axes = {axis for axis in at.axes if axis != NO}
    if at.axes[0] == NO or len(axes) != 1 or at.axes[0] in at.numbers("dim", at.type(0).rank):
        raise _Mixed
    return next(iter(axes))


def _attended(at: _At) -> int:
    if any(axis not in (NO, 0) for axis in at.axes) or at.axes[0] != 0:
        raise _Mixed
    return 0


def _attended_before(at: _At) -> int:
    """Causal attention: a mask may hide keys from all queries alike, and no more."""
    rank = at.type(0).rank
    mask = at.axes[3] if len(at.axes) > 3 else NO
    if at.attr("causal") is not True or set(at.axes[:3]) != {rank - 2} or mask not in (NO, rank - 1) or (
            set(at.axes[4:]) - {NO}):
        raise _Mixed
    return rank - 2


def _mixed(at: _At) -> int:
    """Rows that experts are chosen for: axes in front, the same of what they are given and of their numbers."""
    axes = {axis for axis in at.axes if axis != NO}
    if len(axes) != 1 or next(iter(axes)) >= at.type(1).rank - 1:
        raise _Mixed
    return next(iter(axes))


def _joined(at: _At) -> int:
    axes = {axis for axis in at.axes if axis != NO}
    if len(axes) != 1 or next(iter(axes)) in at.numbers("dim", at.op.result.type.rank):
        raise _Mixed
    return next(iter(axes))


def _padded(at: _At) -> int:
    pads = at.attr("pads")
    assert isinstance(pads, tuple)
    if pads[at.first] != (0, 0):
        raise _Mixed
    return at.first


def _permuted(at: _At) -> int:
    return at.numbers("dims", at.type(0).rank).index(at.first)


def _linear(at: _At) -> int:
    return _kept(at, 1)


def _windowed(at: _At) -> int:
    sizes = at.attr("kernel") or at.attr("size")
    assert isinstance(sizes, tuple)
    return _kept(at, len(sizes))


def _normed(at: _At) -> int:
    return _kept(at, int(str(at.attr("dims"))))


def _front(at: _At) -> int:
    if at.first != 0:
        raise _Mixed
    return 0


_RULES: Mapping[str, Callable[[_At], int]] = {
    **dict.fromkeys(("sum", "mean", "prod", "amax", "amin", "any", "all", "logsumexp", "var", "argmax", "argmin",
                     "max_with_index", "min_with_index"), _reduced),
    **dict.fromkeys(("cumsum", "softmax", "log_softmax", "topk", "sort", "slice"), _along),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
                     "batch_norm", "group_norm"), _front),
    **dict.fromkeys(("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "interpolate"), _windowed),
    **dict.fromkeys(("layer_norm", "rms_norm", "row_statistics"), _normed),
    **dict.fromkeys(("attention", "attention_weights"), _attended),
    "linear": _linear, "matmul": lambda at: _aligned(at, 2), "rotary": lambda at: _aligned(at, 1),
    "embedding": lambda at: at.first, "expand": lambda at: at.op.result.type.rank - at.type(0).rank + at.first,
    "reshape": _reshaped, "permute": _permuted, "select": _selected, "cat": _joined, "pad": _padded,
    "route_topk": lambda at: _aligned(at, 1), "expert_linear": _mixed, "combine": _mixed,
    "gather": _gathered, "scatter": _gathered, "take": _taken, "index": _indexed, "triangle": lambda at: _kept(at, 2),
}

_ORDERED: Mapping[str, Callable[[_At], int]] = {
    **{name: rule for name, rule in _RULES.items() if not name.startswith("attention")},
    "attention": _attended_before, "cumsum": lambda at: at.first,
}
"""The same for positions: what is added up from the first on knows no later one."""


def _declared(type: Type, batch: Dim) -> int:
    """The only axis of a type that the rows are in."""
    found = [i for i, dim in enumerate(type.shape) if _has(dim, batch)]
    if len(found) > 1:
        raise _Mixed
    return found[0] if found else NO


def _leads(dim: Dim, batch: Dim) -> bool:
    return isinstance(dim, Sym) and dim // batch * batch == dim and not _has(dim // batch, batch)


def _has(dim: object, batch: Dim) -> bool:
    return isinstance(dim, Sym) and bool(symbols(dim) & symbols(batch))


def _attr_has(value: Attr, batch: Dim) -> bool:
    return any(_attr_has(part, batch) for part in value) if isinstance(value, tuple) else _has(value, batch)


def _name(operand: Operand) -> str:
    return operand.name if isinstance(operand, Value) else ""
