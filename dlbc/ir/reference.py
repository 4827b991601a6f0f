"""What every op of the catalogue computes: one small obvious numpy function per op, in float64.

`REFERENCE[name](*operands, **attrs)` takes arrays (None for an operand left out) and all attributes, sizes
as numbers. Floating arrays are float64, integers int64. Nothing here is fast, all of it should be plain to
read; layers with windows, weights or statistics are in `reference_layers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from dlbc.ir.ops import axes
from dlbc.ir.reference_experts import EXPERTS
from dlbc.ir.reference_layers import LAYERS, Array, Dims, Index, safe_div
from dlbc.ir.reference_recurrent import RECURRENT

Pair: TypeAlias = "tuple[Array, Array]"
Function: TypeAlias = "Callable[..., Array | tuple[Array, ...]]"

# --- elementwise -------------------------------------------------------------------------------------

_erf = np.frompyfunc(math.erf, 1, 1)


def erf(x: Array) -> Array:
    """The Gauss error function, one number at a time."""
    return np.asarray(_erf(x), dtype=np.float64)


def sigmoid(x: Array) -> Array:
    """`1 / (1 + exp(-x))`, without overflow."""
    return np.exp(-np.logaddexp(0, -x))


def relu(x: Array) -> Array:
    """`max(x, 0)`."""
    return np.maximum(x, 0)


def hardsigmoid(x: Array) -> Array:
    """`relu6(x + 3) / 6`."""
    return np.asarray(np.clip(x + 3, 0, 6) / 6)


def gelu(x: Array, *, approximate: str = "none") -> Array:
    """`x * Phi(x)`, exactly or in one of its approximations."""
    if approximate == "tanh":
        share = (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))) / 2
    elif approximate == "quick":
        share = sigmoid(1.702 * x)
    else:
        share = (1 + erf(x / math.sqrt(2))) / 2
    return np.multiply(x, share)


def softplus(x: Array, *, beta: float = 1.0, threshold: float = 20.0) -> Array:
    """`log(1 + exp(beta x)) / beta`, x itself where `beta x > threshold`."""
    return np.where(beta * x > threshold, x, np.logaddexp(0, beta * x) / beta)


def elu(x: Array, *, alpha: float, scale: float, input_scale: float) -> Array:
    """`scale * x` where x > 0, else `scale * alpha * (exp(input_scale x) - 1)`."""
    return scale * np.where(x > 0, x, alpha * np.expm1(input_scale * x))


def leaky_relu(x: Array, *, negative_slope: float) -> Array:
    """`x` where x > 0, else `negative_slope * x`."""
    return np.where(x > 0, x, negative_slope * x)


def prelu(x: Array, slope: Array) -> Array:
    """`x` where x > 0, else `slope * x`; more than one slope: one per channel (axis 1)."""
    slope = slope.reshape(-1, *(1,) * (x.ndim - 2)) if slope.size > 1 else slope.reshape(())
    return np.where(x > 0, x, slope * x)


def clamp(x: Array, *, low: float | None, high: float | None) -> Array:
    """`min(max(x, low), high)`."""
    x = x if low is None else np.maximum(x, low)
    return x if high is None else np.minimum(x, high)


def cast(x: Array, *, dtype: str) -> Array:
    """The same numbers; the interpreter stores them as the result's type."""
    return x


def stabilise(x: Array, *, eps: float) -> Array:
    """`x + eps * sign(x)` with sign(0) = +1."""
    return x + np.where(x >= 0, eps, -eps)


def damp(m: Array, y: Array, *, eps: float) -> Array:
    """`m |y| / (|y| + eps)`."""
    return m * np.abs(y) / (np.abs(y) + eps)


def threshold(x: Array, threshold: float, value: float) -> Array:
    """`x` where larger than the threshold, else `value`; NaN stays NaN."""
    return np.where(x <= threshold, value, x)


def relu_adjoint(r: Array, x: Array) -> Array:
    """r where x > 0, else 0."""
    return np.where(x > 0, r, 0.0)


def where(condition: Array, a: Array, b: Array) -> Array:
    """`a` where condition, else `b`."""
    return np.where(condition, a, b)


GATES: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x * sigmoid(x), "gelu": gelu, "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: gelu(x, approximate="quick"), "relu": relu, "sigmoid": sigmoid, "tanh": np.tanh,
}


def glu(gate: Array, up: Array, *, activation: str) -> Array:
    """`activation(gate) * up`."""
    return GATES[activation](gate) * up


