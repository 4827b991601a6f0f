"""What the catalogue's annotations ask of an op: literals where they are welcome, attributes of the right kind.

`ops.infer` computes types; this makes sure beforehand that what it computes with is what it expects. An
artifact from a stranger is checked here too, before a backend writes its attributes into source.
"""

from __future__ import annotations

import inspect
import re
from functools import cache

from dlbc.errors import IRError
from dlbc.ir.core import Attr, Attrs, Operand, Value, Weight
from dlbc.ir.dims import Sym
from dlbc.ir.ops import definition

_LISTS = {"tuple[int, ...]": "a list of integers", "tuple[Dim, ...]": "a list of sizes",
          "tuple[float, ...]": "a list of numbers",
          "tuple[tuple[Dim, Dim], ...]": "a list of pairs of sizes"}
_KINDS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a string",
          "Dim": "a size", "Sym": "a size", "None": "none", **_LISTS}


def check(name: str, operands: tuple[Operand, ...], attrs: Attrs) -> None:
    """Raise IRError where an operand or attribute is not of the kind that the op asks for."""
    entry, (positional, rest, keywords) = definition(name), _signature(name)
    for number, operand in enumerate(operands):
        annotation = positional[number] if number < len(positional) else rest
        if isinstance(operand, (Value, Weight)) or not annotation:
            continue
        if operand is None and "None" in annotation:
            continue
        if operand is None or "Scalar" not in annotation:
            role = entry.operands[min(number, len(entry.operands) - 1)]
            shown = "none" if operand is None else str(operand)
            raise IRError(f"`{role}` of `{name}` must be a value or weight, not {shown}", hint=entry.summary)
    for key, value in attrs.items():
        annotation = keywords.get(key, "Attr")
        if not fits(value, annotation):
            kinds = " or ".join(dict.fromkeys(_KINDS.get(kind, kind) for kind in annotation.split(" | ")))
            raise IRError(f"`{key}` of `{name}` must be {kinds}, not {value!r}", hint=entry.summary)


def fits(value: Attr, annotation: str) -> bool:
    """Whether an attribute's value is of the kind that an annotation such as `tuple[Dim, ...] | None` names."""
    return any(_is(value, kind) for kind in annotation.split(" | "))


def _is(value: Attr, kind: str) -> bool:
    match kind:
        case "Attr":
            return True
        case "None":
            return value is None
        case "bool":
            return isinstance(value, bool)
        case "str":
            return isinstance(value, str)
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case "Dim" | "Sym":
            return isinstance(value, (int, Sym)) and not isinstance(value, bool)
        case "tuple[Dim, Dim]":
            return isinstance(value, tuple) and len(value) == 2 and all(_is(item, "Dim") for item in value)
    element = re.fullmatch(r"tuple\[(.*), \.\.\.\]", kind)
    if element is None:
        raise IRError(f"the catalogue uses `{kind}`, which dlbc/ir/signature.py does not know")
    return isinstance(value, tuple) and all(_is(item, element[1]) for item in value)


@cache
def _signature(name: str) -> tuple[tuple[str, ...], str, dict[str, str]]:
    """Annotations of an op's operands, of its variadic operand (or ""), and of its attributes."""
    parameters = inspect.signature(definition(name).infer).parameters.values()
    return (tuple(str(p.annotation) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD),
            next((str(p.annotation) for p in parameters if p.kind is p.VAR_POSITIONAL), ""),
            {p.name: str(p.annotation) for p in parameters if p.kind is p.KEYWORD_ONLY})
