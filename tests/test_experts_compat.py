"""`dlbc.compat.MoEBacktrace`, and what `run_task` says of experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import dlbc
from dlbc.compat import MoEBacktrace
from dlbc.compat.moe import MODEL_TYPES, Backtrace
from dlbc.errors import InputError
from dlbc_runtime.generation import GenerationExplanation

transformers = pytest.importorskip("transformers")
COMMON = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
PLACES = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def built(experts: bool = True) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
            **COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, initializer_range=0.3)) if experts
            else transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))).eval()


@pytest.fixture(scope="module")
def backtrace() -> Backtrace:
    return MoEBacktrace(built(), model_type="qwen3_moe", device="cpu")


def ids() -> dict[str, torch.Tensor]:
    given = torch.tensor([[5, 9, 2, 30, 7]])
    return {"input_ids": given, "attention_mask": torch.ones_like(given)}


def test_evaluation_leaves_the_relevance_of_every_expert(backtrace: Backtrace) -> None:
    backtrace.predict(**ids())
    assert backtrace.all_layer_expert_relevance == {}
    backtrace.evaluation(multiplier=50.0)
    found = backtrace.all_layer_expert_relevance
    assert list(found) == PLACES and all(one.shape == (4,) for one in found.values())
    plain = dlbc.compile(built(), ids(), rules="dlb")(multiplier=50.0, **ids())
    assert plain.experts is not None
    for place, totals in found.items():
        np.testing.assert_allclose(totals, plain.experts[place].totals, rtol=1e-5, atol=1e-6)
        assert not totals[plain.experts[place].counts == 0].any()


def test_run_task_leaves_it_as_well_and_has_it_in_its_result(backtrace: Backtrace) -> None:
    result = backtrace.run_task("generation", inputs=ids(), max_new_tokens=3)
    (one,) = result.explanations
    assert isinstance(one, GenerationExplanation) and one.experts is not None
    assert list(backtrace.all_layer_expert_relevance) == PLACES
    for place, totals in result["all_layer_expert_relevance"].items():
        np.testing.assert_array_equal(totals, backtrace.all_layer_expert_relevance[place])
        np.testing.assert_allclose(totals, one.experts[place].totals.sum(0), rtol=1e-6)


def test_several_sequences_are_added_up(backtrace: Backtrace) -> None:
    result = backtrace.run_task("generation", inputs={"input_ids": [[5, 9, 2], [30, 7]]}, max_new_tokens=2)
    assert len(result.explanations) == 2
    for place, totals in result["all_layer_expert_relevance"].items():
        parts = [one.experts.all_layer_expert_relevance()[place] for one in result.explanations]
        np.testing.assert_allclose(totals, parts[0] + parts[1])


def test_a_model_without_experts_has_no_such_key_and_no_such_class() -> None:
    result = dlbc.compile(built(experts=False), ids(), rules="dlb").run_task("generation", ids(), max_new_tokens=1)
    assert "all_layer_expert_relevance" not in result and result.all_layer_expert_relevance is None
    with pytest.raises(InputError, match=r"LlamaForCausalLM has no experts(.|\n)*dlbc\.compat\.DLBacktrace"):
        MoEBacktrace(built(experts=False))


def test_a_wrong_model_type_is_refused_before_any_work() -> None:
    with pytest.raises(InputError, match=r"no model type 'switch'(.|\n)*jetmoe, olmoe, qwen3_moe, gpt_oss"):
        MoEBacktrace(built(), model_type="switch")
    with pytest.raises(InputError, match=r"of type 'qwen3_moe', not 'olmoe'(.|\n)*model_type='qwen3_moe'"):
        MoEBacktrace(built(), model_type="olmoe")
    with pytest.raises(InputError, match=r"of type 'llama', not 'olmoe'(.|\n)*leave it out"):
        MoEBacktrace(built(experts=False), model_type="olmoe")
    with pytest.raises(InputError, match="Linear reads no token ids"):
        MoEBacktrace(torch.nn.Linear(2, 2))
    assert {"jetmoe", "olmoe", "qwen3_moe", "gpt_oss"} <= set(MODEL_TYPES)
