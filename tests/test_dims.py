"""Symbolic sizes: arithmetic agrees with numbers, equal expressions are equal, and the text reads back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlbc.errors import IRError
from dlbc.ir.dims import (
    Dim,
    Sym,
    evaluate,
    maximum,
    minimum,
    parse_dim,
    product,
    substitute,
    symbol,
    symbols,
)

B, T = symbol("B"), symbol("T")
NAMES = ("B", "T", "s0")
SIZES = st.fixed_dictionaries({name: st.integers(1, 40) for name in NAMES})
OPERATIONS: dict[str, Callable[[Dim, Dim], Dim]] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "//": lambda a, b: a // b,
    "%": lambda a, b: a % b, "max": maximum, "min": minimum}
NUMBERS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "//": lambda a, b: a // b,
    "%": lambda a, b: a % b, "max": max, "min": min}

LEAVES = st.one_of(st.integers(-9, 9), st.sampled_from([symbol(name) for name in NAMES]))
DIVISORS = st.one_of(st.integers(1, 9), st.sampled_from([symbol(name) for name in NAMES]))


def _combined(parts: st.SearchStrategy[Dim]) -> st.SearchStrategy[Dim]:
    return st.one_of(
        st.builds(lambda sign, a, b: OPERATIONS[sign](a, b), st.sampled_from(["+", "-", "*", "max", "min"]),
                  parts, parts),
        st.builds(lambda sign, a, b: OPERATIONS[sign](a, b), st.sampled_from(["//", "%"]), parts, DIVISORS))


DIMS: st.SearchStrategy[Dim] = st.recursive(LEAVES, _combined, max_leaves=6)


@given(a=DIMS, b=DIMS, sign=st.sampled_from(["+", "-", "*", "max", "min"]), sizes=SIZES)
def test_arithmetic_agrees_with_numbers(a: Dim, b: Dim, sign: str, sizes: dict[str, int]) -> None:
    expected = NUMBERS[sign](evaluate(a, sizes), evaluate(b, sizes))
    assert evaluate(OPERATIONS[sign](a, b), sizes) == expected


@given(a=DIMS, b=DIVISORS, sizes=SIZES)
def test_division_agrees_with_numbers(a: Dim, b: Dim, sizes: dict[str, int]) -> None:
    numbers = evaluate(a, sizes), evaluate(b, sizes)
    assert evaluate(a // b, sizes) == numbers[0] // numbers[1]
    assert evaluate(a % b, sizes) == numbers[0] % numbers[1]


@given(a=DIMS, b=DIMS, c=DIMS)
def test_equal_expressions_are_equal(a: Dim, b: Dim, c: Dim) -> None:
    assert a + b == b + a
    assert a * b == b * a
    assert (a + b) + c == a + (b + c)
    assert a * (b + c) == a * b + a * c
    assert a - a == 0
    assert maximum(a, b) == maximum(b, a)


@given(dim=DIMS, sizes=SIZES)
def test_the_text_reads_back(dim: Dim, sizes: dict[str, int]) -> None:
    """With and without spaces; and as Python it has the value of the dim, which generated code relies on."""
    assert parse_dim(str(dim)) == dim
    assert parse_dim(str(dim).replace(" ", "")) == dim
    assert eval(str(dim), {"max": max, "min": min}, dict(sizes)) == evaluate(dim, sizes)


@given(dim=DIMS, inner=DIMS, sizes=SIZES)
def test_substituting_is_evaluating_in_two_steps(dim: Dim, inner: Dim, sizes: dict[str, int]) -> None:
    size = evaluate(inner, sizes)
    if size >= 1:
        assert evaluate(substitute(dim, {"T": inner}), sizes) == evaluate(dim, {**sizes, "T": size})


@given(dim=DIMS)
def test_a_dim_without_symbols_is_an_int(dim: Dim) -> None:
    """A `Sym` is never constant; it depends on exactly its `symbols`."""
    assert isinstance(dim, int) or (isinstance(dim, Sym) and symbols(dim))
    assert isinstance(substitute(dim, {name: 7 for name in symbols(dim)}), int)


@pytest.mark.parametrize(("dim", "text"), [
    (2 * T + 1, "2*T + 1"), (1 - T, "-T + 1"), ((T - 1) // 2, "(T - 1)//2"), (-(T // 2), "-(T//2)"),
    (B - T // 2, "B - T//2"), (-(T % 3), "-(T%3)"), (T * B, "B*T"), (T * T, "T*T"), (7 % T, "7%T"), (7 // T, "7//T"),
    (maximum(T, 2 * B), "max(2*B, T)"), ((T + 1) // 2 * 3, "3*((T + 1)//2)"), (product((B, 3, T)), "3*B*T"),
], ids=str)
def test_how_it_reads(dim: Dim, text: str) -> None:
    assert str(dim) == text


@pytest.mark.parametrize(("dim", "expected"), [
    (6 * T // 3, 2 * T), (T * B // T, B), ((T * B + T - 1) // T, B), ((T - 1) // T, 0), ((2 * T + 1) // 2, T),
    ((4 * T + 2) // 2, 2 * T + 1), (4 * T % 2, 0), (T - T, 0), (T // 1, T),
    (maximum(3, 5), 5), (maximum(T, T), T), (product(()), 1),
], ids=str)
def test_what_simplifies(dim: Dim, expected: Dim) -> None:
    assert dim == expected


@pytest.mark.parametrize("text", ["", "T +", "T/2", "f(T)", "1.5", "T**2", "'T'", "1//0", "max(T)", "T\n1"])
def test_what_is_no_dim(text: str) -> None:
    with pytest.raises(IRError, match="is not a dimension"):
        parse_dim(text)


def test_a_size_that_is_not_known() -> None:
    with pytest.raises(IRError, match=r"dimension `T` is not known\n  hint: known sizes: B"):
        evaluate(2 * T, {"B": 3})
