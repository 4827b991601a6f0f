"""What is known of forward values without running anything: which vary with the input, and which may be infinite."""

from __future__ import annotations

from math import isinf

from dlbc.ir.core import Graph, Value, Weight, values
from dlbc.passes.carriers import MOVES, explained_inputs

_HANDS_ON = MOVES | {"add", "sub", "mul", "div", "neg", "abs", "where", "maximum", "minimum", "amax", "amin",
                     "max_with_index", "min_with_index", "topk", "sort", "route_topk", "log_softmax"}


def varying(graph: Graph) -> frozenset[str]:
    """Names of the forward values that depend on an explained input, in whatever way."""
    found = {p.name for p in explained_inputs(graph)}
    for op in graph.forward.ops:
        if any(v.name in found for v in values(op.inputs)):
            found |= {r.name for r in op.results}
    return frozenset(found)


def infinite(graph: Graph) -> frozenset[str]:
    """Names of the forward values that may be infinite, as scores are where a mask of -inf was added: made of an
    infinite number, of the logarithm of a mask, or of a float input that is not explained. Weights count as finite."""
    known = varying(graph)
    found = {p.name for p in graph.forward.params if p.type.floating and p.name not in known}
    for op in (*graph.prepare.ops, *graph.forward.ops):
        made = any(isinstance(x, float) and isinf(x) for x in (*op.operands, op.attrs.get("value"))) or (
            op.name == "log" and not any(v.name in known for v in values(op.operands)))
        if made or (op.name in _HANDS_ON and any(v.name in found for v in values(op.operands))):
            found |= {r.name for r in op.results if r.type.floating}
    return frozenset(found)


def masked(graph: Graph) -> frozenset[str]:
    """The same for differences, which add up: also what a constant, whatever it is, was added to or chosen beside."""
    known, found = varying(graph), set[str]()
    for op in graph.forward.ops:
        masks = [o for o in op.operands if (isinstance(o, Value | Weight) and o.type.floating and o.type.rank > 0
                                            and o.name not in known) or (isinstance(o, float) and isinf(o))]
        source = op.name in ("add", "sub", "where", "maximum", "minimum", "scatter", "index_put") and masks
        if source or (op.name in (*MOVES, "topk", "sort", "route_topk", "add", "sub", "mul", "div", "where") and any(
                v.name in found for v in values(op.operands))):
            found |= {r.name for r in op.results}
    return frozenset(found & known)
