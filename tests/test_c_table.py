"""Elementwise ops in C against what the torch backend makes of them, on numbers of every kind; all in one library."""

from __future__ import annotations

import ctypes
import math
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dlbc.backends import load
from dlbc.backends.c.table import CTYPES, TABLE, expression, number, supported
from dlbc.ir import reference
from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Section, Type, Value
from dlbc.ir.dims import symbol
from dlbc.ir.fusible import POINTWISE
from dlbc.ir.ops import OPS
from dlbc_runtime.c_compiler import FLAGS, command
from dlbc_runtime.c_library import MATH
from dlbc_runtime.module import load_module
from tests.test_reference import DTYPES, NAMES

COMPILER = command()
STRICT = ("-march=native", "-Wall", "-Wextra", "-Wdouble-promotion", "-Werror")
"""Warnings that generated code gives none of; float that becomes double unsaid is one."""
compiled = pytest.mark.skipif(COMPILER is None, reason="no C compiler on the PATH")

B = symbol("B")
FLOATS, INTEGERS = ("f32", "f64"), ("i64", "i32")
ODD = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, -2.5, 3.0, -3.0, 6.0, -7.3, 20.0, 50.0, -90.0, 104.5, 1e-30, -1e-30, 1e-3,
       -2e-6, 3e-40, -1e-45, 1e30, -3e38, math.inf, -math.inf, math.nan)
WHOLE = (0, 1, -1, 2, 3, -4, 7, 30, -31, 2**31 - 1, -2**31, 12345)


