"""ATen's elementwise operators."""

from __future__ import annotations

import math

from dlbc.frontends.aten import UNSUPPORTED, Tracer, aten, is_tensor, positive, type_of
from dlbc.ir.core import Operand, Value, Weight

for _name in ("exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan", "tanh", "atan",
              "erf", "sigmoid", "log_sigmoid", "silu", "mish", "hardswish", "hardsigmoid", "neg", "abs", "sign",
              "relu", "floor", "ceil", "bitwise_not", "logical_not", "isnan", "isinf"):
    @aten(_name)
    def unary(at: Tracer, x: Operand, *, name: str = _name) -> Operand:
        """An operator that the catalogue has under the same name."""
        return at.op(name, x)[0]

for _name, _ours in {
    "mul": "mul", "pow": "pow", "maximum": "maximum", "minimum": "minimum", "fmax": "maximum", "fmin": "minimum",
    "max.other": "maximum", "min.other": "minimum", "floor_divide": "floor_divide", "remainder": "remainder",
    "bitwise_and": "bitwise_and", "__and__": "bitwise_and", "bitwise_or": "bitwise_or", "__or__": "bitwise_or",
    "bitwise_xor": "bitwise_xor", "__xor__": "bitwise_xor", "eq": "eq", "ne": "ne", "lt": "lt", "le": "le",
    "gt": "gt", "ge": "ge", "logical_and": "logical_and", "logical_or": "logical_or", "logical_xor": "logical_xor",
    "true_divide": "div", "multiply": "mul",
}.items():
    @aten(_name)
    def binary(at: Tracer, x: Operand, other: Operand, *, name: str = _ours) -> Operand:
        """An operator of two operands that the catalogue has too."""
        return at.op(name, x, other)[0]


@aten("neg", "negative")
def neg(at: Tracer, x: Operand) -> Operand:
    """`-x`."""
    return at.neg(x)


@aten("sgn")
def sgn(at: Tracer, x: Operand) -> Operand:
    """Sign of real numbers."""
    return at.sign(x)


@aten("positive")
def plus(at: Tracer, x: Operand) -> Operand:
    """`+x`."""
    return x


@aten("round")
def round_(at: Tracer, x: Operand, *, decimals: int = 0) -> Operand:
    """Nearest integer, or nearest multiple of a power of ten."""
    return at.round(x) if decimals == 0 else at.div(at.round(at.mul(x, 10.0 ** decimals)), 10.0 ** decimals)


@aten("trunc", "fix")
def trunc(at: Tracer, x: Operand) -> Operand:
    """The integer part."""
    return at.mul(at.sign(x), at.floor(at.abs(x)))


@aten("square")
def square(at: Tracer, x: Operand) -> Operand:
    """`x ** 2`."""
    return at.pow(x, 2)


@aten("exp2")
def exp2(at: Tracer, x: Operand) -> Operand:
    """`2 ** x`."""
    return at.exp(at.mul(x, math.log(2.0)))


@aten("log2")
def log2(at: Tracer, x: Operand) -> Operand:
    """Logarithm to base 2."""
    return at.mul(at.log(x), 1.0 / math.log(2.0))


@aten("log10")
def log10(at: Tracer, x: Operand) -> Operand:
    """Logarithm to base 10."""
    return at.mul(at.log(x), 1.0 / math.log(10.0))


@aten("sinh")
def sinh(at: Tracer, x: Operand) -> Operand:
    """Hyperbolic sine."""
    return at.mul(at.sub(at.exp(x), at.exp(at.neg(x))), 0.5)


@aten("cosh")
def cosh(at: Tracer, x: Operand) -> Operand:
    """Hyperbolic cosine."""
    return at.mul(at.add(at.exp(x), at.exp(at.neg(x))), 0.5)


@aten("erfc")
def erfc(at: Tracer, x: Operand) -> Operand:
    """`1 - erf(x)`."""
    return at.sub(1.0, at.erf(x))


@aten("isfinite")
def isfinite(at: Tracer, x: Operand) -> Operand:
    """True for what is neither infinite nor no number."""
    return at.logical_not(at.logical_or(at.isnan(x), at.isinf(x)))


@aten("nan_to_num")
def nan_to_num(at: Tracer, x: Operand, nan: float | None = None, posinf: float | None = None,
               neginf: float | None = None) -> Operand:
    """Other numbers for nan and the infinities."""
    largest = {"f64": 1.7976931348623157e308, "f32": 3.4028234663852886e38, "f16": 65504.0,
               "bf16": 3.3895313892515355e38}[type_of(x).dtype]
    x = at.where(at.isnan(x), nan or 0.0, x)
    x = at.where(at.eq(x, math.inf), largest if posinf is None else posinf, x)
    return at.where(at.eq(x, -math.inf), -largest if neginf is None else neginf, x)


@aten("add", "add_")
def add(at: Tracer, x: Operand, other: Operand, *, alpha: float = 1) -> Operand:
    """`x + alpha * other`."""
    return at.add(x, other if alpha == 1 else at.mul(other, alpha))


