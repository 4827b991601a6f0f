"""Targets by task: several labels, a binary or regression output, the pixels of a segmentation, a detected object."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import dlbc
from dlbc import Target
from dlbc.errors import InputError


def linear(weight: list[list[float]], bias: list[float] | None = None, last: nn.Module | None = None) -> nn.Module:
    made = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(weight))
        if bias is not None:
            made.bias.copy_(torch.tensor(bias))
    return nn.Sequential(made, *([last] if last else [])).eval()


X = torch.ones(1, 3)
EYE = [[3.0, 0.0, 0.0], [0.0, -2.0, 0.0], [0.0, 0.0, 1.0]]
"""Outputs (3, -2, 1), each by one feature."""


# --- labels ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rules", ["epsilon", "dlb", "dlb-contrastive"])
def test_labels_above_the_threshold_share_equally(rules: str) -> None:
    explainer = dlbc.compile(linear(EYE), X, rules=rules, cache=False)
    found = explainer(X, target=Target.labels(0.5))
    np.testing.assert_allclose(found.relevance["input"], [[50, 0, 50]], atol=1e-4)
    assert str(found.target[0]) == "output[0, 2]"
    alone = explainer(X, target=Target.labels(2.0))
    np.testing.assert_allclose(alone.relevance["input"][0, 0], 100, rtol=1e-5)
    assert alone.target[0].index == 0


def test_each_row_has_its_own_labels() -> None:
    explainer = dlbc.compile(linear(EYE), X, rules="epsilon", cache=False)
    found = explainer(torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]), target=Target.labels())
    np.testing.assert_allclose(found.relevance["input"], [[50, 0, 50], [0, 100, 0]], atol=1e-4)
    assert found.conservation().closes()


def test_labels_below_zero_keep_the_sense_of_signs() -> None:
    """-2 is above -3: its relevance is negative in all, as of any negative number."""
    found = dlbc.compile(linear(EYE), X, rules="epsilon", cache=False)(X, target=Target.labels(-3.0))
    np.testing.assert_allclose(found.relevance["input"], [[100 / 3, -100 / 3, 100 / 3]], rtol=1e-5)


def test_the_threshold_is_compared_with_what_the_model_returns() -> None:
    """sigmoid(1) = 0.73: the probability counts, though the value before the sigmoid is explained."""
    explainer = dlbc.compile(linear(EYE, last=nn.Sigmoid()), X, rules="epsilon", cache=False)
    assert str(explainer(X, target=Target.labels(0.7)).target[0]) == "output[0, 2]"
    assert explainer(X, target=Target.labels(0.8)).target[0].index == 0
    with pytest.raises(InputError, match=r"above 0.99 in row 0; the largest is 0.952"):
        explainer(X, target=Target.labels(0.99))


def test_labels_of_a_wide_head_stay_sparse() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wide = nn.Sequential(nn.Linear(3, 5000)).eval()
    x = torch.rand(2, 3)
    explainer = dlbc.compile(wide, x, rules="epsilon", cache=False)
    assert explainer.manifest.sparse
    highest = wide(x).detach().sort(-1).values
    threshold = float(highest[:, -5:-3].mean(1).min())  # the fourth of one row, and some more of the other
    found = explainer(x, target=Target.labels(threshold))
    chosen = (wide(x).detach() > threshold).float()
    wanted = explainer(x, target=Target.tensor(chosen / chosen.sum(-1, keepdim=True)))
    np.testing.assert_allclose(found.relevance["input"], wanted.relevance["input"], rtol=1e-3, atol=1e-3)


# --- one number, and several -------------------------------------------------------------------------

def test_the_negative_class_of_one_logit_is_minus_it() -> None:
    explainer = dlbc.compile(linear([[2.0, -1.0, 0.0]]), X, rules="epsilon", cache=False)
    positive, negative = (explainer(X, target=Target.binary(which)) for which in (True, False))
    np.testing.assert_allclose(positive.relevance["input"], [[200, -100, 0]], rtol=1e-5)
    np.testing.assert_allclose(negative.relevance["input"], [[-200, 100, 0]], rtol=1e-5)
    assert (positive.target[0].value, negative.target[0].value) == (1.0, -1.0)
    assert str(negative.target[0]) == "minus output (value -1)"
    stacked = explainer(X, target=[Target.binary(), Target.binary(False)])
    np.testing.assert_allclose(stacked.relevance["input"][1], negative.relevance["input"])
    with pytest.raises(InputError, match=r"Target\.binary is for one number, output `output` has 3"):
        dlbc.compile(linear(EYE), X, rules="epsilon", cache=False)(X, target=Target.binary())


def test_a_regression_has_no_probability_and_no_rivals() -> None:
    explainer = dlbc.compile(linear(EYE), X, rules="epsilon", cache=False)
    one = explainer(X, target=Target.regression(1))
    assert one.target[0].probability is None
    np.testing.assert_allclose(one.relevance["input"], [[0, -100, 0]], atol=1e-4)
    every = explainer(X, target=Target.regression())
    np.testing.assert_allclose(every.relevance["input"], [[100 / 3, -100 / 3, 100 / 3]], rtol=1e-5)
    assert str(every.target[0]) == "all 3 of output"
    scalar = dlbc.compile(linear([[2.0, 1.0, 0.0]]), X, rules="epsilon", cache=False)(X, target=Target.regression())
    np.testing.assert_allclose(scalar.relevance["input"], [[200 / 3, 100 / 3, 0]], rtol=1e-5)
    contrastive = dlbc.compile(linear(EYE), X, rules="dlb-contrastive", cache=False)
    assert not contrastive(X, target=Target.regression(0)).negative["input"].any()
    assert contrastive(X, target=Target.index(0)).negative["input"].any()


# --- segmentation ------------------------------------------------------------------------------------

class Segmentation(nn.Module):
    """A score per class and pixel: the pixel's own channels, the second doubled."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.head = nn.Conv2d(2, classes, 1, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]])[:classes, :, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


