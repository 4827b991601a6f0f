"""What a set of the benchmark is: a trained model, items held out (or for tuning), units and fills."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dlbc.evaluate import Fill, Item, Units

Split = Literal["tune", "held"]
Kind = Literal["mlp", "cnn", "vit", "encoder", "lm"]


@dataclass(frozen=True, eq=False)
class DataSet:
    """A model and what it is measured on.

    `items`: in an order in which any first N are a fair sample; each has its target, what the model predicts.
    `groups`: which independent example an item is taken from (crops of one photograph share a number); standard
    errors are over groups. `truth`: for tasks with a known answer, the positions of the tokens that decide it.
    `accuracy`: of the model on the split the items come from, before any choice of items. `steps`: points of a curve.
    """

    name: str
    kind: Kind
    model: nn.Module
    items: tuple[Item, ...]
    units: Units
    fills: tuple[Fill, ...]
    groups: tuple[int, ...]
    accuracy: float
    split: Split
    truth: tuple[tuple[int, ...], ...] = ()
    steps: int = 10
    batch: int = 32

    @property
    def example(self) -> Any:
        """What to compile the model with: the inputs of the first item, keyword inputs as a mapping."""
        return self.items[0].inputs

    def first(self, count: int | None) -> DataSet:
        """The same set with at most `count` items."""
        from dataclasses import replace

        return replace(self, items=self.items[:count], groups=self.groups[:count], truth=self.truth[:count])

    def to(self, device: str) -> DataSet:
        """The same set on another device (the model itself is moved)."""
        from dataclasses import replace

        moved = tuple(replace(item, inputs=_moved(item.inputs, device)) for item in self.items)
        return replace(self, model=self.model.to(device), items=moved)


def _moved(inputs: Any, device: str) -> Any:
    if isinstance(inputs, Mapping):
        return {name: value.to(device) for name, value in inputs.items()}
    return tuple(one.to(device) for one in inputs) if isinstance(inputs, tuple) else inputs.to(device)


Loader = Callable[[Split], DataSet]


def predicted(model: nn.Module, inputs: Sequence[torch.Tensor], batch: int = 64) -> torch.Tensor:
    """The probabilities [N, classes] of a classifier of single tensors [1, ...] of one shape."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(inputs), batch):
            found.append(model(torch.cat(list(inputs[start:start + batch]))).softmax(-1))
    return torch.cat(found)