ELEMENTWISE: dict[str, Function] = {
    "exp": np.exp, "expm1": np.expm1, "log": np.log, "log1p": np.log1p, "sqrt": np.sqrt, "sin": np.sin,
    "cos": np.cos, "tan": np.tan, "tanh": np.tanh, "atan": np.arctan, "erf": erf, "sigmoid": sigmoid,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "reciprocal": lambda x: 1 / x,
    "log_sigmoid": lambda x: -np.logaddexp(0, -x),
    "silu": lambda x: x * sigmoid(x),
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "hardswish": lambda x: x * hardsigmoid(x),
    "hardsigmoid": hardsigmoid,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "neg": np.negative, "abs": np.abs, "sign": np.sign, "relu": relu, "floor": np.floor, "ceil": np.ceil,
    "round": np.round, "bitwise_not": np.invert, "logical_not": np.logical_not, "isnan": np.isnan,
    "isinf": np.isinf,
    "negative_part": lambda x: np.minimum(x, 0),
    "gelu": gelu, "softplus": softplus, "elu": elu, "leaky_relu": leaky_relu, "prelu": prelu,
    "clamp": clamp, "cast": cast, "stabilise": stabilise, "damp": damp,
    "relu_adjoint": relu_adjoint, "threshold": threshold,
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.true_divide, "safe_div": safe_div,
    "pow": np.power, "maximum": np.maximum, "minimum": np.minimum, "floor_divide": np.floor_divide,
    "remainder": np.mod, "bitwise_and": np.bitwise_and, "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor, "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "logical_and": np.logical_and, "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
    "where": where, "glu": glu,
}


# --- creation ----------------------------------------------------------------------------------------

def full(*, shape: Dims, value: float, dtype: str) -> Array:
    """A tensor filled with one number."""
    return np.full(shape, value)


def arange(*, stop: int, start: int, step: int, dtype: str) -> Array:
    """`start, start + step, ...` below `stop`."""
    return np.arange(start, stop, step)


# --- reductions and scans ----------------------------------------------------------------------------

def _reduction(function: Callable[..., Array]) -> Function:
    def reduce(x: Array, *, dims: Dims | None, keepdim: bool) -> Array:
        return function(x, axis=axes(x.ndim, dims), keepdims=keepdim)

    return reduce


