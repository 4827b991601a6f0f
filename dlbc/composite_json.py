"""A composite as JSON data, for files and for the text of passes, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlbc.auto import PLANS
from dlbc.composite import Composite
from dlbc.ir.core import Attr, Graph, Rule
from dlbc_runtime.arrays import Json
from dlbc_runtime.ledger import number_to_json


def composite_to_json(composite: Composite) -> dict[str, Json]:
    """The data of a composite; `entries` is None where an entry is a predicate: files carry no Python code."""
    entries: list[Json] | None = [[what, rule.name, [[name, _number(value)] for name, value in rule.params]]
                                  for what, rule in composite.entries if isinstance(what, str)]
    if any(not isinstance(what, str) for what, _ in composite.entries):
        entries = None
    return {"name": composite.name, "seed": composite.seed, "fallback": composite.fallback,
            "contrast": composite.contrast, "plan": composite.plan, "entries": entries}


def composite_from_json(data: Mapping[str, Any]) -> Composite:
    """The composite of `composite_to_json`. KeyError, TypeError, ValueError or RuleError for something else."""
    entries = [(str(what), Rule(str(name), tuple((str(key), _attr(value)) for key, value in params)))
               for what, name, params in data["entries"] or ()]
    return Composite(entries, name=str(data["name"]), fallback=data["fallback"],
                     seed="M" if data["seed"] == "M" else "R", contrast=str(data["contrast"]),
                     plan=_plan(data["plan"]))


def without_predicates(composite: Composite, graph: Graph) -> Composite:
    """The composite with the ops of a graph that a predicate chooses listed by name, in place of the predicate."""
    entries: list[tuple[str, Rule]] = []
    for what, rule in composite.entries:
        if isinstance(what, str):
            entries.append((what, rule))
        elif chosen := [f"%{op.result.name}" for op in graph.forward.ops if what(op)]:
            entries.append((" | ".join(chosen), rule))
    return composite.but(entries=tuple(entries))


def _plan(name: object) -> str:
    if name not in ("", *PLANS):
        raise ValueError(f"there is no plan `{name}`")
    return str(name)


def _attr(value: object) -> Attr:
    """A rule's parameter as it was before it became JSON, which has lists for tuples."""
    if isinstance(value, list):
        return tuple(map(_attr, value))
    if value in ("inf", "-inf"):
        return float(value)
    if not isinstance(value, bool | int | float | str | None):
        raise TypeError(f"a rule's parameter is {value!r}")
    return value


def _number(value: Attr) -> Json:
    if isinstance(value, tuple):
        return [_number(part) for part in value]
    if not isinstance(value, bool | int | float | str | None):
        raise TypeError(f"a rule's parameter is {value!r}")
    return number_to_json(value) if isinstance(value, float) else value  # JSON knows no infinity
