"""Masks that say "causal", "window" or "padding" in arithmetic become attributes of `attention`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Attr, Graph, Op, Operand, Value, Weight
from dlbc.ir.dims import Dim
from dlbc.ir.ops import attr
from dlbc.passes import Pass, register
from dlbc.passes.mask_facts import Affine, Bound, Choice, Look, Predicate
from dlbc.passes.mask_rules import Facts
from dlbc.passes.match import Dataflow, build, replace_ops, type_of
from dlbc.passes.raise_attention import MASKED, fits_scores

_QUERY, _KEY = 2, 3


@register
@dataclass(frozen=True)
class FoldMasks(Pass):
    """Reads the mask of each `attention` as a condition on (batch, head, query i, key j).

    With T queries and U keys, `j <= i + U - T` becomes `causal`, `i + U - T - j < w` becomes `window`,
    what always holds goes, and what remains are conditions on tensors, such as "key j is no padding":
    they become a boolean mask of the smallest shape that says it, usually [B,1,1,U]. An additive mask
    counts if it adds 0 or hides (-inf, or at most -1e4); a bias next to it stays as the mask.

    Masks are read through arange, comparisons, and/or/not, where, tril, casts, moves, indexing, running sums
    of constants. A mask that is not understood as a whole stays, which is as correct: two-sided and chunked
    windows, masks read from a buffer or computed from positions that the user gives.
    """

    name: ClassVar[str] = "fold_masks"

    def run(self, graph: Graph) -> Graph:
        """The graph with masks folded into the attention ops that read them."""
        facts: list[Facts] = []

        def step(op: Op, flow: Dataflow, at: Builder) -> Operand:
            if op.name not in ("attention", "attention_weights"):
                return None
            if not facts:
                facts.append(Facts(flow.definitions, graph.dims))
            position = 3 if op.name == "attention" else 2
            if len(op.operands) <= position or op.operands[position] is None:
                return None
            return _fold(op, position, facts[0], flow, at)

        return replace_ops(graph, step)


def _fold(op: Op, position: int, facts: Facts, flow: Dataflow, at: Builder) -> Operand:
    mask = op.operands[position]
    bias, hiding, condition = _condition(mask, facts, flow)
    folded = _folded(op, condition, facts, at, hiding) if condition is not None else None
    if folded is None or (bias is not None and folded[1] is not None):
        plain = _boolean(mask, facts, flow)
        return _masked(op, position, plain, op.attrs, at) if plain != mask else None
    attrs, visible = folded
    if bias is None and visible == mask and attrs == op.attrs:
        return None
    return _masked(op, position, visible if bias is None else bias, attrs, at)


def _masked(op: Op, position: int, mask: Operand, attrs: Mapping[str, Attr], at: Builder) -> Value:
    """The op with another mask."""
    return build(at, op.name, *op.operands[:position], mask, *op.operands[position + 1:], attrs=attrs)


def _condition(mask: Operand, facts: Facts, flow: Dataflow) -> tuple[Operand, Operand, Predicate | None]:
    """The bias that a mask adds, the part of it that hides, and the condition under which that lets through."""
    fact = facts.of(mask)
    if fact is None:
        total = flow.op(mask, "add")
        parts = [(facts.of(o), o) for o in total.operands] if total is not None else []
        for (own, hiding), (other, bias) in (parts, parts[::-1]) if parts else ():
            if other is None and isinstance(own, Choice):
                return bias, hiding, _visible(own)
        return None, mask, None
    visible = fact if isinstance(fact, Predicate) else _visible(fact) if isinstance(fact, Choice) else None
    return None, mask, visible


def _visible(choice: Choice) -> Predicate | None:
    if choice.yes == 0 and choice.no <= MASKED:
        return choice.predicate
    return choice.predicate.opposite() if choice.no == 0 and choice.yes <= MASKED else None


def _boolean(mask: Operand, facts: Facts, flow: Dataflow) -> Operand:
    """The mask without an expand around it, and as a boolean where `where` made numbers of one."""
    choice = facts.of(mask)
    expanded = flow.op(mask, "expand")
    mask = expanded.operands[0] if expanded is not None else mask
    if not isinstance(choice, Choice) or choice.yes != 0 or choice.no > MASKED:
        return mask
    chosen = flow.op(mask, "where")
    if chosen is None or flow.number(chosen.operands[1]) != 0 or flow.number(chosen.operands[2]) is None:
        return mask
    condition = chosen.operands[0]
    expanded = flow.op(condition, "expand")
    return expanded.operands[0] if expanded is not None else condition


def _folded(op: Op, condition: Predicate, facts: Facts, at: Builder,
            mask: Operand) -> tuple[Mapping[str, Attr], Operand] | None:
    """The attributes and mask that say the same; None where that cannot be said."""
    q, k = (type_of(o).shape for o in op.operands[:2])
    if condition.negated or not fits_scores(mask, op.operands[0], op.operands[1]):
        return None
    shape, own = (q[0], q[1], q[2], k[2]), type_of(mask).rank
    indices = [Affine(0, tuple(int(a == 4 - own + b) for a in range(4))) for b in range(own)]
    attrs: dict[str, Attr] = dict(op.attrs)
    looks: list[Look] = []
    for atom in sorted((atom.at(indices, 4) for atom in condition.atoms), key=str):
        if isinstance(atom, Look):
            looks.append(atom)
        elif not _as_attribute(atom, shape, attrs, op, facts):
            return None
    visible: Operand = None
    for look in looks:
        seen = mask if _is_itself(look, mask) else _built(look, shape, at)
        if seen is None:
            return None
        visible = seen if visible is None else at.logical_and(visible, seen)
    return attrs, visible


def _as_attribute(bound: Bound, shape: tuple[Dim, ...], attrs: dict[str, Attr], op: Op, facts: Facts) -> bool:
    """Say a bound as `causal` or `window`; True if it could be said."""
    if facts.never_negative(bound.affine, shape):
        return True
    offset = shape[_KEY] - shape[_QUERY]
    if bound.affine == Affine(offset, (0, 0, 1, -1)):
        attrs["causal"] = True
        return True
    width = bound.affine.const + offset + 1
    if bound.affine.factors != (0, 0, -1, 1) or not isinstance(width, int) or width < 1:
        return False
    present = attr(op, "window")
    before = attrs.get("window", present)
    attrs["window"] = min(width, before) if isinstance(before, int) else width
    return True


def _is_itself(look: Look, mask: Operand) -> bool:
    """True for the atom that is the mask's own element."""
    plain = Facts({}, {}).of(mask)
    own = type_of(mask).rank
    indices = [Affine(0, tuple(int(a == 4 - own + b) for a in range(4))) for b in range(own)]
    return isinstance(plain, Predicate) and plain.at(indices, 4).atoms == {look}


