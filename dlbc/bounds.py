"""Which inputs a paired graph's `zbox` rules bound."""

from __future__ import annotations

from dlbc.ir.core import Graph, Op, Value
from dlbc.passes.carriers import MOVES
from dlbc.passes.outputs import input_names
from dlbc.passes.rules.linear import channel_axis
from dlbc.passes.rules.splitting import bounds
from dlbc_runtime.bounds import Bounds


def input_bounds(graph: Graph) -> tuple[Bounds, ...]:
    """The bounds of each input that a layer with `zbox` reads: as it is, or through moves with one number for all.

    What such a layer reads that is computed from an input has bounds that nobody can check beforehand.
    """
    assert graph.relevance is not None
    definitions = graph.forward.definitions()
    named = input_names(graph)
    found: list[Bounds] = []
    for op in graph.relevance.ops:
        if op.rule is None or op.rule.name != "zbox":
            continue
        layer = definitions[op.of]
        low, high = bounds(dict(op.rule.params))
        name, moved = _source(layer.operands[0], definitions)
        if name in named and not (moved and len(low) > 1):
            found.append(Bounds(named[name], low, high, channel_axis(layer, 0)))
    return tuple(found)


def _source(operand: object, definitions: dict[str, Op]) -> tuple[str, bool]:
    """The name of the value that an operand is a move of, and whether there was a move."""
    moved = False
    while isinstance(operand, Value):
        op = definitions.get(operand.name)
        if op is None or op.name not in MOVES or op.name == "cat":
            return operand.name, moved
        operand, moved = op.operands[0], True
    return "", moved
