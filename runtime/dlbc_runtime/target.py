"""What is explained: a class, a token, a difference of two, labels, pixels, a box, or any weighting of an output.

`target=None` is the predicted class (the next token, the only number) of each batch row. An int is
`Target.index(int)`; a list gives one explanation for each of its entries from one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from dlbc_runtime.arrays import Array, as_numpy
from dlbc_runtime.errors import InputError
from dlbc_runtime.explained import Explained

Rows: TypeAlias = "int | Sequence[int]"
_ONE, _MINUS = np.float32(1), np.float32(-1)
COORDINATES = ("x", "y", "w", "h")
RIVALS = 32
"""How many other outputs `Target.probability` weighs: of a vocabulary the rest has next to no probability."""


@dataclass(frozen=True, eq=False)
class Target:
    """One thing to explain. Make it with the class methods; `position` counts from the end when negative."""

    kind: str = "predicted"
    chosen: Rows | None = None
    against: Rows | None = None
    position: Rows | None = None
    weights: Array | None = None
    threshold: float = 0.5
    what: int | str = ""

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
    def difference(cls, index: Rows, against: Rows | None = None, position: Rows | None = None) -> Target:
        """Why `index` rather than `against` (None: the largest of the others): the difference of the two outputs."""
        return cls("difference", index, against, position)

    @classmethod
    def probability(cls, index: Rows, position: Rows | None = None) -> Target:
        """Why `index` is as likely as it is: its log-odds, of which everything that raises it alone is a part.

        Their gradient weights the output by 1 and each other one by minus its share of the rest of the probability.
        These weights are explained, of the `RIVALS` likeliest others, whose shares are taken as all of the rest.
        """
        return cls("probability", index, position=position)

    @classmethod
    def tensor(cls, weights: object) -> Target:
        """Any weighting of the explained output: its shape, with or without the batch axis."""
        return cls("tensor", weights=as_numpy(weights))

    @classmethod
    def labels(cls, threshold: float = 0.5, position: Rows | None = None) -> Target:
        """Every output of a row that the model returns above `threshold`, together, each with the same share."""
        return cls("labels", position=position, threshold=float(threshold))

    @classmethod
    def binary(cls, positive: bool = True) -> Target:
        """The one number of a classifier of two classes; for the negative class minus it."""
        return cls("binary", 0 if positive else 1)

    @classmethod
    def regression(cls, index: Rows | None = None) -> Target:
        """Number `index` of a regression; without `index` all its numbers together, each with the same share."""
        return cls("regression", index)

    @classmethod
    def mask(cls, index: Rows, threshold: float = 0.5, *, logits: bool = False) -> Target:
        """The pixels that a segmentation [B,C,H,W] returns above `threshold` for class `index`, with equal shares.
        `logits`: the threshold is one of probabilities, and what the model returns is made into them."""
        return cls("mask", index, threshold=float(threshold), what="logits" if logits else "")

    @classmethod
    def box(cls, query: Rows, what: int | str = "box") -> Target:
        """One object of a detection: of scores [B,Q,C] the class number `what` of a query; of boxes [B,Q,4] its
        coordinate "x", "y", "w" or "h", or "box": all four with equal shares."""
        return cls("box", query, what=what)

    @property
    def weighs(self) -> bool:
        """True for targets that weight the whole output, whatever its shape, and not numbers in a row of it."""
        return self.kind in ("tensor", "mask", "box")

    def rivals(self, seeds: Array) -> Array:
        """The outputs that speak for something else, bool [B, ...]: the others in the same row (pixel, query) as those
        that are seeded; none for numbers that do not compete, as those of a regression or a box."""
        chosen = seeds != 0
        if self.kind == "regression" or (self.kind == "box" and isinstance(self.what, str)) or seeds.ndim < 2:
            return np.zeros_like(chosen)
        found: Array = chosen.any(axis=1 if self.kind == "mask" else -1, keepdims=True) & ~chosen
        return found

    def check_contrastive(self) -> None:
        """InputError where there is no target and rival: contrastive relevances are amounts, never negative."""
        negative = {
            "a difference has a negative part": self.kind == "difference",
            "log-odds have a negative part": self.kind == "probability",
            "Target.tensor has negative weights": self.weights is not None and bool((self.weights < 0).any()),
            "the negative class of one number is minus that number": self.kind == "binary" and self.chosen == 1}
        for fact in (fact for fact, applies in negative.items() if applies):
            raise InputError(f"{fact}, and contrastive relevances cannot be negative", where="target",
                             hint="explain a class: the other outputs are its rivals as it is")

    def of_rows(self, rows: slice, batch: int, rank: int) -> Target:
        """The same target for some rows of a batch; `rank`: the number of axes of the output."""
        def own(given: Rows | None) -> Rows | None:
            return given if given is None or np.ndim(given) == 0 else tuple(np.asarray(given)[rows].tolist())

        weights = self.weights
        if weights is not None and weights.ndim == rank and len(weights) == batch:
            weights = weights[rows]
        return replace(self, chosen=own(self.chosen), against=own(self.against), position=own(self.position),
                       weights=weights)

    def within_rows(self, lengths: Sequence[int]) -> Target:
        """The same target for rows of these lengths: a negative position counts from the end of its own row."""
        if self.position is None:
            return self
        found, ends = _rows(self.position, len(lengths), "position"), np.asarray(lengths, np.int64)
        wrapped = np.where(found < 0, found + ends, found)
        outside = (wrapped < 0) | (wrapped >= ends)
        if outside.any():
            row = int(outside.argmax())
            raise InputError(f"position {int(found[row])} is outside row {row}", where="target",
                             hint=f"the row has {lengths[row]} positions: 0 to {lengths[row] - 1}")
        return replace(self, position=tuple(wrapped.tolist()))

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

    def seed(self, output: Array, name: str, positions: Array | None, number: int, *, signed: bool,
             shown: Array | None = None) -> Seed:
        """What this target seeds of `output` [B, V] (of the explained position, where there are positions).

        The explained number f is an output y_i, or a difference y_i - y_j. `signed`: for rules that divide by the
        outputs, relevance of y_i is y_i / |f|, so that each part of the input is positive where it raises f, be f
        positive or negative: relevance then sums to the sign of f. For other rules it is 1 (and -1 for y_j). Several
        numbers with equal shares are n such explanations, each 1/n. `shown`: what the model returns, where it is not
        what is explained (the value before its softmax).
        """
        rows = output.reshape(output.shape[0], -1) if output.ndim == 1 else output
        if rows.ndim != 2:
            raise InputError(f"output `{name}` has shape {list(output.shape)}: which number of it to explain "
                             "is not clear", where="target",
                             hint="give Target.tensor(weights) of that shape, Target.mask(class) or Target.box(query)")
        if self.kind in ("labels", "binary") or (self.kind == "regression" and self.chosen is None):
            return self._together(rows, name, positions, number, signed, rows if shown is None else shown)
        batch, count = rows.shape
        chosen = rows.argmax(-1) if self.kind == "predicted" else _rows(_given(self.chosen), batch, "target", count)
        every = np.arange(batch)
        values = rows[every, chosen]
        if self.kind == "difference":
            return self._difference(rows, name, positions, number, chosen, signed)
        if self.kind == "probability":
            return self._log_odds(rows, name, positions, number, chosen, signed)

        kept = rows.copy() if count > 1 else rows  # whoever writes over the outputs changes no meaning

        def explained() -> tuple[Explained, ...]:
            likely = _probabilities(kept, values) if count > 1 and self.kind != "regression" else [None] * batch
            places = [None] * batch if positions is None else positions.tolist()
            return tuple(Explained(row, number, name, index if count > 1 else None, None, place, value, probability)
                         for row, (index, place, value, probability) in enumerate(
                             zip(chosen.tolist(), places, values.tolist(), likely, strict=True)))

        weights = np.where(values < 0, _MINUS, _ONE) if signed else np.ones(batch, np.float32)
        return Seed(chosen[:, None], weights[:, None], explained)

    def _difference(self, rows: Array, name: str, positions: Array | None, number: int, chosen: Array, signed: bool
                    ) -> Seed:
        """One number of each row less another one."""
        batch, count = rows.shape
        every = np.arange(batch)
        if count < 2 and self.against is None:
            raise InputError(f"output `{name}` is one number, and there is no other to compare it with", where="target",
                             hint="leave the target out")
        against = (_others(rows, chosen).argmax(-1) if self.against is None
                   else _rows(self.against, batch, "target", count))
        explained = tuple(Explained(
            row, number, name, int(chosen[row]) if count > 1 else None, int(against[row]),
            int(positions[row]) if positions is not None else None, float(rows[row, chosen[row]]))
            for row in range(batch))
        indices = np.stack([chosen, against], 1)
        weights = np.broadcast_to(np.array([1.0, -1.0], np.float32), indices.shape)
        return Seed(indices, _shares(weights, rows[every[:, None], indices]) if signed else weights, lambda: explained)

    def _log_odds(self, rows: Array, name: str, positions: Array | None, number: int, chosen: Array, signed: bool
                  ) -> Seed:
        """One number of each row less the others, each by its share of the probability that is not the first one's."""
        batch, count = rows.shape
        if count < 2:
            raise InputError(f"output `{name}` is one number, and has no probability among others", where="target",
                             hint="leave the target out")
        every = np.arange(batch)
        others = _others(rows, chosen)
        rivals = np.argpartition(-others, min(RIVALS, count - 1) - 1, -1)[:, :min(RIVALS, count - 1)]
        near = np.take_along_axis(others, rivals, -1).astype(np.float64)
        odds = np.exp(near - near.max(-1, keepdims=True))
        indices = np.concatenate([chosen[:, None], rivals], 1)
        weights = np.concatenate([np.ones((batch, 1)), -odds / odds.sum(-1, keepdims=True)], 1)
        top = others.max(-1)
        rest = np.exp(np.subtract(others, top[:, None], dtype=np.float64)).sum(-1)
        values = rows[every, chosen].astype(np.float64) - top - np.log(rest)
        explained = tuple(Explained(row, number, name, int(chosen[row]), None,
                                    int(positions[row]) if positions is not None else None, float(values[row]),
                                    float(1 / (1 + np.exp(-values[row])))) for row in range(batch))
        taken = rows[every[:, None], indices]
        return Seed(indices, (_shares(weights, taken) if signed else weights).astype(np.float32), lambda: explained)

    def _together(self, rows: Array, name: str, positions: Array | None, number: int, signed: bool, shown: Array
                  ) -> Seed:
        """Several numbers of each row with equal shares, or one with the other sign."""
        count = rows.shape[1]
        if self.kind == "binary" and count != 1:
            raise InputError(f"Target.binary is for one number, output `{name}` has {count}", where="target",
                             hint="give the number of a class, or Target.index(class)")
        chosen = shown.reshape(rows.shape) > self.threshold if self.kind == "labels" else np.ones(rows.shape, bool)
        found = [np.flatnonzero(row) for row in chosen]
        for row, indices in enumerate(found):
            if not len(indices):
                raise InputError(f"no number of output `{name}` is above {self.threshold:g} in row {row}; the largest "
                                 f"is {float(shown[row].max()):.4g}", where="target",
                                 hint="lower the threshold: it is compared with what the model returns")
        width, negated = max(map(len, found)), self.kind == "binary" and self.chosen == 1
        padded = np.stack([np.pad(indices, (0, width - len(indices))) for indices in found])
        weights = np.stack([np.arange(width) < len(indices) for indices in found]) / np.array(
            [[float(len(indices))] for indices in found]) * (-1 if negated else 1)
        if signed:
            weights = weights * np.where(np.take_along_axis(rows, padded, 1) < 0, -1, 1)
        explained = []
        for row, indices in enumerate(found):
            single = len(indices) == 1
            value = float(rows[row, indices[0]]) * (-1 if negated else 1) if single else None
            several = f"{name}[{_listed(indices)}]" if self.kind == "labels" else f"all {count} of {name}"
            explained.append(Explained(
                row, number, name, int(indices[0]) if single and count > 1 else None, None,
                int(positions[row]) if positions is not None else None, value,
                text=f"minus {name}" if negated else "" if single else several))
        return Seed(padded, weights.astype(np.float32), lambda: explained)

    def weighting(self, output: Array, name: str, number: int, *, signed: bool = False, shown: Array | None = None
                  ) -> tuple[Array, tuple[Explained, ...]]:
        """The weights of a target that `weighs` in the shape of `output`, and what they mean for each row."""
        if self.kind == "mask":
            seed, explained = self._pixels(output, name, number, output if shown is None else shown)
        elif self.kind == "box":
            seed, explained = self._object(output, name, number)
        else:
            return self._tensor(output, name, number)
        return np.where(output < 0, -seed, seed) if signed else seed, explained

    def _tensor(self, output: Array, name: str, number: int) -> tuple[Array, tuple[Explained, ...]]:
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

    def _pixels(self, output: Array, name: str, number: int, shown: Array) -> tuple[Array, tuple[Explained, ...]]:
        if output.ndim not in (4, 5):
            raise InputError(f"Target.mask is for a segmentation [B,C,H,W], output `{name}` has shape "
                             f"{list(output.shape)}", where="target", hint="name the output with output=...")
        batch, count = output.shape[:2]
        classes = _rows(_given(self.chosen), batch, "target", count)
        seed = np.zeros(output.shape, np.float32)
        explained = []
        shown = pixel_probabilities(shown) if self.what == "logits" else shown
        for row, index in enumerate(classes):
            scores = shown[row, index]
            inside = scores > self.threshold
            if not inside.any():
                raise InputError(f"no pixel of class {index} is above {self.threshold:g} in row {row}; the largest is "
                                 f"{float(scores.max()):.4g}", where="target",
                                 hint="lower the threshold: it is compared with what the model returns")
            seed[row, index] = inside / float(inside.sum())
            explained.append(Explained(int(row), number, name, text=f"{name} class {index}, {int(inside.sum())} of "
                                                                    f"{inside.size} pixels"))
        return seed, tuple(explained)

    def _object(self, output: Array, name: str, number: int) -> tuple[Array, tuple[Explained, ...]]:
        if output.ndim != 3:
            raise InputError(f"Target.box is for scores [B,Q,C] or boxes [B,Q,4], output `{name}` has shape "
                             f"{list(output.shape)}", where="target", hint="name the output with output=...")
        batch, count, width = output.shape
        queries = _rows(_given(self.chosen), batch, "query", count)
        if isinstance(self.what, str):
            if width != len(COORDINATES) or self.what not in (*COORDINATES, "box"):
                raise InputError(f"`{self.what}` is no number of output `{name}` {list(output.shape)}", where="target",
                                 hint='of boxes [B,Q,4] give "x", "y", "w", "h" or "box"; of scores the class number')
            chosen = range(4) if self.what == "box" else [COORDINATES.index(self.what)]
        else:
            chosen = [int(_rows(self.what, 1, "target", width)[0])]
        seed = np.zeros(output.shape, np.float32)
        for row, query in enumerate(queries):
            seed[row, query, chosen] = 1 / len(chosen)
        values = [float(output[row, query, chosen[0]]) for row, query in enumerate(queries)]
        return seed, tuple(Explained(row, number, name, text=f"{name}[{query}, {self.what}]",
                                     value=value if len(chosen) == 1 else None)
                           for row, (query, value) in enumerate(zip(queries, values, strict=True)))


