"""Where things stand in a text: located errors, and spans that let the verifier point into a file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches

from dlbc.errors import IRError


class LocatedError(IRError):
    """An error at a line and column of a text; its message shows the line, and a caret below it."""

    def __init__(self, fact: str, *, where: str, line: int, excerpt: str, hint: str = "") -> None:
        super().__init__(fact, where=where, hint=hint)
        self.line, self.excerpt = line, excerpt
        self.args = (f"{where}: error: {fact}\n{excerpt}" + (f"\n  hint: {hint}" if hint else ""),)


@dataclass(frozen=True, slots=True)
class Spans:
    """The text of a graph and the offsets at which things are defined in it.

    Keys of `offsets`: `%value`, `@weight`, `@function`, `return <section>`; within a function `@f %value`.
    """

    file: str
    text: str
    offsets: dict[str, int] = field(default_factory=dict)

    def error(self, fact: str, offset: int, hint: str = "") -> LocatedError:
        """The error that `fact` is at an offset of the text."""
        start = self.text.rfind("\n", 0, offset) + 1
        end = self.text.find("\n", offset)
        shown = self.text[start:end if end >= 0 else len(self.text)].rstrip()
        line, column = self.text.count("\n", 0, offset) + 1, offset - start
        blank = re.sub(r"[^\t]", " ", self.text[start:offset])  # tabs stay, so that the caret stands right
        return LocatedError(fact, where=f"{self.file}:{line}:{column + 1}", line=line, hint=hint,
                            excerpt=f"  {shown}\n  {blank}^")

    def find(self, key: str, part: str = "") -> int | None:
        """Where `key` is defined or, within its statement's first lines, where the token `part` stands."""
        offset = self.offsets.get(key)
        if offset is None or not part:
            return offset
        found = re.compile(r"(?<![\w.])" + re.escape(part) + r"(?![\w.$/@-])").search(self.text, offset)
        return offset if found is None else found.start()


def nearest(name: str, known: Iterable[str], sigil: str = "") -> str:
    """`did you mean %n2?` for the known names nearest to `name`; empty where none is near."""
    near = get_close_matches(sigil + name, [sigil + other for other in known], 3)
    return f"did you mean {' or '.join(near)}?" if near else ""
