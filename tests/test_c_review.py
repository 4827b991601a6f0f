"""Functions in C beside ops of torch: what either of them makes, the other may neither overwrite nor misread."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dlbc
from dlbc.backends import load
from dlbc.errors import InputError
from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Section, Type, Value, Weight
from dlbc.passes import run as run_passes
from dlbc.passes.fuse_loops import FuseLoops
from dlbc_runtime.c_library import compiler
from dlbc_runtime.module import load_module

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C compiler on this machine")

EMIT = importlib.import_module("dlbc.backends.c.emit")


def forward(graph: Graph, backend: str, *inputs: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """The one output of a graph's forward section."""
    module = load_module(load(backend).emit(graph), graph.name)
    (output,), _ = module.forward(weights or {}, (), *(x.clone() for x in inputs))
    found: Tensor = output
    return found


def graph_of(at: Builder, x: Value, result: Value, *weights: Weight) -> Graph:
    """A graph of one input and one output."""
    section = Section(params=(x,), body=tuple(at.ops), results=(result,))
    return run_passes(Graph("g", weights={w.name: w for w in weights}, forward=section), (FuseLoops(),), verified=True)


# --- kernels that are run op by op ---------------------------------------------------------------------

@pytest.mark.parametrize("pays", [1, 10**9], ids=["op by op", "in C"])
def test_views_of_weights_are_not_overwritten(pays: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that is a view of a weight, which an op outside of the kernel is the last to read."""
    monkeypatch.setattr(EMIT, "PAYS", pays)
    at, x, w = Builder(), Value("x", Type("f32", (4, 6))), Weight("w", Type("f32", (6, 4)))
    view = at.reshape(w, shape=(4, 6))
    before = at.cumsum(at.add(at.exp(at.mul(x, 0.5)), view), dim=0)
    graph = graph_of(at, x, at.cumsum(at.add(view, before), dim=0), w)
    given, weight = torch.rand(4, 6), torch.rand(6, 4)
    kept = weight.clone()
    found = forward(graph, "c", given, weights={"w": weight})
    assert torch.equal(weight, kept)
    torch.testing.assert_close(found, forward(graph, "torch", given, weights={"w": weight}))


@pytest.mark.parametrize("pays", [1, 10**9], ids=["op by op", "in C"])
def test_two_results_in_one_buffer(pays: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result and a view of it, of which the view is overwritten before the other one is read."""
    monkeypatch.setattr(EMIT, "PAYS", pays)
    at, x, w = Builder(), Value("x", Type("f32", (256, 6))), Weight("w", Type("f32", (256, 256)))
    one = at.exp(at.mul(x, 0.5))
    view = at.reshape(one, shape=(6, 256))
    first = at.cumsum(at.add(view, at.linear(view, w, None)), dim=1)
    graph = graph_of(at, x, at.cumsum(at.add(at.reshape(first, shape=(256, 6)), one), dim=0), w)
    given, weights = torch.rand(256, 6), {"w": torch.rand(256, 256) / 256}
    torch.testing.assert_close(forward(graph, "c", given, weights=weights),
                               forward(graph, "torch", given, weights=weights))


@pytest.mark.parametrize("view", [lambda at, x: at.select(x, dim=1, index=1),
                                  lambda at, x: at.expand(at.select(at.select(x, dim=1, index=1), dim=0, index=0),
                                                          shape=(64,))], ids=["column", "number"])
def test_results_of_one_axis_lie_without_gaps(view: Callable[[Builder, Value], Value],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """What a long kernel leaves to torch is read by a short one in C: it read neighbours, and past the end."""
    monkeypatch.setattr(EMIT, "PAYS", 60)
    at, x = Builder(), Value("x", Type("f32", (64, 3)))
    column = view(at, at.exp(at.mul(x, 0.9)))
    total = at.slice(at.cumsum(column, dim=0), dim=0, start=0, stop=8)
    short = at.add(at.mul(at.slice(column, dim=0, start=0, stop=8), 2.0), total)
    graph = graph_of(at, x, at.add(short, at.sqrt(short)))
    source = load("c").emit(graph)
    assert "op by op" in source and "C = library(" in source
    given = torch.rand(64, 3)
    torch.testing.assert_close(forward(graph, "c", given), forward(graph, "torch", given))


# --- what is written again --------------------------------------------------------------------------------

STEPS: dict[str, Callable[[Builder, Value, int], Value]] = {
    "roll": lambda at, y, step: at.roll(y, shifts=(step + 1,), dims=(1,)),
    "shift": lambda at, y, step: at.cat(at.zeros(Type("f32", (3, step + 1))),
                                        at.slice(y, dim=1, start=0, stop=31 - step), dim=1),
    "turned": lambda at, y, step: at.reshape(at.permute(y, dims=(1, 0)), shape=(3, 32)),
}


@pytest.mark.parametrize("step", list(STEPS))
def test_elements_read_at_several_places_are_not_computed_for_each(step: str) -> None:
    """`y + move(y)`, 20 times over: written where it is read, that is a million times the first one."""
    at, x = Builder(), Value("x", Type("f32", (3, 32)))
    y = x
    for number in range(20):
        y = at.add(at.mul(y, 0.5), STEPS[step](at, y, number))
    graph = graph_of(at, x, y)
    assert len(load("c").emit(graph)) < 200_000
    given = torch.rand(3, 32)
    torch.testing.assert_close(forward(graph, "c", given), forward(graph, "torch", given))


# --- weights -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float16])
def test_weights_of_another_type_at_the_same_place_are_seen(dtype: torch.dtype, backend: str) -> None:
    """Their numbers were read as single precision; those of 16 bits, from twice the memory that they have."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval().requires_grad_(False)
    x = torch.rand(2, 6)
    explainer = dlbc.compile(model, x, backend=backend, cache=False)
    first = [explainer(x).relevance["input"] for _ in range(2)]
    np.testing.assert_array_equal(*first)
    weight = model[0].weight
    weight.data = weight.data.flatten().view(dtype)[:36].view(6, 6)
    with pytest.raises(InputError, match=r"is \w+\[6, 6\] now"):
        explainer(x)


@pytest.mark.parametrize("backend", ["c", "torch"])
def test_outputs_alone_look_at_the_weights_too(backend: str) -> None:
    """`explainer.forward` ran functions in C on a matrix of one number."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval().requires_grad_(False)
    x = torch.rand(2, 6)
    explainer = dlbc.compile(model, x, backend=backend, cache=False)
    outputs, _ = explainer.forward(x)
    np.testing.assert_allclose(outputs["output"], model(x), rtol=1e-5, atol=1e-6)
    model[0].weight.data = torch.rand(1, 1)
    with pytest.raises(InputError, match=r"is f32\[1, 1\] now"):
        explainer.forward(x)