@dataclass(frozen=True)
class Case:
    """An op of operands: element types of arrays, "once" of one number, or literals. Results are those of torch up to
    `ulps` units of the last place, of the result or (where torch's own formula cancels) of the first operand; `ulps` 0:
    the same numbers."""

    name: str
    operands: tuple[Any, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    ulps: int = 0
    cancels: bool = False
    positive: bool = False

    def __str__(self) -> str:
        return " ".join(map(str, (self.name, *self.operands, *self.attrs.values())))


def cases() -> list[Case]:
    """Every op that can be written, for the element types it has a meaning for."""
    made: list[Case] = []

    def add(names: str, *operands: Any, ulps: int = 0, cancels: bool = False, **attrs: Any) -> None:
        made.extend(Case(name, operands, attrs, ulps, cancels) for name in names.split())

    for t in FLOATS:
        add("exp expm1 log log1p rsqrt sin cos tan tanh atan erf sigmoid log_sigmoid silu mish", t, ulps=4)
        add("sqrt", t, ulps=1)
        add("reciprocal hardswish hardsigmoid softsign neg abs sign relu floor ceil round negative_part "
            "logical_not isnan isinf stabilise leaky_relu", t)
        for form in ("none", "tanh", "quick"):
            add("gelu", t, approximate=form, ulps=4, cancels=True)
        add("softplus", t, ulps=4)
        add("softplus", t, ulps=4, beta=2.0, threshold=5.0)
        add("elu", t, ulps=4)
        add("elu", t, ulps=4, alpha=1.6732632423543772, scale=1.0507009873554805)
        add("elu", t, ulps=4, alpha=0.5, input_scale=2.0)
        add("leaky_relu", t, negative_slope=0.3)
        add("stabilise", t, eps=0.25)
        add("threshold", t, threshold=0.5, value=-2.0)
        add("threshold", t, value=math.inf)
        add("clamp", t)
        for low, high in ((-1.0, None), (None, 2), (0.0, 6.0), (3, 1), (-math.inf, 0.1)):
            add("clamp", t, low=low, high=high)
        add("damp", t, t, ulps=3)
        add("damp", t, t, ulps=3, eps=0.25)
        add("relu_adjoint safe_div", t, t)
        add("prelu", t, f"{t} once")
        for activation in ("silu", "gelu", "gelu_tanh", "gelu_quick", "sigmoid", "tanh"):
            add("glu", t, t, activation=activation, ulps=6, cancels=True)
        add("glu", t, t, activation="relu")
        for power in (1, 2, 3, -1, -2, -0.5, 2.0):
            add("pow", t, power)
        for power in (0, 4, 0.5, 1.7, t, "i64", B):
            add("pow", t, power, ulps=4)
        add("pow", 2, t, ulps=4)
        add("floor_divide remainder", t, 2.5)
        add("floor_divide remainder", t, t, ulps=2)
        for other in (t, 0.1, 2, B, "bool", "i64"):
            add("add sub mul div maximum minimum", t, other)
            add("eq ne lt le gt ge", t, other)
            add("where", "bool", t, other)
        add("add sub mul maximum minimum eq lt ge", 0.1, t)
        add("div safe_div", 0.1, t, ulps=1)  # torch: times 1 / x
        add("where", t, t, 0.0)
        add("where", "i64", -math.inf, t)
        add("where", True, t, 1.0)
    for t in INTEGERS:
        add("neg abs sign relu floor ceil round negative_part bitwise_not logical_not isnan isinf", t)
        add("exp sqrt sigmoid reciprocal silu" if t == "i32" else "exp", t, ulps=4)
        add("clamp", t, low=-1, high=3)
        add("clamp", t, low=-0.5, high=3)
        for other in (t, 3, "bool", B):
            add("add sub mul maximum minimum bitwise_and bitwise_or bitwise_xor eq ne lt le gt ge div", t, other)
        add("add mul eq lt maximum", t, 0.5)
        add("logical_and logical_or logical_xor", t, t)
        add("floor_divide remainder", t, 7)
        add("floor_divide remainder", t, -3)
        add("floor_divide remainder", t, -1)
        add("pow", t, 2)
        add("pow", t, 5)
        add("pow", t, t)
        add("where", "bool", t, -1)
        add("safe_div", t, t)
    add("sub mul eq gt", "i64", "i32")
    add("add mul maximum minimum bitwise_and bitwise_or bitwise_xor logical_and logical_or logical_xor eq lt ge",
        "bool", "bool")
    add("add mul lt eq", "bool", 2)
    add("sign logical_not bitwise_not isinf", "bool")
    add("logical_and logical_or logical_xor", "f32", "bool")
    add("logical_or", "i64", B)
    add("where", "bool", "bool", False)
    add("eq", "f32", "f64")
    add("exp", "bool", ulps=4)
    for source in CTYPES:
        for dtype in CTYPES:
            made.append(Case("cast", (source,), {"dtype": dtype}))
    return made


CASES = cases()


def array(dtype: str, position: int) -> torch.Tensor:
    """Numbers of every kind, those of the first two operands in all combinations, and random ones."""
    random = np.random.default_rng(position)
    if dtype == "bool":
        return torch.from_numpy(random.random(COUNT) < 0.5)
    odd = np.array(WHOLE if dtype in INTEGERS else ODD, dtype=np.float64)
    odd = np.tile(odd, len(ODD)) if position == 0 else np.repeat(odd, len(ODD))
    more = random.normal(size=COUNT) * np.exp(random.normal(size=COUNT) * 1.5)
    if dtype in INTEGERS:
        more = np.trunc(more * 4)
    found = np.concatenate((odd, more))[:COUNT]
    return torch.from_numpy(found).to(DTYPES[dtype])


COUNT = len(ODD) ** 2 + 519


@cache
def graph() -> tuple[Graph, tuple[Value, ...]]:
    """All cases as one graph."""
    builder, params, results = Builder([]), {}, []
    for case in CASES:
        read = []
        for position, operand in enumerate(case.operands):
            if isinstance(operand, str):
                dtype, *once = operand.split()
                name = "_".join((dtype, *once, str(position)))
                operand = params.setdefault(name, Value(name, Type(dtype, (1,) if once else (B,))))
            read.append(operand)
        results += builder.op(case.name, *read, **case.attrs)
    section = Section(tuple(params.values()), tuple(builder.ops), tuple(results))
    return Graph("all", section, dims={"B": (1, 10000)}), section.params


@cache
def inputs() -> dict[str, torch.Tensor]:
    """The arrays of all parameters; what there is once is 1.5."""
    return {p.name: array(p.type.dtype, int(p.name[-1])) if p.type.shape == (B,)
            else torch.full((1,), 1.5, dtype=DTYPES[p.type.dtype]) for p in graph()[1]}


@cache
def expected() -> list[np.ndarray]:
    """What the torch backend makes of them."""
    module = load_module(load("torch").emit(graph()[0]), "all")
    with torch.inference_mode():
        found, _ = module.forward({}, (), *inputs().values())
    assert [NAMES[y.dtype] for y in found] == [op.result.type.dtype for op in graph()[0].forward.ops]
    return [np.broadcast_to(y.numpy(), (COUNT,)) for y in found]


def function(name: str, op: Op) -> str:
    """A C function of a loop over one op."""
    values = [operand for operand in op.operands if isinstance(operand, Value)]
    texts = [f"{o.name}[{'i' if o.type.shape == (B,) else 0}]" if isinstance(o, Value) else str(o) for o in op.operands]
    types = [o.type.dtype if isinstance(o, Value) else "i64" for o in op.operands]
    made = CTYPES[op.result.type.dtype]
    given = "".join(f", const {CTYPES[v.type.dtype]} *restrict {v.name}" for v in dict.fromkeys(values))
    return (f"void {name}(int64_t B, {made} *restrict y{given}) {{\n  for (int64_t i = 0; i < B; i++)\n"
            f"    y[i] = {expression(op, texts, types)};\n}}\n")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All cases as C functions."""
    ops = list(graph()[0].forward.ops)
    folder: Path = tmp_path_factory.mktemp("c")
    functions = "".join(function(f"op{i}", op) for i, op in enumerate(ops))
    (folder / "ops.c").write_text(f"{MATH.read_text()}\n#pragma GCC visibility push(default)\n{functions}")
    made, source = str(folder / "ops.so"), str(folder / "ops.c")
    done = subprocess.run([*(COMPILER or ()), *FLAGS, *STRICT, "-o", made, source, "-lm"], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    return ctypes.CDLL(made)


def run(library: ctypes.CDLL, place: int, y: torch.Tensor, given: list[torch.Tensor]) -> None:
    """A case's function, its results written to y."""
    library[f"op{place}"](ctypes.c_int64(len(y)), *(ctypes.c_void_p(t.data_ptr()) for t in (y, *given)))


@pytest.fixture(scope="module")
def found(library: ctypes.CDLL) -> list[np.ndarray]:
    """What C makes of them."""
    results = []
    for place, op in enumerate(graph()[0].forward.ops):
        y = torch.empty(COUNT, dtype=DTYPES[op.result.type.dtype])
        read = dict.fromkeys(o.name for o in op.operands if isinstance(o, Value))
        run(library, place, y, [inputs()[name] for name in read])
        results.append(y.view(torch.uint8).numpy() if y.dtype == torch.bool else y.numpy())
    return results


def off(case: Case, op: Op, y: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Where results are not what they should be."""
    if not case.ulps:
        return ~((y == right) | ((y != y) & (right != right)))
    with np.errstate(all="ignore"):
        room = np.spacing(np.abs(right)) * case.ulps
        if case.cancels:
            first = inputs()[op.operands[0].name].numpy()  # type: ignore[union-attr]
            second = inputs()[op.operands[1].name].numpy() if len(op.operands) > 1 else 1  # type: ignore[union-attr]
            room = np.maximum(room, np.abs(np.spacing(first) * second) * case.ulps)
        near = np.abs(y - right) <= room
    return ~(near | (y == right) | ((y != y) & (right != right)))


@compiled
@pytest.mark.parametrize("name", sorted({case.name for case in CASES}))
def test_op(name: str, found: list[np.ndarray]) -> None:
    wrong = []
    for case, op, y, right in zip(CASES, graph()[0].forward.ops, found, expected(), strict=True):
        if case.name != name:
            continue
        assert supported(op)
        read = [np.broadcast_to(inputs()[o.name].numpy(), (COUNT,)) for o in op.operands if isinstance(o, Value)]
        bad = off(case, op, y, right) & answered(case, *read)
        if y.dtype == np.uint8:
            assert set(y.tolist()) <= {0, 1}
        if bad.any():
            shown = [tuple(float(x[i]) for x in (*read, y, right)) for i in np.flatnonzero(bad)[:6]]
            wrong.append(f"{case}: {bad.sum()} of {COUNT}; operands, result, expected: {shown}")
    assert not wrong, "\n".join(wrong)


def answered(case: Case, x: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """Where C and torch say what an op is. C: a floating number as an integer only where one holds it. Torch: of
    float32 no remainders of large quotients, gelu(infinity) is NaN, and a number over x is infinite where 1 / x is."""
    if case.name == "cast" and case.operands[0] in FLOATS and case.attrs["dtype"] in INTEGERS:
        return np.abs(x) < 2.0 ** (63 if case.attrs["dtype"] == "i64" else 31)
    if case.name in ("remainder", "floor_divide") and others and x.dtype == np.float32:
        with np.errstate(all="ignore"):
            return ~(np.abs(x.astype(np.float64) / others[0]) > 2.0**20) | np.isinf(x)
    if case.name in ("div", "safe_div") and case.operands[0] == 0.1:
        return ~(np.abs(x) < 1e-37) | (x == 0)
    if "gelu" in (case.name, case.attrs.get("activation")):
        return x != np.inf
    return np.ones(x.shape, dtype=bool)


PRECISE: dict[str, tuple[Any, float]] = {
    "exp": (np.exp, 1.1), "expm1": (np.expm1, 2.0), "log": (np.log, 1.1), "log1p": (np.log1p, 1.6),
    "tanh": (np.tanh, 2.5), "erf": (reference.erf, 1.6), "sigmoid": (reference.sigmoid, 2.5),
    "silu": (reference.REFERENCE["silu"], 3.0), "log_sigmoid": (reference.REFERENCE["log_sigmoid"], 2.5),
    "mish": (reference.REFERENCE["mish"], 4.5),
}
"""Functions of float, what they are in float64, and how far they may be off in units of the last place."""


@compiled
@pytest.mark.parametrize("name", PRECISE)
def test_functions_are_precise_everywhere(name: str, library: ctypes.CDLL) -> None:
    """On numbers of any size: random bits, and where most of what functions do happens."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, 60_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x = np.concatenate((bits[np.isfinite(bits)], random.uniform(-105, 90, 60_000).astype(np.float32),
                        random.normal(size=60_000).astype(np.float32)))
    y = np.empty_like(x)
    place = next(i for i, case in enumerate(CASES) if case.name == name and case.operands == ("f32",))
    run(library, place, torch.from_numpy(y), [torch.from_numpy(x)])
    function, most = PRECISE[name]
    with np.errstate(all="ignore"):
        right = function(x.astype(np.float64))
        rounded = right.astype(np.float32)
        off = np.abs(y - right) / np.spacing(np.abs(rounded)).astype(np.float64)
        same = (y == rounded) | ((y != y) & (rounded != rounded)) | (np.abs(rounded) < 1.2e-38) & (np.abs(y) < 1.2e-38)
    if name in ("silu", "mish"):
        same |= x < -87  # where they are below 2e-36, and e ** x or its inverse leaves float32
    off[same | np.isinf(rounded)] = 0
    assert (np.isinf(y) == np.isinf(rounded)).all() and (np.isnan(y) == np.isnan(rounded)).all()
    worst = int(np.argmax(off))
    assert off[worst] <= most, (x[worst], y[worst], right[worst], off[worst])


