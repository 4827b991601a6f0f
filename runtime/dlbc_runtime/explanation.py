"""An explanation: what the model said, and how much each part of its input had to do with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from dlbc_runtime.arrays import NOTHING, Array, Arrays, Json, as_numpy
from dlbc_runtime.errors import InputError
from dlbc_runtime.expert_layer import Order
from dlbc_runtime.experts import Experts
from dlbc_runtime.explained import Attribution, Explained, Meaning, Method
from dlbc_runtime.ledger import Ledger

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Arrays", "Attribution", "Explained", "Explanation", "Method", "Order"]

Labels = Sequence[str] | Mapping[int, str] | Callable[[int], str]


@runtime_checkable
class Tokenizer(Protocol):
    """What `with_tokens` needs of a tokenizer; those of transformers have it."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """The text of each token id."""
        ...


_GROUPS = ("outputs", "relevance", "inputs", "nodes", "activations", "positive", "negative", "sinks")


def _nothing() -> Arrays:
    return NOTHING


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """Relevance of the inputs of one call, with the outputs it explains and how it was made.

    Arrays are numpy; tensors given to the constructor (in a dict or `Arrays`) are converted on first access.
    `relevance` has the shape of each input; with `many_targets` a target axis comes first, there and in
    `nodes`. `target` has one entry per batch row, for many targets all rows of the first target first.
    Contrastive rules carry two relevances, never negative: `positive` of the target, `negative` of its rivals, and
    `relevance` (as `nodes`) is the first less the second. For other rules both are empty.
    `sinks`: relevance of the first token of each row of an input, where it was taken apart: [rows], or [targets, rows].
    `lengths`: of inputs given as rows of different lengths, the length of each row; arrays hold them padded (relevance
    by 0), `relevance_of` and `value_of` give rows without padding.
    """

    outputs: Mapping[str, Array]
    relevance: Mapping[str, Array]
    inputs: Mapping[str, Array]
    target: Sequence[Explained] = ()
    nodes: Mapping[str, Array] = field(default_factory=_nothing)
    activations: Mapping[str, Array] = field(default_factory=_nothing)
    rules: str = ""
    method: Method = field(default_factory=Method)
    many_targets: bool = False
    ledger_source: Callable[[], Ledger] | None = None
    tokens: tuple[tuple[str, ...], ...] | None = None
    features: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    images: tuple[Array, ...] | None = None
    omitted: tuple[str, ...] = ()
    positive: Mapping[str, Array] = field(default_factory=_nothing)
    negative: Mapping[str, Array] = field(default_factory=_nothing)
    sinks: Mapping[str, Array] = field(default_factory=_nothing)
    lengths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    draw_source: Callable[..., Path] | None = None
    experts: Experts | None = None

    def __post_init__(self) -> None:
        for group in _GROUPS:
            if not isinstance(getattr(self, group), Arrays):
                object.__setattr__(self, group, Arrays(getattr(self, group)))
        if not isinstance(self.target, Meaning):
            object.__setattr__(self, "target", tuple(self.target))
        if self.ledger_source is not None and not isinstance(self.ledger_source, Once):
            object.__setattr__(self, "ledger_source", Once(self.ledger_source))
        if self.experts is not None:
            object.__setattr__(self, "experts", self.experts.named(
                self.tokens, next(iter(self.lengths.values()), None), self.target))
        for name in self.relevance:
            shape = _shape(self.relevance, name)
            input_shape = _shape(self.inputs, name) if name in self.inputs else shape[int(self.many_targets):]
            if shape[int(self.many_targets):] != input_shape:
                axis = "[targets, *input shape]" if self.many_targets else "the shape of the input"
                raise InputError(f"relevance has shape {list(shape)}, the input {list(input_shape)}",
                                 where=f"explanation of {name!r}", hint=f"relevance must have {axis}")
        for name in self.sinks:
            shape, whole = _shape(self.sinks, name), _shape(self.relevance, name) if name in self.relevance else ()
            if shape != whole[:-1] or len(whole) != 2 + int(self.many_targets):
                raise InputError(f"sinks have shape {list(shape)}, the relevance {list(whole)}",
                                 where=f"explanation of {name!r}", hint="one number for each row and target")

    @classmethod
    def of_fields(cls, fields: dict[str, Any]) -> Explanation:
        """One of all of its fields, each as the constructor leaves it, in a dict that nobody else has."""
        found = object.__new__(cls)
        object.__setattr__(found, "__dict__", fields)
        return found

    # What it is about

    @property
    def rows(self) -> int:
        """How many batch rows it explains."""
        if self.target:
            return 1 + max(explained.row for explained in self.target)
        shapes = (_shape(self.relevance, name)[int(self.many_targets):] for name in self.relevance)
        return next((shape[0] for shape in shapes if shape), 1)

    @property
    def seeds(self) -> int:
        """How many targets it explains for each row."""
        return next((_shape(self.relevance, name)[0] for name in self.relevance), 0) if self.many_targets else 1

    def explained(self, row: int = 0, seed: int = 0) -> Explained | None:
        """What was explained in a row; None when nothing is known about it."""
        return next((one for one in self.target if one.row == row and one.seed == seed), None)

    def relevance_of(self, input: str, row: int = 0, seed: int = 0) -> Array:
        """Relevance of one batch row of one input, without batch and target axes."""
        relevance = self.relevance[input][seed] if self.many_targets else self.relevance[input]
        return self._trimmed(self._row(relevance, row), input, row)

    def value_of(self, input: str, row: int = 0) -> Array | None:
        """One batch row of one input; None when the explanation does not hold that input."""
        return self._trimmed(self._row(self.inputs[input], row), input, row) if input in self.inputs else None

    def _trimmed(self, of_row: Array, input: str, row: int) -> Array:
        """A row without padding."""
        return of_row[:self.lengths[input][row]] if input in self.lengths else of_row

    def sink_of(self, input: str, row: int = 0, seed: int = 0) -> tuple[int, float] | None:
        """The first token's position in a row and its relevance, where that was taken apart; None where it was not."""
        from dlbc_runtime.sinks import first_visible

        if input not in self.sinks or input not in self.inputs:
            return None
        of_rows = self.sinks[input][seed] if self.many_targets else self.sinks[input]
        return int(first_visible(self.inputs, input)[row]), float(of_rows[row])

    def _row(self, array: Array, row: int) -> Array:
        # An input that no batch goes through (one image, a vector) is all of its only row.
        batched = array.ndim > 0 and array.shape[0] == self.rows
        return np.asarray(array[row]) if batched else array

    @property
    def contrastive(self) -> bool:
        """Whether relevance is that of the target less that of its rivals."""
        return bool(self.positive)

    # Questions

    def top(self, k: int = 10, input: str | None = None, by: Order = "absolute") -> list[Attribution]:
        """The `k` most relevant elements of each row (and target), the strongest first.

        Elements are what is shown: tokens, pixels (channels summed), features. `by` takes the largest
        absolute, the largest positive or the most negative; elements without relevance are left out.
        """
        from dlbc_runtime.views.panels import panel

        if input is not None and input not in self.relevance:
            raise InputError(f"there is no relevance for {input!r}", where="top()",
                             hint=f"one of {', '.join(map(repr, self.relevance)) or 'none'}")
        if by not in ("absolute", "positive", "negative"):
            raise InputError(f"unknown order {by!r}", where="top()", hint="absolute, positive or negative")
        found: list[Attribution] = []
        for seed in range(self.seeds):
            for row in range(self.rows):
                of_row: list[Attribution] = []
                for name in [input] if input is not None else self.relevance:
                    shown = panel(self, name, row, seed)
                    flat = shown.relevance.ravel()
                    for place in strongest(flat, k, by):
                        index = tuple(int(i) for i in np.unravel_index(place, shown.relevance.shape))
                        of_row.append(Attribution(row, name, index, shown.name_of(index), float(flat[place]), seed))
                sign = -1.0 if by == "negative" else 1.0
                size = abs if by == "absolute" else lambda relevance, sign=sign: sign * relevance
                found += sorted(of_row, key=lambda one: -size(one.relevance))[:k]
        return found

    def conservation(self) -> Ledger:
        """Where the relevance went: per operation in, out and absorbed, computed when first asked for.

        Raises InputError when the explanation was loaded from a file that does not hold the table.
        """
        if self.ledger_source is None:
            raise InputError("this explanation has no conservation table", where="conservation()",
                             hint="call conservation() on the fresh explanation before saving it")
        return self.ledger_source()

    @property
    def ledger(self) -> Ledger | None:
        """The conservation table if it was computed already."""
        return self.ledger_source.result if isinstance(self.ledger_source, Once) else None

    # Presentation

    def with_tokens(self, tokens: Sequence[str] | Sequence[Sequence[str]] | Tokenizer,
                    input: str | None = None) -> Explanation:
        """The same explanation with the text of its tokens: given per batch row, or by a tokenizer.

        A tokenizer reads `input` (default: the first integer input of two axes), and also names the explained
        tokens where the target has a position, as in next-token prediction.
        """
        if isinstance(tokens, Tokenizer):
            return self._with_tokenizer(tokens, input)
        if isinstance(tokens, str):
            raise InputError("got one text", where="with_tokens()", hint="give a list of tokens, or the tokenizer")
        rows: list[Sequence[str]] = []
        if all(isinstance(token, str) for token in tokens):
            rows = [[str(token) for token in tokens]]
        else:
            rows = [[str(token) for token in row] for row in tokens]
        if len(rows) != self.rows:
            raise InputError(f"{len(rows)} rows of tokens for {self.rows} batch rows", where="with_tokens()",
                             hint="give one list of tokens per batch row")
        for row, of_row in enumerate(rows):
            lengths = [len(self.relevance_of(name, row)) for name in self.relevance if self.relevance_of(name).ndim]
            if len(of_row) not in lengths:
                raise InputError(f"row {row} has {len(of_row)} tokens; the inputs have {sorted(set(lengths))}",
                                 where="with_tokens()", hint="give every token, special and padding ones too")
        return replace(self, tokens=tuple(map(tuple, rows)))

    def _with_tokenizer(self, tokenizer: Tokenizer, input: str | None) -> Explanation:
        from dlbc_runtime.views.tokens import display

        ids = [name for name in self.inputs if _is_integer(self.inputs[name]) and self.inputs[name].ndim == 2]
        first = [name for name in ids if name in self.relevance] or ids
        if input is None and not first:
            raise InputError("no input holds token ids", where="with_tokens()",
                             hint="give the tokens as lists of text, or name the input: input=...")
        chosen = first[0] if input is None else input
        if chosen not in self.inputs:
            raise InputError(f"there is no input {chosen!r}", where="with_tokens()",
                             hint=f"one of {', '.join(map(repr, self.inputs))}")

        def texts(of_row: Array) -> tuple[str, ...]:
            # A tokenizer answers None for an id beyond its vocabulary.
            found = tokenizer.convert_ids_to_tokens([int(i) for i in of_row])
            return tuple(str(i) if text is None else text for i, text in zip(of_row, found, strict=True))

        ids_of = np.atleast_2d(self.inputs[chosen])
        tokens = tuple(texts(self._trimmed(of_row, chosen, row)) for row, of_row in enumerate(ids_of))
        if any(one.position is not None for one in self.target):
            named = self.with_labels(lambda index: display(texts(np.array([index])))[0].spaced)
            kept = tuple(new if new.position is not None else old
                         for new, old in zip(named.target, self.target, strict=True))
            return replace(self, tokens=tokens, target=kept)
        return replace(self, tokens=tokens)

    def with_labels(self, labels: Labels) -> Explanation:
        """The same explanation with names for the explained indices: a list, a mapping or a function."""
        def label(index: int | None, old: str | None) -> str | None:
            if index is None:
                return old
            if callable(labels):
                return str(labels(index))
            if isinstance(labels, Mapping):
                return str(labels[index]) if index in labels else old
            if not 0 <= index < len(labels):
                raise InputError(f"index {index} was explained, but there are {len(labels)} labels",
                                 where="with_labels()", hint="give one label per class")
            return str(labels[index])

        return replace(self, target=tuple(
            replace(one, label=label(one.index, one.label), against_label=label(one.against, one.against_label))
            for one in self.target))

    def with_features(self, names: Iterable[str], input: str | None = None) -> Explanation:
        """The same explanation with the names of the features of `input` (default: the only one they fit)."""
        given = tuple(str(name) for name in names)
        fitting = [name for name in self.relevance if self.relevance_of(name).shape[:1] == (len(given),)]
        chosen = next(iter(fitting), None) if input is None else input
        if chosen is None or chosen not in fitting:
            sizes = {name: list(self.relevance_of(name).shape) for name in self.relevance}
            raise InputError(f"{len(given)} names fit none of the inputs asked for: {sizes}",
                             where="with_features()", hint="give one name per feature")
        return replace(self, features={**self.features, chosen: given})

    def with_image(self, images: object) -> Explanation:
        """The same explanation with the picture of each row: uint8 [H,W,3] (or [H,W]), or floats in 0..1.

        One picture or one per batch row; give what the model saw (cropped as it was), at any resolution.
        """
        from dlbc_runtime.views.png import as_picture

        several = list(images) if isinstance(images, list | tuple) else None
        if several is None:
            array = as_numpy(images)
            several = list(array) if array.ndim == 4 else [array]
        if len(several) != self.rows:
            raise InputError(f"{len(several)} pictures for {self.rows} batch rows", where="with_image()",
                             hint="give one picture per batch row")
        return replace(self, images=tuple(as_picture(as_numpy(image)) for image in several))

    # Showing and keeping

    def show(self, *, theme: Literal["auto", "light", "dark"] = "auto", rows: int = 8) -> None:
        """Show it: as rich HTML in a notebook, otherwise printed to the terminal (at most `rows` rows)."""
        from dlbc_runtime.views.terminal import show

        show(self, theme=theme, rows=rows)

    def save(self, path: str | Path, *, complete: bool | None = None) -> Path:
        """Write it to a file by suffix: `.safetensors`, `.json`, `.html` or `.png`; returns the path.

        `complete` says whether large outputs, nodes and activations are kept: by default in `.safetensors`
        and not in `.json`. The conservation table goes along if `conservation()` was called before.
        Raises InputError for another suffix, DlbcError when `.png` lacks matplotlib.
        """
        from dlbc_runtime.explanation_file import save

        return save(self, Path(path), complete=complete)

    def draw(self, path: str | Path, *, by: Literal["module", "op"] = "module", top_k: int | None = None,
             opened: Sequence[str] = (), title: str = "") -> Path:
        """Draw the model's graph with this explanation's relevance, as `Explainer.draw`; returns the path.

        InputError when it was made without `keep`, or was loaded from a file, which holds no graph.
        """
        if self.draw_source is None:
            raise InputError("this explanation does not know its model's graph", where="draw()",
                             hint="use explainer.draw(path, explanation)")
        return self.draw_source(path, self, by=by, top_k=top_k, opened=opened, title=title)

    @classmethod
    def load(cls, path: str | Path) -> Explanation:
        """Read what `save` wrote to a `.safetensors` or `.json` file. Raises ArtifactError if it cannot."""
        from dlbc_runtime.explanation_file import load

        return load(Path(path))

    def to_dict(self, *, complete: bool = False) -> dict[str, Json]:
        """All of it as JSON-able data; large outputs, nodes and activations only when `complete`."""
        from dlbc_runtime.explanation_file import to_dict

        return to_dict(self, complete=complete)

    def _repr_html_(self) -> str:
        from dlbc_runtime.views.html import notebook

        return notebook(self)

    def __rich__(self) -> RenderableType:
        from dlbc_runtime.views.terminal import render

        return render(self)

    def __repr__(self) -> str:
        about = "; ".join(map(str, self.target[:3])) + ("; …" if len(self.target) > 3 else "")
        return f"Explanation({about or 'no target'}, rules={self.rules!r}, relevance={self.relevance!r})"


def strongest(flat: Array, k: int, by: Order) -> list[int]:
    """Places of the `k` strongest finite, nonzero elements of a flat array, the strongest first."""
    sizes = np.abs(flat) if by == "absolute" else flat if by == "positive" else -flat
    sizes = np.where(np.isfinite(sizes), sizes, 0.0)
    places = np.argsort(-sizes, kind="stable")[:max(k, 0)]
    return [int(place) for place in places if sizes[place] > 0]


class Once:
    """Calls a function the first time only; thread-safe. Copies of an explanation share its result."""

    def __init__(self, source: Callable[[], Ledger]) -> None:
        self._source, self._lock = source, threading.Lock()
        self.result: Ledger | None = None

    def __call__(self) -> Ledger:
        with self._lock:
            if self.result is None:
                self.result = self._source()
            return self.result


def known(ledger: Ledger) -> Callable[[], Ledger]:
    """A ledger source that has its table already, as a loaded explanation has."""
    once = Once(lambda: ledger)
    once()
    return once


def _shape(arrays: Mapping[str, Array], name: str) -> tuple[int, ...]:
    assert isinstance(arrays, Arrays)
    return arrays.shape(name)


def _is_integer(array: Array) -> bool:
    return array.dtype.kind in "iu"
