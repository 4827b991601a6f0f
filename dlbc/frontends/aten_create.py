"""ATen's operators that make tensors from sizes and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dlbc.frontends.aten import Tracer, aten, type_of
from dlbc.ir.core import Operand
from dlbc.ir.dims import Dim, Sym


def filled(at: Tracer, value: Operand) -> Operand:
    """A tensor of the node's type, filled with a number (a rank-0 tensor where the number is computed)."""
    if isinstance(value, int | float | Sym):
        return at.full(shape=at.shape, value=value, dtype=at.out.dtype)
    return at.expanded(at.converted(value, at.out.dtype), at.shape)


@aten("full", "full_like", "new_full", "scalar_tensor", "fill", "fill_")
def full(at: Tracer, *args: Any, fill_value: Operand = None, value: Operand = None, **_: object) -> Operand:
    """A tensor filled with one number."""
    number = fill_value if fill_value is not None else value
    return filled(at, args[-1] if number is None else number)


@aten("zeros", "zeros_like", "new_zeros", "zero", "empty", "empty_like", "new_empty", "empty_strided",
      "new_empty_strided", "zero_", "empty_permuted")
def zeros(at: Tracer, *_: object, **__: object) -> Operand:
    """Zeros; also for tensors whose content the model has yet to write."""
    return filled(at, False if at.out.dtype == "bool" else 0.0 if at.out.floating else 0)


@aten("ones", "ones_like", "new_ones")
def ones(at: Tracer, *_: object, **__: object) -> Operand:
    """Ones."""
    return filled(at, True if at.out.dtype == "bool" else 1.0 if at.out.floating else 1)


@aten("arange.default")
def arange(at: Tracer, end: Dim | float, **options: object) -> Operand:
    """`0, 1, ...` below `end`."""
    return arange_step(at, 0, end, 1, **options)


@aten("arange.start", "arange.start_step")
def arange_step(at: Tracer, start: Dim | float, end: Dim | float, step: Dim | float = 1, **_: object) -> Operand:
    """`start, start + step, ...` below `end`."""
    first, stop, stride = _whole(start), _whole(end), _whole(step)
    if first is not None and stop is not None and isinstance(stride, int):
        return at.arange(start=first, stop=stop, step=stride, dtype=at.out.dtype)
    count = at.arange(stop=at.shape[0], dtype=at.out.dtype)
    return at.add(at.mul(count, step), start)


def _whole(number: Dim | float) -> Dim | None:
    if isinstance(number, float):
        return int(number) if number.is_integer() else None
    return number


@aten("linspace")
def linspace(at: Tracer, start: float, end: float, steps: int, **_: object) -> Operand:
    """Equally spaced numbers from start to end, both included."""
    count = at.arange(stop=steps, dtype=at.out.dtype)
    return at.add(at.mul(count, (end - start) / max(steps - 1, 1)), start)


@aten("eye")
def eye(at: Tracer, n: Dim, m: Dim | None = None, **_: object) -> Operand:
    """Ones on the diagonal, zeros elsewhere."""
    rows, columns = at.shape
    row = at.reshape(at.arange(stop=rows), shape=(rows, 1))
    return at.converted(at.eq(row, at.arange(stop=columns)), at.out.dtype)


@aten("one_hot")
def one_hot(at: Tracer, x: Operand, num_classes: int = -1) -> Operand:
    """One at each index, zero elsewhere, along a new last axis."""
    if num_classes < 0:
        raise at.unsupported("the number of classes depends on the data", hint="give num_classes")
    column = at.reshape(x, shape=(*type_of(x).shape, 1))
    return at.cast(at.eq(column, at.arange(stop=num_classes)), dtype="i64")


@aten("meshgrid")
def meshgrid(at: Tracer, tensors: Sequence[Operand], *, indexing: str = "ij") -> tuple[Operand, ...]:
    """Each tensor along an axis of its own, spread over the others."""
    shape = tuple(type_of(x).shape[0] if type_of(x).rank else 1 for x in tensors)
    found: list[Operand] = []
    for i, x in enumerate(tensors):
        grid = at.expand(at.reshape(x, shape=tuple(s if j == i else 1 for j, s in enumerate(shape))), shape=shape)
        swap = indexing == "xy" and len(shape) > 1
        found.append(at.permute(grid, dims=(1, 0, *range(2, len(shape)))) if swap else grid)
    return tuple(found)
