"""Attention: fused, and its parts (softmax, products of two carriers) for attention written out.

Notation: s = q k^T scale, P = softmax(s + mask), o = P v. Masked entries have P = 0 and get exactly 0.
Heads that share a key group are stacked along the query axis, so products sum over the group by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dlbc.ir.core import Op, Operand, Value, Weight
from dlbc.ir.ops import STABILISER, attr
from dlbc.passes.rules import Contributions, Expansion, rule
from dlbc.passes.rules.linear import LinearMap
from dlbc.passes.rules.rotary import sizes


@dataclass(frozen=True)
class Grouped:
    """q, k, v and P of an attention op with the H heads as [G, H / G * T] query rows."""

    at: Expansion
    op: Op
    scale: float
    q: Value
    k: Value
    v: Value

    @property
    def sinks(self) -> Operand:
        """The score of each head that no key has, [H]; None without."""
        return self.op.operands[4] if len(self.op.operands) > 4 else None

    @property
    def weights(self) -> Value:
        """P [B, G, H/G * T, U]; with sinks its rows sum to less than 1."""
        names = ("scale", "causal", "window", "softcap")
        attrs = {name: attr(self.op, name) for name in names}
        p = self.at.attention_weights(*(self.at.read(o) for i, o in enumerate(self.op.operands) if i != 2), **attrs)
        return self.group(p)

    def group(self, value: Value) -> Value:
        """[..., B, H, T, X] as [..., B, G, H/G * T, X]."""
        *front, heads, rows, width = value.type.shape
        groups = self.k.type.shape[1]
        return value if heads == groups else self.at.reshape(
            value, shape=(*front, groups, heads // groups * rows, width))

    def ungroup(self, value: Value) -> Value:
        """The query's own layout [S, B, H, T, X] again."""
        s, b, *_, width = value.type.shape
        _, heads, rows, _ = self.op.result.type.shape
        return self.at.reshape(value, shape=(s, b, heads, rows, width)) if heads != self.k.type.shape[1] else value

    def softcap_slope(self) -> Value | None:
        """softcap(s) / s, the identity rule of soft-capping; None without."""
        cap = attr(self.op, "softcap")
        if cap is None:
            return None
        scores = self.at.mul(self.at.matmul(self.q, _swapped(self.at, self.k)), self.scale)
        capped = self.at.mul(self.at.tanh(self.at.div(scores, cap)), cap)
        return self.at.where(self.at.eq(scores, 0.0), 1.0, self.at.safe_div(capped, scores))


def grouped(at: Expansion, op: Op) -> Grouped:
    """The operands of an attention op laid out by key group."""
    q, k, v = (_value(at, at.read(o)) for o in op.operands[:3])
    scale = op.attrs["scale"]
    assert isinstance(scale, float)
    parts = Grouped(at, op, scale, q, k, v)
    return Grouped(at, op, scale, parts.group(q), k, v)


def _value(at: Expansion, operand: Operand) -> Value:
    """An operand as a value: a weight (learned queries) becomes one."""
    if isinstance(operand, Value):
        return operand
    assert isinstance(operand, Weight)
    return at.reshape(operand, shape=operand.type.shape)


@rule("attention", "attnlrp", form="M", conserves=False)
def attnlrp(at: Expansion, op: Op, m: Value, *, eps: float = STABILISER) -> Contributions:
    """R_v = v P^T (R_o / e(2 o)), R_P = P ((R_o / e(2 o)) v^T), R_s = s (R_P - P sum(R_P)),
    R_q = q (R_s / s) k scale / 2, k likewise.  Achtibat et al. 2024, arXiv 2402.05602 (Taylor rule at softmax).
    """
    m = at.mul(at.stabilised(m, at.read(op.result), eps), 0.5)
    return _bilinear(at, op, m, share=0.5)


