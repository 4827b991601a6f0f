"""Mixtures of experts that users write themselves: recognised by what they compute, in whatever way it is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dlbc

EXPERTS, IN, INNER = 6, 16, 24


class Mixture(nn.Module):
    """Router and experts; how they are applied, subclasses say."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k, self.router = k, nn.Linear(IN, EXPERTS)
        self.up, self.down = (nn.Parameter(0.3 * torch.randn(EXPERTS, *shape)) for shape in ((INNER, IN), (IN, INNER)))
        self.up_bias, self.down_bias = (nn.Parameter(0.1 * torch.randn(EXPERTS, size)) for size in (INNER, IN))

    def forward(self, x: Tensor) -> Tensor:
        scores, ids = torch.topk(self.router(x), self.k, dim=-1)
        return self.mixed(x, ids, torch.softmax(scores, dim=-1) if self.k > 1 else torch.sigmoid(scores))

    def mixed(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        raise AssertionError


class ByEinsum(Mixture):
    """As in GPT-OSS's first code."""

    def mixed(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        inner = torch.relu(torch.einsum("bkoi,bi->bko", self.up[ids], x) + self.up_bias[ids])
        said = torch.einsum("bkoi,bki->bko", self.down[ids], inner) + self.down_bias[ids]
        return torch.einsum("bkd,bk->bd", said, weights)


class ByMatmul(Mixture):
    """Columns and rows, broadcast over the experts."""

    def mixed(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        inner = torch.relu((self.up[ids] @ x[:, None, :, None]).squeeze(-1) + self.up_bias[ids])
        said = (inner.unsqueeze(-2) @ self.down[ids].transpose(-1, -2)).squeeze(-2) + self.down_bias[ids]
        return (said * weights.unsqueeze(-1)).sum(1)


class One(Mixture):
    """One expert for each row, without an axis for the choice (Switch)."""

    def mixed(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        one = ids.squeeze(-1)
        inner = torch.relu(torch.bmm(self.up[one], x.unsqueeze(-1)).squeeze(-1) + self.up_bias[one])
        return (torch.bmm(self.down[one], inner.unsqueeze(-1)).squeeze(-1) + self.down_bias[one]) * weights


class Around(nn.Module):
    """A mixture beside a residual, between two layers."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.first, self.mixture, self.last = nn.Linear(8, IN), mixture, nn.Linear(IN, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.last(h + self.mixture(h))


@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize(("kind", "k"), [(ByEinsum, 2), (ByMatmul, 3), (One, 1)])
def test_recognised(kind: type[Mixture], k: int, backend: str) -> None:
    """Its experts are in the explanation, with the ids and weights that the model chose; no weight is copied for a row,
    and outputs, conservation and sums hold."""
    torch.manual_seed(0)
    model, x = Around(kind(k)).eval(), torch.randn(5, 8)
    explainer = dlbc.compile(model, x, rules="cp-lrp", backend=backend, cache=False)
    text = explainer.ir("lowered")
    assert "grouped_linear" in text and "= index(@mixture.up, " not in text
    explanation = explainer(x)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(explanation.outputs["output"]), model(x), rtol=1e-5, atol=1e-6)
        scores, ids = torch.topk(model.mixture.router(torch.relu(model.first(x))), k)
    assert explanation.conservation().closes()
    assert explanation.experts is not None
    (layer,) = explanation.experts.values()
    assert layer.experts == EXPERTS and layer.ids.reshape(5, k).tolist() == ids.tolist()
    weights = torch.softmax(scores, -1) if k > 1 else torch.sigmoid(scores)
    torch.testing.assert_close(torch.from_numpy(layer.weights.reshape(5, k)), weights)
    nodes = explainer(x, keep="all").nodes
    line = next(line for line in explainer.ir("canonical").splitlines() if "= combine(" in line)
    name = line.split("=")[0].strip().removeprefix("%")
    torch.testing.assert_close(torch.from_numpy(layer.relevance.reshape(5, k).sum(1)),
                               torch.from_numpy(nodes[name].sum(-1)), rtol=1e-4, atol=1e-4)
