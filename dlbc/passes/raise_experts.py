"""Mixtures of experts: which experts a token goes to, what each makes of it, and their weighted sum.

A mixture is exported as plain products: the matrices of the chosen experts are copied out for each token,
`matmul(weight[ids], x)`, which no backend should ever do. What is recognised is this dataflow, whoever wrote it:

- `matmul(weight[ids], x)` or `matmul(x, weight[ids])`, or an `einsum` of both, plus `bias[ids]`, is `expert_linear`;
- the sum over the chosen experts of their results times numbers is `combine`;
- the `topk` that the ids come from is `route_topk`, with what is gathered from the scores by its ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand, Type, Value, values
from dlbc.ir.ops import OPS, attr, axes, axis
from dlbc.passes import Pass, register
from dlbc.passes.match import Dataflow, as_type, last, orders, type_of
from dlbc.passes.rewrite import rewrite, users

_ROWWISE = ("reshape", "slice", "cast", "rms_norm", "layer_norm", "softmax", "expert_linear", "expand")
"""What experts may do to a row besides arithmetic."""


@register
@dataclass(frozen=True)
class RaiseExperts(Pass):
    """Products with weights indexed by ids become `expert_linear`, their weighted sum `combine`, the choice of the ids
    `route_topk`.

    ids are [*rows, K]: K experts for each row. A router that chooses in another way (by several maxima, say) stays as
    it is; its ids choose experts all the same.
    """

    name: ClassVar[str] = "raise_experts"

    def run(self, graph: Graph) -> Graph:
        """The graph with its mixtures of experts raised."""
        flow = Dataflow.of(graph)
        chosen = _chosen(graph)
        if not chosen:
            return graph
        raising = _Raising(graph, flow, chosen)

        def step(op: Op, at: Builder) -> tuple[Operand, ...] | None:
            flow.follow(at)
            flow.definitions |= {r.name: op for r in op.results}
            return raising.step(op, at)

        return rewrite(graph, step)


def _chosen(graph: Graph) -> set[str]:
    """Names of the values that number experts, and of those they are moved or cast from."""
    flow = Dataflow.of(graph)
    flow.definitions |= graph.forward.definitions()
    found: set[str] = set()
    for op in graph.forward.ops:
        ids = _ids(op, flow)
        while ids is not None:
            found.add(ids.name)
            inner = flow.op(ids, "reshape", "cast")
            ids = inner.operands[0] if inner is not None and isinstance(inner.operands[0], Value) else None
    return found


def _ids(op: Op | None, flow: Dataflow, rank: int = 3) -> Value | None:
    """The numbers that matrices (or vectors) of a constant are taken by."""
    if op is None or op.name != "index" or not flow.constant(op.operands[0]) or len(op.operands) != 2:
        return None
    ids = op.operands[1]
    table = type_of(op.operands[0])
    fits = table.rank == rank and table.floating and attr(op, "dims") == (0,)
    return ids if fits and isinstance(ids, Value) else None


@dataclass
class _Raising:
    """One run: `chosen` are the names of ids, `weights` what was gathered of scores by ids, by the names of both."""

    graph: Graph
    flow: Dataflow
    chosen: set[str]
    weights: dict[tuple[str, str], Value] = field(default_factory=dict)

    def step(self, op: Op, at: Builder) -> tuple[Operand, ...] | None:
        """What stands for the results of an op; None to keep it."""
        if op.name == "topk":
            return self._route(op, at)
        one = {"matmul": self._product, "einsum": self._summed, "add": self._biased, "sum": self._combined,
               "mul": self._weighted, "gather": self._gathered, "softmax": self._certain}.get(op.name)
        found = one(op, at) if one is not None else None
        return None if found is None else (found,)

    # --- products ---------------------------------------------------------------------------------------

    def _product(self, op: Op, at: Builder) -> Value | None:
        """`matmul(weight[ids] [.., out, in], x [.., in, 1])`, or `matmul(x [.., 1, in], weight[ids] [.., in, out])`."""
        for position in (0, 1):
            gathered, swapped = self._matrices(op.operands[position])
            ids, vector = _ids(gathered, self.flow), op.operands[1 - position]
            if gathered is None or ids is None or not isinstance(vector, Value):
                continue
            shape = vector.type.shape
            rows, size = shape[:-2], shape[-2] if position == 0 else shape[-1]
            if shape[-1 if position == 0 else -2] != 1 or rows not in (ids.type.shape, (*ids.type.shape[:-1], 1)):
                continue
            single = self.flow.op(ids, "reshape")
            one = single.operands[0] if single is not None else None
            if isinstance(one, Value) and one.type.shape == (*rows, 1):  # one expert for each row
                ids, rows = one, (*rows, 1)
            x = self._unrepeated(vector, (*rows, size), at)
            found = at.expert_linear(x, ids, gathered.operands[0], transposed=(position == 1) != swapped)
            return as_type(at, at.reshape(found, shape=op.result.type.shape), op.result.type)
        return None

    def _matrices(self, operand: Operand) -> tuple[Op | None, bool]:
        """The op that gathers matrices, and whether their axes were swapped afterwards."""
        moved = self.flow.op(operand, "permute")
        if moved is None:
            return self.flow.op(operand, "index"), False
        rank, dims = moved.result.type.rank, attr(moved, "dims")
        swaps = (*range(rank - 2), rank - 1, rank - 2)
        return (self.flow.op(moved.operands[0], "index"), True) if dims == swaps else (None, False)

    def _summed(self, op: Op, at: Builder) -> Value | None:
        """The same as `einsum("bkoi,bi->bko", weight[ids], x)`, or with another x for each expert, `bki`; and the sum
        over experts, `einsum("bkd,bk->bd", u, w)`."""
        terms, output = str(attr(op, "equation")).split("->")
        letters = terms.split(",")
        for position in (0, 1) if len(op.operands) == 2 else ():
            u, w, own = op.operands[position], op.operands[1 - position], letters[position]
            if letters[1 - position] == own[:-1] and output == own[:-2] + own[-1:] and isinstance(u, Value) \
                    and self._made(u, u.type):
                return as_type(at, at.combine(u, w), op.result.type)
        for position in (0, 1) if len(op.operands) == 2 else ():
            gathered, x, own, other = (self.flow.op(op.operands[position], "index"), op.operands[1 - position],
                                       letters[position], letters[1 - position])
            ids = _ids(gathered, self.flow)
            if gathered is None or ids is None or not isinstance(x, Value) or not other:
                continue
            rows, outer, inner = own[:-2], own[-2], own[-1]
            transposed = other[-1] == outer
            outer, inner = (inner, outer) if transposed else (outer, inner)
            if other[-1] != inner or output != rows + outer or other[:-1] not in (rows, rows[:-1]):
                continue
            if other[:-1] != rows:
                x = at.reshape(x, shape=(*x.type.shape[:-1], 1, x.type.shape[-1]))
            return as_type(at, at.expert_linear(x, ids, gathered.operands[0], transposed=transposed), op.result.type)
        return None

    def _unrepeated(self, x: Value, shape: tuple[object, ...], at: Builder) -> Value:
        """A vector for each expert [*rows, K, in]; [*rows, 1, in] where one was repeated for all of them."""
        inner = self.flow.op(x, "reshape")
        source = inner.operands[0] if inner is not None else x
        repeated = self.flow.op(source, "expand")
        if repeated is not None and repeated.result.type.shape == shape:
            before = repeated.operands[0]
            if isinstance(before, Value) and before.type.shape == (*shape[:-2], 1, shape[-1]):
                return before
        return source if isinstance(source, Value) and source.type.shape == shape else at.reshape(x, shape=shape)

    def _biased(self, op: Op, at: Builder) -> Value | None:
        """`expert_linear(x, ids, weight) + bias[ids]`, both in the same shape."""
        for x, other in orders(op):
            linear, gathered = self._through(x, "expert_linear"), self.flow.op(other, "index")
            ids = _ids(gathered, self.flow, rank=2)
            if linear is None or gathered is None or ids is None or len(linear.operands) != 3:
                continue
            if type_of(x).shape == type_of(other).shape == op.result.type.shape and self._source(ids) == self._source(
                    linear.operands[1]):
                found = at.expert_linear(*linear.operands, gathered.operands[0], **linear.attrs)
                return as_type(at, at.reshape(found, shape=op.result.type.shape), op.result.type)
        return None

    def _source(self, x: Operand) -> Operand:
        """An operand before reshapes."""
        while (inner := self.flow.op(x, "reshape")) is not None:
            x = inner.operands[0]
        return x

    def _through(self, x: Operand, name: str) -> Op | None:
        """The op called `name` that an operand is, reshapes left out."""
        return self.flow.op(self._source(x), name)

    # --- what experts say, and which ----------------------------------------------------------------------

    def _combined(self, op: Op, at: Builder) -> Value | None:
        """`sum(u [*rows,K,D] * w [*rows,K,1], over K)`, u made by experts; without w, every expert counts once."""
        x = op.operands[0]
        kind = type_of(x)
        if attr(op, "keepdim") or kind.rank < 2 or axes(kind.rank, attr(op, "dims")) != (kind.rank - 2,):
            return None
        product = self.flow.op(x, "mul")
        for u, w in orders(product) if product is not None else ():
            if type_of(w).shape == (*kind.shape[:-1], 1) and type_of(u).shape == kind.shape and self._made(u, kind):
                return as_type(at, at.combine(u, self._column(w, at)), op.result.type)
        summed = self._through(x, "combine")
        if summed is not None and summed.result.type.shape == op.result.type.shape:  # of one expert, done already
            return as_type(at, summed.result, op.result.type)
        if self._made(x, kind):
            return as_type(at, at.combine(x, at.full(shape=kind.shape[:-1], value=1.0, dtype=kind.dtype)),
                           op.result.type)
        return None

    def _weighted(self, op: Op, at: Builder) -> Value | None:
        """`u [*rows,D] * w [*rows,1]`, u made by the one expert of each row; or with an axis of size 1 for it."""
        shape, dtype = op.result.type.shape, op.result.type.dtype
        for u, w in orders(op):
            if len(shape) < 2 or type_of(u).shape != shape or type_of(w).shape != (*shape[:-1], 1):
                continue
            kind = Type(dtype, shape if shape[-2] == 1 else (*shape[:-1], 1, *shape[-1:]))
            if self._single(u, kind):
                found = at.combine(at.reshape(u, shape=kind.shape), at.reshape(w, shape=kind.shape[:-1]))
                return as_type(at, at.reshape(found, shape=shape), op.result.type)
        return None

    def _single(self, u: Operand, kind: Type) -> bool:
        """Whether a value [*rows,D] is what one expert says of each row, as it comes out of its last matrix."""
        while (inner := self.flow.op(u, "reshape", "cast")) is not None:
            u = inner.operands[0]
        return type_of(u).shape == kind.shape and self.flow.op(u, "expert_linear") is not None

    def _column(self, w: Operand, at: Builder) -> Value:
        """w [*rows,K,1] without its last axis."""
        inner, shape = self.flow.op(w, "reshape"), type_of(w).shape[:-1]
        if inner is not None and type_of(inner.operands[0]).shape == shape and isinstance(inner.operands[0], Value):
            return inner.operands[0]
        return at.reshape(w, shape=shape)

    def _made(self, u: Operand, kind: Type) -> bool:
        """Whether a value [*rows,K,D] is what the experts of these rows say: from an `expert_linear`, row by row."""
        seen, todo = set[str](), [u]
        while todo:
            op = self.flow.op(todo.pop())
            if op is None or op.result.name in seen:
                continue
            seen.add(op.result.name)
            if op.name == "expert_linear" and type_of(op.operands[1]).shape == kind.shape[:-1]:
                return True
            if OPS[op.name].elementwise or op.name in _ROWWISE:
                todo += values(op.operands)
        return False

    def _route(self, op: Op, at: Builder) -> tuple[Operand, ...] | None:
        """`topk(scores)` whose indices number experts; where these are used to gather from other scores, those."""
        numbers, ids = op.results
        if ids.name not in self.chosen or not last(op.operands[0], attr(op, "dim")) or attr(op, "largest") is not True:
            return None
        choice = op.operands[0]
        readers = users(self.graph.forward)
        gathers = [reader for reader in readers.get(ids.name, ()) if reader.name == "gather"
                   and reader.operands[1] == ids and last(reader.operands[0], attr(reader, "dim"))]
        scores = next((o for reader in gathers if type_of(o := reader.operands[0]).shape == type_of(choice).shape
                       and self._known(o)), None)
        if scores is None or readers.get(numbers.name) or numbers in self.graph.forward.results:
            weights, found = at.op("route_topk", choice, k=attr(op, "k"))
            return weights, found
        assert isinstance(scores, Value)
        weights, found = at.op("route_topk", scores, choice, k=attr(op, "k"))
        self.weights[scores.name, found.name] = weights
        return at.zeros(numbers.type), found

    def _certain(self, op: Op, at: Builder) -> Value | None:
        """The share of one expert among one is 1, whatever its score: nothing that a router could decide."""
        dim, shape = attr(op, "dim"), op.result.type.shape
        alone = isinstance(dim, int) and shape[axis(len(shape), dim)] == 1
        if not alone or self.flow.op(op.operands[0], "linear", "route_topk") is None:
            return None
        return at.full(shape=shape, value=1.0, dtype=op.result.type.dtype)

    def _known(self, operand: Operand) -> bool:
        """Whether a value is defined already."""
        return isinstance(operand, Value) and (operand.name in self.flow.definitions
                                               or operand in self.graph.forward.params)

    def _gathered(self, op: Op, at: Builder) -> Value | None:
        """What `route_topk` gives already."""
        scores, ids = op.operands
        if not isinstance(scores, Value) or not isinstance(ids, Value) or axis(
                scores.type.rank, int(str(attr(op, "dim")))) != scores.type.rank - 1:
            return None
        return self.weights.get((scores.name, ids.name))
