"""What each op of the catalogue is written as in numpy: add an op here.

A template (see `Expression`) or, where the text depends on types or attributes, a function of the site.
A Python number does not widen a float32 array; operands of other element types are cast first.
"""

from __future__ import annotations

from collections.abc import Callable

from dlbc.backends.names import tuple_of
from dlbc.backends.shared import COMMON, EXPERTS, RECURRENT, is_zero, keeping_rank, reduction, single
from dlbc.backends.site import Expression, Site

TABLE: dict[str, Expression] = {
    **COMMON, **EXPERTS, **RECURRENT,
    # elementwise
    **{name: f"np.{name}({{a:t}})" for name in (
        "exp", "expm1", "log", "log1p", "sqrt", "reciprocal", "sin", "cos", "tan", "tanh", "abs", "sign", "floor",
        "ceil", "round")},
    **{name: f"np.{name}({{a}})" for name in ("isnan", "isinf", "logical_not")},
    **{name: f"kernels.{name}({{a:t}})" for name in (
        "erf", "sigmoid", "log_sigmoid", "silu", "mish", "hardswish", "hardsigmoid", "softsign")},
    "rsqrt": "1 / np.sqrt({a:t})",
    "atan": "np.arctan({a:t})",
    "relu": "np.maximum({a}, 0)",
    "negative_part": "np.minimum({a}, 0)",
    "gelu": "kernels.gelu({a}, {approximate})",
    "glu": "kernels.glu({a:t}, {b:t}, {activation})",
    "softplus": "kernels.softplus({a}, {beta}, {threshold})",
    "elu": "kernels.elu({a}, {alpha}, {scale}, {input_scale})",
    "leaky_relu": "np.where({a} > 0, {a}, {a} * {negative_slope})",
    "prelu": "kernels.prelu({a}, {b:t})",
    "cast": "{a:i}.astype({dtype}, copy=False)",
    "clamp": "np.clip({a:t}, {low}, {high})",
    "stabilise": "np.where({a} < 0, {a} - {eps}, {a} + {eps})",
    "damp": "kernels.damp({a:t}, {b:t}, {eps})", "relu_adjoint": "kernels.relu_adjoint({a:t}, {b})",
    "safe_div": "kernels.safe_div({a:t}, {b:t})",
    "threshold": "kernels.threshold({a}, {threshold}, {value})",
    "maximum": "np.maximum({a:t}, {b:t})",
    "minimum": "np.minimum({a:t}, {b:t})",
    # reductions and scans
    "softmax": "kernels.softmax({a}, {dim})",
    "log_softmax": "kernels.log_softmax({a}, {dim})",
    "topk": "kernels.topk({a}, {k}, {dim}, {largest})",
    "sort": "kernels.sort({a}, {dim}, {descending})",
    "max_with_index": "kernels.max_with_index({a}, {dim}, {keepdim})",
    "min_with_index": "kernels.min_with_index({a}, {dim}, {keepdim})",
    "cumsum": "np.cumsum({a}, {dim}, dtype={dtype})",
    # linear maps
    "matmul": "kernels.matmul({a:t}, {b:t})",
    "embedding": "np.take({b}, {a}, axis=0)",
    "rotary": "kernels.rotary({a:t}, {b:t}, {c:t}, {interleaved})",
    # pooling
    "max_pool": "kernels.max_pool({a}, {kernel}, {stride}, {padding}, {dilation}, {ceil_mode})",
    "max_pool_adjoint": "kernels.max_pool_adjoint({args}, {kernel}, {stride}, {padding}, {dilation})",
    "adaptive_avg_pool": "kernels.adaptive_avg_pool({a}, {size})",
    "adaptive_max_pool": "kernels.adaptive_max_pool({a}, {size})",
    "adaptive_avg_pool_adjoint": "kernels.adaptive_avg_pool_adjoint({a}, {size})",
    "adaptive_max_pool_adjoint": "kernels.adaptive_max_pool_adjoint({args})",
    **{name: f"kernels.{name}({{a}}, {{size}}, {{mode}}, {{align_corners}}, {{scales}}, {{antialias}}, {{absolute}})"
       for name in ("interpolate", "interpolate_adjoint")},
    # norms
    "row_statistics": "kernels.row_statistics({a}, {dims}, {eps}, {centred})",
    # moves
    "permute": "{a:i}.transpose({dims})",
    "expand": "np.broadcast_to({a}, {shape})",
    "flip": "np.flip({a}, {dims})",
    "roll": "np.roll({a}, {shifts}, {dims})",
    "pad": "kernels.pad({a}, {pads}, {value})",
    "gather": "kernels.gather({a}, {b}, {dim})",
    "scatter": "kernels.scatter({a}, {b}, {c:t}, {dim})",
    "scatter_add": "kernels.scatter_add({a}, {b}, {c:t}, {dim})",
    "take": "np.take({a}, {b}, axis={dim})",
    "take_adjoint": "kernels.take_adjoint({a}, {b}, {dim}, {size})",
}
"""An op's expression."""

