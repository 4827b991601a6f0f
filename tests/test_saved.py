"""What is kept of the forward pass for relevance: passes that keep less compute the same."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dlbc
from dlbc.ir.core import Graph, values
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc.ir.verifier import verify
from dlbc.passes import Pass, run
from dlbc.passes.checkpoint import Checkpoint
from dlbc.passes.eliminate_common import EliminateCommon
from dlbc.passes.eliminate_dead import EliminateDead
from dlbc.passes.inline import Inline
from dlbc.passes.lower import Lower
from dlbc.passes.pair import Pair
from dlbc.passes.read_rectified import ReadRectified
from dlbc.passes.recompute import Recompute
from dlbc_runtime import torch_kernels
from dlbc_runtime.explainer import Explainer
from tests.random_graphs import Model, models

PASSES: dict[str, tuple[Pass, ...]] = {
    "read_rectified": (ReadRectified(),), "recompute": (Recompute(least=1),),
    "longer": (Recompute(least=1, longest=9),), "kernels": (Recompute(least=1, kernels=True),),
    "both": (ReadRectified(), Recompute(least=1)), "blocks": (Checkpoint(every=2), Recompute(least=1))}


def pictures() -> tuple[nn.Module, torch.Tensor]:
    """A small network of convolutions, ReLUs, a pooling layer and a sum, and two pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
                                   nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 256, 4)).eval(), torch.rand(2, 3, 32, 32)


@cache
def explainer_of(rules: str) -> Explainer:
    model, x = pictures()
    return dlbc.compile(model, x, rules=rules, cache=False)


def lowered(explainer: Explainer) -> Graph:
    """The graph with its calls opened."""
    return run(parse_graph(explainer.ir("lowered")), (Inline(),))


@settings(max_examples=60, deadline=None)
@given(models(), st.sampled_from(sorted(PASSES)), st.sampled_from(["dlb", "epsilon", "gamma", "epsilon-plus-flat"]))
def test_keeping_less_changes_no_number(model: Model, passes: str, rules: str) -> None:
    before = run(model.graph, [Pair(composite=rules), Lower(), EliminateCommon(), EliminateDead()])
    after = run(before, PASSES[passes])
    verify(after)
    assert before.relevance is not None
    inputs, seeds = model.inputs(), {before.relevance.params[0].name: model.seeds(2)}
    wanted, found = (interpret(graph, inputs, model.weights, seeds).relevance for graph in (before, after))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rules", ["epsilon", "epsilon-plus-flat", "epsilon-gamma-box{low=0.0,high=1.0}"])
def test_of_a_layer_and_its_relu_one_is_kept(rules: str) -> None:
    graph = lowered(explainer_of(rules))
    kept = {v.name for v in graph.forward.saves}
    relus = [op for op in graph.forward.ops if op.name == "relu"]
    assert len(relus) == 3
    for op in relus:
        assert not {op.result.name, *(v.name for v in values(op.operands))} <= kept


def test_what_is_kept_is_what_the_plan_says() -> None:
    memory, (_, x) = explainer_of("epsilon-plus-flat"), pictures()
    saved = memory.memory(x).peaks["forward"].saved
    first = 2 * 16 * 32 * 32 * 4  # bytes of the first map; two of its size, three of a quarter of it
    assert saved <= 2.8 * first


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("whole", [True, False])
def test_ties_of_tiles_share_in_equal_parts(seeds: int, whole: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(0, 3, (2, 2, 4, 6), generator=rng).to(torch.float32 if whole else torch.float16)
    y, r = nn.functional.max_pool2d(x, 2), torch.randn(seeds, 2, 2, 2, 3, generator=rng)
    found = torch_kernels.max_pool_adjoint(r, x, y, (2, 2), (2, 2), (0, 0), (1, 1))
    tiles, tops = x.unfold(2, 2, 2).unfold(3, 2, 2), y[..., None, None]
    won = (tiles == tops).float()
    parts = r[..., None, None] * won / won.sum((-2, -1), keepdim=True)
    torch.testing.assert_close(found, parts.transpose(-3, -2).reshape(seeds, *x.shape))
    assert found.dtype == torch.float32