def _built(look: Look, shape: tuple[Dim, ...], at: Builder) -> Operand:
    """A boolean tensor that broadcasts to `shape` and is true where the atom holds."""
    source: Value | Weight = look.source
    places: list[int] = []
    for dim, index in enumerate(look.indices):
        size = source.type.shape[dim]
        if not any(index.factors):
            if index.const != 0 or size != 1:
                return None
            continue
        if sum(index.factors) != 1 or any(f not in (0, 1) for f in index.factors):
            return None
        place = index.factors.index(1)
        if place in places:
            return None
        places.append(place)
        if size != shape[place] or index.const != 0:
            source = at.slice_(source, dim=dim, start=index.const, stop=index.const + shape[place])
    if source.type.dtype != "bool":
        source = at.cast(source, dtype="bool")
    if not look.wanted:
        source = at.logical_not(source)
    order = sorted(places)
    source = _reshaped(at, source, tuple(shape[p] for p in places))
    if order != places:
        source = at.permute(source, dims=tuple(places.index(p) for p in order))
    return _reshaped(at, source, tuple(shape[a] if a in places else 1 for a in range(4)))


def _reshaped(at: Builder, x: Value | Weight, shape: tuple[Dim, ...]) -> Value | Weight:
    """x in another shape; one that has only leading axes of size 1 less will do."""
    own = x.type.shape
    return x if (1,) * (len(shape) - len(own)) + own == shape else at.reshape(x, shape=shape)
