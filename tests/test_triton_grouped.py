"""Products of rows with the matrices of their experts, as Triton kernels: fusion, what they compute (in Triton's
interpreter), and how they compile. No GPU is needed; races and speed are not seen here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlbc.backends.torch.emit import emit as emit_torch
from dlbc.backends.triton.config import device
from dlbc.backends.triton.emit import emit, refused
from dlbc.backends.triton.record import _tiled
from dlbc.backends.work import work_of
from dlbc.ir.core import Graph, Kernel
from dlbc.ir.dims import evaluate
from dlbc.ir.parser import parse_graph
from dlbc.passes import run
from dlbc.passes.fuse import Fuse
from dlbc_runtime.module import load_module
from dlbc_runtime.triton_compile import Facts, compiled, distinct
from dlbc_runtime.triton_launch import Launch, expert_blocks, recording
from tests.test_reference import DTYPES

HERE = Path(__file__).parent


def layer(experts: int, width: int, inner: int, dtype: str = "f32", *, transposed: bool = False, bias: bool = True,
          part: str = "abs") -> Graph:
    """A gated layer of experts on N sorted rows, and its relevance by parts of the last weights."""
    def weight(name: str, down: int, across: int) -> str:
        shape = f"{experts},{down},{across}" if transposed else f"{experts},{across},{down}"
        return f"@{name} : {dtype}[{shape}]  @{name}.b : {dtype}[{experts},{across}]"

    def times(x: str, name: str, *, back: bool = False, part: str = "") -> str:
        given = f", @{name}.b" if bias and not back and not part else ""
        attrs = [*(["transposed=true"] if transposed != back else []), *([f'part="{part}"'] if part else [])]
        return f"grouped_linear({x}, %ends, @{name}{given})" + (f" {{{', '.join(attrs)}}}" if attrs else "")

    return parse_graph(f"""
        graph @layer(N: 1..65536, S: 1..64)
        weights {{ {weight("gate", width, inner)}  {weight("up", width, inner)}  {weight("down", inner, width)} }}
        forward(%x : {dtype}[N,{width}], %ends : i64[{experts}], %scale : {dtype}[N,1]) {{
          %g = {times("%x", "gate")} : {dtype}[N,{inner}]
          %u = {times("%x", "up")} : {dtype}[N,{inner}]
          %a = glu(%g, %u) : {dtype}[N,{inner}]
          %y = {times("%a", "down")} : {dtype}[N,{width}]
          %w = mul(%y, %scale) : {dtype}[N,{width}]
          return %w save %a, %ends
        }}
        relevance(%R.y : f32[S,N,{width}]) {{
          %f = cast(%a) {{dtype="f32"}} : f32[N,{inner}]
          %s = abs(%f) : f32[N,{inner}]
          %z = {times("%f", "down")} : f32[N,{width}]
          %d = {times("%s", "down", part=part)} : f32[N,{width}]
          %e = maximum(%d, %z) : f32[N,{width}]
          %q = safe_div(%R.y, %e) : f32[S,N,{width}]
          %m = {times("%q", "down", back=True, part=part)} : f32[S,N,{inner}]
          %R.a = mul(%s, %m) : f32[S,N,{inner}]
          return %R.a
        }}""")


def fused(graph: Graph, target: str = "sm_90", precision: str = "ieee") -> Graph:
    """The graph with kernels."""
    return run(graph.with_attrs(target=f"triton:{target}", precision=precision), (Fuse(),), verified=True)


def kernels(graph: Graph) -> list[Kernel]:
    """The kernels of a graph."""
    return [item for _, section in graph.sections() for item in section.body if isinstance(item, Kernel)]


# --- fusion ------------------------------------------------------------------------------------------


def test_a_layer_is_four_kernels() -> None:
    """Gate and up share rows and have the gate after them; z and D share rows and weights, with |x| and |W| made as
    they are read; relevance is multiplied by |x| before it is written."""
    graph = fused(layer(4, 8, 6))
    found = [(kernel.template, [op.name for op in kernel.body], [r.name for r in kernel.results])
             for kernel in kernels(graph)]
    product = "grouped_linear"
    assert found == [
        ("grouped", [product, product, "glu"], ["a"]),
        ("grouped", [product, "mul"], ["w"]),
        ("grouped", ["cast", product, "abs", product, "maximum"], ["e"]),
        ("elementwise", ["safe_div"], ["q"]),
        ("grouped", [product, "cast", "abs", "mul"], ["R.a"])]
    assert not refused(graph)


def test_the_plan_says_what_runs_where() -> None:
    graph = fused(layer(4, 8, 6))
    rows = work_of(graph, "torch", refused(graph))
    assert {row.runs for row in rows} == {"triton grouped", "triton elementwise"}
    assert {row.why for row in rows if "grouped" in row.runs} == {
        "rows by the matrices of their experts, with what is computed of operands and results"}
    wide = fused(parse_graph("""
        graph @wide(N: 1..8)
        weights { @w : f64[2,3,4] }
        forward(%x : f64[N,4], %ends : i64[2]) {
          %y = grouped_linear(%x, %ends, @w) : f64[N,3]
          return %y
        }"""))
    (row,) = work_of(wide, "torch", {})
    assert row.runs == "torch" and row.why == "kernels have no element type f64"


@pytest.mark.parametrize(("other", "together"), [
    ("grouped_linear(%x, %ends, @v)", True),
    ('grouped_linear(%x, %ends, @v) {part="abs"}', True),
    ("grouped_linear(%x, %others, @v)", False),
    ("grouped_linear(%x, %ends, @v) {transposed=true}", False),
    ("linear(%x, @plain)", False)])
def test_what_shares_a_kernel(other: str, together: bool) -> None:
    """Products of the same rows with the same experts of them, and with matrices that lie alike."""
    graph = fused(parse_graph(f"""
        graph @two(N: 1..8)
        weights {{ @w : f32[2,4,4]  @v : f32[2,4,4]  @plain : f32[4,4] }}
        forward(%x : f32[N,4], %ends : i64[2], %others : i64[2]) {{
          %y = grouped_linear(%x, %ends, @w) : f32[N,4]
          %z = {other} : f32[N,4]
          return %y, %z
        }}"""))
    assert len(kernels(graph)) == (1 if together else 2) and not refused(graph)


# --- programs ----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=9), st.integers(1, 4), st.sampled_from([16, 32, 64]),
       st.sampled_from([(1, 16), (16, 16), (100, 32)]))
def test_there_are_programs_for_any_routing(counts: Sequence[int], seeds: int, height: int,
                                            columns: tuple[int, int]) -> None:
    """Every tile of every expert has a program, and no expert that cannot have rows costs one."""
    (grid,) = expert_blocks(sum(counts), seeds, len(counts), height, *columns)
    across = -(-columns[0] // columns[1])
    needed = sum(-(-count * seeds // height) for count in counts)
    assert grid % across == 0 and grid // across >= needed
    assert grid // across <= -(-sum(counts) * seeds // height) + min(len(counts), sum(counts))


def test_few_rows_have_few_programs() -> None:
    """One token of four experts, of 128: four tiles of rows, not 128."""
    assert expert_blocks(4, 1, 128, 16, 2880, 2880) == (4,)
    assert expert_blocks(0, 1, 128, 16, 2880, 2880) == (0,)


# --- what they compute -------------------------------------------------------------------------------

GROUPS = ("test_routing", "not test_routing")


@pytest.mark.parametrize("group", GROUPS)
def test_interpreted(group: str) -> None:
    """Run a group of `triton_grouped_runs.py`, in a process of its own: Triton decides at import to interpret."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly",
               str(HERE / "triton_grouped_runs.py"), "-k", group]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=False,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


