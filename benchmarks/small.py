"""A small network on a CPU: every preset by every backend, and batches of several sizes.

The baseline is plain torch: forward and the gradient of the input. Each explanation runs in turn with the baseline and
nothing else, as in `cost.py`.

    python benchmarks/small.py [--threads 2] [--runs 600]
    python benchmarks/small.py --table          writes the tables of docs/c.md from the kept figures only
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _cases import BASELINE, mlp
from _measure import interleaved, kept, ratios, report, write_section

PAGE = Path(__file__).resolve().parents[1] / "docs" / "c.md"
BEGIN, END = "<!-- small: begin (python benchmarks/small.py --table) -->", "<!-- small: end -->"
PRESETS = ("epsilon", "dlb", "gamma", "epsilon-plus-flat", "dlb-0.1", "auto-lm", "dlb-contrastive")
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
        case = mlp(count)
        for preset in PRESETS if count == 1 else ("dlb", "gamma"):
            for backend in BACKENDS:
                pair = {BASELINE: case.baseline, preset: case.explanation(preset, backend=backend)}
                found = ratios(interleaved(pair, runs=runs, warmup=50), BASELINE)
                rows.append({"rows": count, "preset": preset, "backend": backend, **found[preset]})
    report("small", rows)


def table(rows: list[dict[str, object]]) -> str:
    """The tables of docs/c.md: presets at one row, and rows."""
    found = {(row["rows"], row["preset"], row["backend"]): float(str(row["median"])) for row in rows}
    head = "".join(f" `{backend}` |" for backend in BACKENDS)
    lines = ["Time over a plain forward pass and the gradient of the input, of an MLP 30-64-2 and one row:", "",
             f"| rules |{head}", "|---|" + "---|" * len(BACKENDS)]
    lines += [f"| `{preset}` |" + "".join(f" {found[1, preset, backend]:.2f} |" for backend in BACKENDS)
              for preset in PRESETS if (1, preset, "c") in found]
    lines += ["", "More rows:", "", f"| rows, rules |{head}", "|---|" + "---|" * len(BACKENDS)]
    lines += [f"| {count}, `{preset}` |" + "".join(f" {found[count, preset, backend]:.2f} |" for backend in BACKENDS)
              for count in ROWS[1:] for preset in ("dlb", "gamma") if (count, preset, "c") in found]
    return "\n".join([*lines, "", "Measured by [`benchmarks/small.py`](../benchmarks/small.py), 2 threads.", ""])


if __name__ == "__main__":
    main()
