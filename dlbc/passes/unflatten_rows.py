"""Rows of tokens that experts are chosen for keep their batch and positions.

A mixture of experts is written over a list of tokens: [B,T,D] becomes [B*T,D], is routed, and becomes [B,T,D] again;
the chosen pairs of token and expert are a list too, [B*T*K,D]. This pass moves such a reshape down through everything
that works row by row, until it meets the one that undoes it. What is left knows batch, position and choice apart, as
all other passes read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Attrs, Graph, Op, Operand, Type, Value, Weight
from dlbc.ir.dims import Dim, product
from dlbc.ir.ops import OPS, attr, axes, axis
from dlbc.passes import Pass, register
from dlbc.passes.match import Dataflow
from dlbc.passes.rewrite import rewrite

GATHERS = ("index", "embedding")
"""Ops that take whole rows of a table by a tensor of numbers."""


@register
@dataclass(frozen=True)
class UnflattenRows(Pass):
    """`reshape` of [B,T,...] to [B*T,...] moves behind the ops that work row by row, where the rows choose experts.

    Rows choose experts where a weight of rank 3 is indexed by a list of numbers, one (or several) for each row. Other
    graphs stay as they are.
    """

    name: ClassVar[str] = "unflatten_rows"

    def run(self, graph: Graph) -> Graph:
        """The graph with its rows unflattened."""
        counts = set(_row_counts(graph))
        if not counts:
            return graph
        flow = Dataflow.of(graph)

        def step(op: Op, at: Builder) -> tuple[Operand, ...] | None:
            flow.follow(at)
            flow.definitions |= {r.name: op for r in op.results}
            lifted = _Lifting(op, flow, at, counts).run()
            return None if lifted is None else tuple(
                at.reshape(value, shape=old.type.shape) for value, old in zip(lifted, op.results, strict=True))

        return rewrite(graph, step)


def _row_counts(graph: Graph) -> Iterator[Dim]:
    """The numbers of rows, and of chosen pairs of row and expert, of the graph's mixtures."""
    flow = Dataflow.of(graph)
    flow.definitions |= graph.forward.definitions()
    for op in graph.forward.ops:
        if op.name != "index" or not flow.constant(op.operands[0]) or op.result.type.rank < 3 or len(op.operands) != 2:
            continue
        ids = op.operands[1]
        while (inner := flow.op(ids, "reshape", "cast")) is not None:
            yield ids.type.shape[0]  # type: ignore[union-attr]
            ids = inner.operands[0]
        if isinstance(ids, Value) and ids.type.rank:
            yield ids.type.shape[0]


@dataclass
class _Lifting:
    """One op on rows in a list, and the same op on rows with more than one axis."""

    op: Op
    flow: Dataflow
    at: Builder
    counts: set[Dim]

    def run(self) -> tuple[Value, ...] | None:
        """The results of the op on unflattened rows; None where the op stays."""
        op, change = self.op, BY_ROW.get(self.op.name, _same if OPS[self.op.name].elementwise else None)
        found = [f for operand in op.operands if (f := self._factors(operand)) is not None]
        if change is None or not found:
            return None
        factors = min(found, key=len)
        attrs = change(op, len(factors) - 1)
        if attrs is None or any(r.type.shape[:1] != (product(factors),) for r in op.results) or (
                op.name in GATHERS and not self.flow.constant(op.operands[0])):
            return None
        if op.name == "expand":
            attrs = {"shape": (*factors, *op.result.type.shape[1:])}
        lifted = [self._lifted(operand, factors) for operand in op.operands]
        return self.at.op(op.name, *lifted, result=tuple(r.name for r in op.results),
                          **attrs)  # type: ignore[arg-type]

    def _source(self, operand: Operand) -> Operand:
        """What an operand is a reshape of."""
        while (joined := self.flow.op(operand, "reshape")) is not None:
            operand = joined.operands[0]
        return operand

    def _factors(self, operand: Operand) -> tuple[Dim, ...] | None:
        """The axes that the rows of an operand were, where it is a reshape that joined them."""
        source = self._source(operand)
        if not isinstance(operand, Value) or not operand.type.rank or operand.type.shape[0] not in self.counts:
            return None
        assert isinstance(source, Value | Weight)
        shape = source.type.shape
        if shape[:1] == operand.type.shape[:1]:
            return None  # they are rows already
        return next((shape[:i] for i in range(2, len(shape) + 1) if product(shape[:i]) == operand.type.shape[0]), None)

    def _lifted(self, operand: Operand, factors: tuple[Dim, ...]) -> Operand:
        """An operand on unflattened rows: itself, where it has none."""
        if not isinstance(operand, Value | Weight) or not self._has_rows(operand, product(factors)):
            return operand
        source, shape = self._source(operand), (*factors, *operand.type.shape[1:])
        assert isinstance(source, Value | Weight)
        return source if isinstance(source, Value) and source.type.shape == shape else self.at.reshape(
            source, shape=shape)

    def _has_rows(self, operand: Value | Weight, rows: Dim) -> bool:
        if self.flow.constant(operand) or not operand.type.rank or operand.type.shape[0] != rows:
            return False
        return not OPS[self.op.name].elementwise or operand.type.rank == self.op.result.type.rank


