"""First-token sinks: attention parks what it does not need at a row's first token, and relevance gathers there.

Taking that relevance apart changes no other number: it is shown beside the map in place of in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from dlbc_runtime.arrays import Array
from dlbc_runtime.errors import InputError
from dlbc_runtime.explanation import Explanation

MODES = ("keep", "apart")


def check(mode: object) -> None:
    """InputError for what is no way to treat sinks."""
    if mode not in MODES:
        raise InputError(f"sinks={mode!r}", hint='"keep" or "apart"')


def apart(explanation: Explanation, *, sequence: bool) -> Explanation:
    """The explanation with the relevance of each row's first visible token in `sinks`, and 0 in its place.

    `sequence`: whether the output is one over positions. InputError where there are no token ids [B,T], or where
    neither such an output nor an attention mask says that their second axis is a text.
    """
    names = [name for name in explanation.relevance
             if explanation.inputs[name].dtype.kind in "iu" and explanation.inputs[name].ndim == 2]
    texts = [name for name in names if sequence or mask_of(explanation.inputs, name) is not None]
    if not texts:
        fact = ("no output over positions and no attention mask says that its token ids are a text" if names
                else "it takes no token ids [B,T]")
        raise InputError(f'the model has no first token: {fact}', where='sinks="apart"', hint="leave `sinks` out")
    kept = {group: dict(getattr(explanation, group)) for group in ("relevance", "positive", "negative")}
    found: dict[str, Array] = {}
    for name in texts:
        rows = np.arange(explanation.inputs[name].shape[0])
        first = first_visible(explanation.inputs, name)
        found[name] = np.array(kept["relevance"][name][..., rows, first], np.float32)
        for arrays in kept.values():
            if name in arrays:
                arrays[name] = arrays[name].copy()
                arrays[name][..., rows, first] = 0
    return replace(explanation, **kept, sinks=found)  # type: ignore[arg-type]


def first_visible(inputs: Mapping[str, Array], name: str) -> Array:
    """The first position of each row of an input [B,T] that its attention mask shows; 0 where there is no mask."""
    mask = mask_of(inputs, name)
    return np.zeros(len(inputs[name]), np.int64) if mask is None else (mask != 0).argmax(1)


def mask_of(inputs: Mapping[str, Array], name: str) -> Array | None:
    """The attention mask of an input [B,T]."""
    return next((mask for other, mask in inputs.items()
                 if "attention_mask" in other and mask.shape == inputs[name].shape), None)
