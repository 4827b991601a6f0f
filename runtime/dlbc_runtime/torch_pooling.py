"""Pooling and resampling in torch, and their adjoints. Part of `torch_kernels`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlbc_runtime import interpolation

NARROW = 4
"""Places up to which windows are narrow: their neighbours along the last axis are taken one by one."""

SMALL = 4096
"""Elements below which the shorter road is the faster one."""

BLOCK = 1 << 23
"""Elements that are worked on at once on a CPU. Smaller blocks take less memory, but threads wait for each other at
every op: where others use the processor, too, that is what takes the time."""


def avg_pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], *,
             divisor: int, ceil_mode: bool = False, count_include_pad: bool = True) -> Tensor:
    """Sum of each window over `divisor`."""
    rank = len(kernel)
    flat = x.reshape(-1, 1, *x.shape[-rank:])
    pool = (F.avg_pool2d, F.avg_pool3d)[max(rank - 2, 0)]
    if rank == 1:
        flat, kernel, stride, padding = flat.unsqueeze(2), (1, *kernel), (1, *stride), (0, *padding)
    out = pool(flat, tuple(kernel), tuple(stride), tuple(padding), ceil_mode=ceil_mode,
               count_include_pad=count_include_pad, divisor_override=divisor)
    return out.reshape(*x.shape[:-rank], *out.shape[-rank:])


def avg_pool_adjoint(r: Tensor, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
                     padding: Sequence[int], *, ceil_mode: bool = False, count_include_pad: bool = True,
                     divisor: int | None = None) -> Tensor:
    """The adjoint of average pooling: r [..., *pooled] to [..., *size]."""
    rank = len(size)
    if rank == 3:  # torch's own adds atomically on CUDA
        return _by_axes(r, [_mean_matrix(*each, r, ceil_mode, count_include_pad, divisor is None) for each in
                            zip(r.shape[-3:], size, kernel, stride, padding, strict=True)], divisor)
    flat = r.reshape(1, -1, *r.shape[-rank:])
    spatial = tuple(size)
    if rank == 1:
        flat, spatial = flat.unsqueeze(2), (1, *size)
        kernel, stride, padding = (1, *kernel), (1, *stride), (0, *padding)
    like = r.new_empty(()).expand(1, flat.shape[1], *spatial)  # only its shape is read
    out: Tensor = torch.ops.aten.avg_pool2d_backward(flat, like, list(kernel), list(stride), list(padding),
                                                     ceil_mode, count_include_pad, divisor)
    return out.reshape(*r.shape[:-rank], *size)


def adaptive_avg_pool_adjoint(r: Tensor, size: Sequence[int]) -> Tensor:
    """The adjoint of adaptive average pooling: r [..., *pooled] to [..., *size]."""
    rank = len(size)
    pooled = r.shape[-rank:]
    if all(n == 1 for n in pooled):
        return (r / math.prod(size)).expand(*r.shape[:-rank], *size)
    matrices = []
    for inner, outer in zip(size, pooled, strict=True):
        start, end = _adaptive(inner, outer, r.device)
        matrices.append(_window_matrix(start, end, inner, end - start, r))
    return _by_axes(r, matrices, None)


def _adaptive(size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the windows of adaptive pooling start and end along an axis."""
    at = torch.arange(count, device=device)
    return at * size // count, ((at + 1) * size + count - 1) // count


def _mean_matrix(count: int, size: int, kernel: int, stride: int, padding: int, like: Tensor,
                 ceil_mode: bool, count_include_pad: bool, divide: bool) -> Tensor:
    """Average pooling along one axis as a matrix [count, size]."""
    del ceil_mode  # it is in `count`
    start = torch.arange(count, device=like.device) * stride - padding
    end = (start + kernel).clamp(max=size + padding)
    shown = end - start if count_include_pad else end.clamp(max=size) - start.clamp(min=0)
    return _window_matrix(start, end, size, shown if divide else torch.ones_like(shown), like)


