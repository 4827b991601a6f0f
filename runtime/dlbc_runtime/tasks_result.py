"""What `run_task` returns: a mapping with the keys people know, and the explanation itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from dlbc_runtime.arrays import Array
from dlbc_runtime.tasks_kinds import Task

if TYPE_CHECKING:
    from dlbc_runtime.explanation import Explanation
    from dlbc_runtime.generation import GenerationExplanation

_ASK = {"scores_trace": "return_scores=True", "relevance_trace": "return_relevance=True",
        "layerwise_output_trace": "return_layerwise_output=True", "save_path": "save_relevance=True"}
_KEYS = ("task", "node_io", "relevance", "relevance_computed", "predictions", "generated_ids", "scores_trace",
         "relevance_trace", "layerwise_output_trace", "save_path", "all_layer_expert_relevance")
Trace = list[dict[str, Array]]


@dataclass(frozen=True, eq=False, repr=False)
class TaskResult(Mapping[str, Any]):
    """The result of a task, also a mapping: `result["relevance"]` is `result.relevance`. What was not asked for is None
    here and no key of the mapping.

    `task`: which one ran, `reason`: why that one. `node_io`: inputs and outputs by name, and with
    `return_layerwise_output` what each module gave. `relevance`: relevance by input (and by module, so asked), each in
    the shape of what it is about; empty where `relevance_computed` is False. `predictions`: the explained output, its
    logits divided by the temperature. `generated_ids`: of generation, int64 [sequences, T], prompt and new tokens,
    padded at the end. Relevance of a generation is [explained tokens, T], or with several sequences [sequences,
    explained tokens, T], padded by 0; what modules gave is [T, ...] and [sequences, T, ...].
    Traces are lists with an entry for each step: one for classification, one for each (explained) token that was
    generated, one sequence after the other. `relevance_trace`: relevance [1, T] by input of what was there by then.
    `layerwise_output_trace`: by module what it gave at that step. `scores_trace`: "output" the predictions; of a
    generated token its "ids" and "probabilities", the chosen one first and then the likeliest others.
    `all_layer_expert_relevance`: of a mixture of experts, by layer the relevance of each expert, float64 [experts],
    over all that was explained; by token and target it is in `explanation.experts`.
    `explanation`: an `Explanation`, or a `GenerationExplanation` for each sequence.
    """

    task: Task
    reason: str
    explanation: Explanation | tuple[GenerationExplanation, ...]
    node_io: Mapping[str, Array]
    relevance: Mapping[str, Array] = field(default_factory=dict)
    relevance_computed: bool = True
    predictions: Array | None = None
    generated_ids: Array | None = None
    scores_trace: Trace | None = None
    relevance_trace: Trace | None = None
    layerwise_output_trace: Trace | None = None
    save_path: Path | None = None

    @overload
    def __getitem__(self, key: Literal["task"], /) -> Task: ...
    @overload
    def __getitem__(self, key: Literal["node_io", "relevance", "all_layer_expert_relevance"], /
                    ) -> Mapping[str, Array]: ...
    @overload
    def __getitem__(self, key: Literal["relevance_computed"], /) -> bool: ...
    @overload
    def __getitem__(self, key: Literal["predictions", "generated_ids"], /) -> Array: ...
    @overload
    def __getitem__(self, key: Literal["scores_trace", "relevance_trace", "layerwise_output_trace"], /) -> Trace: ...
    @overload
    def __getitem__(self, key: Literal["save_path"], /) -> Path: ...
    @overload
    def __getitem__(self, key: str, /) -> Any: ...

    def __getitem__(self, key: str, /) -> Any:
        found = getattr(self, key) if key in _KEYS else None
        if found is None:
            how = f": ask for it with {_ASK[key]}" if key in _ASK else f"; there are {', '.join(self)}"
            raise KeyError(f"{key!r} is not in the result of {self.task}{how}")
        return found

    def __iter__(self) -> Iterator[str]:
        return (key for key in _KEYS if getattr(self, key) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def all_layer_expert_relevance(self) -> Mapping[str, Array] | None:
        """The relevance of each expert by layer, float64 [experts]; None for a model without experts."""
        found = [one.experts.all_layer_expert_relevance() for one in self.explanations if one.experts is not None]
        return {place: np.sum([one[place] for one in found], axis=0) for place in found[0]} if found else None

    @property
    def explanations(self) -> tuple[Any, ...]:
        """The explanation, or those of all sequences."""
        return self.explanation if isinstance(self.explanation, tuple) else (self.explanation,)

    def show(self) -> None:
        """Show the explanation: as a page in a notebook, otherwise printed to the terminal."""
        for one in self.explanations:
            one.show()

    def _repr_html_(self) -> str:
        return "".join(one._repr_html_() for one in self.explanations)

    def __repr__(self) -> str:
        return f"TaskResult(task={self.task!r}, {', '.join(map(repr, self.explanations))})"
