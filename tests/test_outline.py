"""Outlining: repeated blocks are one function, in the text and in the code; numbers, names and memory stay."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dlbc
from dlbc.backends import load as load_backend
from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Section, Type, Value
from dlbc.ir.dims import symbol
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc.ir.printer import print_graph
from dlbc.ir.verifier import verify
from dlbc.passes import parse, run
from dlbc.passes.inline import Inline
from dlbc.passes.outline import Outline
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.program import load_module
from tests import zoo
from tests.random_graphs import SEQUENCE, WORDS, D, K, Making, Model, T

IDS = torch.tensor([[5, 9, 3, 11, 7], [2, 8, 4, 6, 1]])
BLOCKS = {"llama": "layers", "gpt2": "h", "bert": "layer"}


class Residual(nn.Module):
    """Blocks with a skip, alike but for their weights."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)) for _ in range(depth))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@cache
def model(kind: str, depth: int) -> nn.Module:
    torch.manual_seed(0)
    if kind == "residual":
        return zoo.randomise(Residual(depth))
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        return zoo.randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_layer=depth, n_embd=16, n_head=2, vocab_size=20, n_positions=16)))
    sizes: dict[str, Any] = {"num_hidden_layers": depth, "hidden_size": 16, "intermediate_size": 24,
                             "num_attention_heads": 2, "vocab_size": 20, "max_position_embeddings": 16}
    if kind == "bert":
        return zoo.randomise(transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)))
    return zoo.randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1)))


def inputs(kind: str) -> Tensor:
    return torch.linspace(-1, 1, 24).reshape(4, 6) if kind == "residual" else IDS


@cache
def compiled(kind: str, depth: int, rules: str = "dlb", backend: str = "torch") -> Explainer:
    return dlbc.compile(model(kind, depth), inputs(kind), rules=rules, backend=backend, cache=False)


def calls(graph: Graph) -> Counter[str]:
    return Counter(str(op.attrs["function"]) for _, section in graph.sections() for op in section.ops
                   if op.name == "call")


def test_a_dump_reads_as_one_layer_and_calls() -> None:
    for kind, name in BLOCKS.items():
        graphs = {depth: parse_graph(compiled(kind, depth).ir("lowered")) for depth in (4, 6)}
        for depth, graph in graphs.items():
            found = {function: count for function, count in calls(graph).items() if not function.endswith("_prepare")}
            # The last layer is computed at the explained positions only, or at the one that a classifier reads.
            assert found.pop(f"{name}_forward") == depth - 1, kind
            # What comes of a last layer of one position is summed otherwise in the layer below.
            assert found == {f"{name}_relevance": depth - (2 if kind == "bert" else 1)}, kind
            assert any(f".{name}.*" in op.place for f in graph.functions.values()
                       for op in Section(body=f.body).ops)
        sizes = [{name: len(f.body) for name, f in graph.functions.items()} for graph in graphs.values()]
        assert sizes[0] == sizes[1]
        ops = [sum(len(list(section.ops)) for _, section in graph.sections()) for graph in graphs.values()]
        assert ops[1] - ops[0] <= 2 * (2 + 1)  # two layers more are as many calls


def test_the_code_of_a_block_is_written_once() -> None:
    for kind, name in BLOCKS.items():
        lines = [len(compiled(kind, depth).source.splitlines()) for depth in (4, 6)]
        plain = [len(load_backend("torch").emit(opened(compiled(kind, depth))).splitlines()) for depth in (4, 6)]
        assert (lines[1] - lines[0]) * 3 < plain[1] - plain[0], kind
        assert compiled(kind, 6).source.count(f"def {name}_relevance(") == 1


def opened(explainer: Explainer) -> Graph:
    graph = run(parse_graph(explainer.ir("lowered")), (Inline(),))
    verify(graph)
    return graph


@pytest.mark.parametrize(("kind", "rules", "backend"), [
    ("llama", "dlb", "torch"), ("llama", "attnlrp", "torch"), ("llama", "dlb", "numpy"), ("gpt2", "dlb", "torch"),
    ("gpt2", "input-x-gradient", "torch"), ("bert", "attnlrp", "torch"), ("residual", "dlb", "torch"),
    ("residual", "epsilon", "numpy")])
