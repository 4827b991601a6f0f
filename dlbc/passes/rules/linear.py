"""Linear maps: y = W x + b with everything but x constant.

`linear`, convolutions, products with a constant, averages, sums, rotary embedding, batch norm in eval: a
`LinearMap` gives each its map, its adjoint and its map with absolute weights, and every rule below is
written once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dlbc.ir.core import Attr, Op, Operand, Type, Value
from dlbc.ir.dims import Dim, product
from dlbc.ir.ops import STABILISER, attr, axes
from dlbc.passes.rules import Contributions, Expansion, only, rule
from dlbc.passes.signs import known

CONVS = tuple(f"conv{n}d" for n in (1, 2, 3))
TRANSPOSED = tuple(f"conv_transpose{n}d" for n in (1, 2, 3))
EXPERTS = ("expert_linear", "grouped_linear")
LINEAR = ("linear", "linear_rows", *EXPERTS, *CONVS, *TRANSPOSED, "matmul", "einsum", "avg_pool", "adaptive_avg_pool",
          "interpolate", "mean", "sum", "cumsum", "rotary", "batch_norm")


@dataclass(frozen=True)
class LinearMap:
    """The map of `op` in its operand number `position`; `weights` are its other factors, float32."""

    at: Expansion
    op: Op
    position: int
    weights: tuple[Operand, ...]
    bias: Operand = None
    signed: bool = True

    @property
    def x(self) -> Operand:
        """The operand that carries relevance, float32."""
        return self.at.read(self.op.operands[self.position])

    @property
    def nonnegative(self) -> bool:
        """True where x is known to be >= 0."""
        return known(self.op.operands[self.position], self.at.facts.nonnegative)

    @property
    def size(self) -> Operand:
        """|x|, float32."""
        return self.x if self.nonnegative else self.at.abs(self.x)

    def mapped(self, change: Callable[[Operand], Value]) -> LinearMap:
        """The same map with every weight and the bias changed."""
        return replace(self, weights=tuple(map(change, self.weights)),
                       bias=None if self.bias is None else change(self.bias))

    @property
    def absolute(self) -> LinearMap:
        """The same map with absolute weights and bias."""
        return replace(self.mapped(self.at.abs), signed=False)

    @property
    def positive(self) -> LinearMap | None:
        """The same map with the positive weights and bias only; None where weights are no plain factors."""
        plain = len(self.weights) <= 1 and self.op.name not in ("rotary", "interpolate")
        return self.mapped(self.at.relu) if plain else None

    @property
    def span(self) -> tuple[Dim, ...]:
        """The shape of x with 1 for the axes along which the map does the same everywhere (batch, positions)."""
        shape, rank, op = self.type.shape, self.type.rank, self.op
        if op.name in (*CONVS, *TRANSPOSED):
            kept = set(range(1, rank))
        elif op.name in ("linear", "rotary"):
            kept = {rank - 1}
        elif op.name == "matmul":
            kept = {rank - 1 if self.position == 0 else rank - 2}
        elif op.name == "batch_norm":
            kept = {1}
        elif op.name in ("mean", "sum", "cumsum"):
            kept = set(axes(rank, attr(op, "dim" if op.name == "cumsum" else "dims")))
        elif op.name in ("avg_pool", "adaptive_avg_pool"):
            kept = set(range(rank - len(_numbers(op, "kernel" if op.name == "avg_pool" else "size")), rank))
        else:
            kept = set(range(rank))
        return tuple(dim if i in kept else 1 for i, dim in enumerate(shape))

    def __call__(self, x: Operand) -> Value:
        """W x + b, of the shape of y."""
        return _FORWARD[self.op.name](self, x)

    def adjoint(self, r: Value) -> Value:
        """The transpose of W applied to r [S, *y]: [S, *x]."""
        return _ADJOINT[self.op.name](self, r)

    @property
    def type(self) -> Type:
        """Type of the carrying operand."""
        operand = self.op.operands[self.position]
        assert isinstance(operand, Value)
        return operand.type


def linear_map(at: Expansion, op: Op) -> LinearMap:
    """The linear map that an op of `LINEAR` is in its one carrying operand."""
    position = next(i for i, operand in enumerate(op.operands) if at.carries(operand))
    if op.name in ("linear", "linear_rows", *CONVS, *TRANSPOSED):
        bias = op.operands[2] if len(op.operands) > 2 else None
        return LinearMap(at, op, 0, (at.read(op.operands[1]),), at.read(bias))
    if op.name in EXPERTS:
        _, _, weight, bias = (*op.operands, None)[:4]
        return LinearMap(at, op, 0, (at.read(weight),), at.read(bias))
    if op.name == "rotary":
        return LinearMap(at, op, 0, (at.read(op.operands[1]), at.read(op.operands[2])))
    if op.name == "batch_norm":
        return _batch_norm(at, op)
    return LinearMap(at, op, position,
                     tuple(at.read(o) for i, o in enumerate(op.operands) if i != position))


def channel_axis(op: Op, position: int) -> int:
    """The axis of channels of an operand: 1 for images, else the last."""
    operand = op.operands[position]
    assert isinstance(operand, Value)
    images = (*CONVS, *TRANSPOSED, "batch_norm", "avg_pool", "adaptive_avg_pool", "interpolate")
    return 1 if op.name in images else operand.type.rank - 1


def _batch_norm(at: Expansion, op: Op) -> LinearMap:
    mean, variance, weight, bias = (*map(at.read, op.operands[1:]), None, None)[:4]
    scale = at.rsqrt(at.add(variance, attr(op, "eps")))
    scale = scale if weight is None else at.mul(scale, weight)
    shift = at.neg(at.mul(mean, scale))
    shift = shift if bias is None else at.add(shift, bias)
    shape = (op.result.type.shape[1], *(1,) * (op.result.type.rank - 2))
    return LinearMap(at, op, 0, (at.reshape(scale, shape=shape),), at.reshape(shift, shape=shape))


@rule(LINEAR, "epsilon", form="M")
def epsilon(at: Expansion, op: Op, m: Value, *, eps: float = STABILISER) -> Contributions:
    """R_x = x * W^T (R_y / e(y)), y with bias; M_x = W^T (M_y y / e(y)).  Bach et al. 2015."""
    linear = linear_map(at, op)
    kept = at.stabilised(m, at.read(op.result), eps)
    if linear.bias is not None:
        at.absorb("bias", at.mul(_bias_shaped(linear), kept))
    return only(op, linear.position, linear.adjoint(kept))


@rule(LINEAR, "gradient", form="M", conserves=False)
def gradient(at: Expansion, op: Op, m: Value) -> Contributions:
    """M_x = W^T M_y: the true adjoint.  Input x gradient, Shrikumar et al. 2016."""
    linear = linear_map(at, op)
    if linear.bias is not None:
        at.absorb("bias", at.mul(_bias_shaped(linear), m))
    return only(op, linear.position, linear.adjoint(m))


def _bias_shaped(linear: LinearMap) -> Operand:
    """The bias aligned with y: per channel for convolutions, that of each row's expert for experts."""
    if linear.op.name == "expert_linear":
        return linear.at.index(linear.bias, linear.op.operands[1], dims=(0,))
    if linear.op.name == "grouped_linear":
        return linear(linear.at.zeros(replace(linear.type, dtype="f32")))
    if linear.op.name in (*CONVS, *TRANSPOSED):
        rank = linear.op.result.type.rank
        return linear.at.reshape(linear.bias, shape=(linear.op.result.type.shape[1], *(1,) * (rank - 2)))
    return linear.bias


