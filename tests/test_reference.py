"""Every op of the catalogue against torch: its numbers in float64, and its inferred element type and shape.

A case gives an op's operands and attributes and says the same in torch. It runs twice: on the operands as
they are, for the types, and with every floating tensor widened to float64, for the numbers. Adjoints are
held to `<A x, r> = <x, A^T r>`, with a leading S on r.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Section, Type, Value
from dlbc.ir.dims import evaluate, symbol
from dlbc.ir.interpreter import interpret
from dlbc.ir.ops import OPS, infer
from dlbc.ir.reference import REFERENCE

DTYPES = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
          "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8,
          "bool": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

random = torch.Generator().manual_seed(0)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=random).to(dtype)


def below(high: int, *shape: int, low: int = 0) -> Tensor:
    """Integers from low to high - 1."""
    return torch.randint(low, high, shape, generator=random)


def numpy(x: Any) -> Any:
    """A tensor as numpy has it (bfloat16 it has not)."""
    return (x.double() if x.dtype == torch.bfloat16 else x).numpy()


def run(name: str, *operands: Any, **attrs: Any) -> tuple[tuple[Value, ...], tuple[np.ndarray, ...]]:
    """One op on tensors and literals: its typed results and their numbers."""
    builder, params, read = Builder(), [], []
    for place, operand in enumerate(operands):
        if isinstance(operand, Tensor):
            operand = Value(f"x{place}", Type(NAMES[operand.dtype], tuple(operand.shape)))
            params.append(operand)
        read.append(operand)
    results = builder.op(name, *read, **attrs)
    graph = Graph("one", Section(tuple(params), tuple(builder.ops), results))
    given = {f"x{place}": numpy(x) for place, x in enumerate(operands) if isinstance(x, Tensor)}
    return results, interpret(graph, given, {}).outputs


@dataclass(frozen=True)
class Case:
    """An op on operands, and the same in torch."""

    name: str
    operands: tuple[Any, ...]
    expected: Callable[..., Any]
    attrs: dict[str, Any]


CASES: list[Case] = []


def case(name: str, *operands: Any, expected: Callable[..., Any], **attrs: Any) -> None:
    """Add a case; `expected` takes the operands."""
    CASES.append(Case(name, operands, expected, attrs))


# --- elementwise -------------------------------------------------------------------------------------

WIDE = torch.tensor([-30., -7., -3., -1.5, -0.5, 0., 0.5, 1., 2.5, 3.5, 25., 30.])
POSITIVE = torch.tensor([[0.1, 0.5, 1.], [2., 3., 40.]])
SMALL = torch.tensor([-0.9, -0.3, 0., 0.4, 2.])
INTS = torch.tensor([-7, -2, -1, 0, 1, 3, 8])
BOOLS = torch.tensor([True, False, True])
SPECIAL = torch.tensor([1., math.nan, math.inf, -math.inf, 0.])


for _name in ("exp", "expm1", "sin", "cos", "tan", "tanh", "atan", "erf", "sigmoid"):
    case(_name, WIDE, expected=getattr(torch, _name))
    case(_name, INTS, expected=getattr(torch, _name))
for _name in ("log", "sqrt", "rsqrt", "reciprocal", "log1p"):
    case(_name, POSITIVE, expected=getattr(torch, _name))
for _name, _function in {"log_sigmoid": F.logsigmoid, "silu": F.silu, "mish": F.mish, "hardswish": F.hardswish,
                         "hardsigmoid": F.hardsigmoid, "softsign": F.softsign, "relu": F.relu}.items():
    case(_name, WIDE, expected=_function)
for _name in ("neg", "abs", "sign", "floor", "ceil", "round", "relu"):
    case(_name, WIDE, expected=getattr(torch, _name))
    case(_name, INTS, expected=getattr(torch, _name))
case("negative_part", WIDE, expected=lambda x: x.clamp(max=0))
case("threshold", WIDE, expected=lambda x: F.threshold(x, 0.0, float("inf")), value=float("inf"))
case("threshold", WIDE, expected=lambda x: F.threshold(x, 0.5, -2.0), threshold=0.5, value=-2.0)
case("bitwise_not", INTS, expected=torch.bitwise_not)
case("bitwise_not", INTS.to(torch.uint8), expected=torch.bitwise_not)
case("bitwise_not", BOOLS, expected=torch.bitwise_not)
case("neg", INTS.to(torch.uint8), expected=torch.neg)
for _x in (WIDE, INTS, BOOLS):
    case("logical_not", _x, expected=torch.logical_not)
for _x in (SPECIAL, INTS):
    case("isnan", _x, expected=torch.isnan)
    case("isinf", _x, expected=torch.isinf)

case("gelu", WIDE, expected=F.gelu)
case("gelu", WIDE, expected=lambda x: F.gelu(x, approximate="tanh"), approximate="tanh")
case("gelu", WIDE, expected=lambda x: x * torch.sigmoid(1.702 * x), approximate="quick")
case("softplus", WIDE, expected=F.softplus)
case("softplus", WIDE, expected=lambda x: F.softplus(x, beta=2.0, threshold=5.0), beta=2.0, threshold=5.0)
case("elu", SMALL, expected=F.elu)
case("elu", SMALL, expected=lambda x: F.elu(x, 0.7), alpha=0.7)
case("elu", SMALL, expected=F.selu, alpha=1.6732632423543772, scale=1.0507009873554805)
case("elu", SMALL, expected=lambda x: F.celu(x, 0.5), alpha=0.5, input_scale=2.0)
case("leaky_relu", WIDE, expected=F.leaky_relu)
case("leaky_relu", WIDE, expected=lambda x: F.leaky_relu(x, 0.3), negative_slope=0.3)
case("prelu", rand(2, 3, 4), rand(3), expected=F.prelu)
case("prelu", rand(2, 3, 4, 5), rand(1), expected=F.prelu)
case("prelu", rand(2, 3), rand(3), expected=F.prelu)
case("prelu", rand(4), rand(1), expected=F.prelu)
case("clamp", WIDE, expected=F.relu6, low=0.0, high=6.0)
case("clamp", WIDE, expected=lambda x: x.clamp(min=-1.0), low=-1.0)
case("clamp", WIDE, expected=lambda x: x.clamp(max=2), high=2)
case("clamp", WIDE, expected=lambda x: x.clamp(3, 1), low=3, high=1)
case("clamp", INTS, expected=lambda x: x.clamp(-1, 3), low=-1, high=3)
case("clamp", INTS, expected=lambda x: x.clamp(-0.5, 3), low=-0.5, high=3)
for _x, _dtype in ((WIDE, "i32"), (WIDE, "bool"), (INTS, "u8"), (INTS, "f32"), (BOOLS, "f64"), (BOOLS, "i64"),
                   (INTS, "bool"), (WIDE, "f16")):
    case("cast", _x, expected=lambda x, to=_dtype: x.to(DTYPES[to]), dtype=_dtype)
case("stabilise", torch.tensor([-1., -0., 0., 1e-9, 2.]), expected=lambda x: torch.where(
    x >= 0, x + 1e-9, x - 1e-9))
case("relu_adjoint", torch.tensor([[2., 3., -1.], [4., -5., 6.]]), torch.tensor([0.5, 0., -0.3]),
     expected=lambda r, x: r * (x > 0))
case("damp", torch.tensor([[2., 3., -1.]]), torch.tensor([0., 0.1, -0.3]), expected=lambda m, y: m * y.abs() / (
    y.abs() + 0.1), eps=0.1)
case("stabilise", SMALL, expected=lambda x: torch.where(x >= 0, x + 0.1, x - 0.1), eps=0.1)

NUMBERS = (rand(2, 3, 4), rand(3, 1), rand(2, 1, 4).double(), rand(4).half(), rand(4).bfloat16(),
           torch.tensor(2.5), torch.tensor(2.5).double(), below(9, 3, 4, low=1), below(9, 4, low=1).to(torch.int32),
           below(9, 4, low=1).to(torch.uint8), below(9, 4, low=1).to(torch.int8), torch.tensor(3), torch.tensor(3).to(
           torch.int16), torch.tensor(3).to(torch.uint8), 2, 1.5)
for _name, _function in {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div,
                         "remainder": torch.remainder, "floor_divide": torch.floor_divide,
                         "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt,
                         "ge": torch.ge}.items():
    for _a in NUMBERS:
        for _b in NUMBERS:
            if isinstance(_a, Tensor) and (_name in ("add", "div") or _b is NUMBERS[0] or _b is NUMBERS[7]):
                case(_name, _a, _b, expected=_function)
            if not isinstance(_a, Tensor) and isinstance(_b, Tensor) and _name in ("add", "sub", "div"):
                case(_name, _a, _b, expected=getattr(operator, _name.replace("div", "truediv")))
case("add", BOOLS, 2, expected=torch.add)
case("add", BOOLS, 2.5, expected=torch.add)
case("mul", BOOLS, BOOLS, expected=torch.mul)
case("mul", BOOLS, torch.tensor([1., 2., 3.]), expected=torch.mul)
case("sub", 2.0, rand(3), expected=lambda a, b: a - b)
case("floor_divide", INTS, -2, expected=torch.floor_divide)
case("remainder", INTS, -3, expected=torch.remainder)
case("remainder", WIDE, -2.5, expected=torch.remainder)
case("safe_div", torch.tensor([1., 2., 0.]), torch.tensor([0., 4., 0.]), expected=lambda a, b: torch.where(
    b == 0, torch.zeros_like(b), a / b))
case("safe_div", rand(2, 3), 2, expected=torch.div)
case("safe_div", INTS, INTS, expected=lambda a, b: (a != 0).float())
case("pow", POSITIVE, rand(3), expected=torch.pow)
case("pow", rand(4), 3, expected=torch.pow)
case("pow", POSITIVE, -0.5, expected=torch.pow)
case("pow", INTS, 2, expected=torch.pow)
case("pow", 2, INTS.abs(), expected=torch.pow)
case("pow", 10000.0, rand(4), expected=torch.pow)
case("maximum", rand(2, 3), rand(3), expected=torch.maximum)
case("minimum", rand(2, 3), rand(3), expected=torch.minimum)
case("minimum", INTS, -INTS, expected=torch.minimum)
for _name in ("bitwise_and", "bitwise_or", "bitwise_xor"):
    case(_name, INTS, INTS.flip(0), expected=getattr(torch, _name))
    case(_name, INTS, 5, expected=getattr(torch, _name))
    case(_name, BOOLS, BOOLS.flip(0)[:, None], expected=getattr(torch, _name))
    case(_name, BOOLS, True, expected=getattr(torch, _name))
for _name in ("logical_and", "logical_or", "logical_xor"):
    case(_name, INTS, WIDE[:, None], expected=getattr(torch, _name))
case("where", BOOLS, rand(2, 3), 0.0, expected=torch.where)
case("where", BOOLS, -math.inf, rand(2, 3), expected=torch.where)
case("where", BOOLS[:, None], below(9, 3, 1), rand(4), expected=torch.where)
case("where", BOOLS, 1, 0, expected=torch.where)
case("where", BOOLS, 1.0, 0.0, expected=torch.where)
case("where", BOOLS, rand(3).half(), torch.tensor(-9.0), expected=torch.where)
for _name, _function in {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
                         "relu": F.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}.items():
    case("glu", rand(2, 3), rand(2, 3), expected=lambda g, u, of=_function: of(g) * u, activation=_name)

# --- creation, reductions and scans ------------------------------------------------------------------

case("full", expected=lambda: torch.full((2, 3), 1.5), shape=(2, 3), value=1.5, dtype="f32")
case("full", expected=lambda: torch.full((), 7), shape=(), value=7, dtype="i64")
case("full", expected=lambda: torch.full((2,), True), shape=(2,), value=True, dtype="bool")
for _start, _stop, _step in ((0, 5, 1), (2, 9, 3), (2, 8, 3), (5, 0, -1), (7, -2, -3), (3, 3, 1)):
    case("arange", expected=lambda a=_start, b=_stop, c=_step: torch.arange(a, b, c),
         start=_start, stop=_stop, step=_step)
case("arange", expected=lambda: torch.arange(4, dtype=torch.float32), stop=4, dtype="f32")

for _x in (rand(2, 3, 4), below(4, 2, 3, 4), below(2, 2, 3, 4).bool()):
    for _dims in (None, (1,), (-1, 0)):
        for _keepdim in (False, True):
            for _name in ("sum", "mean", "amax", "amin", "any", "all", "logsumexp", "var"):
                if _name in ("mean", "logsumexp", "var") and not _x.is_floating_point():
                    continue
                _function = torch.var if _name == "var" else getattr(torch, _name)
                _more = {"correction": 0} if _name == "var" else {}
                case(_name, _x, dims=_dims, keepdim=_keepdim, expected=lambda x, of=_function, d=_dims, k=_keepdim,
                     more=_more: of(x, dim=d or (0, 1, 2), keepdim=k, **more))
    case("prod", _x, dims=(1,), expected=lambda x: x.prod(1))
    case("prod", _x, expected=torch.prod)
    case("cumsum", _x, dim=1, expected=lambda x: x.cumsum(1))
    case("cumsum", _x, dim=-1, expected=lambda x: x.cumsum(-1))
case("var", rand(2, 3), dims=(1,), correction=1, expected=lambda x: x.var(1))
case("logsumexp", torch.tensor([[1., 2.], [-math.inf, -math.inf]]), dims=(1,),
     expected=lambda x: x.logsumexp(1))
case("sum", rand(2, 3).half(), expected=torch.sum)
case("sum", rand(2, 3).to(torch.int32), expected=torch.sum)
for _name in ("argmax", "argmin"):
    for _dim in (None, 0, -1):
        for _keepdim in (False, True):
            case(_name, rand(3, 4), dim=_dim, keepdim=_keepdim,
                 expected=partial(getattr(torch, _name), dim=_dim, keepdim=_keepdim))
case("argmax", torch.tensor([1., 3., 3., 0.]), dim=0, expected=lambda x: x.argmax(0))
case("softmax", rand(2, 3, 4), dim=1, expected=lambda x: x.softmax(1))
case("softmax", torch.tensor([[1., -math.inf], [-math.inf, -math.inf]]), dim=-1, expected=lambda x: x.softmax(-1))
case("log_softmax", 100 * rand(2, 3), dim=-1, expected=lambda x: x.log_softmax(-1))
case("topk", rand(3, 8), k=3, expected=lambda x: x.topk(3))
case("topk", rand(5, 2), k=2, dim=0, largest=False, expected=lambda x: x.topk(2, dim=0, largest=False))
for _x in (rand(3, 8), below(3, 3, 8), below(2, 3, 8).bool()):
    for _descending in (False, True):
        case("sort", _x, dim=0, descending=_descending, expected=lambda x, d=_descending: x.sort(
            dim=0, descending=d, stable=True))
case("sort", rand(2, 5), expected=torch.sort)
for _keepdim in (False, True):
    case("max_with_index", torch.tensor([[1., 3., 3.], [2., 0., 2.]]), dim=1, keepdim=_keepdim,
         expected=lambda x, k=_keepdim: x.max(1, keepdim=k))
    case("min_with_index", rand(3, 4, 2), dim=-2, keepdim=_keepdim, expected=lambda x, k=_keepdim: x.min(
        -2, keepdim=k))

# --- mixtures of experts -----------------------------------------------------------------------------

def by_expert(x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False
              ) -> Tensor:
    """Rows by their experts as one einsum over copied weights."""
    kind = torch.promote_types(x.dtype, weight.dtype)
    own = weight[ids].to(kind)
    own = own.transpose(-1, -2) if transposed else own
    x = x.expand(*x.shape[:-2], ids.shape[-1], x.shape[-1]).to(kind)
    y = torch.matmul(own, x.unsqueeze(-1)).squeeze(-1)
    return y if bias is None else y + bias[ids].to(kind)


def in_groups(x: Tensor, ends: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False,
              part: str = "") -> Tensor:
    """The same on sorted rows, their ids told by where experts end."""
    ids = torch.searchsorted(ends, torch.arange(x.shape[-2]), right=True)
    own = {"": lambda w: w, "abs": torch.abs, "positive": lambda w: w.clamp(min=0),
           "negative": lambda w: -w.clamp(max=0)}[part](weight)
    return by_expert(x, ids, own, bias, transposed=transposed)


def routed(scores: Tensor, choice: Tensor | None = None, *, k: int) -> tuple[Tensor, Tensor]:
    ids = (scores if choice is None else choice).argsort(dim=-1, descending=True, stable=True)[..., :k]
    return scores.gather(-1, ids), ids


def ordered(ids: Tensor, *, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order = torch.tensor(sorted(range(ids.numel()), key=lambda i: (int(ids.reshape(-1)[i]), i)))
    counts = torch.tensor([int((ids == e).sum()) for e in range(experts)])
    return order, order.argsort(), counts.cumsum(0)


for _k in (1, 2, 5):
    case("route_topk", rand(2, 3, 5), k=_k, expected=partial(routed, k=_k))
case("route_topk", rand(4, 5).half(), k=3, expected=partial(routed, k=3))
case("route_topk", rand(2, 3, 5), rand(2, 3, 5), k=2, expected=partial(routed, k=2))
TWICE_AN_EXPERT = torch.tensor([[2, 0], [2, 2], [0, 2]])  # of four: one row goes to one expert twice, two have no rows
for _ids in (TWICE_AN_EXPERT, below(4, 2, 3, 2), below(4, 5, 1)):
    case("expert_order", _ids, experts=4, expected=partial(ordered, experts=4))
    for _rows in {1, _ids.shape[-1]}:
        _lead, _weight = (*_ids.shape[:-1], _rows), rand(4, 6, 3)
        case("expert_linear", rand(*_lead, 3), _ids, _weight, expected=by_expert)
        case("expert_linear", rand(*_lead, 3), _ids, _weight, rand(4, 6), expected=by_expert)
        case("expert_linear", rand(2, *_lead, 6), _ids, _weight, rand(4, 3), transposed=True,
             expected=partial(by_expert, transposed=True))
        for _dtype in (torch.float16, torch.bfloat16):
            case("expert_linear", rand(*_lead, 3, dtype=_dtype), _ids, _weight.to(_dtype), rand(4, 6, dtype=_dtype),
                 expected=by_expert)
            case("expert_linear", rand(3, *_lead, 3), _ids, _weight.to(_dtype), expected=by_expert)  # relevance
for _ends in (torch.tensor([3, 3, 7, 7]), torch.tensor([0, 0, 0, 7]), torch.tensor([1, 4, 5, 7])):
    for _part in ("", "abs", "positive", "negative"):
        case("grouped_linear", rand(7, 3), _ends, rand(4, 6, 3), rand(4, 6), part=_part,
             expected=partial(in_groups, part=_part))
        case("grouped_linear", rand(2, 7, 6), _ends, rand(4, 6, 3), transposed=True, part=_part,
             expected=partial(in_groups, part=_part, transposed=True))
        for _dtype in (torch.float16, torch.bfloat16):
            case("grouped_linear", rand(7, 3, dtype=_dtype), _ends, rand(4, 6, 3, dtype=_dtype), part=_part,
                 expected=partial(in_groups, part=_part))
            case("grouped_linear", rand(2, 7, 3), _ends, rand(4, 6, 3, dtype=_dtype), part=_part,
                 expected=partial(in_groups, part=_part))
for _shape in ((2, 3, 2, 4), (5, 1, 4), (3, 4)):
    for _dtype in (torch.float32, torch.float16, torch.bfloat16):
        case("combine", rand(*_shape, dtype=_dtype), rand(*_shape[:-1], dtype=_dtype),
             expected=lambda u, w: torch.einsum("...kd,...k->...d", u, w))
case("combine", rand(2, 3, 4).half(), rand(2, 3), expected=lambda u, w: torch.einsum("...kd,...k->...d", u.to(w), w))

# --- recurrent layers --------------------------------------------------------------------------------

def torch_recurrent(kind: str, reverse: bool = False) -> Callable[..., Any]:
    """torch's own cells, row by row: the states after each step."""
    def run_layer(x: Tensor, *operands: Tensor) -> Any:
        count = 2 if kind == "lstm" else 1
        start, weights = operands[:count], operands[count:count + 4]
        lengths = operands[count + 4] if len(operands) > count + 4 else torch.full((x.shape[1],), len(x))
        found = [x.new_zeros(*x.shape[:2], start[0].shape[1]) for _ in range(count)]
        for b in range(x.shape[1]):
            states = tuple(state[b:b + 1] for state in start)
            for t in reversed(range(len(x))) if reverse else range(len(x)):
                if t < lengths[b]:
                    new = getattr(torch, f"{kind}_cell")(x[t, b:b + 1], states if count == 2 else states[0], *weights)
                    states = new if count == 2 else (new,)
                for steps, state in zip(found, states, strict=True):
                    steps[t, b] = state[0]
        return tuple(found) if count == 2 else found[0]

    return run_layer


