"""Which forward values carry relevance.

Relevance ends at the explained inputs: floating inputs, and integer inputs whose numbers select rows of
an embedding. Integer, boolean, mask and shape values carry none; an integer value counts as a carrier only
on the way of moves from such an input to its embedding. Parameters and what is computed from them alone
are constants.
"""

from __future__ import annotations

from dlbc.ir.core import Graph, Op, Operand, Value, values

MOVES = frozenset({"reshape", "permute", "expand", "slice", "select", "cat", "pad", "flip", "roll", "triangle",
                   "gather", "take", "index", "scatter", "index_put", "cast"})
DATA_OPERANDS: dict[str, tuple[int, ...]] = {
    "attention": (0, 1, 2), "attention_weights": (0, 1), "where": (1, 2), "gather": (0,), "take": (0,),
    "index": (0,), "scatter": (0, 2), "scatter_add": (0, 2), "index_put": (0, 1), "embedding": (0,),
    "rotary": (0,), "batch_norm": (0,), "prelu": (0,), "layer_norm": (0,), "rms_norm": (0,), "group_norm": (0,),
    "lstm": (0, 1, 2), "gru": (0, 1), "rnn": (0, 1), "route_topk": (0,), "expert_linear": (0,),
    "grouped_linear": (0,),
}
"""The operands through which relevance may pass, where it is not all of them."""


CONSTANT_OPERANDS: dict[str, tuple[int, ...]] = {
    "attention": (3, 4), "attention_weights": (2, 3), "embedding": (1,), "rotary": (1, 2), "batch_norm": (1, 2, 3, 4),
    **dict.fromkeys(("linear", "linear_rows", "layer_norm", "rms_norm", "group_norm", "prelu"), (1, 2)),
    **{f"{name}{n}d": (1, 2) for name in ("conv", "conv_transpose") for n in (1, 2, 3)},
    "lstm": (3, 4, 5, 6), "gru": (2, 3, 4, 5), "rnn": (2, 3, 4, 5), "expert_linear": (2, 3),
    "grouped_linear": (2, 3),
}
"""The operands that no rule gives relevance to: where one is computed from an explained input, pairing refuses."""


def explained_inputs(graph: Graph) -> tuple[Value, ...]:
    """The inputs that are to be explained: `graph.attrs["explain"]`, else all but masks, positions and targets."""
    chosen = graph.attrs.get("explain")
    if isinstance(chosen, tuple):
        return tuple(p for p in graph.forward.params if p.name in chosen)
    return tuple(p for p in graph.forward.params if "mask" not in p.name
                 and (p.type.floating or "position" not in p.name) and p.name != graph.attrs.get("targets"))


def data_operands(op: Op) -> tuple[Operand, ...]:
    """The operands of a forward op through which relevance may pass, None in place of the others."""
    chosen = DATA_OPERANDS.get(op.name)
    return tuple(o if chosen is None or i in chosen else None for i, o in enumerate(op.operands))


def constant_operands(op: Op) -> tuple[Value, ...]:
    """The floating weights, biases and masks of a forward op that are values: no rule gives them relevance."""
    chosen = CONSTANT_OPERANDS.get(op.name, ())
    return tuple(o for i, o in enumerate(op.operands) if i in chosen and isinstance(o, Value) and o.type.floating)


def carriers(graph: Graph) -> set[str]:
    """Names of the forward values that carry relevance."""
    found = {p.name for p in explained_inputs(graph) if p.type.dtype != "bool"}
    floating = {p.name for p in graph.forward.params if p.type.floating}
    for op in graph.forward.ops:
        sources = [v for v in (*values(data_operands(op)), *constant_operands(op)) if v.name in found]
        if not sources:
            continue
        if op.name == "embedding":
            found |= {r.name for r in op.results}
        elif any(v.type.floating for v in sources):
            found |= {r.name for r in op.results if r.type.floating}
        elif op.name in MOVES:
            found |= {r.name for r in op.results if not r.type.floating and r.type.dtype != "bool"}
    return found - (floating - {p.name for p in explained_inputs(graph)})
