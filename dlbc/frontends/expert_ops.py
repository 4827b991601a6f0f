"""Linear maps of experts as operators of torch, `dlbc::grouped_linear`, `dlbc::expert_linear` and `dlbc::combine`, so
that captured programs hold one node for each.

They mean what the catalogue's ops of these names do (dlbc/ir/ops.py). Here they are computed without copies of weights,
for comparing a captured program with its model; they have no gradients. `dlbc::rows` marks what stands for the rows
of one expert (`expert_rows`): a program whose results depend on it is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

_LIBRARY: Any = torch.library.Library("dlbc", "FRAGMENT")  # type: ignore[no-untyped-call]
_check = cast("Callable[..., None]", torch._check)


def _grouped(x: Tensor, counts: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Rows [N, in] by the weight of their expert, counts[e] rows for each expert e in turn: [N, out]."""
    pieces = torch.split(x, [int(n) for n in counts.tolist()])
    return torch.cat([F.linear(piece, weight[e].T if transposed else weight[e], None if bias is None else bias[e])
                      for e, piece in enumerate(pieces)])


def _grouped_shape(x: Tensor, counts: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    _check(counts.shape == weight.shape[:1], lambda: "there is not one count for each expert")
    _check(x.shape[1] == weight.shape[1 if transposed else 2], lambda: "the rows do not fit the experts' weights")
    return x.new_empty((x.shape[0], weight.shape[2 if transposed else 1]))


def _by_expert(x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Rows [*rows, K or 1, in] by the weight of the expert that ids [*rows, K] name: [*rows, K, out]."""
    x = x.expand(*ids.shape, x.shape[-1])
    y = x.new_empty((*ids.shape, weight.shape[1]))
    for e in torch.unique(ids).tolist():
        y[ids == e] = F.linear(x[ids == e], weight[e], None if bias is None else bias[e])
    return y


def _by_expert_shape(x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(weight.ndim == 3 and x.shape[-1] == weight.shape[2], lambda: "the rows do not fit the experts' weights")
    _check(x.ndim == ids.ndim + 1, lambda: "x [*rows, K or 1, in] and ids [*rows, K] do not fit")
    return x.new_empty((*ids.shape, weight.shape[1]))


def _combined(u: Tensor, weights: Tensor) -> Tensor:
    return (u * weights.unsqueeze(-1)).sum(-2)


def _combined_shape(u: Tensor, weights: Tensor) -> Tensor:
    _check(u.ndim == weights.ndim + 1, lambda: "u [*rows, K, D] and weights [*rows, K] do not fit")
    return u.new_empty((*u.shape[:-2], u.shape[-1]))


for _name, _schema, _compute, _shape in (
        ("rows", "(Tensor x) -> Tensor", torch.clone, torch.empty_like),  # all rows, in place of one expert's
        ("grouped_linear", "(Tensor x, Tensor counts, Tensor weight, Tensor? bias, bool transposed) -> Tensor",
         _grouped, _grouped_shape),
        ("expert_linear", "(Tensor x, Tensor ids, Tensor weight, Tensor? bias) -> Tensor",
         _by_expert, _by_expert_shape),
        ("combine", "(Tensor u, Tensor weights) -> Tensor", _combined, _combined_shape)):
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dlbc::{_name}", _shape, lib=_LIBRARY)
