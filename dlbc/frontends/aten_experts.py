"""Our own operators for mixtures of experts (`expert_ops`): what loops over experts and registered forwards become."""

from __future__ import annotations

from dlbc.errors import ExportError
from dlbc.frontends.aten import Tracer, aten
from dlbc.ir.core import Operand


@aten("grouped_linear")
def grouped_linear(at: Tracer, x: Operand, counts: Operand, weight: Operand, bias: Operand = None,
                   transposed: bool = False) -> Operand:
    """Rows by the weight of their expert: counts[e] rows for each expert e in turn."""
    return at.grouped_linear(x, at.cumsum(counts, dim=0), weight, bias, transposed=transposed)


@aten("rows")
def rows(at: Tracer, x: Operand) -> Operand:
    """What stands for the rows of one expert while its loop is followed."""
    raise ExportError("rows of the experts are used in a way that cannot be done for all experts at once: they leave "
                      "the loop", where=at.origin, hint="put the rows of all experts together inside of the model")


@aten("expert_linear")
def expert_linear(at: Tracer, x: Operand, ids: Operand, weight: Operand, bias: Operand = None) -> Operand:
    """Rows by the weight of the expert that is chosen for them."""
    return at.expert_linear(x, ids, weight, bias)


@aten("combine")
def combine(at: Tracer, u: Operand, weights: Operand) -> Operand:
    """The weighted sum of what the experts say."""
    return at.combine(u, weights)
