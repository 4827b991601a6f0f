"""What flows where: the operations that relevance passes, how much each holds, and how much goes along each edge.

Relevance of a value is the sum of what its readers give it; so what has one reader is known, and around a residual
connection what its two readers hold tells them apart. What is not determined by that is the evenest that fits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from dlbc_runtime.arrays import Array
from dlbc_runtime.errors import InputError

if TYPE_CHECKING:
    import networkx

MOVES = frozenset({"cast", "reshape", "permute", "expand", "slice", "select", "pad", "flip", "roll", "index", "take"})
"""Operations that only move numbers: not drawn by module."""
PASSING = MOVES | {"add", "sub", "cat", "mean", "sum", "relu", "gelu", "silu", "rotary", "glu"}
"""Operations without weights that absorb next to nothing."""

SUMS = frozenset({"add", "sub", "mul", "div"})

Edge = tuple[str, str]


@dataclass(frozen=True)
class Node:
    """An operation, or a module without modules inside. `place` is the module it stands in, "" for the model itself;
    `relevance` its total, None where it is not known; `types` what it returns."""

    key: str
    name: str
    place: str
    ops: tuple[str, ...]
    relevance: float | None = None
    type: str = ""
    input: bool = False

    @property
    def path(self) -> str:
        """Where it is, in the words of the model."""
        return f"{self.place}.{self.name}" if self.place else self.name


@dataclass
class Flow:
    """The nodes in the order they are computed, and the edges with what flows along them (None: not known)."""

    nodes: dict[str, Node]
    edges: dict[Edge, float | None] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        """The largest |relevance| of a node; 0 where none is known."""
        return max((abs(node.relevance) for node in self.nodes.values() if node.relevance is not None), default=0.0)

    def graph(self) -> networkx.DiGraph:
        """The same for networkx."""
        import networkx

        found = networkx.DiGraph()
        found.add_nodes_from(self.nodes)
        found.add_edges_from(self.edges)
        return found

    def without(self, key: str) -> None:
        """Leave a node out: what entered it goes straight on to its readers, in proportion."""
        entering = {edge: self.edges.pop(edge) for edge in list(self.edges) if edge[1] == key}
        leaving = {edge: self.edges.pop(edge) for edge in list(self.edges) if edge[0] == key}
        del self.nodes[key]
        total = _total(leaving.values())
        for (before, _), given in entering.items():
            for (_, after), taken in leaving.items():
                share = 1 / len(leaving) if not total or taken is None else taken / total
                self.add(before, after, None if given is None else share * given)

    def add(self, before: str, after: str, amount: float | None) -> None:
        """An edge, or more along one that is there."""
        known = self.edges.get((before, after), 0.0)
        self.edges[before, after] = None if known is None or amount is None else known + amount


def flow_of(drawn: networkx.MultiDiGraph, explained: Collection[str], relevance: Mapping[str, float], by: str) -> Flow:
    """What lies between the explained inputs and the outputs in a graph of `Explainer.graph`.

    `relevance`: totals by value or by module path, as `Explanation.nodes` and `relevance` have them. `by`: "op", or
    "module", where modules without modules inside are one node and operations that only move numbers are left out.
    """
    if by not in ("module", "op"):
        raise InputError(f"by={by!r}", where="draw()", hint='"module" or "op"')
    flow, places, outputs = _carriers(drawn, explained, relevance)
    _fill(flow, outputs, complete=any(name in flow.nodes and not flow.nodes[name].input and name not in places.values()
                                      for name in relevance))
    if by == "module":
        for key, node in list(flow.nodes.items()):
            entering = sum(edge[1] == key for edge in flow.edges)
            if node.ops[0] in MOVES and entering == 1 and key not in outputs:
                flow.without(key)
        flow = _joined(flow, places, outputs)
    return flow


def totals(arrays: Mapping[str, Array]) -> dict[str, float]:
    """The sum of each array over all that is finite."""
    return {name: float(array[np.isfinite(array)].sum(dtype=np.float64)) for name, array in arrays.items()}


def strongest(flow: Flow, k: int, by: str) -> None:
    """Keep inputs, outputs and the `k` nodes of the most |relevance|; and of the edges those that carry something.

    By module, sums of two branches do not count: what they hold is what was added.
    """
    if k < 1:
        raise InputError(f"top_k={k}", where="draw()", hint="give 1 or more")
    if not any(node.relevance is not None for node in flow.nodes.values()):
        raise InputError("top_k chooses by relevance, and there is none", where="draw()",
                         hint='give an explanation made with keep="all" or keep="modules"')
    read = {before for before, _ in flow.edges}
    ends = {key for key, node in flow.nodes.items() if node.input or key not in read}
    inner = sorted((node for key, node in flow.nodes.items() if key not in ends),
                   key=lambda node: (by == "module" and node.name in SUMS, -abs(node.relevance or 0.0)))
    chosen = [node for node in inner if by == "op" or node.name not in SUMS]
    for node in inner[min(k, len(chosen)):]:
        flow.without(node.key)
    least = 0.02 * max((abs(amount) for amount in flow.edges.values() if amount is not None), default=0.0)
    for edge, amount in sorted(flow.edges.items(), key=lambda item: abs(item[1] or 0.0)):
        before, after = edge
        others = [other for other in flow.edges if other != edge]
        if (abs(amount or 0.0) < least and any(other[0] == before for other in others)
                and any(other[1] == after for other in others)):
            del flow.edges[edge]


def _carriers(drawn: networkx.MultiDiGraph, explained: Collection[str], relevance: Mapping[str, float]
              ) -> tuple[Flow, dict[str, str], set[str]]:
    """The ops between the explained inputs and the outputs; the place of each; and which are outputs."""
    import networkx

    forward = drawn.subgraph(name for name, data in drawn.nodes(data=True) if data["section"] == "forward")
    starts = [name for name in explained if name in forward]
    reached = set(starts).union(*(networkx.descendants(forward, name) for name in starts))
    ends = {name for name in reached if not forward.out_degree(name)}
    floating = {name for name in ends if str(forward.nodes[name]["type"]).startswith(("f", "bf"))} or ends
    kept = reached & floating.union(*(networkx.ancestors(forward, name) for name in floating))
    amounts = _by_value(forward, relevance)
    nodes, places = {}, {}
    for name in networkx.topological_sort(forward):
        if name in kept:
            data = forward.nodes[name]
            places[name] = data.get("place", "")
            nodes[name] = Node(name, name if data["op"] == "input" else data["op"], places[name], (data["op"],),
                               amounts.get(name), data["type"], data["op"] == "input")
    flow = Flow(nodes)
    for before, after in forward.edges():
        if before in kept and after in kept:
            flow.edges[before, after] = None
    return flow, places, floating & kept


def _by_value(forward: networkx.DiGraph, relevance: Mapping[str, float]) -> dict[str, float]:
    """Relevance by value: a module's is that of the last value computed in it."""
    last: dict[str, str] = {}
    for name, data in forward.nodes(data=True):
        parts = data["place"].split(".") if data.get("place") else []
        for depth in range(1, len(parts) + 1):
            last[".".join(parts[:depth])] = name
    found: dict[str, float] = {}
    for name, amount in relevance.items():
        stem = name.rpartition(".")[0]  # an op that is computed for some positions only has a name with one more number
        known = name if name in forward else last.get(name, stem if stem in forward and stem not in relevance else None)
        if known is not None:
            found[known] = amount
    return found