@dataclass(frozen=True)
class Seed:
    """The numbers of an output that a target is about: their indices [B, k], weights [B, k], and what tells their
    meaning, one for each row."""

    indices: Array
    weights: Array
    explained: Callable[[], Sequence[Explained]]


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


def pixel_probabilities(scores: Array) -> Array:
    """Probabilities of a segmentation's scores [B,C,...] along axis 1, float64: those of one class are the sigmoid, of
    several the softmax; scores of several classes that are from 0 to 1 and sum to 1 are probabilities already."""
    values = scores.astype(np.float64)
    if values.shape[1] == 1:
        found: Array = 1 / (1 + np.exp(-values))
        return found
    if values.min() >= 0 and np.allclose(values.sum(1), 1, atol=1e-4):
        return values
    powers = np.exp(values - values.max(1, keepdims=True))
    found = powers / powers.sum(1, keepdims=True)
    return found


def _rows(given: Rows, batch: int, what: str, count: int | None = None) -> Array:
    found: Array = np.array(given, dtype=np.int64)
    if found.ndim > 1 or (found.ndim == 1 and len(found) != batch):
        raise InputError(f"{found.size} numbers for {batch} batch rows", where=what,
                         hint="give one number, or one for each row; a list of targets is a list of Target.index(...)")
    found = np.broadcast_to(found, (batch,))
    if count is not None and ((found < 0) | (found >= count)).any():
        wrong = int(found[(found < 0) | (found >= count)][0])
        raise InputError(f"target {wrong} is out of range", where=what,
                         hint=f"the output has {count} entries: 0 to {count - 1}")
    return found


def _others(rows: Array, chosen: Array) -> Array:
    """The rows with minus infinity in place of one number of each."""
    found = np.array(rows)
    found[np.arange(len(rows)), chosen] = -np.inf
    return found


def _shares(weights: Array, values: Array) -> Array:
    """What each weighted number of a row is of the size of their sum; where they cancel, of a millionth of the
    largest of them."""
    parts = weights * values
    size = np.abs(parts.sum(1, keepdims=True))
    found = parts / np.maximum(size, 1e-6 * np.abs(parts).max(1, keepdims=True) + 1e-30)
    return np.where(parts == 0, 0, found).astype(np.float32)


def _listed(indices: Array, most: int = 6) -> str:
    return ", ".join(map(str, indices[:most])) + (", …" if len(indices) > most else "")


def _given(rows: Rows | None) -> Rows:
    assert rows is not None
    return rows


def _probabilities(rows: Array, values: Array) -> list[float]:
    """The softmax of each row at its value."""
    top = rows.max(-1)
    whole = np.exp(np.subtract(rows, top[:, None], dtype=np.float64)).sum(-1)
    found: list[float] = (np.exp(np.subtract(values, top, dtype=np.float64)) / whole).tolist()
    return found
