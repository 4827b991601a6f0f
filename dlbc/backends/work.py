"""What of a graph runs where, and why: the rows of `explainer.plan()`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from dlbc.ir.attention_tiles import why_not_tiles
from dlbc.ir.core import Graph, Kernel, Op, Value, Weight
from dlbc.ir.fusible import (
    ELEMENTS,
    LOOP_ELEMENTS,
    LOOP_MOVES,
    LOOP_POINTWISE,
    LOOP_PRODUCTS,
    LOOP_SUMS,
    MOVES,
    POINTWISE,
    PRODUCTS,
    ROWWISE,
    VIEWS,
    fits,
    is_product,
    is_row,
    loops,
)
from dlbc_runtime.work import WorkRow

TEMPLATES = {
    "gemm": "a product with what is computed of its operands and results",
    "grouped": "rows by the matrices of their experts, with what is computed of operands and results",
    "row": "whole rows in one pass over memory",
    "elementwise": "pointwise ops in one pass over memory",
    "attention": "attention without scores in memory",
    "loops": "what is small, in one call; op by op where the sizes of a call are large",
}
"""Why each kind of kernel is one."""


def work_of(graph: Graph, library: str, refused: Mapping[str, str], writer: str = "triton") -> tuple[WorkRow, ...]:
    """The steps of a graph in order, those alike in a row counted. `library` runs what is in no kernel of the backend
    `writer`; `refused` has the kernels that there is no code for, and why."""
    rows: list[WorkRow] = []
    bodies: list[tuple[str, Sequence[Op | Kernel]]] = [(name, section.body) for name, section in graph.sections()]
    bodies += [(f"@{name}", function.body) for name, function in graph.functions.items()]
    for section, body in bodies:
        for item in body:
            if isinstance(item, Kernel):
                ops = tuple(op.name for op in item.body)
                place = next((op.place for op in item.body if op.place), "")
                why = refused.get(item.name, "")
                rows.append(WorkRow(section, library if why else f"{writer} {item.template}", ops, place,
                                    f"left to {library}: {why}" if why else TEMPLATES.get(item.template, "")))
            elif item.name == "call":
                rows.append(WorkRow(section, f"@{item.attrs['function']}", ("call",), item.place, "a repeated block"))
            else:
                why = ("runs once for the weights' values" if section == "prepare" else why_no_loop(item, library)
                       if writer == "c" else why_alone(item, library, graph))
                rows.append(WorkRow(section, library, (item.name,), item.place, why))
    return tuple(replace(row, count=len(list(group))) for row, group in groupby(rows))


def why_alone(op: Op, library: str, graph: Graph) -> str:
    """Why an op is in no kernel."""
    if op.name in VIEWS:
        return "touches no memory"
    if op.name in ("stream", "attention", "attention_weights"):
        return why_not_tiles(op, graph.functions)
    types = [o.type.dtype for o in op.operands if isinstance(o, Value | Weight)] + [r.type.dtype for r in op.results]
    odd = next((dtype for dtype in types if dtype not in ELEMENTS), "")
    if odd:
        return f"kernels have no element type {odd}"
    known: Mapping[str, Callable[[Op], bool]] = {
        **dict.fromkeys(POINTWISE | MOVES, fits), **dict.fromkeys(ROWWISE, is_row),
        **dict.fromkeys(PRODUCTS, is_product)}
    if op.name not in known:
        return f"no kernel has code for `{op.name}`: {library} has one"
    if not known[op.name](op):
        return f"kernels have no code for this form of `{op.name}`"
    return f"alone: {library} is as fast"


def why_no_loop(op: Op, library: str) -> str:
    """Why an op is in no function of loops."""
    if op.name in VIEWS:
        return "touches no memory"
    types = [o.type.dtype for o in op.operands if isinstance(o, Value | Weight)] + [r.type.dtype for r in op.results]
    odd = next((dtype for dtype in types if dtype not in LOOP_ELEMENTS), "")
    if odd:
        return f"loops have no element type {odd}"
    if op.name not in LOOP_PRODUCTS | LOOP_SUMS | LOOP_MOVES | LOOP_POINTWISE:
        return f"there is no loop for `{op.name}`: {library} has one"
    if loops(op):
        return f"alone: {library} is as fast"
    return f"{library}'s are faster for a matrix of this size" if op.name in LOOP_PRODUCTS else (
        f"there is no loop for this form of `{op.name}`")
