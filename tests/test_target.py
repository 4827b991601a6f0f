"""Targets: what is seeded, and that a map reads the same way whatever the sign of what it explains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import dlbc
from dlbc.errors import InputError


def layer(bias: float) -> nn.Linear:
    made = nn.Linear(2, 2)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[1.0, -3.0], [0.0, -1.0]]))
        made.bias.fill_(bias)
    return made.eval()


X = torch.ones(1, 2)


@pytest.mark.parametrize("bias", [-5.0, 0.0, 5.0])
def test_a_difference_explains_the_difference(bias: float) -> None:
    """y1 - y0 = -x0 + 2 x1, whatever is added to both: x1 speaks for it, x0 against it, two to one."""
    explainer = dlbc.compile(layer(bias), X, rules="epsilon", cache=False)
    against, for_it = explainer(X, target=dlbc.Target.difference(1, 0)).relevance["input"][0]
    assert against < 0 < for_it
    np.testing.assert_allclose(for_it / against, -2.0, rtol=1e-4)
    np.testing.assert_allclose(for_it + against, 100.0, rtol=1e-4)


@pytest.mark.parametrize("bias", [-5.0, 5.0])
def test_positive_relevance_raises_the_number_even_where_it_is_negative(bias: float) -> None:
    """y0 = x0 - 3 x1 + bias: x0 raises it and x1 lowers it."""
    explainer = dlbc.compile(layer(bias), X, rules="epsilon", cache=False)
    found = explainer(X, target=0)
    raises, lowers = found.relevance["input"][0]
    assert lowers < 0 < raises
    value = found.target[0].value
    assert value is not None
    np.testing.assert_allclose(found.conservation().seed, 100.0 * np.sign(value))


def test_a_value_before_softmax_is_explained_with_its_own_sign() -> None:
    model = nn.Sequential(layer(-5.0), nn.Softmax(-1)).eval()
    plain, skipped = (dlbc.compile(m, X, rules="epsilon", cache=False)(X, target=0) for m in (layer(-5.0), model))
    np.testing.assert_allclose(skipped.relevance["input"], plain.relevance["input"], rtol=1e-5)
    np.testing.assert_allclose(skipped.outputs["output"], model(X).detach(), rtol=1e-5)


def test_absolute_rules_know_no_sign() -> None:
    found = dlbc.compile(layer(-5.0), X, rules="dlb", cache=False)(X, target=0)
    assert (found.relevance["input"] >= 0).all()


def test_a_list_stacks_and_one_number_per_row_is_one_target() -> None:
    explainer = dlbc.compile(layer(1.0), X, rules="epsilon", cache=False)
    batch = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    stacked = explainer(batch, target=[0, 1])
    assert stacked.relevance["input"].shape == (2, 2, 2)
    rows = explainer(batch, target=dlbc.Target.index([0, 1]))
    np.testing.assert_allclose(rows.relevance["input"][0], stacked.relevance["input"][0, 0], rtol=1e-5)
    np.testing.assert_allclose(rows.relevance["input"][1], stacked.relevance["input"][1, 1], rtol=1e-5)


def test_positions_belong_to_sequences() -> None:
    explainer = dlbc.compile(layer(1.0), X, rules="epsilon", cache=False)
    with pytest.raises(InputError, match="position"):
        explainer(X, target=dlbc.Target.index(0, position=1))


def test_sparse_targets_are_no_input_to_explain() -> None:
    """A wide head makes the targets an input of the program; they are not one of the model's."""
    wide = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 5000)).eval()
    explainer = dlbc.compile(wide, X, rules="epsilon", cache=False)
    assert explainer.manifest.sparse
    assert list(explainer(X).relevance) == ["input"]


class TwoHeads(nn.Module):
    """Logits for every position of a sequence, and one number for the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.whole = nn.Embedding(11, 6), nn.Linear(6, 11), nn.Linear(6, 2)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(ids)
        return {"logits": self.head(x), "whole": self.whole(x.mean(1))}


def test_each_output_of_a_sequence_model_can_be_explained() -> None:
    """An output with a number per position, and one without: the latter knows no positions."""
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    explainer = dlbc.compile(TwoHeads().eval(), ids, rules="epsilon", cache=False)
    assert explainer(ids).target[0].position == 2
    whole = explainer(ids, output="whole")
    assert whole.target[0].position is None
    assert (np.abs(whole.relevance["ids"]) > 0).all()
    assert (explainer(ids).relevance["ids"][:, :2] == 0).all()


class EveryPosition(nn.Module):
    """Logits for every position of a sequence, which see all positions before."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(torch.tanh(self.words(input_ids).cumsum(1)))}


