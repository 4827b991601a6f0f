"""Reference functions of mixtures of experts: one row after the other (see `reference.py`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dlbc.ir.reference_layers import Array


def route_topk(scores: Array, choice: Array | None = None, *, k: int) -> tuple[Array, Array]:
    """The k largest of choice, in order, the first of equal ones first."""
    ids = np.argsort(-(scores if choice is None else choice), axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(scores, ids, -1), ids


def expert_linear(x: Array, ids: Array, weight: Array, bias: Array | None = None, *, transposed: bool) -> Array:
    """Each row of x by the matrix of its expert."""
    weight = weight.swapaxes(1, 2) if transposed else weight
    x = np.broadcast_to(x, (*x.shape[:-2], ids.shape[-1], x.shape[-1]))
    y = np.empty((*x.shape[:-1], weight.shape[1]))
    for place in np.ndindex(*ids.shape):
        expert = ids[place]
        y[(..., *place, slice(None))] = x[(..., *place, slice(None))] @ weight[expert].T + (
            0.0 if bias is None else bias[expert])
    return y


def combine(u: Array, weights: Array) -> Array:
    """The weighted sum over experts."""
    return np.asarray((u * weights[..., None]).sum(-2))


def expert_order(ids: Array, *, experts: int) -> tuple[Array, Array, Array]:
    """A stable sort, its inverse, and how many rows the experts have, added up."""
    order = np.argsort(ids.reshape(-1), kind="stable")
    return order, np.argsort(order), np.cumsum(np.bincount(ids.reshape(-1), minlength=experts))


PARTS: dict[str, Callable[[Array], Array]] = {
    "": lambda w: w, "abs": np.abs, "positive": lambda w: np.maximum(w, 0), "negative": lambda w: np.maximum(-w, 0),
    "square": np.square}


def grouped_linear(x: Array, ends: Array, weight: Array, bias: Array | None = None, *, transposed: bool, part: str
                   ) -> Array:
    """Rows from one end to the next by the matrix of their expert."""
    weight = PARTS[part](weight.swapaxes(1, 2) if transposed else weight)
    y = np.zeros((*x.shape[:-1], weight.shape[1]))
    for expert, (start, stop) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
        y[..., start:stop, :] = x[..., start:stop, :] @ weight[expert].T + (0.0 if bias is None else bias[expert])
    return y


EXPERTS: dict[str, Callable[..., Array | tuple[Array, ...]]] = {
    "route_topk": route_topk, "expert_linear": expert_linear, "combine": combine, "expert_order": expert_order,
    "grouped_linear": grouped_linear}
