"""Triton kernels really compile, on a machine without a GPU: for every architecture, with what a GPU would be given.

Modules run on tensors without memory (`meta`) while launches are recorded; each distinct kernel is then compiled.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import dlbc
from dlbc.backends.triton.config import DEVICES, device
from dlbc.backends.triton.emit import choices, emit
from dlbc.backends.triton.record import _tiled
from dlbc.compiler import FUSE
from dlbc.ir.core import Graph, Type
from dlbc.ir.dims import evaluate
from dlbc.ir.parser import parse_graph
from dlbc.passes import run
from dlbc.passes.fuse_attention import FuseAttention
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.module import load_module
from dlbc_runtime.triton_compile import Facts, compiled, distinct
from dlbc_runtime.triton_launch import Launch, recording
from tests.test_reference import DTYPES
from tests.triton_attention_runs import graph_of

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="nothing is compiled")

SLOW_MATH = ("cos", "sin")
"""Functions that keep numbers on the stack for arguments beyond 10^5, by their nature."""


def launches(explainer: Explainer, sizes: dict[str, int]) -> list[Launch]:
    """The distinct launches of a call, for tensors of given sizes that have no memory."""
    program = explainer.program_of(explainer.default)
    graph, module = parse_graph(program.ir["fused"]), program.module()

    def empty(type_: Type) -> torch.Tensor:
        return torch.empty([evaluate(d, sizes) for d in type_.shape], dtype=DTYPES[type_.dtype], device="meta")

    held = {name: empty(weight.type) for name, weight in graph.weights.items()}
    assert graph.relevance is not None
    with recording() as found, torch.no_grad():
        prepared = module.prepare(held)
        _, state = module.forward(held, prepared, *(empty(p.type) for p in graph.forward.params))
        module.relevance(held, prepared, state, *(empty(p.type) for p in graph.relevance.params))
    return distinct(found.launches)


def llama(dtype: torch.dtype) -> nn.Module:
    """LLaMA-3.2-3B's widths, three layers, no memory."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=3, num_attention_heads=24,
            num_key_value_heads=8, head_dim=128)).to(dtype).eval()
    return model


@cache
def of_llama(rules: str, target: str, dtype: torch.dtype, precision: str = "auto") -> list[Launch]:
    explainer = dlbc.compile(llama(dtype), torch.zeros(1, 128, dtype=torch.long, device="meta"), rules=rules,
                             backend="triton", target=target, precision=precision, cache=False)
    return launches(explainer, {"B": 1, "T": 128, "S": 1, "P": 1, "K": 1})


def hold(one: Launch, target: str, *, products: bool = True) -> Facts:
    """A launch's kernel, compiled: it spills nothing, fits into shared memory, and multiplies on tensor cores."""
    where = device(target)
    facts = compiled(one, where.kind, where.arch, where.warp)
    assert facts.shared <= where.shared, facts.name
    source = one.kernel.src
    if where.kind == "cuda" and not any(f"tl.{name}(" in source for name in SLOW_MATH):
        assert facts.stack == 0, f"{facts.name} keeps {facts.stack} bytes on the stack, with {dict(one.meta)}"
        assert 0 < facts.registers <= 255
    if products and "tl.dot" in source:
        assert facts.tensor_cores, facts.name
    return facts


@pytest.mark.parametrize("target", [name for name, each in DEVICES.items() if each.kind == "cuda"])
def test_kernels_of_a_language_model(target: str) -> None:
    """All kernels but those of attention, which test_triton_attention.py has; for other GPUs than Hopper, some."""
    found = [one for one in of_llama("dlb", target, torch.bfloat16) if not one.kernel.__name__.startswith("attention")]
    kinds = {one.kernel.__name__.split("_")[0] for one in found}
    assert kinds == {"gemm", "row", "elementwise"} and len(found) < 60
    facts = [hold(one, target) for one in (found if target == "sm_90" else extremes(found))]
    if target == "sm_90":
        assert any("wgmma" in each.assembly for each in facts)


def test_other_rules() -> None:
    for one in extremes(of_llama("attnlrp", "sm_86", torch.bfloat16)):
        hold(one, "sm_86")


def extremes(found: list[Launch]) -> list[Launch]:
    """The shortest and the longest products."""
    products = sorted((one for one in found if one.kernel.__name__.startswith("gemm")),
                      key=lambda one: len(one.kernel.src))
    return [products[0], *products[-2:]]


@pytest.mark.parametrize(("dtype", "precision", "cores"), [
    (torch.bfloat16, "ieee", True), (torch.float16, "ieee", True), (torch.float16, "auto", True),
    (torch.float32, "tf32", True), (torch.float32, "tf32x3", True), (torch.float32, "auto", False)])
def test_element_types_and_precision(dtype: torch.dtype, precision: str, cores: bool) -> None:
    """Products of float32 numbers are exact, without tensor cores, unless the user says otherwise."""
    for one in extremes(of_llama("dlb", "sm_90", dtype, precision)):
        assert hold(one, "sm_90", products=False).tensor_cores == cores, one.kernel.__name__