def _fill(flow: Flow, outputs: Collection[str], *, complete: bool) -> None:
    """Find what flows along each edge, and the relevance that was not given, as far as they follow from what was.
    `complete`: what was not given passes none."""
    leaving: dict[str, list[Edge]] = {key: [] for key in flow.nodes}
    entering: dict[str, list[Edge]] = {key: [] for key in flow.nodes}
    for edge in flow.edges:
        leaving[edge[0]].append(edge)
        entering[edge[1]].append(edge)

    def settle() -> bool:
        """What has one reader gives it all it has; what is read, or passed on, in known parts has their sum."""
        changed = False
        for key in flow.nodes:
            unknown = [edge for edge in leaving[key] if flow.edges[edge] is None]
            for edges in (leaving[key], entering[key] if flow.nodes[key].ops[0] in PASSING else []):
                if (flow.nodes[key].relevance is None and edges and key not in outputs
                        and all(flow.edges[edge] is not None for edge in edges)):
                    flow.nodes[key] = replace(flow.nodes[key], relevance=_total(flow.edges[edge] for edge in edges))
                    changed = True
            total = flow.nodes[key].relevance
            if len(unknown) == 1 and total is not None:
                flow.edges[unknown[0]] = total - _total(flow.edges[edge] for edge in leaving[key])
                changed = True
        return changed

    def guess() -> bool:
        """What reads one value alone, of which nothing is known, had all it has from that."""
        found = [edges[0] for key, edges in entering.items() if len(edges) == 1 and flow.edges[edges[0]] is None
                 and flow.nodes[key].relevance is not None and flow.nodes[edges[0][0]].relevance is None]
        flow.edges.update({edge: flow.nodes[edge[1]].relevance for edge in found})
        return bool(found)

    while settle() or guess():
        pass
    given = sum(node.relevance is not None for node in flow.nodes.values())
    if most := complete or 2 * given >= len(flow.nodes):  # what nobody with relevance reads passes none
        flow.nodes.update({key: replace(node, relevance=0.0) for key, node in flow.nodes.items()
                           if node.relevance is None and not any(flow.edges[edge] is None and
                                                                 flow.nodes[edge[1]].relevance is not None
                                                                 for edge in leaving[key])})
        while settle():
            pass
    _solve(flow, leaving, entering)
    while settle():
        pass
    if most:  # and so do the last, as queries and keys by some rules
        flow.nodes.update({key: replace(node, relevance=0.0) for key, node in flow.nodes.items()
                           if node.relevance is None})
        flow.edges.update({edge: 0.0 for edge, amount in flow.edges.items() if amount is None})


