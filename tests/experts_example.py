"""Experts of made-up numbers, and the explanation that has them."""

from __future__ import annotations

import numpy as np

from dlbc_runtime.experts import ExpertLayer, Experts, ExpertSpec
from dlbc_runtime.explained import Explained, Method
from dlbc_runtime.explanation import Explanation

TOKENS = ("The", "▁capital", "▁of", "▁France", "▁is", "▁the", "▁city", "▁of")


def experts(layers: int = 4, count: int = 8, k: int = 2, rows: tuple[int, ...] = (1, 8), *, targets: int = 0,
            shared: bool = True, seed: int = 0) -> Experts:
    """Layers in which some experts are liked more than others, and relevance of both signs. `targets` 0: one, without
    an axis."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(layers):
        taste = rng.normal(size=count) * 1.2
        scores = taste + rng.normal(size=(*rows, count))
        ids = np.argsort(-scores, -1)[..., :k]
        weights = np.exp(np.take_along_axis(scores, ids, -1))
        weights /= weights.sum(-1, keepdims=True)
        lead = (targets,) if targets else ()
        tone = rng.normal(size=count)[ids] + 0.5
        relevance = weights * tone * np.exp(rng.normal(size=(*lead, *rows, 1))) * 4
        own = ExpertSpec(f"model.layers.{number}.mlp", count, shared, k)
        made.append(ExpertLayer.of(own, ids, weights.astype(np.float32), relevance.astype(np.float32),
                                   rng.normal(0.8, 1, (*lead, *rows)).astype(np.float32) if shared else None,
                                   many_targets=bool(targets)))
    return Experts(tuple(made))


def explanation(found: Experts | None = None, *, seed: int = 0) -> Explanation:
    """An explanation of next tokens of rows of `TOKENS`, whose experts these are."""
    found = experts() if found is None else found
    rng = np.random.default_rng(seed)
    lead = (found.seeds,) if found.many_targets else ()
    rows, length = found.rows, found.layers[0].rows[1]
    return Explanation(
        outputs={"logits": rng.normal(size=(rows, 1, 20)).astype(np.float32)},
        relevance={"input_ids": rng.normal(size=(*lead, rows, length)).astype(np.float32)},
        inputs={"input_ids": rng.integers(0, 20, (rows, length)), "attention_mask": np.ones((rows, length), np.int64)},
        target=tuple(Explained(row, one, "logits", 7 + one, position=length - 1, value=3.5, probability=0.62,
                               label="▁Paris".replace("▁", " "))
                     for one in range(found.seeds) for row in range(rows)),
        rules="attnlrp", many_targets=found.many_targets, method=Method("Qwen3MoeForCausalLM", "torch"),
        tokens=tuple(TOKENS[:length] if length <= len(TOKENS) else tuple(f"▁word{i}" for i in range(length))
                     for _ in range(rows)),
        experts=found)
