"""An explained generation as one HTML page: the text with its sources, the matrix, and what could have come instead.

The page holds numbers, not pictures: float32 in base64 (one byte each by layer), which its script shows as asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlbc_runtime.arrays import Array, Json
from dlbc_runtime.generated_words import word_spans
from dlbc_runtime.generation import GenerationExplanation
from dlbc_runtime.views import experts
from dlbc_runtime.views.numbers import number, seconds
from dlbc_runtime.views.page import embedded, framed, packed, rendered
from dlbc_runtime.views.png import shades
from dlbc_runtime.views.tokens import Token, display

TARGETS = {"chosen": "", "contrast": "why this rather than that", "probability": "log-odds of the token"}


def generation_html(explanation: GenerationExplanation, title: str = "") -> str:
    """The page as text. It needs no other file and no network."""
    found = explanation
    several = found.spans is None and len(_words(found)) < len(found.source_tokens) + len(found.tokens)
    return rendered(
        "generation.html.jinja", title or found.method.model or "Generation",
        ("generation.css", *(experts.STYLES if found.experts else ())),
        ("parts.js", "generation.js", *(experts.SCRIPTS[1:] if found.experts else ())),
        experts=experts.view(found.experts) if found.experts else None, facts=_facts(found), notes=_notes(found),
        plain="".join(found.tokens), has_words=several, has_sink=_has_sink(found), sink_kept=found.sinks is None,
        layers=list(found.layers),
        has_source=bool(found.source_tokens), data=embedded(_data(found, several)))


def generation_notebook(explanation: GenerationExplanation) -> str:
    """The page in a frame of its own."""
    return framed(generation_html(explanation), "explained generation", 860)


def _facts(found: GenerationExplanation) -> tuple[tuple[str, str], ...]:
    method = found.method
    facts = [("strategy", found.strategy.replace("_", " ")), ("rules", found.rules), ("backend", method.backend),
             ("explained", TARGETS.get(found.target, found.target)),
             ("log probability", number(found.log_probability))]
    facts += [(stage, seconds(time)) for stage, time in method.seconds.items()] + list(method.versions.items())
    return tuple((name, text) for name, text in facts if text)


def _notes(found: GenerationExplanation) -> tuple[str, ...]:
    new, done = len(found.tokens) - found.prompt_length, len(found.explained)
    notes = [] if found.finished else [f"Interrupted: {done} of {new} new tokens are explained."]
    lost = int((~np.isfinite(found.relevance)).sum())
    return (*notes, *([f"Numbers that are not finite: {lost}."] if lost else []))


def _has_sink(found: GenerationExplanation) -> bool:
    return found.source_relevance is None and bool(len(found.tokens)) and bool(len(found.explained))


def _words(found: GenerationExplanation) -> list[int]:
    """Where words begin, the source's tokens counted first."""
    source = [int(start) for start, _ in word_spans(found.source_tokens)]
    own = [int(start) for start, _ in word_spans(found.tokens, (found.prompt_length,))]
    return [*source, *(len(found.source_tokens) + start for start in own)]


def _data(found: GenerationExplanation, several: bool) -> Json:
    """What the script reads. An axis of tokens holds those of an encoder's source first, then the sequence."""
    source, rows = len(found.source_tokens), len(found.explained)
    relevance = found.relevance if found.source_relevance is None else np.concatenate(
        [found.source_relevance, found.relevance], axis=1)
    limits, bytes_of_layers = _layers(list(found.layers.values()), rows, source, relevance.shape[1])
    tokens = [*_shown(found.source_tokens), *_shown(found.tokens)]
    return {
        "tokens": tokens, "first": source + found.prompt_length, "source": source,
        "words": list[Json](_words(found)) if several else None,
        "explained": [int(token) for token in found.explained],
        "probabilities": [_short(one) for one in found.probabilities],
        "relevance": _floats(relevance), "sink": _has_sink(found),
        "sinks": None if found.sinks is None else _floats(found.sinks),
        "values": [_short(one) for one in found.values],
        "target": found.target, "against": [*_shown(found.against_tokens)] if found.against_tokens else None,
        "layers": list[Json](found.layers), "limits": limits, "shades": packed(bytes_of_layers),
        "alternatives": [_alternatives(found, number) for number in range(len(found.alternatives))],
    }


def _floats(numbers: Array) -> str:
    return packed(np.ascontiguousarray(numbers, "<f4").tobytes())


def _short(number: float) -> float | None:
    """Four digits of a number; None for what is none, which JSON cannot write."""
    return float(f"{number:.4g}") if np.isfinite(number) else None


def _layers(layers: Sequence[Array], rows: int, source: int, width: int) -> tuple[Json, bytes]:
    """The largest |relevance| of each row at each layer, and shades of it, a byte each: 0 to 254, 127 is none."""
    limits: list[Json] = []
    found = np.full((len(layers), rows, width), 127, np.uint8)
    for place, layer in enumerate(layers):
        full = [float(np.abs(row[np.isfinite(row)]).max(initial=0.0)) for row in layer]
        limits.append([_short(one) for one in full])
        for row, most in enumerate(full):
            found[place, row, source:] = shades(layer[row], most)
    return limits, found.tobytes()


def _shown(tokens: Sequence[str]) -> list[Json]:
    return [_token(token) for token in display(tokens)]


def _token(token: Token) -> Json:
    return [token.text, int(token.space), token.breaks]


def _alternatives(found: GenerationExplanation, number: int) -> Json:
    """Token, probability, and whether it is the one that came (1) or the one that it was compared with (2)."""
    row = found.row_of(number)
    against = None if found.against is None or row is None else int(found.against[row])
    came = int(found.ids[found.prompt_length + number])
    listed = list(found.alternatives[number])
    if listed and came not in [token for token, _, _ in listed]:
        listed.append((came, found.tokens[found.prompt_length + number], float(found.probabilities[number])))
    listed.sort(key=lambda one: -np.nan_to_num(one[2]))
    texts = [_token(token) for token in display([text for _, text, _ in listed])]
    return [[text, _short(likely), 1 if token == came else 2 if token == against else 0]
            for text, (token, _, likely) in zip(texts, listed, strict=True)]
