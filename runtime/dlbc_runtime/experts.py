"""Experts of an explanation: which ones each token was routed to, with what weight, and the relevance they got.

A layer of a mixture of experts is `y = sum_k w_k u_k` over the experts chosen for a token; its relevance goes to the
terms of that sum. Here are those terms, for every layer, token and choice, and what can be counted of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dlbc_runtime.arrays import Array, Arrays, Json, array_to_json
from dlbc_runtime.errors import InputError
from dlbc_runtime.expert_layer import ExpertLayer, ExpertShare, ExpertSpec, Order, order
from dlbc_runtime.explained import Explained

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["ExpertLayer", "ExpertShare", "ExpertSpec", "Experts"]


@dataclass(frozen=True, eq=False, repr=False)
class Experts(Mapping[str, ExpertLayer]):
    """The layers of experts of an explanation, in the order of the model, by module path.

    `tokens`: their texts, one tuple for each batch row; `lengths` of rows that are padded behind their end; `target`:
    what was explained. All three come of the explanation.
    """

    layers: tuple[ExpertLayer, ...]
    tokens: tuple[tuple[str, ...], ...] | None = None
    lengths: tuple[int, ...] | None = None
    target: Sequence[Explained] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        places = [layer.place for layer in self.layers]
        twice = next((place for place in places if places.count(place) > 1), None)
        if twice is not None:
            raise InputError(f"two layers of experts are called {twice!r}", where="experts",
                             hint="give each layer a place of its own")
        if len({(layer.many_targets, layer.seeds) for layer in self.layers}) > 1:
            raise InputError("layers of experts were explained for different targets", where="experts",
                             hint="give the layers of one explanation")

    def __getitem__(self, place: str) -> ExpertLayer:
        found = next((layer for layer in self.layers if layer.place == place), None)
        if found is None:
            raise KeyError(f"{place!r} has no experts; there are {', '.join(self) or 'none'}")
        return found

    def __iter__(self) -> Iterator[str]:
        return (layer.place for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def many_targets(self) -> bool:
        """Whether a target axis comes first in relevance."""
        return bool(self.layers) and self.layers[0].many_targets

    @property
    def seeds(self) -> int:
        """How many targets are explained."""
        return self.layers[0].seeds if self.layers else 1

    @property
    def rows(self) -> int:
        """How many batch rows there are."""
        return next((layer.rows[0] for layer in self.layers if layer.rows), 1)

    # Sums

    def totals(self) -> dict[str, Array]:
        """The relevance of each expert, by layer: float64 [experts] or [targets, experts]."""
        return {layer.place: layer.totals for layer in self.layers}

    def by_layer(self) -> dict[str, Array]:
        """The relevance that entered the experts of each layer, float64 [] or [targets]."""
        return {layer.place: layer.entering for layer in self.layers}

    def by_token(self) -> Array:
        """The relevance that entered the experts of all layers at each token, float64 [*rows] or [targets, *rows].
        InputError where layers see different tokens."""
        shapes = {layer.rows for layer in self.layers}
        if len(shapes) != 1:
            raise InputError(f"layers see tokens of the shapes {sorted(map(list, shapes))}", where="by_token()",
                             hint="ask one layer: experts[place].by_token")
        return np.asarray(sum(layer.by_token for layer in self.layers))

    def all_layer_expert_relevance(self) -> dict[str, Array]:
        """The relevance of each expert by layer over all tokens, rows and targets: float64 [experts]."""
        return {layer.place: layer.totals.reshape(-1, layer.experts).sum(0) for layer in self.layers}

    def top(self, token: int | None = None, k: int = 10, row: int = 0, seed: int = 0, by: Order = "absolute"
            ) -> list[ExpertShare]:
        """The `k` experts with most relevance at a token of a batch row, over all layers, the strongest first; those
        without relevance are left out. None: over all tokens of the row, `token` is then -1. InputError for a token
        that is not there."""
        found: list[ExpertShare] = []
        for layer in self.of_row(row, seed).layers:
            count = layer.rows[0] if layer.rows else 1
            if token is not None and not -count <= token < count:
                raise InputError(f"token {token} of {count}", where="top()", hint="tokens count from 0")
            place = -1 if token is None else token % count
            if token is None:
                weights = np.bincount(layer.ids[layer.ids >= 0], layer.weights[layer.ids >= 0], layer.experts)
                of_token: Iterable[tuple[int | None, float, float]] = zip(
                    range(layer.experts), layer.totals.tolist(), weights.tolist(), strict=True)
                shared = float(layer.shared_total)
            else:
                ids, one = layer.ids.reshape(count, -1)[place], layer.relevance.reshape(count, -1)[place]
                of_token = zip(ids.tolist(), one.tolist(), layer.weights.reshape(count, -1)[place].tolist(),
                               strict=True)
                shared = 0.0 if layer.shared is None else float(layer.shared.reshape(count)[place])
            found += [ExpertShare(layer.place, expert, relevance, weight, row, place, seed)
                      for expert, relevance, weight in (*of_token, (None, shared, 1.0)) if expert != -1]
        size: Callable[[ExpertShare], float] = {
            "absolute": lambda one: abs(one.relevance), "positive": lambda one: one.relevance,
            "negative": lambda one: -one.relevance}[order(by)]
        return sorted((one for one in found if size(one) > 0), key=lambda one: -size(one))[:max(k, 0)]

    # Parts and wholes

    def named(self, tokens: tuple[tuple[str, ...], ...] | None, lengths: tuple[int, ...] | None,
              target: Sequence[Explained]) -> Experts:
        """The same with what an explanation knows about its rows."""
        return replace(self, tokens=tokens, lengths=lengths, target=target)

    def of_row(self, row: int = 0, seed: int = 0) -> Experts:
        """One batch row and one target: arrays without these axes, and without padding. InputError where there is no
        such row or target."""
        if not 0 <= row < self.rows or not 0 <= seed < self.seeds:
            raise InputError(f"row {row}, target {seed} of {self.rows} rows, {self.seeds} targets",
                             where="experts", hint="both count from 0")
        length = None if self.lengths is None else self.lengths[row]

        def of(layer: ExpertLayer, name: str, array: Array) -> Array:
            array = array[seed] if name in ("relevance", "shared") and layer.many_targets else array
            array = array[row] if layer.rows else array
            return array if length is None or len(layer.rows) < 2 else array[:length]

        return replace(
            self, lengths=None, tokens=None if self.tokens is None else (self.tokens[row],),
            target=tuple(one for one in self.target if (one.row, one.seed) == (row, seed)),
            layers=tuple(_changed(layer, partial(of, layer), many=False) for layer in self.layers))

    def of_targets(self, order: Sequence[int] | Array) -> Experts:
        """Some of the targets, in an order: of many targets, which stay many."""
        chosen = np.asarray(order, np.int64)
        return replace(self, target=(), layers=tuple(_changed(
            layer, lambda name, array: array[chosen] if name in ("relevance", "shared") else array)
            for layer in self.layers))

    def summed(self) -> Experts:
        """The same with the relevance of all targets added up."""
        def total(name: str, array: Array) -> Array:
            return array.sum(0, dtype=np.float64).astype(np.float32) if name in ("relevance", "shared") else array

        return replace(self, target=(), layers=tuple(
            _changed(layer, total, many=False) for layer in self.layers)) if self.many_targets else self

    def lengthened(self, length: int) -> Experts:
        """The same for texts of `length` tokens, the last axis of rows: those behind what was computed were routed
        nowhere."""
        def longer(layer: ExpertLayer) -> ExpertLayer:
            more = length - layer.rows[-1] if len(layer.rows) > 1 else 0
            return layer if more <= 0 else _changed(layer, lambda name, array: _padded(name, array, more))

        return replace(self, layers=tuple(map(longer, self.layers)))

    @classmethod
    def joined(cls, parts: Sequence[Experts], axis: Literal["rows", "targets"]) -> Experts:
        """One of several: of batch rows, which may be of different lengths, or of targets of the same texts, whose
        experts are the same as far as they were computed. InputError for parts of different models."""
        if not parts or any([layer.spec for layer in part.layers] != [layer.spec for layer in parts[0].layers]
                            for part in parts):
            raise InputError("experts of different models cannot be joined", where="joined()",
                             hint="join the parts of one call")
        layers = []
        for several in zip(*(part.layers for part in parts), strict=True):
            widest = max(layer.rows[-1] if len(layer.rows) > 1 else 0 for layer in several)
            own = [cls((layer,)).lengthened(widest).layers[0] for layer in several]
            longest = max(range(len(own)), key=lambda place: several[place].rows[-1:])
            first, lead = own[longest], int(own[0].many_targets)
            if axis == "rows":
                arrays = {name: np.concatenate([_array(layer, name) for layer in own],
                                               axis=lead if name in ("relevance", "shared") else 0)
                          for name in first.arrays}
                layers.append(ExpertLayer(first.spec, Arrays(arrays), first.many_targets))
            else:
                arrays = {name: np.concatenate([_array(layer, name) if layer.many_targets else
                                                _array(layer, name)[None] for layer in own])
                          if name in ("relevance", "shared") else _array(first, name) for name in first.arrays}
                layers.append(ExpertLayer(first.spec, Arrays(arrays), True))
        tokens = [part.tokens for part in parts]
        together = tuple(row for of_part in tokens if of_part is not None for row in of_part)
        return cls(tuple(layers), (together if axis == "rows" else tokens[0]) if None not in tokens else None)

    # Showing and keeping

    def show(self, *, row: int = 0, seed: int = 0, limit: int = 24) -> None:
        """Show it: as a page in a notebook, otherwise a table in the terminal, of at most `limit` layers."""
        from dlbc_runtime.views.experts_terminal import show

        show(self, row=row, seed=seed, limit=limit)

    def save(self, path: str | Path) -> Path:
        """Write it to a file by suffix: `.html`, one page for the browser, or `.json`, as `to_dict`; returns the path.
        Raises InputError for another suffix."""
        from dlbc_runtime.views.experts import save

        return save(self, Path(path))

    def to_dict(self) -> dict[str, Json]:
        """All of it as JSON-able data: for each layer what it is, its arrays, and what was counted."""
        return {"format": "dlbc-experts", "version": 1, "many_targets": self.many_targets, "layers": [
            {**layer.spec.to_json(), "load": layer.load.tolist(), "entropy": layer.entropy,
             "normalised_entropy": layer.normalised_entropy, "totals": array_to_json(layer.totals),
             "arrays": {name: array_to_json(_array(layer, name)) for name in layer.arrays}}
            for layer in self.layers]}

    def _repr_html_(self) -> str:
        from dlbc_runtime.views.experts import notebook

        return notebook(self)

    def __rich__(self) -> RenderableType:
        from dlbc_runtime.views.experts_terminal import table

        return table(self)

    def __repr__(self) -> str:
        return f"Experts({', '.join(map(repr, self.layers))})"


def _array(layer: ExpertLayer, name: str) -> Array:
    found: Array = getattr(layer, name)
    return found


def _changed(layer: ExpertLayer, change: Callable[[str, Array], Any], *, many: bool | None = None) -> ExpertLayer:
    """The layer with its arrays changed; padding is in them by now."""
    return ExpertLayer(layer.spec, Arrays({name: change(name, _array(layer, name)) for name in layer.arrays}),
                       layer.many_targets if many is None else many)


def _padded(name: str, array: Array, more: int) -> Array:
    """An array with `more` tokens that were routed nowhere, behind the others."""
    axis = array.ndim - (1 if name == "shared" else 2)
    widths = [(0, more if own == axis else 0) for own in range(array.ndim)]
    return np.pad(array, widths, constant_values=-1 if name == "ids" else 0)
