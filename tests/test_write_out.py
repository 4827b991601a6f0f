"""Layers whose weight, bias or mask is computed from the input: relevance reaches it, by rules of products and sums."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlbc

Operation = Callable[[Tensor, Tensor], Tensor]


def attention(x: Tensor, z: Tensor, **options: object) -> Tensor:
    """Of two heads of 3 rows each, with a bias."""
    heads = x.reshape(2, 2, 3, 2)
    return F.scaled_dot_product_attention(heads, heads.flip(-1), heads * 2, attn_mask=z[:, :9].reshape(2, 1, 3, 3),
                                          **options).flatten(1)  # type: ignore[arg-type]


def grouped(x: Tensor, z: Tensor) -> Tensor:
    """Four heads of queries, two of keys and values."""
    q, kv = torch.cat((x, x * 0.5), -1).reshape(2, 4, 3, 2), x.reshape(2, 2, 3, 2)
    return F.scaled_dot_product_attention(q, kv, kv, attn_mask=z[:, :9].reshape(2, 1, 3, 3), enable_gqa=True).flatten(1)


OPERATIONS: dict[str, Operation] = {
    "weight": lambda x, z: F.linear(x, z.reshape(2, 12)),
    "weight of a row": lambda x, z: F.linear(x[0], z.reshape(2, 12)),
    "bias": lambda x, z: F.linear(x, torch.linspace(-1, 1, 36).reshape(3, 12), z[0, :3]),
    "both": lambda x, z: F.linear(x, z.reshape(2, 12), z[0, :2]),
    "layer norm": lambda x, z: F.layer_norm(x, (12,), z[0], z[1]), "rms norm": lambda x, z: F.rms_norm(x, (12,), z[0]),
    "embedding": lambda x, z: F.embedding(torch.tensor([[0, 2], [3, 3]]), z.reshape(4, 6)).flatten(1) + x,
    "attention": attention, "scaled": lambda x, z: attention(x, z, scale=0.3), "grouped": grouped}


class Computed(nn.Module):
    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        found = self.operation(x, torch.tanh(z) * 2)
        return found if found.ndim > 1 else found[None]


def inputs() -> tuple[Tensor, Tensor]:
    """Always the same."""
    draw = torch.Generator().manual_seed(3)
    return torch.randn(2, 12, generator=draw), torch.randn(2, 12, generator=draw)


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradient_is_autograds(name: str) -> None:
    """Input x gradient of both inputs, which is exact whatever computes what."""
    model = Computed(OPERATIONS[name]).eval()
    x, z = (one.requires_grad_() for one in inputs())
    wanted = model(x, z)
    wanted[0, 1].backward()
    explainer = dlbc.compile(model, inputs(), rules="input-x-gradient", dynamic=False, cache=False)
    found = explainer(*inputs(), target=dlbc.Target.tensor(F.one_hot(torch.tensor(1), wanted.numel()).reshape(
        wanted.shape).float().numpy()), multiplier=1.0)
    np.testing.assert_allclose(found.outputs["output"], wanted.detach().numpy(), rtol=0, atol=1e-5)
    for own in (x, z):
        assert own.grad is not None
        name = "x" if own is x else "z"
        np.testing.assert_allclose(found.relevance[name], (own * own.grad).detach().numpy(), rtol=0, atol=1e-5)
    assert np.abs(found.relevance["z"]).max() > 0


@pytest.mark.parametrize("rules", ["attnlrp", "dlb"])
@pytest.mark.parametrize("name", ["weight", "layer norm", "embedding", "grouped"])
def test_relevance_arrives_and_adds_up(name: str, rules: str) -> None:
    explainer = dlbc.compile(Computed(OPERATIONS[name]).eval(), inputs(), rules=rules, dynamic=False, cache=False)
    found = explainer(*inputs(), target=1)
    assert np.abs(found.relevance["z"]).max() > 0
    assert found.conservation().closes(1e-4), found.conservation().leaks()


@pytest.mark.parametrize("rules", ["attnlrp", "dlb"])
def test_a_query_that_sees_nothing_gets_nothing(rules: str) -> None:
    """As in torch: its result is 0, and so is what it hands on."""
    def blind(x: Tensor, z: Tensor) -> Tensor:
        hidden = torch.zeros(2, 9).index_fill(1, torch.tensor([3, 4, 5, 7]), -torch.inf)
        return attention(x, F.pad(z[:, :9] + hidden, (0, 3)))

    explainer = dlbc.compile(Computed(blind).eval(), inputs(), rules=rules, dynamic=False, cache=False)
    found = explainer(*inputs(), target=0)
    np.testing.assert_allclose(found.outputs["output"], Computed(blind)(*inputs()).numpy(), rtol=0, atol=1e-6)
    assert all(np.isfinite(own).all() for own in found.relevance.values())
    assert not found.relevance["z"][:, [3, 4, 5, 7]].any()
