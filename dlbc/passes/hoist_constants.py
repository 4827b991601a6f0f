"""Constants: what depends on weights and literals alone is computed once per weight state, in `prepare`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

from dlbc.ir.core import Attr, Graph, Op, Operand, Section, Value, Weight, values
from dlbc.ir.dims import Sym, symbol
from dlbc.passes import Pass, register

_CREATION = ("full", "arange")
SMALL = 4096
"""Elements of a constant that takes longer to make than it is worth to leave out."""
SEEDS = symbol("S")


@register
@dataclass(frozen=True)
class HoistConstants(Pass):
    """Move ops of `forward` that read no input, and no size that differs between calls, to `prepare`.

    So Gemma's `1 + weight`, GPT-2's transposed weights or a table of frequencies are not computed in every
    call, and no number of the model is copied into the text. `arange(T)` stays. Bare creation ops stay
    too, unless what moves needs them.

    `relevance`: the constants of a lowered relevance section as well, such as |W|. They then take memory between calls,
    as much as the weights they are made of. `few`: of these only what products with a single row for each batch row
    (and target) read, such as a classifier's: there, making |W| anew takes longer than the product; and small constants
    that no weight goes into.
    """

    name: ClassVar[str] = "hoist_constants"
    relevance: bool = False
    few: bool = False

    def run(self, graph: Graph) -> Graph:
        """The graph with constants in `prepare`."""
        graph = self._forward(graph)
        section = graph.relevance
        if not self.relevance or section is None or any(op.name.startswith("rel.") for op in section.ops):
            return graph
        swapped = self._forward(replace(graph, forward=section, relevance=graph.forward), few=self.few)
        prepared = tuple(replace(op, of="") for op in swapped.prepare.ops)
        return replace(swapped, prepare=replace(swapped.prepare, body=prepared), forward=graph.forward,
                       relevance=swapped.forward)

    def _forward(self, graph: Graph, *, few: bool = False) -> Graph:
        constant = {r.name for op in graph.prepare.ops for r in op.results}
        returned = {v.name for v in graph.forward.results}
        moved: dict[str, Op] = {}
        for op in graph.forward.ops:
            if _is_constant(op, constant) and not any(r.name in returned for r in op.results):
                constant |= {r.name for r in op.results}
                moved |= {r.name: op for r in op.results}
        if few:
            _keep_what_many_rows_read(graph, moved)
        _keep_bare_creation(graph, moved)
        if not moved:
            return graph
        forward = replace(graph.forward, body=tuple(op for op in graph.forward.ops if op.result.name not in moved))
        prepared = (*graph.prepare.ops, *(op for op in graph.forward.ops if op.result.name in moved))
        return replace(graph, forward=forward, prepare=Section(body=prepared, results=_read(graph, forward, prepared)))


def _is_constant(op: Op, constant: set[str]) -> bool:
    if any(_varies(dim) for r in op.results for dim in r.type.shape) or any(map(_varies, op.attrs.values())):
        return False
    return all(isinstance(o, Weight) or (isinstance(o, Value) and o.name in constant)
               or (not isinstance(o, (Value, Sym))) for o in op.operands)


def _varies(attr: Attr | Operand) -> bool:
    return isinstance(attr, Sym) or (isinstance(attr, tuple) and any(map(_varies, attr)))


def _keep_what_many_rows_read(graph: Graph, moved: dict[str, Op]) -> None:
    """Leave in place what no product with few rows reads, and what is not small and made of literals alone."""
    wanted: set[str] = set()
    for op in reversed(list(graph.forward.ops)):
        if op.result.name in wanted if op.result.name in moved else op.name in ("linear", "matmul") and _few_rows(op):
            wanted |= {v.name for v in values(op.operands)}
    literal: set[str] = set()
    for op in graph.forward.ops:
        if op.result.name in moved and all(isinstance(o, Value) and o.name in literal for o in op.inputs
                                           if isinstance(o, Value | Weight)) and _small(op):
            literal.add(op.result.name)
    for name in set(moved) - wanted - literal:
        del moved[name]


def _small(op: Op) -> bool:
    """True where keeping what an op makes takes next to no memory."""
    return all(prod(int(str(dim)) for dim in r.type.shape) <= SMALL for r in op.results)


def _few_rows(op: Op) -> bool:
    """True for [B, K] or [S, B, K] times a matrix."""
    shape = op.result.type.shape
    return len(shape) == 2 + (SEEDS in shape[:1])


def _keep_bare_creation(graph: Graph, moved: dict[str, Op]) -> None:
    """Leave in place what only fills or counts: nothing is gained by keeping it between calls."""
    needed: set[str] = set()
    for op in reversed(list(graph.forward.ops)):
        if op.result.name not in moved:
            continue
        if op.name in _CREATION and not any(r.name in needed for r in op.results):
            for result in op.results:
                del moved[result.name]
        else:
            needed |= {v.name for v in values(op.operands)}


def _read(graph: Graph, forward: Section, prepared: tuple[Op, ...]) -> tuple[Value, ...]:
    readers = [forward] + ([graph.relevance] if graph.relevance is not None else [])
    read = {v.name for section in readers for op in section.ops for v in values(op.inputs)}
    read |= {v.name for section in readers for v in (*section.results, *section.saves)}
    return tuple(r for op in prepared for r in op.results if r.name in read)
