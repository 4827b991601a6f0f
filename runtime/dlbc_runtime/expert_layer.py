"""One layer of experts: which ones each token was routed to, with what weight, the relevance they got; and what can be
counted of that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from dlbc_runtime.arrays import Array, Arrays, Json
from dlbc_runtime.errors import InputError

Order = Literal["absolute", "positive", "negative"]


@dataclass(frozen=True)
class ExpertSpec:
    """A layer of experts: its module path, how many experts are routed to, whether some are shared by all tokens, and
    how many a token is routed to (0: not known)."""

    place: str
    experts: int
    shared: bool = False
    k: int = 0

    def to_json(self) -> dict[str, Json]:
        """The same as plain JSON data."""
        return {"place": self.place, "experts": self.experts, "shared": self.shared, "k": self.k}

    @staticmethod
    def from_json(stored: Json) -> ExpertSpec:
        """Read what `to_json` wrote. ValueError when it is something else."""
        match stored:
            case {"place": str(place), "experts": int(experts), "shared": bool(shared), "k": int(k)} if (
                    experts > 0 and k >= 0):
                return ExpertSpec(place, experts, shared, k)
        raise ValueError("a layer of experts must have place, experts, shared and k")


@dataclass(frozen=True)
class ExpertShare:
    """What one expert of one layer got of a token. `expert` is None for the shared experts, which have no weight of a
    router: theirs is 1."""

    place: str
    expert: int | None
    relevance: float
    weight: float
    row: int
    token: int
    seed: int = 0


@dataclass(frozen=True, eq=False, repr=False)
class ExpertLayer:
    """The experts of one layer. `rows` are the axes of its tokens: [B, T] in a model of sequences.

    `arrays` holds `ids` int64 [*rows, k], `weights` float32 [*rows, k], `relevance` float32 [*rows, k], and `shared`
    float32 [*rows] where the layer has shared experts; tensors are converted when they are first asked for. With
    `many_targets` a target axis stands before those of relevance and shared. A token that was routed nowhere has the
    id -1, and weight and relevance 0: hidden by the mask, or not computed. InputError for shapes that do not fit.
    """

    spec: ExpertSpec
    arrays: Arrays
    many_targets: bool = False
    visible: Array | None = None

    def __post_init__(self) -> None:
        ids, weights, relevance = (self.arrays.shape(name) for name in ("ids", "weights", "relevance"))
        shared = self.arrays.shape("shared") if "shared" in self.arrays else None
        lead = int(self.many_targets)
        if (not ids or weights != ids or relevance[lead:] != ids or len(relevance) != len(ids) + lead
                or (shared is not None and shared != relevance[:-1]) or (shared is None) == self.spec.shared):
            raise InputError(
                f"ids {list(ids)}, weights {list(weights)}, relevance {list(relevance)}, shared "
                f"{shared if shared is None else list(shared)}", where=f"experts of {self.place}",
                hint="ids and weights are [*rows, k], relevance [*rows, k], or with many targets [targets, *rows, k]")

    @classmethod
    def of(cls, spec: ExpertSpec, ids: object, weights: object, relevance: object, shared: object = None, *,
           many_targets: bool = False, visible: Array | None = None) -> ExpertLayer:
        """A layer of raw arrays or tensors. `visible`: bool [B, T], the tokens that the mask shows (None: all); it
        applies to layers whose rows are these tokens."""
        arrays = {"ids": ids, "weights": weights, "relevance": relevance}
        return cls(spec, Arrays(arrays if shared is None else {**arrays, "shared": shared}), many_targets, visible)

    # What it holds

    @property
    def place(self) -> str:
        """The layer's module path."""
        return self.spec.place

    @property
    def experts(self) -> int:
        """How many experts are routed to."""
        return self.spec.experts

    @cached_property
    def ids(self) -> Array:
        """The experts of each token, int64 [*rows, k]; -1 where it was routed nowhere."""
        self.check()
        ids = self.arrays["ids"].astype(np.int64, copy=False)
        return ids if self._hidden is None else np.where(self._hidden[..., None], -1, ids)

    @cached_property
    def weights(self) -> Array:
        """What each of these experts was multiplied with, float32 [*rows, k]."""
        return self._routed("weights")

    @cached_property
    def relevance(self) -> Array:
        """The relevance of each of these experts, float32 [*rows, k], or [targets, *rows, k]."""
        return self._routed("relevance")

    @cached_property
    def shared(self) -> Array | None:
        """The relevance of the shared experts, float32 [*rows] or [targets, *rows]; None where there are none."""
        if "shared" not in self.arrays:
            return None
        shared = self.arrays["shared"].astype(np.float32, copy=False)
        return shared if self._hidden is None else np.where(self._hidden, np.float32(0), shared)

    def _routed(self, name: str) -> Array:
        """An array with 0 wherever no expert stands."""
        array = self.arrays[name].astype(np.float32, copy=False)
        nowhere = self.ids < 0
        return np.where(nowhere, np.float32(0), array) if nowhere.any() else array

    @property
    def expert_ids(self) -> Array:
        """`ids`, by the name that says of what."""
        return self.ids

    @property
    def router_weights(self) -> Array:
        """`weights`, by the name that says of what."""
        return self.weights

    @property
    def expert_relevance(self) -> Array:
        """`relevance`, by the name that says of what."""
        return self.relevance

    @cached_property
    def _hidden(self) -> Array | None:
        """Which tokens the mask hides, bool [*rows]; None where it hides none."""
        rows = self.arrays.shape("ids")[:-1]
        if self.visible is None or self.visible.size != math.prod(rows) or self.visible.all():
            return None
        return ~self.visible.reshape(rows).astype(bool)

    def check(self) -> None:
        """InputError where an id is not that of an expert."""
        ids = self.arrays["ids"]
        if ids.size and not -1 <= int(ids.min()) <= int(ids.max()) < self.experts:
            raise InputError(f"ids from {ids.min()} to {ids.max()} of {self.experts} experts",
                             where=f"experts of {self.place}", hint="ids count from 0; -1 is no expert")

    @property
    def rows(self) -> tuple[int, ...]:
        """The sizes of the axes of its tokens."""
        return self.arrays.shape("ids")[:-1]

    @property
    def k(self) -> int:
        """How many experts a token is routed to."""
        return self.arrays.shape("ids")[-1]

    @property
    def seeds(self) -> int:
        """How many targets are explained."""
        return self.arrays.shape("relevance")[0] if self.many_targets else 1

    # What can be counted

    @cached_property
    def totals(self) -> Array:
        """The relevance of each expert over all tokens, float64 [experts] or [targets, experts]; exactly 0 for one
        that no token was routed to."""
        routed = self.ids >= 0
        of_seeds = self.relevance if self.many_targets else self.relevance[None]
        found = np.stack([np.bincount(self.ids[routed], one[routed].astype(np.float64), self.experts)
                          for one in of_seeds]) if len(of_seeds) else np.zeros((0, self.experts))
        return found if self.many_targets else found[0]

    @cached_property
    def shared_total(self) -> Array:
        """The relevance of the shared experts over all tokens, float64 [] or [targets]; 0 where there are none."""
        lead = (self.seeds,) if self.many_targets else ()
        return np.zeros(lead) if self.shared is None else self.shared.reshape(*lead, -1).sum(-1, dtype=np.float64)

    @property
    def entering(self) -> Array:
        """The relevance that entered the layer's experts, float64 [] or [targets]: the sum of all columns."""
        return np.asarray(self.totals.sum(-1) + self.shared_total)

    @cached_property
    def by_token(self) -> Array:
        """The relevance that entered the experts at each token, float64 [*rows] or [targets, *rows]."""
        found = self.relevance.sum(-1, dtype=np.float64)
        return np.asarray(found if self.shared is None else found + self.shared)

    @cached_property
    def counts(self) -> Array:
        """How many tokens were routed to each expert, int64 [experts]."""
        return np.bincount(self.ids[self.ids >= 0], minlength=self.experts).astype(np.int64)

    @property
    def load(self) -> Array:
        """The share of routed tokens that went to each expert, float64 [experts]; all of them sum to k."""
        return self.counts / max(int((self.ids >= 0).any(-1).sum()), 1)

    @property
    def entropy(self) -> float:
        """The entropy of the routing frequency in nats: 0 where all goes to one expert, log(experts) where evenly."""
        shares = self.counts[self.counts > 0] / max(int(self.counts.sum()), 1)
        return float(-(shares * np.log(shares)).sum()) + 0.0

    @property
    def normalised_entropy(self) -> float:
        """The entropy over its largest, 0 to 1; 1 for a single expert."""
        return self.entropy / math.log(self.experts) if self.experts > 1 else 1.0

    @cached_property
    def coactivation(self) -> Array:
        """How many tokens were routed to both of two experts, int64 [experts, experts]; the diagonal is `counts`."""
        ids = self.ids.reshape(-1, self.k)
        pairs = ids[:, :, None] * self.experts + ids[:, None, :]
        both = (ids[:, :, None] >= 0) & (ids[:, None, :] >= 0)
        found = np.bincount(pairs[both], minlength=self.experts ** 2).astype(np.int64)
        return found.reshape(self.experts, self.experts)

    def top(self, k: int = 5, by: Order = "absolute", seed: int = 0) -> list[tuple[int, float]]:
        """The `k` experts with most relevance over all tokens, as (expert, relevance); the strongest first. Experts
        without relevance are left out."""
        totals = self.totals[seed] if self.many_targets else self.totals
        sizes = {"absolute": np.abs(totals), "positive": totals, "negative": -totals}[order(by)]
        return [(int(e), float(totals[e])) for e in np.argsort(-sizes, kind="stable")[:max(k, 0)] if sizes[e] > 0]

    def __repr__(self) -> str:
        shared = ", shared" if self.spec.shared else ""
        return f"ExpertLayer({self.place!r}, {self.experts} experts{shared}, k={self.k}, tokens={list(self.rows)})"


def order(by: str) -> str:
    """The order, if it is one; else InputError."""
    if by not in ("absolute", "positive", "negative"):
        raise InputError(f"unknown order {by!r}", where="top()", hint="absolute, positive or negative")
    return by
