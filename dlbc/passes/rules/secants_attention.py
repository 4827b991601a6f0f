"""Secants of attention and its parts: softmax, and products of two carriers. Notation as in `secants.py`."""

from __future__ import annotations

from collections.abc import Sequence

from dlbc.ir.core import Op, Operand, Value
from dlbc.ir.ops import STABILISER, attr
from dlbc.passes.rules import Contributions, Expansion
from dlbc.passes.rules.attention import Grouped, _none, _product, _swapped, grouped, is_weight
from dlbc.passes.rules.rotary import sizes
from dlbc.passes.rules.secants import NEAR, part, secant

TINY = 1e-38
"""The smallest attention weight whose logarithm is taken."""


def _middle(at: Expansion, new: Operand, old: Operand) -> Value:
    found: Value = at.mul(at.add(new, old), 0.5)
    return found


# --- softmax ---------------------------------------------------------------------------------------------

def log_sum(at: Expansion, p: Value, s: Operand, dim: int, *, partial: bool = False) -> Value:
    """`sum P (s - log P)`, which is log sum exp s: each term but for its weight. `partial`: P sums to less than 1."""
    found: Value = at.sum(at.mul(p, at.sub(s, at.log(at.clamp(p, low=TINY)))), dims=(dim,), keepdim=True)
    return at.safe_div(found, at.sum(p, dims=(dim,), keepdim=True)) if partial else found


def logarithmic_means(at: Expansion, p: tuple[Value, Value], s: tuple[Operand, Operand], dim: int, *,
                      partial: bool = False) -> Value:
    """L = dP / d(log P), where log P = s - log sum exp s; P itself where the two are equal, 0 where both are 0."""
    new, old = (log_sum(at, *each, dim, partial=partial) for each in zip(p, s, strict=True))
    return _means(at, p, at.sub(at.sub(*s), at.sub(new, old)))


def _means(at: Expansion, p: tuple[Value, Value], change: Value) -> Value:
    """dP / d(log P), with the change of log P."""
    ratio = at.safe_div(at.sub(*p), change)
    found: Value = at.where(at.le(at.abs(change), NEAR), at.mul(at.sqrt(p[0]), at.sqrt(p[1])), ratio)
    return found


def through_softmax(at: Expansion, m: Value, means: Value, dim: int, rest: Value | None = None) -> Value:
    """M_s = L (M_P - sum(L M_P) / sum(L)); `dim` counts from the end. `rest`: L of weights that nothing is read of."""
    weighted = at.mul(means, m)
    total = at.sum(means, dims=(dim,), keepdim=True)
    total = total if rest is None else at.add(total, rest)
    centre = at.safe_div(at.sum(weighted, dims=(dim,), keepdim=True), total)
    found: Value = at.sub(weighted, at.mul(means, centre))
    return found


@secant("softmax", "taylor")
def softmax(at: Expansion, op: Op, ref: Op, m: Value) -> Contributions:
    """M_s = L (M_P - sum(L M_P) / sum(L)), L the logarithmic mean of P and P': exact, since dP = L d(log P) and
    sum(dP) = 0; at equality P (M_P - sum(P M_P)), the derivative."""
    dim = _from_the_end(op)
    p = (_value(at.read(op.result)), _value(at.read(ref.result)))
    s = (at.finite(at.read(op.operands[0])), at.finite(at.read(ref.operands[0])))
    return (through_softmax(at, m, logarithmic_means(at, p, s, dim), dim),)


@secant("log_softmax", "taylor")
def log_softmax(at: Expansion, op: Op, ref: Op, m: Value) -> Contributions:
    """M_s = M_y - L sum(M_y) / sum(L), L the logarithmic mean of the probabilities."""
    dim = _from_the_end(op)
    p = (at.exp(at.read(op.result)), at.exp(at.read(ref.result)))
    s = (at.finite(at.read(op.operands[0])), at.finite(at.read(ref.operands[0])))
    means = logarithmic_means(at, p, s, dim)
    share = at.safe_div(means, at.sum(means, dims=(dim,), keepdim=True))
    return (at.sub(m, at.mul(share, at.sum(m, dims=(dim,), keepdim=True))),)


def _from_the_end(op: Op) -> int:
    dim = op.attrs["dim"]
    assert isinstance(dim, int)
    return dim if dim < 0 else dim - op.result.type.rank


def _value(operand: Operand) -> Value:
    assert isinstance(operand, Value)
    return operand


# --- fused attention: o = P v, P = softmax(s + mask), s = softcap(q k^T scale) -----------------------------

