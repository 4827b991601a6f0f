"""What a method is measured on: items, each the inputs of one independent example and what of it to explain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dlbc.errors import InputError

if TYPE_CHECKING:
    import torch

Key = int | str
"""An input of the model: its place among the positional ones, or its name."""


@dataclass(frozen=True, eq=False)
class Item:
    """One example. `inputs`: what the model is called with, a batch of one: a tensor [1, ...], a tuple of tensors,
    or a mapping by name. `target`: the class, token or output number to explain; None: what the model predicts.
    `protected`: positions of tokens that are never perturbed, besides those that the units protect.
    """

    inputs: Any
    target: int | None = None
    protected: tuple[int, ...] = ()
    name: str = ""

    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs as positional ones and ones by name."""
        if isinstance(self.inputs, Mapping):
            return (), dict(self.inputs)
        return (tuple(self.inputs), {}) if isinstance(self.inputs, tuple | list) else ((self.inputs,), {})

    def tensors(self) -> dict[Key, torch.Tensor]:
        """The inputs that are tensors, by place or name."""
        import torch

        args, kwargs = self.call()
        named: list[tuple[Key, Any]] = [*enumerate(args), *kwargs.items()]
        return {key: value for key, value in named if isinstance(value, torch.Tensor)}

    def with_input(self, key: Key, value: torch.Tensor) -> Item:
        """The same item with another value of one input, given in the same way."""
        args, kwargs = self.having({key: value})
        lone = not isinstance(self.inputs, Mapping | tuple | list)
        return replace(self, inputs=value if lone else kwargs or args)

    def having(self, changed: Mapping[Key, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs of a call with some of them exchanged."""
        args, kwargs = self.call()
        return (tuple(changed.get(place, value) for place, value in enumerate(args)),
                {name: changed.get(name, value) for name, value in kwargs.items()})


def as_items(given: object, targets: Sequence[int] | None = None) -> tuple[Item, ...]:
    """Items of: an `Item`; a batched tensor or array [N, ...] or mapping of them (each row is an item); or a list of
    items, or of inputs of one row. InputError for something else, for no items, or targets that do not fit."""
    import numpy as np
    import torch

    if isinstance(given, Item):
        found = [given]
    elif isinstance(given, torch.Tensor | np.ndarray):
        batch = torch.as_tensor(given)
        found = [Item(batch[row:row + 1]) for row in range(len(batch) if batch.ndim else 0)]
    elif isinstance(given, Mapping):
        found = _rows_of(given)
    elif isinstance(given, list | tuple):
        found = [one if isinstance(one, Item) else Item(one) for one in given]
    else:
        raise InputError(f"items cannot be {type(given).__name__} {given!r:.60}", where="items",
                         hint="give a batched tensor, a mapping of batched tensors, or a list with the inputs of each")
    if not found:
        raise InputError("there are no items", where="items", hint="give at least one example")
    for number, item in enumerate(found):
        wrong = next((value for value in item.tensors().values() if not value.ndim or value.shape[0] != 1), None)
        if wrong is not None or not item.tensors():
            shown = "no tensor" if wrong is None else f"a tensor of shape {list(wrong.shape)}"
            raise InputError(f"item {number} has {shown}", where="items",
                             hint="every item is one example with its batch axis: tensors of shape [1, ...]")
    if targets is not None:
        if len(targets) != len(found):
            raise InputError(f"{len(targets)} targets for {len(found)} items", where="targets",
                             hint="give one class or token for each item")
        found = [replace(item, target=int(target)) for item, target in zip(found, targets, strict=True)]
    return tuple(found)


def _rows_of(batch: Mapping[str, Any]) -> list[Item]:
    import torch

    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.ndim}
    sizes = {value.shape[0] for value in tensors.values()}
    if len(sizes) > 1:
        raise InputError(f"inputs of different batch sizes: {sorted(sizes)}", where="items",
                         hint="every tensor has one row for each item")
    return [Item({name: value[row:row + 1] if name in tensors else value for name, value in batch.items()})
            for row in range(next(iter(sizes), 0))]
