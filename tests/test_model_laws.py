"""The laws of docs/rules.md on whole models: masks, causality, batches, seeds, the ledger."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

import dlbc.compiler
from dlbc.passes.sink_targets import SinkTargets
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.target import Target
from tests import zoo
from tests.test_models import NO_RULE, PRESETS, TORCH_ONLY, compiled, distance

CLASSIFIERS = ["bert", "bert_eager", "roberta", "distilbert", "electra", "albert", "xlnet"]
DECODERS = ["gpt2", "llama", "llama_eager", "qwen2", "qwen3", "mistral", "mistral_eager", "gemma2", "gemma3",
            *zoo.MIXTURES]
IMAGES = ["lenet", "resnet18_small", "densenet_small", "mobilenet_like", "vit"]
READS_LAST = ["xlnet"]
"""Its head reads the last place, so it is padded on the left only."""
SHIFTS = ["xlnet", *(name for name in DECODERS if name != "gpt2")]
"""Positions are relative and the head reads no first place: a shift to the right changes nothing for them."""
LEDGER = ["mlp", "convolutions", "unused_input", *IMAGES, "bert", "xlnet", "gpt2", "llama", "gemma2",
          "two_outputs_dict", *zoo.MIXTURES]


def explainer_of(name: str, rules: str, backend: str = "torch") -> Explainer:
    return compiled(name).shared(rules, backend)


def padded(ids: torch.Tensor, left: int, right: int, token: int) -> dict[str, torch.Tensor]:
    """A batch of one row with padding on either side, and its mask."""
    filler = torch.full((1, left), token), torch.full((1, right), token)
    mask = torch.cat([torch.zeros(1, left), torch.ones(1, ids.shape[1]), torch.zeros(1, right)], 1).long()
    return {"input_ids": torch.cat([filler[0], ids, filler[1]], 1), "attention_mask": mask}


def row(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def ids_of(name: str) -> torch.Tensor:
    return compiled(name).case.kwargs["input_ids"][:1, -5:]


def close(found: np.ndarray, wanted: np.ndarray, rules: str) -> bool:
    return distance(found, wanted) <= (1e-5 if rules.startswith("dlb") else 1e-4)


@pytest.mark.parametrize("rules", ["attnlrp", "cp-lrp", "dlb"])
@pytest.mark.parametrize("name", [*CLASSIFIERS, *DECODERS])
def test_padding_gets_exactly_nothing(name: str, rules: str) -> None:
    """Law 4: a padded row explains as the row alone, on either side; padding has exactly 0."""
    explainer, ids = explainer_of(name, rules), ids_of(name)
    alone = explainer(**row(ids), target=Target.index(1)).relevance["input_ids"][0]
    sides = [*([(0, 3)] if name not in READS_LAST else []), *([(3, 0)] if name in SHIFTS else [])]
    for left, right in sides:
        token = compiled(name).case.model.config.pad_token_id or 0
        found = explainer(**padded(ids, left, right, token), target=Target.index(1)).relevance["input_ids"][0]
        inside = found[left:left + ids.shape[1]]
        assert (np.delete(found, range(left, left + ids.shape[1])) == 0.0).all()
        assert close(inside, alone, rules), distance(inside, alone)




@pytest.mark.parametrize("rules", ["attnlrp", "dlb", "input-x-gradient"])
@pytest.mark.parametrize("name", DECODERS)
def test_the_future_gets_exactly_nothing(name: str, rules: str) -> None:
    """Law 4: tokens after the explained position have exactly 0, and change nothing."""
    explainer, ids = explainer_of(name, rules), ids_of(name)
    whole = explainer(**row(ids), target=Target.token(1, position=2)).relevance["input_ids"][0]
    assert (whole[3:] == 0.0).all()
    prefix = explainer(**row(ids[:, :3]), target=Target.token(1)).relevance["input_ids"][0]
    assert close(whole[:3], prefix, rules)


@pytest.mark.parametrize("rules", PRESETS)
@pytest.mark.parametrize("name", ["mlp", *IMAGES, "bert", "llama", "moe_qwen2", "moe_jetmoe"])
def test_batch_rows_explain_as_they_do_alone(name: str, rules: str) -> None:
    """Law 5."""
    explainer, case = explainer_of(name, rules), compiled(name).case
    whole = explainer(*case.args, **case.kwargs)

    def first(x: Any) -> Any:
        return x[:1] if isinstance(x, torch.Tensor) else x

    alone = explainer(*map(first, case.args), **{k: first(v) for k, v in case.kwargs.items()},
                      target=Target.index(whole.target[0].index))
    for key, value in alone.relevance.items():
        assert close(whole.relevance[key][:1], value, rules)


@pytest.mark.parametrize("rules", PRESETS)
@pytest.mark.parametrize("name", ["mlp", "resnet18_small", "bert", "llama", "xlnet", "moe_qwen2", "moe_gpt_oss"])
def test_many_targets_are_as_many_runs(name: str, rules: str) -> None:
    """Law 2: S seeds at once are S runs, and the explanation of a difference is the difference of explanations."""
    explainer, case = explainer_of(name, rules), compiled(name).case
    together = explainer(*case.args, target=[0, 1, Target.difference(1, 0)], **case.kwargs)
    for key, value in together.relevance.items():
        for number, target in enumerate((0, 1)):
            single = explainer(*case.args, target=target, **case.kwargs).relevance[key]
            assert close(value[number], single, rules)
        first, second, between = value
        if explainer.manifest.seed == "signed":  # each is relative to the size of the number that it explains
            rows = together.outputs[explainer.manifest.output].reshape(first.shape[0], -1)[:, :2]
            shape = (-1, *[1] * (first.ndim - 1))
            first, second = first * np.abs(rows[:, 0]).reshape(shape), second * np.abs(rows[:, 1]).reshape(shape)
            between = between * np.abs(rows[:, 1] - rows[:, 0]).reshape(shape)
        scale = max(np.linalg.norm(first), np.linalg.norm(second))
        assert np.linalg.norm(between - (second - first)) <= 1e-4 * scale


def test_positions_of_many_targets_share_one_forward() -> None:
    explainer, ids = explainer_of("llama", "attnlrp"), ids_of("llama")
    targets = [Target.predicted(position=p) for p in range(5)]
    together = explainer(**row(ids), target=targets).relevance["input_ids"]
    assert together.shape == (5, 1, 5)
    for number, target in enumerate(targets):
        single = explainer(**row(ids), target=target).relevance["input_ids"]
        assert distance(together[number], single) <= 1e-4
        assert (together[number, 0, number + 1:] == 0.0).all()


@pytest.mark.parametrize("rules", PRESETS)
@pytest.mark.parametrize("name", LEDGER)
def test_the_ledger_closes(name: str, rules: str) -> None:
    """Law 7: for each op and in sum; only rules that say so may lose relevance."""
    case = compiled(name).case
    ledger = explainer_of(name, rules)(*case.args, **case.kwargs).conservation()
    assert ledger.closes(1e-4), ledger.leaks()
    if rules in ("cp-lrp", "epsilon", "dlb"):
        assert abs(ledger.absorbed.get("rule", 0.0)) <= 1e-4 * ledger.size


@pytest.mark.parametrize("name", ["mlp", "resnet18_small", "bert", "llama", "moe_qwen3"])
@pytest.mark.parametrize("rules", PRESETS)
def test_zeros_stay_finite(name: str, rules: str) -> None:
    """Law 1: inputs of zeros, and a model whose weights are all zero."""
    case = compiled(name).case
    saved = {k: v.clone() for k, v in case.model.state_dict().items()}
    explainer = explainer_of(name, rules)
    try:
        zeros = [torch.zeros_like(a) for a in case.args], {k: v * 0 if k != "attention_mask" else v for k, v in
                                                           case.kwargs.items()}
        found = [explainer(*zeros[0], **zeros[1])]
        with torch.no_grad():
            for value in case.model.state_dict().values():
                value.zero_()
        found.append(explainer(*case.args, **case.kwargs))
    finally:
        case.model.load_state_dict(saved)
    for explanation in found:
        assert all(np.isfinite(r).all() for r in explanation.relevance.values())


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_changed_weights_are_seen(backend: str) -> None:
    """An explainer reads the model's weights: values changed in place change what it says, folded ones too."""
    built = compiled("resnet18_small")
    explainer = built.explainer("epsilon", backend)
    before = explainer(*built.case.args)
    norm = next(m for m in built.case.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    old = norm.weight.detach().clone()
    try:
        with torch.no_grad():
            norm.weight.mul_(1.5)
        after = explainer(*built.case.args)
        with torch.no_grad():
            wanted = built.case.model(*built.case.args).numpy()
        np.testing.assert_allclose(after.outputs["output"], wanted, rtol=1e-4, atol=1e-5)
        assert not np.allclose(before.outputs["output"], wanted)
    finally:
        with torch.no_grad():
            norm.weight.copy_(old)


@pytest.mark.parametrize("keep", ["modules", "all", "layer4*"])
def test_kept_places_do_not_change_the_rest(keep: str) -> None:
    built = compiled("resnet18_small")
    explainer = built.explainer("attnlrp")
    plain, kept = explainer(*built.case.args), explainer(*built.case.args, keep=keep)
    np.testing.assert_array_equal(plain.relevance["x"], kept.relevance["x"])
    assert kept.nodes
    assert set(kept.nodes) == set(kept.activations)
    for place, relevance in kept.nodes.items():
        assert relevance.shape == kept.activations[place].shape


@pytest.mark.parametrize("name", sorted(set(zoo.STRUCTURE) - set(NO_RULE) - TORCH_ONLY)[:40])
def test_backends_agree(name: str) -> None:
    case = compiled(name).case
    seed = Target.tensor(np.float32(1.0))
    torch_found = explainer_of(name, "dlb")(*case.args, target=seed, **case.kwargs)
    numpy_found = explainer_of(name, "dlb", "numpy")(*case.args, target=seed, **case.kwargs)
    for key, value in torch_found.relevance.items():
        assert distance(numpy_found.relevance[key], value) <= 1e-5


@pytest.mark.parametrize("rules", PRESETS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "moe_olmoe"])
def test_sparse_targets_explain_as_dense_seeds_do(name: str, rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeding the chosen rows of the head is seeding the whole output with zeros elsewhere."""
    built = compiled(name)
    dense = built.explainer(rules, dense=True)
    monkeypatch.setattr(dlbc.compiler, "SinkTargets", functools.partial(SinkTargets, at_least=2))
    targets = [1, Target.difference(2, 3), Target.predicted(position=2), Target.index(1)]
    wanted = dense(*built.case.args, target=targets, **built.case.kwargs).relevance["input_ids"]
    for backend in ("torch", "numpy"):
        sparse = built.explainer(rules, backend)
        assert sparse.manifest.sparse
        assert not dense.manifest.sparse
        found = sparse(*built.case.args, target=targets, **built.case.kwargs)
        assert close(found.relevance["input_ids"], wanted, rules)
        assert found.conservation().closes(1e-4)