# --- how they compile --------------------------------------------------------------------------------

GPT_OSS, MIXTRAL, QWEN = (32, 2880, 2880), (8, 4096, 14336), (128, 2048, 768)
"""Experts, width and inner width of GPT-OSS-20B, Mixtral-8x7B and Qwen3-30B-A3B."""


def launches(graph: Graph, sizes: dict[str, int]) -> list[Launch]:
    """The distinct launches of experts' products, with each of their tiles."""
    module = load_module(emit(graph), "layer")

    def empty(type_: Any) -> torch.Tensor:
        return torch.empty([evaluate(d, sizes) for d in type_.shape], dtype=DTYPES[type_.dtype], device="meta")

    assert graph.relevance is not None
    held = {name: empty(weight.type) for name, weight in graph.weights.items()}
    with recording() as found, torch.no_grad():
        prepared = module.prepare(held)
        _, state = module.forward(held, prepared, *(empty(p.type) for p in graph.forward.params))
        module.relevance(held, prepared, state, *(empty(p.type) for p in graph.relevance.params))
    return [tiled for one in distinct(found.launches) if one.kernel.__name__.startswith("grouped")
            for tiled in _tiled(one, module)]


def hold(one: Launch, target: str, *, cores: bool = True) -> Facts:
    """A launch's kernel, compiled: it spills nothing, fits into shared memory, and multiplies on tensor cores."""
    where = device(target)
    facts = compiled(one, where.kind, where.arch, where.warp)
    assert facts.shared <= where.shared, facts.name
    assert facts.stack == 0, f"{facts.name} keeps {facts.stack} bytes on the stack, with {dict(one.meta)}"
    assert facts.tensor_cores == cores
    return facts


needs_compiler = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"),
                                    reason="nothing is compiled")


