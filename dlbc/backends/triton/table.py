"""What each pointwise op is written as in Triton: `{a}`, `{b}`, `{c}` are the operands, other fields attributes.

All floating numbers are float32 here, whatever they are stored as. No libdevice and no inline assembly: where the
language has no function, `dlbc_runtime/triton_math.py` (called `math` in generated code) has one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from dlbc.ir.core import Attr, Op
from dlbc.ir.dims import Sym
from dlbc.ir.ops import attr

Written: TypeAlias = "str | Callable[[Op, Sequence[str]], str]"

TABLE: dict[str, Written] = {
    **{name: f"tl.{name}({{a}})" for name in (
        "exp", "log", "rsqrt", "sin", "cos", "erf", "sigmoid", "abs", "floor", "ceil")},
    **{name: f"math.{name}({{a}})" for name in (
        "expm1", "log1p", "tanh", "log_sigmoid", "mish", "hardsigmoid")},
    "sqrt": "tl.sqrt_rn({a})",
    "tan": "tl.sin({a}) / tl.cos({a})",
    "reciprocal": "1.0 / {a}",
    "silu": "{a} * tl.sigmoid({a})",
    "hardswish": "{a} * math.hardsigmoid({a})",
    "softsign": "{a} / (1.0 + tl.abs({a}))",
    "neg": "-{a}",
    "sign": "math.sign({a})",
    "relu": "tl.where({a} < 0, 0, {a})",
    "negative_part": "tl.where({a} > 0, 0, {a})",
    "logical_not": "{a} == 0",
    "isnan": "{a} != {a}",
    "isinf": 'tl.abs({a}) == float("inf")',
    "softplus": "math.softplus({a}, {beta}, {threshold})",
    "leaky_relu": "tl.where({a} > 0, {a}, {a} * {negative_slope})",
    "elu": "tl.where({a} > 0, {a} * {scale}, math.expm1({a} * {input_scale}) * {alpha} * {scale})",
    "stabilise": "tl.where({a} >= 0, {a} + {eps}, {a} - {eps})",
    "damp": "{a} * (tl.abs({b}) / (tl.abs({b}) + {eps}))",
    "relu_adjoint": "tl.where({b} > 0, {a}, 0.0)",
    "add": "{a} + {b}", "sub": "{a} - {b}", "mul": "{a} * {b}", "div": "{a} / {b}",
    "maximum": "tl.maximum({a}, {b}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({a}, {b}, propagate_nan=tl.PropagateNan.ALL)",
    "safe_div": "math.safe_div({a}, {b})",
    "eq": "{a} == {b}", "ne": "{a} != {b}", "lt": "{a} < {b}", "le": "{a} <= {b}", "gt": "{a} > {b}",
    "ge": "{a} >= {b}",
    "logical_and": "({a} != 0) & ({b} != 0)", "logical_or": "({a} != 0) | ({b} != 0)",
    "logical_xor": "({a} != 0) ^ ({b} != 0)",
    "where": "tl.where({a} != 0, {b}, {c})",
}
"""An op's expression. Operands are names or literals, so nothing needs parentheses."""


def expression(op: Op, operands: Sequence[str]) -> str:
    """The text of a pointwise op of operands that are names or literals."""
    written = TABLE[op.name]
    if callable(written):
        return written(op, operands)
    fields = {**dict(zip("abc", operands, strict=False)), **{name: number(attr(op, name)) for name in _fields(written)}}
    return written.format(**fields)


def number(value: Attr) -> str:
    """A literal; infinities as Triton writes them."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    assert not isinstance(value, str | tuple | Sym) and value is not None
    return f"({value})" if isinstance(value, int | float) and value < 0 else str(value)


def _fields(template: str) -> list[str]:
    from string import Formatter

    return [field for _, field, _, _ in Formatter().parse(template) if field and field not in ("a", "b", "c")]


def _register(*names: str) -> Callable[[Callable[[Op, Sequence[str]], str]], Callable[[Op, Sequence[str]], str]]:
    def register(function: Callable[[Op, Sequence[str]], str]) -> Callable[[Op, Sequence[str]], str]:
        TABLE.update(dict.fromkeys(names, function))
        return function

    return register


@_register("gelu")
def _gelu(op: Op, operands: Sequence[str]) -> str:
    form = str(attr(op, "approximate"))
    return f"math.gelu_{form}({operands[0]})" if form != "none" else f"math.gelu({operands[0]})"


@_register("glu")
def _glu(op: Op, operands: Sequence[str]) -> str:
    gate, up = operands
    name = str(attr(op, "activation"))
    written = {"silu": f"{gate} * tl.sigmoid({gate})", "relu": f"tl.where({gate} < 0, 0.0, {gate})",
               "sigmoid": f"tl.sigmoid({gate})"}.get(name, f"math.{name}({gate})")
    return f"{written} * {up}"


@_register("clamp")
def _clamp(op: Op, operands: Sequence[str]) -> str:
    text, low, high = operands[0], attr(op, "low"), attr(op, "high")
    if low is not None:
        text = f"tl.where({text} < {number(low)}, {number(low)}, {text})"
    if high is not None:
        text = f"tl.where({text} > {number(high)}, {number(high)}, {text})"
    return text


@_register("pow")
def _pow(op: Op, operands: Sequence[str]) -> str:
    x, power = operands[0], op.operands[1]
    return {2: f"{x} * {x}", 3: f"{x} * {x} * {x}", 4: f"({x} * {x}) * ({x} * {x})", -1: f"1.0 / {x}",
            -2: f"1.0 / ({x} * {x})", 0.5: f"tl.sqrt_rn({x})", -0.5: f"tl.rsqrt({x})"}[power]  # type: ignore[index]


@_register("cast")
def _cast(op: Op, operands: Sequence[str]) -> str:
    dtype = op.result.type.dtype
    if dtype == "bool":
        return f"{operands[0]} != 0"
    return f"{operands[0]}.to(tl.{ {'i64': 'int64', 'i32': 'int32'}.get(dtype, 'float32') })"