@rule("attention", "attnlrp_conserving", form="M", conserves=False)
def attnlrp_conserving(at: Expansion, op: Op, m: Value, *, eps: float = STABILISER) -> Contributions:
    """As `attnlrp`; what softmax absorbs of a head goes to that head's v: M_v c with c = 2 - sum(R_s) / sum(R_v),
    kept within 0 and 3; the rest is the rule's. What a sink would get is part of that.  This project.

    sum(R_s) and sum(R_v) are over the rows and keys of one head. Not linear in the seed.
    """
    m = at.mul(at.stabilised(m, at.read(op.result), eps), 0.5)
    to_q, to_k, _, *rest = _bilinear(at, op, m, share=0.5, absorbs=False)
    assert to_q is not None
    to_v = at.sum(at.mul(m, at.read(op.result)), dims=(-2, -1), keepdim=True)
    to_s = at.sum(at.mul(to_q, at.read(op.operands[0])), dims=(-2, -1), keepdim=True)
    factor = at.where(at.eq(to_v, 0.0), 1.0, at.sub(2.0, at.mul(at.safe_div(to_s, to_v), 2.0)))
    parts = grouped(at, op)
    kept = parts.group(at.mul(m, at.clamp(factor, low=0.0, high=3.0)))
    return to_q, to_k, at.matmul(_swapped(at, parts.weights), kept), *rest


@rule("attention", "gradient", form="M", conserves=False)
def gradient(at: Expansion, op: Op, m: Value) -> Contributions:
    """The true adjoint in q, k and v."""
    return _bilinear(at, op, m, share=1.0, derivative=True)


@rule("attention", "cp", form="M")
def cp(at: Expansion, op: Op, m: Value, *, eps: float = STABILISER) -> Contributions:
    """R_v = v P^T (R_o / e(o)), nothing to q and k: P is a weight.  Ali et al. 2022."""
    parts = grouped(at, op)
    kept = at.stabilised(m, at.read(op.result), eps)
    if not at.carries(op.operands[2]):
        at.absorb("constant", at.mul(kept, at.read(op.result)))
    kept = parts.group(kept)
    return None, None, at.matmul(_swapped(at, parts.weights), kept), *_none(op)


@rule("attention", "absolute", form="R")
def absolute(at: Expansion, op: Op, r: Value) -> Contributions:
    """R_v = |v| P^T (R_o / (P |v|)), nothing to q and k."""
    parts = grouped(at, op)
    to_v, _ = _shares(at, parts, r)
    _absorb_constants(at, op, (None, None, to_v))
    return None, None, to_v, *_none(op)


@rule("attention", "dlb", form="R")
def dlb(at: Expansion, op: Op, r: Value) -> Contributions:
    """Half to v by `absolute`; half over keys by the share |P_ij v_jd|, through softmax unchanged, then half
    each to q and k by the share |q k|: (v, q, k) = (1/2, 1/4, 1/4) of R_o.  DL-Backtrace's split, with the
    attention weights and the mask respected. |q| and |k| of channels that rotary embedding turned are those of the
    pair (its root mean square), which say nothing of where the token stands.
    """
    parts = grouped(at, op)
    to_v, to_p = _shares(at, parts, at.mul(r, 0.5), halves=2)
    q, k = sizes(at, parts.q, op.operands[0]), sizes(at, parts.k, op.operands[1])
    share = at.mul(at.shared(to_p, at.matmul(q, _swapped(at, k))), 0.5)
    to_q = at.mul(q, at.matmul(share, k))
    to_k = at.mul(k, at.matmul(_swapped(at, share), q))
    _absorb_constants(at, op, (to_q, to_k, to_v))
    return parts.ungroup(to_q), to_k, to_v, *_none(op)