def recurrence_by_autograd(r: Tensor, weight: Tensor, gates: Tensor, cells: Tensor | None = None,
                           keep: Tensor | None = None, read: Tensor | None = None, direct: Tensor | None = None,
                           into: Tensor | None = None, hold: Tensor | None = None, reverse: bool = False) -> Any:
    """The linear recursion forward in time, and torch's gradients of what it gives with respect to what was put in."""
    seeds, steps, rows, size = r.shape
    put_h, put_c = (torch.zeros_like(r).requires_grad_() for _ in range(2))
    h0, c0 = (r.new_zeros(seeds, rows, size).requires_grad_() for _ in range(2))
    h, c, total = h0, c0, r.new_zeros(())
    for t in reversed(range(steps)) if reverse else range(steps):
        u = ((h if into is None else h * into[t]) @ weight.T).split(size, -1)
        parts = zip(u, gates[t].split(size, -1), strict=False)
        c = put_c[:, t] + sum(one * gate for one, gate in parts) + (0 if keep is None else c * keep[t])
        h = put_h[:, t] + (c if read is None else c * read[t]) + (0 if direct is None else u[-1] * direct[t]) + (
            0 if hold is None else h * hold[t])
        total = total + (r[:, t] * h).sum() + (0 if cells is None else (cells[:, t] * c).sum())
    return torch.autograd.grad(total, (put_h, put_c, h0, c0), materialize_grads=True)


