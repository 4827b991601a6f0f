"""Symbolic dimensions: an int, or a polynomial over named sizes such as `2*T + 1` or `(T - 1)//2`.

A `Dim` is `int | Sym`. `Sym` is kept in one canonical form, so equal expressions are equal objects
to `==`, whatever way they were computed. The text of a `Sym` is a Python expression: the printer
writes it, the parser reads it, and generated code evaluates it as it stands.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

from dlbc.errors import IRError

Dim: TypeAlias = "int | Sym"


@dataclass(frozen=True, slots=True)
class Call:
    """An atom that is no polynomial: `floordiv`, `mod`, `max` or `min` of two dims."""

    function: str
    left: int | Sym
    right: int | Sym

    def __str__(self) -> str:
        if self.function in ("max", "min"):
            return f"{self.function}({self.left}, {self.right})"
        sign = "//" if self.function == "floordiv" else "%"
        return f"{_wrap(self.left)}{sign}{_wrap(self.right)}"


Atom = str | Call
Monomial = tuple[Atom, ...]


@dataclass(frozen=True, slots=True)
class Sym:
    """A polynomial with integer coefficients: sorted `(monomial, coefficient)` terms, never constant."""

    terms: tuple[tuple[Monomial, int], ...]

    def __str__(self) -> str:
        text = ""
        for monomial, coefficient in self.terms:
            factors = [f"({atom})" if isinstance(atom, Call) and atom.function not in ("max", "min")
                       and (len(monomial) > 1 or coefficient not in ((1, -1) if text else (1,)))
                       else str(atom) for atom in monomial]
            if abs(coefficient) != 1 or not monomial:
                factors.insert(0, str(abs(coefficient)))
            sign = "-" if coefficient < 0 else "+"
            text += f" {sign} " + "*".join(factors)
        return text[3:] if text.startswith(" + ") else "-" + text[3:]

    def __add__(self, other: int | Sym) -> int | Sym:
        return _polynomial([*_terms(self), *_terms(other)])

    def __sub__(self, other: int | Sym) -> int | Sym:
        return self + (-other)

    def __mul__(self, other: int | Sym) -> int | Sym:
        return _polynomial([(a + b, x * y) for a, x in _terms(self) for b, y in _terms(other)])

    def __neg__(self) -> int | Sym:
        return self * -1

    def __rsub__(self, other: int) -> int | Sym:
        return -self + other

    __radd__ = __add__
    __rmul__ = __mul__

    def __floordiv__(self, other: int | Sym) -> int | Sym:
        exact = _exact_quotient(self, other)
        exact = _rounded_up_quotient(self, other) if exact is None else exact
        return exact if exact is not None else _atom(Call("floordiv", self, other))

    def __rfloordiv__(self, other: int) -> int | Sym:
        return _atom(Call("floordiv", other, self)) if other else 0

    def __mod__(self, other: int | Sym) -> int | Sym:
        return 0 if _exact_quotient(self, other) is not None else _atom(Call("mod", self, other))

    def __rmod__(self, other: int) -> int | Sym:
        return _atom(Call("mod", other, self)) if other else 0


def symbol(name: str) -> Sym:
    """The dim that is the size called `name`."""
    return Sym((((name,), 1),))


def maximum(left: int | Sym, right: int | Sym) -> int | Sym:
    """The larger of two dims."""
    return _extremum("max", left, right, max)


def minimum(left: int | Sym, right: int | Sym) -> int | Sym:
    """The smaller of two dims."""
    return _extremum("min", left, right, min)


def evaluate(dim: int | Sym, sizes: Mapping[str, int]) -> int:
    """The number a dim stands for under `sizes`; IRError names a size that is missing."""
    if isinstance(dim, int):
        return dim
    total = 0
    for monomial, coefficient in dim.terms:
        total += reduce(lambda product, atom: product * _evaluate_atom(atom, sizes), monomial, coefficient)
    return total


def substitute(dim: int | Sym, replacement: Mapping[str, int | Sym]) -> int | Sym:
    """The dim with named sizes replaced by other dims."""
    if isinstance(dim, int):
        return dim
    total: int | Sym = 0
    for monomial, coefficient in dim.terms:
        product: int | Sym = coefficient
        for atom in monomial:
            product = product * _substitute_atom(atom, replacement)
        total = total + product
    return total


def symbols(dim: int | Sym) -> set[str]:
    """The named sizes that a dim depends on."""
    if isinstance(dim, int):
        return set()
    found: set[str] = set()
    for monomial, _ in dim.terms:
        for atom in monomial:
            found |= {atom} if isinstance(atom, str) else symbols(atom.left) | symbols(atom.right)
    return found


def product(dims: tuple[int | Sym, ...]) -> int | Sym:
    """The product of dims: the number of elements of a shape."""
    total: int | Sym = 1
    for dim in dims:
        total = total * dim
    return total


def parse_dim(text: str) -> int | Sym:
    """Read a dim from its text; IRError where it is no dim expression."""
    try:
        return _from_ast(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError) as problem:
        raise IRError(f"`{text}` is not a dimension",
                      hint="write sizes, integers, + - * // %, max(a, b) and min(a, b)") from problem


def _terms(dim: int | Sym) -> tuple[tuple[Monomial, int], ...]:
    if isinstance(dim, int):
        return (((), dim),) if dim else ()
    return dim.terms


def _polynomial(terms: list[tuple[Monomial, int]]) -> int | Sym:
    total: dict[Monomial, int] = {}
    for monomial, coefficient in terms:
        key = tuple(sorted(monomial, key=str))
        total[key] = total.get(key, 0) + coefficient
    kept = sorted(((m, c) for m, c in total.items() if c), key=lambda term: (not term[0], str(term[0])))
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    return Sym(tuple(kept))


def _atom(call: Call) -> Sym:
    return Sym((((call,), 1),))


def _exact_quotient(left: Sym, right: int | Sym) -> int | Sym | None:
    divisor = _terms(right)
    if len(divisor) != 1:
        return 1 if left == right else None
    (atoms, coefficient), quotient = divisor[0], []
    for monomial, own in left.terms:
        rest = list(monomial)
        for atom in atoms:
            if atom not in rest:
                return None
            rest.remove(atom)
        if own % coefficient:
            return None
        quotient.append((tuple(rest), own // coefficient))
    return _polynomial(quotient)


def _rounded_up_quotient(left: Sym, right: int | Sym) -> int | Sym | None:
    """q for `(q*d + d - 1) // d` with d positive: how many steps of d lie in q*d numbers."""
    if len(_terms(right)) != 1 or _terms(right)[0][1] <= 0:
        return None
    spare = left - (right - 1)
    return _exact_quotient(spare, right) if isinstance(spare, Sym) else 0 if spare == 0 else None


def _extremum(name: str, left: int | Sym, right: int | Sym, of: Callable[[int, int], int]) -> int | Sym:
    if isinstance(left, int) and isinstance(right, int):
        return of(left, right)
    if left == right:
        return left
    first, second = sorted((left, right), key=str)
    return _atom(Call(name, first, second))


def _wrap(dim: int | Sym) -> str:
    text = str(dim)
    return text if text.isidentifier() or text.isdigit() else f"({text})"


_APPLY: dict[str, Callable[[int | Sym, int | Sym], int | Sym]] = {
    "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "max": maximum, "min": minimum,
}


def _evaluate_atom(atom: Atom, sizes: Mapping[str, int]) -> int:
    if isinstance(atom, Call):
        result = _APPLY[atom.function](evaluate(atom.left, sizes), evaluate(atom.right, sizes))
        assert isinstance(result, int)
        return result
    if atom not in sizes:
        raise IRError(f"the size of dimension `{atom}` is not known",
                      hint=f"known sizes: {', '.join(sorted(sizes)) or 'none'}")
    return sizes[atom]


def _substitute_atom(atom: Atom, replacement: Mapping[str, int | Sym]) -> int | Sym:
    if isinstance(atom, Call):
        return _APPLY[atom.function](substitute(atom.left, replacement), substitute(atom.right, replacement))
    return replacement.get(atom, symbol(atom))


def _from_ast(node: ast.expr) -> int | Sym:
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.Name(id=name):
            return symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_from_ast(operand)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _from_ast(left) + _from_ast(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _from_ast(left) - _from_ast(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _from_ast(left) * _from_ast(right)
        case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
            return _from_ast(left) // _from_ast(right)
        case ast.BinOp(left=left, op=ast.Mod(), right=right):
            return _from_ast(left) % _from_ast(right)
        case ast.Call(func=ast.Name(id=name), args=[left, right]) if name in ("max", "min"):
            return _APPLY[name](_from_ast(left), _from_ast(right))
    raise ValueError(ast.dump(node))
