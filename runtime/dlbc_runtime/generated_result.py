"""From sequences to their explanations: which tokens can be explained, what is found of them, and its public form."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dlbc_runtime.arrays import Array
from dlbc_runtime.generated_prompts import texts_of
from dlbc_runtime.generated_relevance import Asked, Found, Text, explained, likelihoods
from dlbc_runtime.generation import GenerationExplanation

if TYPE_CHECKING:
    from dlbc_runtime.explainer import Explainer

log = logging.getLogger(__name__)

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Making:
    """How explanations of sequences are made. `keep`: globs of layers; `seconds`: what generating took."""

    explainer: Explainer
    tokenizer: Any
    asked: Asked
    keep: str | None
    strategy: str
    seconds: float = 0.0

    def numbers(self, text: Text) -> list[int]:
        """The new tokens of a text to explain, those left out that never came or that a contrast cannot be of."""
        return self._possible(text)[0]

    def explain(self, text: Text, found: Found, advance: Callable[[int], None]) -> None:
        """Find what is not found yet; `advance` is told how many more tokens are explained."""
        numbers, said = self._possible(text)
        for one in said:
            log.warning(one)
        missing = [number for number in numbers if number not in found.numbers]
        advance(len(numbers) - len(missing))
        before = len(found.numbers)
        for _ in explained(self.explainer, text, missing, self.asked, self.keep, found):
            advance(len(found.numbers) - before)
            before = len(found.numbers)

    def of_last(self, sources: Sequence[Array] | None) -> Callable[[int, Array, int, Found], None]:
        """Explains the last token of a sequence that is being generated; `sources`: of an encoder-decoder."""
        def explain(of: int, ids: Array, prompt: int, found: Found) -> None:
            text = Text(ids, prompt, None if sources is None else sources[of])
            last = text.new - 1
            for _ in explained(self.explainer, text, [one for one in self.numbers(text) if one == last], self.asked,
                               self.keep, found):
                pass
            likelihoods(self.explainer, text, [last], self.asked.alternatives, found)

        return explain

    def result(self, text: Text, found: Found, *, finished: bool) -> GenerationExplanation:
        """The explanation, of what was found so far."""
        new = range(text.new)
        likelihoods(self.explainer, text, new, self.asked.alternatives, found)
        names = sorted({i for number in new for i, _ in found.alternatives[number]} | set(found.against))
        named = dict(zip(names, texts_of(np.array(names, np.int64), self.tokenizer), strict=True))
        order = np.argsort(np.array(found.numbers, np.int64), kind="stable")
        against = np.array(found.against, np.int64)[order] if found.against else None
        method = replace(found.method, model=self.explainer.manifest.model, backend=self.explainer.manifest.backend,
                         multiplier=self.asked.multiplier, scaler=self.asked.scaler,
                         versions=self.explainer.manifest.versions,
                         seconds={**({"generate": self.seconds} if self.seconds else {}), **found.method.seconds})
        made = GenerationExplanation(
            ids=text.ids, prompt_length=text.prompt, tokens=texts_of(text.ids, self.tokenizer),
            text=self._decoded(text.ids[text.prompt:]),
            probabilities=np.array([found.probabilities[number] for number in new], np.float32),
            explained=np.array(found.numbers, np.int64)[order], relevance=found.relevance(len(text.ids))[order],
            values=np.array(found.values, np.float32)[order],
            alternatives=tuple(tuple((i, named[i], p) for i, p in found.alternatives[number]) for number in new),
            layers={name: array[order] for name, array in found.by_layer(len(text.ids)).items()},
            target="contrast" if self.asked.contrast else str(self.asked.target), against=against,
            against_tokens=() if against is None else tuple(named[int(i)] for i in against),
            source_ids=text.source, source_tokens=() if text.source is None else texts_of(text.source, self.tokenizer),
            source_relevance=None if text.source is None else np.array(found.source, np.float32).reshape(
                -1, len(text.source))[order],
            experts=found.by_expert(order, len(text.ids)), strategy=self.strategy,
            rules=self.explainer.manifest.composite, method=method, finished=finished)
        return made if self.asked.sinks == "keep" else made.with_sinks("apart")

    def _possible(self, text: Text) -> tuple[list[int], list[str]]:
        """The new tokens to explain, and why others are not."""
        asked, said = self.asked, []
        if isinstance(asked.tokens, int):
            asked = replace(asked, tokens=min(asked.tokens, text.new))
        elif asked.tokens is not None and not isinstance(asked.tokens, str):
            there = [one for one in asked.tokens if -text.new <= one < text.new]
            if len(there) < len(asked.tokens):
                said.append(f"explain_tokens asks for new tokens {sorted(set(asked.tokens) - set(there))}, and "
                            f"generation ended after {text.new}")
            asked = replace(asked, tokens=there)
        found = asked.numbers(text.new)
        same = [number for number in found if isinstance(asked.target, int)
                and int(text.ids[text.prompt + number]) == asked.target]
        if same:
            said.append(f"new tokens {same} are the very token they would be compared with, and are not explained")
        return [number for number in found if number not in same], said

    def _decoded(self, ids: Array) -> str:
        return "".join(texts_of(ids, None)).strip() if self.tokenizer is None else str(
            self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))


@contextlib.contextmanager
def shown(progress: bool | Progress, total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with how many more of `total` tokens are explained: it moves a bar, or tells `progress`."""
    done = 0
    if progress is True:
        from rich.console import Console
        from rich.progress import Progress as Bar

        with Bar(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("explaining tokens", total=total)
            yield lambda more: bar.advance(task, more)
        return

    def advance(more: int) -> None:
        nonlocal done
        done += more
        if callable(progress) and more:
            progress(done, total)

    yield advance
