"""Experts written on rows sorted by expert, as experts on rows in their order.

Some models sort the pairs of token and expert by expert, multiply each expert's rows by its matrix, and add the results
back to their tokens (JetMoE, Granite's first code). The sorting is a way to compute and no part of the model: without
it, all mixtures of experts read alike. How rows are sorted for speed, `group_experts` decides again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand, Value, Weight
from dlbc.ir.dims import Dim
from dlbc.ir.ops import OPS, attr, axes
from dlbc.passes import Pass, register
from dlbc.passes.match import Dataflow, type_of
from dlbc.passes.rewrite import rewrite
from dlbc.passes.unflatten_rows import BY_ROW


@register
@dataclass(frozen=True)
class UnsortRows(Pass):
    """`grouped_linear` on rows fetched by `sort(ids).indices` becomes products with `weight[ids]` on rows in order.

    What is added up at the rows' places (`index_put` into zeros) is then the rows themselves, or their sum over the
    experts of a token. The numbers of rows must be counted from the same ids. Where anything else reads sorted rows,
    these stay too.
    """

    name: ClassVar[str] = "unsort_rows"

    def run(self, graph: Graph) -> Graph:
        """The graph with rows in order."""
        if not any(op.name == "grouped_linear" for op in graph.forward.ops):
            return graph
        flow = Dataflow.of(graph)
        unsorting = _Unsorting(flow)

        def step(op: Op, at: Builder) -> tuple[Operand, ...] | None:
            flow.follow(at)
            flow.definitions |= {r.name: op for r in op.results}
            return unsorting.step(op, at)

        return rewrite(graph, step)


@dataclass(frozen=True)
class _Sorting:
    """Rows sorted by `ids` [N]: the order that sorts them."""

    order: str
    ids: Value


@dataclass
class _Unsorting:
    """One run: for each sorted value its sorting, and the same rows in order."""

    flow: Dataflow
    rows: dict[str, tuple[_Sorting, Value]] = field(default_factory=dict)

    def step(self, op: Op, at: Builder) -> tuple[Operand, ...] | None:
        """Note what an op does to sorted rows; what stands for its result where it puts them back."""
        if op.name == "index_put":
            back = self._put_back(op, at)
            return None if back is None else (back,)
        found = {"index": self._fetched, "grouped_linear": self._product}.get(op.name, self._by_row)(op, at)
        if found is not None and found[1].type.shape == op.result.type.shape:
            self.rows[op.result.name] = found
        return None

    # --- sorting ----------------------------------------------------------------------------------------

    def _sorting(self, indices: Operand) -> tuple[_Sorting, int] | None:
        """The sorting that indices fetch rows by; and how many places of it lead to one row: of `order // k`, k."""
        divided = self.flow.op(indices, "floor_divide")
        k = divided.operands[1] if divided is not None else 1
        order = divided.operands[0] if divided is not None else indices
        sort = self.flow.op(order, "sort")
        if sort is None or order != sort.results[1] or not isinstance(k, int):
            return None
        ids = sort.operands[0]
        if not isinstance(ids, Value) or ids.type.rank != 1 or ids.type.floating or attr(sort, "descending") is True:
            return None
        return _Sorting(sort.results[1].name, ids), k

    def _fetched(self, op: Op, at: Builder) -> tuple[_Sorting, Value] | None:
        """`x[order]`, or `x[order // k]`: each row k times in a row."""
        x, indices = op.operands[0], op.operands[1]
        found = self._sorting(indices) if len(op.operands) == 2 and attr(op, "dims") == (0,) else None
        if found is None or not isinstance(x, Value):
            return None
        sorting, k = found
        count, rest = sorting.ids.type.shape[0], x.type.shape[1:]
        if k == 1 or x.type.shape[0] * k != count:
            return (sorting, x) if x.type.shape[0] == count else None
        repeated = at.expand(at.reshape(x, shape=(x.type.shape[0], 1, *rest)), shape=(x.type.shape[0], k, *rest))
        return sorting, at.reshape(repeated, shape=(count, *rest))

    def _product(self, op: Op, at: Builder) -> tuple[_Sorting, Value] | None:
        """A grouped product, as the product of each row with the matrix of its expert."""
        x, ends, weight, bias = (*op.operands, None)[:4]
        known = self.rows.get(x.name) if isinstance(x, Value) else None
        if known is None or type_of(x).rank != 2 or not self._counted(ends, known[0].ids, type_of(weight).shape[0]):
            return None
        (sorting, rows), transposed = known, bool(attr(op, "transposed"))
        count, size = rows.type.shape
        matrices = at.index(weight, sorting.ids, dims=(0,))
        if transposed:
            found = at.matmul(at.reshape(rows, shape=(count, 1, size)), matrices)
        else:
            found = at.matmul(matrices, at.reshape(rows, shape=(count, size, 1)))
        found = at.reshape(found, shape=op.result.type.shape)
        return sorting, found if bias is None else at.add(found, at.index(bias, sorting.ids, dims=(0,)))

    def _counted(self, ends: Operand, ids: Value, experts: Dim) -> bool:
        """Whether ends are how often each expert is among ids, added up: of ones written at ids, or of comparisons."""
        summed = self._through(ends, "cumsum", "cast")
        counts = self.flow.op(summed, "sum")
        if counts is None or attr(counts, "keepdim") or type_of(ends).shape != (experts,):
            return False
        ones = self._through(counts.operands[0], "cast")
        table = type_of(ones)
        if axes(table.rank, attr(counts, "dims")) != tuple(range(table.rank - 1)):
            return False
        written = self.flow.op(ones, "scatter")
        if written is not None:
            base, index, one = written.operands
            return (self.flow.number(base) == 0 and one == 1 and attr(written, "dim") in (-1, table.rank - 1)
                    and self._same(index, ids))
        compared = self.flow.op(ones, "eq")
        for index, numbers in (compared.operands, compared.operands[::-1]) if compared is not None else ():
            count = self.flow.op(self._through(numbers, "reshape", "cast"), "arange")
            if count is not None and attr(count, "start") == 0 and attr(count, "stop") == experts \
                    and type_of(numbers).shape[-1] == experts and type_of(index).shape[-1] == 1:
                return self._same(index, ids)
        return False

    def _same(self, a: Operand, b: Operand) -> bool:
        """Whether two values hold the same numbers in the same order."""
        return self._through(a, "reshape", "cast") == self._through(b, "reshape", "cast")

    def _through(self, operand: Operand, *names: str) -> Operand:
        while (op := self.flow.op(operand, *names)) is not None:
            operand = op.operands[0]
        return operand

    # --- what happens to sorted rows ----------------------------------------------------------------------

    def _by_row(self, op: Op, at: Builder) -> tuple[_Sorting, Value] | None:
        """An op that works row by row, on the rows in order."""
        found = {known[0] for o in op.operands if isinstance(o, Value) and (known := self.rows.get(o.name))}
        change = BY_ROW.get(op.name)
        if len(found) != 1 or len(op.results) != 1 or not (OPS[op.name].elementwise or change or op.name == "reshape"):
            return None
        sorting = found.pop()
        if op.result.type.shape[:1] != sorting.ids.type.shape or (change is not None and change(op, 0) is None):
            return None
        operands: list[Operand] = []
        for operand in op.operands:
            known = self.rows.get(operand.name) if isinstance(operand, Value) else None
            alike = isinstance(operand, Value | Weight) and known is None and operand.type.rank > 0 and (
                operand.type.rank == op.result.type.rank and operand.type.shape[0] != 1)
            if alike and not self.flow.constant(operand):
                return None  # rows in another order
            operands.append(known[1] if known is not None else operand)
        return sorting, at.op(op.name, *operands, **op.attrs)[0]  # type: ignore[arg-type]

    def _put_back(self, op: Op, at: Builder) -> Value | None:
        """Zeros with sorted rows added at their places, or at those of their tokens."""
        base, source, *indices = op.operands
        known = self.rows.get(source.name) if isinstance(source, Value) else None
        found = self._sorting(indices[0]) if len(indices) == 1 and attr(op, "dims") == (0,) else None
        if known is None or found is None or found[0] != known[0] or self.flow.number(base) != 0:
            return None
        (_, rows), k = known, found[1]
        if k > 1 and attr(op, "accumulate") is True and op.result.type.shape[0] * k == rows.type.shape[0]:
            by_token = at.reshape(rows, shape=(op.result.type.shape[0], k, *rows.type.shape[1:]))
            back = at.sum(by_token, dims=(1,))
        elif k == 1:
            back = rows
        else:
            return None
        return back if back.type == op.result.type else None
