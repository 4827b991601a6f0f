"""What is known of signs without running anything: values that are never negative, and what a ReLU lets back."""

from __future__ import annotations

from collections.abc import Iterable

from dlbc.ir.core import Graph, Op, Operand, Rule, Value
from dlbc.ir.ops import attr
from dlbc.passes.carriers import MOVES, data_operands

_ALWAYS = frozenset({"relu", "sigmoid", "hardsigmoid", "softmax", "exp", "abs", "sqrt", "rsqrt", "softplus"})
_KEEPS = MOVES | {"add", "mul", "div", "where", "max_pool", "adaptive_max_pool", "avg_pool", "adaptive_avg_pool",
                  "mean", "sum", "cumsum", "amax", "amin", "max_with_index", "min_with_index", "maximum", "minimum",
                  "topk", "sort", "scatter_add"}
"""Ops whose results are never negative where none of the numbers they read is."""
_LINEAR = frozenset({"linear", "linear_rows", "matmul", "einsum",
                     *(f"conv{transposed}{rank}d" for transposed in ("", "_transpose") for rank in (1, 2, 3))})
"""The same, and their weights and biases are among what they read."""


def nonnegative(graph: Graph) -> set[str]:
    """Names of the forward values of which all numbers are >= 0, whatever the inputs and weights."""
    found: set[str] = set()
    never_negative(graph.forward.ops, found)
    return found


def never_negative(ops: Iterable[Op], found: set[str]) -> None:
    """Add to `found`, the names known so far, those of the ops' results of which all numbers are >= 0."""
    for op in ops:
        if _is_nonnegative(op, found):
            found |= {r.name for r in op.results}


def _is_nonnegative(op: Op, found: set[str]) -> bool:
    if op.name in _ALWAYS:
        return True
    if op.name in _LINEAR:
        return all(known(o, found) for o in op.operands if o is not None)
    if op.name == "clamp":
        return _at_least_0(attr(op, "low"))
    if op.name == "pad" and not _at_least_0(attr(op, "value")):
        return False
    own = [known(o, found) for o in data_operands(op) if o is not None]
    return op.name in _KEEPS and bool(own) and (any(own) if op.name == "maximum" else all(own))


def known(operand: Operand, found: set[str]) -> bool:
    """True for a value in `found` and for a number >= 0."""
    return operand.name in found if isinstance(operand, Value) else _at_least_0(operand)


def _at_least_0(number: object) -> bool:
    return isinstance(number, int | float) and number >= 0


def rectifies(op: Op, rule: Rule) -> bool:
    """True where the rule of a forward op gives its operand the multiplier 0 wherever that operand is negative."""
    if op.name == "relu":
        return rule.name in ("identity", "gradient")
    return op.name == "clamp" and rule.name == "select" and _at_least_0(attr(op, "low"))
