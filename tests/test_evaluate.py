"""dlbc.evaluate: measured numbers against answers known by hand, and the user's model left as it was."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import dlbc
from dlbc import evaluate
from dlbc.cli import app
from dlbc.errors import InputError
from dlbc.evaluate import fills, items, running, statistics
from dlbc.evaluate.methods import Scene
from dlbc.evaluate.report import Curve, Report, Result

ROOT = Path(__file__).parents[1]


class Reader(nn.Module):
    """A tiny classifier of ids: embeddings through a layer, averaged where there is no padding."""

    def __init__(self, positions: bool = False) -> None:
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.positions = positions

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        hidden = torch.tanh(self.body(self.words(input_ids)))
        if self.positions:
            return SimpleNamespace(logits=self.head(hidden.cumsum(1)))
        weight = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.head((hidden * weight[..., None]).sum(1) / weight.sum(1, keepdim=True))


def seeded(make: Any) -> Any:
    """A model with random weights that are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def drawn(*shape: int) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(5).normal(size=shape), dtype=torch.float32)


@pytest.fixture
def linear() -> nn.Module:
    """y = w x with one output."""
    model = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -1.0, 0.5, 2.0, -2.5, 1.0, 0.25, -0.75]]))
    return model.eval()


@pytest.fixture
def net() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 5)))


@pytest.fixture
def reader() -> nn.Module:
    return seeded(Reader)


IDS = torch.tensor([[1, 7, 8, 9, 10, 2], [1, 3, 4, 5, 6, 2]])


def contributions(model: Any, inputs: torch.Tensor, target: int) -> torch.Tensor:
    return model.weight[target].detach() * inputs


# Known answers


def test_the_area_of_a_linear_model_is_that_of_the_formula(linear: nn.Module) -> None:
    """With contributions c_1 >= ... >= c_n, the area is sum c_i (n - 2 i + 1) / n; reversed, its negative."""
    x = drawn(6, 8)
    report = evaluate.faithfulness(linear, x, {
        "true": contributions, "reversed": lambda *call: -contributions(*call)}, fill="zero", score="output", steps=8)
    c = np.sort((linear.weight.detach() * x).double().numpy(), 1)[:, ::-1]
    area = (c * (8 - 2 * np.arange(1, 9) + 1)).sum(1) / 8
    np.testing.assert_allclose(report.of("true").values, area, rtol=1e-5)
    np.testing.assert_allclose(report.of("reversed").values, -area, rtol=1e-5)
    others = report.of("true", "insertion"), report.of("true", "deletion")
    np.testing.assert_allclose(np.subtract(others[0].values, others[1].values), area, rtol=1e-5)
    assert report.of("true").mean > report.of("random").mean > report.of("reversed").mean


def test_comprehensiveness_sufficiency_and_aopc_of_a_linear_model(linear: nn.Module) -> None:
    """At 1, 5, 10, 20 and 50 % of 8 units: 1, 1, 1, 2 and 4 of them, gone or alone left."""
    x = drawn(1, 8)
    report = evaluate.faithfulness(linear, x, contributions, fill="zero", score="output", steps=8)
    c = np.sort((linear.weight.detach() * x).double().numpy()[0])[::-1]
    top = np.array([c[:k].sum() for k in (1, 1, 1, 2, 4)])
    assert report.of("contributions", "comprehensiveness").mean == pytest.approx(top.mean(), rel=1e-5)
    assert report.of("contributions", "sufficiency").mean == pytest.approx((c.sum() - top).mean(), rel=1e-5)
    assert report.of("contributions", "aopc").mean == pytest.approx(
        np.mean([c[:k].sum() for k in range(9)]), rel=1e-5)


def test_random_order_is_about_zero(linear: nn.Module) -> None:
    report = evaluate.faithfulness(linear, drawn(200, 8), {"true": contributions}, fill="zero", score="output", steps=4)
    random = report.of("random")
    assert abs(random.mean) < 4 * random.standard_error
    assert report.of("true").mean > 10 * random.standard_error


def test_curves_begin_at_the_input_and_end_with_nothing_left(net: nn.Module) -> None:
    """So the ends are the same for every method and order; only the way differs."""
    x = drawn(4, 10)
    report = evaluate.faithfulness(net, x, ["epsilon", "gradient x input"], fill="zero", steps=7)
    with torch.no_grad():
        begin, end = (net(one).softmax(-1) for one in (x, torch.zeros_like(x)))
    target = net(x).argmax(-1, keepdim=True)
    for curve in report.curves:
        ends = np.array(curve.values)[:, [0, -1]]
        np.testing.assert_allclose(ends, torch.cat([begin.gather(1, target), end.gather(1, target)], 1), atol=1e-6)
    assert {(one.method, one.name) for one in report.curves} == {
        (method, name) for method in ("epsilon", "gradient x input", "random") for name in ("morf", "lerf")}


