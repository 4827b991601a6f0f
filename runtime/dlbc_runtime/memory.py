"""Memory of an explanation, before it is made: which bytes are held at which step, for given sizes.

The compiler writes a `Plan` into each program: its steps, and the buffers that they make, each of a size that is an
expression of named sizes such as `2048*B*T`. For the sizes of a call the plan gives the bytes held at every step.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from dlbc_runtime.arrays import Array, Json
from dlbc_runtime.errors import InputError
from dlbc_runtime.signature import evaluate_parsed

if TYPE_CHECKING:
    from rich.console import RenderableType

SECTIONS = ("forward", "relevance")
KINDS = ("inputs", "saved", "working", "results")
"""What a buffer is for: what the call is given; forward values that relevance reads; values in between; what is
returned."""

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20,
          "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True)
class Plan:
    """Steps (section, op, place: numbers of `SECTIONS` and of texts) and buffers (size, first step, last step, kind:
    number of `sizes`, of steps, -1 for the end, of `KINDS`). `between`: bytes held from call to call."""

    texts: tuple[str, ...] = ()
    steps: tuple[tuple[int, int, int], ...] = ()
    sizes: tuple[str, ...] = ()
    buffers: tuple[tuple[int, int, int, int], ...] = ()
    between: int = 0

    def held(self, sizes: Mapping[str, int], *, state_kept: bool = False) -> Array:
        """Bytes int64 [kinds, steps] held during each step. `state_kept`: saved values stay to the end, as they do
        where relevance is carried several times for one forward pass."""
        numbers = np.array([max(evaluate_parsed(_parsed(text), sizes), 0) for text in self.sizes], np.int64)
        size, first, last, kind = self._columns
        change = np.zeros((len(KINDS), len(self.steps) + 1), np.int64)
        if state_kept:
            last = np.where(kind == KINDS.index("saved"), len(self.steps) - 1, last)
        np.add.at(change, (kind, first), numbers[size])
        np.subtract.at(change, (kind, last + 1), numbers[size])
        found: Array = change.cumsum(1)[:, :-1]
        return found

    def peak(self, sizes: Mapping[str, int], *, state_kept: bool = False) -> int:
        """The most bytes held at any step."""
        return int(self.held(sizes, state_kept=state_kept).sum(0).max(initial=0))

    def kept(self, sizes: Mapping[str, int]) -> int:
        """Bytes of inputs and results, which are held at the end."""
        held = self.held(sizes)
        return int(held[KINDS.index("inputs"), -1] + held[KINDS.index("results"), -1]) if self.steps else 0

    @cached_property
    def _columns(self) -> tuple[Array, Array, Array, Array]:
        table = np.array(self.buffers, np.int64).reshape(-1, 4)
        last = np.where(table[:, 2] < 0, len(self.steps) - 1, table[:, 2])
        return table[:, 0], table[:, 1], last, table[:, 3]

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        return {"texts": list(self.texts), "steps": [list(step) for step in self.steps], "sizes": list(self.sizes),
                "buffers": [list(buffer) for buffer in self.buffers], "between": self.between}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """Read what `to_json` wrote. KeyError, TypeError or ValueError when it is something else."""
        found = Plan(tuple(map(str, data["texts"])), tuple((int(a), int(b), int(c)) for a, b, c in data["steps"]),
                     tuple(map(str, data["sizes"])),
                     tuple((int(a), int(b), int(c), int(d)) for a, b, c, d in data["buffers"]), int(data["between"]))
        count = len(found.steps)
        texts, sections = range(len(found.texts)), range(len(SECTIONS))
        if any(a not in sections or b not in texts or c not in texts for a, b, c in found.steps) or any(
                a not in range(len(found.sizes)) or b not in range(count) or c not in range(-1, count)
                or d not in range(len(KINDS)) for a, b, c, d in found.buffers):
            raise ValueError("a plan of memory that names what it does not hold")
        return found


@dataclass(frozen=True)
class Step:
    """The bytes held during one op: `total`, and by what they are for."""

    section: str
    op: str
    place: str
    inputs: int
    saved: int
    working: int
    results: int

    @property
    def total(self) -> int:
        """All bytes held during the step."""
        return self.inputs + self.saved + self.working + self.results


@dataclass(frozen=True)
class Memory:
    """What `explainer.memory()` gives: the bytes held during each step, as planned; printed as a table.

    `sizes` are those it is for. Weights, which the model holds anyway, are not counted; `between` is what the explainer
    holds from call to call besides them. A call within a `budget` has `rows` batch rows and `targets` targets in work
    at a time, and recomputes forward values where `checkpoint`; without a budget they are all of the call.
    """

    model: str
    sizes: Mapping[str, int]
    steps: tuple[Step, ...]
    between: int
    rows: int
    targets: int
    checkpoint: bool
    budget: int | None = None

    @property
    def peak(self) -> Step:
        """The step at which most is held. InputError for a program without steps."""
        if not self.steps:
            raise InputError("the plan has no steps", where="memory()", hint="compile the model again")
        return max(self.steps, key=lambda step: step.total)

    @property
    def peaks(self) -> dict[str, Step]:
        """The step of each section at which most is held."""
        return {name: max(found, key=lambda step: step.total) for name in SECTIONS
                if (found := [step for step in self.steps if step.section == name])}

    def largest(self, count: int = 12) -> list[Step]:
        """The steps that hold most, the first of each place in a section, the largest first."""
        seen: dict[tuple[str, str], Step] = {}
        for step in sorted(self.steps, key=lambda step: -step.total):
            seen.setdefault((step.section, step.place), step)
        return list(seen.values())[:count]

    def to_dict(self) -> dict[str, Json]:
        """All of it as JSON-able data."""
        def plain(step: Step) -> dict[str, Json]:
            return {"section": step.section, "op": step.op, "place": step.place, "total": step.total,
                    "inputs": step.inputs, "saved": step.saved, "working": step.working, "results": step.results}

        return {"model": self.model, "sizes": dict(self.sizes), "rows": self.rows, "targets": self.targets,
                "checkpoint": self.checkpoint, "budget": self.budget, "between": self.between,
                "peak": plain(self.peak), "steps": [plain(step) for step in self.steps]}

    def __str__(self) -> str:
        """The peak, the peaks of the sections, and the places that hold most."""
        rows = [("step", *("total", *KINDS)), *(_shown(step) for step in self.largest())]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join((row[0].ljust(widths[0]), *(text.rjust(width) for text, width in
                                                         zip(row[1:], widths[1:], strict=True)))).rstrip()
                 for row in rows]
        return "\n".join([*self._facts(), *("  " + line for line in lines)])

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for name in ("step", "total", *KINDS):
            table.add_column(name, justify="left" if name == "step" else "right")
        for step in self.largest():
            table.add_row(*(Text(text) for text in _shown(step)))
        return Group(*(Text(line) for line in self._facts()), table)

    def _facts(self) -> list[str]:
        peak = self.peak
        sizes = ", ".join(f"{name} = {size}" for name, size in self.sizes.items())
        work = f"{self.rows} row{'s' * (self.rows != 1)} and {self.targets} target{'s' * (self.targets != 1)} at a time"
        budget = "" if self.budget is None else f" within {as_text(self.budget)}"
        again = ", forward values computed again" if self.checkpoint else ""
        return [f"{self.model}: peak {as_text(peak.total)} for {sizes}",
                f"  at {_named(peak)}; " + ", ".join(
                    f"{name} {as_text(step.total)}" for name, step in self.peaks.items()),
                f"  {work}{budget}{again}; {as_text(self.between)} held between calls"]


def memory_of(plan: Plan, sizes: Mapping[str, int], *, state_kept: bool, **facts: Any) -> Memory:
    """A plan's bytes for these sizes."""
    held = plan.held(sizes, state_kept=state_kept).T.tolist()
    steps = tuple(Step(SECTIONS[section], plan.texts[op], plan.texts[place], *numbers)
                  for (section, op, place), numbers in zip(plan.steps, held, strict=True))
    return Memory(sizes=dict(sizes), steps=steps, between=plan.between, **facts)


def as_bytes(budget: object) -> int:
    """A number of bytes, given as such or as text: "2GB", "512 MiB", "1.5e9". InputError for something else."""
    number: float | None = None
    if isinstance(budget, str):
        text = budget.strip().lower().replace("_", "")
        unit = text.lstrip("+-.0123456789e")
        digits = text[:len(text) - len(unit)].strip()
        try:
            number = float(digits) * _UNITS[unit.strip()]
        except (KeyError, ValueError):
            number = None
    elif isinstance(budget, int | np.integer) and not isinstance(budget, bool):
        number = int(budget)
    if number is None or not 0 < number < float("inf"):
        raise InputError(f"memory_budget is {budget!r}", hint='give bytes as a positive number, or text such as "2GB"')
    return int(number)


def as_text(size: int) -> str:
    """Bytes as people read them: `1.5 GB`."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


@lru_cache(maxsize=4096)
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _named(step: Step) -> str:
    return f"{step.section}: {step.op}" + (f" in {step.place}" if step.place else "")


def _shown(step: Step) -> tuple[str, ...]:
    return (_named(step), *(as_text(size) for size in (step.total, step.inputs, step.saved, step.working,
                                                       step.results)))
