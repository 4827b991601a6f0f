"""Recurrent layers: gates are weights, sums share out, and relevance goes back through time.

A rule says how much of the relevance of a step's states goes on to the states before (`Shares`); the op
`recurrence_adjoint` solves that recursion for all steps, and what input, biases and stabilisers get follows from
its results for all steps at once. Gates are computed again from the saved states, again for all steps at once.

The rules but `gradient` are those of Arras et al. 2017 (arXiv 1706.07206): of a product of gate and signal all goes
to the signal; so nothing goes through i, f and o of an LSTM, nor through r and z of a GRU. Steps past a row's length
hand on what they get.
"""

from __future__ import annotations

from dataclasses import dataclass

from dlbc.ir.core import Op, Operand, Value
from dlbc.ir.ops import STABILISER, attr
from dlbc.passes.rules import Contributions, Expansion, rule, seeded
from dlbc.passes.rules.activations import slope

RECURRENT = ("lstm", "gru", "rnn")


@dataclass(frozen=True)
class Shares:
    """The operands of `recurrence_adjoint` that say what goes on, [T, B, ...]; see there."""

    weight: Operand
    gates: Value
    keep: Value | None = None
    read: Value | None = None
    direct: Value | None = None
    into: Value | None = None


@dataclass(frozen=True)
class Found:
    """Relevance (or multipliers) of all states h and memories c [S, T, B, H], and of the states at the start."""

    h: Value
    c: Value
    start: tuple[Value, ...]


class Layer:
    """A recurrent op: its operands in float32, and the values inside its cells for all steps."""

    def __init__(self, at: Expansion, op: Op) -> None:
        self.at, self.op = at, op
        states = 2 if op.name == "lstm" else 1
        self.x, *self.start = (at.read(operand) for operand in op.operands[:1 + states])
        rest = (*op.operands[1 + states:], None, None, None)[:5]
        self.w_ih, self.w_hh, self.b_ih, self.b_hh = (at.read(operand) for operand in rest[:4])
        self.lengths = rest[4]
        self.h = at.read(op.results[0])
        self.size = op.result.type.shape[-1]
        self.before = self.previous(0)

    def previous(self, state: int) -> Value:
        """h (state 0) or c (1) before each step."""
        at, all_steps = self.at, self.op.results[state]
        steps = all_steps.type.shape[0]
        first = at.reshape(self.start[state], shape=(1, *all_steps.type.shape[1:]))
        if attr(self.op, "reverse"):
            return at.cat(at.slice_(at.read(all_steps), dim=0, start=1, stop=steps), first, dim=0)
        return at.cat(first, at.slice_(at.read(all_steps), dim=0, stop=steps - 1), dim=0)

    def part(self, whole: Operand, gate: int, dim: int = -1) -> Operand:
        """The part of one gate; None of None."""
        if whole is None or self.op.name == "rnn":
            return whole
        return self.at.slice_(whole, dim=dim, start=gate * self.size, stop=(gate + 1) * self.size)

    @property
    def bias(self) -> Operand:
        """b_ih + b_hh."""
        return self.b_ih if self.b_ih is None else self.at.add(self.b_ih, self.b_hh)

    def inner(self) -> Value:
        """What enters the gates: w_ih x + w_hh h + b [T, B, gates * H]."""
        return self.at.add(self.at.linear(self.x, self.w_ih, self.bias), self.at.linear(self.before, self.w_hh))

    def alive(self, value: Value, otherwise: float = 0.0) -> Value:
        """A value [T, B, H] at the steps that a row has, another number past its length."""
        return value if self.lengths is None else self.at.where(self._shown(), value, otherwise)

    def _shown(self) -> Value:
        at, (steps, rows, _) = self.at, self.op.result.type.shape
        return at.lt(at.reshape(at.arange(stop=steps), shape=(steps, 1, 1)),
                     at.reshape(self.lengths, shape=(1, rows, 1)))

    def back(self, r: tuple[Value | None, ...], shares: Shares) -> Found:
        """Through all steps, from what comes in at the op's results."""
        at = self.at
        read, hold = shares.read, None
        if self.lengths is not None:
            if self.op.name == "lstm":  # past its length a row's h is the h before, not read from c
                read = self.alive(read or at.full(shape=self.op.result.type.shape, value=1.0, dtype="f32"))
                hold = at.where(self._shown(), 0.0, 1.0)
            kept = shares.keep or at.full(shape=self.op.result.type.shape, value=0.0, dtype="f32")
            shares = Shares(shares.weight, self.alive(shares.gates), self.alive(kept, 1.0), read,
                            None if shares.direct is None else self.alive(shares.direct), shares.into)
        incoming = r[0] if r[0] is not None else at.zeros(seeded(self.op.result.type))
        h, c, h0, c0 = at.op(
            "recurrence_adjoint", incoming, shares.weight, shares.gates, (*r, None)[1], shares.keep, read,
            shares.direct, shares.into, hold, reverse=attr(self.op, "reverse"))
        return Found(h, c, (h0, c0) if self.op.name == "lstm" else (at.add(h0, c0),))

    def multipliers(self, to_x: Value, found: Found) -> Contributions:
        """The rule's result from multipliers; what x and the states at the start do not carry is absorbed."""
        return self._given(to_x, found, multiply=True)

    def relevances(self, to_x: Value, found: Found) -> Contributions:
        """The same from relevance itself."""
        return self._given(to_x, found, multiply=False)

    def _given(self, to_x: Value, found: Found, *, multiply: bool) -> Contributions:
        at, given = self.at, (to_x, *found.start)
        for operand, value, own in zip(self.op.operands, given, (self.x, *self.start), strict=False):
            if not at.carries(operand):
                at.absorb("constant", at.mul(value, own) if multiply else value)
        return *given, *(None,) * (len(self.op.operands) - len(given))

    def lost(self, memories: Value, *terms: Value) -> None:
        """Record what the stabilisers take of the memories' multipliers: the sum of terms [T, B, H] of it."""
        for term in terms:
            self.at.absorb("stabiliser", self.at.mul(memories, self.alive(term)))

    def unshared(self, memories: Value, total: Value, part: Value | float = 1.0) -> None:
        """Record the part of the memories' relevance for which there is nothing to share by: total is 0."""
        nothing = self.alive(self.at.where(self.at.eq(total, 0.0), part, 0.0))
        self.at.absorb("stabiliser", self.at.mul(memories, nothing))


