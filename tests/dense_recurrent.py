"""The rules of recurrent layers by their formulas, step after step and cell after cell; see `dense.py`.

Everything is relevance itself. `e(z) = z + eps sign(z)`; a / b is 0 where b = 0. The gradient is found by a complex
step, x + i h, which has no rounding error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
TINY = 1e-9


@dataclass
class Layer:
    """A layer's numbers, taken apart by operand."""

    kind: str
    x: Array
    start: list[Array]
    w_ih: Array
    w_hh: Array
    b_ih: Array
    b_hh: Array
    lengths: Array
    reverse: bool
    activation: str

    @classmethod
    def of(cls, kind: str, operands: list[Any], attrs: dict[str, Any]) -> Layer:
        states = 2 if kind == "lstm" else 1
        x, *start = operands[:1 + states]
        w_ih, w_hh, b_ih, b_hh, lengths = (*operands[1 + states:], None, None, None)[:5]
        zero = np.zeros(len(w_ih))
        return cls(kind, x, start, w_ih, w_hh, zero if b_ih is None else b_ih, zero if b_hh is None else b_hh,
                   np.full(x.shape[1], len(x)) if lengths is None else lengths, attrs.get("reverse", False),
                   attrs.get("activation", "tanh"))

    def order(self, b: int) -> list[int]:
        """The steps that row b has, as they are taken."""
        steps = list(range(self.lengths[b]))
        return steps[::-1] if self.reverse else steps

    def gate(self, number: int) -> slice:
        size = self.start[0].shape[1]
        return slice(number * size, (number + 1) * size)

    def inside(self, x: Array, states: list[Array]) -> tuple[Array, list[Array], Array]:
        """The argument of g (LSTM), n (GRU) or the activation; the gates; and the new states stacked."""
        u, v = self.w_ih @ x + self.b_ih, self.w_hh @ states[0] + self.b_hh
        if self.kind == "rnn":
            a = u + v
            return a, [], np.stack([np.tanh(a) if self.activation == "tanh" else np.where(a.real > 0, a, 0)])
        if self.kind == "gru":
            r, z = (1 / (1 + np.exp(-(u + v)[self.gate(k)])) for k in (0, 1))
            a = u[self.gate(2)] + r * v[self.gate(2)]
            return a, [r, z], np.stack([(1 - z) * np.tanh(a) + z * states[0]])
        i, f, o = (1 / (1 + np.exp(-(u + v)[self.gate(k)])) for k in (0, 1, 3))
        a = (u + v)[self.gate(2)]
        c = f * states[1] + i * np.tanh(a)
        return a, [i, f, o], np.stack([o * np.tanh(c), c])

    def run(self, x: Array, start: list[Array]) -> list[Array]:
        """The states of all rows after each step; past its length a row keeps them, or has not begun."""
        steps, rows = x.shape[:2]
        found = np.zeros((len(start), steps, rows, start[0].shape[1]), np.result_type(x, *start))
        for b in range(rows):
            states = [state[b] for state in start]
            for t in reversed(range(steps)) if self.reverse else range(steps):
                if t < self.lengths[b]:
                    states = list(self.inside(x[t, b], states)[2])
                found[:, t, b] = states
        return list(found)


def e(z: Array, eps: float) -> Array:
    return z + np.where(z >= 0, eps, -eps)


def over(a: Array, b: Array) -> Array:
    return np.where(b == 0, 0.0, a / np.where(b == 0, 1.0, b))


Share = Callable[[Array, Array], Array]
"""Terms of a sum, stacked first, and the relevance of the sum: the relevance of each term."""


def by_epsilon(eps: float) -> Share:
    return lambda terms, r: terms * (r / e(terms.sum(axis=0), eps))


def by_size(terms: Array, r: Array) -> Array:
    size = np.abs(terms)
    return size * over(r, size.sum(axis=0))


