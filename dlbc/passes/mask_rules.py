"""How the facts of `mask_facts.py` follow from ops: one rule per op.

An op without a rule gives an `Element` of its result (or its truth), so reasoning starts anew there; a
fact is never a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dlbc.ir.core import Op, Operand, Type, Value, Weight
from dlbc.ir.dims import Dim, Sym
from dlbc.ir.ops import attr, axis, definition
from dlbc.passes.mask_facts import FALSE, TRUE, Affine, Bound, Choice, Element, Fact, Look, Predicate
from dlbc.passes.match import split
from dlbc.passes.raise_attention import MASKED


@dataclass
class Facts:
    """Facts about values, derived when asked for; `definitions` gives the op of each value."""

    definitions: Mapping[str, Op]
    ranges: Mapping[str, tuple[int, int]]
    known: dict[str, Fact | None] = field(default_factory=dict)

    def of(self, operand: Operand) -> Fact | None:
        """The fact of an operand; None for floating tensors that nothing is known of."""
        if isinstance(operand, bool):
            return TRUE if operand else FALSE
        if isinstance(operand, (int, Sym)):
            return Affine(operand, ())
        if isinstance(operand, float):
            return Choice(TRUE, operand, operand)
        if operand is None or isinstance(operand, Weight):
            return _unknown(operand) if operand is not None else None
        if operand.name not in self.known:
            op = self.definitions.get(operand.name)
            rule = _RULES.get(op.name) if op is not None else None
            fact = rule(self, op) if rule is not None and op is not None and op.result.name == operand.name else None
            known = _unknown(operand) if fact is None else _settled(fact, operand.type, self)
            self.known[operand.name] = known
        return self.known[operand.name]

    def aligned(self, op: Op) -> list[Fact] | None:
        """Facts of all operands over the axes of the result, to which they broadcast."""
        rank, found = op.result.type.rank, []
        for operand in op.operands:
            fact = self.of(operand)
            if fact is None:
                return None
            own = len(operand.type.shape) if isinstance(operand, (Value, Weight)) else 0
            found.append(fact.at([_axis(rank - own + k, rank) for k in range(own)], rank))
        return found

    def never_negative(self, affine: Affine, shape: tuple[Dim, ...]) -> bool:
        """True if an affine formula is provably >= 0 all over a tensor of this shape."""
        low = affine.const
        for factor, size in zip(affine.factors, shape, strict=True):
            if factor < 0:
                low = low + (size - 1) * factor
        return at_least(low, self.ranges) >= 0


def at_least(dim: Dim, ranges: Mapping[str, tuple[int, int]]) -> float:
    """A number that a dim is never below."""
    if isinstance(dim, int):
        return dim
    total = 0.0
    for monomial, coefficient in dim.terms:
        bounds = [ranges.get(atom, (0, float("inf"))) if isinstance(atom, str) else None for atom in monomial]
        low = high = 1.0
        for bound in bounds:
            if bound is None:
                return float("-inf")
            low, high = low * bound[0], high * bound[1]
        total += coefficient * (low if coefficient > 0 else high)
    return total


def _axis(index: int, rank: int) -> Affine:
    return Affine(0, tuple(int(k == index) for k in range(rank)))


def _unknown(operand: Value | Weight) -> Fact | None:
    """An element of the tensor itself."""
    rank = operand.type.rank
    indices = tuple(Affine(0, (0,) * rank) if size == 1 else _axis(k, rank)
                    for k, size in enumerate(operand.type.shape))
    if operand.type.dtype == "bool":
        return Predicate(frozenset((Look(operand, indices),)))
    return None if operand.type.floating else Element(operand, indices)


def _settled(fact: Fact, of: Type, facts: Facts) -> Fact:
    """Indices of axes of size 1 are 0; bounds that always (never) hold go."""
    rank = of.rank
    indices = [Affine(0, (0,) * rank) if size == 1 else _axis(k, rank) for k, size in enumerate(of.shape)]
    fact = fact.at(indices, rank)
    if isinstance(fact, Choice):
        if fact.yes < fact.no:  # so that a mask is 0 where its predicate holds, however it was written
            fact = Choice(fact.predicate.opposite(), fact.no, fact.yes)
        return replace(fact, predicate=_decided(fact.predicate, of.shape, facts))
    return _decided(fact, of.shape, facts) if isinstance(fact, Predicate) else fact


def _decided(predicate: Predicate, shape: tuple[Dim, ...], facts: Facts) -> Predicate:
    kept = []
    for atom in predicate.atoms:
        if isinstance(atom, Bound) and facts.never_negative(atom.affine, shape):
            continue
        if isinstance(atom, Bound) and facts.never_negative(atom.opposite().affine, shape):
            return TRUE if predicate.negated else FALSE
        kept.append(atom)
    if predicate.negated and len(kept) == 1:
        return Predicate(frozenset((kept[0].opposite(),)))
    return Predicate(frozenset(kept), predicate.negated)


# --- rules: one per op; None where the op gives nothing new -------------------------------------------

def _number(fact: Fact | None) -> float | None:
    """The number that a fact is everywhere."""
    if isinstance(fact, Affine) and isinstance(fact.const, int) and not any(fact.factors):
        return fact.const
    if isinstance(fact, Choice) and (fact.predicate == TRUE or fact.yes == fact.no):
        return fact.yes
    if isinstance(fact, Choice) and fact.predicate == FALSE:
        return fact.no
    return None


def _arange(facts: Facts, op: Op) -> Fact | None:
    start, step = attr(op, "start"), attr(op, "step")
    assert isinstance(start, (int, Sym)) and isinstance(step, int)
    return Affine(start, (step,))


def _full(facts: Facts, op: Op) -> Fact | None:
    value, rank, dtype = op.attrs["value"], op.result.type.rank, op.result.type.dtype
    if dtype == "bool":
        return (TRUE if value else FALSE) if isinstance(value, (bool, int, float)) else None
    if op.result.type.floating:
        return Choice(TRUE, float(value), float(value)) if isinstance(value, (int, float)) else None
    return Affine(int(value) if isinstance(value, bool) else value, (0,) * rank) if isinstance(
        value, (int, Sym)) else None


def _moved(facts: Facts, op: Op, indices: Sequence[Affine]) -> Fact | None:
    fact = facts.of(op.operands[0])
    return fact.at(indices, op.result.type.rank) if fact is not None else None


def _shape(operand: Operand) -> tuple[Dim, ...]:
    return operand.type.shape if isinstance(operand, (Value, Weight)) else ()


def _reshape(facts: Facts, op: Op) -> Fact | None:
    """Axes of size 1 that come and go; axes that fold others and are split again."""
    return _viewed(facts, op.operands[0], op.result.type)


def _viewed(facts: Facts, x: Operand, wanted: Type) -> Fact | None:
    """The fact of x in another shape. Elementwise ops are seen through where axes are only split."""
    fact = _with_ones(facts, x, wanted.shape)
    op = facts.definitions.get(x.name) if fact is None and isinstance(x, Value) else None
    if op is None or isinstance(x, (int, float, Sym)) or x is None:
        return fact
    if op.name == "reshape":
        return _viewed(facts, op.operands[0], wanted)
    groups = split(x.type.shape, wanted.shape)
    if groups is None or not definition(op.name).elementwise or op.name not in _RULES:
        return None
    operands: list[Operand] = []
    for operand in op.operands:
        if not isinstance(operand, (Value, Weight)):
            operands.append(operand)
            continue
        own = groups[len(groups) - operand.type.rank:]
        shape = tuple(1 if size == 1 else part for size, group in zip(operand.type.shape, own, strict=True)
                      for part in group)
        view = Value(f"{operand.name} as {shape}", Type(operand.type.dtype, shape))
        part_fact = _viewed(facts, operand, view.type) if shape != operand.type.shape else facts.of(operand)
        if part_fact is None:
            return None
        facts.known[view.name] = _settled(part_fact, view.type, facts)
        operands.append(view)
    result = Value(f"{x.name} as {wanted.shape}", Type(x.type.dtype, wanted.shape))
    return _RULES[op.name](facts, Op(op.name, tuple(operands), (result,), op.attrs))


def _with_ones(facts: Facts, x: Operand, after: tuple[Dim, ...]) -> Fact | None:
    """Only where axes of size 1 come and go."""
    before = _shape(x)
    old = [k for k, size in enumerate(before) if size != 1]
    new = [k for k, size in enumerate(after) if size != 1]
    if [before[k] for k in old] != [after[k] for k in new]:
        return None
    places = dict(zip(old, new, strict=True))
    rank = len(after)
    fact = facts.of(x)
    return fact.at([_axis(places[k], rank) if k in places else Affine(0, (0,) * rank)
                    for k in range(len(before))], rank) if fact is not None else None


def _permute(facts: Facts, op: Op) -> Fact | None:
    dims, rank = op.attrs["dims"], op.result.type.rank
    assert isinstance(dims, tuple)
    order = [axis(rank, d) for d in dims if isinstance(d, int)]
    return _moved(facts, op, [_axis(order.index(k), rank) for k in range(rank)])


def _expand(facts: Facts, op: Op) -> Fact | None:
    rank, own = op.result.type.rank, len(_shape(op.operands[0]))
    return _moved(facts, op, [_axis(rank - own + k, rank) for k in range(own)])


def _slice(facts: Facts, op: Op) -> Fact | None:
    rank, dim, start, step = op.result.type.rank, op.attrs["dim"], attr(op, "start"), attr(op, "step")
    assert isinstance(dim, int) and isinstance(start, (int, Sym)) and isinstance(step, int)
    indices = [_axis(k, rank) for k in range(rank)]
    sliced = axis(rank, dim)
    indices[sliced] = Affine(start, tuple(step * f for f in indices[sliced].factors))
    return _moved(facts, op, indices)


def _select(facts: Facts, op: Op) -> Fact | None:
    rank, dim, index = op.result.type.rank, op.attrs["dim"], op.attrs["index"]
    assert isinstance(dim, int) and isinstance(index, (int, Sym))
    gone = axis(rank + 1, dim)
    if isinstance(index, int) and index < 0:
        index = _shape(op.operands[0])[gone] + index
    return _moved(facts, op, [Affine(index, (0,) * rank) if k == gone else _axis(k - (k > gone), rank)
                              for k in range(rank + 1)])


def _index(facts: Facts, op: Op) -> Fact | None:
    """Indexing by affine indices, provably not negative."""
    x, *tensors = op.operands
    dims = op.attrs["dims"] if op.name == "index" else (op.attrs["dim"],)
    assert isinstance(dims, tuple)
    own, rank = len(_shape(x)), op.result.type.rank
    first = axis(own, dims[0]) if isinstance(dims[0], int) else 0
    width = rank - (own - len(dims))
    taken: list[Affine] = []
    for tensor in tensors:
        fact, shape = facts.of(tensor), _shape(tensor)
        if not isinstance(fact, Affine) or not facts.never_negative(fact, shape):
            return None
        offset = first + width - len(shape)
        taken.append(fact.at([_axis(offset + k, rank) for k in range(len(shape))], rank))
    after = [_axis(k - len(dims) + width, rank) for k in range(first + len(dims), own)]
    return _moved(facts, op, [*(_axis(k, rank) for k in range(first)), *taken, *after])


def _cast(facts: Facts, op: Op) -> Fact | None:
    fact, dtype = facts.of(op.operands[0]), op.result.type.dtype
    number = _number(fact)
    if dtype == "bool":
        return _truth(fact)
    if isinstance(fact, Predicate):
        return Choice(fact, 1, 0)
    if isinstance(fact, Choice):
        return fact if op.result.type.floating or number is not None else None
    if isinstance(fact, Affine) and op.result.type.floating:
        if number is not None:
            return Choice(TRUE, number, number)
        return fact if dtype in ("f32", "f64") else None
    return fact if dtype in ("i64", "i32") and isinstance(fact, (Affine, Element)) else None


def _truth(fact: Fact | None) -> Predicate | None:
    """Where a number is not 0."""
    number = _number(fact)
    if number is not None:
        return TRUE if number else FALSE
    if isinstance(fact, Predicate):
        return fact
    if isinstance(fact, Element):
        return Predicate(frozenset((Look(fact.source, fact.indices),)))
    if isinstance(fact, Choice):
        return fact.predicate if not fact.no else fact.predicate.opposite() if not fact.yes else None
    return None


def _sum(facts: Facts, op: Op) -> Fact | None:
    found = facts.aligned(op)
    if found is None:
        return None
    a, b = found
    sign = 1 if op.name == "add" else -1
    if isinstance(a, Affine) and isinstance(b, Affine):
        return a.plus(b, sign)
    for one, other, flipped in ((a, b, False), (b, a, True)):
        number = _number(other)
        if isinstance(one, Choice) and number is not None:
            left, right = (number, sign) if flipped else (sign * number, 1)
            return Choice(one.predicate, left + right * one.yes, left + right * one.no)
    if isinstance(a, Choice) and isinstance(b, Choice) and sign == 1:
        return _masked_both(a, b)
    return None


def _masked_both(a: Choice, b: Choice) -> Fact | None:
    """The sum of two additive masks."""
    if max(a.no, b.no) > MASKED or a.yes or b.yes:
        return None
    both = a.predicate.both(b.predicate)
    return Choice(both, 0.0, min(a.no, b.no)) if both is not None else None


def _product(facts: Facts, op: Op) -> Fact | None:
    found = facts.aligned(op)
    if found is None:
        return None
    a, b = found
    if isinstance(a, Predicate) and isinstance(b, Predicate):
        return a.both(b)
    for one, other in ((a, b), (b, a)):
        number = _number(other)
        if isinstance(one, Choice) and number is not None:
            return Choice(one.predicate, _times(one.yes, number), _times(one.no, number))
        if isinstance(one, Affine) and isinstance(number, int):
            return Affine(one.const * number, tuple(f * number for f in one.factors))
    return None


def _times(a: float, b: float) -> float:
    return a * b + 0.0  # not -0.0


def _neg(facts: Facts, op: Op) -> Fact | None:
    fact = facts.of(op.operands[0])
    if isinstance(fact, Affine):
        return Affine(-fact.const, tuple(-f for f in fact.factors))
    return Choice(fact.predicate, _times(fact.yes, -1), _times(fact.no, -1)) if isinstance(fact, Choice) else None


def _compare(facts: Facts, op: Op) -> Fact | None:
    found = facts.aligned(op)
    if found is None:
        return None
    a, b = found
    if isinstance(a, Affine) and isinstance(b, Affine):
        return _ordered(op.name, a, b)
    for one, other, name in ((a, b, op.name), (b, a, _MIRRORED[op.name])):
        number = _number(other) if not isinstance(other, Predicate) else float(other == TRUE) if other in (
            TRUE, FALSE) else None
        if number is None:
            continue
        one = Choice(one, 1, 0) if isinstance(one, Predicate) else one
        if isinstance(one, Choice):
            yes, no = _COMPARE[name](one.yes, number), _COMPARE[name](one.no, number)
            if yes == no:
                return TRUE if yes else FALSE
            return one.predicate if yes else one.predicate.opposite()
        if isinstance(one, Element) and number == 0 and name in ("eq", "ne"):
            return Predicate(frozenset((Look(one.source, one.indices, wanted=name == "ne"),)))
    return None


_MIRRORED = {"eq": "eq", "ne": "ne", "lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
    "gt": lambda a, b: a > b, "le": lambda a, b: a <= b, "ge": lambda a, b: a >= b,
}


def _ordered(name: str, a: Affine, b: Affine) -> Predicate:
    """A comparison of affine formulas as bounds."""
    one = Affine(1, (0,) * len(a.factors))
    not_less, not_more = Bound(a.plus(b, -1)), Bound(b.plus(a, -1))
    if name in ("eq", "ne"):
        equal = Predicate(frozenset((not_less, not_more)))
        return equal if name == "eq" else equal.opposite()
    if name in ("ge", "le"):
        return Predicate(frozenset((not_less if name == "ge" else not_more,)))
    bound = not_less if name == "gt" else not_more
    return Predicate(frozenset((Bound(bound.affine.plus(one, -1)),)))


def _logic(facts: Facts, op: Op) -> Fact | None:
    found = facts.aligned(op)
    truths = [_truth(f) for f in found] if found is not None and op.result.type.dtype == "bool" else [None]
    if any(t is None for t in truths):
        return None
    first, *rest = (t for t in truths if t is not None)
    if op.name in ("logical_not", "bitwise_not"):
        return first.opposite()
    if op.name in ("logical_or", "bitwise_or"):
        neither = first.opposite().both(rest[0].opposite())
        return neither.opposite() if neither is not None else None
    return first.both(rest[0])


def _where(facts: Facts, op: Op) -> Fact | None:
    found = facts.aligned(op)
    if found is None:
        return None
    condition, a, b = found
    if not isinstance(condition, Predicate):
        return None
    if op.result.type.dtype == "bool":
        yes, no = _truth(a), _truth(b)
        if no == FALSE and yes is not None:
            return condition.both(yes)
        return condition.opposite().both(no) if yes == FALSE and no is not None else None
    yes_number, no_number = _number(a), _number(b)
    if yes_number is not None and no_number is not None:
        return Choice(condition, yes_number, no_number)
    if isinstance(a, Choice) and no_number is not None and not a.yes:
        return _masked_both(Choice(condition, 0.0, no_number), a)
    if isinstance(b, Choice) and yes_number is not None and not b.yes:
        return _masked_both(Choice(condition.opposite(), 0.0, yes_number), b)
    return None


def _triangle(facts: Facts, op: Op) -> Fact | None:
    """Zero on one side of a diagonal of the last two axes."""
    fact, rank, diagonal = facts.of(op.operands[0]), op.result.type.rank, attr(op, "diagonal")
    assert isinstance(diagonal, (int, Sym))
    above = _axis(rank - 1, rank).plus(_axis(rank - 2, rank), -1).plus(Affine(diagonal, (0,) * rank), -1)
    bound = Bound(above) if op.attrs["upper"] else Bound(Affine(0, (0,) * rank).plus(above, -1))
    inside = Predicate(frozenset((bound,)))
    number = _number(fact)
    if number is not None and op.result.type.dtype != "bool":
        return Choice(inside, number, 0)
    if isinstance(fact, Choice) and not fact.no:
        both = inside.both(fact.predicate)
        return Choice(both, fact.yes, 0) if both is not None else None
    return inside.both(fact) if isinstance(fact, Predicate) else None


def _cat(facts: Facts, op: Op) -> Fact | None:
    """Affine pieces that continue one another (the differences of position ids begin with such a cat)."""
    rank, dim = op.result.type.rank, op.attrs["dim"]
    assert isinstance(dim, int)
    along, whole = axis(rank, dim), None
    for operand in reversed(op.operands):
        fact, own = facts.of(operand), _shape(operand)[along]
        if not isinstance(fact, Affine):
            return None
        if whole is None:
            whole = fact
            continue
        whole = Affine(whole.const - own * whole.factors[along], whole.factors)
        here = [Affine(0, (0,) * rank) if k == along and own == 1 else _axis(k, rank) for k in range(rank)]
        if whole.at(here, rank) != fact:
            return None
    return whole


def _cumsum(facts: Facts, op: Op) -> Fact | None:
    """The running sum of a constant."""
    fact, dim, rank = facts.of(op.operands[0]), op.attrs["dim"], op.result.type.rank
    number = float(fact == TRUE) if fact in (TRUE, FALSE) else _number(fact)
    if number is None or op.result.type.floating or not isinstance(dim, int):
        return None
    return Affine(int(number), tuple(int(number) * (k == axis(rank, dim)) for k in range(rank)))


_RULES: dict[str, Callable[[Facts, Op], Fact | None]] = {
    "arange": _arange, "full": _full, "reshape": _reshape, "permute": _permute, "expand": _expand,
    "slice": _slice, "select": _select, "index": _index, "take": _index, "cast": _cast, "add": _sum, "sub": _sum,
    "mul": _product, "neg": _neg, "where": _where, "triangle": _triangle, "cat": _cat, "cumsum": _cumsum,
    **dict.fromkeys(("eq", "ne", "lt", "gt", "le", "ge"), _compare),
    **dict.fromkeys(("logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not"), _logic),
}