# --- LSTM --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Cells:
    """The inside of an LSTM: gates i, f, o; g and its argument a; c after and before each step."""

    i: Value
    f: Value
    o: Value
    a: Operand
    g: Value
    c: Operand
    before: Value


def _cells(layer: Layer) -> Cells:
    at, inner = layer.at, layer.inner()
    a = layer.part(inner, 2)
    i, f, o = (at.sigmoid(layer.part(inner, gate)) for gate in (0, 1, 3))
    return Cells(i, f, o, a, at.tanh(a), at.read(layer.op.results[1]), layer.previous(1))


@rule("lstm", "epsilon", form="M")
def lstm_epsilon(at: Expansion, op: Op, m_h: Value | None, m_c: Value | None, *, eps: float = STABILISER
                 ) -> Contributions:
    """h = o tanh(c): R_c = R_h; c' = f c + i g: R_c = f c R_c' / e(c'), R_a = i g R_c' / e(c'), a = W x + W_h h + b:
    R_x = x W^T (R_a / e(a)), h likewise, b absorbs.  Arras et al. 2017.
    """
    layer = Layer(at, op)
    cells = _cells(layer)
    sums, arguments = _kept(at, cells.c, eps), _kept(at, cells.a, eps)
    to_a = at.mul(at.mul(cells.i, sums), slope(at, "tanh", {}, cells.a, cells.g))
    gates = layer.alive(at.mul(to_a, arguments))
    found = layer.back((m_h, m_c), Shares(
        layer.part(layer.w_hh, 2, 0), gates, keep=at.mul(cells.f, sums),
        read=at.mul(cells.o, slope(at, "tanh", {}, cells.c, at.tanh(cells.c)))))
    layer.lost(found.c, _taken(at, cells.c, sums), at.mul(to_a, _taken(at, cells.a, arguments)))
    share = at.mul(found.c, gates)
    _absorb_bias(at, layer.part(layer.bias, 2), share)
    return layer.multipliers(at.matmul(share, layer.part(layer.w_ih, 2, 0)), found)


