"""In-place operators of an exported program, exchanged for the others where nothing else sees what they wrote over.

torch's own way is to run the whole program through the exporter again, which costs twice the first time; most in-place
operators only spare a model's code an allocation: `weights /= weights.sum()`, `out.add_(bias)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node


def exchange_in_place(module: GraphModule) -> None:
    """Exchange the in-place operators of a program that can be, in place.

    One can be where the same operator exists without the underscore, gives the same element type, and what it wrote
    over, or a view of that, is read later under no other name; an input or a weight is never exchanged.
    """
    graph: Graph = module.graph
    order = {node: number for number, node in enumerate(graph.nodes)}
    memory: dict[Node, Node] = {}
    for node in list(graph.nodes):
        viewed = _viewed(node)
        memory[node] = node if viewed is None else memory[viewed]
        if not _writes(node) or node not in order:
            continue
        target = _without_underscore(node)
        x = node.args[0] if node.args else None
        if target is None or not isinstance(x, Node) or x.op != "call_function" or memory[x].op != "call_function":
            continue
        others = [one for one in memory if memory[one] is memory[x] and one not in (x, node)]
        if any(order.get(user, -1) > order[node] for one in others for user in one.users):
            continue
        if x.meta["val"].dtype != node.meta["val"].dtype or x.meta["val"].shape != node.meta["val"].shape:
            continue
        node.target = target
        for user in [user for user in x.users if user is not node and order.get(user, -1) > order[node]]:
            user.replace_input_with(x, node)
        memory[node] = node
    module.recompile()


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _viewed(node: Node) -> Node | None:
    """The tensor that the result of a node is, or may be, a part of."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    if schema is None:  # one of several results
        return node.args[0] if _viewed(node.args[0]) is not None else None
    return node.args[0] if any(one.alias_info is not None for one in schema.returns) else None


def _without_underscore(node: Node) -> Any:
    """`aten.div.Tensor` of `aten.div_.Tensor`; None where there is none with the same arguments, or where the operator
    writes over something else than its first argument alone."""
    target: Any = node.target
    name = target._schema.name.removeprefix("aten::")
    written = [one.alias_info is not None and one.alias_info.is_write for one in target._schema.arguments]
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") and not name.endswith("__") else None
    found = getattr(packet, target._overloadname, None) if packet is not None and target.namespace == "aten" else None
    if found is None or not written[0] or any(written[1:]) or found._schema.is_mutable:
        return None
    same = [one.name for one in found._schema.arguments] == [one.name for one in target._schema.arguments]
    return found if same else None
