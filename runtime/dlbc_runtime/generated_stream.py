"""What is seen of a generation while it runs: each new token, told to whoever asks, and kept if it is cut short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dlbc_runtime.arrays import Array, as_numpy
from dlbc_runtime.generated_relevance import Found


@dataclass(frozen=True)
class Step:
    """One new token while generation goes on.

    `row`: which sequence, as in the list that is returned; `number`: which new token, 0 first; `id`, `text`: it.
    With `explain_when="during"`: `probability`, and `relevance` float32 [tokens before it]; None otherwise.
    """

    row: int
    number: int
    id: int
    text: str
    probability: float | None = None
    relevance: Array | None = None


Callback = Callable[[Step], object]
Explain = Callable[[int, Array, int, Found], None]


class Recorder:
    """A stopping criterion of transformers that stops nothing by itself: it sees all sequences after each new token.

    `ids`: the sequences so far, [B, T]; `steps`: how many tokens are new. `known`: what was explained, by sequence.
    `stopped`: whether a callback ended the generation, `problem`: the error that it raised. `padding`: on the left of
    each prompt, set by who decodes.
    """

    def __init__(self, prompts: Sequence[int], each: int, callback: Callback | None, text: Callable[[Array], str],
                 ends: frozenset[int], explain: Explain | None) -> None:
        self.prompts, self.each, self.callback, self.text, self.ends, self.explain = (
            prompts, each, callback, text, ends, explain)
        self.padding: Sequence[int] = ()
        self._ids: Any = None
        self.steps, self.stopped = 0, False
        self.problem: Exception | None = None
        self.known: dict[int, Found] = {}

    @property
    def ids(self) -> Array | None:
        """The sequences so far."""
        return None if self._ids is None else as_numpy(self._ids)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Note the sequences, tell the newest tokens; whether each is to end, bool [B]."""
        import torch

        self._ids, self.steps = input_ids, self.steps + 1
        if self.callback is not None or self.explain is not None:
            ids = as_numpy(input_ids)
            for row in range(len(ids)):
                self._tell(row, ids[row])
        return torch.full((input_ids.shape[0],), self.stopped, dtype=torch.bool, device=input_ids.device)

    def _tell(self, row: int, ids: Array) -> None:
        of = row // self.each
        own = ids[self.padding[of]:]
        prompt = self.prompts[of]
        if any(int(one) in self.ends for one in own[prompt:-1]):
            return
        found = self.known.setdefault(row, Found()) if self.explain is not None else None
        number = len(own) - prompt - 1
        if found is not None and self.explain is not None:
            self.explain(of, own, prompt, found)
        if self.callback is not None:
            explained = found is not None and number in found.numbers
            step = Step(row, number, int(own[-1]), self.text(own),
                        found.probabilities.get(number) if found is not None else None,
                        found.rows[found.numbers.index(number)] if found is not None and explained else None)
            try:
                if self.callback(step) is False:
                    self.stopped = True
            except Exception as problem:
                self.problem = problem
                raise