def test_units_of_equal_relevance_are_ordered_alike_for_all(net: nn.Module) -> None:
    """A constant map is not an order by place."""
    flat = {"zeros": lambda *_: np.zeros(10), "ones": lambda *_: np.ones(10)}
    report = evaluate.faithfulness(net, drawn(5, 10), {**flat, "by place": lambda *_: -np.arange(10.0)})
    assert report.of("zeros").values == report.of("ones").values != report.of("by place").values


def test_explainer_preset_and_composite_are_one_method(net: nn.Module) -> None:
    x = drawn(3, 10)
    methods = {"explainer": dlbc.compile(net, x, rules="epsilon"), "preset": "epsilon",
               "composite": dlbc.Composite([], base="epsilon"), "options": evaluate.compiled("epsilon", cache=False)}
    report = evaluate.faithfulness(net, x, methods)
    assert len({report.of(name).values for name in methods}) == 1
    assert report.methods == (*methods, "random")
    assert evaluate.faithfulness(net, x, methods["explainer"], controls=False).methods == ("epsilon",)


def test_gradient_baselines(linear: nn.Module, net: nn.Module) -> None:
    """On a linear model both are exact; on a net, integrated gradients add up to f(x) - f(x0)."""
    x = drawn(2, 8)
    scene = Scene(linear, items.as_items(x), evaluate.Features())
    for method in (evaluate.gradient_x_input(), evaluate.integrated_gradients(4)):
        maps = [method.maps(scene, item, [0])[0] for item in scene.items]
        np.testing.assert_allclose(maps, linear.weight.detach() * x, rtol=1e-5)
    start, point = drawn(1, 10), drawn(1, 10) + 1
    scene = Scene(net, items.as_items(point), evaluate.Features())
    maps = evaluate.integrated_gradients(400, baseline=start).maps(scene, scene.items[0], [3, 1])
    with torch.no_grad():
        np.testing.assert_allclose(maps.sum(1), (net(point) - net(start))[0, [3, 1]], atol=1e-3)


def test_gradients_of_ids_are_of_their_embedding(reader: nn.Module) -> None:
    scene = Scene(reader, items.as_items({"input_ids": IDS}), evaluate.Tokens())
    found = evaluate.gradient_x_input().maps(scene, scene.items[1], [2])[0]
    embedded = reader.words(IDS[1:]).detach().requires_grad_()
    logits = reader.head(torch.tanh(reader.body(embedded)).mean(1))
    slopes, = torch.autograd.grad(logits[0, 2], embedded)
    np.testing.assert_allclose(found, (slopes * embedded).sum(-1)[0].detach(), rtol=1e-5)
    assert all(weight.grad is None for weight in reader.parameters())


# Target sensitivity


def test_a_method_that_ignores_the_target_has_sensitivity_1(net: nn.Module) -> None:
    x = drawn(4, 10)
    report = evaluate.target_sensitivity(net, x, {"blind": lambda model, inputs, target: inputs, "epsilon": "epsilon"},
                                         others=3)
    assert report.of("blind", "sr").values == report.of("blind", "rr").values == (1.0,) * 4
    assert abs(report.of("epsilon", "sr").mean) < 0.8


def test_rr_shows_what_sr_does_not(net: nn.Module) -> None:
    """"The target rather than all others": sr is -1, rr is 1."""
    predicted = net(drawn(1, 10)).argmax().item()
    report = evaluate.target_sensitivity(net, drawn(1, 10), {
        "contrast": lambda model, inputs, target: inputs if target == predicted else -inputs})
    assert report.of("contrast", "sr").mean == pytest.approx(-1)
    assert report.of("contrast", "rr").mean == 1


def test_two_classes_have_no_pair_of_others() -> None:
    model = seeded(lambda: nn.Linear(4, 2))
    report = evaluate.target_sensitivity(model, drawn(2, 4), contributions)
    assert report.of("contributions", "sr").items == 2
    assert report.of("contributions", "rr").items == 0 and math.isnan(report.of("contributions", "rr").mean)
    assert "–" in str(report)


# Randomisation and noise


def test_randomisation_tells_a_map_of_the_model_from_one_of_the_input() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 4)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = evaluate.randomisation(model, drawn(6, 40), {
        "epsilon": "epsilon", "input": lambda model, inputs, target: inputs}, stages=2)
    assert report.of("input").mean == 1
    assert abs(report.of("epsilon").mean) < 0.5
    curve = next(one for one in report.curves if one.method == "epsilon")
    assert curve.at == (0.0, 0.5, 1.0)
    assert [row[0] for row in curve.values] == [1.0] * 6
    assert tuple(row[-1] for row in curve.values) == report.of("epsilon").values
    assert report.settings["layers"] == 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_layers_are_shuffled_from_the_top_each_weight_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(6, 6), nn.Linear(6, 6)  # registered in the wrong order
            self.body.weight = self.head.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    from dlbc.evaluate.randomise import layers_from_the_top, shuffle

    model = seeded(Tied)
    scene = Scene(model, items.as_items(drawn(1, 6)), evaluate.Features())
    layers = layers_from_the_top(model, scene)
    assert layers == [model.head, model.body]
    before, done = model.head.weight.clone(), set[int]()
    shuffle(layers[0], np.random.default_rng(0), done)
    after = model.head.weight.clone()
    assert not torch.equal(before, after) and torch.equal(before.flatten().sort()[0], after.flatten().sort()[0])
    shuffle(layers[1], np.random.default_rng(0), done)
    assert torch.equal(after, model.body.weight)


