"""ATen's linear maps, convolutions, pools, norms and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dlbc.frontends.aten import UNSUPPORTED, Tracer, aten, positive, spread, type_of
from dlbc.ir.core import Operand, Weight
from dlbc.ir.dims import Dim, product

Numbers = Sequence[int]


@aten("linear")
def linear(at: Tracer, x: Operand, weight: Operand, bias: Operand = None) -> Operand:
    """`x @ weight.T + bias`."""
    if type_of(weight).rank == 1:
        y = linear(at, x, at.reshape(weight, shape=(1, *type_of(weight).shape)))
        return at.viewed(y if bias is None else at.add(y, bias), at.shape)
    if type_of(x).rank == 1:
        return at.reshape(linear(at, at.reshape(x, shape=(1, *type_of(x).shape)), weight, bias), shape=at.shape)
    return at.linear(x, weight, bias)


@aten("addmm")
def addmm(at: Tracer, bias: Operand, a: Operand, b: Operand, *, beta: float = 1, alpha: float = 1) -> Operand:
    """`beta * bias + alpha * a @ b`; a linear layer where b is a weight [in, out] and bias a vector."""
    if beta == alpha == 1 and isinstance(b, Weight) and type_of(bias).shape == type_of(b).shape[1:]:
        return at.linear(a, at.permute(b, dims=(1, 0)), bias)
    return baddbmm(at, bias, a, b, beta=beta, alpha=alpha)


@aten("baddbmm")
def baddbmm(at: Tracer, bias: Operand, a: Operand, b: Operand, *, beta: float = 1, alpha: float = 1) -> Operand:
    """`beta * bias + alpha * a @ b`, batched."""
    product = at.matmul(a, b)
    product = product if alpha == 1 else at.mul(product, alpha)
    if beta == 0:
        return product
    return at.add(bias if beta == 1 else at.mul(bias, beta), product)


@aten("addbmm")
def addbmm(at: Tracer, bias: Operand, a: Operand, b: Operand, *, beta: float = 1, alpha: float = 1) -> Operand:
    """`beta * bias + alpha * sum over the batch of a @ b`."""
    product = at.sum(at.matmul(a, b), dims=(0,))
    return at.add(bias if beta == 1 else at.mul(bias, beta), product if alpha == 1 else at.mul(product, alpha))


@aten("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner")
def matmul(at: Tracer, a: Operand, b: Operand) -> Operand:
    """Matrix product; vectors become matrices of one row or column."""
    left, right = type_of(a), type_of(b)
    if at.target.startswith("inner"):
        return at.einsum(a, b, equation=_inner(left.rank, right.rank)) if left.rank and right.rank else at.mul(a, b)
    a = at.reshape(a, shape=(1, *left.shape)) if left.rank == 1 else a
    b = at.reshape(b, shape=(*right.shape, 1)) if right.rank == 1 else b
    return at.viewed(at.matmul(a, b), at.shape)


def _inner(left: int, right: int) -> str:
    a, b = "abcdefghijklm"[:left - 1], "nopqrstuvwxy"[:right - 1]
    return f"{a}z,{b}z->{a}{b}"


@aten("outer", "ger")
def outer(at: Tracer, a: Operand, b: Operand) -> Operand:
    """Every product of two vectors' entries."""
    return at.mul(at.reshape(a, shape=(type_of(a).shape[0], 1)), b)


@aten("einsum")
def einsum(at: Tracer, equation: str, tensors: Sequence[Operand], *, path: object = None) -> Operand:
    """Sum of products by an equation; ellipses get letters, repeated letters a diagonal first."""
    equation = equation.replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    used = set(equation) - set("->,.")
    fresh = [c for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in used]
    widths = [type_of(x).rank - len(term.replace("...", "")) for term, x in zip(terms, tensors, strict=True)
              if "..." in term]
    ellipsis = "".join(fresh[:max(widths, default=0)])
    terms = [term.replace("...", ellipsis[len(ellipsis) - (type_of(x).rank - len(term.replace("...", ""))):])
             if "..." in term else term for term, x in zip(terms, tensors, strict=True)]
    counts = {c: sum(term.count(c) for term in terms) for c in used}
    implicit = ellipsis + "".join(sorted(c for c in used if counts[c] == 1))
    output = output.replace("...", ellipsis) if arrow else implicit
    operands: list[Operand] = []
    for i, x in enumerate(tensors):
        letters, x = terms[i], _without_ones(at, terms, i, tensors)
        while len(set(letters)) < len(letters):
            repeated = next(c for c in letters if letters.count(c) > 1)
            first, second = [j for j, c in enumerate(letters) if c == repeated][:2]
            x = _diagonal(at, x, 0, first, second, type_of(x).shape[first])
            letters = letters[:first] + letters[first + 1:second] + letters[second + 1:] + repeated
        terms[i] = letters
        operands.append(x)
    return at.einsum(*operands, equation=f"{','.join(terms)}->{output}")


