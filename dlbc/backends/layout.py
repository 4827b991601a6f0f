"""Where the elements of a value lie in memory, at sizes that stand for all: which reshapes are views, which copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dlbc.ir.core import Graph, Value
from dlbc.ir.dims import Dim, Sym, evaluate, symbols

_PRIMES = (3, 5, 7, 11, 13, 17, 19, 23)


@dataclass(frozen=True)
class Layout:
    """Sizes and strides of an array, in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def plain(shape: Sequence[int], order: Sequence[int] | None = None) -> Layout:
        """One element after the other, axes in `order` (outermost first)."""
        strides, step = [0] * len(shape), 1
        for axis in reversed(range(len(shape)) if order is None else order):
            strides[axis] = step
            step *= max(shape[axis], 1)
        return Layout(tuple(shape), tuple(strides))

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in order, without gaps."""
        plain = Layout.plain(self.shape).strides
        return all(n == 1 or a == b for n, a, b in zip(self.shape, self.strides, plain, strict=True))

    @property
    def dense(self) -> bool:
        """Whether the elements fill their memory, in some order of axes."""
        return Layout.plain(self.shape, self.order).strides == self.strides

    @property
    def order(self) -> list[int]:
        """The axes, outermost first."""
        return sorted(range(len(self.shape)), key=lambda axis: (-self.strides[axis], axis))

    def permuted(self, dims: Sequence[int]) -> Layout:
        """A view with axes in another order."""
        return Layout(tuple(self.shape[d] for d in dims), tuple(self.strides[d] for d in dims))

    def expanded(self, shape: Sequence[int]) -> Layout:
        """A view in which axes of size 1 are repeated."""
        lead = len(shape) - len(self.shape)
        own = tuple(0 if n == 1 and shape[lead + i] != 1 else s
                    for i, (n, s) in enumerate(zip(self.shape, self.strides, strict=True)))
        return Layout(tuple(shape), (0,) * lead + own)

    def reshaped(self, shape: Sequence[int]) -> Layout | None:
        """A view of another shape; None where there is none, and reshaping copies."""
        old = [(n, s) for n, s in zip(self.shape, self.strides, strict=True) if n != 1]
        groups: list[tuple[int, int]] = []  # runs of axes that one step goes through: size, step
        for n, s in old:
            if groups and groups[-1][1] == n * s:
                groups[-1] = (groups[-1][0] * n, s)
            else:
                groups.append((n, s))
        strides, left = [0] * len(shape), list(reversed(groups))
        room, step = left.pop(0) if left else (1, 1)
        for axis in reversed(range(len(shape))):
            if shape[axis] == 1:
                strides[axis] = step
                continue
            if room == 1 and left:
                room, step = left.pop(0)
            if room % shape[axis]:
                return None
            strides[axis], room, step = step, room // shape[axis], step * shape[axis]
        return Layout(tuple(shape), tuple(strides)) if room == 1 and not left else None


def typical_sizes(graph: Graph) -> dict[str, int]:
    """A size for each symbol, all different within their ranges: what holds for them, holds in general."""
    found = {}
    named = {str(name) for _, section in graph.sections() for param in section.params for dim in param.type.shape
             if isinstance(dim, Sym) for name in symbols(dim)}
    for number, name in enumerate(sorted({*graph.dims, *named})):
        low, high = graph.dims.get(name, (1, 2**31))
        found[name] = min(max(_PRIMES[number % len(_PRIMES)], low), high)
    return found


def numbers(shape: Sequence[Dim], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A shape at these sizes."""
    return tuple(evaluate(dim, sizes) for dim in shape)


def shape_of(value: Value, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A value's shape at these sizes."""
    return numbers(value.type.shape, sizes)
