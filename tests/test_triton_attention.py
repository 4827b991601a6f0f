"""Attention by Triton kernels: the pass, what kernels compute (in Triton's interpreter), and how they compile.

No GPU is needed; races and speed are not seen here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dlbc
from dlbc.backends.triton.config import device
from dlbc.backends.triton.emit import emit, refused
from dlbc.ir.attention_tiles import Kind, Unfit, region_of
from dlbc.ir.core import Graph, Kernel, Op, Type, Value
from dlbc.ir.dims import evaluate
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc.ir.printer import print_graph
from dlbc.ir.verifier import verify
from dlbc.passes import run
from dlbc.passes.fuse_attention import FuseAttention, declined
from dlbc.passes.stream_attention import StreamAttention
from dlbc_runtime.module import load_module
from tests.test_reference import DTYPES
from tests.test_stream import CASES, RULES, attention, interpreted, lowered
from tests.triton_attention_runs import OTHERS, Run, graph_of

HERE = Path(__file__).parent


def kernels(graph: Graph) -> list[Kernel]:
    """The kernels of a graph, those of repeated blocks too."""
    bodies = [section.body for _, section in graph.sections()] + [f.body for f in graph.functions.values()]
    return [item for body in bodies for item in body if isinstance(item, Kernel)]


# --- the pass ----------------------------------------------------------------------------------------


def check(graph: Graph, fused: Graph, sizes: dict[str, int]) -> None:
    """The same numbers; text that parses; nothing with queries and keys leaves a kernel."""
    verify(fused)
    assert print_graph(parse_graph(print_graph(fused))) == print_graph(fused)
    for a, b in zip(interpreted(fused, sizes), interpreted(graph, sizes), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    for kernel in kernels(fused):
        (op,) = kernel.body
        region = region_of(op, fused.functions)
        assert kernel.template == "attention" and kernel.results == op.results
        assert not any(set("rk") <= set(region.tiles[v.name].axes) for v in region.function.results)
        assert not any(set("rk") <= set(region.tiles[name].axes) and region.kinds[name] is not Kind.WEIGHTS
                       for name in region.handed)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
def test_every_region_becomes_a_kernel(case: str, rule: str) -> None:
    graph = lowered(attention(**CASES[case]), rule)
    assert graph.relevance is not None
    for forward in (False, True):
        fused = run(graph, [FuseAttention(forward=forward)])
        streams = sum(op.name == "stream" for op in graph.relevance.ops)
        assert len(kernels(fused)) == streams + forward
        assert [reason for _, reason in declined(fused)] == [
            "the array library's fused attention is at least as fast"] * (not forward)
        check(graph, fused, {"B": 2, "T": 7, "U": 5, "S": 3})


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(RULES), st.booleans(), st.sampled_from([None, 1, 3]), st.sampled_from(["", "keys", "bool"]),
       st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]), st.tuples(*[st.integers(1, 9)] * 2))
def test_any_shape(rule: str, causal: bool, window: int | None, mask: str, heads: tuple[int, int],
                   lengths: tuple[int, int]) -> None:
    attrs: dict[str, Any] = {"causal": causal, "window": window if causal else None}
    graph = lowered(attention(heads=heads[0], groups=heads[1], mask=mask, **attrs), rule)
    check(graph, run(graph, [FuseAttention()]), {"B": 2, "T": lengths[0], "U": lengths[1], "S": 2})


@pytest.mark.parametrize(("kind", "rules"), [
    *(("llama", rules) for rules in ("attnlrp", "cp-lrp", "dlb", "epsilon", "gamma", "auto")),
    ("bert", "attnlrp"), ("gpt2", "dlb"), ("gemma2", "attnlrp")])
def test_presets_on_models(kind: str, rules: str) -> None:
    """Every attention layer that sees more than one query is a kernel, under every preset; repeated blocks share it."""
    model, inputs = _model(kind)
    explainer = dlbc.compile(model, inputs, rules=rules, backend="torch", cache=False)
    graph = parse_graph(explainer.ir("lowered"))
    fused = run(graph, [FuseAttention()])
    verify(fused)
    assert kernels(fused) and all("one query or key" in reason or "fused attention" in reason
                                  for _, reason in declined(fused))
    assert not refused(fused)
    weights = {name: w.detach().double().numpy() for name, w in explainer.weights.items()}
    sizes, random = {"B": 2, "T": 6, "S": 2, "P": 2, "K": 1}, np.random.default_rng(0)

    def array(type_: Type) -> np.ndarray:
        shape = [evaluate(d, sizes) for d in type_.shape]
        return random.normal(size=shape) if type_.floating else np.minimum(random.integers(0, 5, shape), 1)

    assert graph.relevance is not None
    inputs, seeds = ({p.name: array(p.type) for p in part.params} for part in (graph.forward, graph.relevance))
    first, second = (interpret(g, inputs, weights, seeds).relevance for g in (graph, fused))
    for a, b in zip(second, first, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def _model(kind: str) -> tuple[torch.nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 4}
    model = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, num_key_value_heads=2)),
        "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**small)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=31, n_embd=16, n_layer=2, n_head=4)),
        "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(
            **small, num_key_value_heads=2, head_dim=4, sliding_window=4, attn_implementation="eager")),
    }[kind]()
    ids = torch.randint(2, 31, (2, 6))
    return model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if kind == "bert" else ids


_P = "%p = attention_weights(%q, %k) {scale=0.5} : f32[B,2,T,U]\n"


@pytest.mark.parametrize(("body", "said"), [
    ("%all = sum(%p) {dims=[-2,-1], keepdim=true} : f32[B,2,1,1]\nreturn %all", "`sum` is over several axes"),
    ("%m = matmul(%p, %v) : f32[B,2,T,3]\n%w = add(%m, %R.y) : f32[S,B,2,T,3]\n%x = roll(%w) {shifts=[1], dims=[0]} : "
     "f32[S,B,2,T,3]\n%vt = permute(%v) {dims=[0,1,3,2]} : f32[B,2,3,U]\n%n = matmul(%x, %vt) : f32[S,B,2,T,U]\n"
     "%o = mul(%p, %n) : f32[S,B,2,T,U]\n%z = matmul(%o, %v) : f32[S,B,2,T,3]\nreturn %z",
     "no tile can compute `roll`"),
])
def test_a_region_that_no_kernel_takes_stays_and_says_why(body: str, said: str) -> None:
    text = OTHERS["reductions"].split("relevance")[0] + f"relevance(%R.y : f32[S,B,2,T,3]) {{\n{_P}{body}\n}}\n"
    fused = run(parse_graph(text), [StreamAttention(), FuseAttention()])
    assert not kernels(fused) and any(said in reason for _, reason in declined(fused)), declined(fused)


@pytest.mark.parametrize(("change", "said"), [
    ({"dtype": "f64"}, "computes with f64"), ({"width": 512}, "a head has 512 numbers, more than 256"),
])
def test_element_types_and_widths_that_no_kernel_takes(change: dict[str, Any], said: str) -> None:
    asked: Run = {"case": "plain", "rule": "dlb", "sizes": [], "seeds": 1, "dtype": "f32", "width": 3}
    fused = run(graph_of({**asked, **change}), [FuseAttention(forward=True)])  # type: ignore[typeddict-item]
    assert [item.name for item in fused.forward.body if isinstance(item, Op)] == ["attention"]
    assert any(said in reason for _, reason in declined(fused))
    with pytest.raises(Unfit, match=said):
        region_of(fused.forward.definitions()["y"], fused.functions)


# --- what kernels compute ----------------------------------------------------------------------------


def asked(case: str, rule: str = "dlb", sizes: tuple[int, ...] = (1, 37, 37, 1), *, seeds: int = 1, dtype: str = "f32",
          width: int = 3) -> Run:
    return {"case": case, "rule": rule, "sizes": list(sizes), "seeds": seeds, "dtype": dtype, "width": width}


RUNS = [
    *(asked(case) for case in CASES),
    *(asked("window", rule) for rule in RULES if rule != "dlb"),
    asked("causal", "attnlrp", (1, 37, 9, 1)), asked("padding", "absolute", (2, 5, 40, 1)),
    asked("softcap", "gradient"), asked("additive", "attnlrp", (1, 9, 70, 1)),
    asked("self_causal", "attnlrp", (1, 140, 140, 1), width=20),
    asked("heads", "attnlrp", (1, 20, 37, 3), seeds=2), asked("self_causal", "dlb", (1, 37, 37, 3), seeds=2),
    asked("sinks", "attnlrp", (1, 37, 37, 3), seeds=2), asked("window_sinks", "attnlrp", (2, 37, 20, 1)),
    asked("sinks", "dlb", dtype="f16", width=8),
    asked("plain", "dlb", dtype="f16", width=20), asked("heads", "attnlrp", dtype="f16", width=8),
    asked("reductions", sizes=(2, 37, 21, 3)), asked("reductions", sizes=(1, 9, 41, 3), seeds=2),
]


@pytest.fixture(scope="module")
def differences() -> list[tuple[float, float]]:
    """How far kernels and torch are from the float64 interpreter, for each run."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-m", "tests.triton_attention_runs"], input=json.dumps(RUNS),
                          capture_output=True, text=True, cwd=HERE.parent, check=False,
                          env={**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE.parent / 'runtime'}"})
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[tuple[float, float]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("number", range(len(RUNS)), ids=["-".join(map(str, (
    r["case"], r["rule"], *r["sizes"], r["dtype"]))) for r in RUNS])
def test_kernels_compute_what_the_interpreter_does(number: int, differences: list[tuple[float, float]]) -> None:
    """Within the rounding of the element type; torch's own error is shown beside."""
    kernel, torch_ = differences[number]
    assert kernel < {"f32": 5e-6, "f16": 1e-3}[RUNS[number]["dtype"]], f"torch is off by {torch_}"


# --- what compilers make of them ---------------------------------------------------------------------

def launches(rule: str, target: str, dtype: str, width: int, *, precision: str = "ieee",
             case: str = "self_causal") -> list[Any]:
    """What a GPU would be given: each distinct launch, for two groups of heads, on tensors without memory."""
    from dlbc_runtime.triton_compile import distinct
    from dlbc_runtime.triton_launch import recording

    graph = graph_of(asked(case, rule, dtype=dtype, width=width))
    fused = run(graph, [FuseAttention(forward=True)]).with_attrs(target=f"triton:{target}", precision=precision)
    module = load_module(emit(fused), "attention")
    sizes = {"B": 2, "T": 512, "S": 2}

    def empty(value: Value) -> torch.Tensor:
        shape = [evaluate(d, sizes) for d in value.type.shape]
        return torch.empty(shape, dtype=DTYPES[value.type.dtype], device="meta")

    assert fused.relevance is not None
    with recording() as found, torch.no_grad():
        _, state = module.forward({}, (), *map(empty, fused.forward.params))
        module.relevance({}, (), state, *map(empty, fused.relevance.params))
    return distinct(found.launches)


@pytest.mark.parametrize(("target", "rule", "dtype", "width"), [
    *((target, *what) for target in ("sm_80", "sm_90") for what in (
        ("dlb", "bf16", 128), ("attnlrp", "bf16", 128), ("dlb", "bf16", 64), ("attnlrp", "f32", 64),
        ("attnlrp", "bf16", 64))),
    ("sm_86", "dlb", "bf16", 128), ("sm_89", "attnlrp", "bf16", 128)])
def test_compiled(target: str, rule: str, dtype: str, width: int) -> None:
    """No spills, shared memory within limits, products on tensor cores."""
    pytest.importorskip("triton")
    found = launches(rule, target, dtype, width)
    assert len(found) >= 3  # forward, rows, keys
    for one in found:
        hold(one, target)


def test_sinks_compiled() -> None:
    """GPT-OSS's heads: the sinks are no more than one number that a program reads."""
    pytest.importorskip("triton")
    for one in launches("attnlrp", "sm_90", "bf16", 64, case="sinks"):
        hold(one, "sm_90")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_compiled_for_a_language_model(target: str) -> None:
    """LLaMA-3.2-3B's attention in bfloat16, whose rule of q and k reads sizes that are no bfloat16 numbers."""
    pytest.importorskip("triton")
    from tests.test_triton_compile import of_llama

    found = [one for one in of_llama("dlb", target, torch.bfloat16) if one.kernel.__name__.startswith("attention")]
    assert len(found) >= 4  # the last layer's and the others' rows and keys
    for one in found:
        hold(one, target)


def hold(one: Any, target: str) -> None:
    """A launch's kernel, compiled: it spills nothing, fits into shared memory, and multiplies on tensor cores."""
    from dlbc_runtime.triton_compile import compiled

    where = device(target)
    facts = compiled(one, where.kind, where.arch, where.warp)
    assert facts.stack == 0, f"{facts.name} keeps {facts.stack} bytes on the stack, with {dict(one.meta)}"
    assert facts.shared <= where.shared, facts.name
    assert facts.tensor_cores, facts.name


def test_hopper_has_its_own_products() -> None:
    pytest.importorskip("triton")
    from dlbc_runtime.triton_compile import compiled

    assert all("wgmma" in compiled(one, "cuda", 90, 32).assembly for one in launches("attnlrp", "sm_90", "bf16", 128))


def test_lengths_are_not_compiled_for() -> None:
    """Another batch, length or number of targets runs the same compiled kernels."""
    pytest.importorskip("triton")
    first = launches("dlb", "sm_80", "f32", 64)
    for one in first:
        fixed = {p.name for p in one.kernel.params if p.do_not_specialize}
        assert {"SEEDS", "BATCH", "ROWS", "KEYS"} <= fixed
