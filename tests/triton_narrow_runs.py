"""Run by test_narrow.py under pytest in a process of its own, with TRITON_INTERPRET=1: models in half precision by
kernels, checked by the function that test_devices.py checks them with on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import nn
from triton.runtime import interpreter

import dlbc
from dlbc.backends.triton.table import TABLE
from dlbc_runtime.triton_launch import INTERPRETED
from tests.narrow import HALF, How, check
from tests.triton_attention_runs import interpret_with_any_numpy


def interpret_bfloat16() -> None:
    """Triton 3.6 and 3.7 interpret bfloat16 by the bits, of which it multiplies matrices as if they were integers, and
    which it cuts off where GPUs round to the nearest. Here products are of the numbers, and casts round."""
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar != tl.bfloat16:
            return cast(self, widened(src), dst_type)
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            bits = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16).view(torch.uint16).numpy()
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot


interpret_with_any_numpy()
interpret_bfloat16()
assert INTERPRETED, "run by test_narrow.py"


@pytest.mark.parametrize(("name", "rules", "dtype"), [
    *((name, rules, dtype) for dtype in HALF for name, rules in (
        ("mlp_tanh", "dlb"), ("mlp_batch_norm", "attnlrp"), ("logistic_regression", "dlb"))),
    ("llama_ids_only", "dlb", torch.bfloat16)])
def test_half_precision(name: str, rules: str, dtype: torch.dtype) -> None:
    check(name, rules, How("triton", dtype=dtype))


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_layer_with_one_number(outputs: int) -> None:
    """One row or column of a product, whose bias or weights are a single number: its block is not a number's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.SiLU(), nn.Linear(1, outputs)).eval()
    x = torch.randn(4, 3)
    plain, kernels = (dlbc.compile(model, x, rules="dlb", backend=b, cache=False)(x, target=0)
                      for b in ("torch", "triton"))
    np.testing.assert_allclose(kernels.relevance["input"], plain.relevance["input"], rtol=1e-5, atol=1e-5)


def test_a_wrong_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by less than a tenth, in half precision."""
    monkeypatch.setitem(TABLE, "tanh", "math.tanh({a} * 1.1)")
    with pytest.raises(AssertionError, match="mlp_tanh, dlb, "):
        check("mlp_tanh", "dlb", How("triton", dtype=torch.float16))
