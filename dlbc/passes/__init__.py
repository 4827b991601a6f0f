"""Passes: each reads one graph and returns one. One pass per file; a pass's fields are its options.

`parse("raise_norms,pair{composite=attnlrp}")` reads the text that `dlbc-opt -p` and reproducers use, `str(step)` writes
it. `run` runs passes; where one fails, `reproducer.py` writes down the graph and the command that shows it.
"""

from __future__ import annotations

import json
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar, TypeVar

from dlbc.errors import DlbcError, IRError, LevelError
from dlbc.ir.core import Graph
from dlbc.ir.verifier import verify

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass(ABC):
    """A graph-to-graph step. Subclasses are frozen dataclasses: `name`, options as fields, `run`.

    An option is a number, a bool, a text, None, or a tuple of them. A field of another type has `metadata` with
    `write`, which turns it into text, and `read`, which reads that.
    """

    name: ClassVar[str]

    @abstractmethod
    def run(self, graph: Graph) -> Graph:
        """The rewritten graph."""

    def for_text(self, graph: Graph) -> Pass:
        """A pass that does the same to this graph and has nothing but options that have a text."""
        return self

    def __str__(self) -> str:
        stated = [f"{f.name}={_written(f, value)}" for f in fields(self)
                  if (value := getattr(self, f.name)) != _default(f)]
        return self.name + (f"{{{';'.join(stated)}}}" if stated else "")


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
    for item in _parts(text, ","):
        match = re.fullmatch(r"([\w-]+)\s*(?:\{(.*)\})?", item, re.DOTALL)
        name = match[1] if match else item
        if match is None or name not in PASSES:
            near = get_close_matches(name, PASSES, 3)
            raise IRError(f"unknown pass `{name}`", hint=f"did you mean {', '.join(near) or ', '.join(PASSES)}?")
        found.append(_configured(PASSES[name], match[2] or ""))
    return found


def run(graph: Graph, passes: Iterable[Pass], *, observe: Callable[[Pass, Graph], None] | None = None,
        verified: bool | None = None, reproducer: bool = True) -> Graph:
    """Run passes in order. `verified`: verify each result (None: where DLBC_DEBUG is set).

    PassError where a pass fails or its result is not well formed: it names the pass and, unless `reproducer` is false,
    a file with the graph before the pass and the `dlbc-opt` command that shows the failure. Errors that are the user's
    to mend (UnsupportedOpError, RuleError, InputError ...) come through as they are.
    """
    check = bool(os.environ.get("DLBC_DEBUG")) if verified is None else verified
    for step in passes:
        log.debug("pass %s", step)
        try:
            after = step.run(graph)
            if check:
                verify(after)
        except MemoryError:
            raise
        except Exception as problem:
            if isinstance(problem, LevelError) or (isinstance(problem, DlbcError) and not isinstance(problem, IRError)):
                raise
            from dlbc.passes.reproducer import explained

            raise explained(step, graph, problem, write=reproducer) from problem
        graph = after
        if observe is not None:
            observe(step, graph)
    return graph


# --- options as text -----------------------------------------------------------------------------------

_BARE = re.compile(r"[\w.*?/@$%+-]+(\{[\w=.,\s-]*\})?")
"""Texts that stand without quotes: names, globs, and presets with options."""


def _parts(text: str, separators: str) -> list[str]:
    """Text cut at separators, but not inside of brackets and quotes; empty parts are left out."""
    parts, start, depth = [], 0, 0
    for match in re.finditer(r'"(?:\\.|[^"\\])*"|.', text, re.DOTALL):
        token = match[0]
        depth += (token in "{[(") - (token in "}])")
        if token in separators and depth == 0:
            parts.append(text[start:match.start()])
            start = match.end()
    if depth:
        raise IRError(f"brackets do not match in `{text}`",
                      hint="write passes as `name{option=value;option=value},name`")
    return [part for part in (*map(str.strip, parts), text[start:].strip()) if part]


def _configured(cls: type[Pass], text: str) -> Pass:
    known = {f.name: f for f in fields(cls) if f.repr or f.metadata}
    options: dict[str, object] = {}
    for item in _parts(text, ";,"):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in known:
            raise IRError(f"pass `{cls.name}` has no option `{key}`", hint=f"it has {', '.join(known) or 'none'}")
        options[key] = _option(cls, known[key], value)
    return cls(**options)


def _option(cls: type[Pass], option: Field[Any], text: str) -> object:
    """The value of an option from its text, of the type of its default."""
    default = _default(option)
    try:
        return option.metadata["read"](text) if "read" in option.metadata else _value(text, default)
    except (KeyError, ValueError, TypeError) as problem:
        raise IRError(f"`{text}` is no value for `{option.name}` of pass `{cls.name}`",
                      hint=f"give a {type(default).__name__}, such as {_shown(default)}") from problem


def _value(text: str, default: object) -> object:
    """A text as the type of a default; as what it looks like where the default is None."""
    if isinstance(default, str):
        return str(json.loads(text)) if text.startswith('"') else text
    if text.lower() == "none":
        return None
    if isinstance(default, bool):
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if isinstance(default, tuple) or (default is None and text.startswith("[")):
        if not (text.startswith("[") and text.endswith("]")):
            raise ValueError(text)
        return tuple(_value(part, None) for part in _parts(text[1:-1], ","))
    if default is None:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return _value(text, "")
    return int(text) if isinstance(default, int) else float(text)


def _written(option: Field[Any], value: object) -> str:
    return str(option.metadata["write"](value)) if "write" in option.metadata else _shown(value)


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{','.join(map(_shown, value))}]"
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) and value.lower() not in ("true", "false", "none") else json.dumps(value)
    return repr(value)


def _default(option: Field[Any]) -> object:
    return option.default_factory() if option.default_factory is not MISSING else option.default