OVERWRITING: dict[str, Expression] = {
    **{name: f"np.{name}({{a}}, out={{a}})" for name in (
        "exp", "expm1", "log", "log1p", "sqrt", "reciprocal", "sin", "cos", "tanh", "abs")},
    "neg": "np.negative({a}, out={a})",
    **{name: f"np.{function}({{a}}, {{b:t}}, out={{a}})" for name, function in (
        ("add", "add"), ("sub", "subtract"), ("mul", "multiply"), ("div", "divide"))},
    "relu": "np.maximum({a}, 0, out={a})",
    "negative_part": "np.minimum({a}, 0, out={a})",
}
"""The expression of an op that puts its result over its first operand, which dies."""


def _writes(*names: str) -> Callable[[Callable[[Site], str]], Callable[[Site], str]]:
    def register(function: Callable[[Site], str]) -> Callable[[Site], str]:
        TABLE.update(dict.fromkeys(names, function))
        return function

    return register


@_writes("where")
def _where(site: Site) -> str:
    text = f"np.where({site.truth(0)}, {site.typed(1)}, {site.typed(2)})"
    if site.tensor(1) or site.tensor(2):
        return text
    return f"{text}.astype({site.dtype(site.result.dtype)})"


@_writes("full")
def _full(site: Site) -> str:
    shape, dtype = site.text("shape"), site.dtype(site.result.dtype)
    if is_zero(site.attr("value")):
        return f"np.zeros({shape}, {dtype})"
    return f"np.full({shape}, {site.text('value')}, {dtype})"


@_writes("arange")
def _arange(site: Site) -> str:
    bounds = f"{site.text('start')}, {site.text('stop')}, {site.text('step')}"
    return f"np.arange({bounds}, dtype={site.dtype(site.result.dtype)})"


@_writes("sum", "prod", "mean", "amax", "amin", "any", "all", "logsumexp")
def _reduced(site: Site) -> str:
    name, arguments = site.op.name, reduction(site, "axis=", "keepdims")
    rest = f", {arguments}" if arguments else ""
    if name in ("sum", "prod") and not site.type(0).floating:
        rest += f", dtype={site.dtype('i64')}"
    function = "kernels.logsumexp" if name == "logsumexp" else f"np.{name}"
    return f"{function}({site.x(0)}{rest})"


@_writes("var")
def _var(site: Site) -> str:
    arguments = reduction(site, "axis=", "keepdims")
    correction = f", ddof={site.text('correction')}" if site.attr("correction") else ""
    return f"np.var({site.x(0)}{f', {arguments}' if arguments else ''}{correction})"


@_writes("argmax", "argmin")
def _position(site: Site) -> str:
    return keeping_rank(site, f"np.{site.op.name}({site.x(0)}{single(site, 'axis=', 'keepdims')})")


@_writes("linear")
def _linear(site: Site) -> str:
    return f"kernels.linear({', '.join(_typed(site))})"


@_writes("linear_rows")
def _linear_rows(site: Site) -> str:
    return f"kernels.linear_rows({', '.join(_typed(site))})"


