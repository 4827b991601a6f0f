"""ATen's reductions, scans, sorts and softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dlbc.frontends.aten import Tracer, aten, listed, positive, type_of
from dlbc.ir.core import Operand
from dlbc.ir.dims import Dim

Axes = int | Sequence[int] | None


def dims_of(x: Operand, dim: Axes) -> tuple[int, ...] | None:
    """Axes counted from the front; None for all of them."""
    rank = type_of(x).rank
    chosen = tuple(sorted(positive(d, rank) for d in listed(dim)))
    return chosen if chosen and rank else None


@aten("sum")
def sum_(at: Tracer, x: Operand, dim: Axes = None, keepdim: bool = False, *, dtype: object = None) -> Operand:
    """Sum over axes."""
    return at.sum(at.converted(x, at.dtype(dtype, type_of(x).dtype)), dims=dims_of(x, dim), keepdim=keepdim)


@aten("mean")
def mean(at: Tracer, x: Operand, dim: Axes = None, keepdim: bool = False, *, dtype: object = None) -> Operand:
    """Mean over axes."""
    return at.mean(at.converted(x, at.dtype(dtype, type_of(x).dtype)), dims=dims_of(x, dim), keepdim=keepdim)


@aten("prod")
def prod(at: Tracer, x: Operand, dim: Axes = None, keepdim: bool = False, *, dtype: object = None) -> Operand:
    """Product over axes."""
    return at.prod(at.converted(x, at.dtype(dtype, type_of(x).dtype)), dims=dims_of(x, dim), keepdim=keepdim)


@aten("amax", "amin", "any", "all", "logsumexp")
def reduced(at: Tracer, x: Operand, dim: Axes = None, keepdim: bool = False) -> Operand:
    """A reduction of the same name in the catalogue."""
    return at.op(at.target.split(".")[0], x, dims=dims_of(x, dim), keepdim=keepdim)[0]


@aten("max.default", "min.default")
def extremum(at: Tracer, x: Operand) -> Operand:
    """The largest or smallest of all."""
    return at.amax(x) if at.target.startswith("max") else at.amin(x)


@aten("max.dim", "min.dim")
def extremum_along(at: Tracer, x: Operand, dim: int, keepdim: bool = False) -> tuple[Operand, ...]:
    """The largest or smallest along an axis, and its index."""
    name = "max_with_index" if at.target.startswith("max") else "min_with_index"
    return at.op(name, x, dim=positive(dim, type_of(x).rank), keepdim=keepdim)


@aten("aminmax")
def aminmax(at: Tracer, x: Operand, *, dim: int | None = None, keepdim: bool = False) -> tuple[Operand, ...]:
    """The smallest and the largest."""
    return (at.amin(x, dims=dims_of(x, dim), keepdim=keepdim), at.amax(x, dims=dims_of(x, dim), keepdim=keepdim))


def variance(at: Tracer, x: Operand, dim: Axes, correction: float | None, keepdim: bool) -> Operand:
    """Variance over axes; the divisor is the count minus the correction (1 when None)."""
    chosen = 1 if correction is None else int(correction)
    return at.var(x, dims=dims_of(x, dim), keepdim=keepdim, correction=chosen)


@aten("var.correction", "std.correction")
def var_correction(at: Tracer, x: Operand, dim: Axes = None, *, correction: float | None = None,
                   keepdim: bool = False) -> Operand:
    """Variance or standard deviation."""
    found = variance(at, x, dim, correction, keepdim)
    return at.sqrt(found) if at.target.startswith("std") else found


@aten("var.default", "std.default")
def var_all(at: Tracer, x: Operand, unbiased: bool = True) -> Operand:
    """Variance or standard deviation of everything."""
    return var_correction(at, x, correction=int(unbiased))


@aten("var.dim", "std.dim")
def var_dim(at: Tracer, x: Operand, dim: Axes, unbiased: bool = True, keepdim: bool = False) -> Operand:
    """Variance or standard deviation over axes."""
    return var_correction(at, x, dim, correction=int(unbiased), keepdim=keepdim)


@aten("var_mean.correction", "std_mean.correction")
def var_mean(at: Tracer, x: Operand, dim: Axes = None, *, correction: float | None = None,
             keepdim: bool = False) -> tuple[Operand, ...]:
    """Variance (or standard deviation) and mean."""
    return (var_correction(at, x, dim, correction=correction, keepdim=keepdim),
            at.mean(x, dims=dims_of(x, dim), keepdim=keepdim))


@aten("linalg_vector_norm")
def vector_norm(at: Tracer, x: Operand, ord: float = 2, dim: Axes = None, keepdim: bool = False, *,
                dtype: object = None) -> Operand:
    """The norm of order `ord` over axes."""
    x, axes = at.converted(x, at.dtype(dtype, at.out.dtype)), dims_of(x, dim)
    if ord == 2:
        return at.sqrt(at.sum(at.mul(x, x), dims=axes, keepdim=keepdim))
    if ord == 1:
        return at.sum(at.abs(x), dims=axes, keepdim=keepdim)
    if ord == 0:
        return at.converted(at.sum(at.ne(x, 0), dims=axes, keepdim=keepdim), at.out.dtype)
    if math.isinf(ord):
        return at.op("amax" if ord > 0 else "amin", at.abs(x), dims=axes, keepdim=keepdim)[0]
    return at.pow(at.sum(at.pow(at.abs(x), float(ord)), dims=axes, keepdim=keepdim), 1.0 / ord)


@aten("norm", "linalg_norm")
def norm(at: Tracer, x: Operand, p: float | None = None, dim: Axes = None, keepdim: bool = False, *,
         dtype: object = None) -> Operand:
    """The norm of order p (2 when None) over axes."""
    return vector_norm(at, x, 2 if p is None else p, dim, keepdim, dtype=dtype)


@aten("argmax", "argmin")
def argmax(at: Tracer, x: Operand, dim: int | None = None, keepdim: bool = False) -> Operand:
    """Index of the largest or smallest."""
    axis = None if dim is None else positive(dim, type_of(x).rank)
    return at.op(at.target.split(".")[0], x, dim=axis, keepdim=keepdim)[0]


@aten("cumsum")
def cumsum(at: Tracer, x: Operand, dim: int, *, dtype: object = None) -> Operand:
    """Running sum."""
    return at.cumsum(at.converted(x, at.dtype(dtype, type_of(x).dtype)), dim=positive(dim, type_of(x).rank))


@aten("count_nonzero")
def count_nonzero(at: Tracer, x: Operand, dim: Axes = None) -> Operand:
    """How many are not 0."""
    return at.sum(at.ne(x, 0), dims=dims_of(x, dim))


@aten("diff")
def diff(at: Tracer, x: Operand, n: int = 1, dim: int = -1, prepend: Operand = None,
         append: Operand = None) -> Operand:
    """Differences of neighbours, n times."""
    axis = positive(dim, type_of(x).rank)
    parts = [part for part in (prepend, x, append) if part is not None]
    x = at.cat(*parts, dim=axis) if len(parts) > 1 else x
    for _ in range(n):
        size = type_of(x).shape[axis]
        later, earlier = at.slice(x, dim=axis, start=1, stop=size), at.slice(x, dim=axis, stop=size - 1)
        x = at.ne(later, earlier) if type_of(x).dtype == "bool" else at.sub(later, earlier)
    return x


@aten("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "special_softmax",
      "special_log_softmax")
def softmax(at: Tracer, x: Operand, dim: int, dtype: object = None, half_to_float: bool = False) -> Operand:
    """Softmax, or its logarithm, along an axis; computed in `dtype`."""
    x = at.converted(x, at.out.dtype)
    axis = positive(dim, type_of(x).rank)
    if "safe" not in at.target:
        return at.op("log_softmax" if "log" in at.target else "softmax", x, dim=axis)[0]
    dead = at.all(at.eq(x, -math.inf), dims=(axis,), keepdim=True)
    return at.where(dead, 0.0, at.softmax(x, dim=axis))


@aten("topk")
def topk(at: Tracer, x: Operand, k: Dim, dim: int = -1, largest: bool = True,
         sorted: bool = True) -> tuple[Operand, ...]:
    """The k largest (or smallest) along an axis, and their indices."""
    return at.op("topk", x, k=k, dim=positive(dim, type_of(x).rank), largest=largest)


@aten("sort")
def sort(at: Tracer, x: Operand, dim: int = -1, descending: bool = False, *,
         stable: bool | None = None) -> tuple[Operand, ...]:
    """Sorted along an axis, and the indices that sort."""
    return at.op("sort", x, dim=positive(dim, type_of(x).rank), descending=descending)


@aten("sort.stable")
def sort_stable(at: Tracer, x: Operand, *, stable: bool | None = None, dim: int = -1,
                descending: bool = False) -> tuple[Operand, ...]:
    """Sorted along an axis, and the indices that sort."""
    return sort(at, x, dim, descending)


@aten("argsort")
def argsort(at: Tracer, x: Operand, dim: int = -1, descending: bool = False, **_: object) -> Operand:
    """The indices that sort."""
    return sort(at, x, dim, descending)[1]


@aten("argsort.stable")
def argsort_stable(at: Tracer, x: Operand, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Operand:
    """The indices that sort."""
    return sort(at, x, dim, descending)[1]


@aten("bucketize")
def bucketize(at: Tracer, x: Operand, boundaries: Operand, *, out_int32: bool = False, right: bool = False) -> Operand:
    """How many boundaries lie below x (at or below, when right)."""
    column = at.reshape(x, shape=(*type_of(x).shape, 1))
    below = at.ge(column, boundaries) if right else at.gt(column, boundaries)
    return at.converted(at.sum(below, dims=(type_of(x).rank,)), at.out.dtype)


@aten("cosine_similarity")
def cosine_similarity(at: Tracer, x: Operand, other: Operand, dim: int = 1, eps: float = 1e-8) -> Operand:
    """The cosine of the angle between vectors along an axis."""
    axes = dims_of(x, dim)

    def length(vector: Operand) -> Operand:
        return at.clamp(at.sqrt(at.sum(at.mul(vector, vector), dims=axes, keepdim=True)), low=eps)

    return at.sum(at.mul(at.div(x, length(x)), at.div(other, length(other))), dims=axes)