@pytest.mark.parametrize(("target", "precision"), [("sm_90", "ieee"), ("sm_86", "tf32x3")])
def test_every_tile_of_float32_products(target: str, precision: str) -> None:
    """BERT-base's widths: whatever the number of rows, what threads hold of |x| and |W| fits into registers. With half
    of them free, ptxas itself may keep a few bytes elsewhere, so that more programs run at once."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)).eval()
    explainer = dlbc.compile(model, torch.zeros(2, 768, device="meta"), rules="dlb", backend="triton", target=target,
                             precision=precision, cache=False)
    module = explainer.program_of(explainer.default).module()
    products = [one for one in launches(explainer, {"B": 8, "S": 3}) if one.kernel.__name__.startswith("gemm")]
    tiles = [tile for one in products for tile in _tiled(one, module)]
    assert len(tiles) > 2 * len(products)
    where = device(target)
    for one in tiles:
        facts = compiled(one, where.kind, where.arch, where.warp)
        assert facts.shared <= where.shared and facts.tensor_cores == (precision != "ieee")
        assert facts.stack <= (32 if facts.registers <= 128 else 0), (facts.name, facts.stack, dict(one.meta))


class Normed(nn.Module):
    """A kernel of rows, of pointwise ops, and of a product whose numbers are not multiples of its tile's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.RMSNorm(3072), nn.Linear(3072, 200)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.norm(x) * torch.sigmoid(x))
        return out


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_tile_that_may_be_measured(target: str) -> None:
    """Of rows, of pointwise ops and (a part) of attention; products' are above. Whether they spill, measuring sees."""
    with torch.device("meta"):
        explainer = dlbc.compile(Normed().eval(), torch.zeros(2, 3072), rules="attnlrp", backend="triton",
                                 target=target, cache=False)
    fused = attention(target)
    found = {**choices(parse_graph(explainer.ir("fused"))), **choices(fused)}
    kinds = []
    for one in [*launches(explainer, {"B": 8, "S": 3}), *attention_launches(fused)]:
        kind, _, rest = one.kernel.__name__.partition("_")
        if kind != "gemm" and (kind, rest[9:]) not in kinds:
            kinds.append((kind, rest[9:]))
            for tile in found[one.kernel.__name__].candidates(256)[::3 if kind == "attention" else 1]:
                changed = replace(one, meta={**one.meta, **tile})
                facts = compiled(changed, "cuda", device(target).arch, 32)
                assert facts.shared <= device(target).shared, (one.kernel.__name__, tile)
    assert sorted(kinds) == [("attention", "keys"), ("attention", "rows"), ("elementwise", ""), ("row", "")]


def attention(target: str) -> Graph:
    """The relevance of causal attention in bfloat16."""
    graph = graph_of({"case": "self_causal", "rule": "attnlrp", "sizes": [], "seeds": 1, "dtype": "bf16", "width": 64})
    return run(graph, [FuseAttention()]).with_attrs(target=f"triton:{target}")


def attention_launches(graph: Graph) -> list[Launch]:
    """Its launches."""
    from dlbc.backends.triton.record import _launches

    return _launches(graph, load_module(emit(graph), "attention"), {"B": 2, "T": 512, "S": 2})


def test_a_tile_that_a_kernel_is_not_written_for_does_not_compile() -> None:
    """Where it does not look for an end, blocks have to divide what it works on."""
    graph = parse_graph("""
        graph @both(B: 1..8) {target="triton:sm_90"}
        weights { @w : f16[64,3072] }
        forward(%x : f16[B,3072]) {
          %e = exp(%x) : f16[B,3072]
          %y = mul(%e, %x) : f16[B,3072]
          %z = linear(%x, @w) : f16[B,64]
          return %y, %z
        }""")
    module = load_module(emit(run(graph, FUSE["triton"])), "both")
    x, w = (torch.empty(n, 3072, dtype=torch.float16, device="meta") for n in (3, 64))
    with recording() as found:
        module.forward({"w": w}, module.prepare({"w": w}), x)
    wrong = {"gemm": {"BK": 2048}, "elementwise": {"BN": 2048}}
    assert {one.kernel.__name__.split("_")[0] for one in found.launches} == wrong.keys()
    for one in found.launches:
        tile = wrong[one.kernel.__name__.split("_")[0]]
        with pytest.raises(Exception, match=r"static_assert|Static assertion|CompileTimeAssertion"):
            compiled(replace(one, meta={**one.meta, **tile}), "cuda", 90, 32)


def test_an_amd_gpu_is_compiled_for() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.LayerNorm(64), nn.Linear(64, 32)).half().eval()
    x = torch.randn(2, 64).half()
    explainer = dlbc.compile(model, x, rules="dlb", backend="triton", target="gfx942", cache=False)
    for one in launches(explainer, {"B": 4, "S": 2}):
        assert hold(one, "gfx942", products=False).binary


def test_other_sizes_run_the_same_kernels() -> None:
    """Batch, sequence and targets change without compiling anew, but for tiles chosen by the number of rows."""
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32)).eval()
    explainer = dlbc.compile(model, torch.randn(2, 5, 64), rules="dlb", backend="triton", target="sm_90", cache=False)
    dims = {str(d) for p in parse_graph(explainer.ir("fused")).forward.params for d in p.type.shape[:-1]}
    first, other = ([_key(one) for one in launches(explainer, {**dict.fromkeys(dims, n), "S": s})]
                    for n, s in ((33, 3), (37, 5)))
    assert sorted(first) == sorted(other)


def _key(one: Launch) -> str:
    from dlbc_runtime.triton_compile import key

    return str(key(one))


def test_the_tile_follows_the_number_of_rows() -> None:
    """Few rows want narrow tiles, many rows wide ones; the table ends with one for all."""
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    source = dlbc.compile(llama(torch.bfloat16), ids, rules="epsilon", backend="triton", target="sm_90",
                          cache=False).source
    names: dict[str, Any] = {}
    for text in re.findall(r"^gemm_\w+_tiles = (\(\n.*?^\))\n", source, re.MULTILINE | re.DOTALL):
        table = eval(text, {}, names)
        heights = [tile["BM"] for _, tile in table]
        assert heights == sorted(heights) and table[-1][0] is None
        bounds = [bound for bound, _ in table[:-1]]
        assert bounds == sorted(bounds)
