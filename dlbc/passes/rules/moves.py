"""Moves: relevance goes back the way the numbers came. Exact adjoints: never clamped, never rescaled."""

from __future__ import annotations

from collections.abc import Sequence

from dlbc.ir.core import Attr, Op, Operand, Value, Weight
from dlbc.ir.dims import Dim, Sym
from dlbc.ir.ops import attr, axis
from dlbc.passes.rules import Contributions, Expansion, only, rule

MOVES = ("reshape", "permute", "expand", "slice", "select", "cat", "pad", "flip", "roll", "triangle", "gather",
         "take", "index", "scatter", "index_put", "cast", "topk", "sort", "route_topk")


@rule("cast", "move", form="any")
def cast(at: Expansion, op: Op, r: Value) -> Contributions:
    """The same relevance: it is float32 on both sides."""
    return (r,)


@rule("reshape", "move", form="any")
def reshape(at: Expansion, op: Op, r: Value) -> Contributions:
    """The same elements under x's shape."""
    return (at.reshape(r, shape=(r.type.shape[0], *_shape(op))),)


@rule("permute", "move", form="any")
def permute(at: Expansion, op: Op, r: Value) -> Contributions:
    """The inverse order of axes."""
    rank = r.type.rank - 1
    order = _axes(op)
    return (at.permute(r, dims=(0, *(1 + order.index(d) for d in range(rank)))),)


@rule("expand", "move", form="any")
def expand(at: Expansion, op: Op, r: Value) -> Contributions:
    """The sum over the copies."""
    return (at.unbroadcast(r, op.operands[0].type),)  # type: ignore[union-attr]


@rule("slice", "move", form="any")
def slice_(at: Expansion, op: Op, r: Value) -> Contributions:
    """Zeros outside the slice."""
    dim = _axis(op)
    attrs = {name: attr(op, name) for name in ("start", "step")}
    return (at.slice_adjoint(r, dim=dim + 1, size=_shape(op)[dim], stop=op.attrs["stop"], **attrs),)


@rule("select", "move", form="any")
def select(at: Expansion, op: Op, r: Value) -> Contributions:
    """Zeros at the other indices."""
    dim = _axis(op)
    return (at.select_adjoint(r, dim=dim + 1, index=op.attrs["index"], size=_shape(op)[dim]),)


@rule("cat", "move", form="any")
def cat(at: Expansion, op: Op, r: Value) -> Contributions:
    """Each part's own stretch."""
    dim = _axis(op)
    found: list[Value | None] = []
    start: Dim = 0
    for operand in op.operands:
        stop = start + operand.type.shape[dim]  # type: ignore[union-attr]
        found.append(at.slice_(r, dim=dim + 1, start=start, stop=stop) if at.carries(operand) else None)
        start = stop
    return tuple(found)


@rule("pad", "move", form="any")
def pad(at: Expansion, op: Op, r: Value) -> Contributions:
    """What lies on the padding is absorbed; what was cropped gets 0."""
    pads = tuple((-before, -after) for before, after in (_sizes(pair) for pair in _tuple(op, "pads")))
    return (at.pad(r, pads=((0, 0), *pads)),)


@rule("flip", "move", form="any")
def flip(at: Expansion, op: Op, r: Value) -> Contributions:
    """Reversed again."""
    return (at.flip(r, dims=tuple(1 + d for d in _axes(op))),)


@rule("roll", "move", form="any")
def roll(at: Expansion, op: Op, r: Value) -> Contributions:
    """Shifted back."""
    shifts = tuple(-s for s in _sizes(op.attrs["shifts"]))
    return (at.roll(r, shifts=shifts, dims=tuple(1 + d for d in _axes(op))),)


@rule("triangle", "move", form="any")
def triangle(at: Expansion, op: Op, r: Value) -> Contributions:
    """Zero where x was dropped."""
    return (at.triangle(r, **op.attrs),)


@rule("gather", "move", form="any")
def gather(at: Expansion, op: Op, r: Value) -> Contributions:
    """Added up where the elements came from."""
    zeros = at.full(shape=(r.type.shape[0], *_shape(op)), value=0.0, dtype="f32")
    return only(op, 0, at.scatter_add(zeros, _seeded_index(at, op.operands[1], r), r, dim=_axis(op) + 1))