@rule("lstm", "absolute", form="R")
def lstm_absolute(at: Expansion, op: Op, r_h: Value | None, r_c: Value | None) -> Contributions:
    """As `epsilon`, terms by their size: R_c = |f c| R_c' / (|f c| + |i g|), R_x = |x| |W|^T (R_a / (|W| |x| +
    |W_h| |h| + |b|)).  DL-Backtrace's shares with the gates of Arras et al. 2017.
    """
    layer = Layer(at, op)
    cells = _cells(layer)
    old, new = at.abs(at.mul(cells.f, cells.before)), at.abs(at.mul(cells.i, cells.g))
    total = at.add(old, new)
    to_a, size = at.safe_div(new, total), _sizes(layer, 2)
    gates = layer.alive(at.safe_div(to_a, size))
    found = layer.back((r_h, r_c), Shares(at.abs(layer.part(layer.w_hh, 2, 0)), gates,
                                          keep=at.safe_div(old, total), into=at.abs(layer.before)))
    layer.unshared(found.c, total)
    layer.unshared(found.c, size, to_a)
    return layer.relevances(_to_input(layer, 2, at.mul(found.c, gates)), found)


@rule("lstm", "gradient", form="M", conserves=False)
def lstm_gradient(at: Expansion, op: Op, m_h: Value | None, m_c: Value | None) -> Contributions:
    """The true adjoint, through all gates and steps."""
    layer = Layer(at, op)
    cells = _cells(layer)
    bent = at.tanh(cells.c)
    parts = [layer.alive(part) for part in (
        at.mul(cells.g, _bell(at, cells.i)), at.mul(cells.before, _bell(at, cells.f)),
        at.mul(cells.i, _arch(at, cells.g)))]
    direct = layer.alive(at.mul(bent, _bell(at, cells.o)))
    found = layer.back((m_h, m_c), Shares(layer.w_hh, at.cat(*parts, dim=-1), keep=cells.f,
                                          read=at.mul(cells.o, _arch(at, bent)), direct=direct))
    share = at.cat(*(at.mul(found.c, part) for part in parts), at.mul(found.h, direct), dim=-1)
    _absorb_bias(at, layer.bias, share)
    return layer.multipliers(at.matmul(share, layer.w_ih), found)


# --- GRU ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Updates:
    """The inside of a GRU: gates r, z; n and its argument a = w x + b + r u, where u = w h + b."""

    r: Value
    z: Value
    a: Value
    n: Value
    u: Operand


def _updates(layer: Layer) -> Updates:
    at = layer.at
    inward, across = at.linear(layer.x, layer.w_ih, layer.b_ih), at.linear(layer.before, layer.w_hh, layer.b_hh)
    r, z = (at.sigmoid(at.add(layer.part(inward, gate), layer.part(across, gate))) for gate in (0, 1))
    u = layer.part(across, 2)
    a = at.add(layer.part(inward, 2), at.mul(r, u))
    return Updates(r, z, a, at.tanh(a), u)


