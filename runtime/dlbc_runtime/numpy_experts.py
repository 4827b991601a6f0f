"""Mixtures of experts in numpy: the choice of experts, rows sorted by them, and one product for each expert in use."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np

from dlbc_runtime.arrays import Array

_PARTS: dict[str, Callable[[Array], Array]] = {
    "": lambda w: w, "abs": np.abs, "positive": lambda w: np.maximum(w, 0), "negative": lambda w: np.maximum(-w, 0),
    "square": np.square}


def route_topk(scores: Array, choice: Array | None, k: int) -> tuple[Array, Array]:
    """The k largest of choice (scores), as torch.topk orders equal ones; their scores and places.

    Which of equal ones torch takes is not documented, and it is what the model does: torch is asked for the rows that
    have such, where it is installed. Where it is not, the first are taken.
    """
    by = scores if choice is None else choice
    order = np.argsort(-by, axis=-1, kind="stable")
    ids, leading = order[..., :k], np.take_along_axis(by, order[..., :k + 1], -1)
    tied = (leading[..., 1:] == leading[..., :-1]).any(-1)
    if tied.any() and find_spec("torch") is not None:
        import torch

        ids[tied] = torch.topk(torch.from_numpy(by[tied]), k, -1).indices.numpy()
    return np.take_along_axis(scores, ids, -1), ids


def expert_order(ids: Array, experts: int) -> tuple[Array, Array, Array]:
    """The order that sorts rows by expert, where each row went, and where each expert's rows end."""
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return order, places, np.cumsum(np.bincount(flat, minlength=experts))


def grouped_linear(x: Array, ends: Array, weight: Array, bias: Array | None, transposed: bool, part: str = "") -> Array:
    """Rows x [..., N, in] by the matrix of their expert; weights of other experts are not read."""
    y = np.empty((*x.shape[:-1], weight.shape[1 + transposed]), x.dtype)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            own = _PARTS[part](weight[expert])
            y[..., start:end, :] = x[..., start:end, :] @ (own if transposed else own.T)
            if bias is not None:
                y[..., start:end, :] += bias[expert]
            start = end
    return y


def expert_linear(x: Array, ids: Array, weight: Array, bias: Array | None, transposed: bool) -> Array:
    """Each row by the matrix of its expert: sorted, multiplied, and put back."""
    order, places, ends = expert_order(ids, len(weight))
    rows = np.broadcast_to(x, (*x.shape[:-2], ids.shape[-1], x.shape[-1]))
    flat = rows.reshape(*rows.shape[:rows.ndim - ids.ndim - 1], ids.size, x.shape[-1])
    y = grouped_linear(flat[..., order, :], ends, weight, bias, transposed)[..., places, :]
    return y.reshape(*rows.shape[:-1], y.shape[-1])


def combine(u: Array, weights: Array) -> Array:
    """The sum of u [*rows, K, D] weighted by [*rows, K]."""
    return np.asarray((weights[..., None, :] @ u)[..., 0, :])
