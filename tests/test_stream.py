"""Streamed attention relevance: the same numbers by blocks of rows as at once, and no [rows, keys] beyond a block."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlbc.backends import load
from dlbc.compiler import lowering
from dlbc.composite import Composite
from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Section, Type, Value
from dlbc.ir.dims import Dim, symbol
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc.ir.printer import print_graph
from dlbc.ir.verifier import verify
from dlbc.options import Options
from dlbc.passes import Pass, parse, run
from dlbc.passes.outline import Outline
from dlbc.passes.pair import Pair
from dlbc.passes.stream_attention import StreamAttention
from dlbc_runtime.streams import blocks, stream

RULES = ("attnlrp", "attnlrp_conserving", "gradient", "cp", "absolute", "dlb")
B, T, U, S = (symbol(name) for name in "BTUS")

Given: TypeAlias = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
"""Inputs and seeds."""

# --- graphs of one attention, and running them -------------------------------------------------------------


def attention(*, heads: int = 4, groups: int = 2, mask: str = "", rows: Dim = T, keys: Dim = U, sinks: bool = False,
              **attrs: Any) -> Graph:
    """q, k, v of their own from an input each, so that relevance of all three is seen."""
    q, k, v = (Value(n, Type("f32", (B, h, t, 3))) for n, h, t in
               (("q", heads, rows), ("k", groups, keys), ("v", groups, keys)))
    masks = {"": [], "keys": [Value("seen", Type("bool", (B, 1, 1, keys)))],
             "bool": [Value("seen", Type("bool", (B, 1, rows, keys)))],
             "additive": [Value("bias", Type("f32", (B, 1, rows, keys)))]}[mask]
    sunk = [Value("sinks", Type("f32", (heads,)))] if sinks else []
    at = Builder(("q", "k", "v", "seen", "bias", "sinks"))
    y = at.attention(q, k, v, *(masks or [None]), *sunk, scale=0.75, result="y", **attrs)  # .75: float32 has it
    names = [p.name for p in (q, k, v, *masks, *sunk)]
    return Graph("one", Section((q, k, v, *masks, *sunk), tuple(at.ops), (y,)), {n: (1, 64) for n in "BTU"},
                 attrs={"inputs": tuple(names), "outputs": ("y",), "explain": ("q", "k", "v")})


def lowered(graph: Graph, rule: str, *, ledger: bool = False, streamed: bool = True, budget: int = 0) -> Graph:
    """The relevance of a graph as it is emitted."""
    paired = run(graph, [Pair(rules=Composite([("attention", rule)], base="dlb"))])
    passes: list[Pass] = [StreamAttention(budget) if isinstance(p, StreamAttention) else p
                          for p in lowering(Options(), ledger=ledger)]
    return run(paired, [p for p in passes if streamed or not isinstance(p, StreamAttention)])


def arrays(graph: Graph, sizes: dict[str, int]) -> Given:
    """Inputs and seeds: numbers around 0, masks that show key 0 and half of the others."""
    assert graph.relevance is not None
    random = np.random.default_rng(7)

    def array(value: Value) -> np.ndarray:
        shape = [sizes.get(str(dim), dim) for dim in value.type.shape]
        if value.type.dtype == "bool":
            shown = random.random(size=shape) < 0.5
            shown[..., 0] = True
            return shown
        found: np.ndarray = random.normal(size=shape)
        if value.name == "bias":
            found = np.where(found < -0.7, -np.inf, found)
            found[..., 0] = 0.0
        return found

    return ({p.name: array(p) for p in graph.forward.params}, {p.name: array(p) for p in graph.relevance.params})


def interpreted(graph: Graph, sizes: dict[str, int]) -> tuple[np.ndarray, ...]:
    inputs, seeds = arrays(graph, sizes)
    return interpret(graph, inputs, {}, seeds).relevance


def generated(graph: Graph, given: Given, backend: str) -> tuple[np.ndarray, ...]:
    """What the backend's module computes; in float64, since 1 / (attention's output) is as steep as it likes."""
    module: dict[str, Any] = {}
    exec(compile(load(backend).emit(graph), "<generated>", "exec"), module)
    import torch

    inputs, seeds = ([torch.from_numpy(x) if backend == "torch" else x for x in found.values()] for found in given)
    with np.errstate(all="ignore"):
        prepared = module["prepare"]({})
        _, state = module["forward"]({}, prepared, *inputs)
        results = module["relevance"]({}, prepared, state, *seeds)
    return tuple(np.asarray(r, np.float64) for r in results)


def assert_close(found: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...], tolerance: float, what: str) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(b).max(initial=0)),
                                   err_msg=what)


# --- the same numbers --------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "plain": {}, "causal": {"causal": True}, "self_causal": {"causal": True, "keys": T},
    "window": {"causal": True, "window": 2, "keys": T}, "heads": {"groups": 4, "mask": "bool"},
    "padding": {"mask": "keys", "causal": True}, "additive": {"mask": "additive"},
    "additive_causal": {"mask": "additive", "causal": True, "groups": 4},
    "softcap": {"softcap": 1.5, "causal": True, "keys": T}, "one_group": {"groups": 1, "window": 3, "causal": True},
    "sinks": {"sinks": True, "causal": True, "keys": T}, "all_sinks": {"sinks": True, "heads": 2},
    "window_sinks": {"sinks": True, "causal": True, "window": 2, "mask": "keys", "groups": 4},
    "softcap_sinks": {"sinks": True, "mask": "additive", "softcap": 1.5}}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
def test_blocks_compute_what_the_whole_computes(case: str, rule: str) -> None:
    """More queries than keys (rows that see nothing), more keys, one of each; S of 1 and 3; with a ledger."""
    graph = attention(**CASES[case])
    for ledger in (False, True):
        whole, parts = (lowered(graph, rule, ledger=ledger, streamed=streamed) for streamed in (False, True))
        assert parts.relevance is not None and whole.relevance is not None
        verify(parts)
        assert print_graph(parse_graph(print_graph(parts))) == print_graph(parts)
        names = [op.name for op in parts.relevance.ops]
        assert names.count("stream") == (2 if rule == "attnlrp_conserving" else 1), names
        assert "attention_weights" not in names
        for lengths in ((2, 7, 5, 3), (1, 5, 8, 1), (1, 1, 1, 1)):
            sizes = dict(zip("BTUS", lengths, strict=True))
            assert_close(interpreted(parts, sizes), interpreted(whole, sizes), 1e-9, f"{sizes}, ledger={ledger}")


@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", ["self_causal", "window", "softcap", "padding", "additive", "sinks", "window_sinks"])
def test_generated_code(case: str, rule: str, backend: str) -> None:
    """Blocks of one row, of some, of all rows, against the float64 interpreter of the graph without streams."""
    graph = attention(**CASES[case])
    sizes = {"B": 2, "T": 11, "U": 9, "S": 2}
    expected = interpreted(lowered(graph, rule, streamed=False, ledger=True), sizes)
    for budget in (1, 2 * 2 * 4 * 11 * 4, 0):
        parts = lowered(graph, rule, ledger=True, budget=budget)
        found = generated(parts, arrays(parts, sizes), backend)
        assert_close(found, expected, 1e-9, f"budget {budget}")


@settings(max_examples=25)
@given(st.sampled_from(RULES), st.booleans(), st.sampled_from([None, 1, 3]), st.sampled_from(["", "keys", "bool"]),
       st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]), st.tuples(*[st.integers(1, 9)] * 2), st.integers(1, 400))
def test_any_shape_and_block(rule: str, causal: bool, window: int | None, mask: str, heads: tuple[int, int],
                             lengths: tuple[int, int], budget: int) -> None:
    attrs: dict[str, Any] = {"causal": causal, "window": window if causal else None}
    graph = attention(heads=heads[0], groups=heads[1], mask=mask, **attrs)
    sizes = {"B": 2, "T": lengths[0], "U": lengths[1], "S": 2}
    expected = interpreted(lowered(graph, rule, streamed=False), sizes)
    streamed = lowered(graph, rule, budget=budget)
    assert_close(interpreted(streamed, sizes), expected, 1e-9, "interpreter")
    assert_close(generated(streamed, arrays(streamed, sizes), "numpy"), expected, 1e-9, "numpy")


def test_fixed_sizes_and_sizes_that_coincide() -> None:
    """Rows, keys, heads and width all 4: axes are told apart by what they are, not by their size."""
    graph = attention(heads=4, groups=2, rows=4, keys=4, causal=True)
    sizes = {"B": 4, "S": 4}
    for rule in RULES:
        parts = lowered(graph, rule)
        assert parts.relevance is not None and any(op.name == "stream" for op in parts.relevance.ops)
        assert_close(interpreted(parts, sizes), interpreted(lowered(graph, rule, streamed=False), sizes), 1e-9, rule)


def test_what_is_masked_gets_exactly_nothing() -> None:
    graph = attention(causal=True, keys=T, mask="keys")
    for rule in RULES:
        for backend in ("torch", "numpy"):
            streamed = lowered(graph, rule, budget=100)
            inputs, seeds = arrays(streamed, {"B": 2, "T": 9, "U": 9, "S": 2})
            for name in seeds:
                seeds[name][..., 4:, :] = 0.0  # only rows 0 to 3 are explained
            _, to_k, to_v = generated(streamed, (inputs, seeds), backend)
            shown = inputs["seen"][:, 0, 0]
            for result in (to_k, to_v):
                assert not result[..., 4:, :].any(), "keys after the explained rows"
                for row in range(2):
                    assert not result[:, row, :, ~shown[row]].any(), "padding"
                assert result.any() or result is to_k


@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize("case", [c for c in CASES if c != "plain"])
def test_the_forward_by_blocks(case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention itself, where its weights or its mask would be large."""
    import torch

    graph = lowered(attention(**CASES[case]), "cp")
    for sizes in ({"B": 2, "T": 7, "U": 5, "S": 1}, {"B": 1, "T": 5, "U": 8, "S": 1}):
        inputs, seeds = arrays(graph, sizes)
        (expected,) = interpret(graph, inputs, {}, seeds).outputs
        module: dict[str, Any] = {}
        exec(compile(load(backend).emit(graph), "<generated>", "exec"), module)
        for budget in (1, 60):
            monkeypatch.setattr("dlbc_runtime.streams.BUDGET", budget)
            given = [torch.from_numpy(x) if backend == "torch" else x for x in inputs.values()]
            (found,), _ = module["forward"]({}, module["prepare"]({}), *given)
            assert_close((np.asarray(found),), (expected,), 1e-9, f"{sizes}, budget {budget}")


