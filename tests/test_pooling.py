"""Max pooling's way back where windows are tiles: the interpreter's numbers, however arrays lie and blocks are cut."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dlbc.ir import reference_layers
from dlbc_runtime import torch_kernels, torch_pooling

POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
LAYOUTS = {"plain": lambda x: x.contiguous(), "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
           "turned": lambda x: x.transpose(-1, 0).contiguous().transpose(-1, 0),
           "every other": lambda x: torch.stack([x, -x], -1).flatten(-2)[..., ::2]}


def unpooled(r: torch.Tensor, x: torch.Tensor, y: torch.Tensor, kernel: tuple[int, ...]) -> torch.Tensor:
    rank = len(kernel)
    return torch_kernels.max_pool_adjoint(r, x, y, kernel, kernel, (0,) * rank, (1,) * rank)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rank=st.integers(1, 3), seeds=st.sampled_from([1, 3]), block=st.sampled_from([1, 7, 40, 10**6]),
       layout=st.sampled_from(sorted(LAYOUTS)), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_tiles_are_the_interpreters(data: st.DataObject, rank: int, seeds: int, block: int, layout: str,
                                    dtype: torch.dtype) -> None:
    kernel = tuple(data.draw(st.integers(1, 5 if axis == 0 else 4)) for axis in range(rank))
    pooled = [data.draw(st.integers(1, 3)) for _ in kernel]
    lead = [data.draw(st.integers(1, 3)) for _ in range(2)]
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    x = torch.from_numpy(rng.integers(-1, 2, (*lead, *(n * k for n, k in zip(pooled, kernel, strict=True)))))
    x = LAYOUTS[layout](x.clamp_(min=0).to(dtype))  # as after a ReLU: windows of zeros, all of which tie
    y = POOLS[rank - 1](x.double(), kernel).to(dtype)
    r = LAYOUTS[layout](torch.from_numpy(rng.integers(-9, 9, (seeds, *y.shape)))).to(dtype)
    before = [each.clone() for each in (r, x, y)]
    with mock.patch.multiple(torch_pooling, SMALL=0, BLOCK=block):
        found = unpooled(r, x, y, kernel)
    attrs: dict[str, Any] = {"kernel": kernel, "stride": kernel, "padding": (0,) * rank, "dilation": (1,) * rank}
    expected = reference_layers.max_pool_adjoint(*(each.double().numpy() for each in before), **attrs, ceil_mode=False)
    assert found.dtype == dtype and found.shape == expected.shape
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=torch.finfo(dtype).eps, atol=0)
    for own, was in zip((r, x, y), before, strict=True):
        assert torch.equal(own, was)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_both_ways_through_tiles_are_one(layout: str) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(0, 3, (2, 5, 12, 8), generator=rng).float()
    x[0, 0, :3, :5] = math.nan
    x[0, 1, 4:, :2], x[1, 0, 4, 2] = math.inf, -math.inf
    x, y = LAYOUTS[layout](x), F.max_pool2d(x, 2)
    r = torch.randn(1, *y.shape, generator=rng)
    r[0, 1, 1, 3, 3], r[0, 1, 2, 1, 1] = math.nan, math.inf
    found = {}
    for small in (0, 10**9):
        with mock.patch.multiple(torch_pooling, SMALL=small, BLOCK=300):
            found[small] = unpooled(r, x, y, (2, 2))
    torch.testing.assert_close(found[0], found[10**9], rtol=0, atol=0, equal_nan=True)
    assert not found[0][0, 0, 0, :2, :4].any() and found[0].isnan().any()  # what NaN wins is lost


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_of_16_bits_count_all_that_tie(dtype: torch.dtype) -> None:
    x, y = torch.zeros(1, 16, 128, 8, dtype=dtype), torch.zeros(1, 16, 2, 2, dtype=dtype)
    found = unpooled(torch.full((1, *y.shape), 256.0, dtype=dtype), x, y, (64, 4))
    assert torch.equal(found, torch.ones(1, *x.shape, dtype=dtype))


class _Largest(TorchDispatchMode):
    """Bytes of the largest storages that ops made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.held: list[torch.UntypedStorage] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, list | tuple) else [found]:
            storage = each.untyped_storage()
            self.held.append(storage)  # so that no other one gets its address
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return found


@pytest.mark.parametrize("seeds", [1, 3])
def test_large_tiles_take_the_result_and_a_block(seeds: int) -> None:
    x = torch.rand(4, 16, 32, 32).relu()
    y = F.max_pool2d(x, 2)
    r = torch.randn(seeds, *y.shape)
    with mock.patch.object(torch_pooling, "BLOCK", 4096), _Largest() as made:
        found = unpooled(r, x, y, (2, 2))
    del made.sizes[found.untyped_storage().data_ptr()]
    given = {each.untyped_storage().data_ptr() for each in (r, x, y)}
    assert 0 < max(size for at, size in made.sizes.items() if at not in given) <= seeds * 4096 * 4
