"""What explanations on an H200 will take at least, counted without a GPU: memory, bytes moved, products, launches.

The program that is compiled for sm_90 is known to the last launch, so its bytes and products can be counted for any
size, with the model on the meta device (`_program.py`); so can those of plain forward + gradient (`_eager.py`). By the
card's rates they give a floor (`_floors.py`): nothing is measured.

`python benchmarks/predicted.py` counts all cases, writes results/predicted.json and the table in docs/triton.md;
`--steps CASE` shows where one case's time goes.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in (".", "runtime")]

from _eager import Tally, counted, fused  # noqa: E402
from _floors import Step, Total  # noqa: E402
from _gpu_models import (  # noqa: E402
    LEAST,
    bert,
    gradient_of_texts,
    gradient_of_tokens,
    gradient_of_vectors,
    llama,
    resnet,
    vit,
)
from _measure import ROOT, kept, report, section  # noqa: E402
from _program import steps_of  # noqa: E402

import dlbc  # noqa: E402

PAGE = ROOT / "docs" / "triton.md"
BEGIN, END = "<!-- predicted: begin (python benchmarks/predicted.py) -->", "<!-- predicted: end -->"
CHECKED = ("LLaMA 8 x 512, 512 tokens", "BERT-base, 8 texts of 128 tokens", "ResNet-18, 4 pictures of 224 x 224")
"""Cases of `cost.py` whose baseline's memory was measured on a CPU: counting is held to them."""

Row = dict[str, Any]
MODELS: dict[str, Callable[..., Any]] = {"LLaMA-3.2-3B": llama, "BERT-base": bert, "ResNet-50": resnet,
                                         "ViT-B/16": vit}


@dataclass(frozen=True)
class Case:
    """A model of `MODELS`, rules, sizes, and what we want of it (docs/triton.md). `goal`: milliseconds; else "eager" or
    "fused", the floor of forward + gradient as torch runs it, or with all that is pointwise for nothing; or a share of
    as many calls with one target."""

    model: str
    rules: str
    sizes: Mapping[str, int]
    goal: float | str | None = None
    targets: int = 1
    small: bool = field(default=False, kw_only=True)

    @property
    def name(self) -> str:
        """As the table says it."""
        sizes = [f"{self.sizes['T']} tokens"] if "T" in self.sizes else []
        sizes += [f"batch {self.sizes['B']}"] if self.sizes["B"] > 1 else []
        sizes += [f"{self.targets} targets"] if self.targets > 1 else []
        return ", ".join([self.model, *sizes])

    @property
    def inputs(self) -> torch.Tensor:
        """Inputs of these sizes, without numbers."""
        shape = (self.sizes["B"], self.sizes["T"]) if "T" in self.sizes else (self.sizes["B"], 3, 224, 224)
        return torch.zeros(shape, dtype=torch.long if "T" in self.sizes else torch.float32, device="meta")


LLAMA, BATCH = "LLaMA-3.2-3B", {"B": 32}
CASES = (
    Case(LLAMA, "attnlrp", {"B": 1, "T": 128}, 1.5 * LEAST["attnlrp", 128]),
    Case(LLAMA, "attnlrp", {"B": 1, "T": 512}, 1.5 * LEAST["attnlrp", 512]),
    Case(LLAMA, "cp-lrp", {"B": 1, "T": 128}), Case(LLAMA, "cp-lrp", {"B": 1, "T": 512}),
    Case(LLAMA, "dlb", {"B": 1, "T": 128}, 1.5 * LEAST["dlb", 128]),
    Case(LLAMA, "dlb", {"B": 1, "T": 512}, 1.5 * LEAST["dlb", 512]),
    Case(LLAMA, "dlb", {"B": 1, "T": 512}, 0.4, 64), Case(LLAMA, "dlb", {"B": 1, "T": 8192}),
    Case("BERT-base", "attnlrp", BATCH | {"T": 128}, "eager"), Case("ResNet-50", "epsilon-plus", BATCH, "eager"),
    Case("ViT-B/16", "epsilon", BATCH, "fused"))


@cache
def explainer_of(model: str, rules: str, small: bool) -> dlbc.Explainer:
    """The explainer of a model on the meta device, compiled for sm_90; sizes are free."""
    sizes = {"B": 2, "T": 64} if model in (LLAMA, "BERT-base") else {"B": 2}
    return dlbc.compile(MODELS[model]("meta", small=small), Case(model, rules, sizes).inputs, rules=rules,
                        backend="triton", target="sm_90", cache=False)


def baseline_of(case: Case) -> Tally:
    """Plain forward + gradient."""
    model = MODELS[case.model]("meta", small=case.small)
    gradient = {LLAMA: gradient_of_tokens, "BERT-base": gradient_of_texts}.get(case.model, gradient_of_vectors)
    return counted(gradient(model, case.inputs))


def steps(case: Case, **options: str) -> list[Step]:
    """The launches of one explanation."""
    explainer = explainer_of(case.model, case.rules, case.small)
    return steps_of(explainer, explainer.memory(sizes=case.sizes, target=list(range(case.targets))).sizes, **options)


