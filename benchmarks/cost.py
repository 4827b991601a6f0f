"""What an explanation costs: time and added peak memory over plain torch forward + input-gradient of the same model.

The baseline is the strict one (`_cases.py`). Both are warm, run in turn in one process with the same threads; memory
is that of a fresh process for each. Run: `python benchmarks/cost.py [--threads 2] [--runs 15] [--only LLaMA]`.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _cases import BASELINE, MODELS, Run
from _measure import added_memory, interleaved, kept, peak_memory, ratios, report

TARGETS: dict[str, dict[str, float]] = {
    "LLaMA 8 x 512, 128 tokens": {"cp-lrp": 0.75, "attnlrp": 0.9, "dlb": 1.35},
    "LLaMA 8 x 512, 512 tokens": {"cp-lrp": 0.75, "attnlrp": 0.9, "dlb": 1.3},
    "Qwen3-MoE 4 x 512, 2 of 16 experts, 128 tokens": {"cp-lrp": 1.0, "attnlrp": 1.2, "dlb": 1.7},
    "BERT-base, 8 texts of 128 tokens": {"cp-lrp": 0.8, "dlb": 1.35},
    "ResNet-18, 4 pictures of 224 x 224": {"epsilon": 1.5, "epsilon-plus-flat": 1.6, "epsilon-gamma-box": 2.5,
                                           "dlb": 1.6},
    "VGG-11, 4 pictures of 224 x 224": {"epsilon-plus-flat": 1.6, "epsilon-gamma-box": 2.5, "dlb": 1.6},
    "MLP 30-64-2, 1 row": {"epsilon": 1.0, "gamma": 1.0, "dlb": 1.0},
    'MLP 30-64-2, 1 row, `backend="c"`': dict.fromkeys(
        ("epsilon", "gamma", "dlb", "epsilon-plus-flat", "dlb-0.1", "auto-lm", "dlb-contrastive"), 1.0),
}
"""The time that we want to stay below, by model and preset."""


def cases(name: str, presets: list[str]) -> dict[str, Run]:
    """The baseline and one explanation per preset."""
    model, _, backend = name.partition(", `backend=")
    case, options = MODELS[model](), {"backend": backend.strip('"`')} if backend else {}
    return {BASELINE: case.baseline} | {rules: case.explanation(rules, **options) for rules in presets}


def _memory(name: str, case: str) -> dict[str, float]:
    """What a case adds at its peak, and over what the baseline adds."""
    own = _peak(name, case)
    return {"memory MiB": own, "memory ratio": own / max(_peak(name, BASELINE), 1.0)}


@cache
def _peak(name: str, case: str) -> float:
    return peak_memory(__file__, name, case)


def _timed(made: dict[str, Run], runs: int) -> dict[str, dict[str, float]]:
    """Ratios of each explanation, run in turn with the baseline and nothing else: after another explanation caches are
    warm for the next one, and after the last one cold for the baseline."""
    found: dict[str, dict[str, float]] = {}
    for name, run in made.items():
        if name != BASELINE:
            found |= ratios(interleaved({BASELINE: made[BASELINE], name: run}, runs=runs), BASELINE)
    return found


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--only", default="", help="models whose name holds this; rows of others are kept as they were")
    parser.add_argument("--memory", action="store_true", help="measure memory alone, keep the times")
    parser.add_argument("--measure-memory", nargs=2, metavar=("MODEL", "CASE"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure_memory:
        name, case = options.measure_memory
        print(added_memory(cases(name, [] if case == BASELINE else [case])[case]))
        return
    if options.memory:
        report("cost", [{**row, **memory} for row in kept("cost")["rows"]
                        for memory in [_memory(row["model"], row["case"]) if options.only in row["model"] else {}]])
        return
    rows: list[dict[str, object]] = []
    for name, targets in TARGETS.items():
        if options.only not in name:
            rows += [row for row in kept("cost")["rows"] if row["model"] == name]
            continue
        runs = 40 * options.runs if name.startswith("MLP") else options.runs
        for case, found in _timed(cases(name, list(targets)), runs).items():
            rows.append({"model": name, "case": case, **found, "target": targets.get(case, 1.0), **_memory(name, case)})
    report("cost", rows)


if __name__ == "__main__":
    main()
