"""Experts in an explanation, end to end: what their relevance adds up to, where they get none, and whose choice it is.

Mixtures of the zoo, explained by generated code. What is counted of experts is in `test_experts.py`, the formulas in
`test_rules.py`, whole models against the interpreter in `test_models.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dlbc
from dlbc.composite import Composite
from dlbc.ir.parser import parse_graph
from dlbc.passes.record_experts import Mixture, mixtures_of
from dlbc_runtime.experts import Experts
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.target import Target
from tests import zoo
from tests.test_models import PRESETS, captured, compiled

pytestmark = pytest.mark.skipif(not zoo.available("moe_qwen3"), reason="needs transformers")
RULES = (*PRESETS, "dlb-contrastive", "gamma")
ARRAYS = ("ids", "weights", "relevance", "shared")
BY_WEIGHTS = {rule: Composite([("expert_linear", rule)], base="attnlrp") for rule in ("w_square", "flat")}


@functools.lru_cache(maxsize=4)
def explainer_of(name: str, rules: str, backend: str = "torch") -> Explainer:
    return compiled(name).explainer(rules, backend)


def experts_of(explanation: Explanation) -> Experts:
    assert explanation.experts is not None
    return explanation.experts


def assert_same(found: Experts, wanted: Experts, tolerance: float = 1e-5) -> None:
    """The same layers, ids and weights, and relevance to a tolerance of the layer's largest."""
    assert list(found) == list(wanted)
    for place, layer in found.items():
        other = wanted[place]
        np.testing.assert_array_equal(layer.ids, other.ids)
        np.testing.assert_allclose(layer.weights, other.weights, rtol=1e-5, atol=1e-6)
        largest = max(float(np.abs(x).max()) for x in (other.relevance, other.shared) if x is not None)
        for own, its in ((layer.relevance, other.relevance), (layer.shared, other.shared)):
            if own is not None:
                np.testing.assert_allclose(own, its, rtol=0, atol=tolerance * largest)


def mixtures(explainer: Explainer) -> tuple[Mixture, ...]:
    return mixtures_of(parse_graph(explainer.ir("paired")))


# --- sums ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rules", ["attnlrp", "cp-lrp", "dlb", "dlb-contrastive", "input-x-gradient"])
@pytest.mark.parametrize("name", ["moe_qwen2", "moe_deepseek_v3", "moe_gpt_oss", "moe_jetmoe"])
def test_columns_add_up_to_what_enters_the_experts(name: str, rules: str) -> None:
    """Token by token: routed experts to the relevance of their weighted sum, and with the shared expert to that of the
    sum with it. Nothing changes where only the explained position is computed."""
    built = compiled(name)
    whole = built.explainer(rules, keep="all", all_positions=True)
    found = whole(**built.case.kwargs, target=1)
    layers = experts_of(found).layers
    assert len(layers) == len(mixtures(whole)) == len(whole.experts)
    for layer, mixture in zip(layers, mixtures(whole), strict=True):
        routed = found.nodes[mixture.combine].sum(-1)
        scale = max(np.abs(found.nodes[name]).sum(-1).max() for name in (mixture.combine, mixture.total) if name)
        np.testing.assert_allclose(layer.relevance.sum(-1), routed, rtol=0, atol=2e-5 * scale)
        assert (layer.shared is not None) == bool(mixture.shared) == layer.spec.shared
        if layer.shared is not None:
            assert np.abs(layer.shared).max() > 0
            total = found.nodes[mixture.total].sum(-1)
            np.testing.assert_allclose(layer.by_token, total, rtol=0, atol=2e-5 * scale)
            np.testing.assert_allclose(layer.shared, found.nodes[mixture.shared].sum(-1), rtol=0, atol=2e-5 * scale)
    assert_same(experts_of(explainer_of(name, rules)(**built.case.kwargs, target=1)), experts_of(found), 1e-4)


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_experts_of_all_positions_are_known(backend: str) -> None:
    """Of the last layer, of which only the explained position is computed, too; relevance is at that one only."""
    built = compiled("moe_mixtral")
    explainer = explainer_of("moe_mixtral", "cp-lrp", backend)
    assert explainer.manifest.positions
    found = experts_of(explainer(**built.case.kwargs, target=1))
    with chosen(built.case.model) as routed:
        built.case.model(**built.case.kwargs)
    for layer, (ids, weights) in zip(found.layers, routed, strict=True):
        np.testing.assert_array_equal(layer.ids, ids)
        np.testing.assert_allclose(layer.weights, weights, rtol=1e-5)
    first, last = found.layers
    assert np.abs(last.relevance[:, -1]).min() > 0 and not last.relevance[:, :-1].any()
    assert np.abs(first.relevance).min() > 0
    early = experts_of(explainer(**built.case.kwargs, target=Target.token(1, position=2)))
    for layer, other in zip(early.layers, found.layers, strict=True):  # what comes behind need not be computed
        np.testing.assert_array_equal(layer.ids[:, :3], other.ids[:, :3])
        assert ((layer.ids == other.ids) | (layer.ids == -1)).all() and not layer.relevance[:, 3:].any()