def test_outlined_code_computes_the_same(kind: str, rules: str, backend: str) -> None:
    explainer = compiled(kind, 4, rules, backend)
    plain = load_module(load_backend(backend).emit(opened(explainer)), "plain")
    own = explainer.programs[explainer.default].module()
    assert "_relevance(" in explainer.source and "_relevance(" not in load_backend(backend).emit(opened(explainer))
    x: list[Any] = [inputs(kind)] + ([torch.tensor([[4], [2]])] if explainer.manifest.positions else [])
    x = x if backend == "torch" else [each.numpy() for each in x]
    found = []
    with torch.inference_mode():
        for module in (own, plain):
            prepared = module.prepare(explainer.weights)
            outputs, state = module.forward(explainer.weights, prepared, *x)
            seed = np.ones((2, *outputs[0].shape), np.float32)
            seed[1] *= np.linspace(-1, 1, seed.shape[-1], dtype=np.float32)
            found.append([*outputs, *module.relevance(
                explainer.weights, prepared, state, torch.from_numpy(seed) if backend == "torch" else seed)])
            assert state == []
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [*BLOCKS, "residual"])
def test_the_interpreter_runs_calls(kind: str) -> None:
    explainer = compiled(kind, 4)
    graph = parse_graph(explainer.ir("lowered"))
    verify(graph)
    assert graph.functions and print_graph(graph) == explainer.ir("lowered")
    assert parse_graph(print_graph(graph)) == graph
    weights = {name: weight.detach().double().numpy() for name, weight in explainer.weights.items()}
    x = {graph.forward.params[0].name: inputs(kind).numpy()}
    if explainer.manifest.positions:
        x[graph.forward.params[1].name] = np.array([[4], [2]])
    assert graph.relevance is not None
    forward = interpret(graph, x, weights)
    seeds = {graph.relevance.params[0].name: np.stack([np.ones_like(forward.outputs[0]), forward.outputs[0]])}
    runs = [interpret(each, x, weights, seeds) for each in (graph, opened(explainer))]
    for one, other in zip(*((*each.outputs, *each.relevance) for each in runs), strict=True):
        np.testing.assert_array_equal(one, other)


# --- random graphs with repetition ---------------------------------------------------------------------

STEPS = st.lists(st.tuples(st.sampled_from(list(SEQUENCE)), st.integers(0, 4), st.integers(0, 4)), min_size=1,
                 max_size=3)


def repeated(steps: list[tuple[str, int, int]], depth: int, skip: int, seed: int) -> Model:
    """A model of `depth` times the same steps, each reading what its block made, its input and that of the first."""
    at = Builder(["ids"])
    m = Making(at, np.random.default_rng(seed), [])
    ids = Value("ids", Type("i64", (symbol("B"), T)))
    at.place = "embed"
    first = at.embedding(ids, m.weight(WORDS, D))
    x = first
    for block in range(depth):
        at.place = f"net.blocks.{block}"
        pool = [x, first]
        m.rng = np.random.default_rng(seed)  # the same choices in every block
        for name, a, b in steps:
            pool.append(SEQUENCE[name](m, pool[-1 - a % len(pool)], pool[-1 - b % len(pool)]))
        x = at.add(pool[-1], x) if (skip + block) % 3 else pool[-1]
    at.place = "head"
    logits = at.linear(at.select(x, dim=1, index=-1), m.weight(K, D), m.weight(K), result="logits")
    rng = np.random.default_rng(seed + 1)
    weights = {name: array if array.dtype == bool or np.isinf(array).any() else
               array + rng.uniform(0, 0.2, array.shape) for name, array in m.weights.items()}
    graph = Graph("repeated", Section((ids,), tuple(at.ops), (logits,)), dims={"B": (1, 8), "S": (1, 8)},
                  weights=m.declared, attrs={"inputs": ("ids",), "outputs": ("logits",)})
    verify(graph)
    return Model(graph, weights, seed)


