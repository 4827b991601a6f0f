"""What runs where, and why: the lines of `explainer.plan()`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self


@dataclass(frozen=True)
class WorkRow:
    """One step of a program, or some alike in a row."""

    section: str
    """`prepare`, `forward`, `relevance`, or the name of a block that these call."""
    runs: str
    """What runs it: `triton gemm`, `triton row`, ..., or the array library."""
    ops: tuple[str, ...]
    """The ops of the IR in it."""
    place: str = ""
    """Where in the model, of the first of them."""
    why: str = ""
    """Why it runs there."""
    count: int = 1

    def to_json(self) -> list[Any]:
        """The same as plain JSON data."""
        return [self.section, self.runs, list(self.ops), self.place, self.why, self.count]

    @staticmethod
    def from_json(data: Any) -> WorkRow:
        """Read what `to_json` wrote."""
        section, runs, ops, place, why, count = data
        return WorkRow(str(section), str(runs), tuple(map(str, ops)), str(place), str(why), int(count))


class Work(tuple[WorkRow, ...]):
    """The steps of a program, in order; printed as a table, with how many there are of each kind.

    `target` is what they are compiled for, `notes` what was seen when that was chosen (`docs/triton.md`).
    """

    target: str
    notes: tuple[str, ...]

    def __new__(cls, rows: Iterable[WorkRow], target: str = "", notes: Iterable[str] = ()) -> Self:
        """Rows with what is said of all of them."""
        found = super().__new__(cls, rows)
        found.target, found.notes = target, tuple(notes)
        return found

    def __str__(self) -> str:
        """One line for each step; the ops of a kernel stand behind one another."""
        rows = [(row.section, row.runs, row.place, " ".join(_counted(row.ops)), row.why + (
            f"  x{row.count}" if row.count > 1 else "")) for row in self]
        head = ("section", "runs on", "place", "ops", "why")
        widths = [min(48, max(len(line[i]) for line in [head, *rows])) for i in range(4)]
        lines = ["  ".join([*(f"{text:<{width}}" for text, width in zip(line, widths, strict=False)), line[4]]).rstrip()
                 for line in [head, *rows]]
        kinds = Counter[str]()
        for row in self:
            kinds[row.runs] += row.count
        total = ", ".join(f"{runs}: {count}" for runs, count in kinds.most_common())
        return "\n".join([f"{self.target}: {total}" if self.target else total, *self.notes, *lines])


def _counted(ops: Iterable[str]) -> list[str]:
    return [name + (f"*{count}" if count > 1 else "")
            for name, count in ((name, len(list(group))) for name, group in groupby(ops))]
