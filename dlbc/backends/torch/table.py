"""What each op of the catalogue is written as in torch: add an op here.

A template (see `Expression`) or, where the text depends on types or attributes, a function of the site.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dlbc.backends.names import grouped, literal, tuple_of
from dlbc.backends.shared import COMMON, EXPERTS, RECURRENT, along, is_zero, keeping_rank, reduction, single
from dlbc.backends.site import Expression, Site
from dlbc.ir.core import Value
from dlbc.ir.dims import Sym

MATRIX = 2**14
"""Numbers of a matrix from which on products with it may have rows enough for another library's product."""

TABLE: dict[str, Expression] = {
    **COMMON, **EXPERTS, **RECURRENT,
    # elementwise
    **{name: f"torch.{name}({{a:t}})" for name in (
        "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan", "tanh", "atan",
        "erf", "sigmoid", "abs", "sign", "relu", "floor", "ceil", "round")},
    **{name: f"torch.{name}({{a}})" for name in ("isnan", "isinf", "logical_not")},
    **{name: f"F.{name}({{a:t}})" for name in ("silu", "mish", "hardswish", "hardsigmoid", "softsign")},
    "log_sigmoid": "F.logsigmoid({a:t})",
    "negative_part": "torch.clamp({a}, max=0)",
    "softplus": "F.softplus({a}, beta={beta}, threshold={threshold})",
    "leaky_relu": "F.leaky_relu({a}, {negative_slope})",
    "prelu": "F.prelu({a}, {b:t}.reshape(-1))",
    "cast": "{a:i}.to({dtype})",
    "stabilise": "kernels.stabilise({a}, {eps})",
    "damp": "kernels.damp({a:t}, {b:t}, {eps})",
    "relu_adjoint": "kernels.relu_adjoint({a:t}, {b})",
    "safe_div": "kernels.safe_div({a:t}, {b:t})",
    "threshold": "F.threshold({a}, {threshold}, {value})",
    # reductions and scans
    "cumsum": "torch.cumsum({a}, {dim})",
    "softmax": "torch.softmax({a}, {dim})",
    "log_softmax": "torch.log_softmax({a}, {dim})",
    "topk": "torch.topk({a}, {k}, {dim}, {largest})",
    "sort": "torch.sort({a}, dim={dim}, descending={descending}, stable=True)",
    "max_with_index": "torch.max({a}, {dim}, {keepdim})",
    "min_with_index": "torch.min({a}, {dim}, {keepdim})",
    # linear maps
    "rotary": "kernels.rotary({a}, {b}, {c}, interleaved={interleaved})",
    # pooling
    "adaptive_avg_pool_adjoint": "kernels.adaptive_avg_pool_adjoint({a}, {size})",
    "adaptive_max_pool_adjoint": "kernels.adaptive_max_pool_adjoint({a}, {b}, {c})",
    **{name: f"kernels.{name}({{a}}, {{size}}, {{mode}}, {{align_corners}}, {{scales}}, {{antialias}}, {{absolute}})"
       for name in ("interpolate", "interpolate_adjoint")},
    # moves
    "permute": "{a:i}.permute({dims})",
    "expand": "{a:i}.expand({shape})",
    "flip": "torch.flip({a}, {dims})",
    "roll": "torch.roll({a}, {shifts}, {dims})",
    "gather": "torch.gather({a}, {dim}, {b:l})",
    "scatter": "torch.scatter({a}, {dim}, {b:l}, {c:t})",
    "scatter_add": "kernels.scatter_add({a}, {dim}, {b:l}, {c:t})",
    "take_adjoint": "kernels.take_adjoint({a}, {b}, {dim}, {size})",
}
"""An op's expression."""

OVERWRITING: dict[str, Expression] = {
    **{name: f"{{a}}.{name}_()" for name in (
        "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tanh", "erf", "sigmoid",
        "abs", "neg", "relu")},
    "add": "{a}.add_({b})", "sub": "{a}.sub_({b})", "mul": "{a}.mul_({b})", "div": "{a}.div_({b})",
    "damp": "kernels.damp_({a}, {b:t}, {eps})",
    "relu_adjoint": "kernels.relu_adjoint_({a}, {b})",
    "safe_div": "kernels.safe_div_({a}, {b:t})",
    "stabilise": "kernels.stabilise_({a}, {eps})",
    "negative_part": "{a}.clamp_(max=0)",
    "threshold": "F.threshold_({a}, {threshold}, {value})",
}
"""The expression of an op that puts its result over its first operand, which dies."""


