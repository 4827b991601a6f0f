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

from dlbc_runtime import streams
from dlbc_runtime.torch_experts import (  # noqa: F401  generated code calls them
    combine,
    expert_linear,
    expert_order,
    grouped_linear,
    route_topk,
)
from dlbc_runtime.torch_pooling import (  # noqa: F401  generated code calls them
    adaptive_avg_pool_adjoint,
    adaptive_max_pool_adjoint,
    avg_pool,
    avg_pool_adjoint,
    interpolate,
    interpolate_adjoint,
    max_pool_adjoint,
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


# --- moves -------------------------------------------------------------------------------------------

def _from(dim: int, *places: Any) -> tuple[Any, ...]:
    """The index that puts `places` at axis `dim` and those after it."""
    return (*(slice(None),) * dim, *places)


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
