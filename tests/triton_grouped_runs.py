"""Run by test_triton_grouped.py under pytest in a process of its own, with TRITON_INTERPRET=1: what kernels of experts'
products compute is what the float64 interpreter of the IR computes, for any routing. Nothing is seen of races or speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st

import dlbc
from dlbc.backends.triton.emit import emit
from dlbc.ir.core import Graph, Type
from dlbc.ir.dims import evaluate
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc_runtime import triton_launch
from dlbc_runtime.module import load_module
from tests import zoo
from tests.test_reference import DTYPES
from tests.test_triton_grouped import fused, kernels, layer
from tests.triton_attention_runs import interpret_with_any_numpy

interpret_with_any_numpy()
assert triton_launch.INTERPRETED, "run by test_triton_grouped.py"

Builder: Any = triton_interpreter.InterpreterBuilder
Handle: Any = triton_interpreter.TensorHandle
_dot, _load = Builder.create_dot, Builder.create_masked_load


def dot_of_numbers(self: Any, a: Any, b: Any, *others: Any) -> Any:
    """Triton's interpreter multiplies the bits of bfloat16: here they become the numbers they stand for."""
    def plain(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return Handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    return _dot(self, plain(a), plain(b), *others)


Builder.create_dot = dot_of_numbers

Numbers = dict[str, torch.Tensor]
TOLERANCE = {"f32": 1e-6, "f16": 2e-3, "bf16": 1.5e-2}
"""By the largest number of a result. Kernels sum in float32, and outputs of 16 bits are rounded once."""


def numbers(graph: Graph, counts: Sequence[int], seeds: int) -> tuple[Numbers, Numbers, Numbers]:
    """Weights, inputs and seeds, with rows sorted by expert as `counts` says."""
    source, sizes = np.random.default_rng(0), {"N": sum(counts), "S": seeds}

    def made(name: str, type_: Type) -> torch.Tensor:
        if not type_.floating:
            return torch.from_numpy(np.cumsum(counts))
        return torch.from_numpy(source.normal(size=[evaluate(d, sizes) for d in type_.shape])).to(DTYPES[type_.dtype])

    assert graph.relevance is not None
    return ({n: made(n, w.type) for n, w in graph.weights.items()},
            {p.name: made(p.name, p.type) for p in graph.forward.params},
            {p.name: made(p.name, p.type) for p in graph.relevance.params})


def computed(graph: Graph, held: Numbers, inputs: Numbers, given: Numbers, launch: Any = None
             ) -> tuple[list[torch.Tensor], Numbers]:
    """Outputs and relevance by the kernels (or what else `launch` does), and what the forward pass saved."""
    module = load_module(emit(graph), "layer")
    original, module.launch = module.launch, launch or module.launch
    try:
        return _computed(graph, module, held, inputs, given)
    finally:
        module.launch = original


def _computed(graph: Graph, module: Any, held: Numbers, inputs: Numbers, given: Numbers
              ) -> tuple[list[torch.Tensor], Numbers]:
    prepared = module.prepare(held)
    outputs, state = module.forward(held, prepared, *inputs.values())
    assert graph.forward.saves
    tensors = [x for x in state if isinstance(x, torch.Tensor)]
    saved = dict(zip((v.name for v in graph.forward.saves), tensors, strict=True))
    return [*outputs, *module.relevance(held, prepared, state, *given.values())], saved


def compare_all(graph: Graph, given: tuple[Numbers, Numbers, Numbers], found: Sequence[torch.Tensor], saved: Numbers,
                tolerance: float) -> None:
    """Hold outputs and relevance to the interpreter."""
    held, inputs, seeds = map(wide, given)
    expected = [*interpret(graph, inputs, held).outputs,
                *interpret(graph, inputs, held, seeds, saved=wide(saved)).relevance]
    for x, right in zip(found, expected, strict=True):
        assert x.shape == right.shape
        far = np.abs(x.double().numpy() - right).max() / max(np.abs(right).max(), 1e-30)
        assert far < tolerance, far


def wide(found: Numbers) -> dict[str, Any]:
    return {name: x.double().numpy() if x.is_floating_point() else x.numpy() for name, x in found.items()}


def compare(graph: Graph, counts: Sequence[int], seeds: int = 2, *, tolerance: float = 1e-6) -> None:
    """Hold the kernels to the interpreter."""
    given = numbers(graph, counts, seeds)
    compare_all(graph, given, *computed(graph, *given), tolerance)


ROUTINGS = ([3, 0, 4, 0, 2], [9, 0, 0, 0, 0], [0, 0, 0, 0, 21], [20, 1, 17, 0, 3], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1])