@settings(max_examples=25, deadline=None)
@given(STEPS, st.integers(2, 4), st.integers(0, 2), st.integers(0, 2**16), st.sampled_from(["dlb", "attnlrp"]),
       st.booleans())
def test_random_repetition_computes_the_same(steps: list[tuple[str, int, int]], depth: int, skip: int, seed: int,
                                             rules: str, ledger: bool) -> None:
    made = repeated(steps, depth, skip, seed)
    before = run(made.graph, parse(f"pair{{composite={rules}}},lower{{ledger={str(ledger).lower()}}},eliminate_common,"
                                   "simplify,eliminate_common,hoist_constants,eliminate_dead"))
    after = Outline(least=-1000).run(before)
    verify(after)
    assert parse_graph(print_graph(after)) == after and Outline(least=-1000).run(after) == after
    again = Inline().run(after)
    verify(again)
    assert Counter(op.name for _, s in again.sections() for op in s.ops) == Counter(
        op.name for _, s in before.sections() for op in s.ops)
    assert before.relevance is not None
    seeds = {before.relevance.params[0].name: made.seeds(2)}
    one, *others = (interpret(g, made.inputs(), made.weights, seeds) for g in (before, after, again))
    for other in others:
        for left, right in zip((*one.outputs, *one.relevance), (*other.outputs, *other.relevance), strict=True):
            np.testing.assert_array_equal(left, right)


def test_random_repetition_is_found() -> None:
    graph = repeated([("linear", 0, 0), ("gelu", 0, 0), ("attention", 0, 1), ("linear", 0, 0)], 4, 0, 3).graph
    found = Outline().run(graph)  # the skips differ: two blocks have it, two have none
    assert calls(found) == {}
    assert calls(Outline(least=-1000).run(graph)) == {"blocks_forward": 2, "blocks_forward_1": 2} or calls(
        Outline(least=-1000).run(graph)) == {"blocks_forward": 2}


# --- what an explainer offers --------------------------------------------------------------------------


def test_everything_else_of_an_explainer_works(tmp_path: Path) -> None:
    explainer, x = compiled("llama", 4), IDS
    expected = explainer(x)
    assert expected.conservation().closes()
    kept = explainer(x, keep="model.layers.1*").nodes
    assert any(name.startswith("model.layers.1") for name in kept)
    places = [row.place for row in explainer.rules()]
    assert {f"model.layers.{layer}.mlp.up_proj" for layer in range(4)} <= set(places)
    drawn = explainer.graph()
    assert "call" not in {data["op"] for _, data in drawn.nodes(data=True)}
    assert {f"model.layers.{layer}.mlp.up_proj" for layer in range(4)} <= {
        data.get("place") for _, data in drawn.nodes(data=True)}
    explainer.save(tmp_path / "e.dlbc", weights=True)
    loaded = dlbc.load(tmp_path / "e.dlbc")
    assert loaded.source == explainer.source and loaded.ir("lowered") == explainer.ir("lowered")
    for name, found in loaded(x).relevance.items():
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected.relevance[name]), rtol=1e-4, atol=1e-5)


def test_graphs_without_repetition_stay_as_they_are() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
                        nn.Linear(16, 2)).eval()
    graph = parse_graph(dlbc.compile(net, x, cache=False).ir("lowered"))
    assert not graph.functions
    assert Outline().run(graph) is graph


def test_blocks_need_no_more_memory() -> None:
    """What the caller reads no more is handed over: the saved values of a layer are freed inside of its function."""
    explainer = compiled("llama", 4, "dlb", "numpy")
    plain = load_module(load_backend("numpy").emit(opened(explainer)), "plain")
    ids, positions = np.arange(160).reshape(10, 16) % 20, np.full((10, 1), 15)
    peaks = []
    for module in (explainer.programs[explainer.default].module(), plain):
        prepared = module.prepare(explainer.weights)
        tracemalloc.start()
        outputs, state = module.forward(explainer.weights, prepared, ids, positions)
        tracemalloc.reset_peak()
        module.relevance(explainer.weights, prepared, state, np.ones((4, *outputs[0].shape), np.float32))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] <= 1.02 * peaks[1]
