"""What generated torch code calls where one line of torch is not enough.

Results are the same bits at every run, on a CPU and on a GPU: where torch adds atomically (index_add_,
scatter_add on CUDA, index_put on several threads), another road is taken. Floating arithmetic replaces
`torch.where` on masks that are true and false at random: on a CPU it is up to ten times faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dlbc_runtime import interpolation, streams
from dlbc_runtime.torch_experts import (  # noqa: F401  generated code calls them
    combine,
    expert_linear,
    expert_order,
    grouped_linear,
    route_topk,
)
from dlbc_runtime.torch_products import linear, matmul  # noqa: F401  generated code calls them
from dlbc_runtime.torch_recurrent import gru, lstm, recurrence_adjoint, rnn  # noqa: F401  generated code calls them

SMALL = 4096
"""Elements below which the shorter road is the faster one."""


# --- elementwise -------------------------------------------------------------------------------------

def stabilise(x: Tensor, eps: float) -> Tensor:
    """`x + eps` where x >= 0, `x - eps` where x < 0."""
    found = x + _number(0.0, x)  # -0.0 + 0.0 is 0.0, which counts as positive
    torch.copysign(_number(eps, x), found, out=found)
    return found.add_(x)


def stabilise_(x: Tensor, eps: float) -> Tensor:
    """`stabilise`, written over x."""
    x += _number(0.0, x)
    return x.add_(torch.copysign(_number(eps, x), x))


def _number(value: float, like: Tensor) -> Tensor:
    """A number as a tensor without axes of the element type and on the device of `like`. Of the CPU, where making it
    takes longer than a small op, it is made once: nobody writes to it."""
    if like.is_cpu:
        return _number_on_cpu(value, like.dtype)
    return torch.full((), value, dtype=like.dtype, device=like.device)


@cache
def _number_on_cpu(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device="cpu")


def damp(m: Tensor, y: Tensor, eps: float) -> Tensor:
    """`m |y| / (|y| + eps)`, as m / (1 + eps / |y|): exactly 0 where y is, however large m is there."""
    return m / _damping(y, eps)


def damp_(m: Tensor, y: Tensor, eps: float) -> Tensor:
    """`damp`, written over m."""
    return m.div_(_damping(y, eps))


def _damping(y: Tensor, eps: float) -> Tensor:
    return y.abs().reciprocal_().mul_(_number(eps, y)).add_(_number(1.0, y))


def relu_adjoint(r: Tensor, x: Tensor) -> Tensor:
    """r where x > 0, else 0: one pass over memory."""
    found: Tensor = torch.ops.aten.threshold_backward(r, x, 0)
    return found


def relu_adjoint_(r: Tensor, x: Tensor) -> Tensor:
    """`relu_adjoint`, written over r."""
    found: Tensor = torch.ops.aten.threshold_backward.grad_input(r, x, 0, grad_input=r)
    return found


def safe_div(a: Tensor | float, b: Tensor | float) -> Tensor:
    """`a / b`, 0 where b is 0 (a finite)."""
    if isinstance(b, Tensor):
        return a / _never_zero(b)
    assert isinstance(a, Tensor)
    return a / b if b else torch.zeros_like(a)


def safe_div_(a: Tensor, b: Tensor | float) -> Tensor:
    """`safe_div`, written over a."""
    if isinstance(b, Tensor):
        return a.div_(_never_zero(b))
    return a.div_(b) if b else a.zero_()


def _never_zero(b: Tensor) -> Tensor:
    """b, with infinity in place of 0."""
    if b.is_cuda or b.numel() < SMALL:
        return b.masked_fill(b == 0, math.inf)
    return b.sign().square_().reciprocal_().sub_(1).add_(b)  # 1/1 - 1 + b, or 1/0 - 1 + 0


def where(condition: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """`torch.where` for float32 and a mask without long runs: selects bits, so NaN and -0.0 are kept."""
    if condition.is_cuda or condition.numel() < SMALL:
        return torch.where(condition, a, b)
    mask = condition.to(torch.int32)  # 0 or 1
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        bits = b.view(torch.int32)
        found = a.view(torch.int32).bitwise_xor(bits)
        if found.shape == mask.shape:  # it is ours, and as large as the result
            return found.bitwise_and_(mask.neg_()).bitwise_xor_(bits).view(torch.float32)
        return (found & mask.neg_()).bitwise_xor_(bits).view(torch.float32)
    if isinstance(a, Tensor) and b == 0:
        return _where_set(mask.neg_(), a)
    if isinstance(b, Tensor) and a == 0:
        return _where_set(mask.sub_(1), b)
    return torch.where(condition, a, b)


def _where_set(mask: Tensor, x: Tensor) -> Tensor:
    """x where all bits of an int32 mask are set, 0 where none is; written over the mask where that is large enough."""
    bits = x.view(torch.int32)
    return (mask.bitwise_and_(bits) if bits.shape == mask.shape else mask & bits).view(torch.float32)


def linear_rows(x: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """`sum_d x[..., d] rows[..., k, d] + bias[..., k]`."""
    y = torch.matmul(rows, x.unsqueeze(-1)).squeeze(-1)
    return y if bias is None else y + bias


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """`x * cos + rotate(x) * sin`; rotate is (-x2, x1) of the two halves, or of each pair."""
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + turned * sin


# --- norms and statistics ----------------------------------------------------------------------------

def var(x: Tensor, dims: tuple[int, ...], keepdim: bool = False, correction: int = 0) -> Tensor:
    """Variance over axes, in two passes; its own kernel in torch takes many times as long on a CPU."""
    if x.is_cuda:
        return torch.var(x, dims, correction=correction, keepdim=keepdim)
    count = math.prod(x.shape[dim] for dim in dims) - correction
    squares = _wide(x - x.mean(dims, keepdim=True)).square_().sum(dims, keepdim=keepdim)
    return squares.div_(count).to(x.dtype)


def row_statistics(x: Tensor, dims: int, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """Mean (0 when not centred) and `1 / sqrt(variance + eps)` over the last `dims` axes, kept as size 1."""
    axes = tuple(range(-dims, 0))
    wide = _wide(x)
    if centred:
        mean = wide.mean(axes, keepdim=True)
        wide = wide - mean
    else:
        mean = torch.zeros((*x.shape[:-dims], *(1,) * dims), dtype=wide.dtype, device=x.device)
    deviation = torch.linalg.vector_norm(wide, dim=axes, keepdim=True)
    scale = deviation.square_().div_(math.prod(x.shape[-dims:])).add_(eps).rsqrt_()
    return mean.to(x.dtype), scale.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# --- attention ---------------------------------------------------------------------------------------

def stream(function: Callable[..., Sequence[Tensor]], given: list[Tensor], **how: Any) -> tuple[Tensor, ...]:
    """The results of a function of blocks of rows, put together. See `streams.stream`."""
    return streams.stream(function, given, _zeros_like, **how)


def _zeros_like(shape: tuple[int, ...], x: Tensor) -> Tensor:
    return x.new_zeros(shape)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None = None, *, scale: float,
              causal: bool = False, window: int | None = None, softcap: float | None = None) -> Tensor:
    """`softmax(softcap(q k^T scale) + mask) v`; a row that sees nothing is 0. See the op `attention`.

    By blocks of rows where their weights, or with torch's own kernel the mask, would be large. `sinks` are one more key
    to that kernel (`_sunk`).
    """
    def block(given: list[Tensor]) -> tuple[Tensor]:
        (q, k, v), mask = given[:3], given[3] if len(given) == 4 else None
        if softcap is not None:
            weights = attention_weights(q, k, mask, sinks, scale=scale, causal=causal, window=window, softcap=softcap)
            return (_grouped(weights, v),)
        bias, blind = _bias(q, k, mask, causal, window)
        if sinks is not None:
            return (_sunk(q, k, v, None if bias is None else F.pad(bias, (1, 0)), sinks, scale),)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale,
                                             enable_gqa=q.shape[1] != k.shape[1])
        return (_zeroed(out, blind),)

    plain = mask is None and window is None and softcap is None
    if sinks is not None and plain and (not causal or q.shape[2] == k.shape[2]):
        return _sunk(q, k, v, None, sinks, scale, causal)
    heads = q.shape[1] if softcap is not None else 1 if mask is None else math.prod(mask.shape[1:-2])
    return cast(Tensor, streams.attend(block, q, k, v, mask, _zeros_like, width=q.shape[0] * heads * k.shape[2],
                                       causal=causal, window=window))


def _sunk(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor, scale: float,
          causal: bool = False) -> Tensor:
    """Attention with one more key in front, of value 0, whose score in each head is its sink; `bias` has its column.

    torch's kernel takes no such score, and a bias for each head would be as large as the weights. So the key has a
    channel of its own, in which queries hold `sink / scale`: halves hold it in two channels, high and low. A causal
    kernel counts from the first query and key, so that a query that is thrown away goes in front, too.
    """
    width, own, front = q.shape[-1], v.shape[-1], int(causal)
    more = -(-(max(width, own) + 2) // 8) * 8  # one width for all, and one that the kernels take
    most = torch.finfo(q.dtype).max / 4
    wanted = (sinks.to(torch.promote_types(q.dtype, torch.float32)) / scale).clamp(-most, most)
    high = wanted.to(q.dtype)
    q, k, v = _widened(q, front, more), _widened(k, 1, more), _widened(v, 1, more)
    q[..., width:width + 2] = torch.stack([high, (wanted - high).to(q.dtype)], -1)[:, None]
    k[..., 0, width:width + 2] = 1.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, is_causal=causal,
                                         enable_gqa=q.shape[1] != k.shape[1])
    return out[..., front:, :own].transpose(1, 2).contiguous().transpose(1, 2)


def _widened(x: Tensor, front: int, width: int) -> Tensor:
    """x [B, H, T, D] with rows of zeros in front, and zeros up to `width`."""
    out = x.new_zeros(*x.shape[:2], x.shape[2] + front, width)
    out[:, :, front:, :x.shape[-1]] = x
    return out


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, sinks: Tensor | None = None, *, scale: float,
                      causal: bool = False, window: int | None = None, softcap: float | None = None) -> Tensor:
    """The softmax of `attention`, [B, H, T, U]; 0 where masked, a row that sees nothing included."""
    scores = _grouped(q, k.mT).mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    bias, blind = _bias(q, k, mask, causal, window)
    if bias is not None:
        scores += bias
    if sinks is None:
        return _zeroed(torch.softmax(scores, -1), blind)
    scores = _wide(scores)
    sinks = sinks.to(scores.dtype)[:, None, None]
    top = torch.maximum(scores.amax(-1, keepdim=True), sinks).clamp_(min=torch.finfo(scores.dtype).min)
    scores = scores.sub_(top).exp_()
    total = scores.sum(-1, keepdim=True).add_(torch.exp(sinks - top))
    return scores.div_(total.clamp_(min=1.0)).to(q.dtype)  # the largest is 1, where anything is seen


def _zeroed(x: Tensor, blind: Tensor | None) -> Tensor:
    """x with 0 in the rows that see nothing; on a CPU no pass over x where there are none."""
    if blind is None or not (blind.device.type != "cpu" or bool(blind.any())):
        return x
    return x.masked_fill_(blind, 0.0)


def _bias(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool,
          window: int | None) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores, and which rows see nothing (None where each sees something).

    The bias has no axis of heads unless the mask has one; adding it is far cheaper than filling scores.
    """
    visible = _visible(q, k, causal, window)
    if mask is not None and mask.dtype == torch.bool:
        visible = mask if visible is None else mask & visible
    elif mask is not None:
        bias = mask.to(q.dtype)
        if visible is not None:
            bias = bias.masked_fill(~visible, -math.inf)
        return bias, (bias == -math.inf).all(-1, keepdim=True)
    if visible is None:
        return None, None
    bias = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, -math.inf)
    sure = mask is None and k.shape[-2] >= q.shape[-2] and (window is None or window > 0)
    return bias, None if sure else ~visible.any(-1, keepdim=True)