def _window_matrix(start: Tensor, end: Tensor, size: int, divisor: Tensor, like: Tensor) -> Tensor:
    """Row i holds 1 / divisor[i] from start[i] to end[i]."""
    at = torch.arange(size, device=like.device)
    inside = (at >= start.unsqueeze(1)) & (at < end.unsqueeze(1))
    return inside.to(like.dtype) / divisor.unsqueeze(1).to(like.dtype)


def _by_axes(r: Tensor, matrices: Sequence[Tensor], divisor: int | None) -> Tensor:
    """r with each of its last axes taken through a matrix [axis, new]."""
    for back, matrix in enumerate(reversed(matrices), 1):
        r = torch.matmul(r.transpose(-back, -1), matrix).transpose(-back, -1)
    return r if divisor is None else r / divisor


def interpolate(x: Tensor, size: Sequence[int], mode: str, align_corners: bool,
                scales: Sequence[float] | None, antialias: bool, absolute: bool) -> Tensor:
    """x [..., *spatial] resampled to `size`; see the op `interpolate`."""
    rank = len(size)
    if absolute:
        found = interpolation.matrices(x.shape[-rank:], size, mode, align_corners, scales, antialias, absolute)
        return _by_axes(x, [torch.tensor(each.T, dtype=x.dtype, device=x.device) for each in found], None)
    name = {"nearest": "upsample_nearest", "nearest_exact": "_upsample_nearest_exact", "cubic": "upsample_bicubic",
            "linear": ("upsample_linear", "upsample_bilinear", "upsample_trilinear")[rank - 1]}[mode]
    function = getattr(torch.ops.aten, f"_{name}{rank}d_aa" if antialias else f"{name}{rank}d")
    flat = x if x.ndim == rank + 2 else x.reshape(-1, 1, *x.shape[-rank:])
    corners = () if mode.startswith("nearest") else (align_corners,)
    out: Tensor = function(flat, list(size), *corners, *(scales or (None,) * rank))
    return out.reshape(*x.shape[:-rank], *size)


def interpolate_adjoint(r: Tensor, size: Sequence[int], mode: str, align_corners: bool,
                        scales: Sequence[float] | None, antialias: bool, absolute: bool) -> Tensor:
    """The adjoint of interpolation, r [..., *resampled] to [..., *size]; torch's own adds atomically on CUDA."""
    found = interpolation.matrices(size, r.shape[-len(size):], mode, align_corners, scales, antialias, absolute)
    return _by_axes(r, [torch.tensor(each, dtype=r.dtype, device=r.device) for each in found], None)