LEFT_OUT: dict[str, str] = {}
"""Elementwise ops that are not written in C, and why."""


def test_every_elementwise_op_is_written_or_left_out_for_a_reason() -> None:
    elementwise = {name for name, entry in OPS.items() if entry.elementwise}
    assert set(TABLE) | set(LEFT_OUT) == elementwise and not set(TABLE) & set(LEFT_OUT)
    assert set(TABLE) >= POINTWISE and {case.name for case in CASES} == set(TABLE)


def one(name: str, *operands: Any, **attrs: Any) -> Op:
    """An op of values of these element types, or of literals."""
    builder = Builder([])
    read = [Value(f"x{i}", Type(o, (3,))) if isinstance(o, str) else o for i, o in enumerate(operands)]
    builder.op(name, *read, **attrs)
    return builder.ops[0]


@pytest.mark.parametrize("op", [
    one("add", "f16", "f32"), one("cast", "f32", dtype="bf16"), one("add", "u8", "i64"), one("sub", "bool", "bool"),
    one("remainder", "i64", "i64"), one("floor_divide", "i64", 0), one("floor_divide", "i64", B), one("pow", "i64", -1),
    one("pow", "bool", "bool"), one("gelu", "i64"), one("stabilise", "i32"), one("bitwise_and", "f32", "f32"),
    one("add", 1.0, 2.0), one("softmax", "f32", dim=-1)], ids=lambda op: op.name)
