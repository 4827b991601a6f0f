"""What there is to see, before it is drawn: a panel per input, a card per explained row.

The terminal, the page and the picture all draw these, so they agree on tokens, names, scales and totals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from dlbc_runtime.arrays import Array
from dlbc_runtime.explained import Explained
from dlbc_runtime.views import colour
from dlbc_runtime.views.numbers import signed
from dlbc_runtime.views.png import stretched
from dlbc_runtime.views.tokens import Token, display, visible

if TYPE_CHECKING:
    from dlbc_runtime.explanation import Explanation

CHANNELS = (1, 3, 4)
CONTRASTIVE = "the target's relevance less its rivals'"
"""What contrastive relevance is; shown beside it."""


@dataclass(frozen=True)
class Text:
    """A sequence of tokens; `shown` leaves out padding, `position` is where the explained token comes next, `sink` the
    position of the first token and its relevance where that is shown apart."""

    input: str
    tokens: tuple[Token, ...]
    relevance: Array
    shown: tuple[int, ...]
    position: int | None
    sink: tuple[int, float] | None = None

    @property
    def limit(self) -> float:
        """|relevance| at full colour."""
        return colour.limit(self.relevance)

    @property
    def apart(self) -> str:
        """What is said of the sink; "" where none is apart."""
        if self.sink is None:
            return ""
        place, relevance = self.sink
        return f"first token {visible(self.tokens[place])} (position {place}), shown apart: {signed(relevance)}"

    def name_of(self, index: tuple[int, ...]) -> str:
        """The token at a place."""
        return visible(self.tokens[index[0]])


@dataclass(frozen=True)
class Features:
    """Named numbers; `values` are those of the input, where it has one per feature."""

    input: str
    names: tuple[str, ...]
    values: Array | None
    relevance: Array

    @property
    def limit(self) -> float:
        """|relevance| at full colour."""
        return colour.limit(self.relevance)

    def name_of(self, index: tuple[int, ...]) -> str:
        """The feature at a place."""
        return self.names[index[0]] if index else self.input


@dataclass(frozen=True)
class Picture:
    """Relevance [H,W] of an image, with its pixels (uint8 [h,w,3], any resolution)."""

    input: str
    relevance: Array
    pixels: Array | None

    @property
    def limit(self) -> float:
        """|relevance| at full colour."""
        return colour.image_limit(self.relevance)

    def name_of(self, index: tuple[int, ...]) -> str:
        """The pixel at a place."""
        return f"row {index[0]}, column {index[1]}"


Panel: TypeAlias = Text | Features | Picture


@dataclass(frozen=True)
class Card:
    """One row explained for one target."""

    row: int
    seed: int
    explained: Explained | None
    panels: tuple[Panel, ...]


def total(panel: Panel) -> float:
    """The sum of all that is finite."""
    return float(panel.relevance[np.isfinite(panel.relevance)].sum())


def cards(explanation: Explanation) -> Iterator[Card]:
    """All cards: the rows in order, for each row its targets."""
    for row in range(explanation.rows):
        for seed in range(explanation.seeds):
            yield Card(row, seed, explanation.explained(row, seed),
                       tuple(panel(explanation, name, row, seed) for name in explanation.relevance))


def panel(explanation: Explanation, name: str, row: int, seed: int) -> Panel:
    """How one input of one row is shown: as text, as a picture or as features.

    Text has tokens or is an integer sequence; a picture has channels (1, 3 or 4) and two axes of 2 or more, or
    an image was given; all else is features, what each of them has inside summed.
    """
    relevance = explanation.relevance_of(name, row, seed)
    value = explanation.value_of(name, row)
    tokens = explanation.tokens[row] if explanation.tokens is not None else None
    if relevance.ndim and tokens is not None and len(tokens) == len(relevance):
        return _text(explanation, name, tokens, _summed(relevance, tuple(range(1, relevance.ndim))), row, seed)
    if relevance.ndim == 1 and value is not None and value.dtype.kind in "iu" and name not in explanation.features:
        return _text(explanation, name, tuple(map(str, value.tolist())), relevance, row, seed)
    image = explanation.images[row] if explanation.images is not None else None
    channels = _channel_axis(relevance.shape)
    if channels is not None:
        return Picture(name, _summed(relevance, (channels,)),
                       stretched(np.moveaxis(value, channels, -1)) if image is None and value is not None else image)
    if relevance.ndim == 2 and image is not None:
        return Picture(name, relevance, image)
    names = explanation.features.get(name)
    if relevance.ndim == 0:
        return Features(name, (name,), None if value is None else value.reshape(1), relevance.reshape(1))
    numbers = value if value is not None and value.ndim == 1 else None
    return Features(name, names or tuple(f"{name}[{i}]" for i in range(len(relevance))), numbers,
                    _summed(relevance, tuple(range(1, relevance.ndim))))


def _text(explanation: Explanation, name: str, tokens: tuple[str, ...], relevance: Array, row: int,
          seed: int) -> Text:
    explained = explanation.explained(row, seed)
    shown = tuple(range(len(tokens)))
    if "attention_mask" in explanation.inputs:
        mask = explanation.value_of("attention_mask", row)
        if mask is not None and mask.shape == relevance.shape:
            # Masked tokens have exactly no relevance; one that has some is shown, for it must be seen.
            shown = tuple(place for place in shown if mask[place] or relevance[place])
    return Text(name, tuple(display(tokens)), relevance, shown, explained.position if explained else None,
                explanation.sink_of(name, row, seed))


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """The channel axis of an image [C,H,W] or [H,W,C]; None when it is no image."""
    if len(shape) != 3:
        return None
    for axis, rest in ((0, shape[1:]), (2, shape[:2])):
        if shape[axis] in CHANNELS and min(rest) >= 2:
            return axis
    return None


def _summed(relevance: Array, axes: tuple[int, ...]) -> Array:
    """Relevance with `axes` summed; opposite infinities make what is not a number, which is shown as such."""
    with np.errstate(invalid="ignore"):
        return np.asarray(relevance.sum(axis=axes))