@rule("attention", "dlb_0_1", form="R", conserves=False)
def dlb_0_1(at: Expansion, op: Op, r: Value) -> Contributions:
    """Per head sum(R) |v| / sum |v| / 2 to v, and a quarter likewise to q and k.  dl-backtrace 0.1.24.

    What that release computes in effect: attention weights and masks play no part.
    """
    q, k, v = (at.abs(at.read(o)) for o in op.operands[:3])
    heads, groups = q.type.shape[1], k.type.shape[1]
    total = at.sum(r, dims=(-2, -1), keepdim=True)
    s, b = total.type.shape[:2]
    by_group = total if heads == groups else at.sum(
        at.reshape(total, shape=(s, b, groups, heads // groups, 1)), dims=(3,), keepdim=True)

    def spread(x: Value, amount: Value, part: float) -> Value:
        return at.mul(x, at.mul(at.safe_div(amount, at.sum(x, dims=(-2, -1), keepdim=True)), part))

    return spread(q, total, 0.25), spread(k, by_group, 0.25), spread(v, by_group, 0.5), *_none(op)


def _bilinear(at: Expansion, op: Op, m: Value, *, share: float, derivative: bool = False,
              absorbs: bool = True) -> Contributions:
    parts = grouped(at, op)
    m, p = parts.group(m), parts.weights
    to_v = at.matmul(_swapped(at, p), m)
    to_p = at.matmul(m, _swapped(at, parts.v))
    spent = at.sum(at.mul(p, to_p), dims=(-1,), keepdim=True)
    to_s = at.mul(p, at.sub(to_p, spent))
    if absorbs and parts.sinks is not None:
        _absorb_sinks(at, parts, p, spent)
    slope = parts.softcap_slope()
    if slope is not None:
        cap = attr(op, "softcap")
        scores = at.mul(at.matmul(parts.q, _swapped(at, parts.k)), parts.scale)
        bent = at.tanh(at.div(scores, cap))
        to_s = at.mul(to_s, at.sub(1.0, at.mul(bent, bent)) if derivative else slope)
    to_s = at.mul(to_s, share * parts.scale)
    return (parts.ungroup(at.matmul(to_s, parts.k)), at.matmul(_swapped(at, to_s), parts.q), to_v, *_none(op))


def _absorb_sinks(at: Expansion, parts: Grouped, p: Value, spent: Value) -> None:
    """The sink's score is a constant of the model: R = s M_s with M_s = P (0 - sum(P M_P)), since its value is 0."""
    left = at.sub(1.0, at.sum(p, dims=(-1,), keepdim=True))
    heads = parts.op.result.type.shape[1]
    scores = at.reshape(at.read(parts.sinks), shape=(heads, 1, 1))
    at.absorb("constant", at.neg(at.mul(parts.ungroup(at.mul(spent, left)), scores)))


def _absorb_constants(at: Expansion, op: Op, found: Sequence[Value | None]) -> None:
    """What a constant q, k or v would get ends here."""
    for operand, value in zip(op.operands, found, strict=False):
        if value is not None and not at.carries(operand):
            at.absorb("constant", value)


def _shares(at: Expansion, parts: Grouped, r: Value, *, halves: int = 1) -> tuple[Value, Value]:
    """All of R_o by the share |P v|: as relevance of v, and as relevance of P (each takes the whole)."""
    p, v = parts.weights, at.abs(parts.v)
    r, total = parts.group(r), at.matmul(p, v)
    for _ in range(halves):
        at.absorb("stabiliser", at.where(at.eq(total, 0.0), r, 0.0))
    share = at.safe_div(r, total)
    return at.mul(v, at.matmul(_swapped(at, p), share)), at.mul(p, at.matmul(share, _swapped(at, v)))


def _swapped(at: Expansion, value: Value) -> Value:
    """The last two axes exchanged."""
    rank = value.type.rank
    return at.permute(value, dims=(*range(rank - 2), rank - 1, rank - 2))


def _none(op: Op) -> tuple[None, ...]:
    return (None,) * (len(op.operands) - 3)


# --- the parts: softmax, and products of two carriers ------------------------------------------------

@rule("softmax", "taylor", form="M", conserves=False)
def softmax_taylor(at: Expansion, op: Op, m: Value) -> Contributions:
    """R_s = s (R_P - P sum(R_P)); M_s = P (M_P - sum(P M_P)).  Achtibat et al. 2024: first-order Taylor.

    The same as the true adjoint.
    """
    dim = op.attrs["dim"]
    assert isinstance(dim, int)
    y, seeds = at.read(op.result), dim if dim < 0 else dim + 1
    return (at.mul(y, at.sub(m, at.sum(at.mul(y, m), dims=(seeds,), keepdim=True))),)


@rule("log_softmax", "taylor", form="M", conserves=False)
def log_softmax_taylor(at: Expansion, op: Op, m: Value) -> Contributions:
    """M_s = M_y - exp(y) sum(M_y): the true adjoint."""
    dim = op.attrs["dim"]
    assert isinstance(dim, int)
    seeds = dim if dim < 0 else dim + 1
    return (at.sub(m, at.mul(at.exp(at.read(op.result)), at.sum(m, dims=(seeds,), keepdim=True))),)


@rule(("softmax", "log_softmax"), "pass", form="R")
def softmax_identity(at: Expansion, op: Op, r: Value) -> Contributions:
    """R_s = R_P.  DL-Backtrace."""
    return (r,)


@rule(("matmul", "einsum"), "half", form="M")
def product_half(at: Expansion, op: Op, m: Value, *, eps: float = STABILISER) -> Contributions:
    """R_a = a (R_y / e(2 y)) b^T, b likewise.  Achtibat et al. 2024, proposition 3.3."""
    return _product(at, op, at.mul(at.stabilised(m, at.read(op.result), eps), _part(at, op)))


@rule(("matmul", "einsum"), "product_gradient", form="M", conserves=False)
def product_gradient(at: Expansion, op: Op, m: Value) -> Contributions:
    """M_a = M_y b^T, M_b = a^T M_y: the true adjoint."""
    return _product(at, op, m)


@rule(("matmul", "einsum"), "signal", form="M")
def product_signal(at: Expansion, op: Op, m: Value, *, eps: float = STABILISER) -> Contributions:
    """All to the factor that is no attention weight (no softmax); R_v = v P^T (R_o / e(o)).  Ali et al. 2022."""
    softmaxes = [is_weight(at, o) for o in op.operands]
    if sum(softmaxes) != 1:
        return product_half(at, op, m, eps=eps)
    found = _product(at, op, at.stabilised(m, at.read(op.result), eps))
    return tuple(None if weight else value for weight, value in zip(softmaxes, found, strict=True))


@rule(("matmul", "einsum"), "share", form="R")
def product_share(at: Expansion, op: Op, r: Value) -> Contributions:
    """Half to each factor by the share |a_ik b_kj| of each term.  DL-Backtrace's split."""
    sizes = [at.abs(at.read(o)) for o in op.operands]
    share = at.mul(at.shared(r, getattr(at, op.name)(*sizes, **op.attrs)), _part(at, op))
    return tuple(at.mul(size, found) for size, found in zip(sizes, _product(at, op, share, sizes), strict=True))


@rule(("matmul", "einsum"), "signal_relevance", form="R")
def product_signal_relevance(at: Expansion, op: Op, r: Value) -> Contributions:
    """All to the factor that is no attention weight (no softmax), by the share |P_ij v_jd|; without one, `share`."""
    softmaxes = [is_weight(at, o) for o in op.operands]
    if sum(softmaxes) != 1:
        return product_share(at, op, r)
    sizes = [at.abs(at.read(o)) for o in op.operands]
    share = at.shared(r, getattr(at, op.name)(*sizes, **op.attrs))
    return tuple(None if weight else at.mul(size, found) for weight, size, found in zip(
        softmaxes, sizes, _product(at, op, share, sizes), strict=True))


def _part(at: Expansion, op: Op) -> float:
    """The part of each carrying factor."""
    return 1 / sum(at.carries(o) for o in op.operands)


def is_weight(at: Expansion, operand: object) -> bool:
    """True for a value that is a softmax, or a move of one."""
    return isinstance(operand, Value) and operand.name in at.facts.softmaxes


def _product(at: Expansion, op: Op, r: Value, factors: Sequence[Operand] = ()) -> tuple[Value, ...]:
    """The adjoint in each factor, the other one (of `factors`, else of the op) held constant."""
    factors = factors or [at.read(o) for o in op.operands]
    return tuple(LinearMap(at, op, i, tuple(f for j, f in enumerate(factors) if j != i)).adjoint(r)
                 for i in range(len(op.operands)))
