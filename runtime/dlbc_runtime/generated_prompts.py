"""Prompts as rows of token ids, and what must be true of them before a model continues them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlbc_runtime.arrays import Array, as_numpy
from dlbc_runtime.errors import InputError

log = logging.getLogger(__name__)


def rows_of(prompt: object, tokenizer: Any, mask: object = None) -> tuple[list[Array], bool]:
    """Token ids int64 [T] of each prompt, without padding, and whether there were several of them.

    `prompt`: a text, or token ids [T] or [1, T]; several of them: a list of texts or of rows of ids, or ids [B, T];
    what a tokenizer returns (a mapping with `input_ids`, and `attention_mask` where they are padded). InputError for
    prompts that are empty, that are texts without a tokenizer, or that are masked in their middle.
    """
    if isinstance(prompt, Mapping) or hasattr(prompt, "input_ids"):
        given: Any = prompt
        if "input_ids" not in given:
            raise InputError(f"there are no `input_ids` among {', '.join(map(repr, given))}", where="prompt",
                             hint="give what the tokenizer returns, or the text itself")
        return rows_of(given["input_ids"], tokenizer, given.get("attention_mask", mask))
    if isinstance(prompt, str):
        return [_encoded(prompt, tokenizer)], False
    if isinstance(prompt, list | tuple) and prompt and all(isinstance(one, str) for one in prompt):
        return [_encoded(one, tokenizer) for one in prompt], True
    if isinstance(prompt, list | tuple) and prompt and not all(isinstance(one, int | np.integer) for one in prompt):
        if mask is None:
            return [_ids(as_numpy(one), number) for number, one in enumerate(prompt)], True
        prompt = np.asarray(prompt)
    ids = as_numpy(prompt)
    if ids.ndim == 1:
        return [_ids(ids, 0)], False
    if ids.ndim != 2 or not len(ids):
        raise InputError(f"the prompt is {ids.dtype}{list(ids.shape)}", where="prompt",
                         hint="give a text, token ids [T] or [B,T], or a list of them")
    visible = np.ones(ids.shape, bool) if mask is None else as_numpy(mask) != 0
    if visible.shape != ids.shape:
        raise InputError(f"the attention mask is {list(visible.shape)}, the ids {list(ids.shape)}", where="prompt",
                         hint="give what the tokenizer returned")
    return [_ids(_seen(of_row, shown, number), number)
            for number, (of_row, shown) in enumerate(zip(ids, visible, strict=True))], len(ids) > 1


def check(rows: Sequence[Array], *, vocabulary: int, context: int | None, new: int) -> None:
    """InputError for ids that the model does not have, and for prompts that leave no room for `new` tokens."""
    for number, ids in enumerate(rows):
        wrong = ids[(ids < 0) | (ids >= vocabulary)]
        if len(wrong):
            raise InputError(f"prompt {number} holds token {int(wrong[0])}, and the model has {vocabulary}",
                             where="prompt", hint="is the tokenizer this model's own?")
        if context is not None and len(ids) + new > context:
            remedy = f"at most {context - len(ids)} new tokens" if len(ids) < context else "shorten it"
            longer = f", and with {new} new ones it is longer than" if new else ": more than"
            raise InputError(f"prompt {number} has {len(ids)} tokens{longer} the model's context of {context}",
                             where="prompt", hint=remedy)


def check_tokenizer(tokenizer: Any, model: Any, vocabulary: int) -> None:
    """InputError where a tokenizer has tokens that the model does not know; a warning where its special tokens are not
    the model's."""
    missing = next((name for name in ("__len__", "__call__", "convert_ids_to_tokens") if not hasattr(tokenizer, name)),
                   None)
    if missing is not None:
        raise InputError(f"the tokenizer is {type(tokenizer).__name__}, which has no `{missing}`", where="tokenizer",
                         hint="give one of transformers, as AutoTokenizer.from_pretrained returns it")
    size = len(tokenizer)
    if size > vocabulary:
        raise InputError(f"the tokenizer has {size} tokens, the model {vocabulary}: it is another model's",
                         where="tokenizer", hint="load both from the same folder; after adding tokens call "
                                                 "model.resize_token_embeddings(len(tokenizer)) and compile again")
    for name in ("eos_token_id", "bos_token_id"):
        own, models = getattr(tokenizer, name, None), ids_named(model, name)
        if own is not None and models and own not in models:
            log.warning("%s of the tokenizer is %s, of the model %s: are they of the same model?", name, own,
                        ", ".join(map(str, models)))


def ids_named(model: Any, name: str) -> list[int]:
    """A special token's ids by the model's generation settings, or its configuration; none where neither has it."""
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found = getattr(holder, name, None)
        if isinstance(found, int):
            return [found]
        if isinstance(found, list | tuple) and found:
            return [int(one) for one in found]
    return []


def padded(rows: Sequence[Array], pad: int, *, left: bool) -> tuple[Array, Array]:
    """Ids and attention mask int64 [B, T] of rows of different lengths."""
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), pad, np.int64), np.zeros((len(rows), width), np.int64)
    for number, row in enumerate(rows):
        own = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, own], mask[number, own] = row, 1
    return ids, mask


def texts_of(ids: Array, tokenizer: Any) -> tuple[str, ...]:
    """The text of each token, with the space or line breaks that belong to it; the ids where there is no tokenizer."""
    from dlbc_runtime.views.tokens import display

    if tokenizer is None:
        return tuple(f" {int(one)}" for one in ids)
    names = tokenizer.convert_ids_to_tokens([int(one) for one in ids])
    known = [f"[{int(i)}]" if name is None else str(name) for i, name in zip(ids, names, strict=True)]
    # How a tokenizer marks spaces is seen by any two words; the tokens asked for may hold no mark.
    two = list(tokenizer.tokenize("a a")) if hasattr(tokenizer, "tokenize") else []
    marked = two if any(mark in token for token in two for mark in "Ġ▁") else []
    return tuple(one.spaced + "\n" * one.breaks for one in display([*marked, *known])[len(marked):])


def _encoded(text: str, tokenizer: Any) -> Array:
    if tokenizer is None:
        raise InputError("the prompt is a text, and there is no tokenizer", where="prompt",
                         hint="explainer.sampler(tokenizer), or give token ids")
    if not text:
        raise InputError("the prompt is empty", where="prompt", hint="give at least one token to continue")
    return _ids(np.asarray(tokenizer(text)["input_ids"]), 0)


def _ids(ids: Array, number: int) -> Array:
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and len(ids)):
        raise InputError(f"prompt {number} is {ids.dtype}{list(ids.shape)}, not token ids [T]", where="prompt",
                         hint="give a text, token ids [T] or [B,T], or a list of them")
    if not len(ids):
        raise InputError(f"prompt {number} is empty", where="prompt", hint="give at least one token to continue")
    return ids.astype(np.int64)


def _seen(ids: Array, visible: Array, number: int) -> Array:
    """A row without the padding at its ends."""
    places = np.flatnonzero(visible)
    if len(places) and places[-1] - places[0] + 1 != len(places):
        raise InputError(f"prompt {number} is masked in its middle", where="prompt",
                         hint="padding stands at the left or right end of a row")
    return np.asarray(ids[visible])
