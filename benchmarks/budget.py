"""Explaining within a budget: memory and time of explanations that get .6 of what forward + gradient take.

Memory is what is added at the peak, in fresh processes; the budget is .6 of what the baseline adds there. Times are of
runs in turn in one process: the baseline, the explanation as it is, and within the budget.

    python benchmarks/budget.py [--threads 2] [--runs 7] [--only LLaMA]
    python benchmarks/budget.py --table            writes the table of docs/memory.md from the kept figures only
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _cases import BASELINE, MODELS
from _measure import added_memory, interleaved, kept, peak_memory, ratios, report, write_section

PAGE = Path(__file__).resolve().parents[1] / "docs" / "memory.md"
BEGIN, END = "<!-- budget: begin (python benchmarks/budget.py --table) -->", "<!-- budget: end -->"
SHARE = 0.6
PRESETS = {"LLaMA": ("cp-lrp", "attnlrp", "dlb"), "BERT": ("cp-lrp", "dlb"), "ResNet": ("dlb",), "VGG": ("dlb",)}


@cache
def peak(name: str, rules: str, budget: int = 0) -> float:
    """MiB that a run adds; `budget` in bytes, 0 for none."""
    return peak_memory(__file__, name, rules, str(budget))


def measure(runs: int, only: str) -> None:
    """Run all cases, and keep what was found."""
    rows: list[dict[str, object]] = []
    for name in MODELS:
        presets = next((presets for start, presets in PRESETS.items() if name.startswith(start)), ())
        if only not in name:
            rows += [row for row in kept("budget")["rows"] if row["model"] == name]
            continue
        whole = peak(name, BASELINE) if presets else 0.0
        budget = int(SHARE * whole * 2**20)
        for rules in presets:
            case = MODELS[name]()
            cases = {BASELINE: case.baseline, "as it is": case.explanation(rules),
                     "in the budget": case.explanation(rules, memory_budget=budget)}
            times = ratios(interleaved(cases, runs=runs), BASELINE)
            rows.append({"model": name, "rules": rules, "forward + gradient, MiB": whole,
                         "memory": peak(name, rules) / whole, "memory in the budget": peak(name, rules, budget) / whole,
                         "time": times["as it is"]["median"], "time in the budget": times["in the budget"]["median"]})
    report("budget", rows, budget=SHARE)


def table(rows: list[dict[str, object]]) -> str:
    """The table of docs/memory.md."""
    columns = ("memory", "memory in the budget", "time", "time in the budget")
    lines = [f"| model | rules | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for row in rows:
        lines.append(f"| {row['model']} | `{row['rules']}` | {' | '.join(f'{row[key]:.2f}' for key in columns)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--only", default="", help="models whose name holds this; rows of others are kept as they were")
    parser.add_argument("--table", action="store_true", help="write the table from the last results")
    parser.add_argument("--measure-memory", nargs=3, metavar=("MODEL", "RULES", "BYTES"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure_memory:
        name, rules, budget = options.measure_memory
        case = MODELS[name]()
        given = {"memory_budget": int(budget)} if int(budget) else {}
        print(added_memory(case.baseline if rules == BASELINE else case.explanation(rules, **given)))
        return
    if not options.table:
        measure(options.runs, options.only)
    write_section(PAGE, BEGIN, END, table(kept("budget")["rows"]))


if __name__ == "__main__":
    main()