def test_what_cannot_be_written(op: Op) -> None:
    assert not supported(op)


@pytest.mark.parametrize(("value", "dtype", "text"), [
    (0.1, "f32", "0.1f"), (1.0, "f32", "1.0f"), (-1, "f32", "(-1.0f)"), (1e-9, "f32", "1e-09f"),
    (1e300, "f32", "INFINITY"),
    (-math.inf, "f32", "(-INFINITY)"), (1e-60, "f32", "0.0f"), (True, "f32", "1.0f"), (1 / 3, "f32", "0.33333334f"),
    (3e-45, "f32", "3e-45f"), (16777217, "f32", "16777216.0f"), (math.nan, "f64", "((double)NAN)"),
    (0.1, "f64", "0.1"), (-2, "f64", "(-2.0)"), (1e300, "f64", "1e+300"), (-math.inf, "f64", "(-(double)INFINITY)"),
    (3, "i64", "3LL"), (-3.7, "i64", "(-3LL)"), (-2**63, "i64", "(-9223372036854775807LL - 1)"), (-5, "i32", "(-5)"),
    (-2**31, "i32", "(-2147483647 - 1)"), (2.5, "bool", "1"), (False, "bool", "0")])
def test_number(value: float, dtype: str, text: str) -> None:
    assert number(value, dtype) == text
