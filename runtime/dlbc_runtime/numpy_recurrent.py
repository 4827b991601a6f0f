"""Recurrent layers in numpy: forward, and relevance back through their steps. Part of `numpy_kernels`."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"


def lstm(x: Array, h0: Array, c0: Array, w_ih: Array, w_hh: Array, b_ih: Array | None = None,
         b_hh: Array | None = None, lengths: Array | None = None, *, reverse: bool = False) -> tuple[Array, Array]:
    """h and c after each step, [T, B, H]; see the op `lstm`."""
    inward, across = _affine(x, w_ih, b_ih, b_hh), _turned(w_hh)
    states, cells = (np.empty((*x.shape[:2], h0.shape[1]), x.dtype) for _ in range(2))
    h, c = h0, c0
    for t in _order(len(x), reverse):
        i, f, g, o = np.split(inward[t] + h @ across, 4, axis=-1)
        new_c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        new_h = _sigmoid(o) * np.tanh(new_c)
        h, c = _kept(lengths, t, new_h, h), _kept(lengths, t, new_c, c)
        states[t], cells[t] = h, c
    return states, cells


def gru(x: Array, h0: Array, w_ih: Array, w_hh: Array, b_ih: Array | None = None, b_hh: Array | None = None,
        lengths: Array | None = None, *, reverse: bool = False) -> Array:
    """h after each step, [T, B, H]; see the op `gru`."""
    inward, across, h = _affine(x, w_ih, b_ih), _turned(w_hh), h0
    states = np.empty((*x.shape[:2], h0.shape[1]), x.dtype)
    for t in _order(len(x), reverse):
        outward = h @ across if b_hh is None else h @ across + b_hh
        (a_r, a_z, a_n), (u_r, u_z, u_n) = np.split(inward[t], 3, axis=-1), np.split(outward, 3, axis=-1)
        n, z = np.tanh(a_n + _sigmoid(a_r + u_r) * u_n), _sigmoid(a_z + u_z)
        h = _kept(lengths, t, n + z * (h - n), h)
        states[t] = h
    return states


def rnn(x: Array, h0: Array, w_ih: Array, w_hh: Array, b_ih: Array | None = None, b_hh: Array | None = None,
        lengths: Array | None = None, *, activation: str = "tanh", reverse: bool = False) -> Array:
    """h after each step, [T, B, H]; see the op `rnn`."""
    inward, across, h = _affine(x, w_ih, b_ih, b_hh), _turned(w_hh), h0
    states = np.empty((*x.shape[:2], h0.shape[1]), x.dtype)
    for t in _order(len(x), reverse):
        a = inward[t] + h @ across
        h = _kept(lengths, t, np.tanh(a) if activation == "tanh" else np.maximum(a, 0), h)
        states[t] = h
    return states


def recurrence_adjoint(r: Array, weight: Array, gates: Array, cells: Array | None = None, keep: Array | None = None,
                       read: Array | None = None, direct: Array | None = None, into: Array | None = None,
                       hold: Array | None = None, *, reverse: bool = False) -> tuple[Array, Array, Array, Array]:
    """h and c of every step, [S, T, B, H], and what goes to the states before the first; see the op."""
    seeds, steps, batch, size = r.shape
    parts = gates.reshape(steps, batch, -1, size)
    states, memories = np.empty_like(r), np.empty_like(r)
    h_back = c_back = np.zeros((seeds, batch, size), r.dtype)
    for t in _order(steps, not reverse):
        h = states[:, t] = r[:, t] + h_back
        c = (h if read is None else h * read[t]) + c_back
        c = memories[:, t] = c if cells is None else c + cells[:, t]
        share = (c[..., None, :] * parts[t]).reshape(seeds, batch, -1)
        share = share if direct is None else np.concatenate((share, h * direct[t]), -1)
        h_back = (share.reshape(seeds * batch, -1) @ weight).reshape(seeds, batch, size)
        if into is not None:
            h_back = h_back * into[t]
        if hold is not None:
            h_back = h_back + h * hold[t]
        if keep is not None:
            c_back = c * keep[t]
    return states, memories, h_back, c_back


def _affine(x: Array, weight: Array, *biases: Array | None) -> Array:
    """What goes into the gates of all steps: one product."""
    y = (x.reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], len(weight))
    for bias in biases:
        y = y if bias is None else y + bias
    return np.asarray(y)


def _turned(weight: Array) -> Array:
    return np.ascontiguousarray(weight.T)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def _order(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def _kept(lengths: Array | None, t: int, new: Array, old: Array) -> Array:
    """The new state, the old one in rows that have ended."""
    return new if lengths is None else np.where((lengths > t)[:, None], new, old)
