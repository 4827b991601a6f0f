"""What takes the place of units that are perturbed: fills.

| fill | of | what |
|---|---|---|
| `delete` | tokens | taken out of the sequence, which becomes shorter |
| `mask(id)` | tokens | the id of a mask or unknown token |
| `zero` | all | the number 0; of tokens, an embedding of zeros |
| `replace(vocabulary)` | tokens | another token, drawn once for every position: the same for all methods |
| `constant(value)` | all but tokens | a number, e.g. grey |
| `mean` | all but tokens | of a picture: its own mean in each channel; of features: the mean over a data set |
| `blur(sigma)` | patches | the blurred picture |

A fill of numbers also has what differs between two fills in it: `mean` answers "this rather than the usual".
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dlbc.errors import InputError
from dlbc.evaluate.items import Item, Key
from dlbc.evaluate.units import Features, Patches, Tokens, Units
from dlbc_runtime.arrays import Array

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Copies:
    """Perturbed copies of one item, of one shape. `rows`: which of those asked for; `kept`: where it is False, the
    embedding of `ids` is to be zero, bool [K, T]."""

    rows: Array
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ids: torch.Tensor | None = None
    kept: torch.Tensor | None = None


class Fill(Protocol):
    """What takes the place of units."""

    @property
    def name(self) -> str:
        """What it is called in reports."""
        ...

    def check(self, units: Units) -> None:
        """InputError when it cannot fill such units."""
        ...

    def copies(self, units: Units, items: Sequence[Item], number: int, gone: Array, batch: int) -> Iterator[Copies]:
        """Copies of item `number` with the elements `gone` (bool [K, shape of its explained input]) filled, at most
        `batch` at a time."""
        ...


@dataclass(frozen=True)
class _Delete:
    """Tokens out of the sequence; inputs with one entry for each token are shortened alike."""

    name = "delete"

    def check(self, units: Units) -> None:
        if not isinstance(units, Tokens):
            raise InputError(f"{units.kind} cannot be deleted", where="fill", hint="use zero, mean or blur")

    def copies(self, units: Units, items: Sequence[Item], number: int, gone: Array, batch: int) -> Iterator[Copies]:
        import torch

        item = items[number]
        key, ids = units.key(item), units.value(item)
        length = ids.shape[1]
        along = {name: value for name, value in item.tensors().items() if value.ndim >= 2 and value.shape[1] == length}
        kept = length - gone.sum(1)
        for left in np.unique(kept):
            for rows in _chunks(np.flatnonzero(kept == left), batch):
                places = torch.as_tensor(np.stack([np.flatnonzero(~gone[row]) for row in rows]), device=ids.device)
                changed: dict[Key, Any] = {}
                for name, value in item.tensors().items():
                    if name not in along:
                        changed[name] = _repeated(value, len(rows))
                    elif name != key and isinstance(name, str) and "position" in name:
                        changed[name] = _repeated(value[:, :int(left)], len(rows))
                    else:
                        changed[name] = value[0][places]
                args, kwargs = item.having(changed)
                yield Copies(rows, args, kwargs)


@dataclass(frozen=True)
class _Zero:
    """The number 0; of tokens, an embedding of zeros."""

    name = "zero"

    def check(self, units: Units) -> None:
        """Fits all units."""

    def copies(self, units: Units, items: Sequence[Item], number: int, gone: Array, batch: int) -> Iterator[Copies]:
        import torch

        if not isinstance(units, Tokens):
            yield from constant(0.0).copies(units, items, number, gone, batch)
            return
        item = items[number]
        key = units.key(item)
        for rows in _chunks(np.arange(len(gone)), batch):
            changed: dict[Key, Any] = {name: _repeated(one, len(rows)) for name, one in item.tensors().items()}
            args, kwargs = item.having(changed)
            yield Copies(rows, args, kwargs, changed[key], torch.as_tensor(~gone[rows], device=changed[key].device))


@dataclass(frozen=True, eq=False)
class _Content(ABC):
    """Fills that put in elements of another input of the same shape."""

    @abstractmethod
    def content(self, units: Units, items: Sequence[Item], number: int) -> torch.Tensor:
        """What the explained input is filled from, [1, ...]."""

    def copies(self, units: Units, items: Sequence[Item], number: int, gone: Array, batch: int) -> Iterator[Copies]:
        """Copies with the elements that are gone from `content`."""
        import torch

        item = items[number]
        key, value = units.key(item), units.value(item)
        filling = self.content(units, items, number).to(value)
        for rows in _chunks(np.arange(len(gone)), batch):
            changed: dict[Key, Any] = {name: _repeated(one, len(rows)) for name, one in item.tensors().items()}
            changed[key] = torch.where(torch.as_tensor(gone[rows], device=value.device), filling, value)
            args, kwargs = item.having(changed)
            yield Copies(rows, args, kwargs)


@dataclass(frozen=True, eq=False)
class _Mask(_Content):
    token: int

    @property
    def name(self) -> str:
        return f"mask({self.token})"

    def check(self, units: Units) -> None:
        _only_tokens(self.name, units)

    def content(self, units: Units, items: Sequence[Item], number: int) -> torch.Tensor:
        import torch

        return torch.full_like(units.value(items[number]), self.token)


@dataclass(frozen=True, eq=False)
class _Replace(_Content):
    vocabulary: Sequence[int]
    seed: int
    name = "replace"

    def check(self, units: Units) -> None:
        _only_tokens(self.name, units)

    def content(self, units: Units, items: Sequence[Item], number: int) -> torch.Tensor:
        import torch

        value = units.value(items[number])
        ids = value[0].cpu().numpy()
        drawn = np.random.default_rng((self.seed, number)).choice(np.asarray(self.vocabulary), (2, len(ids)))
        others = np.where(drawn[0] != ids, drawn[0], drawn[1])
        return torch.as_tensor(others, device=value.device)[None]


@dataclass(frozen=True, eq=False)
class _Constant(_Content):
    value: float

    @property
    def name(self) -> str:
        return f"constant({self.value:g})" if self.value else "zero"

    def check(self, units: Units) -> None:
        _no_tokens(self.name, units)

    def content(self, units: Units, items: Sequence[Item], number: int) -> torch.Tensor:
        import torch

        return torch.full_like(units.value(items[number]), self.value)


@dataclass(frozen=True, eq=False)
class _Mean(_Content):
    of: Any = None
    name = "mean"

    def check(self, units: Units) -> None:
        _no_tokens(self.name, units)

    def content(self, units: Units, items: Sequence[Item], number: int) -> torch.Tensor:
        import torch

        value = units.value(items[number])
        if self.of is None and value.ndim == 4:
            return value.mean((2, 3), keepdim=True).expand_as(value)
        if self.of is None and len(items) < 2:
            raise InputError("the mean of one item is itself", where="fill",
                             hint="mean(of=rows of the training data), or give more items")
        rows = torch.as_tensor(self.of) if self.of is not None else torch.cat([units.value(one) for one in items])
        if tuple(rows.shape[1:]) != tuple(value.shape[1:]):
            raise InputError(f"mean of rows {list(rows.shape[1:])}, the input has {list(value.shape[1:])}",
                             where="fill", hint="give data of the model's input shape, [rows, ...]")
        return rows.to(value).mean(0, keepdim=True)


@dataclass(frozen=True, eq=False)
class _Blur(_Content):
    sigma: float | None

    @property
    def name(self) -> str:
        return "blur" if self.sigma is None else f"blur({self.sigma:g})"

    def check(self, units: Units) -> None:
        _no_tokens(self.name, units)
        if isinstance(units, Features):
            raise InputError("features cannot be blurred", where="fill", hint="use zero, constant or mean")

    def content(self, units: Units, items: Sequence[Item], number: int) -> torch.Tensor:
        import torch
        from torch.nn.functional import conv2d, pad

        picture = units.value(items[number])
        if picture.ndim != 4:
            raise InputError(f"an input of shape {list(picture.shape)} cannot be blurred", where="fill",
                             hint="pictures are [1, C, H, W]; otherwise use zero, constant or mean")
        channels, *sides = picture.shape[1:]
        sigma = self.sigma or min(sides) / 16
        for axis, side in enumerate(sides):
            reach = min(int(np.ceil(3 * sigma)), side - 1)
            offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
            weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
            kernel = (weights / weights.sum()).to(picture)
            shape, padding = ((-1, 1), (0, 0, reach, reach)) if axis == 0 else ((1, -1), (reach, reach, 0, 0))
            picture = conv2d(pad(picture, padding, mode="reflect"),
                             kernel.reshape(1, 1, *shape).expand(channels, -1, -1, -1), groups=channels)
        return picture


delete: Fill = _Delete()
"""Tokens are taken out of the sequence."""

zero: Fill = _Zero()
"""The number 0; of tokens, an embedding of zeros."""


def mask(token: int) -> Fill:
    """Tokens become the one with this id, a mask or unknown token."""
    return _Mask(int(token))


def replace(vocabulary: int | Sequence[int], seed: int = 0) -> Fill:
    """Tokens become others, drawn once for every position of an item from these ids (or from 0 to vocabulary - 1)."""
    ids = range(vocabulary) if isinstance(vocabulary, int) else vocabulary
    if len(ids) < 2:
        raise InputError("there is no other token to replace with", where="fill", hint="give at least two ids")
    return _Replace(ids, seed)


def constant(value: float) -> Fill:
    """Elements become this number."""
    return _Constant(float(value))


def mean(of: object = None) -> Fill:
    """Elements become a mean: that of `of` over its rows; without it, of a picture its own in each channel, of other
    inputs that of all items."""
    return _Mean(of)


def blur(sigma: float | None = None) -> Fill:
    """Pixels become those of the picture blurred by a Gaussian; `sigma` in pixels, default a sixteenth of its side."""
    if sigma is not None and not sigma > 0:
        raise InputError(f"blur of {sigma} pixels", where="fill", hint="give a sigma above 0")
    return _Blur(sigma)


DEFAULTS = {"tokens": "delete", "patches": "mean", "features": "mean", "segments": "mean"}


def fill_for(given: str | Fill, units: Units, items: Sequence[Item]) -> Fill:
    """A fill by name: `delete`, `zero`, `mean`, `blur`, or with a number `mask(103)`, `replace(30522)`,
    `constant(0.5)`, `blur(8)`; "auto" is delete for tokens, otherwise mean (zero for a single vector)."""
    if not isinstance(given, str):
        given.check(units)
        return given
    if given == "auto":
        given = DEFAULTS[units.kind]
        if given == "mean" and len(items) < 2 and not isinstance(units, Patches):
            given = "zero"
    found = re.fullmatch(r"(\w+)(?:\(([^()]+)\))?", given.strip())
    name, number = (found[1], found[2]) if found else (given, None)
    plain = {"delete": delete, "zero": zero, "mean": mean(), "blur": blur()}
    numbered = {"mask": lambda n: mask(int(n)), "replace": lambda n: replace(int(n)),
                "constant": lambda n: constant(float(n)), "blur": lambda n: blur(float(n))}
    try:
        fill = plain[name] if number is None else numbered[name](number)
    except (KeyError, ValueError) as problem:
        if isinstance(problem, InputError):
            raise
        needs = " needs a number:" if number is None and name in numbered else ":"
        raise InputError(f"unknown fill {given!r}" if needs == ":" else f"fill {given!r} is not complete",
                         where="fill", hint=f"`{name}`{needs} " * (needs != ":")
                         + "delete, zero, mean, blur, blur(8), constant(0.5), mask(103) or replace(30522)") from problem
    fill.check(units)
    return fill


def _only_tokens(name: str, units: Units) -> None:
    if not isinstance(units, Tokens):
        raise InputError(f"{units.kind} cannot be filled by {name}", where="fill", hint="use zero, constant or mean")


def _no_tokens(name: str, units: Units) -> None:
    if isinstance(units, Tokens):
        raise InputError(f"tokens cannot be filled by {name}", where="fill",
                         hint="use delete, zero, mask(id) or replace(vocabulary)")


def _repeated(value: torch.Tensor, count: int) -> torch.Tensor:
    """Copies of the one row of a tensor, which a model may change in place."""
    return value.repeat(count, *(1 for _ in value.shape[1:]))


def _chunks(rows: Array, batch: int) -> Iterator[Array]:
    for start in range(0, len(rows), batch):
        yield rows[start:start + batch]