# --- the maps ----------------------------------------------------------------------------------------

def _attrs(op: Op) -> dict[str, Attr]:
    return dict(op.attrs)


def _apply(linear: LinearMap, x: Operand) -> Value:
    operands = list(linear.weights)
    operands.insert(linear.position, x)
    if linear.bias is not None:
        operands.append(linear.bias)
    found: Value = getattr(linear.at, linear.op.name)(*operands, **_attrs(linear.op))
    return found


def _apply_experts(linear: LinearMap, x: Operand) -> Value:
    found: Value = getattr(linear.at, linear.op.name)(x, linear.op.operands[1], *linear.weights, linear.bias,
                                                      **_attrs(linear.op))
    return found


def _experts_adjoint(linear: LinearMap, r: Value) -> Value:
    """Each row by the transposed matrix of its expert, added up where all experts were given the same x."""
    op = linear.op
    found = getattr(linear.at, op.name)(r, op.operands[1], *linear.weights,
                                        **{**_attrs(op), "transposed": not attr(op, "transposed")})
    return linear.at.unbroadcast(found, linear.type)


def _apply_rotary(linear: LinearMap, x: Operand) -> Value:
    at, (cos, sin) = linear.at, linear.weights
    return at.add(at.mul(x, cos), at.mul(_turned(linear, x, 1), sin))


