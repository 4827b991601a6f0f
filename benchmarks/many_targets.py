"""Many targets at once: time of one call with 16 targets over that of 16 calls with one, LLaMA 8 x 512, 128 tokens.

A call shares the forward pass, denominators and attention weights between its targets. Run in turn in one process:
`python benchmarks/many_targets.py [--threads 2] [--runs 7]`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _cases import Run, llama
from _measure import interleaved, ratios, report

COUNT = 16
TARGETS = {"dlb": 0.45, "cp-lrp": 0.6, "attnlrp": 0.6}


def cases(rules: str) -> dict[str, Run]:
    """16 targets in one call, and one after another."""
    import dlbc

    case = llama()
    explainer = dlbc.compile(case.model, case.inputs, rules=rules, cache=False)
    targets = list(range(0, 1000 * COUNT, 1000))

    def one_call() -> object:
        return dict(explainer(case.inputs, target=targets).relevance)

    def single_calls() -> object:
        return [dict(explainer(case.inputs, target=target).relevance) for target in targets]

    return {"16 calls": single_calls, "one call": one_call}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    for rules, target in TARGETS.items():
        timed = ratios(interleaved(cases(rules), runs=options.runs), "16 calls")
        rows += [{"rules": rules, "case": case, **found, "target": target if case == "one call" else 1.0}
                 for case, found in timed.items()]
    report("many_targets", rows)


if __name__ == "__main__":
    main()