PICTURE = torch.zeros(2, 2, 3, 3)
PICTURE[0, 0, 0, :2] = 1.0  # class 0 at two pixels
PICTURE[:, 1, 1] = 0.5  # class 1 at a row
PICTURE[1, 0, 2, 2] = 3.0


@pytest.mark.parametrize("rules", ["epsilon", "dlb", "dlb-contrastive"])
@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_pixels_above_the_threshold_share_equally(rules: str, backend: str) -> None:
    explainer = dlbc.compile(Segmentation().eval(), PICTURE, rules=rules, backend=backend, cache=False)
    found = explainer(PICTURE, target=Target.mask(0))
    wanted = np.zeros((2, 2, 3, 3))
    wanted[0, 0, 0, :2], wanted[1, 0, 2, 2] = 50, 100
    np.testing.assert_allclose(found.relevance["x"], wanted, atol=1e-4)
    assert str(found.target[0]) == "output class 0, 2 of 9 pixels"
    both = explainer(PICTURE, target=[Target.mask(0), Target.mask(1, threshold=0.9), Target.mask([0, 1])])
    np.testing.assert_allclose(both.relevance["x"][0], wanted, atol=1e-4)
    np.testing.assert_allclose(both.relevance["x"][1, :, 1, 1], 100 / 3, rtol=1e-5)
    np.testing.assert_allclose(both.relevance["x"][2, 0], wanted[0], atol=1e-4)
    assert found.conservation().closes()


def test_a_segmentation_of_one_class() -> None:
    explainer = dlbc.compile(Segmentation(1).eval(), PICTURE, rules="epsilon", cache=False)
    assert explainer(PICTURE, target=Target.mask(0)).relevance["x"].sum() == pytest.approx(200)
    with pytest.raises(InputError, match="target 1 is out of range"):
        explainer(PICTURE, target=Target.mask(1))


def test_the_rivals_of_a_mask_are_the_other_classes_at_its_pixels() -> None:
    both = PICTURE.clone()
    both[0, 1, 0, 0] = 1.0
    both[1, 1, 2, 2] = 1.0
    found = dlbc.compile(Segmentation().eval(), both, rules="dlb-contrastive", cache=False)(both, target=Target.mask(0))
    np.testing.assert_allclose(found.negative["x"][0, 1, 0], [100, 0, 0])
    np.testing.assert_allclose(found.negative["x"][1, 1, 2], [0, 0, 100])
    assert not found.negative["x"][:, :, 1].any()


