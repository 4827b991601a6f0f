"""What of a model is drawn at once: modules opened as far as there is room, the others folded.

A module with numbered modules inside, as `model.layers`, is a run of blocks; folded, it is drawn as a table with a row
for each block. A module that cannot be one item, since a way leads out of it and back in, is opened without a frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dlbc_runtime.views.graph_flow import Edge, Flow

if TYPE_CHECKING:
    import networkx

ROOM = 30
"""So many items are drawn at once."""


@dataclass
class Module:
    """A module: its path, its nodes and the modules inside, in the order they are computed."""

    path: str
    items: list[Module | str] = field(default_factory=list)
    open: bool = False

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def run(self) -> bool:
        """Whether it holds numbered blocks."""
        return len(self.blocks) > 1

    @property
    def blocks(self) -> list[Module]:
        """The numbered modules inside."""
        return [one for one in self.items if isinstance(one, Module) and one.name.isdigit()]

    def leaves(self) -> Iterator[str]:
        """The nodes in it, at any depth."""
        for one in self.items:
            if isinstance(one, Module):
                yield from one.leaves()
            else:
                yield one

    def modules(self) -> Iterator[Module]:
        """The modules in it, at any depth, the outer ones first."""
        for one in self.items:
            if isinstance(one, Module):
                yield one
                yield from one.modules()

    def shown(self) -> int:
        """How many items a drawing of it has, with what is open inside."""
        return sum(one.shown() if isinstance(one, Module) and one.open else 1 for one in self.items)


def module_tree(flow: Flow) -> Module:
    """The modules of the nodes. Every module can be one item among those beside it: none is passed twice."""
    root = Module("")
    found: dict[str, Module] = {"": root}

    def module_at(path: str) -> Module:
        if path not in found:
            found[path] = Module(path)
            module_at(path.rpartition(".")[0]).items.append(found[path])
        return found[path]

    for key, node in flow.nodes.items():
        module_at(node.place).items.append(key)
    _settle(root, flow)
    _lift(root, flow)
    return root


def scene(tree: Module, path: str, room: int = ROOM) -> Module:
    """The module at a path with what is inside opened, up to `room` items: the small before the large, runs last, and
    of runs and of their blocks all or none."""
    chosen = next((one for one in (tree, *tree.modules()) if one.path == path), tree)
    for one in (chosen, *chosen.modules()):
        one.open = one is chosen
    tried: set[str] = set()
    while True:
        folded = [one for one in _visible(chosen) if not one.open and one.path not in tried]
        together = [one for one in folded if not one.run and not one.name.isdigit()]
        together = sorted(together, key=lambda one: len(list(one.leaves())))[:1] or folded
        if not together:
            return chosen
        together += [block for one in together if one.run for block in one.blocks]
        for one in together:
            one.open = True
        if chosen.shown() > room and any(len(one.items) > 1 for one in together):
            tried |= {one.path for one in together}
            for one in together:
                one.open = False


def owners(module: Module) -> dict[str, Module | str]:
    """For each node inside, the item of this module that it is, or is in."""
    return {leaf: one for one in module.items for leaf in ([one] if isinstance(one, str) else one.leaves())}


def passing(flow: Flow, leaves: set[str]) -> tuple[dict[Edge, float | None], dict[Edge, float | None]]:
    """The edges into a part of the graph, and those out of it."""
    into = {edge: amount for edge, amount in flow.edges.items() if edge[1] in leaves and edge[0] not in leaves}
    out = {edge: amount for edge, amount in flow.edges.items() if edge[0] in leaves and edge[1] not in leaves}
    return into, out


def relevance_of(flow: Flow, module: Module) -> float | None:
    """What a module gives to others, or its last node's relevance where it gives nothing; None where not known."""
    leaves = set(module.leaves())
    _, out = passing(flow, leaves)
    if not out:
        return flow.nodes[[key for key in flow.nodes if key in leaves][-1]].relevance
    given: list[float | None] = []
    for key in dict.fromkeys(before for before, _ in out):
        own = [amount for (before, after), amount in flow.edges.items() if before == key and after in leaves]
        given += [flow.nodes[key].relevance] if not own else [
            amount for (before, _), amount in out.items() if before == key]
    return None if any(amount is None for amount in given) else sum(amount or 0.0 for amount in given)


def _visible(module: Module) -> Iterator[Module]:
    for one in module.items:
        if isinstance(one, Module):
            yield one
            if one.open:
                yield from _visible(one)


def _settle(module: Module, flow: Flow) -> None:
    """Dissolve modules that would close a circle, and put items in the order of the dataflow."""
    import networkx

    while True:
        graph, names = _between(module, flow)
        circles = [part for part in networkx.strongly_connected_components(graph) if len(part) > 1]
        if not circles:
            break
        inside = [names[name] for part in circles for name in part if isinstance(names[name], Module)]
        left = [one for one in inside if isinstance(one, Module) and _left_and_entered(one, flow)]
        broken = {_name(one) for one in left or inside}
        items: list[Module | str] = []
        for one in module.items:
            items += one.items if isinstance(one, Module) and _name(one) in broken else [one]
        module.items = items
    order = list(networkx.lexicographical_topological_sort(graph, key=list(names).index))
    module.items = [names[name] for name in order]
    for one in module.items:
        if isinstance(one, Module):
            _settle(one, flow)


def _left_and_entered(module: Module, flow: Flow) -> bool:
    """Whether a way leads out of a module and back into it."""
    import networkx

    leaves, graph = set(module.leaves()), flow.graph()
    outside = {after for before, after in flow.edges if before in leaves and after not in leaves}
    return any(leaves & networkx.descendants(graph, key) for key in outside)


def _lift(module: Module, flow: Flow) -> None:
    """Modules with one node take no frame: the node stands in their place under both names."""
    for place, one in enumerate(module.items):
        if not isinstance(one, Module):
            continue
        _lift(one, flow)
        if len(one.items) == 1 and isinstance(key := one.items[0], str):
            node = flow.nodes[key]
            flow.nodes[key] = replace(node, name=f"{one.name}.{node.name}", place=module.path)
            module.items[place] = key


def _between(module: Module, flow: Flow) -> tuple[networkx.DiGraph, Mapping[str, Module | str]]:
    import networkx

    names = {_name(one): one for one in module.items}
    owner = {leaf: _name(one) for leaf, one in owners(module).items()}
    graph = networkx.DiGraph()
    graph.add_nodes_from(names)
    graph.add_edges_from((owner[a], owner[b]) for a, b in flow.edges
                         if a in owner and b in owner and owner[a] != owner[b])
    return graph, names


def _name(one: Module | str) -> str:
    return f"module {one.path}" if isinstance(one, Module) else one