def _writes(*names: str) -> Callable[[Callable[[Site], str]], Callable[[Site], str]]:
    def register(function: Callable[[Site], str]) -> Callable[[Site], str]:
        TABLE.update(dict.fromkeys(names, function))
        return function

    return register


@_writes("gelu")
def _gelu(site: Site) -> str:
    x, form = site.x(0), site.attr("approximate")
    if form == "quick":
        return f"{x} * torch.sigmoid(1.702 * {x})"
    return f"F.gelu({x}{site.options('approximate')})"


@_writes("glu")
def _glu(site: Site) -> str:
    gate, name = site.typed(0), str(site.attr("activation"))
    written = {"gelu": f"F.gelu({gate})", "gelu_tanh": f'F.gelu({gate}, approximate="tanh")',
               "gelu_quick": f"{gate} * torch.sigmoid(1.702 * {gate})",
               "silu": f"F.silu({gate})"}.get(name, f"torch.{name}({gate})")
    return f"{written} * {site.typed(1)}"


@_writes("elu")
def _elu(site: Site) -> str:
    if site.attr("scale") == 1.0 and site.attr("input_scale") == 1.0:
        return f"F.elu({site.x(0)}, {site.text('alpha')})"
    return f"torch.ops.aten.elu({site.x(0)}, {site.text('alpha')}, {site.text('scale')}, {site.text('input_scale')})"


@_writes("clamp")
def _clamp(site: Site) -> str:
    bounds = [f"{name}={site.text(side)}" for name, side in (("min", "low"), ("max", "high"))
              if site.attr(side) is not None]
    return f"torch.clamp({', '.join([site.typed(0), *bounds])})" if bounds else f"{site.x(0)}.clone()"


@_writes("maximum", "minimum")
def _extremum(site: Site) -> str:
    name = site.op.name
    if site.tensor(0) and site.tensor(1):
        return f"torch.{name}({site.typed(0)}, {site.typed(1)})"
    if not site.tensor(0) and not site.tensor(1):
        return f"{name[:3]}({site.x(0)}, {site.x(1)})"
    x, bound = (0, 1) if site.tensor(0) else (1, 0)
    return f"torch.clamp({site.typed(x)}, {'min' if name == 'maximum' else 'max'}={site.x(bound)})"


@_writes("where")
def _where(site: Site) -> str:
    condition = site.op.operands[0]
    if not site.tensor(0):
        chosen = f"torch.tensor({site.truth(0)}{site.device()})"
        return f"torch.where({chosen}, {site.typed(1)}, {site.typed(2)})"
    random = isinstance(condition, Value) and site.measured(condition) and site.result.dtype == "f32"
    return f"{'kernels' if random else 'torch'}.where({site.truth(0)}, {site.typed(1)}, {site.typed(2)})"


@_writes("full")
def _full(site: Site) -> str:
    shape, value = site.attr("shape"), site.attr("value")
    rest = f"dtype={site.dtype(site.result.dtype)}{site.device()}"
    if is_zero(value) and shape:
        return f"torch.zeros({site.text('shape')}, {rest})"
    return f"torch.full({site.text('shape')}, {site.text('value')}, {rest})"


@_writes("arange")
def _arange(site: Site) -> str:
    bounds = f"{site.text('start')}, {site.text('stop')}, {site.text('step')}"
    return f"torch.arange({bounds}, dtype={site.dtype(site.result.dtype)}{site.device()})"


@_writes("sum", "mean", "amax", "amin", "any", "all", "logsumexp")
def _reduced(site: Site) -> str:
    name, arguments = site.op.name, reduction(site, "", "keepdim")
    if name in ("amax", "amin", "logsumexp") and not arguments:
        arguments = literal(site.axes())
    x = site.typed(0) if name == "mean" else site.x(0)
    return f"torch.{name}({', '.join(filter(None, (x, arguments)))})"


@_writes("prod")
def _prod(site: Site) -> str:
    kept = ", keepdim=True" if site.attr("keepdim") else ""
    return grouped(site.typed(0)) + "".join(f".prod({axis}{kept})" for axis in reversed(site.axes()))


@_writes("var")
def _var(site: Site) -> str:
    return f"kernels.var({site.x(0)}, {literal(site.axes())}{site.options('keepdim', 'correction')})"


@_writes("argmax", "argmin")
def _position(site: Site) -> str:
    x = site.typed(0, "u8") if site.type(0).dtype == "bool" else site.x(0)
    return keeping_rank(site, f"torch.{site.op.name}({x}{single(site, '', 'keepdim')})")