def test_passes_after_it_know_streams() -> None:
    graph = attention(causal=True, keys=T)
    sizes = {"B": 2, "T": 7, "U": 7, "S": 2}
    for rule in RULES:
        parts = lowered(graph, rule)
        found = run(parts, parse("eliminate_common,simplify,hoist_constants{relevance=true},eliminate_dead,outline,"
                                 "inline,checkpoint,stream_attention"))
        verify(found)
        assert found.functions == parts.functions
        assert_close(interpreted(found, sizes), interpreted(parts, sizes), 1e-9, rule)


# --- what is not streamed ----------------------------------------------------------------------------------

def test_a_window_without_causality_stays() -> None:
    """Its blocks would need their place among the rows."""
    graph = attention(window=2, keys=T)
    parts = lowered(graph, "dlb")
    assert parts.relevance is not None and "stream" not in {op.name for op in parts.relevance.ops}


def test_a_sum_that_the_mask_does_not_hide_stays() -> None:
    """Under a causal mask keys are left out, so what is summed must be 0 there: here 1 - P is not."""
    text = """
graph @g(B: 1..8, T: 1..8, S: 1..8)

forward(%q : f32[B,2,T,3]) {
  %y = neg(%q) : f32[B,2,T,3]
  return %y save %q, %y
}

relevance(%R.y : f32[S,B,2,T,3]) {
  %p = attention_weights(%y, %q) {scale=1.0CAUSAL} : f32[B,2,T,T]
  %n = sub(1.0, %p)                                : f32[B,2,T,T]
  %r = matmul(%n, %R.y)                            : f32[S,B,2,T,3]
  return %r
}
"""
    for causal, streams in ((", causal=true", 0), ("", 1)):
        graph = parse_graph(text.replace("CAUSAL", causal))
        found = run(graph, [StreamAttention()])
        verify(found)
        assert found.relevance is not None
        assert [op.name for op in found.relevance.ops].count("stream") == streams
        sizes = {"B": 2, "T": 7, "S": 2}
        assert_close(interpreted(found, sizes), interpreted(graph, sizes), 1e-9, "sub")


