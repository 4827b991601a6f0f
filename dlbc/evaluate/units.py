"""What is perturbed: tokens of a text, patches of a picture, features of a vector, or segments of your own.

Units are given by their members: for one item an integer array of the shape of its explained input (without the batch
axis) that says for every element which unit it belongs to, -1 for elements that always stay. The relevance of a unit is
the sum of the relevance of its members.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dlbc.errors import InputError
from dlbc.evaluate.items import Item, Key
from dlbc_runtime.arrays import Array

if TYPE_CHECKING:
    import torch

MASK = "attention_mask"


@dataclass(frozen=True)
class Units(ABC):
    """Base of all units. `input`: the place or name of the explained input, None where there is only one candidate."""

    input: Key | None = field(default=None, kw_only=True)
    kind = "units"

    def key(self, item: Item) -> Key:
        """The place or name of the explained input. InputError when there is none such."""
        tensors = item.tensors()
        if self.input is not None:
            if self.input not in tensors:
                raise InputError(f"there is no input {self.input!r}", where=self.kind,
                                 hint=f"one of {', '.join(map(repr, tensors))}")
            if tensors[self.input].is_floating_point() == isinstance(self, Tokens):
                raise InputError(f"input {self.input!r} is {tensors[self.input].dtype}", where=self.kind,
                                 hint="tokens are whole numbers; other units are of floating-point inputs")
            return self.input
        fitting = [key for key, value in tensors.items() if self._fits(key, value)]
        if not fitting:
            shown = ", ".join(f"{key!r} {value.dtype} {list(value.shape)}" for key, value in tensors.items())
            raise InputError(f"no input has {self.kind}: {shown}", where="units",
                             hint='choose other units: "tokens", "patches", "features"')
        return fitting[0]

    def value(self, item: Item) -> torch.Tensor:
        """The explained input [1, ...]."""
        return item.tensors()[self.key(item)]

    def members(self, item: Item) -> Array:
        """Which unit every element of the explained input belongs to, int64 [shape without batch]; -1: none.
        InputError when there are no units."""
        found = self._members(item)
        if found.size == 0 or found.max() < 0:
            raise InputError(f"item {item.name or ''} has no {self.kind} to perturb".replace("  ", " "), where="units",
                             hint="its tokens are all special or protected" if isinstance(self, Tokens) else
                             "give at least one")
        return found

    def count(self, item: Item) -> int:
        """How many units the item has."""
        return int(self.members(item).max()) + 1

    def summed(self, item: Item, relevance: Array) -> Array:
        """Relevance of units, float64 [units], from that of elements [shape without batch] (or of units already)."""
        members = self.members(item)
        relevance = np.asarray(relevance, np.float64)
        if relevance.shape != members.shape:
            if relevance.shape == (int(members.max()) + 1,):
                return relevance
            raise InputError(f"relevance has shape {list(relevance.shape)}", where=self.kind,
                             hint=f"the explained input has {list(members.shape)}, and {int(members.max()) + 1} units")
        inside = members >= 0
        return np.bincount(members[inside], relevance[inside], int(members.max()) + 1)

    def _fits(self, key: Key, value: torch.Tensor) -> bool:
        return value.is_floating_point()

    @abstractmethod
    def _members(self, item: Item) -> Array:
        """The unit of each element of the explained input, -1 for those that are never perturbed."""


@dataclass(frozen=True)
class Tokens(Units):
    """Positions of an input of ids [1, T]. Never perturbed: what `attention_mask` hides, the ids in `special`
    (`Tokens(special=tokenizer.all_special_ids)`), and the `first` and `last` so many visible positions."""

    special: Collection[int] = ()
    first: int = 0
    last: int = 0
    kind = "tokens"

    def _fits(self, key: Key, value: torch.Tensor) -> bool:
        named = isinstance(key, str) and ("mask" in key or "type" in key or "position" in key)
        return not value.is_floating_point() and value.ndim == 2 and not named

    def _members(self, item: Item) -> Array:
        ids = self.value(item)[0].cpu().numpy()
        if ids.ndim != 1:
            raise InputError(f"ids of shape {[1, *ids.shape]}", where="tokens", hint="tokens are ids [1, T]")
        free = self.visible(item) & ~np.isin(ids, np.fromiter(self.special, np.int64))
        visible = np.flatnonzero(self.visible(item))
        for place in (*visible[:self.first], *visible[len(visible) - self.last:], *item.protected):
            if not -len(ids) <= place < len(ids):
                raise InputError(f"position {place} is outside the text", where="protected",
                                 hint=f"it has {len(ids)} tokens")
            free[place] = False
        return np.where(free, np.cumsum(free) - 1, -1)

    def visible(self, item: Item) -> Array:
        """Positions that are no padding, bool [T]."""
        mask = item.tensors().get(MASK)
        length = self.value(item).shape[1]
        if mask is None or tuple(mask.shape) != (1, length):
            return np.ones(length, bool)
        return np.asarray(mask[0].cpu().numpy() != 0)


@dataclass(frozen=True)
class Patches(Units):
    """Squares of `size` pixels of a picture [1, C, H, W], all channels together; None: 1/14 of the shorter side.
    Squares at the right and lower edge may be smaller."""

    size: int | None = None
    kind = "patches"

    def _fits(self, key: Key, value: torch.Tensor) -> bool:
        return value.is_floating_point() and value.ndim == 4

    def side(self, item: Item) -> int:
        """Of a patch, in pixels."""
        if self.size is not None and self.size < 1:
            raise InputError(f"patches of {self.size} pixels", where="patches", hint="give at least 1")
        height, width = self.value(item).shape[-2:]
        return self.size or max(1, round(min(height, width) / 14))

    def _members(self, item: Item) -> Array:
        shape = self.value(item).shape[1:]
        if len(shape) != 3:
            raise InputError(f"a picture of shape {[1, *shape]}", where="patches", hint="pictures are [1, C, H, W]")
        rows, columns = (np.arange(length) // self.side(item) for length in shape[1:])
        grid = rows[:, None] * (columns[-1] + 1) + columns
        return np.broadcast_to(grid, shape).astype(np.int64)


@dataclass(frozen=True)
class Features(Units):
    """Every element of a floating-point input is a unit of its own."""

    kind = "features"

    def _members(self, item: Item) -> Array:
        shape = tuple(self.value(item).shape[1:])
        return np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)


@dataclass(frozen=True, eq=False)
class Segments(Units):
    """Units of your own, e.g. superpixels or groups of columns: `labels` says for every element of the explained input
    (or for every pixel [H, W]) which it belongs to, numbers from 0; -1 for elements that stay."""

    labels: Array
    kind = "segments"

    def _members(self, item: Item) -> Array:
        shape, labels = tuple(self.value(item).shape[1:]), np.asarray(self.labels)
        fits = labels.ndim <= len(shape) and shape[len(shape) - labels.ndim:] == labels.shape
        if not fits or labels.dtype.kind not in "iu":
            raise InputError(f"labels are {labels.dtype} {list(labels.shape)}, the input is {list(shape)}",
                             where="segments", hint="give whole numbers for every element, or for every pixel")
        present = np.unique(labels[labels >= 0])
        if not np.array_equal(present, np.arange(len(present))):
            raise InputError("labels leave out numbers", where="segments", hint="number the segments from 0")
        return np.broadcast_to(labels, shape).astype(np.int64)


NAMED: dict[str, type[Units]] = {"tokens": Tokens, "patches": Patches, "features": Features}


def units_for(given: str | Units, item: Item) -> Units:
    """Units by name, or found: "auto" is patches for a picture, tokens for ids, otherwise features."""
    if isinstance(given, Units):
        return given
    if given in NAMED:
        return NAMED[given]()
    if given != "auto":
        raise InputError(f"unknown units {given!r}", where="units",
                         hint=f"auto, {', '.join(NAMED)}, or Tokens(...), Patches(...), Features(), Segments(...)")
    for kind in (Tokens, Patches, Features):
        if any(kind()._fits(key, value) for key, value in item.tensors().items()):
            return kind()
    raise InputError("no input has units that can be perturbed", where="units",
                     hint="inputs are ids [1, T], pictures [1, C, H, W] or floating-point vectors")