@rule("gru", "epsilon", form="M")
def gru_epsilon(at: Expansion, op: Op, m: Value, *, eps: float = STABILISER) -> Contributions:
    """h' = z h + (1 - z) n: R_h = z h R_h' / e(h'), R_a = (1 - z) n R_h' / e(h'), a = W x + b + r (W_h h + b_h):
    R_x = x W^T (R_a / e(a)), h likewise with r as a weight, b and r b_h absorb.  Arras et al. 2017, for the GRU.
    """
    layer = Layer(at, op)
    inside = _updates(layer)
    sums, arguments = _kept(at, layer.h, eps), _kept(at, inside.a, eps)
    to_a = at.mul(at.mul(at.sub(1.0, inside.z), sums), slope(at, "tanh", {}, inside.a, inside.n))
    gates = layer.alive(at.mul(to_a, arguments))
    found = layer.back((m,), Shares(layer.part(layer.w_hh, 2, 0), at.mul(gates, inside.r), keep=at.mul(inside.z, sums)))
    layer.lost(found.c, _taken(at, layer.h, sums), at.mul(to_a, _taken(at, inside.a, arguments)))
    share = at.mul(found.c, gates)
    _absorb_bias(at, layer.part(layer.b_ih, 2), share)
    _absorb_bias(at, layer.part(layer.b_hh, 2), at.mul(share, inside.r))
    return layer.multipliers(at.matmul(share, layer.part(layer.w_ih, 2, 0)), found)


@rule("gru", "absolute", form="R")
def gru_absolute(at: Expansion, op: Op, r: Value) -> Contributions:
    """As `epsilon`, terms by their size: |z h| against |(1 - z) n|, and |W| |x| + |b| + r (|W_h| |h| + |b_h|).

    DL-Backtrace's shares with the gates of Arras et al. 2017.
    """
    layer = Layer(at, op)
    inside = _updates(layer)
    old, new = at.abs(at.mul(inside.z, layer.before)), at.abs(at.mul(at.sub(1.0, inside.z), inside.n))
    total = at.add(old, new)
    to_a, across = at.safe_div(new, total), at.abs(layer.part(layer.w_hh, 2, 0))
    b_in, b_across = (None if b is None else at.abs(layer.part(b, 2)) for b in (layer.b_ih, layer.b_hh))
    size = at.add(at.linear(at.abs(layer.x), at.abs(layer.part(layer.w_ih, 2, 0)), b_in),
                  at.mul(inside.r, at.linear(at.abs(layer.before), across, b_across)))
    gates = layer.alive(at.safe_div(to_a, size))
    found = layer.back((r,), Shares(across, at.mul(gates, inside.r), keep=at.safe_div(old, total),
                                    into=at.abs(layer.before)))
    layer.unshared(found.c, total)
    layer.unshared(found.c, size, to_a)
    share = at.mul(found.c, gates)
    _absorb_bias(at, b_in, share)
    _absorb_bias(at, b_across, at.mul(share, inside.r))
    to_x = at.mul(at.abs(layer.x), at.matmul(share, at.abs(layer.part(layer.w_ih, 2, 0))))
    return layer.relevances(to_x, found)


@rule("gru", "gradient", form="M", conserves=False)
def gru_gradient(at: Expansion, op: Op, m: Value) -> Contributions:
    """The true adjoint, through all gates and steps."""
    layer = Layer(at, op)
    inside = _updates(layer)
    to_n = layer.alive(at.mul(at.sub(1.0, inside.z), _arch(at, inside.n)))
    to_r = at.mul(at.mul(to_n, inside.u), _bell(at, inside.r))
    to_z = layer.alive(at.mul(at.sub(layer.before, inside.n), _bell(at, inside.z)))
    found = layer.back((m,), Shares(layer.w_hh, at.cat(to_r, to_z, at.mul(to_n, inside.r), dim=-1), keep=inside.z))
    to_both, to_inner = [at.mul(found.c, to_r), at.mul(found.c, to_z)], at.mul(found.c, to_n)
    share = at.cat(*to_both, to_inner, dim=-1)
    _absorb_bias(at, layer.b_ih, share)
    _absorb_bias(at, layer.b_hh, at.cat(*to_both, at.mul(to_inner, inside.r), dim=-1))
    return layer.multipliers(at.matmul(share, layer.w_ih), found)


# --- RNN ---------------------------------------------------------------------------------------------