def _apply_batch_norm(linear: LinearMap, x: Operand) -> Value:
    y = linear.at.mul(x, linear.weights[0])
    return y if linear.bias is None else linear.at.add(y, linear.bias)


def _linear_adjoint(linear: LinearMap, r: Value) -> Value:
    return linear.at.matmul(r, linear.weights[0])


def _linear_rows_adjoint(linear: LinearMap, r: Value) -> Value:
    at = linear.at
    *front, count = r.type.shape
    found = at.matmul(at.reshape(r, shape=(*front, 1, count)), linear.weights[0])
    return at.reshape(found, shape=(*front, found.type.shape[-1]))


def _matmul_adjoint(linear: LinearMap, r: Value) -> Value:
    at, (other,) = linear.at, linear.weights
    assert isinstance(other, Value) or hasattr(other, "type")
    rank = other.type.rank  # type: ignore[union-attr]
    flipped = at.permute(other, dims=(*range(rank - 2), rank - 1, rank - 2))
    found = at.matmul(r, flipped) if linear.position == 0 else at.matmul(flipped, r)
    return at.unbroadcast(found, linear.type)


def _einsum_adjoint(linear: LinearMap, r: Value) -> Value:
    inputs, output = str(linear.op.attrs["equation"]).split("->")
    terms = inputs.split(",")
    own = terms.pop(linear.position)
    seed = next(letter for letter in "SZYXWVU" if letter not in inputs)
    known = set(output).union(*terms) if terms else set(output)
    present = "".join(letter for letter in own if letter in known)
    found = linear.at.einsum(r, *linear.weights, equation=",".join([seed + output, *terms]) + f"->{seed}{present}")
    if present == own:
        return found
    shape = tuple(d if letter in known else 1 for letter, d in zip(own, linear.type.shape, strict=True))
    return linear.at.widen(linear.at.reshape(found, shape=(found.type.shape[0], *shape)), linear.type)


def _conv_adjoint(linear: LinearMap, r: Value) -> Value:
    op, rank = linear.op, linear.op.result.type.rank - 2
    weight = linear.weights[0]
    stride, padding = _numbers(op, "stride"), _numbers(op, "padding")
    dilation = _numbers(op, "dilation")
    kernel = weight.type.shape[2:]  # type: ignore[union-attr]
    spare = tuple(linear.type.shape[i + 2] - ((r.type.shape[i + 3] - 1) * stride[i] - 2 * padding[i]
                                             + dilation[i] * (kernel[i] - 1) + 1) for i in range(rank))
    found = linear.at.op(f"conv_transpose{rank}d", linear.at.fold_seeds(r), weight, stride=stride, padding=padding,
                         output_padding=spare, dilation=dilation, groups=attr(op, "groups"))[0]
    return linear.at.unfold_seeds(found, linear.type.shape[0])


def _conv_transpose_adjoint(linear: LinearMap, r: Value) -> Value:
    op, rank = linear.op, linear.op.result.type.rank - 2
    found = linear.at.op(f"conv{rank}d", linear.at.fold_seeds(r), linear.weights[0], stride=_numbers(op, "stride"),
                         padding=_numbers(op, "padding"), dilation=_numbers(op, "dilation"),
                         groups=attr(op, "groups"))[0]
    return linear.at.unfold_seeds(found, linear.type.shape[0])


def _numbers(op: Op, name: str) -> tuple[int, ...]:
    found = attr(op, name)
    assert isinstance(found, tuple)
    return tuple(n for n in found if isinstance(n, int))


def _avg_pool_adjoint(linear: LinearMap, r: Value) -> Value:
    attrs = _attrs(linear.op)
    spatial = len(_numbers(linear.op, "kernel"))
    return linear.at.avg_pool_adjoint(r, size=linear.type.shape[-spatial:], **attrs)


