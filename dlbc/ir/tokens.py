"""Tokens of a graph's text, and the steps over them that every part of the parser takes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import NoReturn, TypeVar

from dlbc.ir.core import DTYPES
from dlbc.ir.source import Spans
from dlbc.ir.syntax import NAME, PLACE, WORD

Item = TypeVar("Item")

_STRING = r'"(?:[^"\\\n]|\\.)*"'
# `%` and `//` mean modulo and floor division inside a size, where no space precedes them.
_TOKEN = re.compile(rf"""
    (?P<skip>[ \t\r\n]+|(?<!\S)//[^\n]*)
  | (?P<value>(?<![\w)])%(?:{NAME}|{_STRING}))
  | (?P<type>(?:{"|".join(DTYPES)})\[[^\]\n]*\])
  | (?P<word>{WORD})
  | (?P<float>[0-9]+\.[0-9]+(?:[eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+)
  | (?P<int>[0-9]+)
  | (?P<ref>@(?:{NAME}|{_STRING}))
  | (?P<place>\#(?:{PLACE}|{_STRING}))
  | (?P<string>{_STRING})
  | (?P<sign>->|\.\.|//|[()\[\]{{}}<>,;:=+*%-])
  | (?P<unknown>.)
""", re.VERBOSE)

_SHOWN = {"value": "a %value", "ref": "an @name", "place": "a #place", "word": "a name", "int": "a number",
          "type": "a type", "string": "a string in quotes"}


class Tokens:
    """The tokens as `kinds`, `texts` and `starts`, and the position `at` among them; a sign is its own kind."""

    def __init__(self, text: str, file: str) -> None:
        self.spans = Spans(file, text)
        self.kinds: list[str] = []
        self.texts: list[str] = []
        self.starts: list[int] = []
        self.at = 0
        self.tokenise()

    def tokenise(self) -> None:
        """Split the text; LocatedError where a character begins no token."""
        text = self.spans.text
        for match in _TOKEN.finditer(text):
            kind = match.lastgroup
            if kind == "skip":
                continue
            token = match.group()
            if kind == "unknown":
                self.fail("this string does not end" if token == '"' else f"`{token}` means nothing here",
                          match.start(), "strings are on one line, in double quotes" if token == '"' else "")
            if kind == "value" or kind == "ref" or kind == "place":
                token = self.unquote(token[1:], match.start()) if token[1] == '"' else token[1:]
            elif kind == "string":
                token = self.unquote(token, match.start())
            self.kinds.append(token if kind == "sign" else str(kind))
            self.texts.append(token)
            self.starts.append(match.start())
        self.kinds.append("end")
        self.texts.append("")
        self.starts.append(len(text.rstrip()))

    def unquote(self, token: str, offset: int) -> str:
        """The string that a quoted token stands for."""
        try:
            return str(json.loads(token))
        except ValueError:
            self.fail(f"{token} is no string", offset, 'escapes are \\" \\\\ \\n \\t \\r \\uXXXX')

    def fail(self, fact: str, offset: int | None = None, hint: str = "") -> NoReturn:
        """Raise the error that `fact` is at an offset, by default at the next token."""
        raise self.spans.error(fact, self.starts[self.at] if offset is None else offset, hint)

    def take(self, kind: str, what: str = "") -> str:
        """The text of the next token, which must be of a kind."""
        at = self.at
        if self.kinds[at] != kind:
            found = "the text ends" if self.kinds[at] == "end" else f"found `{self.shown(at)}`"
            self.fail(f"expected {what or _SHOWN.get(kind, f'`{kind}`')}, {found}")
        self.at = at + 1
        return self.texts[at]

    def accept(self, kind: str) -> bool:
        """Step over the next token if it is of a kind."""
        if self.kinds[self.at] != kind:
            return False
        self.at += 1
        return True

    def keyword(self, text: str) -> bool:
        """Step over the next token if it is the word `text`."""
        if self.kinds[self.at] != "word" or self.texts[self.at] != text:
            return False
        self.at += 1
        return True

    def shown(self, at: int) -> str:
        """A token as it stands in the text."""
        match = _TOKEN.match(self.spans.text, self.starts[at])
        return match.group() if match else ""

    def name(self, what: str) -> str:
        """A name without sigil: a word, or a string where it is none."""
        return self.take("string" if self.kinds[self.at] == "string" else "word", what)

    def listed(self, close: str, item: Callable[[], Item]) -> list[Item]:
        """Items with commas between them up to the token `close`, which is stepped over."""
        items: list[Item] = []
        if self.accept(close):
            return items
        while True:
            items.append(item())
            if self.accept(close):
                return items
            if not self.accept(","):
                self.fail(f"expected `,` or `{close}`, found `{self.shown(self.at)}`"
                          if self.kinds[self.at] != "end" else f"expected `{close}`, the text ends")
