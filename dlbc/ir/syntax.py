"""What printer and parser agree on: which names stand bare, how others are quoted, a rule's parameters.

The whole form is described in `docs/ir.md`.
"""

from __future__ import annotations

import json
import re
from functools import cache

NAME = r"[A-Za-z0-9_.$/@-]+"
"""A name after `%`, `@` or `#` that needs no quotes."""

PLACE = r"[A-Za-z0-9_.$/@*-]+"
"""A place that needs no quotes; in `model.layers.*.mlp`, of a function, the star stands for each caller's own part."""

WORD = r"[A-Za-z_][A-Za-z0-9_.]*"
"""The name of an op, rule, attribute, template or class that needs no quotes."""

CONSTANTS: dict[str, float | bool | None] = {
    "none": None, "true": True, "false": False, "inf": float("inf"), "nan": float("nan")}
"""Words that are literals, and so cannot name a dimension."""

RULE_PARAMETERS: dict[str, tuple[str, ...]] = {
    "": ("eps",), "epsilon": ("eps",), "gamma": ("gamma", "eps"), "alpha_beta": ("alpha", "beta"),
    "absolute": ("low", "high"), "zbox": ("low", "high")}
"""Names of the parameters that the text gives by position: `<epsilon(1e-06)>` is `eps=1e-06`."""

_NAME, _PLACE, _WORD = re.compile(NAME), re.compile(PLACE), re.compile(WORD)


@cache
def quoted(name: str) -> str:
    """A name as it stands after its sigil: bare where that reads back, else in quotes."""
    return name if _NAME.fullmatch(name) else json.dumps(name)


@cache
def quoted_place(place: str) -> str:
    """A place as it stands after `#`: bare where that reads back, else in quotes."""
    return place if _PLACE.fullmatch(place) else json.dumps(place)


@cache
def word(name: str) -> str:
    """A name without a sigil: bare where that reads back, else in quotes."""
    return name if _WORD.fullmatch(name) else json.dumps(name)
