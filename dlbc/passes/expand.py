"""Expand one rule: the primitives that a `rel.*` op stands for. Shared by `pair`, `lower` and the oracle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from dlbc.errors import IRError, RuleError
from dlbc.ir.core import Graph, Op, Rule, Value, values
from dlbc.passes.carriers import MOVES, carriers, data_operands
from dlbc.passes.differences import difference_facts, expand_difference
from dlbc.passes.rotations import rotations
from dlbc.passes.rules import RULES, Contributions, Expansion, Facts, load_rules, seeded
from dlbc.passes.signs import nonnegative
from dlbc.passes.varying import infinite


def facts(graph: Graph) -> Facts:
    """What rules may know of a graph."""
    return difference_facts(graph, Facts(carriers(graph), _softmaxes(graph), nonnegative=nonnegative(graph),
                                         rotations=rotations(graph), infinite=infinite(graph)))


def _softmaxes(graph: Graph) -> set[str]:
    found: set[str] = set()
    for op in graph.forward.ops:
        if op.name == "softmax" or (op.name in MOVES and any(v.name in found for v in values(op.operands[:1]))):
            found |= {r.name for r in op.results}
    return found


def expand_rule(op: Op, rule: Rule, incoming: Sequence[Value | None], known: Facts, taken: Iterable[str], form: str
                ) -> tuple[Expansion, Contributions]:
    """The primitives of a rule for a forward op (in the builder), and its contribution to each operand.

    `form`: what comes in, multipliers "M" or relevance "R".
    """
    load_rules()
    if (op.name, rule.name) not in RULES:
        named = ", ".join(sorted(name for kind, name in RULES if kind == op.name))
        raise RuleError(f"`{op.name}` has no rule `{rule.name}`", where=f"#{op.place}", hint=f"it has {named}")
    if known.reference:
        # A multiplier that a ReLU lets back is not 0 where the input is negative and the reference is not.
        at = Expansion(taken, replace(known, rectified=set()), place=op.place, of=op.result.name, form=form)
        contributed = expand_difference(at, op, rule, incoming)
    else:
        at = Expansion(taken, known, place=op.place, of=op.result.name, form=form)
        contributed = RULES[op.name, rule.name].expand(at, op, *incoming, **dict(rule.params))
    if len(contributed) != len(op.operands):
        raise IRError(f"rule `{rule.name}` of `{op.name}` gives {len(contributed)} contributions for "
                      f"{len(op.operands)} operands", where=f"#{op.place}")
    found = tuple(_checked(at, op, rule, operand, value)
                  for operand, value in zip(op.operands, contributed, strict=True))
    return at, found if any(v is not None for v in found) else _nothing(at, op)


def _nothing(at: Expansion, op: Op) -> Contributions:
    """Zeros to the first carrying operand, where all is absorbed: so the ledger still has the op."""
    first = next(o for o in data_operands(op) if at.carries(o))
    assert isinstance(first, Value)
    return tuple(at.zeros(seeded(o.type)) if o is first else None for o in op.operands)


def _checked(at: Expansion, op: Op, rule: Rule, operand: object, value: Value | None) -> Value | None:
    if value is None or not isinstance(operand, Value) or not at.carries(operand):
        return None
    wanted = seeded(operand.type)
    if value.type.rank == wanted.rank and value.type != wanted:
        value = at.widen(value, operand.type)
    if value.type != wanted:
        raise IRError(f"rule `{rule.name}` of `{op.name}` gives {value.type} for an operand that needs {wanted}",
                      where=f"#{op.place}")
    return value
