"""Recurrent layers in torch: forward, and relevance back through their steps. Part of `torch_kernels`.

What a step takes from the input is one product for all steps; what it takes from the state before is one product
per step, for all seeds and rows at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lstm(x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
         b_hh: Tensor | None = None, lengths: Tensor | None = None, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """h and c after each step, [T, B, H]; see the op `lstm`. torch's own gives no c but the last."""
    inward = _inward(x, w_ih, b_ih, b_hh)
    states, cells = (x.new_empty((*x.shape[:2], h0.shape[1])) for _ in range(2))
    h, c = h0, c0
    for t in _order(len(x), reverse):
        i, f, g, o = torch.addmm(inward[t], h, w_hh.mT).chunk(4, -1)
        new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        new_h = torch.sigmoid(o) * torch.tanh(new_c)
        h, c = _kept(lengths, t, new_h, h), _kept(lengths, t, new_c, c)
        states[t], cells[t] = h, c
    return states, cells


def gru(x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None,
        lengths: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """h after each step, [T, B, H]; see the op `gru`."""
    inward, h = F.linear(x, w_ih, b_ih), h0
    states = x.new_empty((*x.shape[:2], h0.shape[1]))
    for t in _order(len(x), reverse):
        (a_r, a_z, a_n), (u_r, u_z, u_n) = inward[t].chunk(3, -1), F.linear(h, w_hh, b_hh).chunk(3, -1)
        n = torch.tanh(a_n + torch.sigmoid(a_r + u_r) * u_n)
        h = _kept(lengths, t, torch.lerp(n, h, torch.sigmoid(a_z + u_z)), h)
        states[t] = h
    return states


def rnn(x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None,
        lengths: Tensor | None = None, *, activation: str = "tanh", reverse: bool = False) -> Tensor:
    """h after each step, [T, B, H]; see the op `rnn`."""
    inward, h = _inward(x, w_ih, b_ih, b_hh), h0
    states = x.new_empty((*x.shape[:2], h0.shape[1]))
    for t in _order(len(x), reverse):
        a = torch.addmm(inward[t], h, w_hh.mT)
        h = _kept(lengths, t, torch.tanh(a) if activation == "tanh" else torch.relu(a), h)
        states[t] = h
    return states


def recurrence_adjoint(r: Tensor, weight: Tensor, gates: Tensor, cells: Tensor | None = None,
                       keep: Tensor | None = None, read: Tensor | None = None, direct: Tensor | None = None,
                       into: Tensor | None = None, hold: Tensor | None = None, *, reverse: bool = False
                       ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h and c of every step, [S, T, B, H], and what goes to the states before the first; see the op."""
    seeds, steps, batch, size = r.shape
    parts = gates.reshape(steps, batch, -1, size)
    states, memories = torch.empty_like(r), torch.empty_like(r)
    h_back = c_back = r.new_zeros(seeds, batch, size)
    for t in _order(steps, not reverse):
        h = torch.add(r[:, t], h_back, out=states[:, t])
        c = torch.add(h if read is None else h * read[t], c_back, out=memories[:, t])
        if cells is not None:
            c += cells[:, t]
        share = (c.unsqueeze(-2) * parts[t]).flatten(-2)
        share = share if direct is None else torch.cat((share, h * direct[t]), -1)
        h_back = torch.matmul(share, weight)
        if into is not None:
            h_back *= into[t]
        if hold is not None:
            h_back += h * hold[t]
        if keep is not None:
            c_back = c * keep[t]
    return states, memories, h_back, c_back


def _inward(x: Tensor, weight: Tensor, *biases: Tensor | None) -> Tensor:
    """What goes into the gates of all steps from x and the biases."""
    given = [bias for bias in biases if bias is not None]
    return F.linear(x, weight, sum(given[1:], given[0]) if given else None)


def _order(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def _kept(lengths: Tensor | None, t: int, new: Tensor, old: Tensor) -> Tensor:
    """The new state, the old one in rows that have ended."""
    return new if lengths is None else torch.where((lengths > t).unsqueeze(-1), new, old)
