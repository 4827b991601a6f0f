"""What is explained: a class, a token, a difference of two, or any weighting of an output.

`target=None` is the predicted class (the next token, the only number) of each batch row. An int is
`Target.index(int)`; a list gives one explanation for each of its entries from one forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from dlbc_runtime.arrays import Array, as_numpy
from dlbc_runtime.errors import InputError
from dlbc_runtime.explained import Explained

Rows: TypeAlias = "int | Sequence[int]"


@dataclass(frozen=True, eq=False)
class Target:
    """One thing to explain. Make it with the class methods; `position` counts from the end when negative."""

    kind: str = "predicted"
    chosen: Rows | None = None
    against: Rows | None = None
    position: Rows | None = None
    weights: Array | None = None

    @classmethod
    def predicted(cls, position: Rows | None = None) -> Target:
        """The largest output of each row (at `position` of a sequence; default: the last that is no padding)."""
        return cls("predicted", position=position)

    @classmethod
    def index(cls, index: Rows, position: Rows | None = None) -> Target:
        """Output number `index`, for all batch rows or one number per row."""
        return cls("index", index, position=position)

    @classmethod
    def token(cls, token: Rows, position: Rows | None = None) -> Target:
        """Vocabulary entry `token` as predicted at `position` of the sequence (what would follow it)."""
        return cls("index", token, position=position)

    @classmethod
    def difference(cls, index: Rows, against: Rows, position: Rows | None = None) -> Target:
        """Why `index` rather than `against`: the difference of the two outputs."""
        return cls("difference", index, against, position)

    @classmethod
    def tensor(cls, weights: object) -> Target:
        """Any weighting of the explained output: its shape, with or without the batch axis."""
        return cls("tensor", weights=as_numpy(weights))

    def positions(self, last: Array, length: int) -> Array:
        """The sequence position of each batch row, int64 [B]; `last` holds the last that is no padding."""
        if self.position is None:
            return last
        found = _rows(self.position, len(last), "position")
        wrapped = np.where(found < 0, found + length, found)
        if ((wrapped < 0) | (wrapped >= length)).any():
            raise InputError(f"position {int(found[(wrapped < 0) | (wrapped >= length)][0])} is outside the sequence",
                             where="target", hint=f"the sequence has {length} positions: 0 to {length - 1}")
        return wrapped

    def seed(self, output: Array, name: str, positions: Array | None, number: int, *, signed: bool) -> Seed:
        """What this target seeds of `output` [B, V] (of the explained position, where there are positions).

        The explained number f is an output y_i, or a difference y_i - y_j. `signed`: for rules that divide by the
        outputs, relevance of y_i is y_i / |f|, so that each part of the input is positive where it raises f, be f
        positive or negative: relevance then sums to the sign of f. For other rules it is 1 (and -1 for y_j).
        """
        rows = output.reshape(output.shape[0], -1) if output.ndim == 1 else output
        if rows.ndim != 2:
            raise InputError(f"output `{name}` has shape {list(output.shape)}: which number of it to explain "
                             "is not clear", where="target", hint="give Target.tensor(weights) of that shape")
        batch, count = rows.shape
        every = np.arange(batch)
        chosen = rows.argmax(-1) if self.kind == "predicted" else _rows(_given(self.chosen), batch, "target", count)
        against = _rows(_given(self.against), batch, "target", count) if self.kind == "difference" else None
        likely = _softmax(rows) if count > 1 and against is None else None
        explained = tuple(Explained(
            int(row), number, name, int(chosen[row]) if count > 1 else None,
            int(against[row]) if against is not None else None,
            int(positions[row]) if positions is not None else None, float(rows[row, chosen[row]]),
            float(likely[row, chosen[row]]) if likely is not None else None) for row in every)
        indices = chosen[:, None] if against is None else np.stack([chosen, against], 1)
        weights = np.broadcast_to(np.array([1.0, -1.0], np.float32)[:indices.shape[1]], indices.shape)
        if signed:
            parts = weights * rows[every[:, None], indices]
            size = np.abs(parts.sum(1, keepdims=True))
            weights = parts / np.maximum(size, 1e-6 * np.abs(parts).max(1, keepdims=True) + 1e-30)
            weights = np.where(parts == 0, 0, weights) if against is not None else np.where(parts < 0, -1, 1)
        return Seed(indices, weights.astype(np.float32), explained)

    def weighting(self, output: Array, name: str, number: int) -> tuple[Array, tuple[Explained, ...]]:
        """The weights of `Target.tensor` in the shape of `output`, and what they mean for each row."""
        assert self.weights is not None
        try:
            seed = np.broadcast_to(self.weights, output.shape).astype(np.float32)
        except ValueError as problem:
            raise InputError(f"Target.tensor has shape {list(self.weights.shape)}, output `{name}` has "
                             f"{list(output.shape)}", where="target",
                             hint="of a sequence, weights are of the explained position, or with "
                                  'positions="all" of all of them') from problem
        rows = range(output.shape[0] if output.ndim else 1)
        return seed, tuple(Explained(row, number, name, text=f"weighted {name}") for row in rows)


@dataclass(frozen=True)
class Seed:
    """The numbers of an output that a target is about: their indices [B, k], weights [B, k], and meaning per row."""

    indices: Array
    weights: Array
    explained: tuple[Explained, ...]


def as_targets(target: object) -> tuple[tuple[Target, ...], bool]:
    """The targets asked for, and whether they were a list (many explanations of one forward pass)."""
    if isinstance(target, list | tuple | range):
        if not target:
            raise InputError("the list of targets is empty", where="target", hint="give at least one")
        return tuple(as_targets(one)[0][0] for one in target), True
    if target is None:
        return (Target(),), False
    if isinstance(target, Target):
        return (target,), False
    if isinstance(target, int | np.integer) and not isinstance(target, bool):
        return (Target.index(int(target)),), False
    raise InputError(f"a target cannot be {type(target).__name__} {target!r}", where="target",
                     hint="give None, an int, a Target, or a list of them")


def _rows(given: Rows, batch: int, what: str, count: int | None = None) -> Array:
    found: Array = np.asarray(given, dtype=np.int64)
    if found.ndim > 1 or (found.ndim == 1 and len(found) != batch):
        raise InputError(f"{found.size} numbers for {batch} batch rows", where=what,
                         hint="give one number, or one for each row; a list of targets is a list of Target.index(...)")
    found = np.broadcast_to(found, (batch,))
    if count is not None and ((found < 0) | (found >= count)).any():
        wrong = int(found[(found < 0) | (found >= count)][0])
        raise InputError(f"target {wrong} is out of range", where=what,
                         hint=f"the output has {count} entries: 0 to {count - 1}")
    return found


def _given(rows: Rows | None) -> Rows:
    assert rows is not None
    return rows


def _softmax(rows: Array) -> Array:
    shifted = np.exp((rows - rows.max(-1, keepdims=True)).astype(np.float64))
    result: Array = shifted / shifted.sum(-1, keepdims=True)
    return result



