"""What raising passes share: ask what an operand is computed from, and replace ops where a pattern is found.

A raising pass finds the last op of a pattern and puts one op of the catalogue in its place; what only the
pattern needed is dead then, and `eliminate_dead` removes it. The proof is always the dataflow.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dlbc.ir.builder import Builder
from dlbc.ir.core import Attrs, Graph, Op, Operand, Type, Value, Weight, values
from dlbc.ir.dims import Dim, product
from dlbc.ir.ops import axis
from dlbc.passes.rewrite import rewrite, with_prepared


@dataclass
class Dataflow:
    """Who defines a value, how often it is read, and which values are constants of the model."""

    definitions: dict[str, Op] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    constants: set[str] = field(default_factory=set)
    _followed: int = 0

    @classmethod
    def of(cls, graph: Graph, section: str = "forward") -> Dataflow:
        """The dataflow before a rewrite of one section: definitions of the sections before it."""
        flow = cls()
        for name, part in graph.sections():
            if name == section:
                break
            flow.definitions |= part.definitions()
        flow.constants = {r.name for op in graph.prepare.ops for r in op.results}
        for _, part in graph.sections():
            flow.uses.update(v.name for op in part.ops for v in values(op.inputs))
            flow.uses.update(v.name for v in (*part.results, *part.saves))
        return flow

    def follow(self, builder: Builder) -> None:
        """Take in the ops that were appended since the last call."""
        for op in builder.ops[self._followed:]:
            for result in op.results:
                self.definitions[result.name] = op
        self._followed = len(builder.ops)

    def op(self, operand: Operand, *names: str) -> Op | None:
        """The op that defines an operand, if it is one of `names` (any op when there are none)."""
        found = self.definitions.get(operand.name) if isinstance(operand, Value) else None
        return found if found is not None and (not names or found.name in names) else None

    def single(self, operand: Operand) -> bool:
        """True when exactly one operand in the graph reads this value."""
        return isinstance(operand, Value) and self.uses[operand.name] == 1

    def constant(self, operand: Operand) -> bool:
        """True for weights and for what `prepare` computes from them."""
        return isinstance(operand, Weight) or (isinstance(operand, Value) and operand.name in self.constants)

    def number(self, operand: Operand) -> float | None:
        """The number an operand is wherever one looks: a literal, or a tensor filled with one."""
        if isinstance(operand, (int, float)) and not isinstance(operand, bool):
            return operand
        filled = self.op(operand, "full")
        if filled is None:
            cast = self.op(operand, "cast", "expand", "reshape")
            return self.number(cast.operands[0]) if cast and floating(operand) else None
        value = filled.attrs["value"]
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def with_number(self, op: Op | None) -> tuple[Operand, float] | None:
        """`(x, c)` of a binary op that commutes, where one operand is the number c."""
        for a, b in orders(op) if op is not None else ():
            number = self.number(b)
            if number is not None and self.number(a) is None:
                return a, number
        return None

    def uncast(self, operand: Operand) -> Operand:
        """The operand before casts from one floating type to another."""
        while (cast := self.op(operand, "cast")) is not None and floating(cast.operands[0]) and floating(operand):
            operand = cast.operands[0]
        return operand

    def factors(self, operand: Operand, whole: Operand = None, depth: int = 6) -> tuple[float, list[Operand]]:
        """An operand as a product: a number, and the factors that are none (x ** 3 is x three times).

        `whole` is a value that is not taken apart.
        """
        number = self.number(operand)
        if number is not None:
            return number, []
        op = self.op(operand, "mul", "div", "neg", "pow") if depth and operand != whole else None
        if op is None:
            return 1.0, [operand]
        left, lefts = self.factors(op.operands[0], whole, depth - 1)
        if op.name == "neg":
            return -left, lefts
        right, rights = self.factors(op.operands[1], whole, depth - 1)
        if op.name == "mul":
            return left * right, lefts + rights
        if op.name == "div" and not rights and right:
            return left / right, lefts
        if op.name == "pow" and not rights and right in (2.0, 3.0):
            return float(left ** right), lefts * int(right)
        return 1.0, [operand]


def orders(op: Op) -> Iterator[tuple[Operand, Operand]]:
    """The two operands of a binary op in both orders."""
    a, b = op.operands
    yield a, b
    yield b, a


def close(number: float | None, expected: float) -> bool:
    """True for a number that differs from `expected` by rounding only."""
    return number is not None and math.isclose(number, expected, rel_tol=1e-6)


def floating(operand: Operand) -> bool:
    """True for a tensor of floating type."""
    return isinstance(operand, (Value, Weight)) and operand.type.floating


def last(operand: Operand, dim: object) -> bool:
    """True if `dim` names the last axis of a tensor."""
    rank = type_of(operand).rank
    return isinstance(dim, int) and rank > 0 and axis(rank, dim) == rank - 1


def type_of(operand: Operand) -> Type:
    """The type of a value or weight; a rank-0 stand-in for the rest."""
    return operand.type if isinstance(operand, (Value, Weight)) else Type("bool", ())


def as_type(at: Builder, value: Value, wanted: Type) -> Value | None:
    """The value with the element type that is wanted; None when its shape is another one."""
    if value.type.shape != wanted.shape:
        return None
    return value if value.type == wanted else at.cast(value, dtype=wanted.dtype)


def split(before: tuple[Dim, ...], after: tuple[Dim, ...]) -> list[tuple[Dim, ...]] | None:
    """The axes of `after` that each axis of `before` is split into, where a reshape only splits axes."""
    groups: list[tuple[Dim, ...]] = []
    position = 0
    for size in before:
        end = position + 1
        while end <= len(after) and product(after[position:end]) != size:
            end += 1
        if end > len(after):
            return None
        groups.append(after[position:end])
        position = end
    return groups if position == len(after) else None


def build(at: Builder, name: str, *operands: Operand, attrs: Attrs, place: str | None = None) -> Value:
    """Append the op `name` with attributes taken from another op; its first result."""
    append: Callable[..., Value] = getattr(at, name)
    return append(*operands, **attrs) if place is None else append(*operands, place=place, **attrs)


Raise = Callable[[Op, Dataflow, Builder], "Operand"]
"""Gets an op, the dataflow before it and a builder; returns what stands for its first result, None to keep it."""


def replace_ops(graph: Graph, step: Raise, section: str = "forward") -> Graph:
    """Offer each op with one result to `step`, in order. Types never change; results stay values.

    What a step finds in `prepare` it may read: that is returned there, then.
    """
    flow = Dataflow.of(graph, section)
    kept = {v.name for v in getattr(graph, section).results}

    def offer(op: Op, at: Builder) -> tuple[Operand, ...] | None:
        flow.follow(at)
        before = len(at.ops)
        flow.definitions |= {r.name: op for r in op.results}
        new = step(op, flow, at) if len(op.results) == 1 else None
        fits = isinstance(new, Value) or op.result.name not in kept
        if new is None or not fits or (isinstance(new, (Value, Weight)) and new.type != op.result.type):
            del at.ops[before:]
            return None
        if isinstance(new, Value):
            flow.uses[new.name] += flow.uses[op.result.name]
        return (new,)

    return with_prepared(rewrite(graph, offer, section))
