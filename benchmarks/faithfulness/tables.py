"""Write the tables of docs/faithfulness.md from the results: `python -m benchmarks.faithfulness.tables`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faithfulness.methods import BASELINES, CONTROLS
from benchmarks.faithfulness.sets import ITEMS

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs" / "faithfulness.md", ROOT / "benchmarks" / "results" / "faithfulness"
BEGIN, END = "<!-- {}: begin (python -m benchmarks.faithfulness.tables) -->", "<!-- {}: end -->"
SECTIONS = ("auto", "overview", "sets")
NOT_MEASURED = "Not measured on this version yet: `python -m benchmarks.faithfulness` measures it.\n"
OURS = ("auto", "attnlrp-conserving")
"""Presets (and all whose names begin with `auto`) that are not published practice, which is what `auto` must match."""

Records = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Estimate:
    """A mean over items with its standard error over independent examples."""

    mean: float
    error: float

    def __str__(self) -> str:
        return "" if math.isnan(self.mean) else f"{self.mean:.3f} ± {self.error:.3f}"


def estimate(values: Sequence[float | None], groups: Sequence[int]) -> Estimate:
    """Mean over items; standard error over groups, for items of one group are not independent:
    sqrt(G / (G - 1) * sum_g (sum_{i in g} (x_i - mean))^2) / n."""
    found = np.array([math.nan if value is None else value for value in values], np.float64)
    finite = np.isfinite(found)
    x, own = found[finite], np.asarray(groups)[:len(found)][finite]
    _, place = np.unique(own, return_inverse=True)
    count = int(place.max()) + 1 if len(x) else 0
    if not len(x):
        return Estimate(math.nan, math.nan)
    sums = np.bincount(place, x - x.mean(), count)
    error = math.sqrt(count / (count - 1) * float(sums @ sums)) / len(x) if count > 1 else math.nan
    return Estimate(float(x.mean()), error)


@dataclass(frozen=True)
class Row:
    """What a record comes to. `area`: mean over the fills."""

    method: str
    areas: Mapping[str, Estimate]
    area: Estimate
    sr: float
    rr: float
    pointing: float
    at_inputs: float
    residual: float
    time: float
    flops: float

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Row:
        """Of what was measured of a method on a set."""
        groups = record["groups"]
        kept: Mapping[str, Any] = record.get("conservation", {})
        cost: Mapping[str, Any] = record.get("cost", {})
        return cls(record["method"], {fill: estimate(values, groups) for fill, values in record["area"].items()},
                   estimate(over_fills(record), groups), _mean(record.get("sr")), _mean(record.get("rr")),
                   _mean(record.get("pointing")), _mean(kept.get("at inputs")),
                   max((value for value in kept.get("residual", []) if value is not None), default=math.nan),
                   _number(cost.get("time")), _number(cost.get("flops")))


def over_fills(record: Mapping[str, Any]) -> list[float | None]:
    """The area of each item, mean over fills."""
    columns = zip(*record["area"].values(), strict=True)
    return [None if None in column else sum(column) / len(column) for column in columns]


def paired(one: Mapping[str, Any], other: Mapping[str, Any]) -> Estimate:
    """The first method's area minus the other's, on the same items."""
    differences = [None if a is None or b is None else a - b
                   for a, b in zip(over_fills(one), over_fills(other), strict=True)]
    return estimate(differences, one["groups"])


def read(folder: Path = RESULTS) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Records by set and method; sets and methods in the order they are measured in."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name in [one for one in ITEMS if (folder / one).is_dir()]:
        records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / name).glob("*.json"))]
        found[name] = {record["method"]: record for record in sorted(records, key=_rank)}
    return found


def sets_section(results: Mapping[str, Records]) -> str:
    """A table for each set."""
    return "\n".join(_set_table(name, records) for name, records in results.items()) or NOT_MEASURED


def overview_section(results: Mapping[str, Records]) -> str:
    """Areas, mean over fills: methods by sets."""
    if not results:
        return NOT_MEASURED
    methods = list(dict.fromkeys(method for records in results.values() for method in records))
    lines = [f"| | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    for method in sorted(methods, key=lambda one: _rank({"method": one})):
        cells = (_area(records.get(method)) for records in results.values())
        lines.append(f"| {_shown(method)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def auto_section(results: Mapping[str, Records]) -> str:
    """`auto` against the best published preset of each set, and against what it must hold."""
    lines = ["| set | best published preset | `auto` minus it, paired | best control | sr | rr | ledger closes to | "
             "arithmetic ÷ (forward + gradient) | holds |", "|---" * 9 + "|"]
    for name, records in results.items():
        fine = {method: record for method, record in records.items() if "error" not in record}
        published = [method for method in fine if method not in (*OURS, *BASELINES, *CONTROLS)
                     and not method.startswith("auto") and "@" not in method]
        controls = [method for method in fine if method in CONTROLS]
        if "auto" not in fine or not published or not controls:
            continue
        rows = {method: Row.of(record) for method, record in fine.items()}
        best, control = (max(some, key=lambda one: rows[one].area.mean) for some in (published, controls))
        own, ahead, over = rows["auto"], paired(fine["auto"], fine[best]), paired(fine["auto"], fine[control])
        bar = rows[best].area.mean - rows[best].area.error
        kept = {"faithful": own.area.mean >= bar, "above controls": over.mean > 2 * over.error,
                "sensitive": all(not value >= 0.6 for value in (own.sr, own.rr)), "closes": own.residual <= 1e-4,
                "cost": not own.flops > 1.5}
        broken = ", ".join(f"not: {what}" for what, holds in kept.items() if not holds)
        lines.append(f"| {name} | `{best}` {rows[best].area} | {ahead.mean:+.3f} ± {ahead.error:.3f} | {control} "
                     f"{rows[control].area} | {_two(own.sr)} | {_two(own.rr)} | {own.residual:.0e} | {_two(own.flops)} "
                     f"| {broken or 'yes'} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else NOT_MEASURED


def page(text: str, results: Mapping[str, Records]) -> str:
    """The page with current tables. ValueError where it lacks a marker."""
    made = {"auto": auto_section, "overview": overview_section, "sets": sets_section}
    for section in SECTIONS:
        begin, end = BEGIN.format(section), END.format(section)
        before, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"the page lacks `{begin}` or `{end}`")
        text = f"{before}{begin}\n{made[section](results)}{end}{rest.partition(end)[2]}"
    return text


def _set_table(name: str, records: Records) -> str:
    first = next(iter(records.values()))
    fine = [record for record in records.values() if "error" not in record]
    fills = list(fine[0]["area"]) if fine else []
    pointing = any("pointing" in record for record in fine)
    examples = len(set(first["groups"]))
    several = f" of {examples} photographs" if examples < first["items"] else ""
    heads = ["method", *(f"area, {fill.partition('(')[0]}" for fill in fills), "sr", "rr",
             *(["points at the answer"] if pointing else []), "at inputs ÷ seed", "ledger closes to", "time", "FLOPs"]
    lines = [f"### {name}", "", f"{first['kind']}, {first['items']} items{several}; the model's accuracy is "
             f"{first['accuracy']:.3f}.", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method, record in records.items():
        if "error" in record:
            problem = str(record["error"]).splitlines()[0].replace("|", "\\|")
            lines.append(f"| {_shown(method)} | {problem} |" + " |" * (len(heads) - 2))
            continue
        row = Row.of(record)
        cells = [_shown(method), *(str(row.areas[fill]) for fill in fills), _two(row.sr), _two(row.rr),
                 *([_two(row.pointing)] if pointing else []), _short(row.at_inputs), _exponent(row.residual),
                 _two(row.time), _two(row.flops)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _area(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return ""
    return "failed" if "error" in record else str(estimate(over_fills(record), record["groups"]))


def _rank(record: Mapping[str, Any]) -> tuple[int, str]:
    method = str(record["method"])
    return (2 if method in CONTROLS else 1 if method in BASELINES else 0), method


def _shown(method: str) -> str:
    return method if method in (*BASELINES, *CONTROLS) else f"`{method}`"


def _mean(values: Iterable[float | None] | None) -> float:
    found = [value for value in values or () if value is not None]
    return sum(found) / len(found) if found else math.nan


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _two(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def _short(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def _exponent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0e}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), read()), encoding="utf-8")