def test_a_compiled_explainer_cannot_follow_a_randomised_copy(net: nn.Module) -> None:
    x = drawn(2, 10)
    with pytest.raises(InputError, match=r"compiled for the model as it is(.|\n)*Composite"):
        evaluate.randomisation(net, x, {"mine": dlbc.compile(net, x, rules="epsilon")})


def test_input_sensitivity_of_maps_that_are_known(net: nn.Module) -> None:
    """A map that does not move has 0; one that is the input moves by at most the noise's share of its norm."""
    x = drawn(3, 10)
    report = evaluate.input_sensitivity(net, x, {
        "still": lambda *_: np.arange(10.0), "input": lambda model, inputs, target: inputs}, radius=0.1)
    assert report.of("still").values == (0.0,) * 3
    for row, value in zip(x.numpy(), report.of("input").values, strict=True):
        assert 0 < value < 0.1 * row.std() * math.sqrt(10) / np.linalg.norm(row) * 1.2
    with pytest.raises(InputError, match="a token has no small change"):
        evaluate.input_sensitivity(seeded(Reader), {"input_ids": IDS}, "random")


# Statistics


def test_standard_error_and_nan() -> None:
    result = Result("", "m", "area", (1.0, 2.0, 4.0, math.nan))
    assert (result.mean, result.items) == (pytest.approx(7 / 3), 3)
    assert result.standard_error == pytest.approx(np.std([1, 2, 4], ddof=1) / math.sqrt(3))
    assert math.isnan(Result("", "m", "area", (1.0,)).standard_error)


def test_paired_comparison_is_exact_and_symmetrical() -> None:
    """Of the 2^n sign flips of n equal signs, two reach the observed sum."""
    report = Report((Result("", "a", "area", (1.0, 2.5, 3.0, 2.0)), Result("", "b", "area", (0.5, 1.0, 2.0, 1.5))))
    ab, ba = report.paired("a", "b"), report.paired("b", "a")
    assert ab.difference == pytest.approx(0.875) == -ba.difference
    assert ab.p == ba.p == 2 / 2**4
    assert ab.standard_error == ba.standard_error == pytest.approx(np.std([0.5, 1.5, 1, 0.5], ddof=1) / 2)
    many = np.random.default_rng(1).normal(0.2, 1, 40)
    assert statistics.sign_flip_p(many) == statistics.sign_flip_p(-many)
    assert report.paired("a", "a").p == 1
    assert "a - b: area +0.875" in str(ab)


def test_drawn_sign_flips_are_near_the_exact_share() -> None:
    differences = np.random.default_rng(3).normal(0.5, 1, 14)
    exact = statistics.sign_flip_p(differences)
    sums = np.array([differences @ signs for signs in product((1, -1), repeat=14)])
    assert exact == pytest.approx((np.abs(sums) >= abs(differences.sum()) - 1e-9).mean())
    padded = np.append(differences, 0.0)  # one more item, which changes no sum
    assert statistics.sign_flip_p(padded) == pytest.approx(exact, abs=4 * math.sqrt(exact / statistics.FLIPS))