@_writes("einsum")
def _einsum(site: Site) -> str:
    return f"np.einsum({', '.join([site.text('equation'), *_typed(site)])}, optimize=True)"


@_writes(*(f"conv{transposed}{rank}d" for transposed in ("", "_transpose") for rank in (1, 2, 3)))
def _conv(site: Site) -> str:
    transposed = "transpose" in site.op.name
    x, weight, bias = (site.typed(i) for i in range(3))
    names = ("stride", "padding", *(("output_padding",) if transposed else ()), "dilation", "groups")
    settings = ", ".join(f"{name}={site.text(name)}" for name in names)
    return f"kernels.conv{'_transpose' * transposed}({x}, {weight}, {bias}, {settings})"


@_writes("avg_pool")
def _avg_pool(site: Site) -> str:
    size = site.scope.text(site.result.shape[-_rank(site):])
    return f"kernels.avg_pool({site.x(0)}, {size}{_windows(site)})"


@_writes("avg_pool_adjoint")
def _avg_pool_adjoint(site: Site) -> str:
    return f"kernels.avg_pool_adjoint({site.x(0)}, {site.text('size')}{_windows(site)})"


def _windows(site: Site) -> str:
    return "".join(f", {site.text(name)}" for name in ("kernel", "stride", "padding", "count_include_pad", "divisor"))


def _rank(site: Site) -> int:
    kernel = site.attr("kernel")
    return len(kernel) if isinstance(kernel, tuple) else 1


@_writes("batch_norm")
def _batch_norm(site: Site) -> str:
    x, mean, variance, weight, bias = (site.typed(i) for i in range(5))
    return f"kernels.batch_norm({x}, {mean}, {variance}, {weight}, {bias}, {site.text('eps')})"


@_writes("layer_norm", "rms_norm", "group_norm")
def _norm(site: Site) -> str:
    affine = [site.typed(i) for i in range(1, 2 if site.op.name == "rms_norm" else 3)]
    number = site.text("groups" if site.op.name == "group_norm" else "dims")
    return f"kernels.{site.op.name}({', '.join([site.typed(0), *affine, number])}, {site.text('eps')})"


@_writes("attention", "attention_weights")
def _attention(site: Site) -> str:
    carried = 3 if site.op.name == "attention" else 2
    operands = [*(site.typed(i) for i in range(carried)), site.x(carried)]
    operands += [site.x(carried + 1)] if site.has(carried + 1) else []
    options = site.options("scale", "causal", "window", "softcap")
    return f"kernels.{site.op.name}({', '.join(operands)}{options})"


@_writes("slice_adjoint")
def _slice_adjoint(site: Site) -> str:
    rest = ", ".join(site.text(name) for name in ("size", "start", "stop", "step"))
    return f"kernels.slice_adjoint({site.x(0)}, {site.axis()}, {rest})"


@_writes("select_adjoint")
def _select_adjoint(site: Site) -> str:
    dim = site.attr("dim")
    assert isinstance(dim, int)
    return f"kernels.select_adjoint({site.x(0)}, {dim % site.result.rank}, {site.text('index')}, {site.text('size')})"


@_writes("cat")
def _cat(site: Site) -> str:
    return f"np.concatenate({tuple_of(_typed(site))}, {site.axis()})"


@_writes("triangle")
def _triangle(site: Site) -> str:
    return f"np.{'triu' if site.attr('upper') else 'tril'}({site.x(0)}, {site.text('diagonal')})"


@_writes("index_adjoint")
def _index_adjoint(site: Site) -> str:
    dims = site.attr("dims")
    assert isinstance(dims, tuple)
    return f"kernels.index_adjoint({site.x(0)}, {tuple_of(site.args(1))}, {dims[0]}, {site.text('sizes')})"


@_writes("index_put")
def _index_put(site: Site) -> str:
    source, dims = site.typed(1), site.axes()
    return f"kernels.index_put({site.x(0)}, {source}, {tuple_of(site.args(2))}, {dims[0]}{site.options('accumulate')})"


def _typed(site: Site) -> list[str]:
    return [site.typed(i) for i in range(len(site.op.operands))]