def test_equal_layers_share_a_function_and_outlining_keeps_streams() -> None:
    graph = attention(keys=T, causal=True, groups=4)
    at = Builder(("q", "k", "v", "y"))
    z = at.attention(graph.forward.results[0], *graph.forward.params[1:], scale=0.75, causal=True, result="z")
    forward = Section(graph.forward.params, (*graph.forward.body, *at.ops), (z,))
    two = Graph("two", forward, graph.dims, attrs={**graph.attrs, "outputs": ("z",)})
    parts = lowered(two, "attnlrp")
    assert parts.relevance is not None
    streams = [op for op in parts.relevance.ops if op.name == "stream"]
    assert len(streams) == 2 and len({op.attrs["function"] for op in streams}) == 1
    assert print_graph(run(parts, [Outline()])) == print_graph(parts)


# --- the loop ----------------------------------------------------------------------------------------------

@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.booleans(), st.sampled_from([None, 1, 4]))
def test_blocks_cover_rows_and_what_they_see(rows: int, keys: int, step: int, causal: bool, window: int | None) -> None:
    found = list(blocks(rows, keys, step, causal, window if causal else None))
    assert [start for start, *_ in found] == [0, *(stop for _, stop, *_ in found[:-1])] and found[-1][1] == rows
    for start, stop, low, high in found:
        assert 0 <= low < high <= keys
        assert not causal or stop - start - (high - low) == start + rows - keys - start + low - start
        for row in range(start, stop):
            seen = [key for key in range(keys) if not causal or (
                0 <= row + keys - rows - key < (window or keys + rows))]
            assert all(low <= key < high for key in seen)