def test_rank_correlation_with_ties() -> None:
    a, b = np.array([1, 2, 2, 3, 5.0]), np.array([2, 1, 4, 4, 3.0])
    ranks = np.array([0, 1.5, 1.5, 3, 4]), np.array([1, 0, 3.5, 3.5, 2])
    assert evaluate.rank_correlation(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert evaluate.rank_correlation(a, -a) == pytest.approx(-1)
    assert evaluate.rank_correlation(np.ones(3), np.ones(3)) == 1
    assert math.isnan(evaluate.rank_correlation(np.ones(3), np.arange(3)))


# Units and fills


def test_deletion_keeps_special_tokens_and_shortens_masks() -> None:
    """Whatever is deleted, the first and last token stay, in their order, and padding stays hidden."""
    seen: list[tuple[list[int], list[int]]] = []

    class Spy(Reader):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
            assert attention_mask is not None
            seen.extend(zip(input_ids.tolist(), attention_mask.tolist(), strict=True))
            return super().forward(input_ids, attention_mask)

    ids, mask = torch.cat([IDS, torch.zeros(2, 2, dtype=torch.long)], 1), torch.tensor([[1] * 6 + [0] * 2] * 2)
    units = evaluate.Tokens(special=(0, 1, 2))
    evaluate.faithfulness(seeded(Spy), {"input_ids": ids, "attention_mask": mask},
                          {"order": lambda *_: np.array([3.0, 1, 4, 2])}, units=units, controls=False)
    lengths = set()
    for row, visible in seen:
        assert (row[0], row[-3:], visible[-3:]) == (1, [2, 0, 0], [1, 0, 0])
        kept = row[1:-3]
        assert kept == [token for token in (7, 8, 9, 10) if token in kept] or \
            kept == [token for token in (3, 4, 5, 6) if token in kept]
        lengths.add(len(kept))
    assert lengths == {0, 1, 2, 3, 4}
    deleted_first = next(row for row, _ in seen if len(row) == 7 and row[1] in (7, 8))
    assert deleted_first in ([1, 7, 8, 10, 2, 0, 0], [1, 7, 9, 10, 2, 0, 0])  # 9 is the most relevant, 8 the least


def test_units_of_tokens_are_free_positions() -> None:
    item = evaluate.Item({"input_ids": IDS[:1], "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}, protected=(2,))
    assert evaluate.Tokens(special=(1,), last=1).members(item).tolist() == [-1, 0, -1, 1, -1, -1]
    assert evaluate.Tokens(first=2).members(item).tolist() == [-1, -1, -1, 0, 1, -1]
    summed = evaluate.Tokens(special=(1,)).summed(item, np.array([9.0, 1, 9, 3, 4, 9]))
    assert summed.tolist() == [1, 3, 4]


def test_units_of_pictures() -> None:
    item = evaluate.Item(torch.zeros(1, 3, 4, 6))
    members = evaluate.Patches(4).members(item)
    assert members.shape == (3, 4, 6)
    assert members[0].tolist() == [[0, 0, 0, 0, 1, 1]] * 4 == members[2].tolist()
    assert evaluate.Patches(4).summed(item, np.ones((3, 4, 6))).tolist() == [48, 24]
    labels = np.array([[0, 0, 1, 1, -1, -1]] * 4)
    assert evaluate.Segments(labels).summed(item, np.ones((3, 4, 6))).tolist() == [24, 24]
    centre = evaluate.centre_first().maps(Scene(nn.Identity(), [item], evaluate.Patches(2)), item, [0])
    assert centre[0].argmax() in (1, 4) and centre[0, 1] == centre[0, 4]


@pytest.mark.parametrize(("name", "expected"), [
    ("zero", torch.zeros_like), ("constant(0.5)", lambda x: torch.full_like(x, 0.5)),
    ("mean", lambda x: x.mean((2, 3), keepdim=True).expand_as(x))])
def test_fills_of_pictures(name: str, expected: Any) -> None:
    picture = drawn(1, 3, 4, 4)
    item, units = evaluate.Item(picture), evaluate.Patches(2)
    members = units.members(item)
    found = list(fills.fill_for(name, units, [item]).copies(units, [item], 0, np.stack([members == 1, members < 0]), 8))
    copies = found[0].args[0]
    gone = torch.as_tensor(members == 1)
    assert torch.equal(copies[0][gone], expected(picture)[0][gone])
    assert torch.equal(copies[0][~gone], picture[0][~gone])
    assert torch.equal(copies[1], picture[0])


def test_blur_keeps_what_is_flat_and_takes_what_is_fine() -> None:
    units = evaluate.Patches(2)
    for sigma in (None, 1.5):
        flat = evaluate.Item(torch.full((1, 2, 8, 9), 3.0))
        blurred = fills._Blur(sigma).content(units, [flat], 0)
        torch.testing.assert_close(blurred, flat.inputs)
    checks = evaluate.Item(((torch.arange(16)[:, None] + torch.arange(16)) % 2).float()[None, None])
    assert (fills._Blur(2).content(units, [checks], 0) - 0.5).abs().max() < 0.02


def test_the_mean_of_features_is_over_the_data(linear: nn.Module) -> None:
    x = drawn(3, 8)
    given = items.as_items(x)
    torch.testing.assert_close(evaluate.mean().content(evaluate.Features(), given, 1), x.mean(0, keepdim=True))
    torch.testing.assert_close(evaluate.mean(of=x.numpy()[:2]).content(evaluate.Features(), given, 1),
                               x[:2].mean(0, keepdim=True))
    with pytest.raises(InputError, match="the mean of one item is itself"):
        evaluate.faithfulness(linear, x[:1], contributions, fill="mean", score="output")
    assert evaluate.faithfulness(linear, x[:1], contributions, score="output").settings["fill"] == "zero"


def test_fills_of_tokens(reader: nn.Module) -> None:
    item, units = items.as_items({"input_ids": IDS[:1]})[0], evaluate.Tokens()
    gone = np.array([[False, True, False, False, True, False]])
    masked = next(iter(evaluate.mask(15).copies(units, [item], 0, gone, 4))).kwargs["input_ids"]
    assert masked.tolist() == [[1, 15, 8, 9, 15, 2]]
    fill = evaluate.replace(20, seed=3)
    replaced = [next(iter(fill.copies(units, [item], 0, gone, 4))).kwargs["input_ids"] for _ in range(2)]
    assert torch.equal(*replaced)
    assert [a == b for a, b in zip(replaced[0][0].tolist(), IDS[0].tolist(), strict=True)] == (~gone[0]).tolist()
    zeroed = next(iter(evaluate.zero.copies(units, [item], 0, gone, 4)))
    found = running.outputs(reader, zeroed.args, zeroed.kwargs, ids=zeroed.ids, kept=zeroed.kept)
    embedded = reader.words(IDS[:1]) * torch.as_tensor(~gone)[..., None]
    np.testing.assert_allclose(found, reader.head(torch.tanh(reader.body(embedded)).mean(1)).detach(), rtol=1e-5)
    torch.testing.assert_close(reader(IDS[:1]), reader.head(torch.tanh(reader.body(reader.words(IDS[:1]))).mean(1)))


@pytest.mark.parametrize("fill", ["delete", "zero", "mask(15)", "replace(20)"])
def test_every_token_fill_finds_the_word_that_decides(fill: str) -> None:
    """Word 9 alone speaks for class 0: the map that says so is better than its reverse."""
    model = seeded(Reader)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.words.weight[9, 0], model.body.weight[0, 0], model.head.weight[0, 0] = 3.0, 2.0, 8.0
    report = evaluate.faithfulness(model, {"input_ids": IDS[:1]}, {
        "knows": lambda *_: (IDS[0] == 9).float(), "reversed": lambda *_: -(IDS[0] == 9).float()},
        targets=[0], units=evaluate.Tokens(special=(1, 2)), fill=fill)
    assert report.of("knows").mean > 0.1 > -0.1 > report.of("reversed").mean
    assert report.of("knows", "sufficiency").mean <= 0.05


def test_a_language_model_is_read_at_the_last_visible_position() -> None:
    """Padding on the right changes nothing; the raw logit is refused."""
    model = seeded(lambda: Reader(positions=True))
    padded = {"input_ids": torch.cat([IDS, torch.zeros(2, 2, dtype=torch.long)], 1),
              "attention_mask": torch.tensor([[1] * 6 + [0] * 2] * 2)}
    reports = [evaluate.faithfulness(model, given, {"order": lambda *_: np.arange(5.0)}, controls=False,
                                     units=evaluate.Tokens(last=1), score="log_probability")
               for given in ({"input_ids": IDS}, padded)]
    np.testing.assert_allclose(reports[0].of("order").values, reports[1].of("order").values, rtol=1e-5)
    for score in ("logit", "output"):
        with pytest.raises(InputError, match=r"raw logit of a language model(.|\n)*centred_logit"):
            evaluate.faithfulness(model, {"input_ids": IDS}, "random", score=score)


def test_deleting_by_name_leaves_the_model_something_to_read(reader: nn.Module) -> None:
    report = evaluate.faithfulness(reader, {"input_ids": IDS}, {"order": lambda *_: np.arange(5.0)})
    assert report.methods == ("order", "random", "latest first")
    assert report.of("order").values == report.of("latest first").values
    with pytest.raises(InputError, match=r"nothing is left for the model to read(.|\n)*Tokens\(last=1\)"):
        evaluate.faithfulness(reader, {"input_ids": IDS}, "random", units=evaluate.Tokens())


def test_scores() -> None:
    from dlbc.evaluate.scores import score_named

    logits = np.array([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    likely = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for given in (logits, likely):  # a model that ends in softmax
        np.testing.assert_allclose(score_named("probability")(given, 2), likely[:, 2])
        np.testing.assert_allclose(score_named("log_probability")(given, 2), np.log(likely[:, 2]))
        np.testing.assert_allclose(score_named("centred_logit")(given, 2), [4 - 7 / 3, 0], atol=1e-12)
    np.testing.assert_allclose(score_named("sigmoid")(logits, 1), 1 / (1 + np.exp(-logits[:, 1])))
    np.testing.assert_allclose(score_named("output")(logits, 1), [2, 0])


def test_the_batch_size_changes_nothing(reader: nn.Module) -> None:
    reports = [evaluate.faithfulness(reader, {"input_ids": IDS}, "gradient x input", batch=batch)
               for batch in (1, 3, 64)]
    for one in reports[1:]:
        np.testing.assert_allclose(one.of("gradient x input").values, reports[0].of("gradient x input").values,
                                   atol=1e-6)


# The user's model


def state_of(model: nn.Module) -> dict[str, Any]:
    hooks = [name for name in vars(nn.Module()) if name.endswith("hooks") or "_hooks_" in name]
    return {
        "weights": {name: (id(value), value.clone(), value._version, value.requires_grad)
                    for name, value in (*model.named_parameters(), *model.named_buffers())},
        "gradients": [weight.grad for weight in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [(name, type(getattr(module, name)), dict(getattr(module, name) or {}))
                  for module in model.modules() for name in hooks],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "torch": torch.get_rng_state(), "numpy": np.random.get_state()[1].copy(),
        "flags": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
                  torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor | np.ndarray):
        return bool((torch.as_tensor(a) == torch.as_tensor(b)).all())
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("training", [False, True])
def test_the_users_model_is_left_as_it_was(training: bool) -> None:
    """Weights, versions, gradients, modes, hooks, attributes and random numbers, after everything there is. A model in
    training mode is measured in eval mode: its dropout does nothing, its batch norm learns nothing."""
    model = seeded(lambda: nn.Sequential(OrderedDict(
        conv=nn.Conv2d(2, 4, 3), norm=nn.BatchNorm2d(4), act=nn.ReLU(), drop=nn.Dropout(0.5), flat=nn.Flatten(),
        head=nn.Linear(4 * 36, 3))))
    calm = [evaluate.faithfulness(model, drawn(2, 2, 8, 8), "gradient x input").of("gradient x input").values]
    model.train(training)
    x = drawn(2, 2, 8, 8)
    before, pixels = state_of(model), x.clone()
    methods = ["gradient x input", "integrated gradients", lambda model, inputs, target: model(inputs)[0, 0] * inputs]
    report = evaluate.measure(model, x, methods)
    evaluate.randomisation(model, x, methods, stages=2)
    evaluate.input_sensitivity(model, x, methods, draws=2)
    assert same(before, state_of(model))
    assert torch.equal(x, pixels)
    assert report.of("gradient x input").values == calm[0]


def test_an_id_model_is_left_as_it_was(reader: nn.Module) -> None:
    before = state_of(reader)
    for fill in ("zero", "delete", "replace(20)"):
        evaluate.measure(reader, {"input_ids": IDS}, ["gradient x input", "integrated gradients"], fill=fill)
    assert same(before, state_of(reader))


def test_compiling_leaves_the_model_as_it_was(net: nn.Module) -> None:
    before = state_of(net)
    evaluate.measure(net, drawn(2, 10), ["epsilon"])
    evaluate.randomisation(net, drawn(2, 10), ["epsilon"])
    assert same(before, state_of(net))


def test_a_model_that_changes_its_input_in_place_does_not_change_the_users(net: nn.Module) -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2)

    x = drawn(2, 4)
    copy = x.clone()
    evaluate.faithfulness(InPlace(), x, {"m": lambda *_: np.arange(4.0)}, fill="zero")
    assert torch.equal(x, copy)


# Bad inputs


class Wrong:
    """Calls that are refused, and what is said."""

    net = seeded(lambda: nn.Linear(4, 3))
    x = drawn(2, 4)


@pytest.mark.parametrize(("call", "said"), [
    (lambda: evaluate.faithfulness(Wrong.net, [], "random"), "there are no items"),
    (lambda: evaluate.faithfulness(Wrong.net, "text", "random"), "items cannot be str"),
    (lambda: evaluate.faithfulness(Wrong.net, [Wrong.x], "random"), "item 0 has a tensor of shape"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, []), "there are no methods"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, [3]), "a method cannot be int 3"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, ["random", "random"]), "two methods are called 'random'"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, "nonsense"), "nonsense"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, "random", fill="nothing"), "unknown fill 'nothing'"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, "random", fill="mask"), "fill 'mask' is not complete"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, "random", fill="mask(3)"), "features cannot be filled by mask"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, "random", fill="delete"), "features cannot be deleted"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, "random", fill="blur"), "features cannot be blurred"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, "random", score="loss"), "unknown score 'loss'"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, "random", units="words"), "unknown units 'words'"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, "random", units="tokens"), "no input has tokens"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, "random", targets=[0, 3]), "target 3 is out of range"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, "random", targets=[0, -1]), "target -1 is out of range"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, "random", targets=[0]), "1 targets for 2 items"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, "random", steps=0), "0 steps"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, "latest first"), "have no latest one"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, "centre first"), "have no centre"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, lambda *_: np.ones(3)), "relevance has shape"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, lambda *_: np.full(4, math.nan)), "relevance holds NaN"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x * math.nan, "random"), "output holds NaN"),
    (lambda: evaluate.faithfulness(lambda x: x, Wrong.x, "random"), "not a torch.nn.Module"),
    (lambda: evaluate.faithfulness(nn.Linear(4, 1), Wrong.x, "random"), "the model has one output"),
    (lambda: evaluate.target_sensitivity(nn.Linear(4, 1), Wrong.x, "random"), "the model has one output"),
    (lambda: evaluate.faithfulness(Wrong.net, Wrong.x, "random", units=evaluate.Segments(np.array([0, 2, 2, 0]))),
     "labels leave out numbers"),
    (lambda: evaluate.faithfulness(seeded(Reader), IDS, "random", units=evaluate.Tokens(special=range(20))),
     "has no tokens to perturb"),
    (lambda: evaluate.Report.from_dict({"kind": "something"}), "not a report"),
    (lambda: Report().of("epsilon"), "there is no 'result' of 'epsilon'"),
])
def test_what_makes_no_sense_is_said(call: Any, said: str) -> None:
    from dlbc.errors import DlbcError

    with pytest.raises(DlbcError) as raised:
        call()
    assert said in str(raised.value)