for _kind, _gates in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)):
    _attrs = {"activation": "relu"} if _kind == "rnn_relu" else {}
    _states = 2 if _kind == "lstm" else 1
    _layer = (rand(5, 3, 2), *(rand(3, 4) for _ in range(_states)), rand(_gates * 4, 2), rand(_gates * 4, 4))
    _biases, _lengths = (rand(_gates * 4), rand(_gates * 4)), torch.tensor([3, 5, 1])
    for _reverse in (False, True):
        _expected = torch_recurrent(_kind, _reverse)
        for _operands in (_layer, (*_layer, *_biases), (*_layer, *_biases, _lengths)):
            case(_kind.partition("_")[0], *_operands, expected=_expected, reverse=_reverse, **_attrs)
R, COEFFICIENT = rand(2, 5, 3, 4), (lambda: 0.5 * rand(5, 3, 4))
for _reverse in (False, True):
    _expected = partial(recurrence_by_autograd, reverse=_reverse)
    case("recurrence_adjoint", R, 0.5 * rand(4, 4), COEFFICIENT(), expected=_expected, reverse=_reverse)
    case("recurrence_adjoint", R, 0.3 * rand(16, 4), 0.5 * rand(5, 3, 12), rand(2, 5, 3, 4), *(
        COEFFICIENT() for _ in range(4)), rand(5, 3, 1), expected=_expected, reverse=_reverse)

