"""Mixtures of experts: what experts that no token uses cost, how long real configurations take to compile, and whether
the relevance of experts tells what their use does not.

- `unused experts`: an explanation of a model with 64 experts of which 16 are ever used, over one with these 16 alone.
- `compile`: seconds from a model without numbers (on the meta device, bfloat16) to an explainer, in a fresh process.
- `known answer`: of texts that use a letters' and a digits' expert once each, how often relevance (by rules), or the
  use of experts, says which of the two the question is about (`tests/trained_experts.py`, models of several seeds).

Run: `python benchmarks/experts.py [--threads 2] [--runs 15] [--seeds 3] [--only compile]`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests"), str(Path(__file__).resolve().parent)]

from _cases import Run, qwen3_moe  # noqa: E402
from _measure import interleaved, kept, ratios, report, write_section  # noqa: E402

PAGE = Path(__file__).resolve().parents[1] / "docs" / "moe.md"
BEGIN, END = "<!-- experts: begin (python benchmarks/experts.py --table) -->", "<!-- experts: end -->"
RULES = ("cp-lrp", "attnlrp", "dlb")
QUESTIONS = 256
Row = dict[str, object]


def olmoe() -> Any:
    """allenai/OLMoE-1B-7B-0924."""
    from transformers import OlmoeConfig

    return OlmoeConfig(vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16,
                       num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8,
                       norm_topk_prob=False, max_position_embeddings=4096)


def qwen3_30b() -> Any:
    """Qwen/Qwen3-30B-A3B."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
                          num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
                          num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
                          max_position_embeddings=40960)


def gpt_oss() -> Any:
    """openai/gpt-oss-20b."""
    from transformers import GptOssConfig

    return GptOssConfig(num_hidden_layers=24, num_local_experts=32)


CONFIGURATIONS: dict[str, Callable[[], Any]] = {
    "OLMoE-1B-7B": olmoe, "Qwen3-30B-A3B": qwen3_30b, "GPT-OSS-20B": gpt_oss}


def unused_experts(runs: int) -> Iterator[Row]:
    """Time with 48 unused experts over that without."""
    few, many = qwen3_moe(), qwen3_moe(experts=64)
    for rules in RULES:
        cases: dict[str, Run] = {"16": few.explanation(rules), "64": many.explanation(rules)}
        found = ratios(interleaved(cases, runs=runs), "16")["64"]
        yield {"claim": "unused experts", "case": rules, "value": found["median"], "low": found["min"],
               "high": found["max"], "target": 1.15}


def compiled(name: str) -> float:
    """Seconds that a configuration takes to compile, in this process."""
    from transformers import AutoModelForCausalLM

    import dlbc

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGURATIONS[name](), dtype=torch.bfloat16).eval()
        ids = torch.zeros((1, 8), dtype=torch.int64)
    started = time.perf_counter()
    explainer = dlbc.compile(model, ids, rules="attnlrp", backend="torch", cache=False)
    seconds = time.perf_counter() - started
    explainer.memory(sizes={"B": 1, "T": 512})  # there is a plan
    return seconds


def compile_times() -> Iterator[Row]:
    """Each configuration in a process of its own."""
    for name in CONFIGURATIONS:
        command = [sys.executable, __file__, "--compile", name]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        yield {"claim": "compile", "case": name, "value": float(found.stdout.split()[-1]), "target": 60.0}


def known_answer(seeds: int) -> Iterator[Row]:
    """How often the kind asked for is told, over models of several seeds."""
    import trained_experts

    import dlbc

    told: dict[str, list[float]] = {}
    for seed in range(seeds):
        model, _ = trained_experts.trained(seed)
        asked = trained_experts.questions(QUESTIONS, torch.Generator().manual_seed(seed + 1))
        digits = asked.asked.numpy() == 1
        for rules in (*RULES, "auto"):
            experts = dlbc.compile(model, asked.ids[:4], rules=rules, cache=False)(asked.ids).experts
            assert experts is not None
            (layer,) = experts.values()
            told.setdefault(f"relevance, {rules}", []).append(_told(layer.ids, np.abs(layer.relevance), digits))
            told.setdefault("use", []).append(_told(layer.ids, np.ones(layer.ids.shape), digits))
    for case, found in told.items():
        yield {"claim": "known answer", "case": case, "value": float(np.mean(found)), "low": min(found),
               "high": max(found)}


def _told(ids: Any, amount: Any, digits: Any) -> float:
    """How often the digits' expert has more than the letters' where digits were asked for, and less where not; as often
    as not where they have the same."""
    letters_own, digits_own = (np.where(ids == expert, amount, 0.0).sum((1, 2)) for expert in range(2))
    return float(np.where(letters_own == digits_own, 0.5, (digits_own > letters_own) == digits).mean())


def table(rows: list[Row]) -> str:
    """The section of docs/moe.md."""
    def of(claim: str) -> list[Row]:
        return [row for row in rows if row["claim"] == claim]

    def span(row: Row) -> str:
        return f"{float(str(row['value'])):.2f} ({float(str(row['low'])):.2f} to {float(str(row['high'])):.2f})"

    return "\n".join([
        "| | rules | 64 experts, 16 in use ÷ 16 experts | we want at most |", "|---|---|---|---|",
        *(f"| time | `{row['case']}` | {span(row)} | {row['target']} |" for row in of("unused experts")), "",
        "| real configuration, no weights | seconds to compile | we want at most |", "|---|---|---|",
        *(f"| {row['case']} | {float(str(row['value'])):.1f} | {row['target']} |" for row in of("compile")), "",
        "| what tells which kind was asked for | right, mean over models (least to most) |", "|---|---|",
        *(f"| {row['case']} | {span(row)} |" for row in of("known answer")), ""])


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="a claim; rows of others are kept as they were")
    parser.add_argument("--compile", metavar="CONFIGURATION")
    parser.add_argument("--table", action="store_true", help="write the tables of docs/moe.md from the last results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.compile:
        print(compiled(options.compile))
        return
    if not options.table:
        rows: list[Row] = []
        for claim, measure in (("unused experts", lambda: unused_experts(options.runs)), ("compile", compile_times),
                               ("known answer", lambda: known_answer(options.seeds))):
            rows += measure() if options.only in claim else [
                row for row in kept("experts")["rows"] if row["claim"] == claim]
        report("experts", [{key: row.get(key, "") for key in ("claim", "case", "value", "low", "high", "target")}
                           for row in rows])
    write_section(PAGE, BEGIN, END, table(kept("experts")["rows"]))


if __name__ == "__main__":
    main()
