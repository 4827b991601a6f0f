"""Fusion: ops in kernels compute what they did, kernels are what their templates say, and the text reads back."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dlbc
from dlbc.backends.footprint import plan_of
from dlbc.backends.moves import MOVED
from dlbc.backends.triton import overwriting, refused
from dlbc.backends.triton.row import RowWriter
from dlbc.backends.triton.table import TABLE
from dlbc.ir.core import Graph, Kernel
from dlbc.ir.dims import evaluate, parse_dim
from dlbc.ir.fusible import MOVES, POINTWISE, ROWWISE, VIEWS, is_product, is_row, template_of
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc.ir.printer import print_graph
from dlbc.passes import parse, run
from dlbc.passes.fuse import Fuse
from dlbc_runtime.memory import Plan
from tests import zoo
from tests.random_graphs import Model, models
from tests.test_passes import numbers

LOWER = "pair{composite=%s},lower,eliminate_common,simplify,eliminate_common,eliminate_dead"


def kernels(graph: Graph) -> list[Kernel]:
    """Every kernel of a graph."""
    bodies = [section.body for _, section in graph.sections()] + [f.body for f in graph.functions.values()]
    return [item for body in bodies for item in body if isinstance(item, Kernel)]


def check(graph: Graph) -> Graph:
    """The fused graph, which reads back from its text and whose kernels are what their templates hold."""
    fused = run(graph, (Fuse(),), verified=True)
    text = print_graph(fused)
    assert print_graph(parse_graph(text)) == text
    assert run(fused, (Fuse(),)) == fused or kernels(run(fused, (Fuse(),)))[:1] == kernels(fused)[:1]
    for kernel in kernels(fused):
        shapes = {r.type.shape for r in kernel.results}
        products, rows = [op for op in kernel.body if is_product(op)], [op for op in kernel.body if is_row(op)]
        assert kernel.results and len(kernel.body) <= Fuse().longest
        assert len(products) <= 2
        assert kernel.template == (template_of(products[0]) if products else "row" if rows else "elementwise")
        if kernel.template != "row":
            assert len(shapes) == 1
        assert any(op.name not in VIEWS for op in kernel.body)
    names = [kernel.name for kernel in kernels(fused)]
    assert len(set(names)) == len(names)
    assert not refused(fused)
    return fused


@settings(max_examples=25)
@given(models(), st.sampled_from(["dlb", "epsilon", "gamma", "attnlrp", "alpha2-beta1"]))
def test_random_graphs_compute_the_same(model: Model, rules: str) -> None:
    graph = run(model.graph, parse(LOWER % rules))
    fused = check(graph)
    assert graph.relevance is not None
    (seed,) = graph.relevance.params
    seeds = {seed.name: model.seeds(2)}
    before, after = (interpret(g, model.inputs(), model.weights, seeds) for g in (graph, fused))
    for x, y in zip((*after.outputs, *after.relevance), (*before.outputs, *before.relevance), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


@cache
def lowered(name: str, rules: str) -> Graph:
    """The lowered graph of a model of the zoo."""
    if not zoo.available(name):
        pytest.skip(f"needs {', '.join(zoo.NEEDS[name])}")
    case = zoo.CASES[name]()
    args = case.kwargs or case.args
    explainer = dlbc.compile(case.model, args, rules=rules, backend="torch", cache=False)
    return parse_graph(explainer.ir("lowered"))


ZOO = [("mlp_batch_norm", "dlb"), ("resnet18_small", "epsilon-plus"), ("unet_small", "dlb"), ("bert", "attnlrp"),
       ("vit", "dlb"), ("llama", "dlb"), ("gpt2", "attnlrp"), ("rotary_halves", "gamma")]


@pytest.mark.parametrize(("name", "rules"), ZOO)
def test_models_compute_the_same(name: str, rules: str) -> None:
    graph = lowered(name, rules)
    fused = check(graph)
    assert sum(len(kernel.body) for kernel in kernels(fused)) > 0.4 * sum(
        op.name not in VIEWS for _, section in graph.sections() for op in section.ops if op.name != "call")
    sizes = {str(dim): 2 for dim in graph.dims} | {"T": 5}
    inputs = numbers({p.name: p for p in graph.forward.params}, sizes)
    weights = numbers(graph.weights, sizes)
    assert graph.relevance is not None
    seeds = numbers({p.name: p for p in graph.relevance.params}, sizes)
    before, after = (interpret(g, inputs, weights, seeds) for g in (graph, fused))
    for x, y in zip((*after.outputs, *after.relevance), (*before.outputs, *before.relevance), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9 * max(1.0, float(np.abs(y).max())))


def test_the_plan_counts_what_kernels_return_alone() -> None:
    """Values inside of kernels are in registers: fewer steps, fewer bytes written, and no more held at once."""
    fused = run(lowered("llama", "dlb"), (Fuse(),))
    sizes = {"B": 2, "T": 64, "P": 1, "K": 1, "S": 4}
    whole, opened = (plan_of(fused, overwriting, fused=flag) for flag in (True, False))
    assert len(whole.steps) < 0.6 * len(opened.steps)
    (held, written), (held_opened, written_opened) = (_bytes(plan, sizes) for plan in (whole, opened))
    assert 0 < held <= held_opened and written < written_opened


def _bytes(plan: Plan, sizes: dict[str, int]) -> tuple[int, int]:
    """The most bytes that are held at one step of a plan, and those of all its buffers."""
    found = [evaluate(parse_dim(text), sizes) for text in plan.sizes]
    held = (sum(found[size] for size, first, last, _ in plan.buffers if first <= at <= last)
            for at in range(len(plan.steps)))
    return max(held), sum(found[size] for size, *_ in plan.buffers)


def test_every_op_that_may_be_in_a_kernel_has_code() -> None:
    assert set(TABLE) == POINTWISE
    assert set(MOVED) == MOVES
    assert all(hasattr(RowWriter, f"_{name}") for name in ROWWISE)


def test_the_absolute_rule_is_one_kernel_with_the_forward_product() -> None:
    """z = x W^T and D = |x| |W|^T + |b| share x and W; gate and up, which share x, stand apart from them."""
    graph = parse_graph("""
        graph @pair(B: 1..8)
        weights { @w : f32[6,4]  @b : f32[6] }
        forward(%x : f32[B,4]) {
          %z  = linear(%x, @w, @b)     : f32[B,6]
          %ax = abs(%x)                : f32[B,4]
          %aw = abs(@w)                : f32[6,4]
          %ab = abs(@b)                : f32[6]
          %d  = linear(%ax, %aw, %ab)  : f32[B,6]
          return %z, %d
        }""")
    (kernel,) = kernels(run(graph, (Fuse(),), verified=True))
    assert kernel.template == "gemm" and [r.name for r in kernel.results] == ["z", "d"]


def test_identical_blocks_are_one_function_of_the_module() -> None:
    """Repeated kernels are written once, whether they are in a repeated block or not."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(layer for _ in range(3) for layer in (torch.nn.Linear(8, 8), torch.nn.SiLU()))).eval()
    explainer = dlbc.compile(model, torch.randn(2, 8), rules="dlb", backend="triton", target="sm_90", cache=False)
    source = explainer.source
    launched = source.count("launch(")
    assert launched - 1 > source.count("@triton.jit")
    names = [line.split("(")[0] for line in source.splitlines() if line.startswith("def gemm_")]
    assert len(names) == len(set(names))