# --- linear maps -------------------------------------------------------------------------------------

case("linear", rand(2, 3, 4), rand(5, 4), rand(5), expected=F.linear)
case("linear_rows", rand(2, 3, 4), rand(2, 3, 5, 4), rand(2, 3, 5), expected=lambda x, rows, bias: torch.einsum(
    "btd,btkd->btk", x, rows) + bias)
case("linear_rows", rand(3, 4), rand(3, 5, 4), expected=lambda x, rows: torch.einsum("td,tkd->tk", x, rows))
case("linear", rand(4), rand(5, 4), expected=F.linear)
case("matmul", rand(2, 1, 3, 4), rand(5, 4, 2), expected=torch.matmul)
case("matmul", below(5, 3, 4), below(5, 4, 2), expected=torch.matmul)
case("einsum", rand(2, 3, 4, 5), rand(2, 6, 4, 5), equation="bqhd,bkhd->bhqk",
     expected=lambda a, b: torch.einsum("bqhd,bkhd->bhqk", a, b))
case("einsum", rand(2, 3), rand(3, 4), rand(4), equation="ab,bc,c->a",
     expected=lambda a, b, c: torch.einsum("ab,bc,c->a", a, b, c))
case("einsum", rand(3, 4), equation="ab->ba", expected=torch.t)

CONVOLUTIONS: list[dict[str, Any]] = [
    {}, {"stride": (2,)}, {"padding": (1,)}, {"dilation": (2,)}, {"groups": 2},
    {"stride": (2,), "padding": (2,), "dilation": (2,), "groups": 2}, {"stride": (3,), "padding": (1,)},
]


def spread(attrs: dict[str, Any], rank: int) -> dict[str, Any]:
    """Attributes of one axis for `rank` axes; later axes differ from the first where that is harmless."""
    return {k: (v[0], *(max(v[0] - i, 0 if "padding" in k else 1) for i in range(1, rank)))
            if isinstance(v, tuple) else v for k, v in attrs.items()}


