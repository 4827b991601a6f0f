"""Reference functions of recurrent layers: one step after the other, in float64 (see `reference.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"
Cell: TypeAlias = "Callable[[int, tuple[Array, ...]], tuple[Array, ...]]"


def lstm(x: Array, h0: Array, c0: Array, w_ih: Array, w_hh: Array, b_ih: Array | None = None,
         b_hh: Array | None = None, lengths: Array | None = None, *, reverse: bool) -> tuple[Array, Array]:
    """h and c after each step."""
    def cell(t: int, states: tuple[Array, ...]) -> tuple[Array, ...]:
        h, c = states
        i, f, g, o = np.split(_affine(x[t], w_ih, b_ih) + _affine(h, w_hh, b_hh), 4, axis=-1)
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        return _sigmoid(o) * np.tanh(c), c

    h, c = _steps(cell, (h0, c0), len(x), lengths, reverse)
    return h, c


def gru(x: Array, h0: Array, w_ih: Array, w_hh: Array, b_ih: Array | None = None, b_hh: Array | None = None,
        lengths: Array | None = None, *, reverse: bool) -> Array:
    """h after each step."""
    def cell(t: int, states: tuple[Array, ...]) -> tuple[Array, ...]:
        (h,) = states
        (a_r, a_z, a_n), (u_r, u_z, u_n) = (np.split(part, 3, axis=-1) for part in (
            _affine(x[t], w_ih, b_ih), _affine(h, w_hh, b_hh)))
        r, z = _sigmoid(a_r + u_r), _sigmoid(a_z + u_z)
        return ((1 - z) * np.tanh(a_n + r * u_n) + z * h,)

    return _steps(cell, (h0,), len(x), lengths, reverse)[0]


def rnn(x: Array, h0: Array, w_ih: Array, w_hh: Array, b_ih: Array | None = None, b_hh: Array | None = None,
        lengths: Array | None = None, *, activation: str, reverse: bool) -> Array:
    """h after each step."""
    def cell(t: int, states: tuple[Array, ...]) -> tuple[Array, ...]:
        a = _affine(x[t], w_ih, b_ih) + _affine(states[0], w_hh, b_hh)
        return (np.tanh(a) if activation == "tanh" else np.maximum(a, 0),)

    return _steps(cell, (h0,), len(x), lengths, reverse)[0]


def recurrence_adjoint(r: Array, weight: Array, gates: Array, cells: Array | None = None, keep: Array | None = None,
                       read: Array | None = None, direct: Array | None = None, into: Array | None = None,
                       hold: Array | None = None, *, reverse: bool) -> tuple[Array, Array, Array, Array]:
    """h and c of every step, and what goes to the states before the first (see the op)."""
    seeds, steps, batch, size = r.shape
    states, memories = np.zeros(r.shape), np.zeros(r.shape)
    h_back, c_back = np.zeros((seeds, batch, weight.shape[1])), np.zeros((seeds, batch, size))
    for t in range(steps) if reverse else reversed(range(steps)):
        h = states[:, t] = r[:, t] + h_back
        c = memories[:, t] = (0 if cells is None else cells[:, t]) + c_back + h * (1 if read is None else read[t])
        parts = [c * part for part in np.split(gates[t], gates.shape[-1] // size, axis=-1)]
        parts += [] if direct is None else [h * direct[t]]
        h_back = np.concatenate(parts, axis=-1) @ weight * (1 if into is None else into[t])
        h_back = h_back + h * (0 if hold is None else hold[t])
        c_back = c * (0 if keep is None else keep[t])
    return states, memories, h_back, c_back


def _steps(cell: Cell, states: tuple[Array, ...], count: int, lengths: Array | None, reverse: bool
           ) -> tuple[Array, ...]:
    """The states after each of `count` steps; past its length a row keeps them."""
    found = [np.zeros((count, *state.shape)) for state in states]
    order: Iterable[int] = reversed(range(count)) if reverse else range(count)
    for t in order:
        after = cell(t, states)
        if lengths is not None:
            after = tuple(np.where((t < lengths)[:, None], new, old) for new, old in zip(after, states, strict=True))
        states = after
        for all_steps, state in zip(found, states, strict=True):
            all_steps[t] = state
    return tuple(found)


def _affine(x: Array, weight: Array, bias: Array | None) -> Array:
    y: Array = x @ weight.T
    return y if bias is None else y + bias


def _sigmoid(x: Array) -> Array:
    return np.asarray(np.exp(-np.logaddexp(0, -x)))


RECURRENT: dict[str, Callable[..., Array | tuple[Array, ...]]] = {
    "lstm": lstm, "gru": gru, "rnn": rnn, "recurrence_adjoint": recurrence_adjoint}