@secant("attention", ("attnlrp", "attnlrp_conserving"))
def attention(at: Expansion, op: Op, ref: Op, m: Value, *, eps: float = STABILISER, **_: float) -> Contributions:
    """M_v = P̄^T M_o, M_P = M_o v̄^T, through softmax and soft-capping by their secants, M_q = M_s k̄ scale, M_k likewise:
    all of what the change of q, k and v makes."""
    pair = _Pair(at, op, ref)
    new, old = pair.new, pair.old
    m = new.group(at.stabilised(m, at.difference(op.result), eps))
    to_v = at.matmul(_swapped(at, pair.weights), m)
    to_p = at.matmul(m, _swapped(at, _middle(at, new.v, old.v)))
    to_s = through_softmax(at, to_p, pair.means(), -1, pair.sink_means())
    if pair.cap is not None:
        raw, capped = pair.raw, pair.scores
        change = at.sub(*raw)
        bent = at.tanh(at.div(_middle(at, *raw), pair.cap))
        near = at.le(at.abs(change), NEAR * pair.cap)
        to_s = at.mul(to_s, at.where(near, at.sub(1.0, at.mul(bent, bent)), at.safe_div(at.sub(*capped), change)))
    to_s = at.mul(to_s, new.scale)
    to_q = new.ungroup(at.matmul(to_s, _middle(at, new.k, old.k)))
    to_k = at.matmul(_swapped(at, to_s), _middle(at, new.q, old.q))
    return *(part(at, o, found) if at.varies(o) else None
             for o, found in zip(op.operands[:3], (to_q, to_k, to_v), strict=True)), *_none(op)


@secant("attention", "cp")
def cp(at: Expansion, op: Op, ref: Op, m: Value, *, eps: float = STABILISER) -> Contributions:
    """M_v = P̄^T M_o, nothing to q and k: what the change of the attention weights makes is absorbed as the rule's."""
    pair = _Pair(at, op, ref)
    m = pair.new.group(at.stabilised(m, at.difference(op.result), eps))
    at.absorb("rule", at.mul(m, at.matmul(pair.change, _middle(at, pair.new.v, pair.old.v))))
    v = op.operands[2]
    return None, None, part(at, v, at.matmul(_swapped(at, pair.weights), m)) if at.varies(v) else None, *_none(op)


@secant("attention", "absolute")
def absolute(at: Expansion, op: Op, ref: Op, r: Value) -> Contributions:
    """R_v = |dv| P̄^T (R_o / (P̄ |dv| + |dP| |v̄|)); the share of |dP| is absorbed as the rule's."""
    pair = _Pair(at, op, ref)
    to_v, to_p = pair.shares(r)
    at.absorb("rule", to_p)
    return None, None, _kept(at, op.operands[2], to_v), *_none(op)


@secant("attention", "dlb")
def dlb(at: Expansion, op: Op, ref: Op, r: Value) -> Contributions:
    """By the sizes of contributions: R_v by P̄ |dv|, R_P by |dP| |v̄| of both; through softmax unchanged; to q and k by
    |dq| |k̄| and |q̄| |dk|, of turned channels by pairs.  DL-Backtrace's split, which is (1/2, 1/4, 1/4) without a
    reference."""
    pair = _Pair(at, op, ref)
    new, old = pair.new, pair.old
    to_v, to_p = pair.shares(r)
    pairs = list(zip((new.q, new.k), (old.q, old.k), op.operands, strict=False))
    q, k = (sizes(at, _middle(at, x, ref_x), o) for x, ref_x, o in pairs)
    dq, dk = (sizes(at, at.sub(x, ref_x), o) for x, ref_x, o in pairs)
    total = at.add(at.matmul(dq, _swapped(at, k)), at.matmul(q, _swapped(at, dk)))
    share = at.shared(to_p, total)
    to_q = new.ungroup(at.mul(dq, at.matmul(share, k)))
    to_k = at.mul(dk, at.matmul(_swapped(at, share), q))
    return *(_kept(at, o, found) for o, found in zip(op.operands[:3], (to_q, to_k, to_v), strict=True)), *_none(op)


def _kept(at: Expansion, operand: Operand, found: Value) -> Value | None:
    """A contribution of relevance; what a q, k or v that carries nothing would get ends here."""
    if not at.carries(operand):
        at.absorb("constant", found)
        return None
    return found