@pytest.mark.parametrize("positions", ["explained", "all"])
def test_a_weighting_beside_targets_at_positions_changes_neither(positions: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, ids = EveryPosition().eval(), torch.randint(0, 20, (2, 7))
    explainer = dlbc.compile(model, (ids,), rules="epsilon", cache=False)
    single = [dlbc.Target.index(1, position=2), dlbc.Target.index(3, position=5)]
    weighting = dlbc.Target.tensor(np.eye(20)[4])
    together = explainer(ids, target=[*single, weighting], positions=positions).relevance["input_ids"]
    for number, target in enumerate([*single, weighting]):
        alone = explainer(ids, target=target, positions=positions).relevance["input_ids"]
        np.testing.assert_allclose(together[number], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_sequence_of_fixed_length_is_explained_too(dynamic: bool) -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    model = TwoHeads().eval()
    found = dlbc.compile(model, ids, rules="epsilon", dynamic=dynamic, cache=False)(ids)
    assert [one.position for one in found.target] == [2, 2]
    assert (found.relevance["ids"][:, :2] == 0).all() and (found.relevance["ids"][:, 2] != 0).all()


def test_a_softmax_over_the_batch_is_part_of_the_model() -> None:
    model = nn.Sequential(layer(1.0), nn.Softmax(0)).eval()
    explainer = dlbc.compile(model, torch.rand(3, 2), rules="attnlrp", cache=False)
    assert explainer.manifest.before == ""


def test_a_floating_mask_has_the_sequence_of_the_ids() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

        def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids) * attention_mask[..., None])

    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    explainer = dlbc.compile(Masked().eval(), (ids, mask), rules="epsilon", cache=False)
    assert [one.position for one in explainer(ids, mask).target] == [2, 1]
    assert explainer(ids[:, :2], mask[:, :2]).relevance["ids"].shape == (2, 2)


def test_a_difference_without_a_rival_takes_the_likeliest_other() -> None:
    explainer = dlbc.compile(layer(0.0), X, rules="epsilon", cache=False)
    found, wanted = (explainer(X, target=dlbc.Target.difference(1, against)) for against in (None, 0))
    np.testing.assert_array_equal(found.relevance["input"], wanted.relevance["input"])
    assert found.target[0].against == 0
    single = nn.Linear(2, 1).eval()
    with pytest.raises(InputError, match="no other"):
        dlbc.compile(single, X, rules="epsilon", cache=False)(X, target=dlbc.Target.difference(0))


@pytest.mark.parametrize("signed", [False, True])
def test_log_odds_weigh_the_others_by_their_share_of_the_rest(signed: bool) -> None:
    """d log(p / (1 - p)) / dy_j = -p_j / (1 - p) for the others, and 1 for the number itself."""
    logits = np.array([[2.0, 1.0, 0.0, -1.0], [0.5, 3.0, 0.5, 0.5]], np.float32)
    seed = dlbc.Target.probability([0, 2]).seed(logits, "logits", None, 0, signed=signed)
    odds = torch.from_numpy(logits.astype(np.float64)).requires_grad_(True)
    likely = torch.softmax(odds, -1)[[0, 1], [0, 2]]
    log_odds = torch.log(likely / (1 - likely))
    (wanted,) = torch.autograd.grad(log_odds.sum(), odds)
    if signed:  # relevance of each is its part of the size of the sum
        parts = wanted * odds.detach()
        wanted = parts / parts.sum(-1, keepdim=True).abs()
    for row in range(2):
        order = np.argsort(seed.indices[row])
        np.testing.assert_allclose(seed.weights[row][order], wanted[row].detach(), rtol=1e-5)
    explained = seed.explained()
    np.testing.assert_allclose([one.value for one in explained], log_odds.detach(), rtol=1e-6)
    np.testing.assert_allclose([one.probability for one in explained], likely.detach(), rtol=1e-6)


def test_log_odds_need_others() -> None:
    with pytest.raises(InputError, match="among others"):
        dlbc.Target.probability(0).seed(np.ones((1, 1), np.float32), "y", None, 0, signed=False)
