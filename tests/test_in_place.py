"""In-place operators of captured programs: exchanged where nothing else sees what they wrote over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dlbc
from dlbc.frontends.in_place import exchange_in_place

Function = Callable[[Tensor], Tensor]


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def normalised(x: Tensor) -> Tensor:
    best, places = torch.topk(x, 2)
    best /= best.sum(-1, keepdim=True)
    return best * (1 + places)


def biased_view(x: Tensor) -> Tensor:
    y = torch.matmul(x, x.T).unsqueeze(-1).squeeze(-1)
    y.add_(1.0)
    return y * y.relu_()


def chained(x: Tensor) -> Tensor:
    return (x * 2).add_(x).mul_(3).clamp_(min=0)


def seen_through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    row = y[0]
    y.add_(1.0)
    return row + y


def into_a_part(x: Tensor) -> Tensor:
    y = x * 2
    y[0].add_(1.0)
    return y


def other_type(x: Tensor) -> Tensor:
    y = (x > 0).long()
    y.mul_(3)
    return y * x


def over_the_input(x: Tensor) -> Tensor:
    return x.add_(1.0) * 2


def written(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes
            if getattr(getattr(node.target, "_schema", None), "is_mutable", False)]


@pytest.mark.parametrize(("function", "left"), [
    (normalised, 0), (biased_view, 0), (chained, 0), (other_type, 0), (seen_through_a_view, 1), (into_a_part, 1),
    (over_the_input, 1)])
def test_exchange(function: Function, left: int) -> None:
    """What is exchanged gives the same numbers; what another name reads later, or the caller sees, stays."""
    x = torch.randn(4, 4)
    program = torch.export.export(Of(function), (x.clone(),), strict=False)
    assert written(program)
    exchange_in_place(program.graph_module)
    assert len(written(program)) == left
    torch.testing.assert_close(program.module()(x.clone()), function(x.clone()), rtol=0, atol=0)


@pytest.mark.parametrize("function", [normalised, biased_view, seen_through_a_view, into_a_part])
def test_a_model_that_works_in_place_compiles(function: Function) -> None:
    """Whichever way is taken, the explainer's outputs are the model's."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, Of(function)).eval()
    x = torch.randn(4, 4)
    explanation = dlbc.compile(model, x, rules="attnlrp", cache=False, dynamic=False)(x)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(next(iter(explanation.outputs.values()))), model(x))