class _Pair:
    """Attention at the input and at the reference."""

    def __init__(self, at: Expansion, op: Op, ref: Op) -> None:
        self.at, self.op = at, op
        self.new, self.old = grouped(at, op), grouped(at, ref)
        self._p = (self.new.weights, self.old.weights)
        cap = attr(op, "softcap")
        self.cap = float(str(cap)) if cap is not None else None
        self.weights, self.change = _middle(at, *self._p), at.sub(*self._p)

    @property
    def raw(self) -> tuple[Value, Value]:
        """q k^T scale."""
        return self._raw(self.new), self._raw(self.old)

    def _raw(self, parts: Grouped) -> Value:
        found: Value = self.at.mul(self.at.matmul(parts.q, _swapped(self.at, parts.k)), parts.scale)
        return found

    @property
    def scores(self) -> tuple[Value, Value]:
        """softcap(q k^T scale)."""
        at, cap = self.at, self.cap
        if cap is None:
            return self.raw
        new, old = (at.mul(at.tanh(at.div(raw, cap)), cap) for raw in self.raw)
        return new, old

    def means(self) -> Value:
        """The logarithmic means of the attention weights."""
        return logarithmic_means(self.at, self._p, self._masked(), -1, partial=self.new.sinks is not None)

    def sink_means(self) -> Value | None:
        """The logarithmic means of the sinks' weights: a sink's score is the same at the reference."""
        at, sinks = self.at, self.new.sinks
        if sinks is None:
            return None
        b, heads, rows, _ = self.op.result.type.shape
        wide = self.new.group(at.expand(at.reshape(at.read(sinks), shape=(1, heads, 1, 1)), shape=(b, heads, rows, 1)))
        sums = [log_sum(at, p, s, -1, partial=True) for p, s in zip(self._p, self._masked(), strict=True)]
        new, old = (at.exp(at.clamp(at.sub(wide, total), high=0.0)) for total in sums)
        return _means(at, (new, old), at.sub(sums[1], sums[0]))

    def _masked(self) -> tuple[Value, Value]:
        """The scores that the softmax is taken of: an additive mask is part of them."""
        at, op = self.at, self.op
        scores = self.scores
        mask = op.operands[3] if len(op.operands) > 3 else None
        kind = getattr(mask, "type", None)
        if kind is not None and kind.floating:
            b, _, t, u = *op.result.type.shape[:3], op.operands[1].type.shape[2]  # type: ignore[union-attr]
            wide = at.expand(at.finite(at.read(mask)), shape=(b, op.result.type.shape[1], t, u))
            new, old = (at.add(score, self.new.group(wide)) for score in scores)
            scores = (new, old)
        return scores

    def shares(self, r: Value) -> tuple[Value, Value]:
        """All of R_o to v, by P̄ |dv|, and to P, by |dP| |v̄|."""
        at = self.at
        v, change = at.abs(_middle(at, self.new.v, self.old.v)), at.abs(self.change)
        dv = at.abs(at.sub(self.new.v, self.old.v))
        r, weights = self.new.group(r), self.weights
        share = at.shared(r, at.add(at.matmul(weights, dv), at.matmul(change, v)))
        return (at.mul(dv, at.matmul(_swapped(at, weights), share)),
                at.mul(change, at.matmul(share, _swapped(at, v))))


# --- products of two carriers: y = a b ---------------------------------------------------------------------

@secant(("matmul", "einsum"), "half")
def product_half(at: Expansion, op: Op, ref: Op, m: Value, *, eps: float = STABILISER) -> Contributions:
    """M_a = M_y b̄^T, M_b = ā^T M_y."""
    m = at.stabilised(m, at.difference(op.result), eps)
    found = _product(at, op, m, [at.middle(o) for o in op.operands])
    return tuple(part(at, o, value) if at.varies(o) else None for o, value in zip(op.operands, found, strict=True))


@secant(("matmul", "einsum"), "signal")
def product_signal(at: Expansion, op: Op, ref: Op, m: Value, *, eps: float = STABILISER) -> Contributions:
    """M_v = P̄^T M_o to the factor that is no attention weight; what the change of the weights makes is absorbed as the
    rule's. Without attention weights as `half`."""
    weights = [is_weight(at, o) for o in op.operands]
    if sum(weights) != 1:
        return product_half(at, op, ref, m, eps=eps)
    m = at.stabilised(m, at.difference(op.result), eps)
    found = _product(at, op, m, [at.middle(o) for o in op.operands])
    changes: Sequence[Operand] = [at.difference(o) if weight else at.middle(o)
                                  for o, weight in zip(op.operands, weights, strict=True)]
    at.absorb("rule", at.mul(m, getattr(at, op.name)(*changes, **op.attrs)))
    return tuple(part(at, o, value) if at.varies(o) and not weight else None
                 for o, value, weight in zip(op.operands, found, weights, strict=True))


@secant(("matmul", "einsum"), "share")
def product_share(at: Expansion, op: Op, ref: Op, r: Value) -> Contributions:
    """R_a = |da| ((R_y / (|da| |b̄| + |ā| |db|)) |b̄|^T), b likewise: each term's share of both products."""
    sizes = [at.abs(at.middle(o)) for o in op.operands]
    changes = [at.abs(at.difference(o)) if at.varies(o) else None for o in op.operands]
    totals = [getattr(at, op.name)(*(change if i == j else size for j, size in enumerate(sizes)), **op.attrs)
              for i, change in enumerate(changes) if change is not None]
    share = at.shared(r, totals[0] if len(totals) == 1 else at.add(*totals))
    found = _product(at, op, share, sizes)
    return tuple(None if change is None else _kept(at, o, at.mul(change, value))
                 for o, change, value in zip(op.operands, changes, found, strict=True))