def test_ids_without_an_embedding_that_can_be_seen() -> None:
    class OneHot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(20, 3)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(nn.functional.one_hot(input_ids, 20).float().mean(1))

    model = seeded(OneHot)
    for options in ({"fill": "zero", "methods": "random"}, {"methods": "gradient x input"}):
        with pytest.raises(InputError, match="does not look its ids up in an embedding"):
            evaluate.faithfulness(model, {"input_ids": IDS}, **options)
    assert evaluate.faithfulness(model, {"input_ids": IDS}, "random", fill="replace(20)").of("random").items == 2


# Reports


@pytest.fixture(scope="module")
def report() -> Report:
    model = seeded(lambda: nn.Linear(6, 3))
    return evaluate.measure(model, drawn(3, 6), {"good": contributions, "bad": lambda *call: -contributions(*call)},
                            data="toys", steps=5)


def test_a_report_survives_a_file(report: Report, tmp_path: Path) -> None:
    odd = report + Report((Result("toys", "good", "extra", (math.nan, 1.0, 2.0), better="neither"),))
    loaded = Report.load(odd.save(tmp_path / "report.json"))
    assert loaded.curves == report.curves and loaded.settings == report.settings
    assert loaded.results[:-1] == report.results and loaded.of("good", "extra").items == 2
    assert "NaN" not in (tmp_path / "report.json").read_text()
    (tmp_path / "text").write_text("no JSON")
    with pytest.raises(InputError, match="no JSON"):
        Report.load(tmp_path / "text")


