"""How much relevance gathers at the first token of a text: SmolLM2, with and without a start token in front.

docs/rules.md, "First-token sinks", has the figures. Run: `python benchmarks/sinks.py`.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests")]

import zoo  # noqa: E402

import dlbc  # noqa: E402

RULES = ("attnlrp", "cp-lrp")
FRONTS = (("text alone", ""), ("start token", "<|endoftext|>"))
TEXTS = (
    "The capital of France is",
    "Water freezes at zero degrees and boils at one hundred",
    "The opposite of hot is",
    "She opened the door, looked around and closed it",
    "Monday comes before",
    "The doctor told the nurse that the patient needed more",
    "In winter the days are short and the nights are",
    "My brother plays the piano and my sister plays the",
    "Two plus two makes",
    "The train to Berlin leaves at noon from platform",
    "A triangle has three sides and a square has",
    "He was born in Spain, so his first language is",
    "The sun rises in the",
    "To make bread you need flour, water, salt and",
    "The first president of the United States was George",
    "Bees make honey and cows give",
    "After years of war both countries finally signed a treaty of",
    "The largest planet of the solar system is",
    "If it rains tomorrow, we will stay at",
    "The book was so good that I read it in one",
)
RESULTS = Path(__file__).resolve().parent / "results" / "sinks.json"


def shares(relevance: np.ndarray) -> tuple[float, bool]:
    """The first token's share of all |R|, and whether no other token has more."""
    sizes = np.abs(relevance)
    return float(sizes[0] / sizes.sum()), bool(sizes.argmax() == 0)


def attention(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    """The weight that the last position gives to the first token, mean over layers and heads."""
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions
    return float(np.mean([layer[0, :, -1, 0].mean() for layer in weights]))


def row(values: list[float], first: list[bool] | None = None) -> dict[str, float]:
    """Mean, standard error and range, and how often the first token is the strongest."""
    part = np.array(values)
    return {"mean": part.mean(), "error": part.std(ddof=1) / len(part) ** 0.5, "smallest": part.min(),
            "largest": part.max()} | ({} if first is None else {"first": float(np.mean(first))})


def main() -> None:
    """Measure, print and write."""
    model, tokenizer = zoo.smollm2()
    found: dict[str, dict[str, float]] = {}
    model.set_attn_implementation("eager")  # the other gives no weights
    for name, front in FRONTS:
        found[f"attention, {name}"] = row([
            attention(model, dict(tokenizer(front + text, return_tensors="pt"))) for text in TEXTS])
    model.set_attn_implementation("sdpa")
    for rules in RULES:
        explainer = None
        for name, front in FRONTS:
            measured = []
            for text in TEXTS:
                inputs = dict(tokenizer(front + text, return_tensors="pt"))
                if explainer is None:
                    explainer = dlbc.compile(model, inputs, rules=rules)
                measured.append(shares(explainer(**inputs).relevance["input_ids"][0]))
            found[f"{rules}, {name}"] = row([share for share, _ in measured], [first for _, first in measured])
    for name, numbers in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in numbers.items()))
    lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    stored = {"model": "SmolLM2-135M-Instruct", "texts": len(TEXTS), "tokens": float(np.mean(lengths)),
              "torch": torch.__version__, "python": platform.python_version(), "found": found}
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
