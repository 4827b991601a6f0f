"""Write the table of costs in README.md from the last measurement: `python benchmarks/tables.py`.

`benchmarks/cost.py` measures and keeps `benchmarks/results/cost.json`; a test checks that the table is current.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _measure import kept, section

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- cost: begin (python benchmarks/tables.py) -->", "<!-- cost: end -->"
BASELINE = "forward + gradient"

NOT_MEASURED = "Not measured on this version yet: `make bench` measures it.\n"


def table(measured: Mapping[str, object] | None) -> str:
    """The section between the markers, for what `cost.py` wrote (None: nothing yet)."""
    if measured is None:
        return NOT_MEASURED
    machine, rows = measured["machine"], measured["rows"]
    assert isinstance(machine, dict) and isinstance(rows, list)
    lines = [
        "Time and added peak memory of one explanation, forward pass included, over a plain torch forward pass and",
        "the gradient with respect to the input of the same model. Each runs in turn with that in one process; the",
        "table shows the median of the ratios, and in brackets the smallest and largest. For the language model the",
        "baseline computes the head at the last position only. `torch` backend unless a row says otherwise, float32,",
        "random weights. Explanations multiply by the faster of torch's two libraries; with the baseline's own,",
        "language models and BERT take up to twice as long ([both figures](docs/speed.md#products)). Memory is what",
        "arrays take: what is freed goes back to the system at once, where the allocator keeps some",
        "([why](docs/speed.md#memory)).",
        "", "| model | rules | time ÷ (forward + gradient) | we want at most | added memory ÷ the same |",
        "|---|---|---|---|---|",
        *(_row(row) for row in rows if row["case"] != BASELINE),
        "", f"Measured by [`benchmarks/cost.py`](benchmarks/cost.py) on {_machine(machine)}."]
    return "\n".join(lines) + "\n"


def page(text: str, measured: Mapping[str, object] | None) -> str:
    """README.md with a current table."""
    return section(text, BEGIN, END, table(measured))


def measured() -> Mapping[str, object] | None:
    """What was measured last; None where nothing was."""
    found = kept("cost")
    return found if found["rows"] else None


def _row(row: Mapping[str, object]) -> str:
    median, low, high, memory = (float(str(row[name])) for name in ("median", "min", "max", "memory ratio"))
    return (f"| {row['model']} | `{row['case']}` | {median:.2f} ({low:.2f} to {high:.2f}) | {_target(row)} "
            f"| {memory:.2f} |")


def _target(row: Mapping[str, object]) -> str:
    return f"{float(str(row['target'])):.2f}" if "target" in row else ""


def _machine(machine: Mapping[str, object]) -> str:
    threads = machine["threads"]
    return (f"{machine['cpu']}, {threads} thread{'s' if threads != 1 else ''}, Python {machine['python']}, "
            f"torch {machine['torch']}")


if __name__ == "__main__":
    README.write_text(page(README.read_text(encoding="utf-8"), measured()), encoding="utf-8")
