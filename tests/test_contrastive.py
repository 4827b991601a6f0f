"""Contrastive DL-Backtrace: two relevances, of the target and of its rivals, from the rule to the file."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from numpy.typing import NDArray
from torch import nn

import dlbc
from dlbc.composite import Composite, preset
from dlbc.errors import InputError, RuleError
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc.passes.lower import Lower
from dlbc.passes.rules import load_rules
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.seeds import with_rivals
from dlbc_runtime.target import Target
from tests import zoo

sys.path.insert(0, str(Path(__file__).parent))
import dense
from random_graphs import Model, models
from test_laws import IDS, SEEN, assert_close, explain, few, ledger, transformer

Array = NDArray[np.float64]
RULES = "dlb-contrastive"


def streams(model: Model, targets: int = 2, batch: int = 2) -> Array:
    """Two relevances for each target: rows [0, targets) and the rivals' behind them, none negative."""
    return np.abs(model.seeds(2 * targets, batch))


# --- laws --------------------------------------------------------------------------------------------

@few
@given(models())
def test_both_relevances_are_finite_and_never_negative(model: Model) -> None:
    for scale in (1.0, 0.0):
        inputs = {name: scale * x if x.dtype.kind == "f" else x for name, x in model.inputs().items()}
        found = explain(model.graph, RULES, inputs, model.weights, streams(model))[0]
        assert np.isfinite(found).all()
        assert (found >= 0).all()


@few
@given(models())
def test_each_relevance_keeps_its_total(model: Model) -> None:
    """Seed = at the inputs + absorbed, and no op gains or loses: for every row of S, so for either relevance."""
    seeds = streams(model)
    relevance, entries = ledger(model.graph, RULES, model.inputs(), model.weights, seeds)
    total = sum(r.reshape(len(seeds), -1).sum(axis=1) for r in relevance)
    balance: dict[tuple[str, ...], Array] = defaultdict(lambda: np.zeros(len(seeds)))
    for (_, kind, of, side, rule), value in entries:
        assert side in ("seed", "gross", "in", "out", "bias", "constant", "stabiliser")
        if kind == "seed":
            continue
        assert (value >= -1e-12).all(), "an amount of a non-negative relevance is not negative"
        balance[kind, of, rule] += value if side == "in" else -value
        total = total + (value if side not in ("in", "out") else 0)
    given_ = seeds.reshape(len(seeds), -1).sum(axis=1)
    assert np.abs(total - given_).max() <= 1e-9 * given_.max()
    for key, rest in balance.items():
        assert np.abs(rest).max() <= 1e-9 * given_.max(), key


@few
@given(models())
def test_targets_together_are_targets_alone(model: Model) -> None:
    """S holds targets and then their rivals; each pair is a run of its own. And amounts have no unit."""
    seeds = streams(model, 3)
    together = explain(model.graph, RULES, model.inputs(), model.weights, seeds)[0]
    for one in range(3):
        pair = [one, one + 3]
        assert_close(together[pair], explain(model.graph, RULES, model.inputs(), model.weights, seeds[pair])[0], 1e-12)
    assert_close(explain(model.graph, RULES, model.inputs(), model.weights, 3 * seeds)[0], 3 * together, 1e-9)


@few
@given(models())
def test_a_row_is_explained_as_if_alone(model: Model) -> None:
    inputs, seeds = model.inputs(3), streams(model, 1, 3)
    together = explain(model.graph, RULES, inputs, model.weights, seeds)[0]
    for row in (0, 2):
        alone = explain(model.graph, RULES, {n: x[row:row + 1] for n, x in inputs.items()}, model.weights,
                        seeds[:, row:row + 1])[0]
        assert_close(together[:, row:row + 1], alone, 1e-9)


@pytest.mark.parametrize("written_out", [False, True], ids=["fused", "written out"])
def test_padding_and_the_future_get_nothing_of_either(written_out: bool) -> None:
    graph, weights = transformer(written_out=written_out)
    seeds = np.abs(np.random.default_rng(3).normal(size=(2, 2, 3)))
    found = explain(graph, RULES, {"ids": IDS, "attention_mask": SEEN}, weights, seeds)[0]
    assert not found[:, 1, 3:].any()
    alone = explain(graph, RULES, {"ids": IDS[1:, :3], "attention_mask": SEEN[1:, :3]}, weights, seeds[:, 1:])[0]
    assert_close(found[:, 1:, :3], alone, 1e-9)
    graph, weights = transformer(causal=True, place=2)
    assert not explain(graph, RULES, {"ids": IDS, "attention_mask": SEEN | True}, weights, seeds)[0][:, :, 3:].any()


