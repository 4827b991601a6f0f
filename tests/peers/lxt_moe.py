"""Qwen3-MoE by lxt's own rule functions: lxt 2.1 has maps for Qwen3, none for its mixture of experts.

Norms, gated layers and attention are patched as lxt does for Qwen3; the mixture by the same functions: the product of
an expert's answer and its weight is shared in halves (AttnLRP), or its weight is a constant (CP-LRP).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor


def patch_map(rules: str) -> dict[Any, Any]:
    """What `lxt.efficient.monkey_patch` takes for transformers' Qwen3-MoE."""
    from lxt.efficient import patches
    from lxt.efficient.rules import divide_gradient, stop_gradient
    from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling

    conserving = rules == "cp-lrp"

    def mixture(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        logits = self.gate(flat)
        weights, chosen = torch.topk(torch.softmax(logits, dim=-1), self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / stop_gradient(weights.sum(-1, keepdim=True))
        total = torch.zeros_like(flat)
        for expert, layer in enumerate(self.experts):
            rows, place = torch.where(chosen == expert)
            weight = weights[rows, place, None]
            said = layer(flat[rows])
            product = said * stop_gradient(weight) if conserving else divide_gradient(said * weight, 2)
            total = total.index_add(0, rows, product)
        return total.view(hidden_states.shape), logits

    gated = patches.cp_gated_mlp_forward if conserving else patches.gated_mlp_forward
    return {
        modeling.Qwen3MoeMLP: partial(patches.patch_method, gated),
        modeling.Qwen3MoeRMSNorm: partial(patches.patch_method, patches.rms_norm_forward),
        modeling.Qwen3MoeSparseMoeBlock: partial(patches.patch_method, mixture),
        modeling: patches.patch_cp_attention if conserving else patches.patch_attention}
