"""What each elementwise op is written as in C: `{a}`, `{b}`, `{c}` are the operands, other fields attributes.

A float32 number is a C float and stays one: no literal and no function makes a double of it. What takes more than one
expression is a function of `dlbc_runtime/c_math.h`, named `dlbc_<function>_<element type>`.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

from dlbc.backends.shared import COMPARE, LOGICAL
from dlbc.ir import ops
from dlbc.ir.core import Attr, Op, Value, Weight

CTYPES = {"f32": "float", "f64": "double", "i64": "int64_t", "i32": "int32_t", "bool": "uint8_t"}
"""The C type of an element type. A bool is 0 or 1."""

FLOATS, INTEGERS = ("f32", "f64"), ("i64", "i32")
NUMBERS = (*FLOATS, *INTEGERS)

SIMPLE = re.compile(r"\w[\w.]*(\[[^][]*\])?|\([^()]*\)")
"""A text that an operator or a cast may stand before and behind."""


@dataclass(frozen=True)
class CSite:
    """One op where it is written: the texts of its operands and the element types that these have."""

    op: Op
    operands: Sequence[str]
    types: Sequence[str]

    def __getitem__(self, field: str) -> str:
        """What a template's field stands for (see `TABLE`)."""
        if field in ("a", "b", "c"):
            return self.x("abc".index(field))
        if field == "f":
            return "f" if self.dtype == "f32" else ""
        return self.dtype if field == "s" else self.attr(field)

    @property
    def dtype(self) -> str:
        """The element type of the result."""
        return self.op.result.type.dtype

    def x(self, position: int, dtype: str = "") -> str:
        """An operand in an element type, the result's unless stated."""
        operand, wanted = self.op.operands[position], dtype or self.dtype
        if isinstance(operand, int | float):
            return number(operand, wanted)
        return converted(self.operands[position], self.types[position], wanted)

    def attr(self, name: str) -> str:
        """An attribute that is a number, in the result's element type."""
        return number(ops.attr(self.op, name), self.dtype)


Written: TypeAlias = "str | Callable[[CSite], str]"

TABLE: dict[str, Written] = {
    **{name: f"dlbc_{name}_{{s}}({{a}})" for name in (
        "exp", "expm1", "log", "log1p", "tanh", "erf", "sigmoid", "log_sigmoid", "silu", "mish")},
    **{name: f"{name}{{f}}({{a}})" for name in ("sqrt", "sin", "cos", "tan", "atan")},
    "rsqrt": "1 / sqrt{f}({a})",
    "reciprocal": "1 / {a}",
    "softsign": "{a} / (1 + fabs{f}({a}))",
    "hardsigmoid": "dlbc_hard_{s}({a}) / 6",
    "hardswish": "{a} * dlbc_hard_{s}({a}) / 6",
    "relu": "{a} < 0 ? 0 : {a}",
    "negative_part": "{a} > 0 ? 0 : {a}",
    "softplus": "dlbc_softplus_{s}({a}, {beta}, {threshold})",
    "leaky_relu": "{a} > 0 ? {a} : {a} * {negative_slope}",
    "prelu": "{a} > 0 ? {a} : {a} * {b}",
    "elu": "dlbc_elu_{s}({a}, {alpha}, {scale}, {input_scale})",
    "threshold": "{a} <= {threshold} ? {value} : {a}",
    "stabilise": "{a} < 0 ? {a} - {eps} : {a} + {eps}",
    "damp": "dlbc_damp_{s}({a}, {b}, {eps})",
    "div": "{a} / {b}",
    "safe_div": "dlbc_safe_div_{s}({a}, {b})",
    "cast": "{a}",
}
"""An op's expression: a template, or a function of the site. In templates `{a}`, `{b}`, `{c}` are the operands in the
result's element type, `{s}` is the suffix of functions of c_math.h, `{f}` of those of the C library."""

RESULTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("neg", "abs", "relu", "floor", "ceil", "round", "negative_part", "clamp", "sub", "pow",
                     "floor_divide", "remainder"), NUMBERS),
    **dict.fromkeys(("sign", "cast", "add", "mul", "maximum", "minimum", "where", "isnan", "isinf", "logical_not",
                     *COMPARE, *LOGICAL), tuple(CTYPES)),
    **dict.fromkeys(("bitwise_not", "bitwise_and", "bitwise_or", "bitwise_xor"), (*INTEGERS, "bool")),
}
"""The element types that results of an op may have; of those left out, floating ones."""


