"""Means with standard errors, paired comparisons and rank correlation: small enough to need no scipy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dlbc_runtime.arrays import Array

EXACT = 14
"""Up to so many items, the permutation test goes through all 2^n sign flips."""

FLIPS = 10_000
"""Sign flips drawn for more items: a p-value is then good to about 1/sqrt(FLIPS * p)."""


def mean(values: Array) -> float:
    """The mean of the finite values; NaN when there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def standard_error(values: Array) -> float:
    """Of the mean over independent items: sqrt(sum (x - mean)^2 / (n - 1) / n). NaN for fewer than two."""
    finite = values[np.isfinite(values)]
    return float(finite.std(ddof=1) / math.sqrt(finite.size)) if finite.size > 1 else math.nan


@dataclass(frozen=True)
class Paired:
    """Two methods on the same items: mean of a - b, its standard error, and how likely as much is by chance.

    `p` is of the two-sided permutation test that flips the signs of the differences: exact up to 14 items.
    """

    a: str
    b: str
    metric: str
    difference: float
    standard_error: float
    p: float
    items: int

    def __str__(self) -> str:
        return (f"{self.a} - {self.b}: {self.metric} {self.difference:+.3f} ± {self.standard_error:.3f} "
                f"(p = {self.p:.2g}, n = {self.items})")


def sign_flip_p(differences: Array) -> float:
    """The share of all sign flips (or of 10,000 drawn ones, always the same) whose |sum| reaches that observed.

    Fisher's randomisation test; drawn flips count the observed one, (1 + hits) / (1 + draws).
    """
    count = len(differences)
    if count == 0:
        return math.nan
    if count <= EXACT:
        signs = 1.0 - 2.0 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        extra = 0
    else:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (FLIPS, count))
        extra = 1
    observed = abs(differences.sum())
    sums = np.abs(signs @ differences)
    hits = int((sums >= observed * (1 - 1e-9) - 1e-300).sum())
    return (hits + extra) / (len(signs) + extra)


def ranks(values: Array) -> Array:
    """Ranks from 0 of a vector, equal values sharing the mean of theirs, float64 [n]."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    found: Array = (last - (counts + 1) / 2)[inverse.ravel()]
    return found


def rank_correlation(a: Array, b: Array) -> float:
    """Spearman's correlation of two maps with the same number of elements, ties sharing their rank.

    NaN where it is not defined: one of them is constant (or holds NaN) and they are not equal. Equal maps have 1.
    """
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or not a.size:
        return math.nan
    if np.array_equal(a, b):
        return 1.0
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale else math.nan
