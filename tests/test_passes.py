"""The canonicalising passes: what a graph computes stays the same (to 1e-10 in float64), and the ops of the
field are found.

Every example of `filecheck/passes/` that these passes run on is also run before and after, with numbers; so
is every model of the zoo that is listed here, after every pass of the pipeline.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlbc.ir.builder import Builder
from dlbc.ir.core import FLOATS, Graph, Section, Type, Value, Weight
from dlbc.ir.dims import evaluate, symbol
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc.ir.printer import print_graph
from dlbc.ir.verifier import verify
from dlbc.passes import Pass, parse, run
from dlbc.passes.canonicalise import Canonicalise
from dlbc.passes.eliminate_dead import EliminateDead
from dlbc.passes.fold_masks import FoldMasks
from dlbc.passes.pipeline import CANONICALISE
from tests import zoo

FOLDER = Path(__file__).parent / "filecheck" / "passes"
OWN = [*sorted({p.name for p in CANONICALISE} - {"eliminate_dead"}), "simplify", "group_experts"]
SIZES = ({"B": 3, "T": 5, "U": 7, "S": 2}, {"B": 1, "T": 4, "U": 2, "S": 1})
TOLERANCE = 1e-10

Arrays = dict[str, np.ndarray]

# --- the examples ------------------------------------------------------------------------------------


def examples() -> list[tuple[str, str, int]]:
    """Name of the graph, passes, number of the graph in its file."""
    found = []
    for name in OWN:
        text = (FOLDER / f"{name}.dlir").read_text()
        passes = re.search(r"-p (\S+)", text)
        assert passes is not None
        graphs = re.split(r"^// -----", text, flags=re.MULTILINE)
        found += [(name, passes[1], number) for number in range(len(graphs))]
    return found


def numbers(values: Mapping[str, Value | Weight], sizes: dict[str, int]) -> Arrays:
    """Random arrays of the types of values: ids and masks of 0 and 1 where key 0 is seen, positive variances."""
    arrays: Arrays = {}
    for name, value in values.items():
        source = np.random.default_rng(zlib.crc32(name.encode()))
        shape = tuple(evaluate(dim, sizes) for dim in value.type.shape)
        array = source.normal(size=shape)
        if name.startswith("v") and isinstance(value, Weight):
            array = array**2 + 0.1
        if value.type.dtype not in FLOATS:
            array = source.integers(0, 2, size=shape)
            array[..., :1] = name != "hidden"
        arrays[name] = array.astype(bool) if value.type.dtype == "bool" else array
    return arrays


def outputs(graph: Graph, sizes: dict[str, int]) -> tuple[np.ndarray, ...]:
    weights = numbers(graph.weights, sizes)
    inputs = numbers({p.name: p for p in graph.forward.params}, sizes)
    if graph.relevance is None:
        return interpret(graph, inputs, weights).outputs
    return interpret(graph, inputs, weights, numbers({p.name: p for p in graph.relevance.params}, sizes)).relevance


def assert_close(after: tuple[np.ndarray, ...], before: tuple[np.ndarray, ...], what: str) -> None:
    assert len(after) == len(before)
    for x, y in zip(after, before, strict=True):
        np.testing.assert_allclose(x, y, rtol=TOLERANCE, atol=TOLERANCE, err_msg=what)


@pytest.mark.parametrize(("name", "passes", "number"), examples())
def test_example_computes_the_same(name: str, passes: str, number: int) -> None:
    graph = parse_graph(re.split(r"^// -----", (FOLDER / f"{name}.dlir").read_text(), flags=re.MULTILINE)[number])
    rewritten = run(graph, parse(passes))
    verify(rewritten)
    for sizes in SIZES:
        if all(sizes[dim] <= high for dim, (_, high) in graph.dims.items()):
            assert_close(outputs(rewritten, sizes), outputs(graph, sizes), f"{graph.name} with {sizes}")


# --- the zoo -----------------------------------------------------------------------------------------

LLAMAS = ["llama", "llama_eager", "llama_ids_only", "llama_multi_head", "llama_embeds", "llama_classifier", "qwen2",
          "qwen3", "mistral", "mistral_eager", "gemma2", "gemma3", "gemma3_eager"]
ENCODERS = ["bert", "bert_eager", "roberta", "distilbert_eager", "albert", "vit", "vit_eager", "xlnet",
            "torch_encoder", "torch_encoder_masked", "torch_encoder_causal"]
OTHERS = ["gpt2", "gpt2_eager", "gpt2_ids_only", "mlp_batch_norm", "resnet18_small", "densenet_small",
          "mobilenet_like", "conv_transpose2d", "attention_by_hand", "attention_single_head",
          "cross_attention_causal", "cross_attention_grouped", "multihead_attention_weights", "rotary_halves",
          "rotary_interleaved", "gated_mlp", "glu", "gelu_by_hand", "gelu_erf_by_hand", "gelu_quick", "silu_by_hand",
          "layer_norm_by_hand", "rms_norm_by_hand", "rms_norm_plus_one", "instance_norm_tracking", "batch_norm_plain",
          "two_outputs_tuple", "output_is_input", "tied_autoencoder", "shared_module", "move_dtype", "move_reshape",
          "move_transpose", "move_squeeze", "multiply_two", "bfloat16"]


@cache
def imported(name: str) -> tuple[zoo.Case, Any]:
    if not zoo.available(name):
        pytest.skip(f"needs {', '.join(zoo.NEEDS[name])}")
    from dlbc.frontends.torch_export import import_model

    case = zoo.CASES[name]()
    return case, import_model(case.model, case.args, case.kwargs)


@cache
def raised(name: str) -> Graph:
    return run(imported(name)[1].graph, CANONICALISE)


def ops(name: str) -> Counter[str]:
    return Counter(op.name for op in raised(name).forward.ops)


def array(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().double() if tensor.is_floating_point() else tensor.detach())


def attended(result: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """A result without its rows of padding: what eager attention computes there differs (`raise_attention`)."""
    per_token = mask is not None and result.ndim == 3 and result.shape[:2] == mask.shape
    return result[mask.astype(bool)] if mask is not None and per_token else result


@pytest.mark.parametrize("name", LLAMAS + ENCODERS + OTHERS)
def test_every_pass_keeps_what_a_model_computes(name: str) -> None:
    case, model = imported(name)
    weights = {key: array(tensor) for key, tensor in model.weights.items()}
    stages: list[tuple[str, Graph]] = [("import", model.graph)]
    run(model.graph, CANONICALISE, observe=lambda step, graph: stages.append((str(step), graph)))
    for args, kwargs in case.other[-2:]:
        inputs = {key: array(tensor) for key, tensor in model.inputs.bind(args, kwargs).items()}
        mask = inputs.get("attention_mask")
        before: tuple[np.ndarray, ...] | None = None
        last: Graph | None = None
        for step, graph in stages:
            if last is not None and (graph.forward, graph.prepare) == (last.forward, last.prepare):
                continue
            verify(graph)
            after = tuple(attended(r, mask) for r in interpret(graph, inputs, weights).outputs)
            if before is not None:
                assert_close(after, before, f"{name} after {step}")
            before, last = after, graph


DECOMPOSED = {"softmax", "pow", "rsqrt", "where", "sigmoid", "silu", "gelu", "matmul", "neg", "le", "gt", "eq",
              "bitwise_and", "logical_and", "cumsum", "triangle"}


@pytest.mark.parametrize("name", LLAMAS)
def test_llamas_are_made_of_few_ops(name: str) -> None:
    """Two layers: attention, rotary, norms and gated products; no trace of masks or repeated heads."""
    found = ops(name)
    norms = {"qwen3": 9, "gemma2": 9, "gemma3": 13, "gemma3_eager": 13}.get(name, 5)
    assert (found["attention"], found["rotary"], found["glu"], found["rms_norm"]) == (2, 4, 2, norms)
    assert not DECOMPOSED & set(found), found
    for op in raised(name).forward.ops:
        if op.name == "attention":
            assert op.attrs["causal"] is True
            assert len({v.type.shape[1] for v in op.operands[1:3] if isinstance(v, Value)}) == 1
            masked = "attention_mask" in {p.name for p in raised(name).forward.params}
            assert [str(m.type) for m in op.operands[3:] if isinstance(m, Value)] == ["bool[B,1,1,T]"] * masked


def attentions(name: str) -> list[dict[str, object]]:
    return [dict(op.attrs) for op in raised(name).forward.ops if op.name == "attention"]


@pytest.mark.parametrize("name", ["mistral", "mistral_eager"])
def test_windows(name: str) -> None:
    assert [attrs.get("window") for attrs in attentions(name)] == [4, 4]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma3_eager"])
def test_layers_with_and_without_window(name: str) -> None:
    assert [attrs.get("window") for attrs in attentions(name)] == [4, None]


def test_soft_capping() -> None:
    assert [attrs["softcap"] for attrs in attentions("gemma2")] == [5.0, 5.0]
    assert ops("gemma2")["tanh"] == 1  # that of the logits


@pytest.mark.parametrize("name", ["gpt2", "gpt2_eager", "gpt2_ids_only"])
def test_gpt2(name: str) -> None:
    found = ops(name)
    assert (found["attention"], found["gelu"], found["linear"], found["layer_norm"]) == (2, 2, 9, 5)
    assert not (DECOMPOSED - {"gelu"}) & set(found), found
    assert all(attrs["causal"] is True for attrs in attentions(name))


@pytest.mark.parametrize("name", ["bert", "bert_eager", "torch_encoder_masked", "torch_encoder_causal"])
def test_encoders_keep_the_padding_mask(name: str) -> None:
    graph = raised(name)
    masks = [op.operands[3] for op in graph.forward.ops if op.name == "attention"]
    assert [str(m.type) for m in masks if isinstance(m, Value)] == ["bool[B,1,1,T]"] * 2
    assert [attrs.get("causal", False) for attrs in attentions(name)] == [name == "torch_encoder_causal"] * 2
    assert ops(name)["select"] <= 1  # q, k, v are slices of one layer


@pytest.mark.parametrize("name", ["mlp_batch_norm", "resnet18_small", "instance_norm_tracking", "batch_norm_plain"])
def test_batch_norms_after_layers_are_gone(name: str) -> None:
    assert ops(name)["batch_norm"] == (1 if name == "mlp_batch_norm" else 0)  # that one comes first


@pytest.mark.parametrize(("name", "op"), [
    ("gelu_by_hand", "gelu"), ("gelu_erf_by_hand", "gelu"), ("gelu_quick", "gelu"), ("silu_by_hand", "silu"),
    ("layer_norm_by_hand", "layer_norm"), ("rms_norm_by_hand", "rms_norm"), ("rms_norm_plus_one", "rms_norm")])
def test_by_hand(name: str, op: str) -> None:
    assert ops(name) == {"linear": 2, op: 1}


def test_attention_without_a_head_axis_stays() -> None:
    assert ops("attention_single_head")["softmax"] == 1


@pytest.mark.parametrize("name", ["llama", "gemma3_eager", "torch_encoder_causal", "resnet18_small", "gpt2"])
def test_the_order_is_complete(name: str) -> None:
    """The pipeline on its own result changes nothing any more, and twice the same graph gives the same text."""
    once = raised(name)
    again = run(once, CANONICALISE)
    assert Counter(op.name for op in again.forward.ops) == ops(name)
    assert print_graph(run(imported(name)[1].graph, CANONICALISE)) == print_graph(once)


# --- any mask ----------------------------------------------------------------------------------------

B, T, U = symbol("B"), symbol("T"), symbol("U")


@st.composite
def masked_attention(draw: st.DrawFn) -> Graph:
    """An attention op under a random mask made of positions, padding and logic, boolean or additive."""
    keys = draw(st.sampled_from([T, U]))
    q, k = Value("q", Type("f32", (B, 2, T, 4))), Value("k", Type("f32", (B, 2, keys, 4)))
    pad = Value("pad_mask", Type(draw(st.sampled_from(["i64", "bool"])), (B, keys)))
    at = Builder(("q", "k", "pad_mask"))
    query = at.reshape(at.arange(stop=T), shape=(1, 1, T, 1))
    key = at.reshape(at.arange(stop=keys), shape=(1, 1, 1, keys))
    batch = at.reshape(at.arange(stop=B), shape=(B, 1, 1, 1))

    def atom() -> Value:
        kind = draw(st.sampled_from(["order", "order", "seen", "seen_by_index", "triangle", "constant"]))
        if kind == "order":
            name = draw(st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"]))
            shifted = at.add(query, draw(st.integers(-3, 3))) if draw(st.booleans()) else query
            pair = (key, shifted) if draw(st.booleans()) else (shifted, key)
            pair = (pair[0], draw(st.integers(-2, 3))) if draw(st.integers(0, 4)) == 0 else pair
            return at.op(name, *pair)[0]
        if kind == "seen":
            return at.reshape(at.cast(pad, dtype="bool"), shape=(B, 1, 1, keys))
        if kind == "seen_by_index":
            return at.ne(at.index(pad, batch, key, dims=(0, 1)), 0) if pad.type.dtype == "i64" else at.index(
                pad, batch, key, dims=(0, 1))
        filled = at.full(shape=(T, keys) if kind == "triangle" else (), value=draw(st.booleans()), dtype="bool")
        if kind == "constant":
            return filled
        return at.triangle(filled, upper=draw(st.booleans()), diagonal=draw(st.integers(-2, 2)))

    def condition(depth: int) -> Value:
        kind = draw(st.sampled_from(["atom", "and", "and", "or", "not", "where"])) if depth else "atom"
        if kind == "atom":
            return atom()
        if kind == "not":
            return at.logical_not(condition(depth - 1))
        if kind == "where":
            return at.where(condition(depth - 1), condition(depth - 1), draw(st.booleans()))
        name = draw(st.sampled_from(["logical_", "bitwise_"])) + kind
        return at.op(name, condition(depth - 1), condition(depth - 1))[0]

    mask = condition(draw(st.integers(0, 4)))
    form = draw(st.sampled_from(["bool", "where", "arithmetic", "two"]))
    if form == "where":
        mask = at.where(mask, 0.0, float("-inf")) if draw(st.booleans()) else at.where(
            at.logical_not(mask), float("-inf"), 0.0)
    if form == "arithmetic":
        mask = at.mul(at.sub(1.0, at.cast(mask, dtype="f32")), -1e30)
    if form == "two":
        mask = at.add(at.where(mask, 0.0, -1e30), at.where(condition(1), 0.0, -1e30))
    if draw(st.booleans()) and mask.type.rank == 4:
        mask = at.expand(mask, shape=(B, 1, T, keys))
    y = at.attention(q, k, k, mask, scale=0.5)
    # A mask that is nowhere true adds the same to all keys, which is no mask: only rows that see a key count.
    seen = mask if mask.type.dtype == "bool" else at.ge(mask, -1.0)
    everywhere = at.full(shape=(B, 1, T, keys), value=True, dtype="bool")
    seen = at.any(at.logical_and(seen, everywhere), dims=(3,), keepdim=True)
    y = at.where(seen, y, 0.0)
    return Graph("masked", Section((q, k, pad), tuple(at.ops), (y,)), {"B": (1, 9), "T": (1, 9), "U": (1, 9)})


@settings(max_examples=100)
@given(masked_attention())
def test_any_mask_folds_into_what_it_says(graph: Graph) -> None:
    steps: tuple[Pass, ...] = (FoldMasks(), EliminateDead(), Canonicalise(), EliminateDead())
    folded = run(graph, steps)
    for sizes in ({"B": 2, "T": 5, "U": 3}, {"B": 3, "T": 2, "U": 6}, {"B": 1, "T": 1, "U": 1}):
        assert_close(outputs(folded, sizes), outputs(graph, sizes), print_graph(graph) + print_graph(folded))