@_writes("linear")
def _linear(site: Site) -> str:
    return f"{'kernels' if _large(site) else 'F'}.linear({', '.join(_typed(site))})"


@_writes("matmul")
def _matmul(site: Site) -> str:
    return f"{'kernels' if _large(site) else 'torch'}.matmul({', '.join(_typed(site))})"


def _large(site: Site) -> bool:
    """Whether a product is with a matrix of so many numbers that `torch_products` has more than one way for it."""
    shape = site.type(1).shape
    return len(shape) == 2 and math.prod(size if isinstance(size, int) else 0 for size in shape) >= MATRIX


@_writes("linear_rows")
def _linear_rows(site: Site) -> str:
    return f"kernels.linear_rows({', '.join(_typed(site))})"


@_writes("einsum")
def _einsum(site: Site) -> str:
    return f"torch.einsum({', '.join([site.text('equation'), *_typed(site)])})"


@_writes(*(f"conv{transposed}{rank}d" for transposed in ("", "_transpose") for rank in (1, 2, 3)))
def _conv(site: Site) -> str:
    names = ("stride", "padding", *(("output_padding",) if "transpose" in site.op.name else ()), "dilation", "groups")
    return f"F.{site.op.name}({', '.join(_typed(site))}{site.options(*names)})"


@_writes("embedding")
def _embedding(site: Site) -> str:
    ids = site.x(0) if site.type(0).dtype in ("i64", "i32") else site.typed(0, "i64")
    return f"F.embedding({ids}, {site.x(1)})"


@_writes("max_pool")
def _max_pool(site: Site) -> str:
    rank = len(_numbers(site, "kernel"))
    return (f"F.max_pool{rank}d({site.x(0)}, {site.text('kernel')}, {site.text('stride')}, "
            f"{site.text('padding')}, {site.text('dilation')}{site.options('ceil_mode')})")


@_writes("max_pool_adjoint")
def _max_pool_adjoint(site: Site) -> str:
    return (f"kernels.max_pool_adjoint({', '.join(site.args())}, {site.text('kernel')}, {site.text('stride')}, "
            f"{site.text('padding')}, {site.text('dilation')})")


@_writes("adaptive_avg_pool", "adaptive_max_pool")
def _adaptive_pool(site: Site) -> str:
    rank = len(_numbers(site, "size"))
    return _batched(site, rank, f"F.{site.op.name}{rank}d", site.text("size"))


@_writes("avg_pool")
def _avg_pool(site: Site) -> str:
    windows = ", ".join(site.text(name) for name in ("kernel", "stride", "padding"))
    if site.attr("divisor") is not None:
        options = site.options("ceil_mode", "count_include_pad", "divisor")
        return f"kernels.avg_pool({site.x(0)}, {windows}{options})"
    rank = len(_numbers(site, "kernel"))
    return _batched(site, rank, f"F.avg_pool{rank}d", windows + site.options("ceil_mode", "count_include_pad"))


def _batched(site: Site, rank: int, function: str, arguments: str) -> str:
    """A call of a pooling function, which takes one batch axis and one of channels."""
    if site.type(0).rank == rank + 2:
        return f"{function}({site.x(0)}, {arguments})"
    shape = site.scope.text(site.result.shape)
    return f"{function}({site.x(0)}.flatten(0, {-rank - 1}).unsqueeze(1), {arguments}).reshape({shape})"


@_writes("avg_pool_adjoint")
def _avg_pool_adjoint(site: Site) -> str:
    windows = ", ".join(site.text(name) for name in ("size", "kernel", "stride", "padding"))
    options = site.options("ceil_mode", "count_include_pad", "divisor")
    return f"kernels.avg_pool_adjoint({site.x(0)}, {windows}{options})"


@_writes("batch_norm")
def _batch_norm(site: Site) -> str:
    x, mean, variance, weight, bias = (site.typed(i) for i in range(5))
    return f"F.batch_norm({x}, {mean}, {variance}, {weight}, {bias}, eps={site.text('eps')})"


@_writes("layer_norm", "rms_norm")
def _norm(site: Site) -> str:
    dims = site.attr("dims")
    assert isinstance(dims, int)
    shape = site.scope.text(site.type(0).shape[-dims:])
    affine = [site.typed(i) for i in range(1, 3 if site.op.name == "layer_norm" else 2)]
    return f"F.{site.op.name}({', '.join([site.typed(0), shape, *affine])}, eps={site.text('eps')})"


