"""Streaming: a function of blocks of rows, run block by block, so that no intermediate is larger than a block.

The one loop that torch's and numpy's generated code share; arrays are those of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

Array: TypeAlias = Any
Axes: TypeAlias = tuple[int | None, int | None]

BUDGET = 2**20
"""Numbers that the largest intermediate of a block may have: 4 MiB of float32, about what caches hold."""


def stream(function: Callable[..., Sequence[Array]], given: list[Array], zeros: Callable[..., Array], *,
           over: Sequence[Axes], into: Sequence[Axes], rows: int, keys: int, width: int, causal: bool = False,
           window: int | None = None, budget: int | None = None, sizes: Sequence[int] = ()) -> tuple[Array, ...]:
    """The results of `function(given, *sizes)`, computed for blocks of rows; at once where all fit. `given` is emptied.

    `over`: for each array given the axis of its rows and that of its keys, None where it has none. `into`: likewise for
    each result; a result with rows is put together, any other one is the sum over the blocks. An axis may hold each
    row several times (heads stacked): it is cut in each repetition. `width`: numbers of the largest intermediate per
    row. `causal` (row i sees keys up to i + keys - rows, within `window`): a block gets the keys that it sees.
    `zeros(shape, like)` makes an array of zeros of the element type of `like`.
    """
    step = max(1, (budget or BUDGET) // max(1, width))
    if step >= rows:
        return tuple(function(given, *sizes))
    operands, results = [*given], list[Array]()
    given.clear()
    for start, stop, low, high in blocks(rows, keys, step, causal, window):
        cut = [_cut(x, axes, (start, stop, rows), (low, high)) for x, axes in zip(operands, over, strict=True)]
        pieces = function(cut, *sizes)
        if not results:
            results = [zeros(_whole(piece, axes, stop - start, rows, keys if causal else None), piece)
                       for piece, axes in zip(pieces, into, strict=True)]
        for result, piece, (row, key) in zip(results, pieces, into, strict=True):
            if row is None:
                part = result if key is None else result[_at(key, low, high)]
                part += piece
            else:
                _repeated(result, row, rows)[_at(row + 1, start, stop)] = _repeated(piece, row, stop - start)
        del pieces
    return tuple(results)


def attend(function: Callable[[list[Array]], Sequence[Array]], q: Array, k: Array, v: Array, mask: Array | None,
           zeros: Callable[..., Array], *, width: int, causal: bool, window: int | None) -> Array:
    """`function([q, k, v, mask])[0]`, attention with rows and keys in axis 2, by blocks of rows where needed."""
    given = [q, k, v] if mask is None else [q, k, v, mask]
    # What is within a window is told from the end of rows and keys, which the blocks of a causal one keep.
    if (window is not None and not causal) or (mask is not None and len(mask.shape) != 4):
        return function(given)[0]
    rows, keys = q.shape[2], k.shape[2]
    over: list[Axes] = [(2, None), (None, 2), (None, 2)]
    if mask is not None:
        over.append((2 if mask.shape[2] == rows != 1 else None, 3 if mask.shape[3] == keys != 1 else None))
    return stream(function, given, zeros, over=over, into=[(2, None)], rows=rows, keys=keys, width=width,
                  causal=causal, window=window)[0]


def blocks(rows: int, keys: int, step: int, causal: bool, window: int | None) -> Iterator[tuple[int, int, int, int]]:
    """First and last row, first and last key of each block; the lasts are not in it."""
    step = -(-rows // -(-rows // step))  # as many blocks, all of about the same size
    start = 0
    while start < rows:
        stop = min(rows, start + step)
        if not causal:
            yield start, stop, 0, keys
        else:
            stop = max(stop, min(rows, rows - keys + 1))  # rows before the first key see nothing: not alone
            high = stop + keys - rows
            yield start, stop, 0 if window is None else max(0, start + keys - rows + 1 - window), high
        start = stop


def _cut(x: Array, axes: Axes, part: tuple[int, int, int], seen: tuple[int, int]) -> Array:
    """The rows and keys of an operand that belong to a block."""
    (row, key), (start, stop, rows) = axes, part
    if key is not None:
        x = x[_at(key, *seen)]
    if row is None:
        return x
    if x.shape[row] == rows:
        return x[_at(row, start, stop)]
    taken = _repeated(x, row, rows)[_at(row + 1, start, stop)]
    return taken.reshape((*x.shape[:row], -1, *x.shape[row + 1:]))


def _repeated(x: Array, row: int, rows: int) -> Array:
    """An axis of stacked rows as two: repetition and row."""
    return x.reshape((*x.shape[:row], x.shape[row] // rows, rows, *x.shape[row + 1:]))


def _at(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, slice(start, stop))


def _whole(piece: Array, axes: Axes, part: int, rows: int, keys: int | None) -> tuple[int, ...]:
    """The shape of a result, from that of its piece."""
    shape = list(piece.shape)
    row, key = axes
    if row is not None:
        shape[row] = shape[row] // part * rows
    elif key is not None and keys is not None:
        shape[key] = keys
    return tuple(shape)