@few
@given(models(most=5))
def test_whole_graphs_equal_the_textbook(model: Model) -> None:
    weights = {name: np.maximum(array, -1e4) for name, array in model.weights.items()}
    found = explain(model.graph, RULES, model.inputs(), weights, streams(model))
    expected = dense.explain(model.graph, preset(RULES), model.inputs(), weights, streams(model))
    assert_close(found[0], expected[0], 1e-8)


def test_it_covers_every_op_that_dlb_covers() -> None:
    ops = {kind for kind, _ in load_rules()}

    def covered(name: str) -> set[str]:
        from dlbc.selectors import GROUPS

        chosen = {(what, rule.name) for what, rule in preset(name).entries}
        return {kind for kind in ops for what, rule in chosen
                if (kind == what or kind in GROUPS.get(str(what), ())) and (kind, rule) in load_rules()}

    assert covered("dlb") <= covered(RULES)


# --- a case with a known answer ----------------------------------------------------------------------

def speakers(hidden: bool) -> nn.Module:
    """Three classes; features 0 and 1 speak for class 0 and against the others, 2 and 3 for class 1, 4 and 5 for 2."""
    weight = torch.full((3, 6), -0.2)
    for number in range(3):
        weight[number, 2 * number:2 * number + 2] = 1.0
    with torch.random.fork_rng():
        last = nn.Linear(6, 3, bias=False)
        model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), last) if hidden else nn.Sequential(last)
    with torch.no_grad():
        last.weight.copy_(weight)
        if hidden:
            model[0].weight.copy_(torch.eye(6))  # type: ignore[union-attr]
    return model.eval()


EVIDENCE = torch.tensor([[1.0, 2.0, 2.0, 2.0, 1.5, 1.5]])
"""Logits (3 - 0.2 * 7, 4 - 0.2 * 6, 3 - 0.2 * 7) = (1.6, 2.8, 1.6): every class has something for it."""


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_the_streams_tell_the_target_from_its_rivals(hidden: bool, backend: str) -> None:
    """R+ lies on what speaks for the target, in proportion; R- on what speaks for the others, by their logits."""
    explainer = dlbc.compile(speakers(hidden), EVIDENCE, rules=RULES, backend=backend, cache=False)
    found = explainer(EVIDENCE, target=0)
    np.testing.assert_allclose(found.positive["input"], [[100 / 3, 200 / 3, 0, 0, 0, 0]], rtol=1e-5)
    one, two = 100 * 2.8 / 4.4, 100 * 1.6 / 4.4
    np.testing.assert_allclose(found.negative["input"], [[0, 0, one / 2, one / 2, two / 2, two / 2]], rtol=1e-5)
    np.testing.assert_allclose(found.relevance["input"], found.positive["input"] - found.negative["input"])
    for target in range(3):
        explanation = explainer(EVIDENCE, target=target)
        own = slice(2 * target, 2 * target + 2)
        others = np.delete(np.arange(6), own)
        assert not explanation.positive["input"][:, others].any() and not explanation.negative["input"][:, own].any()
        assert (explanation.relevance["input"][:, own] > 0).all()
        assert (explanation.relevance["input"][:, others] < 0).all()