def _solve(flow: Flow, leaving: Mapping[str, list[Edge]], entering: Mapping[str, list[Edge]]) -> None:
    """The edges still unknown, by least squares: first that a node gives what it has, then that what passes relevance
    gets what it has, last that others do; of several answers the evenest."""
    import networkx

    unknown = [edge for edge, amount in flow.edges.items() if amount is None]
    parts = networkx.Graph()
    parts.add_edges_from((("gives", before), ("gets", after)) for before, after in unknown)
    for part in networkx.connected_components(parts):
        edges = [edge for edge in unknown if ("gives", edge[0]) in part]
        column = {edge: place for place, edge in enumerate(edges)}
        rows, wanted = [], []
        for side, key in part:
            node, all_edges = flow.nodes[key], (leaving if side == "gives" else entering)[key]
            if node.relevance is None:
                continue
            weight = 100.0 if side == "gives" else 1.0 if node.ops[0] in PASSING else 0.1
            row = np.zeros(len(edges))
            row[[column[edge] for edge in all_edges if edge in column]] = weight
            rows.append(row)
            wanted.append(weight * (node.relevance - _total(flow.edges[edge] for edge in all_edges)))
        if rows:
            found = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0]
            covered = np.abs(np.array(rows)).sum(0) > 0
            for edge, amount, known in zip(edges, found, covered, strict=True):
                if known:
                    flow.edges[edge] = float(amount)


def _joined(flow: Flow, places: Mapping[str, str], outputs: set[str]) -> Flow:
    """Ops of a module without modules inside, where they hang together, as one node."""
    import networkx

    every = set(places.values())
    inner = {place for place in every if place and not any(other.startswith(place + ".") for other in every)}
    parts: dict[str, list[str]] = {}
    for key in flow.nodes:
        parts.setdefault(places[key], []).append(key)
    graph, owner = flow.graph(), {key: key for key in flow.nodes}
    for place in inner:
        for part in networkx.weakly_connected_components(graph.subgraph(parts.get(place, ()))):
            if len(part) == 1:
                continue
            last = [key for key in parts[place] if key in part][-1]
            merged = {key: last if key in part else one for key, one in owner.items()}
            if networkx.is_directed_acyclic_graph(_quotient(graph, merged)):
                owner = merged
    found = Flow({})
    for key, node in flow.nodes.items():
        if owner[key] != key:
            continue
        members = [one for one in flow.nodes if owner[one] == key]
        whole = places[key] in inner
        parent, _, name = places[key].rpartition(".")
        leaving = [amount for (before, after), amount in flow.edges.items()
                   if owner[before] == key and owner[after] != key]
        known = None if any(amount is None for amount in leaving) else _total(leaving)
        relevance = node.relevance if len(members) == 1 or key in outputs or known is None else known
        found.nodes[key] = Node(key, name if whole else node.name, parent if whole else node.place,
                                tuple(flow.nodes[one].ops[0] for one in members), relevance, node.type, node.input)
    for (before, after), amount in flow.edges.items():
        if owner[before] != owner[after]:
            found.add(owner[before], owner[after], amount)
    order = list(networkx.lexicographical_topological_sort(found.graph(), key=list(found.nodes).index))
    found.nodes = {key: found.nodes[key] for key in order}
    return found


def _quotient(graph: networkx.DiGraph, owner: Mapping[str, str]) -> networkx.DiGraph:
    import networkx

    found = networkx.DiGraph()
    found.add_edges_from((owner[a], owner[b]) for a, b in graph.edges() if owner[a] != owner[b])
    return found


def _total(amounts: Iterable[float | None]) -> float:
    return sum(amount for amount in amounts if amount is not None)
