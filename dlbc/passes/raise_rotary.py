"""Rotary position embedding written as arithmetic becomes `rotary`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand, Value
from dlbc.ir.dims import Dim
from dlbc.ir.ops import attr, axis
from dlbc.passes import Pass, register
from dlbc.passes.carriers import carriers
from dlbc.passes.match import Dataflow, last, orders, replace_ops, type_of


@register
@dataclass(frozen=True)
class RaiseRotary(Pass):
    """`x * cos + rotate(x) * sin` is `rotary(x, cos, sin)`; rotate is (-x2, x1) of halves, or of pairs.

    Also written out by halves, `cat(x1 cos - x2 sin, x2 cos + x1 sin)`, or by pairs (GPT-J; LLaMA 4 as complex
    numbers). Pairs that come out as halves (DeepSeek) are halves laid side by side first. A partial rotary is
    the same on a slice of the head. cos and sin must not carry relevance.
    """

    name: ClassVar[str] = "raise_rotary"

    def run(self, graph: Graph) -> Graph:
        """The graph with rotary embeddings raised."""
        carrying = carriers(graph)

        def step(op: Op, flow: Dataflow, at: Builder) -> Operand:
            if op.name == "add":
                return _turned(op, flow, at, carrying)
            if op.name == "cat":
                return _by_parts(op, flow, at, carrying)
            return None

        return replace_ops(graph, step)


def _turned(op: Op, flow: Dataflow, at: Builder, carrying: set[str]) -> Operand:
    """x * cos + rotate(x) * sin."""
    for left, right in orders(op):
        plain, turned = flow.op(left, "mul"), flow.op(right, "mul")
        if plain is None or turned is None:
            continue
        for rotated, sin in orders(turned):
            found = _rotated(rotated, flow)
            if found is None or _carries(sin, carrying):
                continue
            x, interleaved = found
            for own, cos in orders(plain):
                if own == x and not _carries(cos, carrying) and type_of(cos).rank and type_of(sin).rank:
                    return at.rotary(x, cos, sin, interleaved=interleaved)
    return None


def _carries(operand: Operand, carrying: set[str]) -> bool:
    return isinstance(operand, Value) and operand.name in carrying


def _rotated(operand: Operand, flow: Dataflow) -> tuple[Operand, bool] | None:
    """`(x, interleaved)` where the operand is rotate(x)."""
    parts = _joined(operand, flow)
    if parts is None:
        return None
    (first, second), interleaved = parts
    negative = flow.op(first, "neg")
    if negative is None:
        return None
    return _whole(second, negative.operands[0], interleaved, flow)


def _joined(operand: Operand, flow: Dataflow) -> tuple[tuple[Operand, Operand], bool] | None:
    """The two parts of the last axis that are laid side by side, or (interleaved) in turns."""
    op = flow.op(operand, "cat", "reshape")
    if op is None:
        return None
    if op.name == "cat":
        whole = len(op.operands) == 2 and last(operand, attr(op, "dim"))
        return ((op.operands[0], op.operands[1]), False) if whole else None
    pairs = _stacked(flow.op(op.operands[0], "cat"), flow)
    if pairs is None:
        return None
    half = type_of(pairs[0]).shape
    return (pairs, True) if type_of(operand).shape == (*half[:-1], half[-1] * 2) else None


def _stacked(op: Op | None, flow: Dataflow) -> tuple[Operand, Operand] | None:
    """The two values of one shape that become pairs along a new last axis."""
    if op is None or len(op.operands) != 2 or not last(op.result, attr(op, "dim")):
        return None
    first, second = (flow.op(part, "reshape") for part in op.operands)
    if first is None or second is None:
        return None
    a, b, half = first.operands[0], second.operands[0], type_of(first.operands[0]).shape
    return (a, b) if half and first.result.type.shape == (*half, 1) and type_of(b).shape == half else None


def _whole(first: Operand, second: Operand, interleaved: bool, flow: Dataflow) -> tuple[Operand, bool] | None:
    """The value that the two parts of the last axis come from."""
    a, b = flow.op(first, "slice"), flow.op(second, "slice")
    if a is None or b is None or a.operands[0] != b.operands[0]:
        return None
    x = a.operands[0]
    size = type_of(x).shape[-1]
    if not isinstance(size, int) or size % 2 or not all(last(x, attr(part, "dim")) for part in (a, b)):
        return None
    half = size // 2
    if interleaved:
        pairs = all(attr(part, "step") == 2 and _parity(part, size) == n for n, part in enumerate((a, b)))
        return (x, True) if pairs else None
    bounds = [(attr(part, "start"), attr(part, "stop"), attr(part, "step")) for part in (a, b)]
    return (x, False) if bounds == [(0, half, 1), (half, size, 1)] else None


def _parity(part: Op, size: int) -> Dim | None:
    start, stop = attr(part, "start"), attr(part, "stop")
    return start if isinstance(start, int) and isinstance(stop, int) and stop >= size - 1 + start % 2 else None


def _members(first: Operand, second: Operand, flow: Dataflow, at: Builder) -> Operand:
    """The value [..., 2n] whose pairs are the members of the last axis of one value [..., n, 2]; None for others."""
    a, b = flow.op(first, "select"), flow.op(second, "select")
    if a is None or b is None or a.operands[0] != b.operands[0]:
        return None
    pairs = a.operands[0]
    *shape, count, two = type_of(pairs).shape if type_of(pairs).rank > 1 else (0, 0)
    own = two == 2 and all(last(pairs, attr(op, "dim")) and attr(op, "index") == n for n, op in enumerate((a, b)))
    return at.reshape(pairs, shape=(*shape, count * 2)) if own else None


def _by_parts(op: Op, flow: Dataflow, at: Builder, carrying: set[str]) -> Operand:
    """(x1 cos - x2 sin, x2 cos + x1 sin), laid side by side or as pairs, with cos and sin of half the size; x1 and x2
    are the halves of x, or (as pairs, or laid side by side all the same) every other number of it."""
    pairs = _stacked(op, flow)
    parts = (pairs, True) if pairs is not None else _joined(op.result, flow)
    if parts is None:
        return None
    (low, high), interleaved = parts
    difference, total = flow.op(low, "sub"), flow.op(high, "add")
    if difference is None or total is None:
        return None
    for x1, cos in _products(difference.operands[0], flow):
        for x2, sin in _products(difference.operands[1], flow):
            wanted = [{x2, cos}, {x1, sin}]
            if _carries(cos, carrying) or _carries(sin, carrying) or not any(
                    [set(p) for p in pair] == wanted for pair in _sums(total, flow)):
                continue
            x = _source(x1, x2, interleaved, flow, at)
            if x is not None:
                turned = at.rotary(x, _doubled(at, cos, interleaved), _doubled(at, sin, interleaved),
                                   interleaved=interleaved)
                return at.reshape(turned, shape=op.result.type.shape) if interleaved else turned
    return None


def _source(x1: Operand, x2: Operand, interleaved: bool, flow: Dataflow, at: Builder) -> Operand:
    """The value whose halves (interleaved: the members of whose pairs) x1 and x2 are; None where there is none."""
    whole = _whole(x1, x2, interleaved, flow)
    if whole is not None:
        return whole[0]
    if interleaved:
        return _members(x1, x2, flow, at)
    apart = _whole(x1, x2, True, flow) is not None or _members(x1, x2, flow, at) is not None
    return at.cat(x1, x2, dim=axis(type_of(x1).rank, -1)) if apart else None


def _products(operand: Operand, flow: Dataflow) -> list[tuple[Operand, Operand]]:
    product = flow.op(operand, "mul")
    return list(orders(product)) if product is not None else []


def _sums(total: Op, flow: Dataflow) -> list[tuple[tuple[Operand, ...], ...]]:
    products = [flow.op(o, "mul") for o in total.operands]
    operands = [p.operands for p in products if p is not None]
    return [tuple(operands), tuple(reversed(operands))] if len(operands) == 2 else []


def _doubled(at: Builder, half: Operand, interleaved: bool) -> Value:
    """cos or sin for the whole head from that for half of it."""
    shape = type_of(half).shape
    if not interleaved:
        return at.cat(half, half, dim=axis(len(shape), -1))
    twice = at.expand(at.reshape(half, shape=(*shape, 1)), shape=(*shape, 2))
    return at.reshape(twice, shape=(*shape[:-1], shape[-1] * 2))