@rule("take", "move", form="any")
def take(at: Expansion, op: Op, r: Value) -> Contributions:
    """Added up in the slices that were taken."""
    dim = _axis(op)
    return only(op, 0, at.take_adjoint(r, op.operands[1], dim=dim + 1, size=_shape(op)[dim]))


@rule("index", "move", form="any")
def index(at: Expansion, op: Op, r: Value) -> Contributions:
    """Added up at the indices."""
    dims: tuple[int, ...] = op.attrs["dims"]  # type: ignore[assignment]
    return only(op, 0, at.index_adjoint(r, *op.operands[1:], dims=tuple(d + 1 for d in dims),
                                        sizes=tuple(_shape(op)[d] for d in dims)))


@rule("scatter", "move", form="any")
def scatter(at: Expansion, op: Op, r: Value) -> Contributions:
    """Where written, to the source; elsewhere to the base."""
    base, index_, source = op.operands
    dim, seeded = _axis(op), _seeded_index(at, index_, r)
    return (at.scatter(r, seeded, 0.0, dim=dim + 1) if at.carries(base) else None, None,
            at.gather(r, seeded, dim=dim + 1) if at.carries(source) else None)


@rule("index_put", "move", form="any")
def index_put(at: Expansion, op: Op, r: Value) -> Contributions:
    """Where written, to the source; elsewhere to the base. (Where it accumulates it is a sum: `sums.py`.)"""
    base, source, *indices = op.operands
    dims: tuple[int, ...] = tuple(d + 1 for d in op.attrs["dims"])  # type: ignore[union-attr, operator, misc]
    to_source = None
    if at.carries(source):
        assert isinstance(source, Value)
        to_source = at.unbroadcast(at.index(r, *indices, dims=dims), source.type)
    return (_cleared(at, r, indices, dims) if at.carries(base) else None, to_source, *(None,) * len(indices))


@rule(("topk", "sort"), "move", form="any")
def order(at: Expansion, op: Op, r: Value, _: Value | None = None) -> Contributions:
    """Back to where the sorted elements came from."""
    zeros = at.full(shape=(r.type.shape[0], *_shape(op)), value=0.0, dtype="f32")
    return (at.scatter_add(zeros, _seeded_index(at, op.results[1], r), r, dim=_axis(op) + 1),)


@rule("route_topk", "move", form="any")
def chosen(at: Expansion, op: Op, r: Value, _: Value | None = None) -> Contributions:
    """Back to the scores of the chosen experts; what they were chosen by, beside the scores, gets none."""
    zeros = at.full(shape=(r.type.shape[0], *_shape(op)), value=0.0, dtype="f32")
    found = at.scatter_add(zeros, _seeded_index(at, op.results[1], r), r, dim=r.type.rank - 1)
    return found, *(None,) * (len(op.operands) - 1)


def _cleared(at: Expansion, r: Value, indices: Sequence[Operand], dims: tuple[int, ...]) -> Value:
    """r with zeros at indices."""
    mask = at.full(shape=r.type.shape[1:], value=1.0, dtype="f32")
    return at.mul(r, at.index_put(mask, 0.0, *indices, dims=tuple(d - 1 for d in dims)))


def _seeded_index(at: Expansion, index_: Operand, r: Value) -> Value:
    """An index tensor repeated for every seed."""
    assert isinstance(index_, (Value, Weight))
    return at.expand(index_, shape=(r.type.shape[0], *index_.type.shape))


def _shape(op: Op) -> tuple[Dim, ...]:
    return op.operands[0].type.shape  # type: ignore[union-attr]


def _tuple(op: Op, name: str) -> tuple[Attr, ...]:
    found = attr(op, name)
    assert isinstance(found, tuple)
    return found


def _sizes(found: Attr) -> tuple[Dim, ...]:
    assert isinstance(found, tuple)
    return tuple(d for d in found if isinstance(d, (int, Sym)))


def _axes(op: Op) -> tuple[int, ...]:
    return tuple(axis(len(_shape(op)), d) for d in _tuple(op, "dims") if isinstance(d, int))


def _axis(op: Op) -> int:
    dim = attr(op, "dim")
    assert isinstance(dim, int)
    return axis(len(_shape(op)), dim)
