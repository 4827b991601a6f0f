"""What of the figures is the library that multiplies: explanations by oneDNN's products and by torch's own.

torch multiplies float32 matrices by MKL. Where that is the slower one (`dlbc_runtime/torch_products.py`), explanations
take oneDNN's, and the baseline, which is torch's, does not. Here they run in turn with both, and with none but MKL's.

    python benchmarks/products.py [--threads 2] [--runs 9] [--only LLaMA]
    python benchmarks/products.py --table          writes the table of docs/speed.md from the kept figures only
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _cases import BASELINE, Run, bert_base, llama
from _measure import interleaved, kept, ratios, report, write_section

PAGE = Path(__file__).resolve().parents[1] / "docs" / "speed.md"
BEGIN, END = "<!-- products: begin (python benchmarks/products.py --table) -->", "<!-- products: end -->"
MODELS = {"LLaMA 8 x 512, 128 tokens": (llama, ("cp-lrp", "attnlrp", "dlb")),
          "BERT-base, 8 texts of 128 tokens": (bert_base, ("cp-lrp", "dlb"))}
OWN = "torch's own products"


def by_mkl(run: Run) -> Run:
    """The same, with oneDNN switched off: these models have no convolution that would miss it."""
    def switched() -> object:
        with torch.backends.mkldnn.flags(enabled=False):
            return run()

    return switched


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--only", default="", help="models whose name holds this; rows of others are kept as they were")
    parser.add_argument("--table", action="store_true", help="write the table from the last results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.table:
        measure(options.runs, options.only)
    write_section(PAGE, BEGIN, END, table(kept("products")["rows"]))


def table(rows: list[dict[str, object]]) -> str:
    """The table of docs/speed.md."""
    found = {(row["model"], row["case"]): f"{row['median']:.2f} ({row['min']:.2f} to {row['max']:.2f})" for row in rows}
    return "\n".join([f"| model | rules | time ÷ (forward + gradient) | with {OWN} |", "|---|---|---|---|", *(
        f"| {model} | `{rules}` | {text} | {found[model, f'{rules}, {OWN}']} |"
        for (model, rules), text in found.items() if rules != BASELINE and OWN not in str(rules)), ""])


def measure(runs: int, only: str) -> None:
    """Run all cases, and keep what was found."""
    rows: list[dict[str, object]] = []
    for name, (make, presets) in MODELS.items():
        if only not in name:
            rows += [row for row in kept("products")["rows"] if row["model"] == name]
            continue
        case = make()
        ours = {rules: case.explanation(rules) for rules in presets}
        cases: dict[str, Run] = {BASELINE: case.baseline, **ours,
                                 **{f"{rules}, {OWN}": by_mkl(run) for rules, run in ours.items()}}
        rows += [{"model": name, "case": label, **found}
                 for label, found in ratios(interleaved(cases, runs=runs), BASELINE).items()]
    report("products", rows)


if __name__ == "__main__":
    main()