def test_the_side_that_lost_gets_the_smaller_relevance() -> None:
    """One hidden number y = 3 a - b that both classes read: for y > 0 the larger relevance goes to a."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -1.0]]))
        model[1].weight.copy_(torch.tensor([[1.0], [0.25]]))
    explainer = dlbc.compile(model, torch.ones(1, 2), rules=RULES, cache=False)
    found = explainer(torch.ones(1, 2), target=[0, 1])  # logits 2 and 0.5; R+ = R- = 100: "otherwise"
    np.testing.assert_allclose(found.positive["input"][:, 0], [[0, 100], [0, 100]])
    np.testing.assert_allclose(found.negative["input"][:, 0], [[100, 0], [100, 0]])


def test_a_bias_takes_its_share_on_its_side_and_makes_no_side() -> None:
    """y = x0 + 2 x1 + bias: with a positive bias of 1 a quarter is absorbed; a negative one has no part in it."""
    for bias, absorbed in ((1.0, 25.0), (-1.0, 0.0)):
        model = nn.Linear(2, 1).eval()
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[1.0, 2.0]]))
            model.bias.fill_(bias)
        found = dlbc.compile(model, torch.ones(1, 2), rules=RULES, cache=False)(torch.ones(1, 2))
        left = 100 - absorbed
        np.testing.assert_allclose(found.positive["input"], [[left / 3, left * 2 / 3]], rtol=1e-6)
        assert found.conservation().absorbed.get("bias", 0.0) == pytest.approx(absorbed)


# --- whole models ------------------------------------------------------------------------------------

def seeds_of(explainer: Explainer, found: Explanation) -> Array:
    """The two relevances that an explanation of predicted classes was seeded with, [2, *output], from scratch."""
    output = np.asarray(found.outputs[explainer.manifest.output], np.float64)
    seeds = np.zeros((2, *output.shape))
    for one in found.target:
        assert one.index is not None
        rivals = np.maximum(output[one.row], 0)
        rivals[one.index] = 0
        seeds[0, one.row, one.index] = 100
        seeds[1, one.row] = 100 * rivals / rivals.sum() if rivals.any() else 0
    return seeds


@pytest.mark.parametrize("name", ["mlp", "lenet", "resnet18_small", "bert", "vit"])
def test_models_equal_the_float64_interpreter(name: str) -> None:
    if not zoo.available(name):
        pytest.skip(f"{name} needs {', '.join(zoo.NEEDS[name])}")
    case = zoo.CASES[name]()
    for backend in ("torch", "numpy"):
        explainer = dlbc.compile(case.model, case.kwargs or case.args, rules=RULES, backend=backend, cache=False)
        found = explainer(*case.args, **case.kwargs)
        graph = Lower().run(parse_graph(explainer.ir("paired")))
        assert graph.relevance is not None
        inputs = dict(zip((p.name for p in graph.forward.params), map(np.asarray, found.inputs.values()), strict=True))
        weights = {n: np.asarray(w.detach() if hasattr(w, "detach") else w) for n, w in explainer.weights.items()}
        ran = interpret(graph, inputs, weights, {graph.relevance.params[0].name: seeds_of(explainer, found)})
        for key, (positive, negative) in zip(explainer.manifest.explained, ran.relevance, strict=True):
            for own, wanted in ((found.positive[key], positive), (found.negative[key], negative)):
                assert np.linalg.norm(own - wanted) <= 1e-4 * np.linalg.norm(wanted) + 1e-6
                assert (own >= 0).all()
        assert found.conservation().closes(1e-4)


@pytest.mark.parametrize("name", ["mlp", "lenet", "bert"])
def test_a_list_of_targets_is_each_of_them(name: str) -> None:
    if not zoo.available(name):
        pytest.skip(f"{name} needs {', '.join(zoo.NEEDS[name])}")
    case = zoo.CASES[name]()
    explainer = dlbc.compile(case.model, case.kwargs or case.args, rules=RULES, cache=False)
    together = explainer(*case.args, target=[0, 1, None], **case.kwargs)
    for number, target in enumerate((0, 1, None)):
        alone = explainer(*case.args, target=target, **case.kwargs)
        for key in alone.relevance:
            for part in ("relevance", "positive", "negative"):
                np.testing.assert_allclose(getattr(together, part)[key][number], getattr(alone, part)[key], atol=1e-4)


def test_a_wide_head_is_seeded_whole() -> None:
    """R- needs every output, so the sparse targets of vocabulary heads are off."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wide = nn.Sequential(nn.Linear(4, 5000)).eval()
    x = torch.ones(2, 4)
    explainer = dlbc.compile(wide, x, rules=RULES, cache=False)
    assert not explainer.manifest.sparse
    found = explainer(x)
    assert found.negative["input"].sum() > 0
    assert found.conservation().closes()
    assert dlbc.compile(wide, x, rules="dlb", cache=False).manifest.sparse


def test_inner_places_show_the_net() -> None:
    explainer = dlbc.compile(speakers(True), EVIDENCE, rules=RULES, cache=False)
    found = explainer(EVIDENCE, target=1, keep="all")
    assert found.nodes
    assert found.nodes[next(iter(found.nodes))].shape == (1, 6)
    assert list(found.positive) == ["input"]


# --- what has no rivals ------------------------------------------------------------------------------

def test_without_positive_rivals_there_is_no_negative_relevance() -> None:
    model = nn.Linear(2, 2, bias=False).eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
    found = dlbc.compile(model, torch.ones(1, 2), rules=RULES, cache=False)(torch.ones(1, 2), target=0)
    assert not found.negative["input"].any()
    assert found.positive["input"].sum() == pytest.approx(100)


def test_rivals_share_what_the_target_has() -> None:
    output = np.array([[3.0, -1.0, 1.0, 2.0], [0.5, 2.0, -1.0, -3.0]])
    seeds = np.zeros((2, 2, 4))
    seeds[0, :, 0], seeds[1, :, 1] = 100, 50
    found = with_rivals(output, seeds, (Target.index(0), Target.index(1)))
    np.testing.assert_allclose(found[2], [[0, 0, 100 / 3, 200 / 3], [0, 100, 0, 0]])
    np.testing.assert_allclose(found[3], [[25, 0, 25 / 3, 50 / 3], [50, 0, 0, 0]])
    regression = with_rivals(output, seeds[:1], (Target.regression(0),))
    assert not regression[1].any()


