"""The sets by name."""

from __future__ import annotations

from functools import partial

from benchmarks.faithfulness import images, prompts, recall, small, texts
from benchmarks.faithfulness.dataset import DataSet, Loader, Split

ITEMS: dict[str, int] = {
    "breast-cancer": 160, "digits-mlp": 200, "digits-cnn": 200, "digits-vgg": 200, "digits-resnet": 200,
    "digits-densenet": 200, "digits-vit": 200, "reuters": 200, "minilm-sentiment": 200, "gpt2-recall": 200,
    "llama-recall": 200, "smollm2-short": 60, "smollm2-early": 60, "efficientnet": 200}
"""Sets, with how many items are measured where nothing else is asked for."""

LOADERS: dict[str, Loader] = {
    "breast-cancer": small.breast_cancer, "reuters": texts.reuters, "minilm-sentiment": texts.minilm_sentiment,
    "gpt2-recall": partial(recall.recall, "gpt2"), "llama-recall": partial(recall.recall, "llama"),
    "smollm2-short": prompts.smollm2_short, "smollm2-early": prompts.smollm2_early,
    "efficientnet": images.efficientnet,
    **{f"digits-{family}": partial(small.digits, family) for family in small.STEPS}}


def load(name: str, split: Split = "held", items: int | None = None) -> DataSet:
    """A set, its first `items` items (default: `ITEMS`). The first time it fetches data and trains its model.

    KeyError for a name that does not exist.
    """
    if name not in LOADERS:
        raise KeyError(f"unknown set {name!r}; there are {', '.join(ITEMS)}")
    return LOADERS[name](split).first(items or ITEMS[name])