def test_what_nobody_reads_makes_no_kernel() -> None:
    """A kernel without results would not read back."""
    graph = parse_graph("""
        graph @dead(B: 1..8)
        weights { @w : f32[3,4] }
        forward(%x : f32[B,4]) {
          %dead = linear(%x, @w) : f32[B,3]
          %a    = exp(%x)        : f32[B,4]
          %y    = tanh(%a)       : f32[B,4]
          return %y
        }""")
    fused = Fuse().run(graph)
    assert [kernel.template for kernel in kernels(fused)] == ["elementwise"]
    assert print_graph(parse_graph(print_graph(fused))) == print_graph(fused)


def test_pairing_with_a_value_that_only_copies_stand_for_is_dropped() -> None:
    """A cheap op of the forward pass is copied to its readers; relevance ops may have been paired with it."""
    graph = parse_graph("""
        graph @copied(B: 1..8, S: 1..8)
        weights { @w : f32[3,4]  @v : f32[3,4] }
        forward(%x : f32[B,4]) {
          %h = relu(%x)       : f32[B,4]
          %y = linear(%h, @w) : f32[B,3]
          %k = tanh(%y)       : f32[B,3]
          %z = linear(%h, @v) : f32[B,3]
          %o = mul(%k, %z)    : f32[B,3]
          return %o, %k save %x
        }
        relevance(%R.o : f32[S,B,3]) {
          %M   = matmul(%R.o, @w) of %h : f32[S,B,4]
          %R.x = mul(%M, %x) of %x      : f32[S,B,4]
          return %R.x
        }""")
    fused = run(graph, (Fuse(),), verified=True)
    assert "h" not in {r.name for op in fused.forward.ops for r in op.results}
    assert fused.relevance is not None and [op.of for op in fused.relevance.ops] == ["", "x"]