def test_one_block_is_one_call() -> None:
    calls: list[list[np.ndarray]] = []

    def double(given: list[np.ndarray], factor: int) -> tuple[np.ndarray]:
        calls.append([*given])
        return (given[0] * factor,)

    x, how = np.arange(6.0).reshape(3, 2), {"over": [(0, None)], "into": [(0, None)], "rows": 3, "keys": 1, "width": 2}
    for budget, count in ((6, 1), (5, 2), (1, 3)):
        calls.clear()
        given = [x]
        found = stream(double, given, lambda shape, like: np.zeros(shape), **how, budget=budget, sizes=(2,))  # type: ignore[arg-type]
        assert len(calls) == count and np.array_equal(found[0], 2 * x)
        assert not given or count == 1


# --- memory ------------------------------------------------------------------------------------------------

_EXPLAIN = """
import resource, sys, torch, dlbc
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
rules, tokens, layers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=tokens)).eval()
ids = torch.randint(0, 100, (1, tokens))
explainer = dlbc.compile(model, ids[:, :16], rules=rules, cache=False, verify=False, backend=sys.argv[4])
explainer(ids[:, :16])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
explainer(ids)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def added_memory(rules: str, tokens: int, *, layers: int = 2, backend: str = "torch") -> int:
    """MiB by which an explanation in a process of its own raises what that held before."""
    root = Path(__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": f"{root}:{root / 'runtime'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _EXPLAIN, rules, str(tokens), str(layers), backend],
                          env=env, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_memory_of_a_long_text(backend: str) -> None:
    """3,072 tokens and 8 heads: one [S, B, heads, rows, keys] of float32 would be 288 MiB; without blocks, 900 more."""
    pytest.importorskip("transformers")
    assert added_memory("attnlrp", 3072, backend=backend) < 150