def test_the_table_shows_methods_controls_and_which_way_is_better(report: Report) -> None:
    text = str(report)
    for words in ("toys", "good", "bad", "random", "area ↑", "suffic. ↓", "sr ↓", "3 items, mean ± standard error"):
        assert words in text
    assert f"{report.of('good').mean:.3f}±{report.of('good').standard_error:.3f}".replace("±0", "±") in text
    assert len(repr(report)) < 200 and "<pre>" in report._repr_html_() and "sr ↓" in report._repr_html_()
    assert "aopc" not in text and len(report.table(report.metrics).columns) == 9
    two = report + Report(tuple(Result("games", one.method, one.metric, one.values, one.how) for one in report.results))
    assert "games" in str(two)
    with pytest.raises(InputError, match=r"there are 2 of 'area' of 'good'(.|\n)*data='games'"):
        two.of("good")
    assert two.paired("good", "bad", data="games").items == 3


def test_curves_are_drawn_with_bands(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = report.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [len(axes.lines) for axes in figure.axes] == [3, 3]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["good", "bad", "random"]
    bars = Report(report.results).plot(tmp_path / "bars.svg")
    assert len(bars.axes[0].patches) == len(report.results)
    with pytest.raises(InputError, match="there is no folder"):
        report.plot(tmp_path / "missing" / "x.png")


def test_bands_are_means_and_standard_errors() -> None:
    middle, error = Curve("", "m", "morf", (0.0, 1.0), ((1.0, 0.0), (3.0, 0.0))).band()
    assert middle.tolist() == [2, 0] and error.tolist() == [1, 0]


def test_evaluate_is_light_until_used() -> None:
    code = ("import dlbc, sys\ndlbc.evaluate.Report; dlbc.evaluate.rank_correlation; dlbc.evaluate.Item\n"
            "print([name for name in ('torch', 'matplotlib', 'rich') if name in sys.modules])\n"
            "import dlbc.evaluate as e\n[getattr(e, name) for name in e.__all__]")
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'runtime'}"},
                          capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