@contextmanager
def chosen(model: nn.Module) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Ids and weights of each of the model's routers, as [B,T,k], as it runs on rows of 7 tokens."""
    found: list[tuple[np.ndarray, np.ndarray]] = []

    def record(module: nn.Module, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        weights, ids = (x.detach().reshape(-1, 7, x.shape[-1]).numpy() for x in output[1:])
        found.append((ids, weights))

    hooks = [m.register_forward_hook(record) for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    assert hooks
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


# --- nothing --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize("rules", ["attnlrp", "dlb", "dlb-contrastive", "gamma", "w_square", "flat"])
def test_experts_without_tokens_get_exactly_nothing(rules: str, backend: str) -> None:
    """Their weights are not read: senseless ones change neither output nor relevance, bit by bit."""
    built = compiled("moe_qwen3")
    explainer = built.explainer(BY_WEIGHTS.get(rules, rules), backend)
    ids = built.case.kwargs["input_ids"][:1, :1]  # to two of four
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = explainer(**inputs)
    saved = {name: weight.clone() for name, weight in built.case.model.state_dict().items()}
    spoilt = 0
    try:
        with torch.no_grad():
            for layer in experts_of(before).layers:
                own = built.case.model.get_submodule(layer.place)
                for expert in np.flatnonzero(layer.counts == 0):
                    own.gate_up_proj[expert] = own.down_proj[expert] = 1e30
                    assert layer.totals[expert] == 0.0
                    spoilt += 1
        after = explainer(**inputs)
    finally:
        built.case.model.load_state_dict(saved)
    assert spoilt == 4
    np.testing.assert_array_equal(after.outputs["logits"], before.outputs["logits"])
    np.testing.assert_array_equal(after.relevance["input_ids"], before.relevance["input_ids"])
    assert_same(experts_of(after), experts_of(before), 0.0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rules", ["attnlrp", "cp-lrp", "dlb"])
@pytest.mark.parametrize("name", ["moe_qwen2", "moe_jetmoe"])
def test_masked_tokens_route_nowhere(name: str, rules: str, side: str) -> None:
    inputs = zoo.padded((7, 4), side)
    hidden = inputs["attention_mask"].numpy() == 0
    found = experts_of(explainer_of(name, rules)(**inputs, target=1))
    for layer in found.layers:
        assert (layer.ids[hidden] == -1).all() and (layer.ids[~hidden] >= 0).all()
        assert not layer.weights[hidden].any() and not layer.relevance[hidden].any()
        assert not layer.arrays["relevance"][hidden].any()  # none arrives there in the first place
        assert layer.shared is None or not layer.arrays["shared"][hidden].any()


# --- the same however it is done ------------------------------------------------------------------------

_QWEN3 = {**zoo._DECODER, "head_dim": 8, "intermediate_size": 24}


@functools.lru_cache(maxsize=1)
def one_expert() -> tuple[nn.Module, nn.Module]:
    """A Qwen3-MoE with one expert in each layer, and the dense Qwen3 of the same weights."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        config = transformers.Qwen3MoeConfig(**_QWEN3, moe_intermediate_size=24, num_experts=1, num_experts_per_tok=1,
                                             norm_topk_prob=False)
        mixture = zoo.randomise(transformers.Qwen3MoeForCausalLM(config))
        dense = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_QWEN3)).eval()
    weights = {}
    for name, weight in mixture.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for part, own in zip(("gate_proj", "up_proj"), weight[0].chunk(2), strict=True):
                weights[name.replace("experts.gate_up_proj", f"{part}.weight")] = own
        elif name.endswith("experts.down_proj"):
            weights[name.replace("experts.down_proj", "down_proj.weight")] = weight[0]
        elif "mlp.gate." not in name:
            weights[name] = weight
    dense.load_state_dict(weights)
    return mixture, dense


@functools.lru_cache(maxsize=2)
def one_expert_captured(dense: bool) -> Any:
    return captured(zoo.Case(one_expert()[dense], kwargs=zoo.padded((7, 5))))


@pytest.mark.parametrize("rules", (*RULES, "attnlrp-conserving", "auto"))
def test_one_expert_explains_as_the_dense_model(rules: str) -> None:
    """A mixture of one expert is that expert: the router has nothing to decide and gets nothing."""
    mixture, dense = one_expert_captured(False), one_expert_captured(True)
    kwargs = mixture.case.kwargs
    found, wanted = (built.explainer(rules)(**kwargs, target=1) for built in (mixture, dense))
    np.testing.assert_allclose(found.outputs["logits"], wanted.outputs["logits"], rtol=0, atol=1e-5)
    scale = np.abs(wanted.relevance["input_ids"]).max()
    np.testing.assert_allclose(found.relevance["input_ids"], wanted.relevance["input_ids"], rtol=0, atol=1e-5 * scale)
    assert wanted.experts is None
    for layer in experts_of(found).layers:
        assert (layer.weights[kwargs["attention_mask"].numpy() == 1] == 1).all()


@pytest.mark.parametrize("rules", PRESETS)
def test_several_targets_are_as_many_single_ones(rules: str) -> None:
    explainer, kwargs = explainer_of("moe_qwen2", rules), compiled("moe_qwen2").case.kwargs
    targets = [1, Target.token(5, position=2), Target.index(7)]
    together = experts_of(explainer(**kwargs, target=targets))
    assert together.many_targets
    for number, target in enumerate(targets):
        single = experts_of(explainer(**kwargs, target=target))
        for place, layer in together.items():
            assert layer.relevance.shape == (3, *single[place].relevance.shape)
            assert layer.shared is not None and single[place].shared is not None
            computed = single[place].ids >= 0  # alone, what is behind the explained position need not be
            np.testing.assert_array_equal(layer.ids[computed], single[place].ids[computed])
            assert not layer.relevance[number][~computed].any()
            scale = max(np.abs(single[place].relevance).max(), np.abs(single[place].shared).max())
            np.testing.assert_allclose(layer.relevance[number], single[place].relevance, rtol=0, atol=1e-4 * scale)
            np.testing.assert_allclose(layer.shared[number], single[place].shared, rtol=0, atol=1e-4 * scale)


def test_parts_of_a_batch_are_joined() -> None:
    """A batch explained in parts, for want of memory, has the experts of the whole."""
    explainer = explainer_of("moe_qwen2", "dlb")
    inputs = zoo.padded((9, 4, 7, 6))
    whole, least = explainer(**inputs, target=1), explainer.memory(**{k: v[:1] for k, v in inputs.items()})
    parts = explainer(**inputs, target=1, memory_budget=int(1.5 * least.peak.total))
    np.testing.assert_allclose(parts.relevance["input_ids"], whole.relevance["input_ids"], rtol=1e-3, atol=1e-4)
    assert_same(experts_of(parts), experts_of(whole))


def test_a_saved_explainer_finds_the_same_experts(tmp_path: Path) -> None:
    explainer, kwargs = explainer_of("moe_qwen2", "dlb"), compiled("moe_qwen2").case.kwargs
    explainer.save(tmp_path / "mixture.dlbc", weights=True)
    loaded = dlbc.load(tmp_path / "mixture.dlbc")
    assert loaded.experts == explainer.experts
    assert_same(experts_of(loaded(**kwargs, target=1)), experts_of(explainer(**kwargs, target=1)))


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_equal_scores_are_chosen_between_as_the_model_does(backend: str) -> None:
    """Routers whose experts all have the same score: torch's order of equal ones decides, in all."""
    case = zoo.CASES["moe_mixtral"]()
    with torch.no_grad():
        for name, weight in case.model.named_parameters():
            if name.endswith("gate.weight"):
                weight[:] = weight[:1]
    found = captured(case).explainer("cp-lrp", backend, all_positions=True)(**case.kwargs, target=1)
    with chosen(case.model) as routed, torch.no_grad():
        logits = case.model(**case.kwargs).logits
    for layer, (ids, _) in zip(experts_of(found).layers, routed, strict=True):
        np.testing.assert_array_equal(layer.ids, ids)
    np.testing.assert_allclose(found.outputs["logits"], logits.numpy(), rtol=0, atol=1e-5)


def test_a_single_output_of_another_name_is_explained_at_one_position() -> None:
    """What is returned of the experts counts as no output."""
    case = zoo.CASES["moe_qwen3"]()

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = case.model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    explainer = captured(zoo.Case(Plain().eval(), kwargs=case.kwargs)).explainer("cp-lrp")
    assert explainer.manifest.positions and explainer.manifest.outputs.names != ("logits",)
    found, wanted = (experts_of(own(**case.kwargs, target=1))
                     for own in (explainer, explainer_of("moe_qwen3", "cp-lrp")))
    for layer, other in zip(found.layers, wanted.layers, strict=True):
        assert layer.place == f"model.{other.place}"
        np.testing.assert_allclose(layer.relevance, other.relevance, rtol=1e-3, atol=1e-4)
