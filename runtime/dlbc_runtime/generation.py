"""An explained generation: which tokens came, how likely each was, and which earlier tokens each of them is due to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from dlbc_runtime.arrays import Array, Arrays, Json
from dlbc_runtime.errors import InputError
from dlbc_runtime.experts import Experts
from dlbc_runtime.explained import Attribution, Explained, Method
from dlbc_runtime.explanation import Order, strongest

if TYPE_CHECKING:
    from rich.console import RenderableType

Alternative = tuple[int, str, float]
"""A token that could have come: its id, its text, its probability."""

IDS, SOURCE = "ids", "source"
"""The names under which `top` speaks of the sequence itself, and of an encoder's input."""


@dataclass(frozen=True, eq=False, repr=False)
class GenerationExplanation:
    """One generated sequence and where each of its new tokens came from.

    T tokens in all, the first `prompt_length` of them given, N = T - `prompt_length` new; N' of the new ones are
    explained. A token is explained as what was predicted at the position before it, so relevance of a token comes from
    tokens before it alone: in `relevance` everything from its own position on is exactly 0.

    `ids`: int64 [T], without padding. `tokens`: the text of each, with the spaces that stand before it. `text`: the new
    tokens as the tokenizer decodes them, without special ones.
    `probabilities`: float32 [N], of each new token given all before it, at temperature 1 and before any processing of
    logits, whatever the strategy was. `alternatives`: per new token the likeliest ones, the likeliest first.
    `explained`: int64 [N'], which new tokens the rows of `relevance` belong to (0: the first new one).
    `relevance`: float32 [N', T]. `layers`: the same of what stands at each layer, by its name, from the input up.
    `values`: float32 [N'], the numbers that are explained: a logit, a difference of two, or log-odds, by `target`.
    `target`: "chosen" (the logit), "contrast" (why this rather than `against`), "probability" (its log-odds).
    `against`: int64 [N'], the tokens compared with, or None; `against_tokens`: their text.
    `sinks`: float32 [N'], the relevance of the first token, where it was taken apart; None where `relevance` has it.
    `source_*`: of an encoder-decoder the encoder's input, [N', T_source]; `ids` is what the decoder read and wrote.
    `experts`: of a mixture of experts the relevance that experts got, for each explained token: its targets are the
    explained tokens, in order, its one row the sequence; None for other models, and for words.
    `spans`: int64 [T, 2] for words, the tokens that each was made of (`words()`); None for tokens.
    `finished`: False for a run that was interrupted; it holds what was finished.
    """

    ids: Array
    prompt_length: int
    tokens: tuple[str, ...]
    text: str
    probabilities: Array
    explained: Array
    relevance: Array
    values: Array
    alternatives: tuple[tuple[Alternative, ...], ...] = ()
    layers: Mapping[str, Array] = field(default_factory=dict)
    target: str = "chosen"
    against: Array | None = None
    against_tokens: tuple[str, ...] = ()
    sinks: Array | None = None
    source_ids: Array | None = None
    source_tokens: tuple[str, ...] = ()
    source_relevance: Array | None = None
    spans: Array | None = None
    strategy: str = "greedy"
    rules: str = ""
    method: Method = field(default_factory=Method)
    finished: bool = True
    experts: Experts | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Arrays):
            object.__setattr__(self, "layers", Arrays(self.layers))
        object.__setattr__(self, "tokens", tuple(self.tokens))
        length, rows = len(self.ids), len(self.explained)
        new = length - self.prompt_length
        shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = [
            ("tokens", (len(self.tokens),), (length,)), ("probabilities", self.probabilities.shape, (new,)),
            ("relevance", self.relevance.shape, (rows, length)), ("values", self.values.shape, (rows,)),
            *((f"layers[{name!r}]", array.shape, (rows, length)) for name, array in self.layers.items())]
        if self.alternatives:
            shapes.append(("alternatives", (len(self.alternatives),), (new,)))
        for name in ("against", "sinks"):
            if (array := getattr(self, name)) is not None:
                shapes.append((name, array.shape, (rows,)))
        if self.source_relevance is not None:
            shapes.append(("source_relevance", self.source_relevance.shape, (rows, len(self.source_tokens))))
        if self.spans is not None:
            shapes.append(("spans", self.spans.shape, (length, 2)))
        if self.experts is not None:
            shapes.append(("experts", (self.experts.seeds, self.experts.rows), (rows, 1)))
            object.__setattr__(self, "experts", self._named(self.experts))
        for name, found, wanted in shapes:
            if found != wanted:
                raise InputError(f"{name} has shape {list(found)}, not {list(wanted)}", where="GenerationExplanation",
                                 hint="there are N' rows for the explained tokens, and T tokens in all")
        if not 0 <= self.prompt_length <= length or ((self.explained < 0) | (self.explained >= new)).any():
            raise InputError(f"{new} tokens are new, and {self.explained.tolist()} explained",
                             where="GenerationExplanation", hint="explained numbers new tokens, the first of them 0")

    def _named(self, experts: Experts) -> Experts:
        """The experts with what is known of the tokens."""
        target = tuple(Explained(0, row, index=int(self.ids[place]), position=int(place) - 1,
                                 value=float(value), label=self.tokens[place])
                       for row, (place, value) in enumerate(zip(self.positions(), self.values, strict=False)))
        return experts.named((self.tokens,), None, target)

    # What it is about

    @property
    def new_ids(self) -> Array:
        """The ids of the new tokens, int64 [N]."""
        return self.ids[self.prompt_length:]

    @property
    def prompt_tokens(self) -> tuple[str, ...]:
        """The text of each token that was given."""
        return self.tokens[:self.prompt_length]

    @property
    def new_tokens(self) -> tuple[str, ...]:
        """The text of each new token."""
        return self.tokens[self.prompt_length:]

    @property
    def log_probability(self) -> float:
        """The natural logarithm of the probability of all new tokens together."""
        return float(np.log(np.maximum(self.probabilities.astype(np.float64), 1e-300)).sum())

    def positions(self) -> Array:
        """Where in the sequence each explained token stands, int64 [N']."""
        found: Array = self.prompt_length + self.explained
        return found

    def row_of(self, number: int) -> int | None:
        """The row of `relevance` that explains new token `number`; None where it is not explained."""
        found = np.flatnonzero(self.explained == number)
        return int(found[0]) if len(found) else None

    def top(self, k: int = 5, by: Order = "absolute") -> list[Attribution]:
        """For each explained token the `k` tokens it owes most to, the strongest first.

        In what is returned `seed` is the row of `relevance`, `input` "ids" or (of an encoder) "source", `index` the
        position there. `by`: "absolute", "positive" or "negative"; tokens without relevance are left out.
        """
        if by not in ("absolute", "positive", "negative"):
            raise InputError(f"unknown order {by!r}", where="top()", hint="absolute, positive or negative")
        found = []
        for row in range(len(self.explained)):
            own = self.relevance[row]
            given = own if self.source_relevance is None else np.concatenate([self.source_relevance[row], own])
            for place in strongest(given, k, by):
                position = place - (len(given) - len(own))
                name = self.tokens[position] if position >= 0 else self.source_tokens[place]
                found.append(Attribution(0, IDS if position >= 0 else SOURCE, (position if position >= 0 else place,),
                                         name, float(given[place]), row))
        return found

    # Other forms of it

    def words(self) -> GenerationExplanation:
        """The same of words: relevance of a word's tokens is added up, and its rows are averaged.

        A word is a token that a blank stands before, with those up to the next; punctuation is apart. The probability
        of a generated word is the product of its tokens'. Within a word later tokens owe something to earlier ones:
        that is the word's relevance of itself, so that a row's total stays what it was. The prompt and what was
        generated share no word.
        """
        from dlbc_runtime.generated_words import merged

        return merged(self)

    def with_sinks(self, mode: Literal["keep", "apart"]) -> GenerationExplanation:
        """The same with the first token's relevance in `sinks` and 0 in its place ("apart"), or back in its place.

        Attention parks what it does not need at the first token (`docs/concepts.md`). InputError for an
        encoder-decoder.
        """
        from dlbc_runtime.sinks import check

        check(mode)
        if self.source_relevance is not None:
            raise InputError("an encoder-decoder has no token that all positions read first", where="with_sinks()",
                             hint="leave `sinks` out")
        if (mode == "apart") == (self.sinks is not None) or not len(self.ids):
            return self
        relevance = self.relevance.copy()
        sinks = relevance[:, 0].copy() if mode == "apart" else None
        relevance[:, 0] = 0 if self.sinks is None else self.sinks
        return replace(self, relevance=relevance, sinks=sinks)

    # Showing and keeping

    def show(self, *, k: int = 3) -> None:
        """Show it: the page in a notebook, otherwise a table on the terminal, `k` sources for each token."""
        from dlbc_runtime.generated_terminal import show

        show(self, k=k)

    def save(self, path: str | Path) -> Path:
        """Write it to a file by suffix: `.safetensors` or `.json`, which `load` reads, or `.html`; returns the path.

        Folders on the way are made. Raises InputError for another suffix, OSError where it cannot be written.
        """
        from dlbc_runtime.generated_file import save

        return save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> GenerationExplanation:
        """Read what `save` wrote to a `.safetensors` or `.json` file. Raises ArtifactError if it cannot."""
        from dlbc_runtime.generated_file import load

        return load(Path(path))

    def to_dict(self) -> dict[str, Json]:
        """All of it as JSON-able data."""
        from dlbc_runtime.generated_file import to_dict

        return to_dict(self)

    def _repr_html_(self) -> str:
        from dlbc_runtime.views.generation import generation_notebook

        return generation_notebook(self)

    def __rich__(self) -> RenderableType:
        from dlbc_runtime.generated_terminal import render

        return render(self)

    def __repr__(self) -> str:
        state = "" if self.finished else ", interrupted"
        return (f"GenerationExplanation({self.text!r}, {len(self.new_ids)} new tokens after {self.prompt_length}, "
                f"{len(self.explained)} explained, rules={self.rules!r}{state})")