def expression(op: Op, operands: Sequence[str], types: Sequence[str]) -> str:
    """The C expression of an elementwise op, of the C type of the result's element type once it is stored in one.

    `operands`: the texts of the op's operands, names or elements of arrays; `types`: their element types. The text of a
    number is not read: `number` writes it in the type that the op computes in. A size is an i64; the slope of `prelu`
    is that of the element's channel. The expression may hold operators of any rank, so parentheses go around it
    wherever it is part of another one.
    """
    site, written = CSite(op, operands, types), TABLE[op.name]
    return written.format_map(site) if isinstance(written, str) else written(site)


def supported(op: Op) -> bool:
    """Whether an op can be written in C: the op, its attributes and all its element types."""
    if op.name not in TABLE:
        return False
    tensors = [o for o in op.operands if isinstance(o, Value | Weight)]
    if not tensors or None in op.operands or any(t.type.dtype not in CTYPES for t in tensors):
        return False
    dtype = op.result.type.dtype
    return dtype in RESULTS.get(op.name, FLOATS) and (dtype in FLOATS or _of_integers(op))


def _of_integers(op: Op) -> bool:
    """Whether an op whose result is not floating has operands that C has an answer for: division by 0 ends a process,
    and torch knows no negative powers."""
    match op.name:
        case "floor_divide" | "remainder":
            return isinstance(op.operands[1], int) and op.operands[1] != 0
        case "pow":
            return not isinstance(op.operands[1], int) or op.operands[1] >= 0
        case "clamp":
            return all(ops.attr(op, side) is None or isinstance(ops.attr(op, side), int) for side in ("low", "high"))
    return True


@cache
def number(value: Attr, dtype: str) -> str:
    """The C literal of a number in an element type."""
    assert isinstance(value, int | float), value
    if dtype == "bool":
        return str(int(bool(value)))
    if dtype in INTEGERS:
        suffix, whole = "LL" if dtype == "i64" else "", int(value)
        smallest = whole == -2 ** (63 if dtype == "i64" else 31)  # its size alone is too large for the type
        text = f"{whole + 1}{suffix} - 1" if smallest else f"{whole}{suffix}"
    else:
        text = _floating(float(value), dtype)
    return f"({text})" if text.startswith("-") else text


def _floating(value: float, dtype: str) -> str:
    if math.isnan(value):
        return "NAN" if dtype == "f32" else "((double)NAN)"
    if dtype == "f64":
        return {math.inf: "((double)INFINITY)", -math.inf: "-(double)INFINITY"}.get(value, repr(value))
    single = ctypes.c_float(value).value
    if math.isinf(single):
        return "INFINITY" if single > 0 else "-INFINITY"
    texts = (f"{single:.{digits}g}" for digits in range(1, 10))
    text = next(text for text in texts if ctypes.c_float(float(text)).value == single)
    return text + ("f" if "." in text or "e" in text else ".0f")


def converted(text: str, dtype: str, wanted: str) -> str:
    """The text of a value in another element type."""
    text = text if SIMPLE.fullmatch(text) else f"({text})"
    if dtype == wanted:
        return text
    return f"({text} != 0)" if wanted == "bool" else f"(({CTYPES[wanted]}){text})"


def _writes(*names: str) -> Callable[[Callable[[CSite], str]], Callable[[CSite], str]]:
    def register(function: Callable[[CSite], str]) -> Callable[[CSite], str]:
        TABLE.update(dict.fromkeys(names, function))
        return function

    return register


@_writes("add", "sub", "mul")
def _arithmetic(site: CSite) -> str:
    a, b, name = site.x(0), site.x(1), site.op.name
    if site.dtype in INTEGERS:
        return f"dlbc_{name}_{site.dtype}({a}, {b})"
    signs = {"add": "|", "mul": "&"} if site.dtype == "bool" else {"add": "+", "sub": "-", "mul": "*"}
    return f"{a} {signs[name]} {b}"


@_writes("maximum", "minimum")
def _extremum(site: CSite) -> str:
    a, b, name = site.x(0), site.x(1), site.op.name
    if site.dtype in FLOATS:
        return f"dlbc_{name}_{site.dtype}({a}, {b})"
    return f"{a} {'>' if name == 'maximum' else '<'} {b} ? {a} : {b}"


@_writes("neg")
def _neg(site: CSite) -> str:
    return f"-{site.x(0)}" if site.dtype in FLOATS else f"dlbc_sub_{site.dtype}(0, {site.x(0)})"


