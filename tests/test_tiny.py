"""Read this first: the whole system in a page, on a network one can work out by hand."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import dlbc
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc.ir.printer import print_graph
from dlbc.ir.verifier import verify
from dlbc.passes import parse, run

X = torch.tensor([[2.0, 1.0]])


def net() -> nn.Module:
    """relu(x0 + x1), relu(x0 - 3 x1); their sum. For x = (2, 1): relu(3) + relu(-1) = 3."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -3.0]]))
        model[2].weight.fill_(1.0)
    return model


def test_an_explanation() -> None:
    """The output is 3, of which x0 gave 2 and x1 gave 1: two thirds and one third of 100."""
    explanation = dlbc.compile(net(), X, rules="epsilon", cache=False)(X)
    np.testing.assert_allclose(explanation.outputs["output"], [[3.0]])
    np.testing.assert_allclose(explanation.relevance["input"], [[200 / 3, 100 / 3]], rtol=1e-4)


def test_the_books_balance() -> None:
    ledger = dlbc.compile(net(), X, rules="epsilon", cache=False)(X).conservation()
    assert ledger.closes()
    assert [row.op for row in ledger.rows if row.rule == "epsilon"] == ["to_multiplier", "linear", "linear"]


def test_input_x_gradient_is_what_autograd_says() -> None:
    x = X.clone().requires_grad_(True)
    net()(x).sum().backward()
    found = dlbc.compile(net(), X, rules="input-x-gradient", cache=False)(X, multiplier=1.0)
    np.testing.assert_allclose(found.relevance["input"], (x * x.grad).detach(), rtol=1e-6)


def test_every_level_is_text_that_reads_back_and_runs() -> None:
    """exported, canonical, paired, lowered: the same forward, whatever the passes did."""
    explainer = dlbc.compile(net(), X, rules="epsilon", cache=False)
    weights = {name: weight.detach().double().numpy() for name, weight in explainer.weights.items()}
    for level in ("exported", "canonical", "paired", "lowered"):
        graph = parse_graph(explainer.ir(level))
        verify(graph)
        assert print_graph(graph) == explainer.ir(level)
    (seed,) = graph.relevance.params if graph.relevance is not None else ()
    ran = interpret(graph, {"input": X.double().numpy()}, weights, {seed.name: np.array([[[100.0]]])})
    np.testing.assert_allclose(ran.outputs[0], [[3.0]])
    np.testing.assert_allclose(ran.relevance[0], [[[200 / 3, 100 / 3]]], rtol=1e-4)


def test_a_pass_reads_a_graph_and_returns_one() -> None:
    graph = parse_graph("""
        graph @tiny(B: 1..8)
        weights { @w : f32[2,2] }
        forward(%x : f32[B,2]) {
          %h      = linear(%x, @w) : f32[B,2]
          %unused = relu(%h)       : f32[B,2]
          return %h
        }""")
    lowered = run(graph, parse("eliminate_dead,pair{composite=dlb},lower"))
    assert [op.name for op in lowered.forward.ops] == ["linear"]
    assert lowered.relevance is not None
    assert not any(op.name.startswith("rel.") for op in lowered.relevance.ops)


def test_the_code_is_meant_to_be_read() -> None:
    source = dlbc.compile(net(), X, rules="epsilon", cache=False).source
    for line in ("def prepare(w):", "def forward(w, p, input):", "def relevance(w, p, state, "):
        assert line in source
