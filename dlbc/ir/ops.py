"""The op catalogue: add an op here.

An op is a function from the types of its operands to the types of its results. Positional parameters
are operands (`| None`: may be left out; `*xs`: any number; `Scalar`: a literal is welcome too);
keyword-only parameters are attributes with their defaults. The docstring says what the op computes.
Sizes in attributes may be symbolic. Axes are counted from 0 at the front, or from -1 at the back.

What else an op needs lives in one table each: numbers in `reference.py`, code in `backends/*/table.py`,
relevance in `passes/rules/`. `docs/adding.md` has the whole list.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeAlias

from dlbc.errors import IRError
from dlbc.ir.core import DTYPES, FLOATS, INTEGERS, Attr, Op, Operand, Type
from dlbc.ir.dims import Dim, Sym, minimum, product

Scalar: TypeAlias = "Type | int | float | bool | Sym"
Infer: TypeAlias = "Callable[..., Type | tuple[Type, ...]]"


@dataclass(frozen=True, slots=True)
class OpDef:
    """One entry of the catalogue: name, type inference, names of operands and defaults of attributes."""

    name: str
    infer: Infer
    operands: tuple[str, ...]
    optional: frozenset[str]
    variadic: bool
    attrs: dict[str, Attr]
    required: frozenset[str]
    elementwise: bool
    summary: str


OPS: dict[str, OpDef] = {}

STABILISER = 1e-9
"""What keeps denominators away from 0 unless a rule says otherwise: below what float32 resolves in sums of numbers
around 1, so that it decides next to nothing. With the literature's 1e-6, rounding decides how much it takes."""


def op(name: str, *, elementwise: bool = False) -> Callable[[Infer], Infer]:
    """Register the decorated type inference as the op `name`."""

    def register(infer: Infer) -> Infer:
        signature = inspect.signature(infer)
        positional = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
        keywords = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
        OPS[name] = OpDef(
            name=name, infer=infer,
            operands=tuple(p.name for p in positional),
            optional=frozenset(p.name for p in positional if p.default is None),
            variadic=any(p.kind is p.VAR_POSITIONAL for p in positional),
            attrs={p.name: p.default for p in keywords if p.default is not p.empty},
            required=frozenset(p.name for p in keywords if p.default is p.empty),
            elementwise=elementwise, summary=inspect.getdoc(infer) or "")
        return infer

    return register


def definition(name: str) -> OpDef:
    """The catalogue's entry for an op; IRError with the nearest names when there is none."""
    if name not in OPS:
        near = get_close_matches(name, OPS, 3)
        raise IRError(f"unknown op `{name}`",
                      hint=f"did you mean {', '.join(near)}?" if near else "the catalogue is dlbc/ir/ops.py")
    return OPS[name]


def infer(name: str, operands: Sequence[Operand], attrs: dict[str, Attr]) -> tuple[Type, ...]:
    """Types of an op's results. IRError when operands or attributes do not fit the op."""
    entry = definition(name)
    unknown = set(attrs) - set(entry.attrs) - entry.required
    if unknown:
        raise IRError(f"`{name}` has no attribute `{min(unknown)}`",
                      hint=f"it has {', '.join([*sorted(entry.required), *entry.attrs]) or 'none'}")
    missing = entry.required - set(attrs)
    if missing:
        raise IRError(f"`{name}` lacks the attribute `{min(missing)}`", hint=entry.summary)
    needed = [o for o in entry.operands if o not in entry.optional]
    if not entry.variadic and not len(needed) <= len(operands) <= len(entry.operands):
        raise IRError(f"`{name}` takes {len(needed)}"
                      f"{f' to {len(entry.operands)}' if entry.optional else ''} operands, got {len(operands)}",
                      hint=entry.summary)
    types = [getattr(operand, "type", operand) for operand in operands]
    try:
        found = entry.infer(*types, **attrs)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
        shown = ", ".join(str(t) for t in types)
        raise IRError(f"`{name}({shown})` does not fit: {problem}", hint=entry.summary) from problem
    return found if isinstance(found, tuple) else (found,)


# --- helpers of type inference -----------------------------------------------------------------------

def require(condition: bool, fact: str) -> None:
    """Raise IRError with `fact` unless `condition`."""
    if not condition:
        raise IRError(fact)


def axis(rank: int, index: int) -> int:
    """An axis counted from the front, whichever end it was counted from."""
    require(-rank <= index < max(rank, 1), f"axis {index} is out of range for rank {rank}")
    return index % rank if rank else 0


def axes(rank: int, index: Attr) -> tuple[int, ...]:
    """Axes counted from the front; None means all of them."""
    if index is None or index == ():
        return tuple(range(rank))
    chosen = index if isinstance(index, tuple) else (index,)
    return tuple(sorted(axis(rank, i) for i in chosen if isinstance(i, int)))