@aten("sub", "subtract")
def sub(at: Tracer, x: Operand, other: Operand, alpha: float = 1) -> Operand:
    """`x - alpha * other`."""
    return at.sub(x, other if alpha == 1 else at.mul(other, alpha))


@aten("rsub")
def rsub(at: Tracer, x: Operand, other: Operand, alpha: float = 1) -> Operand:
    """`other - alpha * x`."""
    return at.sub(other, x if alpha == 1 else at.mul(x, alpha))


@aten("div", "divide")
def div(at: Tracer, x: Operand, other: Operand, *, rounding_mode: str | None = None) -> Operand:
    """`x / other`, rounded down or towards zero if asked."""
    if rounding_mode == "floor":
        return at.floor_divide(x, other)
    if rounding_mode == "trunc" and not any(map(_is_real, (x, other))):
        return _integers_divided(at, x, other)
    quotient = at.div(x, other)
    return quotient if rounding_mode is None else trunc(at, quotient)


def _is_real(x: Operand) -> bool:
    return type_of(x).floating if is_tensor(x) else isinstance(x, float)


def _integers_divided(at: Tracer, x: Operand, other: Operand) -> Operand:
    """The quotient of integers towards zero, exact however large they are."""
    places = [op.results[-1] for op in at.ops if op.name in ("sort", "topk")]
    if isinstance(other, int) and other > 0 and any(x == place for place in places):
        return at.floor_divide(x, other)  # places are never negative
    other = at.tensor(other, "i64")
    size = at.floor_divide(at.abs(x), at.abs(other))
    return at.where(at.ne(at.lt(x, 0), at.lt(other, 0)), at.neg(size), size)


@aten("fmod")
def fmod(at: Tracer, x: Operand, other: Operand) -> Operand:
    """The remainder with the sign of x."""
    return at.sub(x, at.mul(other, trunc(at, at.div(x, other))))


@aten("lerp")
def lerp(at: Tracer, x: Operand, end: Operand, weight: Operand) -> Operand:
    """`x + weight * (end - x)`."""
    return at.add(x, at.mul(at.sub(end, x), weight))


@aten("addcmul")
def addcmul(at: Tracer, x: Operand, first: Operand, second: Operand, *, value: float = 1) -> Operand:
    """`x + value * first * second`."""
    product = at.mul(first, second)
    return at.add(x, product if value == 1 else at.mul(product, value))


@aten("addcdiv")
def addcdiv(at: Tracer, x: Operand, first: Operand, second: Operand, *, value: float = 1) -> Operand:
    """`x + value * first / second`."""
    quotient = at.div(first, second)
    return at.add(x, quotient if value == 1 else at.mul(quotient, value))


@aten("gelu")
def gelu(at: Tracer, x: Operand, *, approximate: str = "none") -> Operand:
    """Gaussian error linear unit."""
    return at.gelu(x, approximate=approximate)


@aten("softplus")
def softplus(at: Tracer, x: Operand, beta: float = 1, threshold: float = 20) -> Operand:
    """`log(1 + exp(beta x)) / beta`."""
    return at.softplus(x, beta=float(beta), threshold=float(threshold))


