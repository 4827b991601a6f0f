"""Small models on a CPU: every preset by every backend, and batches of several sizes.

The baseline is plain torch: forward and the gradient of the input. Each explanation runs in turn with the baseline and
nothing else, as in `cost.py`.

    python benchmarks/small.py [--threads 2] [--runs 600]
    python benchmarks/small.py --table          writes the tables of docs/c.md from the kept figures only
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _cases import BASELINE, Case, columns, mlp
from _measure import interleaved, kept, ratios, report, write_section

PAGE = Path(__file__).resolve().parents[1] / "docs" / "c.md"
BEGIN, END = "<!-- small: begin (python benchmarks/small.py --table) -->", "<!-- small: end -->"
PRESETS = ("epsilon", "dlb", "gamma", "epsilon-plus-flat", "dlb-0.1", "auto-lm", "dlb-contrastive")
OF_COLUMNS = ("epsilon", "attnlrp", "dlb")
ROWS = (1, 16, 256, 4096)
BACKENDS = ("torch", "numpy", "c")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=600)
    parser.add_argument("--table", action="store_true", help="write the tables from the last results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.table:
        measure(options.runs)
    write_section(PAGE, BEGIN, END, table(kept("small")["rows"]))


def measure(runs: int) -> None:
    """Run all cases, and keep what was found."""
    rows: list[dict[str, object]] = []
    for count in ROWS:
        rows += _measured("MLP", mlp(count), count, PRESETS if count == 1 else ("dlb", "gamma"), runs)
    rows += _measured("columns", columns(), 1, OF_COLUMNS, runs)
    report("small", rows)


def _measured(model: str, case: Case, count: int, presets: Sequence[str], runs: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for preset in presets:
        for backend in BACKENDS:
            pair = {BASELINE: case.baseline, preset: case.explanation(preset, backend=backend)}
            found = ratios(interleaved(pair, runs=runs, warmup=50), BASELINE)
            rows.append({"model": model, "rows": count, "preset": preset, "backend": backend, **found[preset]})
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """The tables of docs/c.md: presets at one row, and more rows."""
    found = {(row["model"], row["rows"], row["preset"], row["backend"]): f"{float(str(row['median'])):.2f}"
             for row in rows}
    head = "".join(f" `{backend}` |" for backend in BACKENDS)
    wanted = [("MLP", 1, preset, f"MLP, `{preset}`") for preset in PRESETS]
    wanted += [("columns", 1, preset, f"columns, `{preset}`") for preset in OF_COLUMNS]
    wanted += [("MLP", count, preset, f"MLP, `{preset}`, {count} rows") for count in ROWS[1:]
               for preset in ("dlb", "gamma")]
    return "\n".join([
        "Time over a plain forward pass and the gradient of the input. MLP: 30-64-2. Columns: a transformer over the",
        "10 columns of a table, 16 wide, one layer. One row, unless said.", "",
        f"| model, rules |{head}", "|---|" + "---|" * len(BACKENDS),
        *(f"| {label} |" + "".join(f" {found[model, count, preset, backend]} |" for backend in BACKENDS)
          for model, count, preset, label in wanted),
        "", "Measured by [`benchmarks/small.py`](../benchmarks/small.py), 2 threads.", ""])


if __name__ == "__main__":
    main()
