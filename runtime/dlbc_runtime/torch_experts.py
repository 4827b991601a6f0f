"""Mixtures of experts in torch: the choice of experts, rows sorted by them, and one product for each expert in use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dlbc_runtime.torch_products import matmul

_PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda w: w, "abs": torch.abs, "positive": torch.relu, "negative": lambda w: torch.relu(-w),
    "square": torch.square}


def route_topk(scores: Tensor, choice: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of choice (scores), as torch.topk orders equal ones; their scores and places."""
    values, ids = torch.topk(scores if choice is None else choice, k, -1)
    return (values if choice is None else torch.gather(scores, -1, ids)), ids


def expert_order(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order that sorts rows by expert, where each row went, and where each expert's rows end."""
    by_expert, order = torch.sort(ids.reshape(-1), stable=True)
    count = torch.arange(len(order), device=ids.device)
    places = torch.empty_like(order)
    places[order] = count
    return order, places, torch.searchsorted(by_expert, torch.arange(experts, device=ids.device), right=True)


def grouped_linear(x: Tensor, ends: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, part: str = ""
                   ) -> Tensor:
    """Rows x [..., N, in] by the matrix of their expert; weights of other experts are not read."""
    if x.is_cuda and not part and x.dtype == weight.dtype and (found := _on_cuda(x, ends, weight, bias, transposed)
                                                               ) is not None:
        return found
    rows = x.reshape(-1, *x.shape[-2:])
    y = x.new_empty((*rows.shape[:2], weight.shape[1 + transposed]))
    if x.is_meta:
        return y.reshape(*x.shape[:-1], y.shape[-1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            own = _PARTS[part](weight[expert].to(x.dtype))
            own = own if transposed else own.t()
            y[:, start:end] = matmul(rows[:, start:end], own)
            if bias is not None:
                y[:, start:end] += bias[expert].to(x.dtype)
            start = end
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _on_cuda(x: Tensor, ends: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor | None:
    """torch's own grouped product, which needs no word from the GPU to the CPU; None where it does not apply."""
    grouped = getattr(torch.nn.functional, "grouped_mm", None)
    if grouped is None or x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (8, 0):
        return None
    own = weight if transposed else weight.transpose(1, 2)
    if any(size * x.element_size() % 16 for size in (*own.shape[1:], x.shape[-1])):
        return None
    offsets = ends.to(torch.int32)
    y = torch.stack([grouped(one, own, offs=offsets) for one in x.reshape(-1, *x.shape[-2:])])
    if bias is not None:
        rows = torch.arange(x.shape[-2], device=x.device)
        y = y + bias[torch.searchsorted(ends, rows, right=True)]
    return y.reshape(*x.shape[:-1], y.shape[-1])


def expert_linear(x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Each row by the matrix of its expert: sorted, multiplied, and put back."""
    order, places, ends = expert_order(ids, len(weight))
    rows = x.expand(*x.shape[:-2], ids.shape[-1], x.shape[-1])
    lead = rows.shape[:rows.ndim - ids.ndim - 1]
    flat = rows.reshape(*lead, ids.numel(), x.shape[-1])
    y = grouped_linear(flat[..., order, :], ends, weight, bias, transposed)[..., places, :]
    return y.reshape(*rows.shape[:-1], y.shape[-1])


def combine(u: Tensor, weights: Tensor) -> Tensor:
    """The sum of u [*rows, K, D] weighted by [*rows, K]."""
    return torch.matmul(weights.unsqueeze(-2), u).squeeze(-2) if u.dtype == weights.dtype else (
        u * weights.unsqueeze(-1)).sum(-2)
