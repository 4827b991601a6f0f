"""Bounds that a rule assumes of an input: data beyond them is an error, not a wrong explanation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dlbc_runtime.arrays import Array, Json
from dlbc_runtime.errors import InputError

SLACK = 1e-3
"""By how much of their range data may exceed bounds, which people write with a few digits."""


@dataclass(frozen=True)
class Bounds:
    """The smallest and largest values that `input` may have: one number each, or one for each channel along `axis`."""

    input: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    axis: int = 1

    def check(self, array: Array) -> None:
        """InputError where an array (floating, any shape) lies outside, by more than rounding."""
        low, high = np.asarray(self.low, np.float64), np.asarray(self.high, np.float64)
        if len(low) == 1:
            low, high = low.reshape(()), high.reshape(())
        else:
            if array.ndim <= self.axis or array.shape[self.axis] != len(low):
                raise InputError(f"rule `zbox` has bounds for {len(low)} channels, input `{self.input}` has shape "
                                 f"{list(array.shape)}", hint="give one number, or one for each channel")
            shape = [1] * array.ndim
            shape[self.axis] = len(low)
            low, high = low.reshape(shape), high.reshape(shape)
        slack = SLACK * (high - low)
        for name, beyond in (("low", low - array), ("high", array - high)):
            if array.size and bool((beyond > slack).any()):
                place = np.unravel_index(int(np.argmax(beyond - slack)), array.shape)
                bound = float(np.broadcast_to(low if name == "low" else high, array.shape)[place])
                raise InputError(
                    f"input `{self.input}` goes {float(beyond[place]):.3g} {'below' if name == 'low' else 'above'} the "
                    f"bound `{name}={bound:g}` of rule `zbox`: it holds {float(array[place]):.6g}",
                    where=f"at {list(map(int, place))}",
                    hint="give the smallest and largest values that inputs can have, after normalisation: "
                         "zbox(low=[...], high=[...]) with one number per channel, or a preset's "
                         "epsilon-gamma-box{low=...,high=...}")

    def to_json(self) -> list[Json]:
        """The same as plain JSON data."""
        return [self.input, list(self.low), list(self.high), self.axis]

    @classmethod
    def from_json(cls, data: Any) -> Bounds:
        """What `to_json` wrote. ValueError or TypeError for something else."""
        name, low, high, axis = data
        return cls(str(name), tuple(map(float, low)), tuple(map(float, high)), int(axis))
