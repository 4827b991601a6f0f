"""Fuse: from level 3 to level 4. Primitive ops are grouped into kernels that a backend writes as one function each.

Four kinds of groups, tried in this order; what is in none stays an op of its own, which the array library runs:

* `gemm`: products of rows with matrices. Products that share an operand and have equal shapes share a kernel, each with
  an accumulator. Cheap ops of one operand (|W|) are computed as it is read; what is pointwise after it, before writing.
* `grouped`: the same for rows of which each has the matrix of its expert (`grouped_linear`).
* `row`: ops that take the last axis together (norms, softmax, sums), with what is pointwise around them.
* `elementwise`: what is left of pointwise ops, with the moves (`permute`, `slice`, `cat`, ...) between them.

A group can be one kernel because nothing outside of it stands between its ops: contracted, the graph has no cycle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from dlbc.ir.core import Graph, Kernel, Op, Operand, Value, Weight, values
from dlbc.ir.dims import Dim
from dlbc.ir.fusible import (
    CHEAP,
    MOVES,
    POINTWISE,
    PRODUCTS,
    VIEWS,
    factors,
    fits,
    is_product,
    is_row,
    template_of,
)
from dlbc.ir.ops import attr
from dlbc.passes import Pass, register
from dlbc.passes.fuse_groups import Groups, one_of_each, rewritten_bodies, spread
from dlbc.passes.rewrite import names

ALONE = frozenset({"safe_div", "stabilise", "damp", "glu", "rotary", "rms_norm", "row_statistics"})
"""Ops that are worth a kernel of their own: the library takes several steps for them."""


@register
@dataclass(frozen=True)
class Fuse(Pass):
    """Group ops of the forward and relevance sections, and of functions, into kernels; kernels there are stay.

    `accumulators`: products in one kernel, at most. `pointers`: tensors that a kernel reads and writes, at most;
    `beside`: those of a kernel of products, where each is a block in registers beside the accumulators.
    `longest`: ops in one kernel, at most. Functions that are run on blocks of rows (`stream`) stay as they are.
    """

    name: ClassVar[str] = "fuse"
    accumulators: int = 2
    pointers: int = 16
    beside: int = 11
    longest: int = 48

    def run(self, graph: Graph) -> Graph:
        """The graph with kernels."""
        taken = names(graph)

        def fused(items: Sequence[Op | Kernel], escaping: set[str], prefix: str,
                  numbers: Iterator[int]) -> tuple[Op | Kernel, ...]:
            return _Fusing(self, spread(items, escaping, taken), escaping).run(prefix, numbers)

        return _unpaired(rewritten_bodies(graph, fused))


def _unpaired(graph: Graph) -> Graph:
    """Without the pairing of relevance ops with forward values that are gone, as copies stand for them."""
    if graph.relevance is None:
        return graph
    known = {p.name for p in graph.forward.params} | {r.name for op in graph.forward.ops for r in op.results}

    def plain(op: Op) -> Op:
        return replace(op, of="") if op.of and op.of not in known else op

    return replace(graph, relevance=replace(graph.relevance, body=tuple(
        replace(item, body=tuple(map(plain, item.body))) if isinstance(item, Kernel) else plain(item)
        for item in graph.relevance.body)))


class _Fusing:
    """The groups of one body."""

    def __init__(self, options: Fuse, items: Sequence[Op | Kernel], escaping: set[str]) -> None:
        self.options, self.escaping = options, escaping
        self.groups = Groups(items, escaping)
        self.template: dict[int, str] = {}  # group: template
        self.assigned: set[int] = set()  # ops that are in a group

    def run(self, prefix: str, numbers: Iterator[int]) -> tuple[Op | Kernel, ...]:
        """The body with kernels."""
        self.products()
        self.rows()
        self.elements()
        kernels: dict[int, Kernel] = {}
        for group, template in self.template.items():
            members = self.groups.members[group]
            if self.pays(members, template):
                ops = [self.op(at) for at in members]
                results = tuple(r for op in ops for r in op.results if self.groups.seen_outside(r.name, group))
                if not results:
                    continue  # dead ops make no kernel
                body, results = one_of_each(ops, results)
                kernels[group] = Kernel("", template, body, results)
        items: list[Op | Kernel] = []
        for item in self.groups.ordered(kernels):
            named = isinstance(item, Kernel) and not item.name
            items.append(replace(item, name=f"{prefix}{next(numbers)}") if named else item)
        return tuple(items)

    def pays(self, members: Sequence[int], template: str) -> bool:
        """Whether a group is worth a kernel: it has something to share, reads something, and not too much."""
        ops = [self.op(at) for at in members]
        counted = [op for op in ops if op.name not in VIEWS and op.name != "full"]
        pointers = self.groups.pointers(members)
        if not pointers:
            return False
        return any(op.name in PRODUCTS for op in ops) or len(counted) > 1 or any(op.name in ALONE for op in counted)

    def op(self, at: int) -> Op:
        """The op at a place; only ops are asked for."""
        item = self.groups.items[at]
        assert isinstance(item, Op)
        return item

    def free(self, at: int) -> Op | None:
        """The op at a place if it is in no group yet."""
        item = self.groups.items[at]
        return item if isinstance(item, Op) and at not in self.assigned else None

    def start(self, at: int, template: str) -> int:
        """A group of one op."""
        self.assigned.add(at)
        self.template[self.groups.of[at]] = template
        return self.groups.of[at]

    def take(self, group: int, at: int, behind: Sequence[int] = ()) -> bool:
        """Take an op into a group, if the graph stays without cycles and the group is not too large; with the ops
        `behind` it, which are taken next."""
        if len(self.groups.members[group]) >= self.options.longest:
            return False
        if not self.groups.can_join(group, self.groups.of[at]):
            return False
        members = [*self.groups.members[group], at, *behind]
        most = self.options.beside if self.template[group] in ("gemm", "grouped") else self.options.pointers
        if self.groups.pointers(members) > most:
            return False
        self.groups.join(group, self.groups.of[at])
        self.assigned.add(at)
        return True

    def absorbed(self, at: int, group: int) -> bool:
        """Whether what an op computes is read in the group alone."""
        return not any(self.groups.seen_outside(r.name, group) for r in self.op(at).results)

    # --- products ----------------------------------------------------------------------------------------

    def products(self) -> None:
        """Groups of products, from the last to the first: what comes after two of them belongs to the later."""
        anchors = [at for at in range(len(self.groups.items)) if (op := self.free(at)) is not None and is_product(op)]
        groups: list[int] = []
        for want in (2, 1):
            for first in anchors:
                for second in anchors:
                    if first < second and second not in self.assigned and self.alike(first, second) >= want:
                        group = self.groups.of[first] if first in self.assigned else self.start(
                            first, template_of(self.op(first)))
                        members = self.groups.members[group]
                        count = sum(is_product(self.op(at)) for at in members)
                        if count < self.options.accumulators and self.groups.before[second].isdisjoint(members):
                            self.take(group, second)
        for at in anchors:
            if at not in self.assigned:
                self.start(at, template_of(self.op(at)))
            if self.groups.of[at] not in groups:
                groups.append(self.groups.of[at])
        for group in reversed(groups):
            for at in list(self.groups.members[group]):
                for operand in factors(self.op(at)):
                    self.cheap(group, operand)
            self.after(group, {self.op(self.groups.members[group][-1]).result.type.shape})

    def alike(self, first: int, second: int) -> int:
        """How many factors two products of equal shapes have in common; -1 where the shapes differ, or the experts of
        the rows."""
        a, b = self.op(first), self.op(second)
        if a.name != b.name or a.result.type.shape != b.result.type.shape:
            return -1
        if a.name == "grouped_linear" and (a.operands[1] != b.operands[1]
                                           or attr(a, "transposed") != attr(b, "transposed")):
            return -1
        pairs = list(zip(factors(a), factors(b), strict=True))
        if any(x.type.shape != y.type.shape for x, y in pairs if isinstance(x, Value | Weight)
               and isinstance(y, Value | Weight)):
            return -1
        return sum(self.root(x) == self.root(y) for x, y in pairs)

    def root(self, operand: Operand) -> Operand:
        """What an operand is computed of by cheap ops."""
        while isinstance(operand, Value) and (at := self.groups.definition.get(operand.name)) is not None:
            item = self.groups.items[at]
            if not isinstance(item, Op) or item.name not in CHEAP or not fits(item):
                break
            operand = item.operands[0]
        return operand

    def cheap(self, group: int, operand: Operand) -> None:
        """Take the cheap ops that an operand is computed by, as far as nothing else reads them."""
        while isinstance(operand, Value) and (at := self.groups.definition.get(operand.name)) is not None:
            op = self.free(at)
            if op is None or op.name not in CHEAP or not fits(op) or not self.absorbed_by(at, group):
                return
            if self.better_before(op) or not self.take(group, at):
                return
            operand = op.operands[0]

    def better_before(self, op: Op) -> bool:
        """Whether a cheap op is the only reader of what is computed here: it can be computed with that, before it is
        written."""
        x = self.root(op.operands[0])
        return isinstance(x, Value) and x.name in self.groups.definition and x.name not in self.escaping and len(
            self.groups.readers[x.name]) == 1

    def absorbed_by(self, at: int, group: int) -> bool:
        """Whether only ops of the group read what an op computes."""
        return all(r.name not in self.escaping and all(self.groups.of[reader] == group
                   for reader in self.groups.readers[r.name]) for r in self.op(at).results)

    def after(self, group: int, shapes: set[tuple[Dim, ...]], rows: tuple[Dim, ...] = ()) -> None:
        """Take what is pointwise after a group and has one of its shapes, and what takes `rows` of it together."""
        waiting, following = list(self.groups.members[group]), list[int]()
        while waiting:
            at = waiting.pop(0)
            for result in self.op(at).results:
                for reader in self.groups.readers[result.name]:
                    op = self.free(reader)
                    if op is None or not self.follows(op, shapes, rows) or not self.take(group, reader):
                        continue
                    waiting.append(reader)
                    following.append(reader)
                    for operand in op.operands:
                        self.cheap(group, operand)
                        self.alongside(group, operand)
        # What is made of tensors that have been read since, for what follows; what a product reads is made elsewhere.
        for at in following:
            for operand in self.op(at).operands:
                self.alongside(group, operand)
                inner = self.groups.definition.get(operand.name) if isinstance(operand, Value) else None
                if inner is not None and inner not in following and self.groups.of[inner] == group and (
                        not is_product(self.op(inner)) and not is_row(self.op(inner))):
                    following.append(inner)

    def alongside(self, group: int, operand: Operand) -> None:
        """Take what is pointwise and computed for a group alone, with the cheap ops behind it, as far as no more
        tensors are read for it: the group computes it where it uses it, and nothing is written in between."""
        at = self.groups.definition.get(operand.name) if isinstance(operand, Value) else None
        op = self.free(at) if at is not None else None
        if op is None or at is None or op.name not in POINTWISE or not fits(op) or not self.absorbed_by(at, group):
            return
        members = self.groups.members[group]
        behind = [each for inner in op.operands for each in self.cheap_for(at, inner)]
        more = self.groups.pointers([*members, at, *behind]) - self.groups.pointers(members)
        if more > 0 or not self.take(group, at, behind):
            return
        for inner in op.operands:
            self.cheap(group, inner)
            self.alongside(group, inner)

    def cheap_for(self, reader: int, operand: Operand) -> Iterator[int]:
        """The cheap ops that an operand of an op is computed by for that op alone."""
        while isinstance(operand, Value) and (at := self.groups.definition.get(operand.name)) is not None:
            op = self.free(at)
            if op is None or op.name not in CHEAP or not fits(op) or operand.name in self.escaping or any(
                    other != reader for other in self.groups.readers[operand.name]):
                return
            yield at
            reader, operand = at, op.operands[0]

    def follows(self, op: Op, shapes: set[tuple[Dim, ...]], rows: tuple[Dim, ...]) -> bool:
        """Whether an op can be computed at the end of a kernel."""
        if op.name in POINTWISE:
            return fits(op) and op.result.type.shape in shapes
        if not rows or not is_row(op):
            return False
        x = op.operands[0]
        assert isinstance(x, Value | Weight)
        return x.type.shape == rows

    # --- rows --------------------------------------------------------------------------------------------

    def rows(self) -> None:
        """Groups of ops that take rows together, from the first to the last."""
        for at in range(len(self.groups.items)):
            op = self.free(at)
            if op is None or not is_row(op):
                continue
            x = op.operands[0]
            assert isinstance(x, Value | Weight)
            whole, lead = x.type.shape, x.type.shape[:-1]
            group = self.start(at, "row")
            self.before(group, whole)
            self.after(group, {whole, (*lead, 1), lead}, whole)
            self.before(group, whole)

    def before(self, group: int, shape: tuple[Dim, ...]) -> None:
        """Take what a group is computed of: what nothing else reads, or what is pointwise and of its shape."""
        waiting = list(self.groups.members[group])
        while waiting:
            for operand in self.op(waiting.pop(0)).operands:
                at = self.groups.definition.get(operand.name) if isinstance(operand, Value) else None
                op = self.free(at) if at is not None else None
                if op is None or at is None or not fits(op):
                    continue
                own = op.name in POINTWISE and op.result.type.shape == shape
                if op.name in MOVES and self.behind_rows(op, group):
                    continue
                if (own or self.absorbed_by(at, group)) and self.take(group, at):
                    waiting.append(at)

    def behind_rows(self, op: Op, group: int) -> bool:
        """Whether an op reads, by way of others in the group, what is computed of whole rows."""
        waiting, inside = [op], set(self.groups.members[group])
        while waiting:
            for value in values(waiting.pop().operands):
                at = self.groups.definition.get(value.name)
                if at in inside and at is not None:
                    if is_row(self.op(at)) and self.template[group] == "row":
                        return True
                    waiting.append(self.op(at))
        return False

    # --- pointwise ops -----------------------------------------------------------------------------------

    def elements(self) -> None:
        """Groups of pointwise ops and moves, from the last to the first."""
        for at in reversed(range(len(self.groups.items))):
            op = self.free(at)
            if op is None or not fits(op) or op.name in VIEWS or op.name == "full" or not op.result.type.rank:
                continue
            group, shape = self.start(at, "elementwise"), op.result.type.shape
            self.before(group, shape)
            self.after(group, {shape})
            self.before(group, shape)