@_writes("abs")
def _abs(site: CSite) -> str:
    return _of_float(site, "fabs") if site.dtype in FLOATS else f"dlbc_abs_{site.dtype}({site.x(0)})"


@_writes("sign")
def _sign(site: CSite) -> str:
    x = site.x(0)
    return x if site.dtype == "bool" else f"({x} > 0) - ({x} < 0)"


@_writes("floor", "ceil", "round")
def _rounded(site: CSite) -> str:
    if site.dtype not in FLOATS:
        return site.x(0)
    return _of_float(site, "rint" if site.op.name == "round" else site.op.name)


def _of_float(site: CSite, name: str) -> str:
    return f"{name}{site['f']}({site.x(0)})"


@_writes("isnan", "isinf")
def _odd(site: CSite) -> str:
    dtype = site.types[0]
    x = site.x(0, dtype)
    if dtype not in FLOATS:
        return f"((void){x}, 0)"
    if site.op.name == "isnan":
        return f"{x} != {x}"
    return f"fabs{'f' if dtype == 'f32' else ''}({x}) == {number(math.inf, dtype)}"


@_writes("logical_not")
def _logical_not(site: CSite) -> str:
    return f"{site.x(0, site.types[0])} == 0"


@_writes("bitwise_not")
def _bitwise_not(site: CSite) -> str:
    return f"{site.x(0)} == 0" if site.dtype == "bool" else f"~{site.x(0)}"


@_writes(*COMPARE)
def _compared(site: CSite) -> str:
    common = ops.promote(*(operand.type if isinstance(operand, Value | Weight) else operand
                           for operand in site.op.operands if operand is not None))
    return f"{site.x(0, common)} {COMPARE[site.op.name]} {site.x(1, common)}"


@_writes(*LOGICAL, "bitwise_and", "bitwise_or", "bitwise_xor")
def _bits(site: CSite) -> str:
    return f"{site.x(0)} {LOGICAL[site.op.name.replace('bitwise', 'logical')]} {site.x(1)}"


@_writes("where")
def _where(site: CSite) -> str:
    return f"{site.x(0, 'bool')} ? {site.x(1)} : {site.x(2)}"


@_writes("relu_adjoint")
def _relu_adjoint(site: CSite) -> str:
    return f"{site.x(1, site.types[1])} <= 0 ? 0 : {site.x(0)}"


@_writes("gelu")
def _gelu(site: CSite) -> str:
    form = str(ops.attr(site.op, "approximate"))
    return f"dlbc_gelu{'' if form == 'none' else f'_{form}'}_{site.dtype}({site.x(0)})"


@_writes("glu")
def _glu(site: CSite) -> str:
    gate, name = site.x(0), str(ops.attr(site.op, "activation"))
    opened = f"({gate} < 0 ? 0 : {gate})" if name == "relu" else f"dlbc_{name}_{site.dtype}({gate})"
    return f"{opened} * {site.x(1)}"


@_writes("clamp")
def _clamp(site: CSite) -> str:
    text = site.x(0)
    for side, sign in (("low", "<"), ("high", ">")):
        bound = ops.attr(site.op, side)
        if bound is not None:
            limit = site.attr(side)
            text = limit if bound != bound else f"({text} {sign} {limit} ? {limit} : {text})"
    return text


@_writes("pow")
def _pow(site: CSite) -> str:
    power = site.op.operands[1]
    x = site.x(0)
    if site.dtype in INTEGERS:
        return f"dlbc_pow_{site.dtype}({x}, {site.x(1)})"
    root = f"sqrt{site['f']}({x})"
    written = {1: x, 2: f"{x} * {x}", 3: f"{x} * {x} * {x}", 4: f"({x} * {x}) * ({x} * {x})", -1: f"1 / {x}",
               -2: f"1 / ({x} * {x})", 0.5: root, -0.5: f"1 / {root}"}
    if isinstance(power, int | float) and power in written and isinstance(site.op.operands[0], Value | Weight):
        return written[power]
    return f"pow{site['f']}({x}, {site.x(1)})"


@_writes("floor_divide", "remainder")
def _whole_division(site: CSite) -> str:
    if site.op.operands[1] == -1 and site.dtype in INTEGERS:
        return f"dlbc_sub_{site.dtype}(0, {site.x(0)})" if site.op.name == "floor_divide" else f"{site.x(0)} & 0"
    return f"dlbc_{site.op.name}_{site.dtype}({site.x(0)}, {site.x(1)})"