@aten("elu")
def elu(at: Tracer, x: Operand, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Operand:
    """Exponential linear unit."""
    return at.elu(x, alpha=float(alpha), scale=float(scale), input_scale=float(input_scale))


@aten("selu")
def selu(at: Tracer, x: Operand) -> Operand:
    """Scaled exponential linear unit."""
    return at.elu(x, alpha=1.6732632423543772, scale=1.0507009873554805)


@aten("celu")
def celu(at: Tracer, x: Operand, alpha: float = 1.0) -> Operand:
    """Continuously differentiable exponential linear unit."""
    return at.elu(x, alpha=float(alpha), input_scale=1.0 / alpha)


@aten("leaky_relu")
def leaky_relu(at: Tracer, x: Operand, negative_slope: float = 0.01) -> Operand:
    """`x` where positive, else `negative_slope * x`."""
    return at.leaky_relu(x, negative_slope=float(negative_slope))


@aten("rrelu")
def rrelu(at: Tracer, x: Operand, lower: float = 0.125, upper: float = 1 / 3, training: bool = False,
          generator: object = None) -> Operand:
    """Out of training: leaky relu with the mean slope."""
    if training:
        raise at.unsupported("it draws random slopes", hint="put the model in eval mode")
    return at.leaky_relu(x, negative_slope=(lower + upper) / 2)


@aten("prelu", "_prelu_kernel")
def prelu(at: Tracer, x: Operand, weight: Operand) -> Operand:
    """`x` where positive, else `weight * x`, one weight for all or one per channel."""
    return at.prelu(x, weight)


@aten("relu6")
def relu6(at: Tracer, x: Operand) -> Operand:
    """`min(max(x, 0), 6)`."""
    return at.clamp(x, low=0.0, high=6.0)


@aten("hardtanh")
def hardtanh(at: Tracer, x: Operand, min_val: float = -1, max_val: float = 1) -> Operand:
    """`min(max(x, min_val), max_val)`."""
    return at.clamp(x, low=float(min_val), high=float(max_val))


@aten("hardshrink")
def hardshrink(at: Tracer, x: Operand, lambd: float = 0.5) -> Operand:
    """`x` where `|x| > lambd`, else 0."""
    return at.where(at.gt(at.abs(x), float(lambd)), x, 0.0)


@aten("softshrink")
def softshrink(at: Tracer, x: Operand, lambd: float = 0.5) -> Operand:
    """`x` moved towards 0 by lambd, and no further."""
    return at.sub(x, at.clamp(x, low=-float(lambd), high=float(lambd)))


@aten("threshold")
def threshold(at: Tracer, x: Operand, threshold: float, value: float) -> Operand:
    """`x` where larger than the threshold, else `value`."""
    return at.where(at.gt(x, threshold), x, value)


@aten("glu")
def glu(at: Tracer, x: Operand, dim: int = -1) -> Operand:
    """The first half times the sigmoid of the second."""
    size = type_of(x).shape[dim]
    axis = positive(dim, type_of(x).rank)
    first, second = at.slice(x, dim=axis, stop=size // 2), at.slice(x, dim=axis, start=size // 2, stop=size)
    return at.mul(first, at.sigmoid(second))


@aten("clamp", "clip", "clamp_min", "clamp_max")
def clamp(at: Tracer, x: Operand, min: Operand = None, max: Operand = None) -> Operand:
    """x kept between two bounds, numbers or tensors."""
    if at.target.startswith("clamp_max"):
        min, max = None, min if max is None else max
    if is_tensor(min) or is_tensor(max):
        x = x if min is None else at.maximum(x, min)
        return x if max is None else at.minimum(x, max)
    if at.out.floating:
        return at.clamp(at.converted(x, at.out.dtype), low=_number(min), high=_number(max))
    x = x if min is None else at.maximum(x, min)
    return x if max is None else at.minimum(x, max)


def _number(x: Operand) -> float | None:
    return None if x is None or isinstance(x, Value | Weight) else float(str(x))


@aten("where", "_where")
def where(at: Tracer, condition: Operand, x: Operand, other: Operand) -> Operand:
    """x where the condition holds, else other."""
    return at.where(condition, x, other)


@aten("masked_fill")
def masked_fill(at: Tracer, x: Operand, mask: Operand, value: Operand) -> Operand:
    """x with a number where the mask is true."""
    return at.where(mask, value, x)


@aten("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def dropout(at: Tracer, x: Operand, p: float, train: bool) -> Operand:
    """Nothing, out of training."""
    if train and p > 0:
        raise at.unsupported("dropout is active although the model is in eval mode",
                             hint="write F.dropout(x, p, self.training) in the model")
    return x


@aten("native_dropout")
def native_dropout(at: Tracer, x: Operand, p: float, train: bool | None) -> tuple[Operand, ...]:
    """Nothing, out of training."""
    return dropout(at, x, p, bool(train)), None


@aten("clone", "alias", "detach", "detach_", "lift", "lift_fresh", "lift_fresh_copy", "contiguous", "view_copy_alias",
      "alias_copy", "detach_copy", "resolve_conj", "resolve_neg", "conj", "_conj", "real")
def same(at: Tracer, x: Operand, **_: object) -> Operand:
    """The same tensor."""
    return x


@aten("_to_copy", "to", "type_as", "_autocast_to_reduced_precision", "_autocast_to_full_precision", "float",
      "half", "double", "bool", "long", "int", "convert_element_type")
def to(at: Tracer, x: Operand, *_: object, **__: object) -> Operand:
    """The same numbers in another element type."""
    return at.converted(x, at.out.dtype)


@aten("copy")
def copy(at: Tracer, x: Operand, source: Operand, non_blocking: bool = False) -> Operand:
    """`x.copy_(source)`: the source in x's shape and element type."""
    return at.expanded(at.converted(at.tensor(source), at.out.dtype), at.shape)


UNSUPPORTED.update(dict.fromkeys(("rand", "randn", "rand_like", "randn_like", "randint", "randperm", "bernoulli",
                                  "normal", "multinomial", "uniform", "poisson"),
                                 "the result is random: draw it outside of the model and pass it as an input"))
UNSUPPORTED.update(dict.fromkeys(("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2",
                                  "unique_dim", "unique_consecutive", "nonzero_static", "bincount"),
                                 "sizes or numbers that only the data knows: use torch.where or masks instead"))
UNSUPPORTED.update(dict.fromkeys(("fft_rfft", "fft_irfft", "fft_fft", "fft_ifft", "_fft_r2c", "_fft_c2r", "_fft_c2c",
                                  "stft", "istft"),
                                 "Fourier transforms are not supported: make them outside of the model, or write them "
                                 "as products with constant matrices of sines and cosines"))