# Quantus


def test_quantus_gets_relevance_of_the_inputs_shape(net: nn.Module) -> None:
    """As `Metric.general_preprocess` and `explain_batch` of quantus 0.6 call it: numpy arrays, by name, with more
    keywords; and with other models than the first."""
    x, y = drawn(4, 10), np.array([0, 1, 2, 4])
    want = dlbc.compile(net, x, rules="epsilon")(x, target=dlbc.Target.index(y.tolist())).relevance["input"]
    other = seeded(lambda: nn.Sequential(nn.Linear(10, 3)))
    for given in ("epsilon", dlbc.compile(net, x, rules="epsilon"), dlbc.Composite([], base="epsilon")):
        explain = evaluate.quantus_explain(given)
        found = explain(model=net, inputs=x.double().numpy(), targets=y, device="cpu", method="LRP")
        assert type(found) is np.ndarray and found.dtype == np.float32
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
        assert explain(model=other, inputs=x.numpy(), targets=np.array([0, 1, 2, 0])).shape == (4, 10)
        assert explain(model=net, inputs=x[:1].numpy(), targets=np.array(2)).shape == (1, 10)


def test_quantus_sees_weights_that_it_randomises_in_place(net: nn.Module) -> None:
    x, explain = drawn(2, 10), evaluate.quantus_explain("epsilon")
    before = explain(model=net, inputs=x.numpy(), targets=np.array([0, 1]))
    with torch.no_grad():
        net[2].weight.neg_()
        net[2].bias.neg_()
    after = explain(model=net, inputs=x.numpy(), targets=np.array([0, 1]))
    assert np.abs(after - before).max() > 1e-3


