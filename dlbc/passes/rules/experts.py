"""Mixtures of experts: y = sum_k w_k u_k over the experts chosen for a row, u_k what expert k makes of it.

Relevance is shared out over the products w_k u_k as over the terms of any sum; what a product gets goes to the expert,
or in halves to expert and router. The experts themselves are linear maps (`expert_linear` in `linear.py`); the choice
of experts hands back what the chosen scores get.
"""

from __future__ import annotations

from dlbc.ir.core import Op, Operand, Value, Weight
from dlbc.ir.ops import STABILISER
from dlbc.passes.rules import Contributions, Expansion, rule

MIXTURES = ("combine",)


@rule("combine", "half", form="M")
def half(at: Expansion, op: Op, m: Value, *, eps: float = STABILISER) -> Contributions:
    """R_k = w_k u_k R_y / e(y), half of it to the expert, half to its weight: M_u = w_k M / 2, M_w = sum_d u_kd M_d / 2
    with M = R_y / e(y).  Epsilon rule and uniform rule, Achtibat et al. 2024."""
    kept = at.stabilised(m, at.read(op.result), eps)
    return _both(at, op, kept, 0.5)


@rule("combine", "gradient", form="M", conserves=False)
def gradient(at: Expansion, op: Op, m: Value) -> Contributions:
    """M_u = w_k M_y, M_w = sum_d u_kd M_yd: the true adjoint."""
    return _both(at, op, m, 1.0)


@rule("combine", "signal", form="M")
def signal(at: Expansion, op: Op, m: Value, *, eps: float = STABILISER) -> Contributions:
    """R_k = w_k u_k R_y / e(y), all to the expert: its weight is a gate.  Epsilon rule, and Arras et al. 2017."""
    u, weights = op.operands
    kept = at.stabilised(m, at.read(op.result), eps)
    if not at.carries(u):
        return None, _to_weights(at, op, kept)
    return at.mul(_spread(at, kept), _column(at, weights)), None


@rule("combine", "absolute", form="R")
def absolute(at: Expansion, op: Op, r: Value) -> Contributions:
    """R_k = |w_k u_k| R_y / sum_j |w_j u_j|, all to the expert.  DL-Backtrace's shares, arXiv 2411.12643."""
    u, weights = op.operands
    sizes = at.abs(at.mul(at.read(u), _column(at, weights)))
    share = at.shared(r, at.sum(sizes, dims=(-2,)))
    return _relevance(at, op, at.mul(_spread(at, share), sizes))


@rule("combine", "equal", form="R")
def equal(at: Expansion, op: Op, r: Value) -> Contributions:
    """R_k = R_y / K, all to the expert.  dl-backtrace 0.1.24."""
    u = op.operands[0]
    assert isinstance(u, Value | Weight)
    return _relevance(at, op, at.widen(_spread(at, at.div(r, u.type.shape[-2])), u.type))


def _both(at: Expansion, op: Op, m: Value, part: float) -> Contributions:
    """To experts and weights by the product's two factors; all to the one that carries."""
    u, weights = op.operands
    m = at.mul(m, part) if part != 1.0 and at.carries(u) and at.carries(weights) else m
    return (at.mul(_spread(at, m), _column(at, weights)) if at.carries(u) else None,
            _to_weights(at, op, m) if at.carries(weights) else None)


def _to_weights(at: Expansion, op: Op, m: Value) -> Value:
    """sum_d u_kd M_d [S, *rows, K]."""
    return at.sum(at.mul(_spread(at, m), at.read(op.operands[0])), dims=(-1,))


def _relevance(at: Expansion, op: Op, r: Value) -> Contributions:
    """Relevance of the products [S, *rows, K, D], to the experts; to their weights where the experts carry none."""
    u, _ = op.operands
    return (r, None) if at.carries(u) else (None, at.sum(r, dims=(-1,)))


def _column(at: Expansion, weights: Operand) -> Value:
    """The weights as a column for each row, [*rows, K, 1], float32."""
    assert isinstance(weights, Value | Weight)
    return at.read(at.reshape(weights, shape=(*weights.type.shape, 1)))  # type: ignore[return-value]


def _spread(at: Expansion, value: Value) -> Value:
    """[S, *rows, D] as [S, *rows, 1, D], to go with every expert."""
    return at.reshape(value, shape=(*value.type.shape[:-1], 1, value.type.shape[-1]))