@_writes("group_norm")
def _group_norm(site: Site) -> str:
    weight, bias = site.typed(1), site.typed(2)
    return f"F.group_norm({site.x(0)}, {site.text('groups')}, {weight}, {bias}, eps={site.text('eps')})"


@_writes("row_statistics")
def _row_statistics(site: Site) -> str:
    return f"kernels.row_statistics({site.x(0)}, {site.text('dims')}, {site.text('eps')}, {site.text('centred')})"


@_writes("attention")
def _attention(site: Site) -> str:
    q, k, v = (site.typed(i) for i in range(3))
    (_, heads, queries, _), (_, groups, keys, _) = site.type(0).shape, site.type(1).shape
    causal = bool(site.attr("causal"))
    plain = not (site.has(3) or site.has(4)) and site.attr("window") is None and site.attr("softcap") is None
    if plain and (not causal or queries == keys):
        options = ", is_causal=True" * causal + ", enable_gqa=True" * (heads != groups)
        return f"F.scaled_dot_product_attention({q}, {k}, {v}, scale={site.text('scale')}{options})"
    return f"kernels.attention({q}, {k}, {v}, {site.x(3)}{_attending(site, 4)})"


@_writes("attention_weights")
def _attention_weights(site: Site) -> str:
    return f"kernels.attention_weights({site.typed(0)}, {site.typed(1)}, {site.x(2)}{_attending(site, 3)})"


def _attending(site: Site, sinks: int) -> str:
    given = f", {site.x(sinks)}" if site.has(sinks) else ""
    return given + site.options("scale", "causal", "window", "softcap")


@_writes("slice_adjoint")
def _slice_adjoint(site: Site) -> str:
    axis, rank = site.axis(), site.result.rank
    if site.attr("step") != 1:
        return (f"kernels.slice_adjoint({site.x(0)}, {axis}, {site.text('size')}, {site.text('start')}, "
                f"{site.text('stop')}, {site.text('step')})")
    before, after = site.text("start"), _difference(site, "size", "stop")
    return f"F.pad({site.x(0)}, ({'0, 0, ' * (rank - 1 - axis)}{before}, {after}))"


def _difference(site: Site, left: str, right: str) -> str:
    whole, part = site.attr(left), site.attr(right)
    assert isinstance(whole, (int, Sym)) and isinstance(part, (int, Sym))
    return site.scope.text(whole - part)


@_writes("select_adjoint")
def _select_adjoint(site: Site) -> str:
    dim = site.attr("dim")
    assert isinstance(dim, int)
    return f"kernels.select_adjoint({site.x(0)}, {dim % site.result.rank}, {site.text('index')}, {site.text('size')})"


@_writes("cat")
def _cat(site: Site) -> str:
    return f"torch.cat({tuple_of(_typed(site))}, {site.axis()})"


@_writes("pad")
def _pad(site: Site) -> str:
    pads = site.attr("pads")
    assert isinstance(pads, tuple)
    flat = [size for pair in reversed(pads) for size in (pair if isinstance(pair, tuple) else ())]
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    value = "" if is_zero(site.attr("value")) else f", value={site.text('value')}"
    return f"F.pad({site.x(0)}, {site.scope.text(tuple(flat))}{value})"


@_writes("triangle")
def _triangle(site: Site) -> str:
    return f"torch.{'triu' if site.attr('upper') else 'tril'}({site.x(0)}, {site.text('diagonal')})"


@_writes("take")
def _take(site: Site) -> str:
    return f"{site.x(0)}{along(site.type(0).rank, site.axis(), site.x(1))}"


@_writes("index_adjoint")
def _index_adjoint(site: Site) -> str:
    first = _numbers(site, "dims")[0]
    return f"kernels.index_adjoint({site.x(0)}, {tuple_of(site.args(1))}, {first}, {site.text('sizes')})"


@_writes("index_put")
def _index_put(site: Site) -> str:
    source = site.typed(1) if site.tensor(1) else site.x(1)
    options = site.options("accumulate")
    return f"kernels.index_put({site.x(0)}, {source}, {tuple_of(site.args(2))}, {site.axes()[0]}{options})"


def _typed(site: Site) -> list[str]:
    return [site.typed(i) for i in range(len(site.op.operands))]


def _numbers(site: Site, name: str) -> tuple[object, ...]:
    value = site.attr(name)
    return value if isinstance(value, tuple) else (value,)
