"""Experts as a part of a page, and as a page of their own: two maps of layer by expert, one layer token by expert, and
where one token's relevance went. The page holds numbers, which its script shows as asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

from dlbc_runtime.arrays import Array, Json
from dlbc_runtime.errors import InputError
from dlbc_runtime.expert_layer import ExpertLayer
from dlbc_runtime.experts import Experts
from dlbc_runtime.views.page import embedded, framed, packed, rendered
from dlbc_runtime.views.tokens import display

ROWS = 64  # batch rows on one page
CHOICES = 4_000_000  # choices of experts on one page, for all targets

SCRIPTS = ("parts.js", "experts.js")
STYLES = ("experts.css",)


@dataclass(frozen=True)
class ExpertsView:
    """The experts ready for the template: a line about them, and the data for the script."""

    about: str
    data: str


def save(experts: Experts, path: Path) -> Path:
    """Write the experts to `path` by its suffix; the file appears whole or not at all."""
    from dlbc_runtime.explanation_file import write_whole

    match path.suffix.lower():
        case ".html":
            content = page(experts)
        case ".json":
            content = json.dumps(experts.to_dict(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        case suffix:
            raise InputError(f"cannot write experts as {suffix!r}", where=str(path),
                             hint="use a name that ends in .html or .json; explanation.save keeps them as well")
    write_whole(path, content.encode("utf-8"))
    return path


def page(experts: Experts, title: str = "Experts") -> str:
    """The page as text. It needs no other file and no network."""
    return rendered("experts.html.jinja", title, STYLES, SCRIPTS, experts=view(experts))


def notebook(experts: Experts) -> str:
    """The page in a frame of its own."""
    return framed(page(experts), "experts", 860)


def view(experts: Experts) -> ExpertsView:
    """What the template shows of experts."""
    choices = sum(layer.ids.size for layer in experts.layers) // experts.rows
    seeds = max(1, min(experts.seeds, CHOICES // max(1, choices)))
    count = max(1, min(experts.rows, ROWS, CHOICES // max(1, choices * seeds)))
    rows: list[Json] = [_row([experts.of_row(row, seed) for seed in range(seeds)], row, experts)
                        for row in range(count)]
    names = short_names(list(experts))
    layers: list[Json] = [{"name": name, "place": layer.place, "experts": layer.experts, "k": layer.k,
                           "shared": layer.spec.shared}
                          for name, layer in zip(names, experts.layers, strict=True)]
    hidden = _hidden(experts.rows - count, "row") + _hidden(experts.seeds - seeds, "target")
    return ExpertsView(described(experts) + "." + hidden, embedded({"layers": layers, "rows": rows}))


def _hidden(count: int, what: str) -> str:
    return f" {count} more {what} is not on this page." if count == 1 else (
        f" {count} more {what}s are not on this page." if count else "")


def described(experts: Experts) -> str:
    """How many experts there are: `48 layers of 128 experts, 8 for each token, and shared ones`."""
    layers = experts.layers
    counts = sorted({layer.experts for layer in layers})
    chosen = sorted({layer.k for layer in layers})
    of = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    each = f"{chosen[0]}" if len(chosen) == 1 else f"{chosen[0]} to {chosen[-1]}"
    shared = ", and shared ones" if any(layer.spec.shared for layer in layers) else ""
    return (f"{len(layers)} {'layer' if len(layers) == 1 else 'layers'} of {of} experts, {each} for each token"
            f"{shared}")


def short_names(places: Sequence[str]) -> list[str]:
    """Places without what all of them begin and end with: `model.layers.3.mlp` among its like is `3`."""
    parts = [place.split(".") for place in places]
    if len(parts) < 2:
        return [".".join(part[-2:]) for part in parts]
    before = len(list(_common(parts)))
    after = len(list(_common([part[before:][::-1] for part in parts])))
    found = [".".join(part[before:len(part) - after]) for part in parts]
    return found if all(found) and len(set(found)) == len(found) else list(places)


def _common(parts: Sequence[Sequence[str]]) -> Iterator[str]:
    """What all begin with."""
    return (column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))


def _row(of_row: Sequence[Experts], row: int, experts: Experts) -> Json:
    """One batch row for all its targets. Tokens that are routed nowhere, as masked ones, are left out."""
    tokens = _tokens(of_row[0])
    seen = _routed(of_row, len(tokens))
    targets: list[Json] = [_target(one, seed) for seed, one in enumerate(of_row)]
    named = f"row {row}" + (f": {targets[0]}" if experts.target and len(targets) == 1 else "")
    return {"name": named, "tokens": [tokens[place] for place in seen], "positions": [int(place) for place in seen],
            "targets": targets,
            "layers": [_layer([one.layers[place] for one in of_row], seen if _count(layer) == len(tokens) else None)
                       for place, layer in enumerate(of_row[0].layers)]}


def _routed(of_row: Sequence[Experts], count: int) -> Array:
    """Which of so many tokens are routed somewhere, or have relevance for some target; all where none is."""
    found = np.zeros(count, bool)
    for layer in of_row[0].layers:
        if _count(layer) == count:
            found |= (layer.ids.reshape(count, -1) >= 0).any(-1)
    for one in of_row:
        for layer in one.layers:
            if _count(layer) == count:
                found |= layer.by_token.reshape(count) != 0
    return np.flatnonzero(found) if found.any() else np.arange(count)


def _target(experts: Experts, seed: int) -> str:
    return experts.target[0].plain_name if experts.target else f"target {seed}"


def _tokens(of_row: Experts) -> list[Json]:
    """The tokens of a row: their texts where they are known, otherwise their positions."""
    counts = [_count(layer) for layer in of_row.layers]
    texts = of_row.tokens[0] if of_row.tokens is not None else ()
    if texts and len(texts) in counts:
        return [[token.text, int(token.space), token.breaks] for token in display(texts)]
    return [[str(place), 1, 0] for place in range(max(counts, default=0))]


def _count(layer: ExpertLayer) -> int:
    """How many tokens a row of a layer has."""
    return layer.ids.size // layer.k


def _layer(of_seeds: Sequence[ExpertLayer], seen: Array | None) -> Json:
    """One layer of a row: the arrays of all targets, one after the other, of some tokens or of all."""
    first, tokens = of_seeds[0], slice(None) if seen is None else seen
    count = _count(first)

    def chosen(array: Array) -> Array:
        return np.asarray(array.reshape(count, -1)[tokens])

    weights = np.nan_to_num(chosen(first.weights), posinf=0.0, neginf=0.0)  # what is no number cannot be packed so
    full = float(np.abs(weights).max(initial=0.0))
    weights = np.rint(weights / full * 32767) if full else weights
    shared = [chosen(layer.shared) for layer in of_seeds if layer.shared is not None]
    return {"ids": _packed(chosen(first.ids), "<i2"), "weights": _packed(weights, "<i2"), "full": full,
            "relevance": _packed(np.stack([chosen(layer.relevance) for layer in of_seeds]), "<f4"),
            "shared": _packed(np.stack(shared), "<f4") if shared else None}


def _packed(array: Array, kind: str) -> str:
    return packed(np.ascontiguousarray(array, kind).tobytes())