@needs_compiler
@pytest.mark.parametrize(("target", "widths", "dtype", "transposed", "precision"), [
    ("sm_90", GPT_OSS, "bf16", True, "ieee"), ("sm_80", QWEN, "bf16", False, "ieee"),
    ("sm_89", MIXTRAL, "bf16", False, "ieee"), ("sm_86", GPT_OSS, "f16", True, "ieee"),
    ("sm_90", MIXTRAL, "f32", False, "tf32"), ("sm_86", QWEN, "f32", False, "tf32x3"),
    ("sm_90", GPT_OSS, "f32", True, "ieee")])
def test_kernels_of_models(target: str, widths: tuple[int, int, int], dtype: str, transposed: bool,
                           precision: str) -> None:
    """Every kernel of a layer, with all of its tiles. Products of float32 are exact, without tensor cores, unless the
    user says otherwise."""
    pytest.importorskip("triton")
    found = launches(fused(layer(*widths, dtype, transposed=transposed), target, precision), {"N": 2048, "S": 1})
    assert len({one.kernel.__name__ for one in found}) == 4
    facts = [hold(one, target, cores=(dtype, precision) != ("f32", "ieee")) for one in found]
    if target == "sm_90" and dtype == "bf16":
        assert any("wgmma" in each.assembly for each in facts)


@needs_compiler
def test_an_amd_gpu_is_compiled_for() -> None:
    """The first tile of each kernel."""
    pytest.importorskip("triton")
    where = device("gfx942")
    found = {one.kernel.__name__: one for one in launches(fused(layer(4, 64, 96, "f16"), "gfx942"), {"N": 64, "S": 2})}
    facts = [compiled(one, where.kind, where.arch, where.warp) for one in found.values()]
    assert len(facts) == 4 and all(each.tensor_cores and each.shared <= where.shared for each in facts)


@needs_compiler
def test_other_routings_and_sizes_run_the_same_kernels() -> None:
    """Rows and targets change without compiling anew; what experts have is read on the GPU."""
    from dlbc_runtime.triton_compile import key

    pytest.importorskip("triton")
    graph = fused(layer(8, 64, 32))
    first, other = (sorted(str(key(one)) for one in launches(graph, {"N": rows, "S": seeds}))
                    for rows, seeds in ((33, 3), (37, 5)))
    assert first == other


def test_tiles_follow_the_rows_of_an_expert() -> None:
    """As many rows with fewer experts want wider tiles: a tile has the rows of one expert."""
    source = emit(fused(layer(64, 256, 256, "bf16")))
    assert "tile = chosen(grouped_" in source and "(N) // 64)" in source and "(N*S) // 64)" in source


# --- on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("counts", [[300, 0, 41, 7], [0, 0, 0, 1], [64, 64, 64, 64], [0, 900, 0, 0]], ids=str)
def test_on_a_gpu(counts: list[int], dtype: str) -> None:
    """What the interpreter shows, by real kernels, with tiles of all sizes and twice the same."""
    major, minor = torch.cuda.get_device_capability()
    graph = fused(layer(4, 200, 136, dtype), "sm_90" if major >= 9 else f"sm_{major}{minor}", "ieee")
    module, generator = load_module(emit(graph), "layer"), torch.Generator().manual_seed(0)

    def made(type_: Any) -> torch.Tensor:
        shape = [evaluate(d, {"N": sum(counts), "S": 3}) for d in type_.shape]
        x = torch.randn(shape, generator=generator) if type_.floating else torch.tensor(counts).cumsum(0)
        return x.to(DTYPES[type_.dtype])

    assert graph.relevance is not None
    held = {name: made(weight.type) for name, weight in graph.weights.items()}
    inputs, seeds = ([made(p.type) for p in part.params] for part in (graph.forward, graph.relevance))

    def run_on(device: str) -> list[torch.Tensor]:
        """By kernels on the GPU; on a CPU by torch, float64."""
        where = (lambda x: x.cuda()) if device == "cuda" else (lambda x: x.double() if x.is_floating_point() else x)
        own = {name: where(w) for name, w in held.items()}
        code = module if device == "cuda" else load_module(emit_torch(graph), "plain")
        with torch.no_grad():
            outputs, state = code.forward(own, (), *map(where, inputs))
            return [x.double().cpu() for x in (*outputs, *code.relevance(own, (), state, *map(where, seeds)))]

    first, again, expected = run_on("cuda"), run_on("cuda"), run_on("cpu")
    for x, same, right in zip(first, again, expected, strict=True):
        torch.testing.assert_close(x, same, rtol=0, atol=0)
        assert ((x - right).norm() / right.norm()) < {"f32": 1e-5, "f16": 2e-3, "bf16": 2e-2}[dtype]
