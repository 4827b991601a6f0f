"""Passes: each reads one graph and returns one. One pass per file; a pass's fields are its options.

`parse("raise_norms,pair{composite=attnlrp}")` reads the text that `dlbc-opt -p` and reproducers use.
"""

from __future__ import annotations

import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import ClassVar, TypeVar

from dlbc.errors import IRError
from dlbc.ir.core import Graph
from dlbc.ir.verifier import verify

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass(ABC):
    """A graph-to-graph step. Subclasses are frozen dataclasses: `name`, options as fields, `run`."""

    name: ClassVar[str]

    @abstractmethod
    def run(self, graph: Graph) -> Graph:
        """The rewritten graph."""

    def __str__(self) -> str:
        stated = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return self.name + (f"{{{','.join(stated)}}}" if stated else "")


PASSES: dict[str, type[Pass]] = {}
P = TypeVar("P", bound=type[Pass])


def register(cls: P) -> P:
    """Class decorator: make the pass known by its name."""
    PASSES[cls.name] = cls
    return cls


def load_all() -> None:
    """Import every pass file, so that `PASSES` is complete."""
    for module in iter_modules(__path__):
        if not module.ispkg:
            import_module(f"{__name__}.{module.name}")


def parse(text: str) -> list[Pass]:
    """The passes that `a{option=value;option=value},b` names. IRError for unknown names and options."""
    load_all()
    found = []
    for name, options in re.findall(r"([\w-]+)(?:\{([^}]*)\})?\s*(?:,|$)", text.strip()):
        if name not in PASSES:
            near = get_close_matches(name, PASSES, 3)
            raise IRError(f"unknown pass `{name}`", hint=f"did you mean {', '.join(near) or ', '.join(PASSES)}?")
        found.append(_configured(PASSES[name], options))
    return found


def _configured(cls: type[Pass], text: str) -> Pass:
    known = {f.name: f.default for f in fields(cls) if f.repr}
    options: dict[str, object] = {}
    for item in filter(None, re.split(r"[;,]\s*", text)):
        key, _, value = item.partition("=")
        if key.strip() not in known:
            raise IRError(f"pass `{cls.name}` has no option `{key}`", hint=f"it has {', '.join(known) or 'none'}")
        options[key.strip()] = _option(cls, key.strip(), value.strip(), known[key.strip()])
    return cls(**options)


def _option(cls: type[Pass], key: str, text: str, default: object) -> object:
    """The value of an option from its text, of the type of its default."""
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return int(text) if isinstance(default, int) else float(text) if isinstance(default, float) else text
    except (KeyError, ValueError) as problem:
        raise IRError(f"`{text}` is no value for `{key}` of pass `{cls.name}`",
                      hint=f"give a {type(default).__name__}, such as {default}") from problem


def run(graph: Graph, passes: Iterable[Pass], *, observe: Callable[[Pass, Graph], None] | None = None) -> Graph:
    """Run passes in order. With DLBC_DEBUG set each result is verified; an error names the pass."""
    debug = bool(os.environ.get("DLBC_DEBUG"))
    for step in passes:
        graph = step.run(graph)
        log.debug("pass %s", step)
        if debug:
            try:
                verify(graph)
            except IRError as problem:
                raise IRError(f"after pass `{step}`: {problem.fact}", where=problem.where,
                              hint=problem.hint) from problem
        if observe is not None:
            observe(step, graph)
    return graph
