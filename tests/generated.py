"""Generation explanations made by hand, for tests of what shows and keeps them: no model is run."""

from __future__ import annotations

import numpy as np

from dlbc_runtime.explained import Method
from dlbc_runtime.generation import GenerationExplanation

PROMPT = ("<s>", "The", " capital", " of", " France", " is")
NEW = (" Paris", ",", " the", " cap", "ital", ".")
WORDS = (" Paris", " London", " a", " the", ",", ".", "ital", "tain", " cap", "\n")


def example(*, explained: tuple[int, ...] | None = None, contrast: bool = False, sinks: bool = False,
            layers: int = 3, finished: bool = True) -> GenerationExplanation:
    """Six new tokens after six: relevance falls with distance, with some of it negative; three layers, four
    alternatives each. `explained`: only those new tokens."""
    rng = np.random.default_rng(0)
    rows = np.arange(len(NEW)) if explained is None else np.array(explained, np.int64)
    length, count = len(PROMPT) + len(NEW), len(rows)
    relevance = causal(rng, rows, length)
    alternatives = tuple(
        tuple((int(i), WORDS[i], float(p)) for i, p in zip(rng.permutation(len(WORDS))[:4], (0.5, 0.2, 0.1, 0.01),
                                                           strict=True)) for _ in NEW)
    found = GenerationExplanation(
        ids=np.arange(100, 100 + length), prompt_length=len(PROMPT), tokens=PROMPT + NEW,
        text="".join(NEW).strip(), probabilities=np.linspace(0.9, 0.05, len(NEW), dtype=np.float32),
        explained=rows, relevance=relevance, values=np.linspace(12, 8, count, dtype=np.float32),
        alternatives=alternatives, layers={f"model.layers.{i}": causal(rng, rows, length) for i in range(layers)},
        target="contrast" if contrast else "chosen",
        against=np.full(count, 7) if contrast else None, against_tokens=(" London",) * count if contrast else (),
        rules="attnlrp", method=Method("Example", "torch", 100.0, {"generate": 0.5, "forward": 0.1, "relevance": 0.2},
                                       {"dlbc": "0"}), finished=finished)
    return found.with_sinks("apart") if sinks else found


def translated() -> GenerationExplanation:
    """Of an encoder-decoder: three new tokens after the decoder's start, of four source tokens."""
    rng = np.random.default_rng(1)
    return GenerationExplanation(
        ids=np.array([0, 5, 6, 1]), prompt_length=1, tokens=("<pad>", "Das", " Haus", "</s>"), text="Das Haus",
        probabilities=np.array([0.8, 0.7, 0.9], np.float32), explained=np.arange(3),
        relevance=causal(rng, np.arange(3), 4), values=np.array([3, 2, 1], np.float32),
        source_ids=np.array([8, 9, 10, 1]), source_tokens=("the", " house", ".", "</s>"),
        source_relevance=rng.normal(10, 5, (3, 4)).astype(np.float32), rules="attnlrp")


def causal(rng: np.random.Generator, rows: np.ndarray, length: int) -> np.ndarray:
    """Random relevance [rows, length] that sums to 100 in each row, and is 0 from the row's own position on."""
    prompt = length - len(NEW) if length > len(NEW) + 1 else 1
    values = rng.normal(1.0, 1.5, (len(rows), length))
    for row, number in enumerate(rows):
        values[row, prompt + number:] = 0
        values[row] *= 100 / values[row].sum() if abs(values[row].sum()) > 0.1 else 1
    return values.astype(np.float32)
