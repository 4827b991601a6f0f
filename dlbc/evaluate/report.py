"""What was measured: numbers per data set, method and metric, one for each item, and the curves they come from."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dlbc.errors import InputError
from dlbc.evaluate import statistics
from dlbc.evaluate.statistics import Paired
from dlbc_runtime.arrays import Array, Json

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 160
"""Of a table as text, in characters."""

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Result:
    """One metric of one method on one data set: a value for each item (NaN where it is not defined).

    `how` says what it was measured with (fill and score); `better` whether high or low values are good.
    """

    data: str
    method: str
    metric: str
    values: tuple[float, ...]
    how: str = ""
    better: Better = "higher"
    control: bool = False

    @property
    def mean(self) -> float:
        """Over the items where it is defined."""
        return statistics.mean(np.array(self.values))

    @property
    def standard_error(self) -> float:
        """Of the mean, over items as independent samples; NaN for fewer than two."""
        return statistics.standard_error(np.array(self.values))

    @property
    def items(self) -> int:
        """How many items it is defined for."""
        return int(np.isfinite(self.values).sum())


@dataclass(frozen=True)
class Curve:
    """The score of each item while a method's units are perturbed. `values` has a row [points] for each item."""

    data: str
    method: str
    name: str
    at: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    how: str = ""
    control: bool = False

    def band(self) -> tuple[Array, Array]:
        """Mean and standard error over items at every point, float64 [points]."""
        columns = np.array(self.values, np.float64).T
        return (np.array([statistics.mean(column) for column in columns]),
                np.array([statistics.standard_error(column) for column in columns]))


@dataclass(frozen=True, repr=False)
class Report:
    """Results and curves. `print(report)` shows the table; reports of several runs are added: `a + b`."""

    results: tuple[Result, ...] = ()
    curves: tuple[Curve, ...] = ()
    settings: Mapping[str, Json] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, controls among them, in the order in which they were given."""
        return tuple(dict.fromkeys(one.method for one in self.results))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics; the first is the main one."""
        return tuple(dict.fromkeys(one.metric for one in self.results))

    def of(self, method: str, metric: str | None = None, *, data: str | None = None, how: str | None = None) -> Result:
        """The result of a method. `metric`: default the first; `data`, `how`: needed only where there are several.

        InputError when there is none such, or more than one.
        """
        metric = metric if metric is not None else next(iter(self.metrics), "")
        found = [one for one in self.results if (one.method, one.metric) == (method, metric)
                 and data in (None, one.data) and how in (None, one.how)]
        if not found:
            raise InputError(f"there is no {metric or 'result'!r} of {method!r}", where="report",
                             hint=f"methods: {', '.join(self.methods)}; metrics: {', '.join(self.metrics)}")
        if len(found) > 1:
            raise InputError(f"there are {len(found)} of {metric!r} of {method!r}", where="report", hint="say which: "
                             + "; ".join(f"data={one.data!r}, how={one.how!r}" for one in found[:4]))
        return found[0]

    def paired(self, a: str, b: str, metric: str | None = None, *, data: str | None = None, how: str | None = None
               ) -> Paired:
        """Method `a` minus method `b` on the same items. InputError when they were not measured on the same."""
        one, other = (self.of(method, metric, data=data, how=how) for method in (a, b))
        if len(one.values) != len(other.values):
            raise InputError(f"{a!r} has {len(one.values)} items, {b!r} has {len(other.values)}", where="paired",
                             hint="compare methods that were measured on the same items")
        differences = np.array(one.values) - np.array(other.values)
        differences = differences[np.isfinite(differences)]
        return Paired(a, b, one.metric, statistics.mean(differences), statistics.standard_error(differences),
                      statistics.sign_flip_p(differences), len(differences))

    def __add__(self, other: Report) -> Report:
        return Report(self.results + other.results, self.curves + other.curves, {**self.settings, **other.settings})

    # Presentation

    def table(self, metrics: Sequence[str] | None = None) -> Table:
        """A rich table: a row for each method, a column for each metric as mean ± standard error; the best stands
        out, controls are dim. `metrics`: default the main ones; `report.metrics` has all."""
        from dlbc.evaluate.tables import SIDE, table

        main = tuple(one for one in self.metrics if one not in SIDE)
        return table(self, tuple(metrics) if metrics is not None else main)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the curves with bands of one standard error (without curves: bars) and write them to `path`.

        Returns the matplotlib figure. DlbcError when matplotlib is missing (the extra `plots`).
        """
        from dlbc.evaluate.plots import plot

        return plot(self, Path(path) if path is not None else None)

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=WIDTH, color_system=None).print(self.table())
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")

    def __repr__(self) -> str:
        return f"Report(methods={list(self.methods)}, metrics={list(self.metrics)}, {len(self.curves)} curves)"

    def _repr_html_(self) -> str:
        from rich.console import Console

        shown = Console(file=io.StringIO(), width=WIDTH, record=True)
        shown.print(self.table())
        return shown.export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    # Files

    def to_dict(self) -> dict[str, Json]:
        """All of it as JSON data; NaN becomes null."""
        found: dict[str, Json] = {
            "kind": "dlbc evaluation", "version": 1, "settings": dict(self.settings),
            "results": [_json({**asdict(one), "mean": one.mean, "standard_error": one.standard_error})
                        for one in self.results],
            "curves": [_json(asdict(one)) for one in self.curves]}
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """What `to_dict` gave. InputError for anything else."""
        try:
            if (data["kind"], data["version"]) != ("dlbc evaluation", 1):
                raise ValueError(data["kind"])
            return cls(tuple(_result(one) for one in data["results"]), tuple(_curve(one) for one in data["curves"]),
                       dict(data["settings"]))
        except (KeyError, TypeError, ValueError) as problem:
            raise InputError("this is not a report of dlbc.evaluate", where="Report.from_dict",
                             hint="give what Report.to_dict or Report.save wrote") from problem

    def save(self, path: str | Path) -> Path:
        """Write it as JSON; returns the path."""
        path = Path(path)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what `save` wrote. InputError for another file."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as problem:
            raise InputError("this is no JSON", where=str(path), hint="give a file that Report.save wrote") from problem
        return cls.from_dict(data)


def merged(reports: Iterable[Report]) -> Report:
    """Several reports in one."""
    return sum(reports, Report())


def _json(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _json(one) for key, one in value.items()}
    return [_json(one) for one in value] if isinstance(value, list | tuple) else value


def _numbers(values: Iterable[Any]) -> tuple[float, ...]:
    return tuple(math.nan if one is None else float(one) for one in values)


def _result(data: Mapping[str, Any]) -> Result:
    better: Better = "higher" if data["better"] == "higher" else "lower" if data["better"] == "lower" else "neither"
    return Result(str(data["data"]), str(data["method"]), str(data["metric"]), _numbers(data["values"]),
                  str(data["how"]), better, bool(data["control"]))


def _curve(data: Mapping[str, Any]) -> Curve:
    return Curve(str(data["data"]), str(data["method"]), str(data["name"]), _numbers(data["at"]),
                 tuple(_numbers(row) for row in data["values"]), str(data["how"]), bool(data["control"]))