def _without_ones(at: Tracer, terms: list[str], i: int, tensors: Sequence[Operand]) -> Operand:
    """Operand i with axes of size 1 dropped where the same letter is larger in another operand."""
    x, shape = tensors[i], type_of(tensors[i]).shape
    larger = {c for term, other in zip(terms, tensors, strict=True)
              for c, size in zip(term, type_of(other).shape, strict=False) if size != 1}
    kept = [j for j, c in enumerate(terms[i]) if shape[j] != 1 or c not in larger]
    if len(kept) == len(shape) or len(terms[i]) != len(shape):
        return x
    terms[i] = "".join(terms[i][j] for j in kept)
    return at.reshape(x, shape=tuple(shape[j] for j in kept))


@aten("diagonal", "diagonal_copy", "linalg_diagonal")
def diagonal(at: Tracer, x: Operand, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Operand:
    """The diagonal of two axes, as a new last axis."""
    return _diagonal(at, x, offset, positive(dim1, type_of(x).rank), positive(dim2, type_of(x).rank), at.shape[-1])


def _diagonal(at: Tracer, x: Operand, offset: int, first: int, second: int, length: Dim) -> Operand:
    """Every (columns + 1)-th element of the flattened matrix."""
    shape = type_of(x).shape
    rest = [d for d in range(len(shape)) if d not in (first, second)]
    rows, columns = shape[first], shape[second]
    start: Dim = offset if offset >= 0 else columns * -offset
    flat = at.reshape(at.permuted(x, (*rest, first, second)), shape=(*(shape[d] for d in rest), rows * columns))
    return _strided(at, flat, start, length, columns + 1)


def _strided(at: Tracer, x: Operand, start: Dim, length: Dim, step: Dim) -> Operand:
    axis = type_of(x).rank - 1
    if isinstance(step, int):
        return at.slice(x, dim=axis, start=start, stop=start + (length - 1) * step + 1, step=step)
    positions = at.add(at.mul(at.arange(stop=length), step), start)
    return at.take(x, positions, dim=axis)


@aten("bilinear")
def bilinear(at: Tracer, a: Operand, b: Operand, weight: Operand, bias: Operand = None) -> Operand:
    """`a^T W_o b` for each output o."""
    lead = "abcdefgh"[:type_of(a).rank - 1]
    y = at.einsum(a, weight, b, equation=f"{lead}x,oxy,{lead}y->{lead}o")
    return y if bias is None else at.add(y, bias)


@aten("_weight_norm")
def weight_norm(at: Tracer, v: Operand, g: Operand, dim: int = 0) -> Operand:
    """`g * v / |v|`, the norm over all axes but `dim` (over all when dim is -1)."""
    rank = type_of(v).rank
    axes = tuple(d for d in range(rank) if dim == -1 or d != positive(dim, rank))
    return at.mul(v, at.div(g, at.sqrt(at.sum(at.mul(v, v), dims=axes, keepdim=True))))


@aten("_weight_norm_interface")
def weight_norm_interface(at: Tracer, v: Operand, g: Operand, dim: int = 0) -> tuple[Operand, ...]:
    """`_weight_norm`; the second result, the norm itself, is for training."""
    return weight_norm(at, v, g, dim), None


@aten("embedding")
def embedding(at: Tracer, weight: Operand, ids: Operand, padding_idx: int = -1, scale_grad_by_freq: bool = False,
              sparse: bool = False) -> Operand:
    """Rows of the weight by ids."""
    return at.embedding(ids, weight)


# --- convolutions ------------------------------------------------------------------------------------

@aten("conv1d", "conv2d", "conv3d")
def conv(at: Tracer, x: Operand, weight: Operand, bias: Operand = None, stride: Numbers = (1,),
         padding: Numbers | str = (0,), dilation: Numbers = (1,), groups: int = 1) -> Operand:
    """Convolution, padding in numbers or in words."""
    rank = type_of(weight).rank - 2
    if type_of(x).rank == rank + 1:
        y = _conv(at, at.reshape(x, shape=(1, *type_of(x).shape)), weight, bias, stride, padding, dilation, groups)
        return at.reshape(y, shape=at.shape)
    return _conv(at, x, weight, bias, stride, padding, dilation, groups)


def _conv(at: Tracer, x: Operand, weight: Operand, bias: Operand, stride: Numbers, padding: Numbers | str,
          dilation: Numbers, groups: int) -> Operand:
    rank = type_of(weight).rank - 2
    steps, reach = spread(stride, rank), spread(dilation, rank)
    if padding == "same":
        totals = [reach[i] * (_static(at, type_of(weight).shape[i + 2]) - 1) for i in range(rank)]
        padding = [total // 2 for total in totals]
        if any(total % 2 for total in totals):
            x = at.pad(x, pads=((0, 0), (0, 0), *((0, total % 2) for total in totals)))
    pads = (0,) * rank if isinstance(padding, str) else spread(padding, rank, 0)
    return at.op(f"conv{rank}d", x, weight, bias, stride=steps, padding=pads, dilation=reach, groups=groups)[0]


def _static(at: Tracer, size: Dim) -> int:
    if not isinstance(size, int):
        raise at.unsupported(f"the size {size} must be a plain number", hint="compile with dynamic=False")
    return size


@aten("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(at: Tracer, x: Operand, weight: Operand, bias: Operand = None, stride: Numbers = (1,),
                   padding: Numbers = (0,), output_padding: Numbers = (0,), groups: int = 1,
                   dilation: Numbers = (1,)) -> Operand:
    """Transposed convolution."""
    rank = type_of(weight).rank - 2
    single = type_of(x).rank == rank + 1
    x = at.reshape(x, shape=(1, *type_of(x).shape)) if single else x
    y = at.op(f"conv_transpose{rank}d", x, weight, bias, stride=spread(stride, rank), padding=spread(padding, rank, 0),
              output_padding=spread(output_padding, rank, 0), dilation=spread(dilation, rank), groups=groups)[0]
    return at.reshape(y, shape=at.shape) if single else y


@aten("convolution", "_convolution")
def convolution(at: Tracer, x: Operand, weight: Operand, bias: Operand, stride: Numbers, padding: Numbers,
                dilation: Numbers, transposed: bool, output_padding: Numbers, groups: int, *_: object) -> Operand:
    """Any convolution."""
    if transposed:
        return conv_transpose(at, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(at, x, weight, bias, stride, padding, dilation, groups)


# --- pools -------------------------------------------------------------------------------------------

def _batched(at: Tracer, x: Operand, rank: int) -> Operand:
    return x if type_of(x).rank == rank + 2 else at.reshape(x, shape=(1, *type_of(x).shape))


def _rank(at: Tracer) -> int:
    return int(at.target.split("d")[-2][-1] if "pool" not in at.target else at.target.split("pool")[1][0])


@aten("max_pool1d", "max_pool2d", "max_pool3d")
def max_pool(at: Tracer, x: Operand, kernel_size: Numbers, stride: Numbers = (), padding: Numbers = (0,),
             dilation: Numbers = (1,), ceil_mode: bool = False) -> Operand:
    """Largest in each window."""
    rank = _rank(at)
    kernel = spread(kernel_size, rank)
    y = at.max_pool(_batched(at, x, rank), kernel=kernel, stride=spread(stride, rank, kernel),
                    padding=spread(padding, rank, 0), dilation=spread(dilation, rank), ceil_mode=ceil_mode)
    return at.viewed(y, at.shape)


@aten("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")
def max_pool_with_indices(at: Tracer, x: Operand, kernel_size: Numbers, stride: Numbers = (), padding: Numbers = (0,),
                          dilation: Numbers = (1,), ceil_mode: bool = False) -> tuple[Operand, ...]:
    """Largest in each window; its index only exists for unpooling."""
    return max_pool(at, x, kernel_size, stride, padding, dilation, ceil_mode), None


@aten("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(at: Tracer, x: Operand, kernel_size: Numbers, stride: Numbers = (), padding: Numbers = (0,),
             ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None) -> Operand:
    """Mean of each window."""
    rank = _rank(at)
    kernel = spread(kernel_size, rank)
    y = at.avg_pool(_batched(at, x, rank), kernel=kernel, stride=spread(stride, rank, kernel),
                    padding=spread(padding, rank, 0), ceil_mode=ceil_mode, count_include_pad=count_include_pad,
                    divisor=divisor_override)
    return at.viewed(y, at.shape)


@aten("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d",
      "_adaptive_avg_pool3d")
def adaptive_avg_pool(at: Tracer, x: Operand, output_size: Sequence[Dim]) -> Operand:
    """Mean over as many windows as asked."""
    return at.viewed(at.adaptive_avg_pool(_batched(at, x, _rank(at)), size=tuple(at.shape[-_rank(at):])), at.shape)


@aten("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pool(at: Tracer, x: Operand, output_size: Sequence[Dim]) -> tuple[Operand, ...]:
    """Largest over as many windows as asked."""
    y = at.adaptive_max_pool(_batched(at, x, _rank(at)), size=tuple(at.shape[-_rank(at):]))
    return at.viewed(y, at.shape), None


# --- norms -------------------------------------------------------------------------------------------

@aten("batch_norm", "cudnn_batch_norm")
def batch_norm(at: Tracer, x: Operand, weight: Operand, bias: Operand, mean: Operand, variance: Operand,
               training: bool, momentum: float, eps: float, cudnn_enabled: bool = False) -> Operand:
    """Batch norm by running statistics; by the batch's own where the layer keeps none."""
    if training:
        return _by_own_statistics(at, x, weight, bias, eps)
    return at.batch_norm(x, mean, variance, weight, bias, eps=eps)


def _by_own_statistics(at: Tracer, x: Operand, weight: Operand, bias: Operand, eps: float) -> Operand:
    """Each channel as one row of a layer norm, so that the rules of norms apply."""
    shape = type_of(x).shape
    rank = len(shape)
    order = (1, 0, *range(2, rank))
    rows = at.reshape(at.permute(x, dims=order), shape=(shape[1], product((shape[0], *shape[2:]))))
    y = at.reshape(at.layer_norm(rows, eps=eps), shape=tuple(shape[d] for d in order))
    y = at.permute(y, dims=order)
    y = y if weight is None else at.mul(y, _per_channel(at, weight, rank))
    return y if bias is None else at.add(y, _per_channel(at, bias, rank))


def _per_channel(at: Tracer, x: Operand, rank: int) -> Operand:
    return at.reshape(x, shape=(*type_of(x).shape, *(1,) * (rank - 2)))


@aten("_native_batch_norm_legit_no_training")
def batch_norm_no_training(at: Tracer, x: Operand, weight: Operand, bias: Operand, mean: Operand, variance: Operand,
                           momentum: float, eps: float) -> tuple[Operand, ...]:
    """Batch norm by running statistics."""
    return at.batch_norm(x, mean, variance, weight, bias, eps=eps), None, None


@aten("native_batch_norm", "_native_batch_norm_legit")
def native_batch_norm(at: Tracer, x: Operand, weight: Operand, bias: Operand, mean: Operand, variance: Operand,
                      training: bool, momentum: float, eps: float) -> tuple[Operand, ...]:
    """Batch norm."""
    return batch_norm(at, x, weight, bias, mean, variance, training, momentum, eps), None, None


@aten("_native_batch_norm_legit.no_stats")
def batch_norm_no_stats(at: Tracer, x: Operand, weight: Operand, bias: Operand, training: bool, momentum: float,
                        eps: float) -> tuple[Operand, ...]:
    """Batch norm by the batch's own statistics."""
    return _by_own_statistics(at, x, weight, bias, eps), None, None


@aten("instance_norm")
def instance_norm(at: Tracer, x: Operand, weight: Operand, bias: Operand, mean: Operand, variance: Operand,
                  use_input_stats: bool, momentum: float, eps: float, cudnn_enabled: bool = False) -> Operand:
    """A group norm of one channel each, or batch norm where the layer keeps running statistics."""
    if not use_input_stats:
        return at.batch_norm(x, mean, variance, weight, bias, eps=eps)
    return at.group_norm(x, weight, bias, groups=_static(at, type_of(x).shape[1]), eps=eps)


@aten("layer_norm")
def layer_norm(at: Tracer, x: Operand, normalized_shape: Sequence[Dim], weight: Operand = None, bias: Operand = None,
               eps: float = 1e-5, cudnn_enable: bool = True) -> Operand:
    """Layer norm over the last axes."""
    return at.layer_norm(x, weight, bias, dims=len(normalized_shape), eps=eps)


@aten("native_layer_norm")
def native_layer_norm(at: Tracer, x: Operand, normalized_shape: Sequence[Dim], weight: Operand, bias: Operand,
                      eps: float) -> tuple[Operand, ...]:
    """Layer norm."""
    return layer_norm(at, x, normalized_shape, weight, bias, eps), None, None


@aten("group_norm")
def group_norm(at: Tracer, x: Operand, num_groups: int, weight: Operand = None, bias: Operand = None,
               eps: float = 1e-5, cudnn_enabled: bool = True) -> Operand:
    """Group norm."""
    return at.group_norm(x, weight, bias, groups=num_groups, eps=eps)


@aten("native_group_norm")
def native_group_norm(at: Tracer, x: Operand, weight: Operand, bias: Operand, n: Dim, c: Dim, hw: Dim, group: int,
                      eps: float) -> tuple[Operand, ...]:
    """Group norm."""
    return group_norm(at, x, group, weight, bias, eps), None, None


@aten("rms_norm", "_fused_rms_norm")
def rms_norm(at: Tracer, x: Operand, normalized_shape: Sequence[Dim], weight: Operand = None,
             eps: float | None = None) -> Operand | tuple[Operand, ...]:
    """Root mean square norm; eps defaults to the element type's machine epsilon."""
    machine = {"f64": 2.0 ** -52, "f32": 2.0 ** -23, "f16": 2.0 ** -10, "bf16": 2.0 ** -7}
    own = machine.get(type_of(x).dtype, 2.0 ** -23)
    y = at.rms_norm(x, weight, dims=len(normalized_shape), eps=own if eps is None else float(eps))
    return (y, None) if at.target.startswith("_fused") else y


# --- attention ---------------------------------------------------------------------------------------

@aten("scaled_dot_product_attention")
def attention(at: Tracer, q: Operand, k: Operand, v: Operand, attn_mask: Operand = None, dropout_p: float = 0.0,
              is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False) -> Operand:
    """`softmax(q k^T scale + mask) v`, leading axes folded into [B, H]; causal from the top left, as torch has it."""
    if dropout_p:
        raise at.unsupported("attention dropout is active although the model is in eval mode",
                             hint="pass dropout_p=self.dropout if self.training else 0.0")
    query, key = type_of(q), type_of(k)
    if not isinstance(query.shape[-1], int) and scale is None:
        raise at.unsupported("the size of the attention heads is not a plain number", hint="compile with dynamic=False")
    factor = float(scale) if scale is not None else 1.0 / math.sqrt(int(str(query.shape[-1])))
    causal = is_causal and query.shape[-2] == key.shape[-2]
    if is_causal and not causal:
        attn_mask = _causal_mask(at, query.shape[-2], key.shape[-2])
    lead = at.shape[:-2]
    groups = (*lead[:-1], key.shape[-3]) if enable_gqa else lead
    q, k, v = _four(at, q, lead), _four(at, k, groups), _four(at, v, groups)
    if attn_mask is not None and query.rank != 4 and type_of(attn_mask).rank > 2:
        shape = type_of(attn_mask).shape
        attn_mask = at.expanded(attn_mask, (*lead, *shape[-2:]))
        attn_mask = at.reshape(attn_mask, shape=(*type_of(q).shape[:2], *shape[-2:]))
    return at.viewed(at.attention(q, k, v, attn_mask, scale=factor, causal=causal), at.shape)


def _causal_mask(at: Tracer, queries: Dim, keys: Dim) -> Operand:
    """True where key j <= query i: [queries, keys]."""
    row = at.reshape(at.arange(stop=queries), shape=(queries, 1))
    return at.ge(row, at.arange(stop=keys))


def _four(at: Tracer, x: Operand, lead: tuple[Dim, ...]) -> Operand:
    """x [..., T, D] broadcast to `lead` and given two leading axes."""
    shape = type_of(x).shape
    x = at.expanded(x, (*lead, *shape[-2:]))
    if len(lead) == 2:
        return x
    batch, heads = (lead[:1], ()) if len(lead) < 2 else (lead[:-1], lead[-1:])
    return at.reshape(x, shape=(product(batch), product(heads), *shape[-2:]))


UNSUPPORTED.update(dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "affine_grid_generator"),
                                 "grid sampling is not supported yet"))