def _grouped(a: Tensor, b: Tensor) -> Tensor:
    """a [B, H, T, N] @ b [B, G, N, M], the heads of a group stacked as rows of one product."""
    (batch, heads, rows, inner), groups = a.shape, b.shape[1]
    if heads == groups:
        return torch.matmul(a, b)
    stacked = a.reshape(batch, groups, heads // groups * rows, inner)
    return torch.matmul(stacked, b).reshape(batch, heads, rows, b.shape[-1])


def _visible(q: Tensor, k: Tensor, causal: bool, window: int | None) -> Tensor | None:
    """True where query i sees key j: [T, U], None when it sees all."""
    if not causal and window is None:
        return None
    queries, keys = q.shape[-2], k.shape[-2]
    ahead = (torch.arange(keys - queries, keys, device=q.device).unsqueeze(1)
             - torch.arange(keys, device=q.device))  # how far the key lies behind the query
    if not causal:
        return ahead < window if window is not None else None
    return ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)


# --- pooling -----------------------------------------------------------------------------------------

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
    split: list[int] = []
    joined: list[int] = []
    for n, m in zip(x.shape[-rank:], y.shape[-rank:], strict=True):
        split += [m, n // m]
        joined += [m, 1]
    won = _equal(x.reshape(*x.shape[:-rank], *split), y.reshape(*y.shape[:-rank], *joined))
    count = won.sum(tuple(range(-2 * rank + 1, 0, 2)), keepdim=True).clamp_(min=1)
    share = r.reshape(*r.shape[:-rank], *joined) / count
    if r.shape[0] == 1 and won.dtype == share.dtype:
        return won.unsqueeze(0).mul_(share).reshape(1, *x.shape)
    return (share * won).reshape(r.shape[0], *x.shape)


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


def _from(dim: int, *places: Any) -> tuple[Any, ...]:
    """The index that puts `places` at axis `dim` and those after it."""
    return (*(slice(None),) * dim, *places)


# --- moves -------------------------------------------------------------------------------------------

def slice_adjoint(r: Tensor, dim: int, size: int, start: int, stop: int, step: int) -> Tensor:
    """Zeros of `size` along an axis with r at start, start + step, ..."""
    out = r.new_zeros((*r.shape[:dim], size, *r.shape[dim + 1:]))
    out[_from(dim, slice(start, stop, step))] = r
    return out


def select_adjoint(r: Tensor, dim: int, index: int, size: int) -> Tensor:
    """Zeros with a new axis of `size`, r at `index`."""
    out = r.new_zeros((*r.shape[:dim], size, *r.shape[dim:]))
    out.select(dim, index).copy_(r)
    return out


def scatter_add(base: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """base with source added at index along an axis."""
    if not base.is_cuda or base.ndim == 0:
        return torch.scatter_add(base, dim, index, source)
    source = source[tuple(slice(n) for n in index.shape)]
    places = [torch.arange(n, device=base.device).reshape((-1,) + (1,) * (index.ndim - 1 - i))
              for i, n in enumerate(index.shape)]
    places[dim] = index
    return torch.index_put(base, tuple(places), source, accumulate=True)  # sorts, so it is deterministic


def take_adjoint(r: Tensor, index: Tensor, dim: int, size: int) -> Tensor:
    """Zeros of `size` along an axis with slices of r added at index."""
    out = r.new_zeros((*r.shape[:dim], size, *r.shape[dim + index.ndim:]))
    rows = r.reshape(*r.shape[:dim], -1, *r.shape[dim + index.ndim:])
    return _add_rows(out, dim, index.reshape(-1) % size, rows)


def index_adjoint(r: Tensor, indices: Sequence[Tensor], dim: int, sizes: Sequence[int]) -> Tensor:
    """Zeros of `sizes` from axis `dim` on with r added at the indices."""
    flat = _flat(indices, sizes)
    before, after = r.shape[:dim], r.shape[dim + flat.ndim:]
    out = r.new_zeros((*before, math.prod(sizes), *after))
    return _add_rows(out, dim, flat.reshape(-1), r.reshape(*before, -1, *after)).reshape(*before, *sizes, *after)


def index_put(base: Tensor, source: Tensor | float, indices: Sequence[Tensor], dim: int,
              accumulate: bool = False) -> Tensor:
    """base with source written, or added, at indices from axis `dim` on."""
    sizes = base.shape[dim:dim + len(indices)]
    flat = _flat(indices, sizes)
    before, after = base.shape[:dim], base.shape[dim + len(indices):]
    rows = torch.as_tensor(source, dtype=base.dtype, device=base.device).expand(*before, *flat.shape, *after)
    rows = rows.reshape(*before, flat.numel(), *after)
    out = base.reshape(*before, -1, *after).clone()
    if accumulate:
        out = _add_rows(out, dim, flat.reshape(-1), rows)
    else:
        out.index_copy_(dim, flat.reshape(-1), rows)
    return out.reshape(base.shape)


def _flat(indices: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Indices of several axes as one index of the axes joined."""
    flat = indices[0] % sizes[0]
    for index, size in zip(indices[1:], sizes[1:], strict=True):
        flat = flat * size + index % size
    return flat.long()


def _add_rows(out: Tensor, dim: int, index: Tensor, rows: Tensor) -> Tensor:
    """rows added to `out` at an index of one axis, in a fixed order."""
    if not out.is_cuda:
        return out.index_add_(dim, index, rows)
    places: list[Tensor | None] = [*[None] * dim, index.long()]
    added: Tensor = torch.ops.aten.index_put_(out, places, rows, True)  # sorts, so it is deterministic
    return added
