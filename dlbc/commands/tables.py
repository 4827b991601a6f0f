"""Tables of numbers, read from a .csv file with the names of the columns first."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dlbc.errors import InputError


@dataclass(frozen=True)
class Table:
    """The columns of a file that a model takes. InputError where there is no file or a dropped column is not there."""

    path: Path
    names: tuple[str, ...]

    @classmethod
    def read(cls, path: Path, drop: Collection[str] = ()) -> Table:
        """The table of a file, without some columns."""
        if not path.is_file():
            raise InputError(f"there is no file {path}", hint="check the name")
        with path.open(newline="", encoding="utf-8-sig") as file:
            columns = list(csv.DictReader(file).fieldnames or ())
        unknown = [name for name in drop if name not in columns]
        if unknown:
            raise InputError(f"there is no column {unknown[0]!r}", where=str(path),
                             hint=f"columns: {', '.join(columns)}")
        return cls(path, tuple(name for name in columns if name not in drop))

    def row(self, number: int) -> list[float]:
        """The numbers of one row; the first is 0. InputError where it is not there or holds what is no number."""
        found = next(islice(self.rows(number), 1), None)
        if found is None:
            raise InputError(f"there is no row {number}", where=str(self.path),
                             hint=f"the data has {sum(1 for _ in self._texts())} rows, the first is 0")
        return found

    def rows(self, first: int = 0) -> Iterator[list[float]]:
        """The numbers of all rows from one on. InputError at the first that holds what is no number."""
        for place, texts in islice(enumerate(self._texts()), first, None):
            yield [self._number(place, name, texts[name]) for name in self.names]

    def _texts(self) -> Iterator[dict[str, str]]:
        with self.path.open(newline="", encoding="utf-8-sig") as file:
            yield from csv.DictReader(file)

    def _number(self, row: int, name: str, text: str) -> float:
        try:
            return float(text)
        except (TypeError, ValueError) as problem:
            raise InputError(
                f"column {name!r} of row {row} holds {text!r}, which is no number", where=str(self.path),
                hint=f"leave it out with --drop {name}, or encode it as the model expects") from problem
