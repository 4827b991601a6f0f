"""From targets to the arrays that generated code takes: seeds, sparse targets, positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlbc_runtime.arrays import Array
from dlbc_runtime.target import Seed, Target

FEW = 64
"""Numbers of an output up to which Python's own floats are the faster way."""


def dense_seeds(output: Array, found: list[Seed], places: Array, sequence: bool, multiplier: np.float32
           ) -> tuple[Array, ...]:
    """Seeds float32 [S, *output]; `places` [S, B] says where in a sequence output each target stands."""
    seeds = np.zeros((len(found), *output.shape), np.float32)
    rows = np.arange(places.shape[1])[:, None]
    for number, seed in enumerate(found):
        place = (rows, places[number][:, None], seed.indices) if sequence else (rows, seed.indices)[:output.ndim]
        if seed.indices.shape[1] == 1:
            seeds[number][place] = seed.weights * multiplier
        else:  # a number that stands twice, as the padding of several labels, adds up
            np.add.at(seeds[number], place, seed.weights * multiplier)
    return (seeds,)


def sparse_seeds(output: Array, found: list[Seed], places: Array, sequence: bool, multiplier: np.float32
            ) -> tuple[Array, ...]:
    """Seeds [S, B, P, K] of the scores, and the targets [B, P, K] (without P for an output [B, V]).

    Each position holds the targets that are explained there; slots that stay empty have seed 0.
    """
    batch, positions = output.shape[0], output.shape[1] if sequence else 1
    slots: list[list[list[int]]] = [[[] for _ in range(positions)] for _ in range(batch)]
    entries: list[tuple[int, int, int, int, float]] = []
    for number, seed in enumerate(found):
        for row in range(batch):
            place = int(places[number, row]) if sequence else 0
            for index, weight in zip(seed.indices[row], seed.weights[row], strict=True):
                held = slots[row][place]
                if int(index) not in held:
                    held.append(int(index))
                entries.append((number, row, place, held.index(int(index)), float(weight)))
    width = max(len(held) for row_slots in slots for held in row_slots)
    targets = np.zeros((batch, positions, width), np.int64)
    for row, row_slots in enumerate(slots):
        for place, held in enumerate(row_slots):
            targets[row, place, :len(held)] = held
    seeds = np.zeros((len(found), batch, positions, width), np.float32)
    for number, row, place, slot, weight in entries:
        seeds[number, row, place, slot] += weight * multiplier
    return (seeds, targets) if sequence else (seeds[:, :, 0], targets[:, 0])


def distinct_columns(columns: Array) -> tuple[Array, Array]:
    """Positions [targets, B] as the distinct columns [B, P] to compute, and each target's column of each row."""
    unique, inverse = np.unique(columns, axis=0, return_inverse=True)
    places = np.broadcast_to(inverse.reshape(-1, 1), columns.shape)
    return np.ascontiguousarray(unique.T), places


def with_rivals(output: Array, seeds: Array, targets: Sequence[Target]) -> Array:
    """Seeds of two relevances, [2 S, *output] of [S, *output]: those of the targets, then those of their rivals.

    Rivals are the outputs beside those that a target seeds, by their positive values; in each batch row they get the
    same total as the target, or nothing where none of them is positive.
    """
    against = np.zeros_like(seeds)
    for number, target in enumerate(targets):
        amounts = np.where(target.rivals(seeds[number]), np.maximum(output, 0), 0).reshape(len(output), -1)
        amounts = amounts.astype(np.float64)
        wanted = seeds[number].reshape(len(output), -1).sum(1, keepdims=True, dtype=np.float64)
        whole = np.array([sum(row.tolist()) if len(row) <= FEW else row.sum() for row in amounts])[:, None]
        shares = np.divide(amounts, whole, out=np.zeros_like(amounts), where=whole > 0)
        against[number] = (shares * wanted).reshape(output.shape)
    return np.concatenate([seeds, against])


def rivals_of_row(numbers: Sequence[float], chosen: int, total: float) -> list[float]:
    """What `with_rivals` gives to a row of at most `FEW` numbers of which one is chosen: the same, without arrays."""
    amounts = [number if number > 0 and place != chosen else 0.0 for place, number in enumerate(numbers)]
    whole = sum(amounts)
    return [amount / whole * total for amount in amounts] if whole > 0 else amounts
