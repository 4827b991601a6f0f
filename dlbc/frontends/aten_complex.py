"""Operators on complex numbers, as real ones: a complex tensor is a real one with a last axis of 2.

Models have them for rotary positions (DeepSeek-V2, LLaMA 4, Meta's own LLaMA): pairs of numbers are turned by
multiplying them with cos + i sin. Handlers get complex operands as a `Pair`, and give real tensors with that last axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from dlbc.frontends.aten import TABLE, Result, Tracer, positive, type_of
from dlbc.ir.core import Operand, Value

H = TypeVar("H", bound="Callable[..., Result]")
COMPLEX: dict[str, Callable[..., Result]] = {}
"""Handlers of operators where an operand or the result is complex."""


@dataclass(frozen=True)
class Pair:
    """A complex operand: real and imaginary part along the last axis of `value`."""

    value: Operand

    @property
    def rank(self) -> int:
        """The number of its axes, as a complex tensor."""
        return type_of(self.value).rank - 1

    def parts(self, at: Tracer) -> tuple[Value, Value]:
        """The real and the imaginary part."""
        return at.select(self.value, dim=self.rank, index=0), at.select(self.value, dim=self.rank, index=1)


Number: TypeAlias = "Pair | Operand"


def on_complex(*names: str) -> Callable[[H], H]:
    """Register the decorated handler for operators on complex numbers."""
    def register(handler: H) -> H:
        COMPLEX.update(dict.fromkeys(names, handler))
        return handler

    return register


def joined(at: Tracer, real: Operand, imaginary: Operand) -> Operand:
    """Complex numbers of their parts."""
    shape = type_of(real).shape
    return at.cat(*(at.reshape(part, shape=(*shape, 1)) for part in (real, imaginary)), dim=len(shape))


def _plain(x: Number) -> Operand:
    return x.value if isinstance(x, Pair) else x


@on_complex("view_as_complex", "view_as_real", "clone", "alias", "detach", "contiguous", "lift_fresh_copy")
def same(at: Tracer, x: Number, *_: object, **__: object) -> Operand:
    """The same numbers."""
    return _plain(x)


@on_complex("_to_copy", "to")
def to(at: Tracer, x: Number, *_: object, **__: object) -> Operand:
    """The same complex numbers in another precision or on another device."""
    if not isinstance(x, Pair) or len(at.shape) == x.rank:
        raise at.unsupported("a cast between real and complex numbers", hint="take `.real`, or torch.view_as_real")
    return x.value


@on_complex("polar")
def polar(at: Tracer, size: Operand, angle: Operand) -> Operand:
    """`size (cos angle + i sin angle)`."""
    return joined(at, at.mul(size, at.cos(angle)), at.mul(size, at.sin(angle)))


@on_complex("complex")
def complex_(at: Tracer, real: Operand, imaginary: Operand) -> Operand:
    """Complex numbers of their parts."""
    return joined(at, real, imaginary)


@on_complex("real")
def real(at: Tracer, x: Pair) -> Operand:
    """The real part."""
    return x.parts(at)[0]


@on_complex("imag")
def imag(at: Tracer, x: Pair) -> Operand:
    """The imaginary part."""
    return x.parts(at)[1]


@on_complex("conj", "_conj", "_conj_physical", "conj_physical", "resolve_conj")
def conj(at: Tracer, x: Pair) -> Operand:
    """The sign of the imaginary part changed."""
    if "resolve" in at.target:
        return x.value
    a, b = x.parts(at)
    return joined(at, a, at.neg(b))


@on_complex("mul")
def mul(at: Tracer, x: Number, y: Number) -> Operand:
    """(a + bi)(c + di) = (ac - bd) + (ad + bc)i; by real numbers, both parts by them."""
    if isinstance(x, Pair) and isinstance(y, Pair):
        (a, b), (c, d) = x.parts(at), y.parts(at)
        return joined(at, at.sub(at.mul(a, c), at.mul(b, d)), at.add(at.mul(a, d), at.mul(b, c)))
    return at.mul(*(_beside(at, z) for z in (x, y)))


@on_complex("div")
def div(at: Tracer, x: Number, y: Number) -> Operand:
    """Both parts by real numbers."""
    if isinstance(y, Pair):
        raise at.unsupported("a division by complex numbers", hint="multiply by the conjugate, divide by the square")
    return at.div(_plain(x), _beside(at, y))


def _beside(at: Tracer, x: Number) -> Operand:
    """A factor in the shape that lies beside pairs."""
    if isinstance(x, Pair) or not hasattr(x, "type"):
        return _plain(x)
    return at.reshape(x, shape=(*type_of(x).shape, 1))


@on_complex("add", "sub")
def add(at: Tracer, x: Number, y: Number, *, alpha: float = 1) -> Operand:
    """Part by part."""
    if not (isinstance(x, Pair) and isinstance(y, Pair)):
        raise at.unsupported("a sum of real and complex numbers", hint="make both complex: torch.complex(x, zeros)")
    other = y.value if alpha == 1 else at.mul(y.value, alpha)
    return at.add(x.value, other) if at.target.startswith("add") else at.sub(x.value, other)


@on_complex("abs")
def size(at: Tracer, x: Pair) -> Operand:
    """`sqrt(a^2 + b^2)`."""
    a, b = x.parts(at)
    return at.sqrt(at.add(at.mul(a, a), at.mul(b, b)))


@on_complex("neg")
def neg(at: Tracer, x: Pair) -> Operand:
    """Both parts with the other sign."""
    return at.neg(x.value)


# --- moves: those of real tensors, which leave the last axis where it is -----------------------------------

@on_complex("view", "_unsafe_view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "expand",
            "expand_as", "broadcast_to")
def shaped(at: Tracer, x: Pair, *_: object, **__: object) -> Operand:
    """Under the shape that the exporter found."""
    found = TABLE["expand" if at.target.startswith(("expand", "broadcast")) else "view"](at, x.value)
    assert not isinstance(found, tuple)
    return found


@on_complex("slice", "select", "index_select", "narrow")
def taken(at: Tracer, x: Pair, dim: int = 0, *bounds: object, **named: object) -> Result:
    """Some of an axis."""
    return TABLE[at.target.partition(".")[0]](at, x.value, positive(dim, x.rank), *bounds, **named)


@on_complex("index")
def index(at: Tracer, x: Pair, indices: Sequence[Operand]) -> Result:
    """Numbers at places."""
    return TABLE["index"](at, x.value, indices)


@on_complex("transpose")
def transpose(at: Tracer, x: Pair, dim0: int, dim1: int) -> Operand:
    """Two axes exchanged."""
    order = list(range(x.rank))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return at.permuted(x.value, (*order, x.rank))


@on_complex("permute")
def permute(at: Tracer, x: Pair, dims: Sequence[int]) -> Operand:
    """Axes in another order."""
    return at.permuted(x.value, (*(positive(dim, x.rank) for dim in dims), x.rank))


@on_complex("cat")
def cat(at: Tracer, tensors: Sequence[Pair], dim: int = 0) -> Operand:
    """Joined along an axis."""
    return at.cat(*(x.value for x in tensors), dim=positive(dim, tensors[0].rank))