def max_pool_adjoint(r: Tensor, x: Tensor, y: Tensor, kernel: Sequence[int], stride: Sequence[int],
                     padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """r [S, *y] to the winner of each window of x, in equal parts to those that tie: [S, *x]."""
    rank = len(kernel)
    pooled, size = y.shape[-rank:], x.shape[-rank:]
    if _tiles(kernel, stride, padding, dilation, size, pooled):
        return _to_winners_of_tiles(r, x, y, rank)
    needed = [(n - 1) * s + d * (k - 1) + 1
              for n, s, d, k in zip(pooled, stride, dilation, kernel, strict=True)]
    whole = [-(-max(n, p + m) // s) * s for n, p, m, s in zip(needed, padding, size, stride, strict=True)]
    pads = [side for i in reversed(range(rank)) for side in (padding[i], whole[i] - size[i] - padding[i])]
    phases = _phases(F.pad(x, pads, value=-math.inf), stride)
    windows = [_in_phases([at * d for at, d in zip(offsets, dilation, strict=True)], stride, pooled)
               for offsets in _offsets(kernel)]
    count = torch.zeros_like(y)
    for window in windows:
        count += _equal(phases[window], y)
    share = r / count.clamp_(min=1)
    out = r.new_zeros((*stride, r.shape[0], *phases.shape[rank:]))
    for window in windows:
        out[window] += share * _equal(phases[window], y)
    inside = [slice(padding[i], padding[i] + size[i]) for i in range(rank)]
    return _from_phases(out, rank)[_last(inside)]


def _phases(x: Tensor, stride: Sequence[int]) -> Tensor:
    """x [..., n] as [stride, ..., n / stride]: what windows read at one offset is then contiguous in memory."""
    rank, lead = len(stride), x.ndim - len(stride)
    split = [part for n, s in zip(x.shape[lead:], stride, strict=True) for part in (n // s, s)]
    order = (*range(lead + 1, lead + 2 * rank, 2), *range(lead), *range(lead, lead + 2 * rank, 2))
    return x.reshape(*x.shape[:lead], *split).permute(order).contiguous()


def _from_phases(x: Tensor, rank: int) -> Tensor:
    """The inverse of `_phases`."""
    lead = x.ndim - 2 * rank
    pairs = [axis for i in range(rank) for axis in (rank + lead + i, i)]
    sizes = [x.shape[rank + lead + i] * x.shape[i] for i in range(rank)]
    return x.permute((*range(rank, rank + lead), *pairs)).reshape(*x.shape[rank:rank + lead], *sizes)


def _in_phases(start: Sequence[int], stride: Sequence[int], count: Sequence[int]) -> tuple[Any, ...]:
    """Where the elements start, start + stride, ... lie in the phases of an array."""
    return (*(at % s for at, s in zip(start, stride, strict=True)),
            *_last([slice(at // s, at // s + n) for at, s, n in zip(start, stride, count, strict=True)]))


def adaptive_max_pool_adjoint(r: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """r [S, *y] to the winner of each window of x, in equal parts to those that tie: [S, *x]."""
    rank = x.ndim - 2
    size, pooled = x.shape[-rank:], y.shape[-rank:]
    if all(n % m == 0 for n, m in zip(size, pooled, strict=True)):
        return _to_winners_of_tiles(r, x, y, rank)
    bounds = [_adaptive(n, m, torch.device("cpu")) for n, m in zip(size, pooled, strict=True)]
    windows = [tuple(slice(int(start[i]), int(end[i])) for (start, end), i in zip(bounds, at, strict=True))
               for at in _offsets(pooled)]
    out = r.new_zeros((r.shape[0], *x.shape))
    for at, window in zip(_offsets(pooled), windows, strict=True):
        corner = _last([slice(i, i + 1) for i in at])
        won = _equal(x[_last(window)], y[corner])
        count = won.sum(tuple(range(-rank, 0)), keepdim=True).clamp_(min=1)
        out[_last(window)] += r[corner] / count * won
    return out


def _tiles(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
           size: Sequence[int], pooled: Sequence[int]) -> bool:
    """True where the windows cover each place exactly once."""
    return all(k == s and p == 0 and d == 1 and n == m * k for k, s, p, d, n, m in
               zip(kernel, stride, padding, dilation, size, pooled, strict=True))


def _to_winners_of_tiles(r: Tensor, x: Tensor, y: Tensor, rank: int) -> Tensor:
    """`max_pool_adjoint` of windows that cover each place exactly once."""
    each = [n // m for n, m in zip(x.shape[-rank:], y.shape[-rank:], strict=True)]
    narrow = each[-1] <= NARROW and math.prod(each) <= 256  # up to there numbers of 16 bits count every one
    if x.is_cpu and narrow and x.numel() >= SMALL:
        inner = x.movedim(-rank - 1, -1)
        if x.is_contiguous() or not inner.is_contiguous():
            return _to_winners_of_narrow_tiles(r, x, y, each)
        found = _to_winners_of_narrow_tiles(r.movedim(-rank - 1, -1), inner, y.movedim(-rank - 1, -1), [*each, 1])
        return found.movedim(-1, -rank - 1)  # channels lie last in memory: they are the rows, and of the result, too
    split = [part for n, m in zip(each, y.shape[-rank:], strict=True) for part in (m, n)]
    joined = [part for m in y.shape[-rank:] for part in (m, 1)]
    won = _equal(x.reshape(*x.shape[:-rank], *split), y.reshape(*y.shape[:-rank], *joined))
    count = won.sum(tuple(range(-2 * rank + 1, 0, 2)), keepdim=True).clamp_(min=1)
    share = r.reshape(*r.shape[:-rank], *joined) / count
    if r.shape[0] == 1 and won.dtype == share.dtype:
        return won.unsqueeze(0).mul_(share).reshape(1, *x.shape)
    return (share * won).reshape(r.shape[0], *x.shape)


def _to_winners_of_narrow_tiles(r: Tensor, x: Tensor, y: Tensor, each: Sequence[int]) -> Tensor:
    """The same by whole rows of x, and by blocks: on a CPU a loop over the two places of a window along a row takes
    many times as long as what it does. `each`: the places of a window along each axis."""
    rank, row = len(each), x.shape[-1]
    pooled = y.shape[-rank:-1]
    split = [part for m, n in zip(pooled, each[:-1], strict=True) for part in (m, n)]  # all axes but rows
    joined = [part for m in pooled for part in (m, 1)]
    out = torch.empty((r.shape[0], *x.shape), dtype=torch.result_type(r, x))
    alone = r.shape[0] == 1 and out.dtype == x.dtype  # shares then go where the winners are marked
    most = min(BLOCK, max(x.numel() // 2, BLOCK // 4))  # what is made of a half is less than y and r
    for block in _blocks(x.shape[:-rank], most // math.prod(x.shape[-rank:])):
        tops, seeds = y[block], (slice(None), *block)
        lead = tops.shape[:-rank]
        result = out[seeds].view(len(r), *lead, *split, row)
        won = result[0] if alone else torch.empty(result.shape[1:], dtype=x.dtype)
        torch.eq(x[block].reshape(won.shape), _repeated(tops, each[-1]).reshape(*lead, *joined, row), out=won)
        share = _repeated(r[seeds] / _count(won, rank, each[-1]), each[-1]).reshape(len(r), *lead, *joined, row)
        if alone:
            won.mul_(share[0])
        else:
            torch.mul(won, share, out=result)
    return out


def _count(won: Tensor, rank: int, width: int) -> Tensor:
    """How many won in each window, at least 1. `won` [..., windows, places, ..., row]: 1 for each that did."""
    rows = [won]
    for axis in range(won.ndim - 2 * rank + 2, won.ndim - rank + 1):
        rows = [row for each in rows for row in each.unbind(axis)]
    return _sum(_sum(rows).reshape(*rows[0].shape[:-1], -1, width).unbind(-1)).clamp(min=1)


def _blocks(sizes: Sequence[int], most: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cut axes of `sizes` into blocks of up to `most` positions, at least one."""
    if not sizes:
        yield ()
        return
    inner = math.prod(sizes[1:])
    step = most // inner
    if step:
        yield from ((slice(start, start + step),) for start in range(0, sizes[0], step))
        return
    for at in range(sizes[0]):
        yield from ((at, *rest) for rest in _blocks(sizes[1:], most))


def _repeated(x: Tensor, times: int) -> Tensor:
    """Each element of the last axis `times` times in a row."""
    return torch.stack([x] * times, -1).flatten(-2) if times > 1 else x


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of arrays of one shape; the first of them where it is the only one."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """1 where a is b, else 0, in their element type."""
    return torch.eq(a, b, out=torch.empty(0, dtype=a.dtype, device=a.device))


def _offsets(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every position in a box of `sizes`, in order."""
    found: list[tuple[int, ...]] = [()]
    for size in sizes:
        found = [(*before, at) for before in found for at in range(size)]
    return found


def _last(places: Sequence[slice | int]) -> tuple[Any, ...]:
    """The index that puts `places` at the last axes."""
    return (..., *places)
