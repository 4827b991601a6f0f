"""`explanation.experts` of real (tiny) mixtures of experts, with a shared expert: Qwen2-MoE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dlbc
from dlbc_runtime.experts import Experts
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.generation import GenerationExplanation
from tests.test_experts import assert_same, of_targets

transformers = pytest.importorskip("transformers")
TARGETS = [dlbc.Target.index(5), dlbc.Target.index(9)]


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, num_experts=6, num_experts_per_tok=2,
            moe_intermediate_size=8, shared_expert_intermediate_size=12, initializer_range=0.3,
            eos_token_id=None)).eval()
    return dlbc.compile(model, batch(), rules="attnlrp")


def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 9, 2, 30, 7, 11], [0, 0, 0, 4, 8, 15], [16, 23, 1, 2, 3, 4]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.fixture(scope="module")
def found(explainer: Explainer) -> Explanation:
    return explainer(**batch(), target=TARGETS)


def close(one: Any, other: Any) -> None:
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * float(np.abs(other).max()))


def experts_of(found: Explanation | GenerationExplanation) -> Experts:
    assert found.experts is not None
    return found.experts


def test_the_columns_are_what_entered_the_module(explainer: Explainer) -> None:
    """Experts and the shared one, added up, have the relevance of what the block gave back, token by token."""
    found = explainer(**batch(), target=5, keep="modules")
    for layer in experts_of(found).layers:
        block = layer.place.removesuffix(".experts")
        node = found.nodes[block].sum(-1, dtype=np.float64)
        assert layer.shared is not None
        close(layer.entering, node.sum())
        if node.shape == layer.by_token.shape:  # above the last attention, only the explained position is computed
            close(layer.by_token, node)


def test_the_weights_are_those_of_the_model(explainer: Explainer, found: Explanation) -> None:
    model: Any = explainer.model
    given = batch()
    with torch.no_grad():
        logits = model(**given, output_router_logits=True).router_logits
    visible = given["attention_mask"].numpy().astype(bool)
    for layer, own in zip(experts_of(found).layers, logits, strict=True):
        likely, ids = own.softmax(-1).topk(2)
        np.testing.assert_array_equal(layer.ids[visible], ids.reshape(3, 6, 2).numpy()[visible])
        close(layer.weights[visible], likely.reshape(3, 6, 2).numpy()[visible])
        assert (layer.ids[~visible] == -1).all() and not layer.weights[~visible].any()
        assert not layer.relevance[:, ~visible].any()


def test_a_target_among_others_is_the_target_alone(explainer: Explainer, found: Explanation) -> None:
    for seed, target in enumerate(TARGETS):
        alone = experts_of(explainer(**batch(), target=target))
        for one, other in zip(alone.layers, experts_of(found).layers, strict=True):
            close(one.relevance, other.relevance[seed])
            close(one.totals, other.totals[seed])


def test_a_row_among_others_is_the_row_alone(explainer: Explainer, found: Explanation) -> None:
    given = batch()
    for row in range(3):
        seen = given["attention_mask"][row] > 0
        alone = experts_of(explainer(**{name: value[row:row + 1, seen] for name, value in given.items()},
                                     target=TARGETS))
        for one, other in zip(alone.layers, experts_of(found).layers, strict=True):
            np.testing.assert_array_equal(one.ids[0], other.ids[row][seen.numpy()])
            close(one.relevance[:, 0], other.relevance[:, row][:, seen.numpy()])


def test_a_call_in_parts_has_the_experts_of_the_whole(explainer: Explainer) -> None:
    many = [dlbc.Target.index(one) for one in range(24)]
    found = explainer(**batch(), target=many)
    budget = explainer.memory(**batch(), target=many).peak.total  # of which a fifth is the allocator's
    divided = explainer.memory(**batch(), target=many, memory_budget=budget)
    assert divided.rows < 3
    parts = explainer(**batch(), target=many, memory_budget=budget)
    for one, other in zip(experts_of(parts).layers, experts_of(found).layers, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        close(one.relevance, other.relevance)
        close(one.shared, other.shared)


def test_what_stands_behind_the_explained_position_has_no_part(explainer: Explainer) -> None:
    given = {name: value[:1] for name, value in batch().items()}
    early = experts_of(explainer(**given, target=dlbc.Target.token(5, position=2)))
    short = experts_of(explainer(**{name: value[:, :3] for name, value in given.items()}, target=5))
    for one, other in zip(early.layers, short.layers, strict=True):
        assert one.rows == (1, 6) and not one.relevance[:, 3:].any() and (one.ids[:, 3:] == -1).all()
        np.testing.assert_array_equal(one.ids[:, :3], other.ids)
        close(one.relevance[:, :3], other.relevance)


def test_rows_of_different_lengths_are_shown_without_padding(explainer: Explainer) -> None:
    found = explainer(input_ids=[[5, 9, 2, 30], [7, 8]], target=5)
    row = experts_of(found).of_row(1)
    assert all(layer.rows == (2,) for layer in row.layers)
    alone = experts_of(explainer(input_ids=torch.tensor([[7, 8]]), attention_mask=torch.ones(1, 2).long(), target=5))
    for one, other in zip(row.layers, alone.layers, strict=True):
        close(one.relevance, other.relevance[0])


def test_a_generation_has_the_experts_of_each_of_its_tokens(explainer: Explainer, tmp_path: Path) -> None:
    """Those of a call that explains that token, whatever group of tokens it shared a forward pass with."""
    ids = batch()["input_ids"][:1]
    made = explainer.sampler().generate(ids[0], max_new_tokens=4)
    assert isinstance(made, GenerationExplanation)
    experts = experts_of(made)
    assert experts.seeds == 4 and experts.rows == 1 and [one.index for one in experts.target] == made.new_ids.tolist()
    for row, position in enumerate(made.positions().tolist()):
        before = torch.from_numpy(made.ids[None, :position])
        alone = experts_of(explainer(input_ids=before, attention_mask=torch.ones_like(before),
                                     target=int(made.ids[position])))
        for one, other in zip(experts.layers, alone.layers, strict=True):
            np.testing.assert_array_equal(one.ids[:, :position], other.ids)
            close(one.relevance[row, :, :position], other.relevance)
            assert not one.relevance[row, :, position:].any()
    # Asked for one by one, in another order and again from a file.
    some = explainer.sampler().explain(ids[0], made.new_ids, explain_tokens=[3, 1])
    assert isinstance(some, GenerationExplanation)
    for one, other in zip(experts_of(some).layers, experts.of_targets([1, 3]).layers, strict=True):
        close(one.relevance, other.relevance)
    for suffix in ("json", "safetensors"):
        back = GenerationExplanation.load(made.save(tmp_path / f"made.{suffix}"))
        assert_same(experts_of(back), experts)
        assert list(experts_of(back).target) == list(experts.target)
    assert made.words().experts is None
    totals = experts.summed()
    for one, other in zip(totals.layers, experts.layers, strict=True):
        close(one.totals, other.totals.sum(0))
    assert_same(of_targets(experts, slice(1, 3)), experts.of_targets([1, 2]))


def test_what_the_explainer_knows_of_its_experts_before_any_call(explainer: Explainer) -> None:
    specs, manifest = explainer.experts, explainer.manifest
    assert (manifest.batch, manifest.causal) == ("B", "T")  # rows are explained apart, and prefixes as such
    assert [(one.experts, one.k, one.shared) for one in specs] == [(6, 2, True), (6, 2, True)]
    assert all(one.place.startswith("model.layers.") for one in specs)