@rule("rnn", "epsilon", form="M")
def rnn_epsilon(at: Expansion, op: Op, m: Value, *, eps: float = STABILISER) -> Contributions:
    """h' = act(a): R_a = R_h'; a = W x + W_h h + b: R_x = x W^T (R_a / e(a)), h likewise, b absorbs.

    Arras et al. 2017.
    """
    layer = Layer(at, op)
    a = layer.inner()
    arguments, to_a = _kept(at, a, eps), slope(at, str(attr(op, "activation")), {}, a, layer.h)
    gates = layer.alive(at.mul(to_a, arguments))
    found = layer.back((m,), Shares(layer.w_hh, gates))
    layer.lost(found.c, at.mul(to_a, _taken(at, a, arguments)))
    share = at.mul(found.c, gates)
    _absorb_bias(at, layer.bias, share)
    return layer.multipliers(at.matmul(share, layer.w_ih), found)


@rule("rnn", "absolute", form="R")
def rnn_absolute(at: Expansion, op: Op, r: Value) -> Contributions:
    """R_a = R_h', R_x = |x| |W|^T (R_a / (|W| |x| + |W_h| |h| + |b|)), h likewise.  DL-Backtrace's shares."""
    layer = Layer(at, op)
    size = _sizes(layer, 0)
    gates = layer.alive(at.safe_div(at.full(shape=size.type.shape, value=1.0, dtype="f32"), size))
    found = layer.back((r,), Shares(at.abs(layer.w_hh), gates, into=at.abs(layer.before)))
    layer.unshared(found.c, size)
    return layer.relevances(_to_input(layer, 0, at.mul(found.c, gates)), found)


@rule("rnn", "gradient", form="M", conserves=False)
def rnn_gradient(at: Expansion, op: Op, m: Value) -> Contributions:
    """The true adjoint, through all steps."""
    layer = Layer(at, op)
    steep = _arch(at, layer.h) if attr(op, "activation") == "tanh" else at.cast(at.gt(layer.h, 0.0), dtype="f32")
    gates = layer.alive(steep)
    found = layer.back((m,), Shares(layer.w_hh, gates))
    share = at.mul(found.c, gates)
    _absorb_bias(at, layer.bias, share)
    return layer.multipliers(at.matmul(share, layer.w_ih), found)


# --- parts -------------------------------------------------------------------------------------------

def _kept(at: Expansion, y: Operand, eps: float) -> Value:
    """|y| / (|y| + eps): what a stabilised division by y leaves of its multiplier."""
    size = at.abs(y)
    return at.div(size, at.add(size, eps))


def _taken(at: Expansion, y: Operand, kept: Value) -> Value:
    """What it takes of y times its multiplier."""
    return at.mul(y, at.sub(1.0, kept))


def _bell(at: Expansion, y: Value) -> Value:
    """The slope of a sigmoid by its value y."""
    return at.mul(y, at.sub(1.0, y))


def _arch(at: Expansion, y: Operand) -> Value:
    """The slope of tanh by its value y."""
    return at.sub(1.0, at.mul(y, y))


def _sizes(layer: Layer, gate: int) -> Value:
    """|W| |x| + |W_h| |h| + |b| of one gate."""
    at, bias = layer.at, layer.part(layer.bias, gate)
    return at.add(
        at.linear(at.abs(layer.x), at.abs(layer.part(layer.w_ih, gate, 0)), None if bias is None else at.abs(bias)),
        at.linear(at.abs(layer.before), at.abs(layer.part(layer.w_hh, gate, 0))))


def _to_input(layer: Layer, gate: int, share: Value) -> Value:
    """|x| |W|^T share; |b| share is absorbed."""
    at, bias = layer.at, layer.part(layer.bias, gate)
    _absorb_bias(at, None if bias is None else at.abs(bias), share)
    return at.mul(at.abs(layer.x), at.matmul(share, at.abs(layer.part(layer.w_ih, gate, 0))))


def _absorb_bias(at: Expansion, bias: Operand, share: Value) -> None:
    if bias is not None:
        at.absorb("bias", at.mul(bias, share))
