"""Mixtures of experts that nothing here was written for: found by what they compute, not by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dlbc

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "Ernie4_5_Moe": ({"moe_intermediate_size": 24, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
                      "moe_layer_start_index": 0}, True),
    "Glm4Moe": ({"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
                 "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}, True),
    "HunYuanMoEV1": ({"num_experts": 4, "moe_topk": 2, "head_dim": 8}, True),
    "FlexOlmo": ({"num_experts": 4, "num_experts_per_tok": 2}, False),
    "GraniteMoeShared": ({"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24}, True),
}
"""Other options of a tiny model of each, and whether it has a shared expert."""


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    """Outputs are the model's, every layer of experts is found, and no weight is copied out for a token."""
    options, shared = FAMILIES[family]
    if not hasattr(transformers, f"{family}ForCausalLM"):
        pytest.skip(f"this transformers has no {family}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(
            getattr(transformers, f"{family}Config")(**SMALL | options)).eval()
        ids = torch.randint(3, 64, (2, 7))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 3 or not bool(parameter.any()) or not bool(torch.isfinite(parameter).all()):
                    parameter.normal_(0, 0.3)
            logits = model(ids).logits[:, -1]
    explainer = dlbc.compile(model, ids, rules="cp-lrp", cache=False)
    explanation = explainer(ids)
    torch.testing.assert_close(torch.from_numpy(explanation.outputs["logits"][:, -1]), logits, rtol=1e-5, atol=1e-5)
    assert explanation.conservation().closes()
    assert [(spec.experts, spec.k, spec.shared) for spec in explainer.experts] == [(4, 2, shared)] * 2
    assert ".experts.gate_up_proj, " not in "".join(
        line for line in explainer.ir("lowered").splitlines(keepends=True) if "= index(" in line)