def shared(layer: Layer, incoming: list[Array], share: Share) -> list[Array]:
    """Relevance of x and of the states at the start, [*operand] each; `incoming`: [T, B, H] of each state."""
    to_x, to_start = np.zeros(layer.x.shape), [np.zeros(state.shape) for state in layer.start]
    states = layer.run(layer.x, layer.start)
    for b in range(layer.x.shape[1]):
        taken = layer.order(b)
        r = [np.zeros(layer.start[0].shape[1]) for _ in states]
        for t in range(len(layer.x)):  # what comes in past the length was the last state's, or the first's
            if t not in taken and not layer.reverse:
                r = [own + part[t, b] for own, part in zip(r, incoming, strict=True)]
        for number in reversed(range(len(taken))):
            t = taken[number]
            before = [state[b] for state in layer.start] if number == 0 else [s[taken[number - 1], b] for s in states]
            r = [own + part[t, b] for own, part in zip(r, incoming, strict=True)]
            to_x[t, b], r = _one_step(layer, layer.x[t, b], before, r, share)
        for t in range(len(layer.x)):
            if t not in taken and layer.reverse:
                r = [own + part[t, b] for own, part in zip(r, incoming, strict=True)]
        for state, own in zip(to_start, r, strict=True):
            state[b] = own
    return [to_x, *to_start]


def _one_step(layer: Layer, x: Array, before: list[Array], r: list[Array], share: Share) -> tuple[Array, list[Array]]:
    """One cell: relevance of its input and of the states before."""
    a, gates, _ = layer.inside(x, before)
    h, factor, old = before[0], np.ones(len(a)), np.zeros(len(a))
    if layer.kind == "lstm":
        i, f, _ = gates
        old, r_a = share(np.stack([f * before[1], i * np.tanh(a)]), r[0] + r[1])  # all of h is the memory's
        chosen = layer.gate(2)
    elif layer.kind == "gru":
        factor, z = gates
        old, r_a = share(np.stack([z * h, (1 - z) * np.tanh(a)]), r[0])
        chosen = layer.gate(2)
    else:
        r_a, chosen = r[0], slice(None)
    to_x, to_h = np.zeros(x.shape), np.zeros(h.shape)
    w_ih, w_hh = layer.w_ih[chosen], layer.w_hh[chosen]
    for j in range(len(a)):
        b_ih, b_hh = layer.b_ih[chosen][j], factor[j] * layer.b_hh[chosen][j]
        biases = [b_ih, b_hh] if layer.kind == "gru" else [b_ih + b_hh]
        terms = np.array([*(w_ih[j] * x), *(factor[j] * w_hh[j] * h), *biases])
        parts = share(terms, r_a[j])
        to_x += parts[:len(x)]
        to_h += parts[len(x):len(x) + len(h)]
    return to_x, [to_h, old] if layer.kind == "lstm" else [to_h + old]


def gradient(layer: Layer, multipliers: list[Array]) -> list[Array]:
    """x dF/dx where F is the sum of the states times their multipliers."""
    given, found = [layer.x, *layer.start], []
    for number, own in enumerate(given):
        slopes = np.zeros(own.shape)
        for place in np.ndindex(*own.shape):
            moved = [array.astype(complex) for array in given]
            moved[number][place] += 1e-30j
            states = layer.run(moved[0], moved[1:])
            slopes[place] = sum(float((s.imag * m).sum()) for s, m in zip(states, multipliers, strict=True)) / 1e-30
        found.append(own * slopes)
    return found


# --- as formulas of `dense.py`: relevance comes in at h ----------------------------------------------

def _layer(site: Any) -> Layer:
    return Layer.of(site.name, list(site.x), site.attrs)


def _all(site: Any, found: list[Array]) -> list[Any]:
    return [*found, *(None,) * (len(site.x) - len(found))]


def _incoming(site: Any, r: Array) -> list[Array]:
    return [r, *(np.zeros(r.shape) for _ in _layer(site).start[1:])]


def epsilon(site: Any, r: Array) -> list[Any]:
    """Relevance that comes in as such is divided by e(h), with the rule's eps, to become a multiplier."""
    kept = site.y * over(r, e(site.y, site.params["eps"])) if site.tiny else r
    return _all(site, shared(_layer(site), _incoming(site, kept), by_epsilon(site.params["eps"])))


def absolute(site: Any, r: Array) -> list[Any]:
    return _all(site, shared(_layer(site), _incoming(site, r), by_size))


def true_gradient(site: Any, r: Array) -> list[Any]:
    return _all(site, gradient(_layer(site), _incoming(site, site.multiplier(r))))


FORMULAS = {("recurrent", "epsilon"): epsilon, ("recurrent", "absolute"): absolute,
            ("recurrent", "gradient"): true_gradient}