for _rank, _size in ((1, (11,)), (2, (11, 9)), (3, (7, 6, 8))):
    for _chosen in CONVOLUTIONS:
        _attrs = spread(_chosen, _rank)
        _groups = _attrs.get("groups", 1)
        _kernel = (3, 2, 3)[:_rank]
        case(f"conv{_rank}d", rand(2, 4, *_size), rand(6, 4 // _groups, *_kernel), rand(6), **_attrs,
             expected=partial(getattr(F, f"conv{_rank}d"), **_attrs))
        if "stride" in _attrs:
            _attrs = {**_attrs, "output_padding": spread({"output_padding": (1,)}, _rank)["output_padding"]}
        case(f"conv_transpose{_rank}d", rand(2, 4, *_size), rand(4, 6 // _groups, *_kernel), rand(6), **_attrs,
             expected=partial(getattr(F, f"conv_transpose{_rank}d"), **_attrs))
case("conv2d", rand(2, 6, 5, 5), rand(6, 1, 3, 3), groups=6, padding=(1, 1),
     expected=lambda x, w: F.conv2d(x, w, groups=6, padding=1))
case("conv2d", rand(1, 3, 8, 8), rand(5, 3, 4, 4), stride=(4, 4), expected=lambda x, w: F.conv2d(x, w, stride=4))
case("conv_transpose2d", rand(1, 3, 4, 4), rand(3, 2, 1, 1), padding=(1, 1),
     expected=lambda x, w: F.conv_transpose2d(x, w, padding=1))
case("embedding", below(7, 2, 3), rand(7, 4), expected=F.embedding)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding as transformers models write it."""
    if interleaved:
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


for _interleaved in (False, True):
    case("rotary", rand(2, 3, 5, 4), rand(5, 4), rand(5, 4), interleaved=_interleaved,
         expected=lambda x, c, s, i=_interleaved: rotary(x, c, s, i))

# --- pooling -----------------------------------------------------------------------------------------

POOLS: list[dict[str, Any]] = [
    {"kernel": (2,), "stride": (2,), "padding": (0,)},
    {"kernel": (3,), "stride": (2,), "padding": (1,)},
    {"kernel": (3,), "stride": (2,), "padding": (1,), "ceil_mode": True},
    {"kernel": (3,), "stride": (1,), "padding": (0,)},
    {"kernel": (2,), "stride": (3,), "padding": (0,), "ceil_mode": True},
    {"kernel": (2,), "stride": (3,), "padding": (1,), "ceil_mode": True},
    {"kernel": (4,), "stride": (3,), "padding": (2,), "ceil_mode": True},
]
AVERAGES: list[dict[str, Any]] = [{}, {"count_include_pad": False}, {"divisor": 3}]
SHAPES = ((2, 3, 10), (2, 3, 10, 7), (1, 2, 6, 7, 5))


def torch_pool(attrs: dict[str, Any]) -> dict[str, Any]:
    """Attributes of a pool under torch's names."""
    names = {"kernel": "kernel_size", "divisor": "divisor_override"}
    return {names.get(k, k): v for k, v in attrs.items()}


for _shape in SHAPES:
    _rank = len(_shape) - 2
    for _chosen in POOLS:
        _attrs = spread(_chosen, _rank)
        _attrs["padding"] = tuple(min(p, k // 2) for p, k in zip(_attrs["padding"], _attrs["kernel"], strict=True))
        for _dilation in ((1,) * _rank, (2,) * _rank):
            _all = {**_attrs, "dilation": _dilation}
            case("max_pool", rand(*_shape), **_all, expected=partial(
                getattr(F, f"max_pool{_rank}d"), **torch_pool(_all)))
        for _more in AVERAGES:
            if _rank > 1 or "divisor" not in _more:
                case("avg_pool", rand(*_shape), **_attrs, **_more,
                     expected=partial(getattr(F, f"avg_pool{_rank}d"), **torch_pool({**_attrs, **_more})))
    for _pooled in ((1, 1, 1), (4, 3, 2), (7, 2, 3)):
        _size = _pooled[:_rank]
        for _kind in ("avg", "max"):
            case(f"adaptive_{_kind}_pool", rand(*_shape), size=_size, expected=partial(
                getattr(F, f"adaptive_{_kind}_pool{_rank}d"), output_size=_size))
    for _size in ((9, 4, 3), (1, 8, 6), (5, 7, 4), _shape[2:]):
        _smooth = {1: "linear", 2: "bilinear", 3: "trilinear"}[_rank]
        for _mode, _torch in (("nearest", "nearest"), ("nearest_exact", "nearest-exact"), ("linear", _smooth)):
            case("interpolate", rand(*_shape), size=_size[:_rank], mode=_mode,
                 expected=partial(F.interpolate, size=_size[:_rank], mode=_torch))
        case("interpolate", rand(*_shape), size=_size[:_rank], mode="linear", align_corners=True,
             expected=partial(F.interpolate, size=_size[:_rank], mode=_smooth, align_corners=True))
for _size, _corners, _wide in itertools.product(((9, 4), (1, 8), (5, 7)), (False, True), (False, True)):
    for _mode, _torch in (("linear", "bilinear"), ("cubic", "bicubic")):
        case("interpolate", rand(2, 3, 7, 6), size=_size, mode=_mode, align_corners=_corners, antialias=_wide,
             expected=partial(F.interpolate, size=_size, mode=_torch, align_corners=_corners, antialias=_wide))
for _scales in ((2.0, 0.5), (1.3, 1.7), (1.1, 1.05)):
    _size = tuple(math.floor(n * scale) for n, scale in zip((7, 6), _scales, strict=True))
    for _mode, _torch in (("nearest", "nearest"), ("nearest_exact", "nearest-exact"), ("linear", "bilinear"),
                          ("cubic", "bicubic")):
        case("interpolate", rand(2, 3, 7, 6), size=_size, mode=_mode, scales=_scales,
             expected=partial(F.interpolate, scale_factor=_scales, mode=_torch))
case("max_pool", -rand(1, 2, 5).abs(), kernel=(3,), stride=(2,), padding=(1,), dilation=(1,),
     expected=lambda x: F.max_pool1d(x, 3, 2, 1))

# --- norms -------------------------------------------------------------------------------------------

IMAGE, VARIANCE = rand(2, 6, 3, 4), rand(6).abs()
case("batch_norm", IMAGE, rand(6), VARIANCE, rand(6), rand(6), eps=1e-3,
     expected=lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b, eps=1e-3))
case("batch_norm", rand(4, 6), rand(6), VARIANCE, expected=F.batch_norm)
case("batch_norm", IMAGE, rand(6), VARIANCE, None, rand(6),
     expected=lambda x, m, v, b: F.batch_norm(x, m, v, None, b))
case("layer_norm", IMAGE, rand(4), rand(4), expected=lambda x, w, b: F.layer_norm(x, (4,), w, b))
case("layer_norm", IMAGE, rand(3, 4), rand(3, 4), dims=2, eps=0.1,
     expected=lambda x, w, b: F.layer_norm(x, (3, 4), w, b, 0.1))
case("layer_norm", IMAGE, dims=3, expected=lambda x: F.layer_norm(x, (6, 3, 4)))
case("rms_norm", IMAGE, rand(4), expected=lambda x, w: F.rms_norm(x, (4,), w, 1e-6))
case("rms_norm", IMAGE, dims=2, eps=0.1, expected=lambda x: F.rms_norm(x, (3, 4), eps=0.1))
case("group_norm", IMAGE, rand(6), rand(6), groups=3, expected=lambda x, w, b: F.group_norm(x, 3, w, b))
case("group_norm", rand(2, 6), groups=2, eps=0.1, expected=lambda x: F.group_norm(x, 2, eps=0.1))
case("group_norm", IMAGE, rand(6), rand(6), groups=6,
     expected=lambda x, w, b: F.instance_norm(x, weight=w, bias=b))
case("row_statistics", IMAGE, expected=lambda x: (
    x.mean(-1, True), (x.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()))
case("row_statistics", IMAGE, dims=2, eps=0.1, centred=False, expected=lambda x: (
    torch.zeros(2, 6, 1, 1, dtype=x.dtype), (x.square().mean((-2, -1), True) + 0.1).rsqrt()))

# --- attention ---------------------------------------------------------------------------------------


def visible(queries: int, keys: int, causal: bool, window: int | None) -> Tensor:
    """What each query sees, in loops."""
    seen = torch.ones(queries, keys, dtype=torch.bool)
    for i in range(queries):
        for j in range(keys):
            position = i + keys - queries
            seen[i, j] = (not causal or j <= position) and (window is None or position - j < window)
    return seen


def attend(q: Tensor, k: Tensor, mask: Tensor | None, *, scale: float, causal: bool = False,
           window: int | None = None, softcap: float | None = None) -> Tensor:
    """Attention weights as models write them out."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    score = q @ k.mT * scale
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    score = score.masked_fill(~visible(*score.shape[-2:], causal, window), -math.inf)
    if mask is not None:
        score = score.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else score + mask
    return score.softmax(-1).nan_to_num(0.0)


KEEP = torch.ones(2, 1, 1, 7, dtype=torch.bool)
KEEP[0, ..., 3:] = False
NOTHING = torch.ones(2, 1, 5, 7, dtype=torch.bool)
NOTHING[1, 0, 2] = False
ATTENTION: list[tuple[Tensor | None, dict[str, Any]]] = [
    (None, {}), (None, {"causal": True}), (None, {"causal": True, "window": 2}), (None, {"window": 3}),
    (None, {"softcap": 0.5}), (None, {"softcap": 0.5, "causal": True}), (KEEP, {}), (KEEP, {"causal": True}),
    (NOTHING, {}), (rand(2, 4, 5, 7), {}), (rand(5, 7), {"softcap": 2.0}),
    (torch.where(NOTHING, 0.0, -math.inf), {}), (torch.where(KEEP, 0.0, torch.finfo(torch.float32).min), {}),
]
for _mask, _attrs in ATTENTION:
    _operands = (rand(2, 4, 5, 6), rand(2, 2, 7, 6), rand(2, 2, 7, 3))
    case("attention", *_operands, _mask, scale=0.4, **_attrs, expected=lambda q, k, v, mask=None, more=_attrs: attend(
        q, k, mask, scale=0.4, **more) @ v.repeat_interleave(2, 1))
    case("attention_weights", *_operands[:2], _mask, scale=0.4, **_attrs,
         expected=lambda q, k, mask=None, more=_attrs: attend(q, k, mask, scale=0.4, **more))
case("attention", rand(2, 4, 5, 6), rand(2, 4, 5, 6), rand(2, 4, 5, 6), causal=True, scale=1 / math.sqrt(6),
     expected=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
case("attention", rand(2, 4, 5, 6), rand(2, 2, 7, 6), rand(2, 2, 7, 3), KEEP, scale=1 / math.sqrt(6),
     expected=lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, enable_gqa=True))
# More queries than keys: the first ones see nothing.
case("attention", rand(1, 2, 5, 4), rand(1, 2, 3, 4), rand(1, 2, 3, 4), scale=0.5, causal=True,
     expected=lambda q, k, v: attend(q, k, None, scale=0.5, causal=True) @ v)

# --- moves -------------------------------------------------------------------------------------------

BLOCK = rand(2, 3, 4)
case("reshape", BLOCK, shape=(6, 4), expected=lambda x: x.reshape(6, 4))
case("reshape", rand(1, 1), shape=(), expected=lambda x: x.reshape(()))
case("permute", BLOCK, dims=(2, 0, 1), expected=lambda x: x.permute(2, 0, 1))
case("permute", BLOCK, dims=(0, -1, -2), expected=lambda x: x.mT)
case("expand", rand(3, 1), shape=(2, 3, 4), expected=lambda x: x.expand(2, 3, 4))
for _start, _stop, _step in ((0, 7, 1), (1, 6, 2), (1, 7, 3), (2, 2, 1)):
    case("slice", rand(2, 7), dim=-1, start=_start, stop=_stop, step=_step,
         expected=lambda x, a=_start, b=_stop, c=_step: x[:, a:b:c])
case("slice_adjoint", rand(2, 3), dim=1, size=6, start=1, stop=6, step=2, expected=lambda r: torch.slice_scatter(
    r.new_zeros(2, 6), r, 1, 1, 6, 2))
case("select", BLOCK, dim=1, index=-1, expected=lambda x: x.select(1, -1))
case("select", BLOCK, dim=-1, index=2, expected=lambda x: x[..., 2])
case("select_adjoint", rand(2, 3), dim=1, index=-2, size=4, expected=lambda r: torch.select_scatter(
    r.new_zeros(2, 4, 3), r, 1, 2))
case("select_adjoint", rand(2, 3), dim=-1, index=0, size=4, expected=lambda r: torch.select_scatter(
    r.new_zeros(2, 3, 4), r, 2, 0))
case("cat", BLOCK, rand(2, 1, 4), BLOCK, dim=1, expected=lambda *xs: torch.cat(xs, 1))
case("cat", below(9, 3), rand(2), dim=-1, expected=lambda *xs: torch.cat(xs, -1))
case("pad", BLOCK, pads=((0, 0), (1, 2), (3, 0)), value=1.5, expected=lambda x: F.pad(x, (3, 0, 1, 2), value=1.5))
case("pad", BLOCK, pads=((0, 0), (-1, 2), (1, -2)), expected=lambda x: F.pad(x, (1, -2, -1, 2)))
case("pad", BLOCK, pads=((0, 0), (0, -3), (0, 0)), expected=lambda x: F.pad(x, (0, 0, 0, -3)))
case("pad", below(9, 2, 3), pads=((1, 0), (0, 1)), value=7, expected=lambda x: F.pad(x, (0, 1, 1, 0), value=7))
case("flip", BLOCK, dims=(0, -1), expected=lambda x: x.flip(0, -1))
case("roll", BLOCK, shifts=(1, -2), dims=(0, 2), expected=lambda x: x.roll((1, -2), (0, 2)))
for _diagonal in (-1, 0, 2):
    case("triangle", BLOCK, diagonal=_diagonal, upper=True, expected=lambda x, d=_diagonal: x.triu(d))
    case("triangle", BLOCK, diagonal=_diagonal, upper=False, expected=lambda x, d=_diagonal: x.tril(d))
case("triangle", BLOCK > 0, upper=False, expected=torch.tril)
# Indices may be shorter than x along the other axes.
case("gather", BLOCK, below(3, 2, 5, 2), dim=1, expected=lambda x, i: x.gather(1, i))
case("gather", BLOCK, below(4, 2, 3, 1), dim=-1, expected=lambda x, i: x.gather(-1, i))
case("scatter_add", BLOCK, below(3, 2, 5, 2), rand(2, 6, 4), dim=1,
     expected=lambda b, i, s: b.scatter_add(1, i, s))
case("scatter", BLOCK, torch.tensor([[[2, 0, 3]]]), rand(1, 1, 3), dim=-1,
     expected=lambda b, i, s: b.scatter(-1, i, s))
case("scatter", BLOCK, torch.tensor([[[2, 0, 3]]]), 5.0, dim=2, expected=lambda b, i, s: b.scatter(2, i, s))
case("take", BLOCK, below(3, 5, 6), dim=1, expected=lambda x, i: x[:, i])
case("take", BLOCK, torch.tensor(2), dim=1, expected=lambda x, i: x[:, i])
case("take", BLOCK, torch.tensor([-1, 0]), dim=-1, expected=lambda x, i: x[..., i])
case("take_adjoint", rand(2, 5, 6, 4), below(3, 5, 6), dim=1, size=3,
     expected=lambda r, i: r.new_zeros(2, 3, 4).index_put((torch.arange(2)[:, None, None], i), r, accumulate=True))
case("index", BLOCK, below(2, 5, 1), below(3, 6), dims=(0, 1), expected=lambda x, i, j: x[i, j])
case("index", BLOCK, below(3, 5, 1), below(4, 6), dims=(1, 2), expected=lambda x, i, j: x[:, i, j])
case("index", BLOCK, below(4, 5), dims=(2,), expected=lambda x, i: x[:, :, i])
case("index_adjoint", rand(2, 5, 6), below(3, 5, 1), below(4, 6), dims=(1, 2), sizes=(3, 4),
     expected=lambda r, i, j: torch.stack([row.new_zeros(3, 4).index_put((i, j), row, True) for row in r]))
case("index_put", BLOCK, rand(2, 4), torch.tensor([0, 1]), torch.tensor([2, 0]), dims=(0, 1),
     expected=lambda b, s, i, j: b.index_put((i, j), s))
case("index_put", BLOCK, rand(2, 5), below(3, 5), below(4, 5), dims=(1, 2), accumulate=True,
     expected=lambda b, s, i, j: torch.stack([r.index_put((i, j), s[n], True) for n, r in enumerate(b)]))
case("index_put", BLOCK, 0.0, torch.tensor([2]), dims=(1,), expected=lambda b, s, i: b.index_fill(1, i, s))
case("max_pool_adjoint", torch.tensor([[[[6., 5.]]]]), torch.tensor([[[1., 1., 1., 0., 3., 2.]]]),
     torch.tensor([[[1., 3.]]]), kernel=(3,), stride=(3,), padding=(0,), dilation=(1,),
     expected=lambda r, x, y: torch.tensor([[[[2., 2., 2., 0., 5., 0.]]]], dtype=r.dtype))
case("adaptive_max_pool_adjoint", torch.tensor([[[[6., 5.]]]]), torch.tensor([[[1., 1., 2., 2., 0.]]]),
     torch.tensor([[[2., 2.]]]),
     expected=lambda r, x, y: torch.tensor([[[[0., 0., 8.5, 2.5, 0.]]]], dtype=r.dtype))


@pytest.mark.parametrize("case", CASES, ids=[f"{c.name}-{i}" for i, c in enumerate(CASES)])
def test_op(case: Case) -> None:
    widened = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in case.operands)
    given = [x for x in case.operands if x is not None]
    stated, numbers = (sequence(case.expected(*(x for x in xs if x is not None)))
                       for xs in (given, [x for x in widened if x is not None]))
    results, found = run(case.name, *case.operands, **case.attrs)
    assert [(r.type.dtype, r.type.shape) for r in results] == [(NAMES[y.dtype], tuple(y.shape)) for y in stated]
    for y, expected in zip(found, numbers, strict=True):
        tolerance = 1e-6 if expected.dtype == torch.float32 else 1e-10
        np.testing.assert_allclose(y, numpy(expected), rtol=tolerance, atol=tolerance)


def sequence(results: Any) -> tuple[Tensor, ...]:
    """One tensor or several, as a tuple."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


# --- adjoints ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Adjoint:
    """A linear map of x, and the op that carries r [S, *y] back: `back(r, x, y)` gives its operands."""

    forward: str
    x: Tensor
    others: tuple[Any, ...]
    attrs: dict[str, Any]
    name: str
    back: Callable[[Tensor, Tensor, Tensor], tuple[Any, ...]]
    back_attrs: dict[str, Any]


ADJOINTS: list[Adjoint] = []


def adjoint(forward: str, x: Tensor, *others: Any, by: str = "", of: dict[str, Any],
            back: Callable[[Tensor, Tensor, Tensor], tuple[Any, ...]] = lambda r, x, y: (r,), **attrs: Any) -> None:
    """Add an adjoint: `of` are the forward op's attributes, the rest is the adjoint op's."""
    ADJOINTS.append(Adjoint(forward, x.double(), others, of, by or f"{forward}_adjoint", back, attrs))


for _shape in SHAPES:
    _rank = len(_shape) - 2
    for _chosen in POOLS:
        _attrs = spread(_chosen, _rank)
        _attrs["padding"] = tuple(min(p, k // 2) for p, k in zip(_attrs["padding"], _attrs["kernel"], strict=True))
        for _dilation in ((1,) * _rank, (2,) * _rank):
            _all = {**_attrs, "dilation": _dilation}
            adjoint("max_pool", rand(*_shape), of=_all, **_all, back=lambda r, x, y: (r, x, y))
        for _more in AVERAGES:
            _all = {**_attrs, **_more}
            adjoint("avg_pool", rand(*_shape), of=_all, size=_shape[2:], **_all)
    for _pooled in ((1, 1, 1), (4, 3, 2), (7, 2, 3)):
        adjoint("adaptive_avg_pool", rand(*_shape), of={"size": _pooled[:_rank]}, size=_shape[2:])
        adjoint("adaptive_max_pool", rand(*_shape), of={"size": _pooled[:_rank]}, back=lambda r, x, y: (r, x, y))
for _all in ({"mode": "nearest"}, {"mode": "nearest_exact"}, {"mode": "linear"}, {"mode": "cubic"},
             {"mode": "linear", "align_corners": True}, {"mode": "cubic", "antialias": True},
             {"mode": "cubic", "align_corners": True, "absolute": True}):
    adjoint("interpolate", rand(2, 3, 7, 5), of={"size": (4, 9), **_all}, size=(7, 5), **_all)
for _stop, _step in ((6, 1), (5, 2), (7, 3)):
    adjoint("slice", rand(2, 7), of={"dim": 1, "start": 1, "stop": _stop, "step": _step},
            dim=2, start=1, stop=_stop, step=_step, size=7)
adjoint("select", BLOCK, of={"dim": 1, "index": -1}, dim=2, index=-1, size=3)
adjoint("take", BLOCK, TWICE := below(3, 5, 2), of={"dim": 1}, dim=2, size=3, back=lambda r, x, y: (r, TWICE))
adjoint("index", BLOCK, ROWS := below(3, 5, 1), COLUMNS := below(4, 3), of={"dims": (1, 2)},
        dims=(2, 3), sizes=(3, 4), back=lambda r, x, y: (r, ROWS, COLUMNS))
adjoint("gather", BLOCK, PICKED := below(3, 2, 5, 4), of={"dim": 1}, by="scatter_add", dim=2,
        back=lambda r, x, y: (r.new_zeros(3, *x.shape), PICKED.expand(3, -1, -1, -1), r))
for _transposed in (False, True):
    _sizes, _matrices = (6, 3) if _transposed else (3, 6), rand(4, 6, 3)
    adjoint("expert_linear", rand(3, 2, _sizes[0]), TWICE_AN_EXPERT, _matrices.double(), of={"transposed": _transposed},
            by="expert_linear", transposed=not _transposed,
            back=lambda r, x, y, w=_matrices: (r, TWICE_AN_EXPERT, w.double()))
    adjoint("grouped_linear", rand(6, _sizes[0]), ENDS := torch.tensor([2, 2, 6, 6]), _matrices.double(),
            of={"transposed": _transposed, "part": "negative"}, by="grouped_linear", transposed=not _transposed,
            part="negative", back=lambda r, x, y, w=_matrices: (r, ENDS, w.double()))
adjoint("pad", BLOCK, of={"pads": ((0, 0), (1, 2), (-1, 2))}, by="pad",
        pads=((0, 0), (0, 0), (-1, -2), (1, -2)))


@pytest.mark.parametrize("case", ADJOINTS, ids=[f"{a.name}-{i}" for i, a in enumerate(ADJOINTS)])
def test_adjoint(case: Adjoint) -> None:
    _, (y,) = run(case.forward, case.x, *case.others, **case.attrs)
    r = rand(3, *y.shape, dtype=torch.float64)
    results, (carried,) = run(case.name, *case.back(r, case.x, torch.from_numpy(y)), **case.back_attrs)
    assert results[0].type == Type("f64", (3, *case.x.shape))
    forward, backward = (y * r.numpy()).reshape(3, -1), (case.x.numpy() * carried).reshape(3, -1)
    np.testing.assert_allclose(forward.sum(1), backward.sum(1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attrs", [spread(attrs, 2) for attrs in CONVOLUTIONS])
def test_transposed_convolution_is_the_adjoint_of_convolution(attrs: dict[str, Any]) -> None:
    x, weight = rand(2, 4, 11, 9, dtype=torch.float64), rand(6, 4 // attrs.get("groups", 1), 3, 2).double()
    _, (y,) = run("conv2d", x, weight, **attrs)
    r = rand(*y.shape, dtype=torch.float64)
    _, (short,) = run("conv_transpose2d", r, weight, **attrs)
    rest = tuple(before - after for before, after in zip(x.shape[2:], short.shape[2:], strict=True))
    _, (carried,) = run("conv_transpose2d", r, weight, output_padding=rest, **attrs)
    assert carried.shape == x.shape
    assert np.sum(y * r.numpy()) == pytest.approx(np.sum(x.numpy() * carried))


@pytest.mark.parametrize("name", ["max_pool", "adaptive_max_pool"])
def test_ties_share_equally_and_padding_takes_nothing(name: str) -> None:
    windows = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "ceil_mode": True}
    attrs: dict[str, Any] = windows if name == "max_pool" else {"size": (3, 2)}
    x = below(3, 2, 3, 7, 6).double()
    _, (y,) = run(name, x, **attrs)
    r = rand(3, *y.shape, dtype=torch.float64)
    _, (carried,) = run(f"{name}_adjoint", r, x, torch.from_numpy(y), **(windows if name == "max_pool" else {}))
    np.testing.assert_allclose(carried.sum((-2, -1)), r.numpy().sum((-2, -1)))
    _, (flat,) = run(f"{name}_adjoint", r, x * 0, torch.from_numpy(y) * 0, **(
        windows if name == "max_pool" else {}))
    assert np.all(flat[:, :, :, 3, 2] != 0)  # where all are equal, all win


@pytest.mark.parametrize("chosen", POOLS)
def test_pooled_size_of_a_symbolic_axis(chosen: dict[str, Any]) -> None:
    attrs = {**chosen, "dilation": (1,)}
    (result,) = infer("max_pool", (Value("x", Type("f32", (1, 1, symbol("T")))),), attrs)
    for size in range(3, 20):
        expected = F.max_pool1d(torch.zeros(1, 1, size), **torch_pool(attrs)).shape[-1]
        assert evaluate(result.shape[-1], {"T": size}) == expected


def test_every_op_has_a_reference_and_a_case() -> None:
    assert set(REFERENCE) == set(OPS)
    assert {c.name for c in CASES} | {a.name for a in ADJOINTS} == set(OPS)