def row_of(case: Case) -> Row:
    """What is counted of a case."""
    explainer, baseline = explainer_of(case.model, case.rules, case.small), baseline_of(case)
    memory = explainer.memory(sizes=case.sizes, target=list(range(case.targets)))
    found = steps(case)
    total, eager = Total.of(found), Total.of(baseline.steps)
    row: Row = {
        "case": case.name, "rules": case.rules, "targets": case.targets, "memory, GB": memory.peak.total / 1e9,
        "forward + gradient, GB": baseline.peak / 1e9, "weights, GB": weights(explainer) / 1e9,
        "moved, GB": total.bytes / 1e9, "products, ms": 1e3 * total.products, "launches": total.launches,
        "by torch": sum(s.launches for s in found if s.runs == "torch"), "floor, ms": 1e3 * total.seconds,
        "floor of exact products, ms": 1e3 * Total.of(steps(case, asked="ieee")).seconds,
        "forward + gradient, ms": 1e3 * eager.seconds,
        "forward + gradient fused, ms": 1e3 * Total.of(fused(baseline.steps)).seconds}
    goal = {"eager": row["forward + gradient, ms"], "fused": row["forward + gradient fused, ms"],
            None: None}.get(case.goal, case.goal)  # type: ignore[arg-type]
    if case.targets > 1:
        one = Total.of(steps(Case(case.model, case.rules, case.sizes, small=case.small))).seconds
        goal = 1e3 * float(goal) * case.targets * one
    return row if goal is None else row | {"goal, ms": goal}


def weights(explainer: dlbc.Explainer) -> int:
    """Bytes of the model's weights, each once."""
    found = {id(w): w.nbytes for w in explainer.weights.values()}
    return sum(found.values())


def checked() -> list[Row]:
    """Memory of forward + gradient, counted on a CPU, beside what processes were seen to take (MiB)."""
    from _cases import MODELS as measured_models

    seen = {row["model"]: row["memory MiB"] for row in kept("cost")["rows"] if row["case"] == "forward + gradient"}
    return [{"case": name, "counted": counted(measured_models[name]().baseline, meta=False).peak / 2**20,
             "measured": seen[name]} for name in CHECKED]


# --- the table ---------------------------------------------------------------------------------------

def table(found: Mapping[str, Any]) -> str:
    """The section between the markers."""
    rows: Sequence[Row] = found["rows"]
    longest = max((row for row in rows if "tokens" in row["case"]), key=lambda row: row["forward + gradient, GB"])
    exact = "; ".join(f"{row['case']}, `{row['rules']}`: {row['floor of exact products, ms']:.2f} ms" for row in rows
                      if row["case"].startswith(LLAMA) and "goal, ms" in row)
    above = "; ".join(f"{row['case']}, `{row['rules']}`" for row in rows
                      if "goal, ms" in row and row["floor, ms"] > row["goal, ms"])
    check = "; ".join(f"{row['case']}: {row['counted']:.0f} MiB for {row['measured']:.0f}" for row in found["checked"])
    return "\n".join([
        "| case | rules | memory, GB | ÷ (forward + gradient) | moved, GB | products, ms | launches | floor, ms "
        "| goal, ms |",
        "|---|---|---|---|---|---|---|---|---|", *map(_line, rows), "",
        f"{longest['case']} with its weights ({longest['weights, GB']:.1f} GB) takes "
        f"{longest['memory, GB'] + longest['weights, GB']:.1f} GB; we want at most 40.", "",
        *([f"Above its goal: {above}. For denominators weights are read once more; made in the forward pass, they "
           "would have to be kept.", ""] if above else []),
        'With `precision="ieee"`, relevance times bfloat16 weights is two products, which keep 16 bits of it. '
        f"Floors then: {exact}.", "",
        "Memory of forward + gradient, counted in the same way on a CPU, and as processes were seen to take it: "
        + check + ".", ""])


def _line(row: Row) -> str:
    goal = f"{row['goal, ms']:.3g}" if "goal, ms" in row else ""
    share = f"{row['memory, GB'] / row['forward + gradient, GB']:.2f}" if row["targets"] == 1 else ""
    return (f"| {row['case']} | `{row['rules']}` | {row['memory, GB']:.2f} | {share} | {row['moved, GB']:.1f} "
            f"| {row['products, ms']:.2f} | {row['launches']} | {row['floor, ms']:.2f} | {goal} |")


def page(text: str, found: Mapping[str, Any]) -> str:
    """docs/triton.md with a current table; `found`: what results/predicted.json holds."""
    return section(text, BEGIN, END, table({"rows": found["rows"], "checked": found["machine"]["checked"]}))


def shown(case: Case) -> str:
    """Where a case's time goes: layers together, the longest first."""
    groups: dict[tuple[str, ...], list[Step]] = defaultdict(list)
    for step in steps(case):
        groups[step.runs, step.op, re.sub(r"\.\d+", ".*", step.place)].append(step)
    lines = ["   ms    GB  launches"]
    for key, own in sorted(groups.items(), key=lambda item: -Total.of(item[1]).seconds):
        total = Total.of(own)
        lines.append(f"{1e3 * total.seconds:5.2f} {total.bytes / 1e9:5.2f} {total.launches:5d}  {'  '.join(key)}")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", metavar="CASE", help="where the time of the cases goes whose name has this in it")
    options = parser.parse_args()
    if options.steps is not None:
        for case in CASES:
            if options.steps in f"{case.name} {case.rules}":
                print(f"{case.name}, {case.rules}\n{shown(case)}")
        return
    check = checked()
    report("predicted", [row_of(case) for case in CASES], checked=check)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), kept("predicted")), encoding="utf-8")


if __name__ == "__main__":
    main()
