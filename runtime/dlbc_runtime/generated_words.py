"""Words of generated text: tokens merged where no space stands between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dlbc_runtime.arrays import Array
from dlbc_runtime.generation import GenerationExplanation


def word_spans(tokens: Sequence[str], apart: Sequence[int] = ()) -> Array:
    """The tokens [first, after the last] of each word, int64 [W, 2]. `apart`: positions where a word begins anyway.

    A word begins at the first token, at each that starts with a blank, and after each that ends with one. Special
    tokens (`<s>`, `[SEP]`) and punctuation are words of their own; an apostrophe or hyphen belongs to its word.
    """
    starts = []
    for place, token in enumerate(tokens):
        before = tokens[place - 1] if place else " "
        if place in apart or token[:1].isspace() or before[-1:].isspace() or _alone(token) or _alone(before):
            starts.append(place)
    return np.array([*zip(starts, [*starts[1:], len(tokens)], strict=False)], np.int64).reshape(-1, 2)


def merged(found: GenerationExplanation) -> GenerationExplanation:
    """What `GenerationExplanation.words` returns."""
    spans = word_spans(found.tokens, (found.prompt_length,))
    prompt = int((spans[:, 0] < found.prompt_length).sum())
    new = spans[prompt:]
    owner = np.repeat(np.arange(len(spans)), spans[:, 1] - spans[:, 0])[found.prompt_length:] - prompt
    words, row_word = np.unique(owner[found.explained], return_inverse=True)
    rows = _means(row_word, len(words))
    columns = _sums(spans, len(found.tokens))

    def of_tokens(array: Array) -> Array:
        return np.asarray(rows @ array @ columns, np.float32)

    def alternatives(first: int, after: int) -> tuple[tuple[int, str, float], ...]:
        numbers = first - found.prompt_length
        return found.alternatives[numbers] if found.alternatives and after - first == 1 else ()

    source = found.source_relevance
    source_spans = word_spans(found.source_tokens)
    return replace(
        found, ids=found.ids[spans[:, 0]], prompt_length=prompt, tokens=_joined(found.tokens, spans), spans=spans,
        probabilities=np.array([found.probabilities[first - found.prompt_length:after - found.prompt_length].prod()
                                for first, after in new], np.float32),
        alternatives=tuple(alternatives(int(first), int(after)) for first, after in new),
        explained=words, relevance=of_tokens(found.relevance), values=np.asarray(rows @ found.values, np.float32),
        layers={name: of_tokens(array) for name, array in found.layers.items()},
        sinks=None if found.sinks is None else np.asarray(rows @ found.sinks, np.float32),
        against=None if found.against is None else found.against[np.argmax(rows > 0, 1)],
        against_tokens=tuple(found.against_tokens[int(row)] for row in np.argmax(rows > 0, 1))
        if found.against_tokens else (),
        experts=None, source_ids=None if found.source_ids is None else found.source_ids[source_spans[:, 0]],
        source_tokens=_joined(found.source_tokens, source_spans),
        source_relevance=None if source is None else np.asarray(
            rows @ source @ _sums(source_spans, source.shape[1]), np.float32))


def _alone(token: str) -> bool:
    """Whether a token is one that tokenizers write around texts, punctuation, or nothing."""
    text = token.strip()
    special = len(text) > 2 and (text[0] + text[-1]) in ("<>", "[]")
    return special or not any(one.isalnum() or one in "'’-_" for one in text)


def _joined(tokens: Sequence[str], spans: Array) -> tuple[str, ...]:
    return tuple("".join(tokens[first:after]) for first, after in spans)


def _means(groups: Array, count: int) -> Array:
    """A matrix [count, rows] that averages rows of the same group."""
    found = (groups[None, :] == np.arange(count)[:, None]).astype(np.float64)
    return np.asarray(found / np.maximum(found.sum(1, keepdims=True), 1))


def _sums(spans: Array, length: int) -> Array:
    """A matrix [length, words] that adds up the tokens of each word."""
    places = np.arange(length)[:, None]
    return ((places >= spans[:, 0]) & (places < spans[:, 1])).astype(np.float64)