def _adaptive_adjoint(linear: LinearMap, r: Value) -> Value:
    spatial = len(linear.op.attrs["size"])  # type: ignore[arg-type]
    return linear.at.adaptive_avg_pool_adjoint(r, size=linear.type.shape[-spatial:])


def _apply_interpolate(linear: LinearMap, x: Operand) -> Value:
    return linear.at.interpolate(x, **{**_attrs(linear.op), "absolute": not linear.signed})


def _interpolate_adjoint(linear: LinearMap, r: Value) -> Value:
    size = linear.type.shape[-len(linear.op.attrs["size"]):]  # type: ignore[arg-type]
    return linear.at.interpolate_adjoint(r, **{**_attrs(linear.op), "size": size, "absolute": not linear.signed})


def _sum_adjoint(linear: LinearMap, r: Value) -> Value:
    gone = axes(linear.type.rank, attr(linear.op, "dims"))
    shape = tuple(1 if i in gone else d for i, d in enumerate(linear.type.shape))
    return linear.at.widen(linear.at.reshape(r, shape=(r.type.shape[0], *shape)), linear.type)


def _mean_adjoint(linear: LinearMap, r: Value) -> Value:
    gone = axes(linear.type.rank, attr(linear.op, "dims"))
    count = product(tuple(linear.type.shape[i] for i in gone))
    return _sum_adjoint(linear, linear.at.div(r, count))


def _cumsum_adjoint(linear: LinearMap, r: Value) -> Value:
    dim = linear.op.attrs["dim"]
    assert isinstance(dim, int)
    dim = dim + 1 if dim >= 0 else dim
    return linear.at.flip(linear.at.cumsum(linear.at.flip(r, dims=(dim,)), dim=dim), dims=(dim,))


def _rotary_adjoint(linear: LinearMap, r: Value) -> Value:
    """cos r + rotate^T (sin r); rotate^T of the two halves is (r2, -r1), (r2, r1) where weights are absolute."""
    at, (cos, sin) = linear.at, linear.weights
    turned = _turned(linear, at.mul(r, sin), -1)
    return at.unbroadcast(at.add(at.mul(r, cos), turned), linear.type)


def _turned(linear: LinearMap, x: Operand, sign: int) -> Value:
    return exchanged(linear.at, x, bool(attr(linear.op, "interleaved")), sign if linear.signed else 0)


def exchanged(at: Expansion, x: Operand, interleaved: bool, sign: int = 0) -> Value:
    """The two halves of the last axis (or the members of each pair, interleaved) exchanged.

    sign 1 negates what comes first (rotate), -1 what comes last (its transpose), 0 neither.
    """
    kind = x.type  # type: ignore[union-attr]
    size = kind.shape[-1]
    pairs = at.reshape(x, shape=(*kind.shape[:-1], size // 2, 2)) if interleaved else x
    half = 1 if interleaved else size // 2
    first = at.slice_(pairs, dim=-1, start=0, stop=half)
    second = at.slice_(pairs, dim=-1, start=half, stop=2 * half)
    front = at.neg(second) if sign > 0 else second
    turned = at.cat(front, at.neg(first) if sign < 0 else first, dim=-1)
    return at.reshape(turned, shape=kind.shape) if interleaved else turned


def _batch_norm_adjoint(linear: LinearMap, r: Value) -> Value:
    return linear.at.mul(r, linear.weights[0])


_FORWARD = {name: _apply for name in LINEAR} | {"rotary": _apply_rotary, "batch_norm": _apply_batch_norm,
                                                "interpolate": _apply_interpolate,
                                                **dict.fromkeys(EXPERTS, _apply_experts)}
_ADJOINT = {
    "linear": _linear_adjoint, "linear_rows": _linear_rows_adjoint, "matmul": _matmul_adjoint,
    "einsum": _einsum_adjoint, **dict.fromkeys(EXPERTS, _experts_adjoint),
    **dict.fromkeys(CONVS, _conv_adjoint), **dict.fromkeys(TRANSPOSED, _conv_transpose_adjoint),
    "avg_pool": _avg_pool_adjoint, "adaptive_avg_pool": _adaptive_adjoint,
    "interpolate": _interpolate_adjoint, "mean": _mean_adjoint,
    "sum": _sum_adjoint, "cumsum": _cumsum_adjoint, "rotary": _rotary_adjoint, "batch_norm": _batch_norm_adjoint,
}