def test_what_is_no_mask_is_refused() -> None:
    explainer = dlbc.compile(Segmentation().eval(), PICTURE, rules="epsilon", cache=False)
    with pytest.raises(InputError, match=r"no pixel of class 0 is above 2 in row 0; the largest is 1"):
        explainer(PICTURE, target=Target.mask(0, threshold=2.0))
    with pytest.raises(InputError, match="target 5 is out of range"):
        explainer(PICTURE, target=Target.mask(5))
    with pytest.raises(InputError, match=r"which number of it to explain is not clear[^$]*Target.mask"):
        explainer(PICTURE)
    with pytest.raises(InputError, match=r"Target.mask is for a segmentation \[B,C,H,W\]"):
        dlbc.compile(linear(EYE), X, rules="epsilon", cache=False)(X, target=Target.mask(0))


# --- detection ---------------------------------------------------------------------------------------

class Detection(nn.Module):
    """Two queries: scores [B,2,3] and boxes [B,2,4], each query from its own half of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.boxes = nn.Linear(4, 3, bias=False), nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.scores.weight.copy_(torch.eye(3, 4) + 0.5 * torch.eye(3, 4).roll(1, 1))
            self.boxes.weight.copy_(torch.eye(4))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        queries = x.reshape(-1, 2, 4)
        return {"logits": self.scores(queries), "boxes": self.boxes(queries)}


SEEN = torch.tensor([[1.0, 2.0, 3.0, 4.0, 4.0, 3.0, 2.0, 1.0]])


def test_a_query_is_explained_by_its_class_or_its_box() -> None:
    explainer = dlbc.compile(Detection().eval(), SEEN, rules="epsilon", cache=False)
    scores = explainer(SEEN, target=Target.box(1, 0))
    np.testing.assert_allclose(scores.relevance["x"], [[0, 0, 0, 0, 400 / 5.5, 150 / 5.5, 0, 0]], rtol=1e-5)
    assert str(scores.target[0]) == "logits[1, 0] (value 5.5)"
    width = explainer(SEEN, target=Target.box(0, "w"), output="boxes")
    np.testing.assert_allclose(width.relevance["x"], [[0, 0, 100, 0, 0, 0, 0, 0]], atol=1e-4)
    box = explainer(SEEN, target=[Target.box(0), Target.box(1)], output="boxes")
    np.testing.assert_allclose(box.relevance["x"][:, 0], [[25] * 4 + [0] * 4, [0] * 4 + [25] * 4], atol=1e-4)
    contrastive = dlbc.compile(Detection().eval(), SEEN, rules="dlb-contrastive", cache=False)
    assert contrastive(SEEN, target=Target.box(1, 0)).negative["x"][0, :4].sum() == 0
    assert contrastive(SEEN, target=Target.box(1, 0)).negative["x"].sum() == pytest.approx(100)
    assert not contrastive(SEEN, target=Target.box(1, "x"), output="boxes").negative["x"].any()


@pytest.mark.parametrize(("target", "output", "fact"), [
    (Target.box(2, 0), "logits", "target 2 is out of range"), (Target.box(0, 3), "logits", "target 3 is out of range"),
    (Target.box(0, "w"), "logits", "`w` is no number of output `logits`"),
    (Target.box(0, "width"), "boxes", "`width` is no number of output `boxes`")])
def test_what_is_no_object_is_refused(target: Target, output: str, fact: str) -> None:
    explainer = dlbc.compile(Detection().eval(), SEEN, rules="epsilon", cache=False)
    with pytest.raises(InputError, match=fact):
        explainer(SEEN, target=target, output=output)
    with pytest.raises(InputError, match=r"Target.box is for scores \[B,Q,C\]"):
        dlbc.compile(linear(EYE), X, rules="epsilon", cache=False)(X, target=Target.box(0))


def test_a_sequence_has_no_boxes() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).eval()
    ids = torch.tensor([[1, 2, 3]])
    explainer = dlbc.compile(model, ids, rules="epsilon", cache=False)
    for target in (Target.box(0, 1), Target.mask(0)):
        with pytest.raises(InputError, match="is a sequence"):
            explainer(ids, target=target)