def broadcast(*shapes: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The shape that shapes broadcast to, aligned at the back."""
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[Dim] = []
    for position in range(rank):
        size: Dim = 1
        for shape in shapes:
            own = shape[position - rank + len(shape)] if position - rank + len(shape) >= 0 else 1
            if not (own == size or own == 1 or size == 1):  # asked first: the text takes longer to make than all else
                shown = " and ".join(map(_shape, shapes))
                require(False, f"shapes {shown} do not broadcast: {size} against {own}")
            size = own if size == 1 else size
        result.append(size)
    return tuple(result)


def promote(*scalars: Scalar) -> str:
    """The element type of an arithmetic result.

    Rank-0 tensors only raise the category (bool, integer, floating) of tensors, literals that of both.
    """
    best = ""
    for tier in ([s.dtype for s in scalars if isinstance(s, Type) and s.rank],
                 [s.dtype for s in scalars if isinstance(s, Type) and not s.rank],
                 [_literal(s) for s in scalars if not isinstance(s, Type)]):
        if tier and (not best or _category(_widest(tier)) > _category(best)):
            best = _widest(tier)
    return best


def _literal(value: int | float | bool | Sym) -> str:
    return "bool" if isinstance(value, bool) else "f32" if isinstance(value, float) else "i64"


def _category(dtype: str) -> int:
    return 2 if dtype in FLOATS else 1 if dtype in INTEGERS else 0


def _widest(dtypes: Sequence[str]) -> str:
    if {"f16", "bf16"} <= set(dtypes) and not {"f32", "f64"} & set(dtypes):
        return "f32"
    if "u8" in dtypes and "i8" in dtypes:
        dtypes = [*dtypes, "i16"]
    order = ("bool", "u8", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64")
    return max(dtypes, key=order.index, default="bool")


def _shape(shape: tuple[Dim, ...]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _sizes(*scalars: Scalar) -> tuple[Dim, ...]:
    return broadcast(*(s.shape for s in scalars if isinstance(s, Type)))


def _pooled(size: Dim, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> Dim:
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return span // stride + 1
    out = (span + stride - 1) // stride + 1
    if padding + stride <= dilation * (kernel - 1) + 1:
        return out
    return minimum(out, (size + padding - 1) // stride + 1)  # the last window may not start in the padding


def _reduced(x: Type, dims: Attr, keepdim: bool) -> tuple[Dim, ...]:
    gone = axes(x.rank, dims)
    return tuple(1 if i in gone else d for i, d in enumerate(x.shape) if keepdim or i not in gone)


# --- elementwise -------------------------------------------------------------------------------------

def _unary(name: str, summary: str, *, floating: bool = True, dtype: str = "") -> None:
    def infer_unary(x: Type) -> Type:
        return Type(dtype or ("f32" if floating and not x.floating else x.dtype), x.shape)

    infer_unary.__doc__ = summary
    op(name, elementwise=True)(infer_unary)


for _name, _text in {
    "exp": "`e ** x`", "expm1": "`e ** x - 1`", "log": "natural logarithm", "log1p": "`log(1 + x)`",
    "sqrt": "square root", "rsqrt": "`1 / sqrt(x)`", "reciprocal": "`1 / x`", "sin": "sine",
    "cos": "cosine", "tan": "tangent", "tanh": "hyperbolic tangent", "atan": "arc tangent",
    "erf": "Gauss error function", "sigmoid": "`1 / (1 + exp(-x))`", "log_sigmoid": "`log(sigmoid(x))`",
    "silu": "`x * sigmoid(x)`", "mish": "`x * tanh(softplus(x))`", "hardswish": "`x * relu6(x + 3) / 6`",
    "hardsigmoid": "`relu6(x + 3) / 6`", "softsign": "`x / (1 + |x|)`",
}.items():
    _unary(_name, _text + ".")
for _name, _text in {
    "neg": "`-x`", "abs": "`|x|`", "sign": "-1, 0 or 1", "relu": "`max(x, 0)`", "floor": "largest integer below",
    "ceil": "smallest integer above", "round": "nearest integer, ties to even",
    "negative_part": "`min(x, 0)`", "bitwise_not": "bitwise or logical complement",
}.items():
    _unary(_name, _text + ".", floating=False)
for _name, _text in {"logical_not": "true where x is 0", "isnan": "true where x is not a number",
                     "isinf": "true where x is infinite"}.items():
    _unary(_name, _text + ".", dtype="bool")


@op("gelu", elementwise=True)
def gelu(x: Type, *, approximate: str = "none") -> Type:
    """`x * Phi(x)`; approximate="tanh" is the tanh form, "quick" is `x * sigmoid(1.702 x)`."""
    require(approximate in ("none", "tanh", "quick"), f"gelu has no approximation `{approximate}`")
    return x


@op("softplus", elementwise=True)
def softplus(x: Type, *, beta: float = 1.0, threshold: float = 20.0) -> Type:
    """`log(1 + exp(beta x)) / beta`, x itself where `beta x > threshold`."""
    return x


@op("elu", elementwise=True)
def elu(x: Type, *, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Type:
    """`scale * x` where x > 0, else `scale * alpha * (exp(input_scale x) - 1)`; selu and celu too."""
    return x


@op("leaky_relu", elementwise=True)
def leaky_relu(x: Type, *, negative_slope: float = 0.01) -> Type:
    """`x` where x > 0, else `negative_slope * x`."""
    return x


@op("prelu", elementwise=True)
def prelu(x: Type, slope: Type) -> Type:
    """`x` where x > 0, else `slope * x`; slope is a scalar or one number per channel (axis 1)."""
    return x


@op("clamp", elementwise=True)
def clamp(x: Type, *, low: float | None = None, high: float | None = None) -> Type:
    """`min(max(x, low), high)`; relu6 and hardtanh too."""
    return Type(promote(x, *(bound for bound in (low, high) if bound is not None)), x.shape)


@op("cast", elementwise=True)
def cast(x: Type, *, dtype: str) -> Type:
    """The same numbers in another element type."""
    require(dtype in DTYPES, f"unknown element type `{dtype}`")
    return Type(dtype, x.shape)


@op("stabilise", elementwise=True)
def stabilise(x: Type, *, eps: float = STABILISER) -> Type:
    """`x + eps * sign(x)` with sign(0) = +1: a denominator that is never 0."""
    return x


@op("damp", elementwise=True)
def damp(m: Type, y: Type, *, eps: float = STABILISER) -> Type:
    """`m |y| / (|y| + eps)`: what a stabilised division by y leaves of a multiplier m of y."""
    return Type(m.dtype, broadcast(m.shape, y.shape))


@op("relu_adjoint", elementwise=True)
def relu_adjoint(r: Type, x: Type) -> Type:
    """r where x > 0, else 0."""
    return Type(r.dtype, broadcast(r.shape, x.shape))


def _binary(name: str, summary: str, *, dtype: str = "", floating: bool = False) -> None:
    def infer_binary(a: Scalar, b: Scalar) -> Type:
        found = dtype or promote(a, b)
        return Type("f32" if floating and found not in FLOATS else found, _sizes(a, b))

    infer_binary.__doc__ = summary
    op(name, elementwise=True)(infer_binary)


for _name, _text in {
    "add": "`a + b`", "sub": "`a - b`", "mul": "`a * b`", "pow": "`a ** b`", "maximum": "the larger",
    "minimum": "the smaller", "floor_divide": "`floor(a / b)`", "remainder": "`a - b * floor(a / b)`",
    "bitwise_and": "bitwise or logical and", "bitwise_or": "bitwise or logical or",
    "bitwise_xor": "bitwise or logical exclusive or",
}.items():
    _binary(_name, _text + ".")
_binary("div", "`a / b`.", floating=True)
_binary("safe_div", "`a / b`, 0 where b = 0.", floating=True)
for _name, _text in {"eq": "=", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
                     "logical_and": "and", "logical_or": "or", "logical_xor": "xor"}.items():
    _binary(_name, f"`a {_text} b`.", dtype="bool")


@op("where", elementwise=True)
def where(condition: Scalar, a: Scalar, b: Scalar) -> Type:
    """`a` where condition, else `b`."""
    return Type(promote(a, b), _sizes(condition, a, b))


@op("threshold", elementwise=True)
def threshold(x: Type, *, threshold: float = 0.0, value: float) -> Type:
    """`x` where larger than the threshold, else `value`; NaN stays NaN."""
    return x


@op("glu", elementwise=True)
def glu(gate: Type, up: Type, *, activation: str = "silu") -> Type:
    """`activation(gate) * up`: the gated product of SwiGLU ("silu"), GeGLU ("gelu", "gelu_tanh"), ..."""
    require(activation in ("silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "sigmoid", "tanh"),
            f"no gate `{activation}`")
    return Type(promote(gate, up), _sizes(gate, up))


# --- creation ----------------------------------------------------------------------------------------

@op("full")
def full(*, shape: tuple[Dim, ...], value: float | int | bool | Sym, dtype: str) -> Type:
    """A tensor filled with one number."""
    return Type(dtype, shape)


@op("arange")
def arange(*, stop: Dim, start: Dim = 0, step: int = 1, dtype: str = "i64") -> Type:
    """`start, start + step, ...` below `stop`."""
    return Type(dtype, ((stop - start + step - (1 if step > 0 else -1)) // step,))


# --- reductions and scans ----------------------------------------------------------------------------

def _reduction(name: str, summary: str, *, dtype: str = "", integers: str = "") -> None:
    def infer_reduction(x: Type, *, dims: tuple[int, ...] | None = None, keepdim: bool = False) -> Type:
        found = dtype or (integers if integers and not x.floating else x.dtype)
        return Type(found, _reduced(x, dims, keepdim))

    infer_reduction.__doc__ = summary
    op(name)(infer_reduction)


_reduction("sum", "Sum over axes (all of them when None).", integers="i64")
_reduction("mean", "Mean over axes.")
_reduction("prod", "Product over axes.", integers="i64")
_reduction("amax", "Largest over axes.")
_reduction("amin", "Smallest over axes.")
_reduction("any", "True where any is nonzero.", dtype="bool")
_reduction("all", "True where all are nonzero.", dtype="bool")
_reduction("logsumexp", "`log(sum(exp(x)))` over axes.")


@op("var")
def var(x: Type, *, dims: tuple[int, ...] | None = None, keepdim: bool = False, correction: int = 0) -> Type:
    """Variance over axes; the divisor is the count minus `correction`."""
    return Type(x.dtype, _reduced(x, dims, keepdim))


@op("argmax")
def argmax(x: Type, *, dim: int | None = None, keepdim: bool = False) -> Type:
    """Index of the (first) largest element along an axis, of the flattened tensor when None."""
    return Type("i64", _reduced(x, dim, keepdim))


@op("argmin")
def argmin(x: Type, *, dim: int | None = None, keepdim: bool = False) -> Type:
    """Index of the (first) smallest element along an axis, of the flattened tensor when None."""
    return Type("i64", _reduced(x, dim, keepdim))


@op("cumsum")
def cumsum(x: Type, *, dim: int) -> Type:
    """Running sum along an axis."""
    return x if x.floating else Type("i64", x.shape)


@op("softmax")
def softmax(x: Type, *, dim: int) -> Type:
    """`exp(x) / sum(exp(x))` along an axis; a row of -inf gives NaN, as in torch."""
    return x


@op("log_softmax")
def log_softmax(x: Type, *, dim: int) -> Type:
    """`log(softmax(x))` along an axis."""
    return x


@op("topk")
def topk(x: Type, *, k: Dim, dim: int = -1, largest: bool = True) -> tuple[Type, Type]:
    """The k largest along an axis in order, and their indices."""
    shape = tuple(k if i == axis(x.rank, dim) else d for i, d in enumerate(x.shape))
    return Type(x.dtype, shape), Type("i64", shape)


@op("sort")
def sort(x: Type, *, dim: int = -1, descending: bool = False, stable: bool = True) -> tuple[Type, Type]:
    """Sorted along an axis, and the indices that sort."""
    return x, Type("i64", x.shape)


@op("max_with_index")
def max_with_index(x: Type, *, dim: int, keepdim: bool = False) -> tuple[Type, Type]:
    """The largest along an axis, and the (first) index of it."""
    shape = _reduced(x, dim, keepdim)
    return Type(x.dtype, shape), Type("i64", shape)


@op("min_with_index")
def min_with_index(x: Type, *, dim: int, keepdim: bool = False) -> tuple[Type, Type]:
    """The smallest along an axis, and the (first) index of it."""
    shape = _reduced(x, dim, keepdim)
    return Type(x.dtype, shape), Type("i64", shape)


# --- linear maps -------------------------------------------------------------------------------------

@op("linear")
def linear(x: Type, weight: Type, bias: Type | None = None) -> Type:
    """`y = x @ weight.T + bias` over the last axis; weight [out, in], bias [out]."""
    require(weight.rank == 2, f"a weight of rank {weight.rank}, not 2")
    require(x.shape[-1] == weight.shape[1], f"the last axis of x is {x.shape[-1]}, the weight takes {weight.shape[1]}")
    require(bias is None or bias.shape == weight.shape[:1], f"bias {bias} for {weight.shape[0]} outputs")
    return Type(promote(x, weight), (*x.shape[:-1], weight.shape[0]))


@op("linear_rows")
def linear_rows(x: Type, rows: Type, bias: Type | None = None) -> Type:
    """`y[..., k] = sum_d x[..., d] rows[..., k, d] + bias[..., k]`: a linear layer with rows chosen per position."""
    require(rows.rank == x.rank + 1 and rows.shape[-1] == x.shape[-1], f"rows {rows} for x {x}")
    require(bias is None or bias.shape == rows.shape[:-1], f"bias {bias} for rows {rows}")
    return Type(promote(x, rows), (*broadcast(x.shape[:-1], rows.shape[:-2]), rows.shape[-2]))


@op("matmul")
def matmul(a: Type, b: Type) -> Type:
    """Matrix product over the last two axes, batch axes broadcast; both of rank >= 2."""
    require(a.rank >= 2 and b.rank >= 2, "matmul takes matrices; reshape vectors first")
    require(a.shape[-1] == b.shape[-2], f"inner sizes {a.shape[-1]} and {b.shape[-2]} differ")
    batch = broadcast(a.shape[:-2], b.shape[:-2])
    return Type(promote(a, b), (*batch, a.shape[-2], b.shape[-1]))


@op("einsum")
def einsum(*xs: Type, equation: str) -> Type:
    """Sum of products by an explicit equation such as `bqhd,bkhd->bhqk`, without ellipses."""
    inputs, output = equation.split("->")
    require(all(c.isascii() and c.isalpha() for c in inputs.replace(",", "") + output), "axes are named by letters")
    sizes: dict[str, Dim] = {}
    for letters, x in zip(inputs.split(","), xs, strict=True):
        require(len(letters) == x.rank, f"`{letters}` for rank {x.rank}")
        for letter, size in zip(letters, x.shape, strict=True):
            require(sizes.setdefault(letter, size) == size, f"`{letter}` is {sizes[letter]} and {size}")
    return Type(promote(*xs), tuple(sizes[letter] for letter in output))


def _conv(rank: int) -> None:
    ones, zeros = (1,) * rank, (0,) * rank

    def conv(x: Type, weight: Type, bias: Type | None = None, *, stride: tuple[int, ...] = ones,
             padding: tuple[int, ...] = zeros, dilation: tuple[int, ...] = ones, groups: int = 1) -> Type:
        require(x.rank == rank + 2, f"x has rank {x.rank}, not {rank + 2}")
        require(x.shape[1] == weight.shape[1] * groups, f"{x.shape[1]} channels for weight {weight}, groups {groups}")
        sizes = (_pooled(x.shape[i + 2], _int(weight.shape[i + 2]), stride[i], padding[i], dilation[i], False)
                 for i in range(rank))
        return Type(promote(x, weight), (x.shape[0], weight.shape[0], *sizes))

    conv.__doc__ = f"{rank}-d convolution: x [B, C, ...], weight [out, C / groups, ...], bias [out]."
    op(f"conv{rank}d")(conv)

    def conv_transpose(x: Type, weight: Type, bias: Type | None = None, *, stride: tuple[int, ...] = ones,
                       padding: tuple[int, ...] = zeros, output_padding: tuple[Dim, ...] = zeros,
                       dilation: tuple[int, ...] = ones, groups: int = 1) -> Type:
        require(x.shape[1] == weight.shape[0], f"{x.shape[1]} channels for weight {weight}")
        sizes = ((x.shape[i + 2] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (_int(weight.shape[i + 2]) - 1)
                 + output_padding[i] + 1 for i in range(rank))
        return Type(promote(x, weight), (x.shape[0], weight.shape[1] * groups, *sizes))

    conv_transpose.__doc__ = f"{rank}-d transposed convolution: x [B, C, ...], weight [C, out / groups, ...]."
    op(f"conv_transpose{rank}d")(conv_transpose)


def _int(dim: Dim) -> int:
    if not isinstance(dim, int):
        raise IRError(f"the size {dim} must be a plain number here")
    return dim


for _rank in (1, 2, 3):
    _conv(_rank)


@op("embedding")
def embedding(ids: Type, weight: Type) -> Type:
    """Rows of weight [V, D] by integer ids: ids' shape and D."""
    return Type(weight.dtype, (*ids.shape, weight.shape[1]))


@op("rotary")
def rotary(x: Type, cos: Type, sin: Type, *, interleaved: bool = False) -> Type:
    """`x * cos + rotate(x) * sin` on the last axis; rotate is (-x2, x1) of the two halves, or of pairs."""
    return Type(promote(x, cos, sin), broadcast(x.shape, cos.shape, sin.shape))


# --- pooling -----------------------------------------------------------------------------------------

@op("max_pool")
def max_pool(x: Type, *, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
             dilation: tuple[int, ...], ceil_mode: bool = False) -> Type:
    """Largest in each window; x [B, C, ...] with as many trailing axes as `kernel` has numbers."""
    return Type(x.dtype, _windows(x, kernel, stride, padding, dilation, ceil_mode))


@op("max_pool_adjoint")
def max_pool_adjoint(r: Type, x: Type, y: Type, *, kernel: tuple[int, ...], stride: tuple[int, ...],
                     padding: tuple[int, ...], dilation: tuple[int, ...], ceil_mode: bool = False) -> Type:
    """r [S, *y] carried to the winner of each window of x, shared equally among ties: [S, *x]."""
    return Type(r.dtype, (r.shape[0], *x.shape))


@op("avg_pool")
def avg_pool(x: Type, *, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
             ceil_mode: bool = False, count_include_pad: bool = True, divisor: int | None = None) -> Type:
    """Mean of each window."""
    return Type(x.dtype, _windows(x, kernel, stride, padding, (1,) * len(kernel), ceil_mode))


@op("avg_pool_adjoint")
def avg_pool_adjoint(r: Type, *, size: tuple[Dim, ...], kernel: tuple[int, ...], stride: tuple[int, ...],
                     padding: tuple[int, ...], ceil_mode: bool = False, count_include_pad: bool = True,
                     divisor: int | None = None) -> Type:
    """The adjoint of avg_pool: r [..., *pooled] to [..., *size], `size` the spatial size before pooling."""
    return Type(r.dtype, (*r.shape[:-len(size)], *size))


@op("adaptive_avg_pool")
def adaptive_avg_pool(x: Type, *, size: tuple[Dim, ...]) -> Type:
    """Mean over windows from floor(i in / out) to ceil((i + 1) in / out)."""
    return Type(x.dtype, (*x.shape[:-len(size)], *size))


@op("adaptive_avg_pool_adjoint")
def adaptive_avg_pool_adjoint(r: Type, *, size: tuple[Dim, ...]) -> Type:
    """The adjoint of adaptive_avg_pool: `size` is the spatial size before pooling."""
    return Type(r.dtype, (*r.shape[:-len(size)], *size))


@op("adaptive_max_pool")
def adaptive_max_pool(x: Type, *, size: tuple[Dim, ...]) -> Type:
    """Largest over windows from floor(i in / out) to ceil((i + 1) in / out)."""
    return Type(x.dtype, (*x.shape[:-len(size)], *size))


@op("adaptive_max_pool_adjoint")
def adaptive_max_pool_adjoint(r: Type, x: Type, y: Type) -> Type:
    """r [S, *y] carried to the winner of each window of x, shared equally among ties: [S, *x]."""
    return Type(r.dtype, (r.shape[0], *x.shape))


@op("interpolate")
def interpolate(x: Type, *, size: tuple[Dim, ...], mode: str, align_corners: bool = False,
                scales: tuple[float, ...] | None = None, antialias: bool = False,
                absolute: bool = False) -> Type:
    """x [..., *spatial] resampled to `size`, axis by axis; mode "nearest", "nearest_exact", "linear" or "cubic".

    As torch's `interpolate`: `scales` are the user's factors, used in place of the ratio of sizes. `absolute`: with
    absolute weights; those of "cubic" are of both signs.
    """
    _resampling(x, size, mode, align_corners or antialias, scales)
    return Type(x.dtype, (*x.shape[:-len(size)], *size))


@op("interpolate_adjoint")
def interpolate_adjoint(r: Type, *, size: tuple[Dim, ...], mode: str, align_corners: bool = False,
                        scales: tuple[float, ...] | None = None, antialias: bool = False,
                        absolute: bool = False) -> Type:
    """The adjoint of interpolate: `size` is the spatial size before it."""
    _resampling(r, size, mode, align_corners or antialias, scales)
    return Type(r.dtype, (*r.shape[:-len(size)], *size))


def _resampling(x: Type, size: tuple[Dim, ...], mode: str, smooth: bool,
                scales: tuple[float, ...] | None) -> None:
    require(mode in ("nearest", "nearest_exact", "linear", "cubic"), f"no interpolation `{mode}`")
    require(not (smooth and "nearest" in mode), f"`{mode}` aligns no corners and knows no antialiasing")
    require(len(size) < x.rank, f"{len(size)} spatial axes for rank {x.rank}")
    require(scales is None or len(scales) == len(size), f"{scales} for {len(size)} axes")


def _windows(x: Type, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
             dilation: tuple[int, ...], ceil_mode: bool) -> tuple[Dim, ...]:
    rank = len(kernel)
    sizes = (_pooled(x.shape[i - rank], kernel[i], stride[i], padding[i], dilation[i], ceil_mode)
             for i in range(rank))
    return (*x.shape[:-rank], *sizes)


# --- norms -------------------------------------------------------------------------------------------

@op("batch_norm")
def batch_norm(x: Type, mean: Type, variance: Type, weight: Type | None = None, bias: Type | None = None,
               *, eps: float = 1e-5) -> Type:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` per channel (axis 1), running statistics."""
    return x


@op("layer_norm")
def layer_norm(x: Type, weight: Type | None = None, bias: Type | None = None, *, dims: int = 1,
               eps: float = 1e-5) -> Type:
    """Zero mean and unit variance over the last `dims` axes, then `* weight + bias`."""
    return x


@op("rms_norm")
def rms_norm(x: Type, weight: Type | None = None, *, dims: int = 1, eps: float = 1e-6) -> Type:
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last `dims` axes; computed in float32 at least."""
    return x if weight is None else Type(promote(x, weight), x.shape)


@op("group_norm")
def group_norm(x: Type, weight: Type | None = None, bias: Type | None = None, *, groups: int,
               eps: float = 1e-5) -> Type:
    """Zero mean and unit variance over each group of channels (axis 1) and all later axes, then affine."""
    return x


@op("row_statistics")
def row_statistics(x: Type, *, dims: int = 1, eps: float = 1e-5, centred: bool = True) -> tuple[Type, Type]:
    """Mean and `1 / sqrt(variance + eps)` over the last `dims` axes, kept as size 1; not centred: mean 0."""
    shape = (*x.shape[:-dims], *(1,) * dims)
    return Type(x.dtype, shape), Type(x.dtype, shape)


# --- attention ---------------------------------------------------------------------------------------

@op("attention")
def attention(q: Type, k: Type, v: Type, mask: Type | None = None, sinks: Type | None = None, *, scale: float,
              causal: bool = False, window: int | None = None, softcap: float | None = None) -> Type:
    """`softmax(softcap(q k^T scale) + mask) v`; q [B,H,T,D], k and v [B,G,U,D], H a multiple of G.

    Head h reads group h // (H / G). `causal`: query i sees keys j <= i + U - T. `window`: only keys with
    i + U - T - j < window. `mask`: True = visible, or an additive bias, broadcast to [B,H,T,U]. A row
    that sees nothing is 0. softcap c: `c tanh(s / c)`. `sinks` [H]: one more score in each row of a head, which every
    query sees and whose value is 0: a row's weights sum to 1 less the sink's.
    """
    require(q.rank == 4 and k.rank == 4 and v.rank == 4, "attention takes q, k, v of rank 4")
    require(q.shape[-1] == k.shape[-1], f"q and k have heads of {q.shape[-1]} and {k.shape[-1]}")
    _sinks(q, sinks)
    return Type(promote(q, k, v), (*q.shape[:-1], v.shape[-1]))


@op("attention_weights")
def attention_weights(q: Type, k: Type, mask: Type | None = None, sinks: Type | None = None, *, scale: float,
                      causal: bool = False, window: int | None = None, softcap: float | None = None) -> Type:
    """The softmax of `attention` without its sinks: [B,H,T,U], 0 where masked."""
    _sinks(q, sinks)
    return Type(promote(q, k), (*q.shape[:-1], k.shape[-2]))


def _sinks(q: Type, sinks: Type | None) -> None:
    require(sinks is None or (sinks.floating and sinks.shape == q.shape[1:2]),
            f"sinks {sinks} for {q.shape[1]} heads: one number each")


# --- mixture of experts ------------------------------------------------------------------------------

@op("route_topk")
def route_topk(scores: Type, choice: Type | None = None, *, k: Dim) -> tuple[Type, Type]:
    """The k experts of each row: the largest of `choice` (default: scores) along the last axis, in order; their
    scores and their numbers. scores [..., E]."""
    require(choice is None or choice.shape == scores.shape, f"choice {choice} for scores {scores}")
    shape = (*scores.shape[:-1], k)
    return Type(scores.dtype, shape), Type("i64", shape)


@op("expert_linear")
def expert_linear(x: Type, ids: Type, weight: Type, bias: Type | None = None, *, transposed: bool = False) -> Type:
    """`y[..., j, :] = weight[ids[..., j]] @ x[..., j, :] + bias[ids[..., j]]`: each row by the experts chosen for it.

    ids [*rows, K] within 0 <= id < E; x [*rows, K, in], or [*rows, 1, in] where all experts get the same; x may have
    more axes in front. weight [E, out, in] ([E, in, out] where `transposed`), bias [E, out].
    """
    _experts(weight, bias, transposed)
    require(x.rank > ids.rank, f"x {x} for ids {ids}")
    rows = x.shape[-1 - ids.rank:-1]
    require(rows[:-1] == ids.shape[:-1] and rows[-1] in (1, ids.shape[-1]), f"rows of x {x} are not those of ids {ids}")
    inner, outer = weight.shape[2 - transposed], weight.shape[1 + transposed]
    require(x.shape[-1] == inner, f"the last axis of x is {x.shape[-1]}, the experts take {inner}")
    return Type(promote(x, weight), (*x.shape[:-2], ids.shape[-1], outer))


@op("combine")
def combine(u: Type, weights: Type) -> Type:
    """`y = sum_k weights[..., k] u[..., k, :]`: what the chosen experts say, weighted; u [*rows, K, D],
    weights [*rows, K]."""
    require(u.rank == weights.rank + 1 and u.shape[:-1] == weights.shape, f"weights {weights} for experts {u}")
    return Type(promote(u, weights), (*weights.shape[:-1], u.shape[-1]))


@op("expert_order")
def expert_order(ids: Type, *, experts: Dim) -> tuple[Type, Type, Type]:
    """Rows sorted by expert: ids of any shape, N in all. `order` [N]: the flat places of ids by expert, stable;
    `places` [N]: where each went (the inverse); `ends` [experts]: how many rows the experts up to each one have."""
    flat = product(ids.shape)
    return Type("i64", (flat,)), Type("i64", (flat,)), Type("i64", (experts,))


@op("grouped_linear")
def grouped_linear(x: Type, ends: Type, weight: Type, bias: Type | None = None, *, transposed: bool = False,
                   part: str = "") -> Type:
    """`linear` with the weight of each row's expert, rows sorted: rows ends[e - 1] to ends[e] by weight[e] and bias[e].

    x [..., N, in], ends [E] as of `expert_order`; weight [E, out, in] ([E, in, out] where `transposed`), bias [E, out].
    `part`: of the weights only "positive" (`max(w, 0)`) or "negative" (`max(-w, 0)`) parts, their sizes ("abs") or
    squares ("square").
    Only weights of experts that have rows are read.
    """
    _experts(weight, bias, transposed)
    require(part in ("", "abs", "positive", "negative", "square"), f"no part `{part}` of weights")
    require(ends.shape == weight.shape[:1], f"ends {ends} for {weight.shape[0]} experts")
    inner, outer = weight.shape[2 - transposed], weight.shape[1 + transposed]
    require(x.rank >= 2 and x.shape[-1] == inner, f"the last axis of x is {x.shape[-1]}, the experts take {inner}")
    return Type(promote(x, weight), (*x.shape[:-1], outer))


def _experts(weight: Type, bias: Type | None, transposed: bool) -> None:
    require(weight.rank == 3, f"weights of rank {weight.rank}, not 3")
    require(bias is None or bias.shape == (weight.shape[0], weight.shape[1 + transposed]),
            f"bias {bias} for weights {weight}")


# --- recurrent layers --------------------------------------------------------------------------------

@op("lstm")
def lstm(x: Type, h0: Type, c0: Type, w_ih: Type, w_hh: Type, b_ih: Type | None = None, b_hh: Type | None = None,
         lengths: Type | None = None, *, reverse: bool = False) -> tuple[Type, Type]:
    """h and c after each step, [T,B,H] each, of x [T,B,I] and the states before, h0 and c0 [B,H].

    `a = w_ih x + b_ih + w_hh h + b_hh`, cut into i, f, g, o; `c' = sigmoid(f) c + sigmoid(i) tanh(g)`,
    `h' = sigmoid(o) tanh(c')`. `reverse`: from the last step to the first. Past step lengths[b] row b keeps its states.
    """
    _recurrent(x, h0, w_ih, w_hh, 4)
    state = Type(x.dtype, (*x.shape[:2], h0.shape[1]))
    return state, state


@op("gru")
def gru(x: Type, h0: Type, w_ih: Type, w_hh: Type, b_ih: Type | None = None, b_hh: Type | None = None,
        lengths: Type | None = None, *, reverse: bool = False) -> Type:
    """h after each step, [T,B,H]; operands as of `lstm`.

    `a = w_ih x + b_ih` and `u = w_hh h + b_hh`, each cut into r, z, n; `r, z = sigmoid(a + u)`,
    `n = tanh(a_n + r u_n)`, `h' = (1 - z) n + z h`.
    """
    _recurrent(x, h0, w_ih, w_hh, 3)
    return Type(x.dtype, (*x.shape[:2], h0.shape[1]))


@op("rnn")
def rnn(x: Type, h0: Type, w_ih: Type, w_hh: Type, b_ih: Type | None = None, b_hh: Type | None = None,
        lengths: Type | None = None, *, activation: str = "tanh", reverse: bool = False) -> Type:
    """h after each step, [T,B,H]: `h' = activation(w_ih x + b_ih + w_hh h + b_hh)`; operands as of `lstm`."""
    require(activation in ("tanh", "relu"), f"rnn has no activation `{activation}`")
    _recurrent(x, h0, w_ih, w_hh, 1)
    return Type(x.dtype, (*x.shape[:2], h0.shape[1]))


def _recurrent(x: Type, h0: Type, w_ih: Type, w_hh: Type, gates: int) -> None:
    require(x.rank == 3 and h0.rank == 2, "x is [T,B,I] and h0 [B,H]")
    require(w_ih.shape == (gates * h0.shape[1], x.shape[2]) and w_hh.shape == (gates * h0.shape[1], h0.shape[1]),
            f"weights {w_ih} and {w_hh} for inputs {x} and states {h0}")


@op("recurrence_adjoint")
def recurrence_adjoint(r: Type, weight: Type, gates: Type, cells: Type | None = None, keep: Type | None = None,
                       read: Type | None = None, direct: Type | None = None, into: Type | None = None,
                       hold: Type | None = None, *, reverse: bool = False) -> tuple[Type, Type, Type, Type]:
    """Relevance carried back through the steps of a recurrent layer, from the last to the first.

    A state h reads a memory c (of GRU and RNN: h itself). r and cells [S,T,B,H]: what comes in at each; all else
    [T,B,...] says how much goes on. At each step `h = r + h_back`, `c = cells + c_back + h read`; to the step before,
    `h_back = ([c gates, h direct] weight) into + h hold` and `c_back = c keep`. Left out, `cells`, `keep`, `direct` and
    `hold` are 0, `read` and `into` 1. gates [T,B,G*H], one part for each gate that c goes to; weight [G*H (+ H), H].
    Results: h and c of every step, and h_back and c_back [S,B,H] of the states before the first.
    """
    require(r.rank == 4 and gates.shape[:2] == r.shape[1:3], f"relevance {r} for gates {gates}")
    before = Type(r.dtype, (r.shape[0], r.shape[2], weight.shape[1]))
    return r, r, before, before


# --- moves -------------------------------------------------------------------------------------------

@op("reshape")
def reshape(x: Type, *, shape: tuple[Dim, ...]) -> Type:
    """The same elements in order under another shape."""
    require(_same_count(x.shape, shape), f"{_shape(x.shape)} has not the elements of {_shape(shape)}")
    return Type(x.dtype, shape)


def _same_count(before: tuple[Dim, ...], after: tuple[Dim, ...]) -> bool:
    left, right = product(before), product(after)
    return left == right or not (isinstance(left, int) and isinstance(right, int))


@op("permute")
def permute(x: Type, *, dims: tuple[int, ...]) -> Type:
    """Axes in another order."""
    require(sorted(axis(x.rank, d) for d in dims) == list(range(x.rank)), f"{dims} is no order of {x.rank} axes")
    return Type(x.dtype, tuple(x.shape[d] for d in dims))


@op("expand")
def expand(x: Type, *, shape: tuple[Dim, ...]) -> Type:
    """Broadcast to `shape`."""
    require(broadcast(x.shape, shape) == shape, f"{_shape(x.shape)} does not expand to {_shape(shape)}")
    return Type(x.dtype, shape)


@op("slice")
def slice_(x: Type, *, dim: int, start: Dim = 0, stop: Dim, step: int = 1) -> Type:
    """Elements start, start + step, ... below stop along an axis; 0 <= start <= stop <= size."""
    return Type(x.dtype, _replace(x.shape, dim, (stop - start + step - 1) // step))


@op("slice_adjoint")
def slice_adjoint(r: Type, *, dim: int, size: Dim, start: Dim = 0, stop: Dim, step: int = 1) -> Type:
    """Zeros of the sliced axis' full `size` with r put where the slice was taken."""
    return Type(r.dtype, _replace(r.shape, dim, size))


@op("select")
def select(x: Type, *, dim: int, index: Dim) -> Type:
    """One index along an axis; the axis goes. A negative index counts from the end."""
    where_ = axis(x.rank, dim)
    return Type(x.dtype, (*x.shape[:where_], *x.shape[where_ + 1:]))


@op("select_adjoint")
def select_adjoint(r: Type, *, dim: int, index: Dim, size: Dim) -> Type:
    """Zeros with a new axis `dim` of `size`, r at `index`; dim is counted in the result."""
    where_ = axis(r.rank + 1, dim)
    return Type(r.dtype, (*r.shape[:where_], size, *r.shape[where_:]))


@op("cat")
def cat(*xs: Type, dim: int) -> Type:
    """Joined along an axis."""
    where_ = axis(xs[0].rank, dim)
    total: Dim = 0
    for x in xs:
        require(x.rank == xs[0].rank, "cat takes tensors of one rank")
        total = total + x.shape[where_]
    return Type(promote(*xs), _replace(xs[0].shape, dim, total))


@op("pad")
def pad(x: Type, *, pads: tuple[tuple[Dim, Dim], ...], value: float = 0.0) -> Type:
    """`value` put before and after: a (before, after) pair per axis; negative pads crop."""
    require(len(pads) == x.rank, f"{len(pads)} pads for {x.rank} axes")
    return Type(x.dtype, tuple(d + before + after for d, (before, after) in zip(x.shape, pads, strict=True)))


@op("flip")
def flip(x: Type, *, dims: tuple[int, ...]) -> Type:
    """Order reversed along axes."""
    return x


@op("roll")
def roll(x: Type, *, shifts: tuple[Dim, ...], dims: tuple[int, ...]) -> Type:
    """Elements shifted along axes, those pushed out at the end come back at the start."""
    return x


@op("triangle")
def triangle(x: Type, *, diagonal: Dim = 0, upper: bool) -> Type:
    """x with zeros below (`upper`) or above the diagonal of its last two axes (triu, tril)."""
    return x


@op("gather")
def gather(x: Type, index: Type, *, dim: int) -> Type:
    """`y[..., i, ...] = x[..., index[..., i, ...], ...]` along an axis."""
    return Type(x.dtype, index.shape)


@op("scatter_add")
def scatter_add(base: Type, index: Type, source: Type, *, dim: int) -> Type:
    """base with source added at index along an axis: the adjoint of gather."""
    return base


@op("scatter")
def scatter(base: Type, index: Type, source: Scalar, *, dim: int) -> Type:
    """base with source written at index along an axis."""
    return base


@op("take")
def take(x: Type, index: Type, *, dim: int) -> Type:
    """Whole slices of x by a tensor of indices; the axis becomes index's axes."""
    where_ = axis(x.rank, dim)
    return Type(x.dtype, (*x.shape[:where_], *index.shape, *x.shape[where_ + 1:]))


@op("take_adjoint")
def take_adjoint(r: Type, index: Type, *, dim: int, size: Dim) -> Type:
    """The adjoint of take: zeros of `size` along dim with slices of r added at index."""
    where_ = axis(r.rank, dim)
    return Type(r.dtype, (*r.shape[:where_], size, *r.shape[where_ + index.rank:]))


@op("index")
def index(x: Type, *indices: Type, dims: tuple[int, ...]) -> Type:
    """x indexed along consecutive axes `dims` by broadcast integer tensors, which take those axes' place."""
    shape = broadcast(*(i.shape for i in indices))
    require(dims == tuple(range(dims[0], dims[0] + len(dims))), "indexed axes must be consecutive")
    return Type(x.dtype, (*x.shape[:dims[0]], *shape, *x.shape[dims[-1] + 1:]))


@op("index_adjoint")
def index_adjoint(r: Type, *indices: Type, dims: tuple[int, ...], sizes: tuple[Dim, ...]) -> Type:
    """The adjoint of index: zeros of `sizes` along dims with r added at the indices; dims count in the result."""
    shape = broadcast(*(i.shape for i in indices))
    return Type(r.dtype, (*r.shape[:dims[0]], *sizes, *r.shape[dims[0] + len(shape):]))


@op("index_put")
def index_put(base: Type, source: Scalar, *indices: Type, dims: tuple[int, ...], accumulate: bool = False) -> Type:
    """base with source written (or added) at indices along consecutive axes `dims`."""
    return base


def _replace(shape: tuple[Dim, ...], dim: int, size: Dim) -> tuple[Dim, ...]:
    where_ = axis(len(shape), dim)
    return (*shape[:where_], size, *shape[where_ + 1:])


def attr(of: Op, name: str) -> Attr:
    """An attribute of an op, its catalogue default where the op does not state it."""
    return of.attrs[name] if name in of.attrs else definition(of.name).attrs[name]


__all__ = ["OPS", "OpDef", "attr", "axes", "axis", "broadcast", "definition", "infer", "op",
           "promote", "require"]