@pytest.mark.peers
def test_a_metric_of_quantus_takes_it(net: nn.Module) -> None:
    quantus = pytest.importorskip("quantus")
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 4)))
    x = drawn(3, 1, 8, 8)
    given = {"model": model, "x_batch": x.numpy(), "y_batch": np.array([0, 1, 2]), "a_batch": None, "device": "cpu",
             "explain_func": evaluate.quantus_explain("epsilon")}
    quiet = {"disable_warnings": True, "display_progressbar": False}
    alike = quantus.similarity_func.correlation_spearman
    logits = quantus.RandomLogit(num_classes=4, similarity_func=alike, abs=False, **quiet)(**given)
    assert len(logits) == 3 and all(-1 <= value < 0.95 for value in logits)
    layers = quantus.MPRT(similarity_func=alike, abs=False, **quiet)(**given)
    assert np.allclose(layers["original"], 1) and all(np.mean(found) < 0.9 for name, found in layers.items()
                                                      if name != "original")


# The command line


def test_the_command_measures_texts(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ("[PAD]", "[UNK]", "the", "sky", "is", "blue", "grass", "green", ".")
    plain = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]"
                                         ).save_pretrained(tmp_path / "lm")
    seeded(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.5))).save_pretrained(tmp_path / "lm")
    (tmp_path / "texts.txt").write_text("the sky is blue\n\nthe grass is green .\n")
    run = CliRunner().invoke
    done = run(app, ["evaluate", "text", "-m", str(tmp_path / "lm"), "the sky is", "--file",
                     str(tmp_path / "texts.txt"), "-r", "attnlrp", "-r", "gradient x input", "--steps", "4", "--save",
                     str(tmp_path / "x.json")])
    assert done.exit_code == 0, done.output
    assert "attnlrp" in done.stdout and "latest first" in done.stdout and "3 items" in done.stdout
    saved = Report.load(tmp_path / "x.json")
    assert saved.methods == ("attnlrp", "gradient x input", "random", "latest first")
    assert json.loads((tmp_path / "x.json").read_text())["settings"]["fill"] == "delete"
    done = run(app, ["evaluate", "text", "-m", str(tmp_path / "lm"), "the sky", "--score", "output"])
    assert done.exit_code == 1 and "raw logit of a language model" in done.stderr
    done = run(app, ["evaluate", "text", "-m", str(tmp_path / "lm"), "the sky", "--fill", "mask", "-t", "blue"])
    assert done.exit_code == 0, done.output
    assert "no text" in run(app, ["evaluate", "text", "-m", str(tmp_path / "lm")]).stderr


BUILDS = '''
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 3), ["no", "yes", "so"]


def pictures():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return model, lambda image: torch.tensor(list(image.resize((8, 8)).tobytes())).view(8, 8, 3).permute(2, 0, 1) / 255
'''


def test_the_command_measures_pictures_and_tables(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    (tmp_path / "builds.py").write_text(BUILDS)
    for number in range(2):
        image.fromarray((np.arange(8 * 8 * 3) * (number + 3) % 255).astype(np.uint8).reshape(8, 8, 3)).save(
            tmp_path / f"{number}.png")
    run = CliRunner().invoke
    done = run(app, ["evaluate", "image", "-m", f"{tmp_path / 'builds.py'}:pictures", str(tmp_path / "0.png"),
                     str(tmp_path / "1.png"), "--patch", "2", "-r", "epsilon", "--plot", str(tmp_path / "x.png")])
    assert done.exit_code == 0, done.output
    assert "centre first" in done.stdout and "2 items" in done.stdout
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "data.csv").write_text("a,b,name,c\n1,2,ann,3\n-0.5,4,bob,0.25\n0,1,cyd,2\n")
    done = run(app, ["evaluate", "table", "-m", str(tmp_path / "builds.py"), str(tmp_path / "data.csv"), "--drop",
                     "name", "-r", "epsilon", "--randomise", "--target", "yes"])
    assert done.exit_code == 0, done.output
    assert "randomised" in done.stdout and "3 items" in done.stdout
    done = run(app, ["evaluate", "table", "-m", str(tmp_path / "builds.py"), str(tmp_path / "data.csv")])
    assert done.exit_code == 1 and "which is no number" in done.stderr
    assert run(app, ["evaluate", "table", "-m", "x.py", "x.csv", "--save", "x.txt"]).exit_code == 2