@pytest.mark.parametrize(("target", "fact"), [
    (Target.difference(0, 1), "negative part"), (Target.tensor(np.array([1.0, -1.0, 0.0])), "negative weights"),
    ([0, Target.difference(1, 0)], "negative part"), (Target.binary(positive=False), "minus that number")])
def test_what_would_be_negative_is_refused(target: object, fact: str) -> None:
    explainer = dlbc.compile(speakers(False), EVIDENCE, rules=RULES, cache=False)
    with pytest.raises(InputError, match=fact):
        explainer(EVIDENCE, target=target)
    with pytest.raises(InputError, match="cannot be negative"):
        explainer(EVIDENCE, multiplier=-1.0)


def test_a_weighting_without_negative_parts_has_rivals_too() -> None:
    explainer = dlbc.compile(speakers(False), EVIDENCE, rules=RULES, cache=False)
    found, wanted = (explainer(EVIDENCE, target=t) for t in (Target.tensor(np.array([1.0, 0, 0])), Target.index(0)))
    for part in ("positive", "negative"):
        np.testing.assert_allclose(getattr(found, part)["input"], getattr(wanted, part)["input"], rtol=1e-6)


# --- composites, files, views ------------------------------------------------------------------------

def test_a_composite_knows_that_it_carries_two() -> None:
    assert preset(RULES).streams == 2
    assert preset("dlb").streams == 1
    assert Composite([("linear", "contrastive")], base="dlb").streams == 2
    with pytest.raises(RuleError, match="low must be below high"):
        Composite([("linear", "contrastive(2, 1)")], base=RULES)


def test_an_ordinary_explanation_has_no_streams() -> None:
    found = dlbc.compile(speakers(False), EVIDENCE, rules="dlb", cache=False)(EVIDENCE)
    assert not found.contrastive
    assert not found.positive and not found.negative


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("target", [0, [0, 2]])
def test_both_streams_survive_a_file(tmp_path: Path, suffix: str, target: object) -> None:
    found = dlbc.compile(speakers(True), EVIDENCE, rules=RULES, cache=False)(EVIDENCE, target=target, scaler=2.0)
    loaded = Explanation.load(found.save(tmp_path / f"e{suffix}"))
    assert loaded.contrastive
    assert loaded.method.scaler == 2.0
    for part in ("relevance", "positive", "negative"):
        np.testing.assert_array_equal(getattr(loaded, part)["input"], getattr(found, part)["input"])


def test_a_saved_explainer_is_still_contrastive(tmp_path: Path) -> None:
    model = speakers(True)
    explainer = dlbc.compile(model, EVIDENCE, rules=RULES, cache=False)
    explainer.save(tmp_path / "e.dlbc")
    again = dlbc.load(tmp_path / "e.dlbc", model)
    assert again.manifest.streams == 2
    found, wanted = again(EVIDENCE, target=0, keep="all"), explainer(EVIDENCE, target=0)
    np.testing.assert_array_equal(found.negative["input"], wanted.negative["input"])


def test_views_say_that_it_is_contrastive(tmp_path: Path) -> None:
    from rich.console import Console

    found = dlbc.compile(speakers(True), EVIDENCE, rules=RULES, cache=False)(EVIDENCE, target=0)
    console = Console(record=True, width=120, file=(tmp_path / "out").open("w"))
    console.print(found)
    assert "the target's relevance less its rivals'" in console.export_text()
    assert "less its rivals" in found.save(tmp_path / "e.html").read_text()
    plain = dlbc.compile(speakers(True), EVIDENCE, rules="dlb", cache=False)(EVIDENCE, target=0)
    assert "rivals" not in plain.save(tmp_path / "p.html").read_text()


def test_the_scaler_multiplies_what_is_found() -> None:
    explainer = dlbc.compile(speakers(True), EVIDENCE, rules=RULES, cache=False)
    found, wanted = explainer(EVIDENCE, target=0, scaler=-0.5), explainer(EVIDENCE, target=0)
    for part in ("relevance", "positive", "negative"):
        np.testing.assert_allclose(getattr(found, part)["input"], -0.5 * getattr(wanted, part)["input"])
    ledger = found.conservation()
    assert ledger.seed == pytest.approx(-0.5 * wanted.conservation().seed)
    assert ledger.closes()
    for wrong in (0, float("nan"), "much"):
        with pytest.raises(InputError, match="scaler"):
            explainer(EVIDENCE, scaler=wrong)