# --- what works row by row, and its attributes with more axes in front ---------------------------------

Change = Callable[[Op, int], "Attrs | None"]


def _same(op: Op, more: int) -> Attrs | None:
    """Works on the last axes, or on each number."""
    return op.attrs if OPS[op.name].elementwise or _type(op).rank >= 2 else None


def _matrices(op: Op, more: int) -> Attrs | None:
    """Products of matrices, row by row: both have rows, or the other is a matrix without."""
    ranks = [o.type.rank for o in op.operands if isinstance(o, Value | Weight)]
    return op.attrs if ranks[0] >= 3 and ranks[1] in (2, ranks[0]) else None


def _along(op: Op, more: int) -> Attrs | None:
    """One axis is worked on, not that of rows."""
    stated = attr(op, "dim")
    dim = axis(_type(op).rank, stated) if isinstance(stated, int) else 0
    return {**op.attrs, "dim": dim + more} if dim else None


def _over(op: Op, more: int) -> Attrs | None:
    """Several axes are worked on."""
    dims = axes(_type(op).rank, attr(op, "dims"))
    return {**op.attrs, "dims": tuple(d + more for d in dims)} if 0 not in dims else None


def _expanded(op: Op, more: int) -> Attrs | None:
    """Other axes than rows are expanded; to what shape, `_Lifting` says."""
    return {} if _type(op).rank == op.result.type.rank and _type(op).shape[0] == op.result.type.shape[0] else None


def _permuted(op: Op, more: int) -> Attrs | None:
    """Rows stay in front."""
    stated, rank = attr(op, "dims"), _type(op).rank
    assert isinstance(stated, tuple)
    dims = tuple(axis(rank, int(str(d))) for d in stated)
    return {"dims": (*range(more + 1), *(d + more for d in dims[1:]))} if dims[0] == 0 else None


def _gathered(op: Op, more: int) -> Attrs | None:
    """Rows of a table by numbers; it is the numbers that have rows."""
    return op.attrs if op.name == "embedding" or (attr(op, "dims") == (0,) and len(op.operands) == 2) else None


def _type(op: Op) -> Type:
    first = op.operands[0]
    assert isinstance(first, Value | Weight)
    return first.type


BY_ROW: dict[str, Change] = {
    **dict.fromkeys(("linear", "rms_norm", "layer_norm"), _same), "matmul": _matrices,
    **dict.fromkeys(("softmax", "log_softmax", "topk", "sort", "cumsum", "max_with_index", "min_with_index", "gather",
                     "scatter", "scatter_add", "slice", "select", "argmax", "argmin", "cat"), _along),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "prod", "any", "all", "logsumexp", "var"), _over),
    "expand": _expanded, "permute": _permuted, **dict.fromkeys(GATHERS, _gathered),
}
"""For each op that works row by row: its attributes where rows have more axes, None where it does not."""
