"""What is known of the elements of integer, boolean and mask tensors, as formulas of their indices.

The element of a tensor at index `(a0, a1, ...)` is one of four kinds of fact:

* `Affine`: a sum of sizes and indices with integer factors, such as `a3 + T - U`. `arange` is `a0`.
* `Element`: an element of a tensor that nothing more is known of, at affine indices.
* `Predicate`: a conjunction (or the negation of one) of atoms: `affine >= 0`, or "that element is true".
* `Choice`: one number where a predicate holds, another elsewhere. An additive mask is a choice of 0 and -inf.

`mask_rules.py` derives the fact of a value from the op that defines it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from dlbc.ir.core import Value, Weight
from dlbc.ir.dims import Dim


@dataclass(frozen=True, slots=True)
class Affine:
    """`const + sum(factors[k] * a_k)`, one factor per axis of the tensor."""

    const: Dim
    factors: tuple[int, ...]

    def plus(self, other: Affine, sign: int = 1) -> Affine:
        """The sum (sign=1) or difference (sign=-1)."""
        pairs = zip(self.factors, other.factors, strict=True)
        return Affine(self.const + sign * other.const, tuple(a + sign * b for a, b in pairs))

    def at(self, indices: Sequence[Affine], rank: int) -> Affine:
        """The same with other affine indices, over `rank` axes, in place of its own."""
        total = Affine(self.const, (0,) * rank)
        for factor, index in zip(self.factors, indices, strict=True):
            if factor:
                total = total.plus(Affine(index.const * factor, tuple(f * factor for f in index.factors)))
        return total


@dataclass(frozen=True, slots=True)
class Bound:
    """The atom `affine >= 0`."""

    affine: Affine

    def opposite(self) -> Bound:
        """`affine < 0`."""
        return Bound(Affine(-self.affine.const - 1, tuple(-f for f in self.affine.factors)))

    def at(self, indices: Sequence[Affine], rank: int) -> Bound:
        """The atom at other indices."""
        return Bound(self.affine.at(indices, rank))


@dataclass(frozen=True, slots=True)
class Look:
    """The atom: element `source[indices]` is true (or, not wanted, is not)."""

    source: Value | Weight
    indices: tuple[Affine, ...]
    wanted: bool = True

    def opposite(self) -> Look:
        """The element is not true."""
        return replace(self, wanted=not self.wanted)

    def at(self, indices: Sequence[Affine], rank: int) -> Look:
        """The atom at other indices."""
        return replace(self, indices=tuple(i.at(indices, rank) for i in self.indices))


Atom: TypeAlias = "Bound | Look"


@dataclass(frozen=True, slots=True)
class Predicate:
    """All atoms hold; or, negated, not all of them do."""

    atoms: frozenset[Atom] = frozenset()
    negated: bool = False

    def opposite(self) -> Predicate:
        """The negation; that of a single atom is an atom again."""
        if len(self.atoms) == 1:
            return Predicate(frozenset(atom.opposite() for atom in self.atoms), self.negated)
        return Predicate(self.atoms, not self.negated)

    def both(self, other: Predicate) -> Predicate | None:
        """The conjunction; None where it has no such form."""
        if FALSE in (self, other):
            return FALSE
        if self.negated or other.negated:
            return self if other == TRUE else other if self == TRUE else None
        return Predicate(self.atoms | other.atoms)

    def at(self, indices: Sequence[Affine], rank: int) -> Predicate:
        """The predicate at other indices."""
        return Predicate(frozenset(atom.at(indices, rank) for atom in self.atoms), self.negated)


TRUE, FALSE = Predicate(), Predicate(negated=True)


@dataclass(frozen=True, slots=True)
class Choice:
    """`yes` where the predicate holds, else `no`."""

    predicate: Predicate
    yes: float
    no: float

    def at(self, indices: Sequence[Affine], rank: int) -> Choice:
        """The choice at other indices."""
        return replace(self, predicate=self.predicate.at(indices, rank))


@dataclass(frozen=True, slots=True)
class Element:
    """The number `source[indices]`."""

    source: Value | Weight
    indices: tuple[Affine, ...]

    def at(self, indices: Sequence[Affine], rank: int) -> Element:
        """The element at other indices."""
        return replace(self, indices=tuple(i.at(indices, rank) for i in self.indices))


Fact: TypeAlias = "Affine | Element | Predicate | Choice"