@pytest.mark.parametrize("counts", ROUTINGS, ids=str)
@pytest.mark.parametrize(("transposed", "bias"), [(False, True), (True, True), (False, False), (True, False)])
def test_routing(counts: Sequence[int], transposed: bool, bias: bool) -> None:
    """Experts without rows, with one row, with all rows, with more rows than a tile; seeds share an expert's tiles."""
    graph = fused(layer(5, 13, 18, transposed=transposed, bias=bias))
    assert sum(kernel.template == "grouped" for kernel in kernels(graph)) == 4
    compare(graph, counts, seeds=3 if bias else 1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("transposed", [False, True])
def test_element_types(dtype: str, transposed: bool) -> None:
    """Weights and rows of 16 bits, relevance of float32."""
    compare(fused(layer(3, 20, 9, dtype, transposed=transposed)), [5, 0, 19], tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("part", ["abs", "positive", "negative", "square"])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_part_of_weights(part: str, dtype: str) -> None:
    compare(fused(layer(3, 20, 9, dtype, part=part)), [5, 0, 19], tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_squares_keep_the_digits_of_weights_of_16_bits(dtype: str) -> None:
    """They have twice as many; nothing is rounded to the weights' element type."""
    compare(fused(parse_graph(f"""
        graph @squares(N: 1..64, S: 1..8)
        weights {{ @w : {dtype}[3,20,9] }}
        forward(%x : f32[N,9], %ends : i64[3]) {{
          %y = grouped_linear(%x, %ends, @w) {{part="square"}} : f32[N,20]
          return %y save %ends
        }}
        relevance(%R.y : f32[S,N,20]) {{
          %R.x = grouped_linear(%R.y, %ends, @w) {{part="square", transposed=true}} : f32[S,N,9]
          return %R.x
        }}""")), [5, 0, 19])


@pytest.mark.parametrize("counts", [[7], [4] * 8, [0] * 70 + [3, 0, 1] + [0] * 57, [0, 2]], ids=len)
def test_numbers_of_experts(counts: Sequence[int]) -> None:
    """One, powers of two, more than there are rows."""
    compare(fused(layer(len(counts), 6, 7)), counts)


def test_only_experts_with_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """No address within the matrices of others is loaded, nor do their numbers matter."""
    graph, counts = fused(layer(4, 6, 7)), [3, 0, 2, 0]
    held, inputs, given = numbers(graph, counts, 2)
    expected, _ = computed(graph, held, inputs, given)
    unused = [w[e] for w in held.values() for e in (1, 3)]
    for part in unused:
        part.fill_(torch.nan)
    reads: list[np.ndarray] = []

    def noted(self: Any, ptrs: Any, mask: Any, *others: Any) -> Any:
        reads.append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].astype(np.int64).reshape(-1))
        return _load(self, ptrs, mask, *others)

    monkeypatch.setattr(Builder, "create_masked_load", noted)
    found, _ = computed(graph, held, inputs, given)
    for x, right in zip(found, expected, strict=True):
        torch.testing.assert_close(x, right, rtol=0, atol=0)
    addresses = np.concatenate(reads)
    used = held["down"][0]

    def within(tensor: torch.Tensor) -> int:
        start = tensor.data_ptr()
        return int(((addresses >= start) & (addresses < start + tensor.numel() * tensor.element_size())).sum())

    assert within(used) and not any(within(part) for part in unused)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_any_kernel_that_fails_is_run_by_torch(dtype: str) -> None:
    """What the generated code does where no kernel compiles."""
    def fails(*args: Any, **options: Any) -> None:
        raise triton_launch.KernelError("no such instruction")

    graph = fused(layer(4, 6, 7, dtype, transposed=True))
    given = numbers(graph, [3, 0, 18, 1], 2)
    compare_all(graph, given, *computed(graph, *given, launch=fails), TOLERANCE[dtype])


def test_wide_offsets_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """64-bit offsets, which tensors of more than 2^31 elements need."""
    graph = fused(layer(4, 6, 7))
    given = numbers(graph, [3, 0, 18, 1], 2)
    expected, _ = computed(graph, *given)
    monkeypatch.setattr(triton_launch, "WIDE", 0)
    found, _ = computed(graph, *given)
    for x, right in zip(found, expected, strict=True):
        torch.testing.assert_close(x, right, rtol=0, atol=0)


@pytest.mark.parametrize("rules", ["dlb"])
def test_any_model_of_experts(rules: str) -> None:
    """From a model to relevance: GPT-OSS, whose experts have biases and matrices that lie transposed."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        vocab_size=31, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4,
        layer_types=["full_attention"], max_position_embeddings=64)
    torch.manual_seed(0)
    model = zoo.randomise(transformers.GptOssForCausalLM(config)).eval()
    x = torch.randint(0, 31, (1, 5))
    plain, kernels = (dlbc.compile(model, x, rules=rules, backend=b, cache=False) for b in ("torch", "triton"))
    assert "triton grouped" in str(kernels.plan())
    for other, target in ((x, None), (torch.randint(0, 31, (2, 3)), [3, 5])):
        expected, found = plain(other, target=target), kernels(other, target=target)
        np.testing.assert_allclose(found.outputs["logits"], expected.outputs["logits"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.relevance["input_ids"], expected.relevance["input_ids"], rtol=1e-3, atol=1e-4)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any), st.integers(1, 4), st.integers(1, 37),
       st.integers(1, 37), st.booleans())
def test_any_routing_and_width(counts: list[int], seeds: int, width: int, inner: int, transposed: bool) -> None:
    compare(fused(layer(len(counts), width, inner, transposed=transposed)), counts, seeds, tolerance=1e-5)