def logsumexp(x: Array, *, axis: Dims, keepdims: bool) -> Array:
    """`log(sum(exp(x)))`, with the largest element taken out first."""
    top = np.max(x, axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    total: Array = np.log(np.sum(np.exp(x - top), axis=axis, keepdims=True)) + top
    return total if keepdims else np.squeeze(total, axis=axis)


def var(x: Array, *, dims: Dims | None, keepdim: bool, correction: int) -> Array:
    """Variance; the divisor is the count minus `correction`."""
    return np.asarray(np.var(x, axis=axes(x.ndim, dims), keepdims=keepdim, ddof=correction))


def _where_extreme(function: Callable[..., Array]) -> Function:
    def position(x: Array, *, dim: int | None, keepdim: bool) -> Array:
        return function(x, axis=dim, keepdims=keepdim)

    return position


def cumsum(x: Array, *, dim: int) -> Array:
    """Running sum."""
    return np.cumsum(x, axis=dim)


def softmax(x: Array, *, dim: int) -> Array:
    """`exp(x) / sum(exp(x))`."""
    e = np.exp(x - np.max(x, axis=dim, keepdims=True))
    y: Array = e / np.sum(e, axis=dim, keepdims=True)
    return y


def log_softmax(x: Array, *, dim: int) -> Array:
    """`x - log(sum(exp(x)))`."""
    return x - logsumexp(x, axis=(dim,), keepdims=True)


def sort(x: Array, *, dim: int, descending: bool, stable: bool = True) -> Pair:
    """Sorted, and the indices that sort; equal elements keep their order."""
    key = x.astype(np.int64) if x.dtype == bool else x
    order = np.argsort(-key if descending else key, axis=dim, kind="stable")
    return np.take_along_axis(x, order, axis=dim), order


def topk(x: Array, *, k: int, dim: int, largest: bool) -> Pair:
    """The first k of the sorted axis."""
    ordered, order = sort(x, dim=dim, descending=largest)
    first = np.arange(k)
    return np.take(ordered, first, axis=dim), np.take(order, first, axis=dim)


def _with_index(position: Callable[..., Array]) -> Function:
    def extreme(x: Array, *, dim: int, keepdim: bool) -> Pair:
        where = position(x, axis=dim, keepdims=True)
        found = np.take_along_axis(x, where, axis=dim)
        return (found, where) if keepdim else (np.squeeze(found, axis=dim), np.squeeze(where, axis=dim))

    return extreme


REDUCTIONS: dict[str, Function] = {
    "sum": _reduction(np.sum), "mean": _reduction(np.mean), "prod": _reduction(np.prod),
    "amax": _reduction(np.max), "amin": _reduction(np.min), "any": _reduction(np.any),
    "all": _reduction(np.all), "logsumexp": _reduction(logsumexp), "var": var,
    "argmax": _where_extreme(np.argmax), "argmin": _where_extreme(np.argmin), "cumsum": cumsum,
    "softmax": softmax, "log_softmax": log_softmax, "topk": topk, "sort": sort,
    "max_with_index": _with_index(np.argmax), "min_with_index": _with_index(np.argmin),
}


# --- moves -------------------------------------------------------------------------------------------

def _along(rank: int, dim: int, taken: slice | int) -> Index:
    """The index that takes `taken` from one axis and everything from the others."""
    chosen: list[slice | int] = [slice(None)] * rank
    chosen[dim] = taken
    return tuple(chosen)


def slice_(x: Array, *, dim: int, start: int, stop: int, step: int) -> Array:
    """Elements start, start + step, ... below stop."""
    return x[_along(x.ndim, dim, slice(start, stop, step))]


def slice_adjoint(r: Array, *, dim: int, size: int, start: int, stop: int, step: int) -> Array:
    """Zeros with r put where the slice was taken."""
    shape = list(r.shape)
    shape[dim] = size
    whole = np.zeros(shape, r.dtype)
    whole[_along(r.ndim, dim, slice(start, stop, step))] = r
    return whole


def select(x: Array, *, dim: int, index: int) -> Array:
    """One index along an axis."""
    return x[_along(x.ndim, dim, index)]


def select_adjoint(r: Array, *, dim: int, index: int, size: int) -> Array:
    """Zeros with a new axis `dim`, r at `index`."""
    dim = dim % (r.ndim + 1)
    whole = np.zeros((*r.shape[:dim], size, *r.shape[dim:]), r.dtype)
    whole[_along(whole.ndim, dim, index)] = r
    return whole


def pad(x: Array, *, pads: tuple[tuple[int, int], ...], value: float) -> Array:
    """Crop where a pad is negative, then put `value` where it is positive."""
    x = x[tuple(slice(max(-before, 0), size - max(-after, 0))
                for size, (before, after) in zip(x.shape, pads, strict=True))]
    return np.pad(x, [(max(before, 0), max(after, 0)) for before, after in pads], constant_values=value)


def triangle(x: Array, *, diagonal: int, upper: bool) -> Array:
    """triu or tril."""
    return np.triu(x, diagonal) if upper else np.tril(x, diagonal)


def _grid(index: Array, dim: int) -> Index:
    """Full coordinates of the elements that `index` names along one axis, its own along the others."""
    places: list[Array] = list(np.indices(index.shape))
    places[dim] = index
    return tuple(places)


def gather(x: Array, index: Array, *, dim: int) -> Array:
    """`y[..., i, ...] = x[..., index[..., i, ...], ...]`."""
    return x[_grid(index, dim)]


def scatter(base: Array, index: Array, source: Array, *, dim: int) -> Array:
    """base with source written at index."""
    y = base.copy()
    y[_grid(index, dim)] = _within(source, index)
    return y


def scatter_add(base: Array, index: Array, source: Array, *, dim: int) -> Array:
    """base with source added at index."""
    y = base.copy()
    np.add.at(y, _grid(index, dim), _within(source, index))
    return y


def _within(source: Array, index: Array) -> Array:
    """The part of source that has an index (a scalar is its own part)."""
    return source[tuple(slice(size) for size in index.shape)] if source.ndim else source


def take(x: Array, index: Array, *, dim: int) -> Array:
    """Whole slices of x."""
    return np.take(x, index, axis=dim)


def take_adjoint(r: Array, index: Array, *, dim: int, size: int) -> Array:
    """Zeros with slices of r added at index."""
    return index_adjoint(r, index, dims=(dim % r.ndim,), sizes=(size,))


def _behind(axes_before: int, indices: tuple[Array, ...]) -> Index:
    """The index that keeps some axes and indexes those after them."""
    return (*(slice(None),) * axes_before, *indices)


def index_(x: Array, *indices: Array, dims: Dims) -> Array:
    """x indexed along consecutive axes."""
    return x[_behind(dims[0], indices)]


def index_adjoint(r: Array, *indices: Array, dims: Dims, sizes: Dims) -> Array:
    """Zeros with r added at the indices."""
    rank = np.broadcast(*indices).ndim
    whole = np.zeros((*r.shape[:dims[0]], *sizes, *r.shape[dims[0] + rank:]), r.dtype)
    np.add.at(whole, _behind(dims[0], indices), r)
    return whole


def index_put(base: Array, source: Array, *indices: Array, dims: Dims, accumulate: bool) -> Array:
    """base with source written or added at the indices."""
    y = base.copy()
    places = _behind(dims[0], indices)
    if accumulate:
        np.add.at(y, places, source)
    else:
        y[places] = source
    return y


MOVES: dict[str, Function] = {
    "reshape": lambda x, *, shape: x.reshape(shape),
    "permute": lambda x, *, dims: x.transpose(dims),
    "expand": lambda x, *, shape: np.broadcast_to(x, shape),
    "cat": lambda *xs, dim: np.concatenate(xs, axis=dim),
    "flip": lambda x, *, dims: np.flip(x, axis=dims),
    "roll": lambda x, *, shifts, dims: np.roll(x, shifts, axis=dims),
    "slice": slice_, "slice_adjoint": slice_adjoint, "select": select, "select_adjoint": select_adjoint,
    "pad": pad, "triangle": triangle, "gather": gather, "scatter": scatter, "scatter_add": scatter_add,
    "take": take, "take_adjoint": take_adjoint, "index": index_, "index_adjoint": index_adjoint,
    "index_put": index_put,
}

REFERENCE: dict[str, Function] = {
    **ELEMENTWISE, "full": full, "arange": arange, **REDUCTIONS, **LAYERS, **RECURRENT, **EXPERTS, **MOVES,
}
"""The function of every op in the catalogue, by the op's name."""
