"""Python text for what the IR holds: names of values, literals, sizes, lists that wrap."""

from __future__ import annotations

import json
import keyword
import math
import re
import textwrap
from collections.abc import Iterable, Sequence

from dlbc.ir.core import Attr
from dlbc.ir.dims import Sym

WIDTH = 108
"""Columns of generated code."""

RESERVED = frozenset({*keyword.kwlist, "max", "min", "slice", "range", "tuple", "w", "p", "state", "given", "device",
                      "torch", "F", "np", "kernels", "inf", "nan", "prepare", "forward", "relevance",
                      "INPUTS", "OUTPUTS", "SEEDS", "RELEVANCE"})
"""Names that generated code gives another meaning to."""


NUMBER = "f32_"
"""How names of a module's constants begin, and no others."""


class Names:
    """Identifiers of one Python scope: `%M.h` is `M_h`, made unique where two names would meet."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = {*RESERVED, *taken}
        self._names: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        """The identifier of an IR name, the same at every use."""
        if name not in self._names:
            stem = re.sub(r"[^0-9A-Za-z_]", "_", name.removeprefix("@"))
            plain = stem.strip("_") and not stem[0].isdigit() and not stem.startswith(NUMBER)
            stem = stem if plain else f"v{stem}"
            chosen, number = stem, 0
            while chosen in self._taken:
                number += 1
                chosen = f"{stem}_{number}"
            self._taken.add(chosen)
            self._names[name] = chosen
        return self._names[name]


def literal(value: Attr) -> str:
    """The Python expression of an attribute or literal operand."""
    if isinstance(value, tuple):
        return tuple_of([literal(item) for item in value])
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def tuple_of(texts: Sequence[str]) -> str:
    """The expression of a tuple of expressions."""
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"


def grouped(text: str) -> str:
    """An expression that binds tightly enough for an operator: a name or a number as it stands."""
    return text if re.fullmatch(r"[\w.]+(\[\"[^\"]*\"\])?", text) else f"({text})"


def assigned(names: Sequence[str], source: str) -> list[str]:
    """`a, b = source`, over several lines where it is long."""
    if not names:
        return []
    left = ", ".join(names) if len(names) > 1 else f"({names[0]},)"
    if len(left) + len(source) + 7 <= WIDTH:
        return [f"{left} = {source}"]
    return ["(", *wrapped(left), f") = {source}"]


def deleted(names: Sequence[str]) -> list[str]:
    """`del a, b`, over several lines where it is long."""
    line = f"del {', '.join(names)}"
    return ([line] if len(line) <= WIDTH else listed(names, "del (", ")")) if names else []


def listed(names: Sequence[str], opening: str, closing: str) -> list[str]:
    """`opening a, b closing`, over several lines where it is long; a tuple of one gets its comma."""
    inside = ", ".join(names) + ("," if len(names) == 1 and closing == ")" else "")
    if len(opening) + len(inside) + len(closing) + 4 <= WIDTH:
        return [f"{opening}{inside}{closing}"]
    return [opening, *wrapped(inside), closing]


def wrapped(text: str) -> list[str]:
    """Comma-separated text in indented lines."""
    return textwrap.wrap(text, WIDTH - 8, initial_indent="    ", subsequent_indent="    ",
                         break_long_words=False, break_on_hyphens=False)


def is_size(dim: object) -> bool:
    """True for a dim that is one named size, which a shape can bind."""
    return isinstance(dim, Sym) and str(dim).isidentifier()
