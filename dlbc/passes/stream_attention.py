"""StreamAttention: relevance of attention is computed for a block of query rows at a time.

The rules expand into primitives with intermediates of [S, B, heads, rows, keys]. This pass finds those (the *wide*
values: `attention_weights` and what is combined with them), proves by their axes that each op can be run on some of the
rows (`stream_axes.py`), and moves them into a function that a `stream` op runs block by block. Nothing wide is kept:
what a later stream needs again is computed again there, from q and k.

With `causal` a block reads only the keys that it sees. That is exact if every sum over rows or keys has a factor that
is 0 where the mask hides (as attention weights are); where that is not proven, the ops stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias

from dlbc.errors import IRError
from dlbc.ir.core import Attr, Function, Graph, Kernel, Op, Operand, Type, Value, Weight, values
from dlbc.ir.dims import Dim, Sym, product, symbol, symbols
from dlbc.ir.ops import attr, infer
from dlbc.passes import Pass, register
from dlbc.passes.rewrite import live
from dlbc.passes.stream_axes import SUMMED, Links, cut, links

ROWS, KEYS = symbol("rows"), symbol("keys")
"""The sizes of a block, as the functions of blocks call them."""
_ANY = (0, 2**31 - 1)

Label: TypeAlias = "tuple[int | None, int | None]"
"""The axis of a value's rows and that of its keys."""
NEITHER: Label = (None, None)


@register
@dataclass(frozen=True)
class StreamAttention(Pass):
    """Relevance of attention by blocks of rows; `budget`: numbers per block's largest intermediate, 0: the default."""

    name: ClassVar[str] = "stream_attention"
    budget: int = 0

    def run(self, graph: Graph) -> Graph:
        """The graph with `stream` ops and the functions they run."""
        part = graph.relevance
        if part is None or {str(ROWS), str(KEYS)} & set(graph.dims) or any(isinstance(i, Kernel) for i in part.body):
            return graph
        ops, functions = list(part.ops), _Functions(dict(graph.functions))
        flow = _Flow(ops, {v.name for v in part.results})
        moved: set[int] = set()
        added: list[Op] = []
        for number, op in enumerate(ops):
            if op.name != "attention_weights" or number in moved:
                continue
            made = functions.copy()
            try:
                cluster = _Cluster(flow, op)
                streams = list(cluster.streams(made, self.budget))
            except _Unproven:
                continue
            functions = made
            moved |= cluster.members
            added += streams
        if not moved:
            return graph
        body = _ordered([op for i, op in enumerate(ops) if i not in moved], added)
        return replace(graph, relevance=replace(part, body=body), functions=functions.all,
                       dims={**graph.dims, str(ROWS): _ANY, str(KEYS): _ANY})


class _Unproven(Exception):
    """A cluster that is not proven to be computable by blocks."""


class _Flow:
    """Who defines and who reads each value of a section, by number of the op."""

    def __init__(self, ops: Sequence[Op], kept: set[str]) -> None:
        self.ops, self.kept = ops, kept
        self.defined = {r.name: i for i, op in enumerate(ops) for r in op.results}
        self.readers: dict[str, list[int]] = {}
        for i, op in enumerate(ops):
            for value in values(op.inputs):
                self.readers.setdefault(value.name, []).append(i)


@dataclass
class _Functions:
    """The functions of the graph; equal blocks are one."""

    all: dict[str, Function]
    known: dict[tuple[object, ...], str] = field(default_factory=dict)

    def copy(self) -> _Functions:
        """The same functions, to be added to."""
        return _Functions(dict(self.all), dict(self.known))

    def named(self, params: tuple[Value, ...], body: tuple[Op, ...], results: tuple[Value, ...]) -> str:
        """The name of the function with this text."""
        key = (params, tuple((op.name, op.operands, op.results, tuple(op.attrs.items())) for op in body), results)
        if key not in self.known:
            number = len(self.all)
            while (name := "attention_rows" if not number else f"attention_rows.{number}") in self.all:
                number += 1
            self.known[key] = name
            self.all[name] = Function(name, params, body, results)
        return self.known[key]


class _Cluster:
    """The ops of one attention's relevance that have to do with rows and keys at once."""

    def __init__(self, flow: _Flow, anchor: Op) -> None:
        self.flow, self.ops = flow, flow.ops
        if links(anchor) is None:
            raise _Unproven
        *_, self.rows, self.keys = anchor.result.type.shape
        self.causal, self.window = bool(attr(anchor, "causal")), attr(anchor, "window")
        if self.rows == 1 or self.keys == 1 or (self.window is not None and not self.causal):
            raise _Unproven
        self.labels: dict[str, Label] = {}
        self.members: set[int] = set()
        self.wide: set[int] = set()
        self._spread(anchor)
        self.levels = self._levelled()
        if self.causal:
            self._check_hidden()

    def label(self, operand: Operand) -> Label:
        """The label of an operand: NEITHER unless known."""
        return self.labels.get(operand.name, NEITHER) if isinstance(operand, Value) else NEITHER

    def within(self, operand: Operand) -> bool:
        """True for what a block of a stream has at hand: results of its ops that have rows."""
        return isinstance(operand, Value) and self.flow.defined.get(operand.name) in self.members and (
            self.label(operand)[0] is not None)

    # --- which ops, and which axes ---------------------------------------------------------------------

    def _spread(self, anchor: Op) -> None:
        """From the attention weights to all that is as wide, and to the ops that read it."""
        self._put(anchor.result, (2, 3))
        waiting = [anchor.result.name]
        while waiting:
            name = waiting.pop()
            if name in self.flow.kept:
                raise _Unproven
            touching = list(self.flow.readers.get(name, ()))
            if name in self.flow.defined:
                touching.append(self.flow.defined[name])
                self.wide.add(self.flow.defined[name])
            for number in touching:
                self.members.add(number)
                waiting += self._labelled(self.ops[number])

    def _labelled(self, op: Op) -> Iterator[str]:
        """Label all that an op reads and makes; the names that turn out wide and were not known to be."""
        if op.name == "attention_weights" and (bool(attr(op, "causal")), attr(op, "window")) != (
                self.causal, self.window):
            raise _Unproven
        found = links(op)
        if found is None:
            raise _Unproven
        row, key = self._roles(op, found)
        for operand, indices in _sides(op, found):
            if isinstance(operand, Value | Weight):
                label = (_place(indices, row), _place(indices, key))
                if label == NEITHER:
                    continue
                if isinstance(operand, Weight):
                    raise _Unproven
                if self._put(operand, label) and None not in self.labels[operand.name] and (
                        operand.name in self.flow.defined):
                    yield operand.name
        if row is not None and row not in found.result and op.name not in SUMMED:
            raise _Unproven

    def _roles(self, op: Op, found: Links) -> tuple[int | None, int | None]:
        """The indices of an op that run over rows and over keys."""
        roles: list[int | None] = [None, None]
        for operand, indices in _sides(op, found):
            for role, axis in enumerate(self.label(operand)):
                if axis is None:
                    continue
                index = indices[axis]
                if index is None or roles[role] not in (None, index):
                    raise _Unproven
                roles[role] = index
        row, key = roles
        if row is not None and row == key:
            raise _Unproven
        return row, key

    def _put(self, value: Value, label: Label) -> bool:
        """Note a label; True if the value has one axis more than was known."""
        known = self.labels.get(value.name, NEITHER)
        for old, new, size in zip(known, label, (self.rows, self.keys), strict=True):
            if old is not None and new is not None and old != new:
                raise _Unproven
            if new is not None and not _fits(value.type.shape[new], size, stacked=size is self.rows):
                raise _Unproven
        joined = (label[0] if known[0] is None else known[0], label[1] if known[1] is None else known[1])
        self.labels[value.name] = joined
        return joined != known

    # --- what is computed when -------------------------------------------------------------------------

    def _levelled(self) -> dict[int, int]:
        """The stream in which each member is computed: later than sums over all rows that it depends on."""
        first, last = min(self.members), max(self.members)
        after = {name for name in self.labels if self.flow.defined.get(name, -1) in self.wide}
        for number in range(first, last + 1):
            if any(v.name in after for v in values(self.ops[number].inputs)):
                after |= {r.name for r in self.ops[number].results}
        for number in sorted(self.members, reverse=True):
            self._take_in(self.ops[number], after)
        levels: dict[int, int] = {}
        for number in range(first, last + 1):
            op, level = self.ops[number], -1
            for operand in values(op.inputs):
                source = self.flow.defined.get(operand.name)
                if source in levels:
                    level = max(level, levels[source] + (number in self.members and not self.within(operand)))
            if number in self.members:
                levels[number] = max(level, 0)
            elif level >= 0:
                levels[number] = level
        return {number: level for number, level in levels.items() if number in self.members}

    def _take_in(self, op: Op, after: set[str]) -> None:
        """Make members of the ops that compute from wide values the rows of what `op` reads."""
        for operand in values(op.operands):
            number = self.flow.defined.get(operand.name)
            if number is None or number in self.members or operand.name not in after:
                continue
            if self.label(operand)[0] is None:
                continue
            inner = self.ops[number]
            known = dict(self.labels)
            try:
                wide = list(self._labelled(inner))
                found = links(inner)
                assert found is not None
                row, _ = self._roles(inner, found)
                if wide or row is None or row not in found.result:
                    raise _Unproven
            except _Unproven:
                self.labels = known  # it stays outside, and `op` is of a later stream
                continue
            self.members.add(number)
            self._take_in(inner, after)

    # --- what the mask hides ---------------------------------------------------------------------------

    def _check_hidden(self) -> None:
        """Every sum over rows or keys has a factor that is 0 where a query does not see a key."""
        hidden: set[str] = set()
        for number in sorted(self.members):
            op = self.ops[number]
            zero = [isinstance(o, Value) and o.name in hidden for o in op.operands]
            found = links(op)
            assert found is not None
            lost = {i for i in self._roles(op, found) if i is not None} - set(found.result)
            keyed = any(self.label(o)[1] is not None for o in op.operands)
            if lost and keyed and not (op.name in SUMMED and any(zero)):
                raise _Unproven
            if None not in self.label(op.result) and (op.name == "attention_weights" or _is_hidden(op, zero)):
                hidden.add(op.result.name)

    # --- the streams -----------------------------------------------------------------------------------

    def streams(self, functions: _Functions, budget: int) -> Iterator[Op]:
        """The `stream` ops that compute what the members computed."""
        needed = {level: self._computed(level) for level in sorted(set(self.levels.values()))}
        for level, numbers in needed.items():
            later = set().union(*(others for other, others in needed.items() if other > level))
            results = [r for number in sorted(self.members - self.wide) if self.levels[number] == level
                       for r in self.ops[number].results if self._wanted(r.name, later)]
            if results:
                body = live([self.ops[number] for number in sorted(numbers)], results)
                yield self._stream(body, results, functions, budget)

    def _computed(self, level: int) -> set[int]:
        """The ops of a stream: those of its level, and again the wide ones of earlier streams that they read."""
        needed = {number for number, at in self.levels.items() if at == level}
        waiting = list(needed)
        while waiting:
            for value in values(self.ops[waiting.pop()].operands):
                source = self.flow.defined.get(value.name)
                if source in self.wide and source not in needed:
                    needed.add(source)
                    waiting.append(source)
        return needed

    def _wanted(self, name: str, later: set[int]) -> bool:
        """True if a value is read outside, or in a later stream."""
        return name in self.flow.kept or any(number not in self.members or number in later
                                             for number in self.flow.readers.get(name, ()))

    def _stream(self, body: Sequence[Op], results: Sequence[Value], functions: _Functions, budget: int) -> Op:
        block = _Block(self)
        inner = [block.add(op) for op in body]
        block.check(inner)
        width = max((product(_rest(op.result.type, self.label(op.result)[0], self.rows)) for op in body
                     if None not in self.label(op.result)), key=_degree)
        attrs: dict[str, Attr] = {
            "function": functions.named(tuple(block.params), tuple(inner), tuple(block.of(r) for r in results)),
            "over": tuple(self.label(o) for o in block.operands), "into": tuple(self.label(r) for r in results),
            "rows": self.rows, "keys": self.keys, "width": width}
        attrs |= {"causal": True} if self.causal else {}
        attrs |= {"window": self.window} if self.window is not None else {}
        attrs |= {"budget": budget} if budget else {}
        return Op("stream", tuple(block.operands), tuple(results), attrs, body[-1].place)


class _Block:
    """The function of a block being written: ops with the sizes of a block, values named for what they are."""

    def __init__(self, cluster: _Cluster) -> None:
        self.cluster = cluster
        self.params: list[Value] = []
        self.operands: list[Value | Weight] = []
        self.inner: dict[Value | Weight, Value] = {}
        self.names: dict[str, int] = {}

    def of(self, operand: Value | Weight) -> Value:
        """What an operand is in the function: a value of it, else a parameter."""
        if operand not in self.inner:
            self.inner[operand] = self.value("x", operand)
            self.params.append(self.inner[operand])
            self.operands.append(operand)
        return self.inner[operand]

    def value(self, stem: str, outer: Value | Weight) -> Value:
        """A new value of the function, of the type that an outer one has in a block."""
        number = self.names[stem] = self.names.get(stem, -1) + 1
        return Value(f"{stem}.{number}" if number else stem, self.type(outer))

    def type(self, outer: Value | Weight) -> Type:
        """The type that a value has in a block."""
        return cut(outer.type, self.sizes(outer))

    def sizes(self, outer: Value | Weight) -> dict[int, Dim]:
        """The sizes in a block of the axes of rows and of keys."""
        (row, key), shape = self.cluster.label(outer), outer.type.shape
        found: dict[int, Dim] = {} if row is None else {row: ROWS * _times(shape[row], self.cluster.rows)}
        return found if key is None else {**found, key: KEYS}

    def add(self, op: Op) -> Op:
        """The op on a block. _Unproven if its result is not of the type that the proof says."""
        operands = tuple(self.of(o) if isinstance(o, Value | Weight) else o for o in op.operands)
        attrs = dict(op.attrs)
        if "shape" in attrs:
            attrs["shape"] = self.type(op.result).shape
        self.inner[op.result] = result = self.value(op.name, op.result)
        try:
            fits = infer(op.name, operands, attrs) == (result.type,)
        except IRError:
            fits = False
        if not fits:
            raise _Unproven
        return Op(op.name, operands, (result,), attrs)

    def check(self, body: Iterable[Op]) -> None:
        """_Unproven if a size of the block that the ops ask for is told by no parameter."""
        asked = {name for op in body for value in op.attrs.values() for name in _names(value)}
        told = {str(dim) for param in self.params for dim in param.type.shape}
        if asked & {str(ROWS), str(KEYS)} - told:
            raise _Unproven


# --- small questions -----------------------------------------------------------------------------------

_KEEP_ZERO = frozenset({"neg", "abs", "sqrt", "relu", "sign", "cast", "permute", "reshape", "expand", "tanh",
                        "negative_part", "damp", "relu_adjoint", "slice", "cat", "roll", "flip"})
"""Ops that are 0 where their first operand is (`cat`: all of them)."""


def _is_hidden(op: Op, zero: Sequence[bool]) -> bool:
    """True if an op is 0 where its operands marked by `zero` are."""
    none = [z or (isinstance(o, int | float) and o == 0) for o, z in zip(op.operands, zero, strict=True)]
    if not any(zero):
        return False
    if op.name == "mul":
        return True
    if op.name in ("add", "sub", "maximum", "minimum", "cat"):
        return all(none)
    if op.name == "where":
        return none[1] and none[2]
    if op.name == "div":
        return zero[0] and isinstance(op.operands[1], int | float)
    return (op.name in _KEEP_ZERO or op.name == "safe_div") and zero[0]


def _sides(op: Op, found: Links) -> Iterator[tuple[Operand, tuple[int | None, ...]]]:
    yield from zip(op.operands, found.operands, strict=True)
    yield op.result, found.result


def _place(indices: tuple[int | None, ...], index: int | None) -> int | None:
    return None if index is None or index not in indices else indices.index(index)


def _fits(found: Dim, size: Dim, *, stacked: bool) -> bool:
    return found == size or (stacked and _times(found, size) > 1)


def _times(found: Dim, size: Dim) -> int:
    """How often rows are stacked in an axis; 0 where they are not."""
    if found == size:
        return 1
    quotient = found // size
    return quotient if isinstance(quotient, int) and quotient * size == found else 0


def _rest(type_: Type, row: int | None, rows: Dim) -> tuple[Dim, ...]:
    """The sizes of a value per row."""
    assert row is not None
    return (*type_.shape[:row], _times(type_.shape[row], rows), *type_.shape[row + 1:])


def _degree(size: Dim) -> tuple[int, int]:
    """Orders sizes per row: those with more dimensions (as the seeds) are the larger ones."""
    return (0, size) if isinstance(size, int) else (max(len(term) for term, _ in size.terms), size.terms[0][1])


def _names(value: Attr) -> set[str]:
    if isinstance(value, Sym):
        return symbols(value)
    return set().union(*map(_names, value)) if isinstance(value, tuple) else set()


def _ordered(ops: Sequence[Op], added: Sequence[Op]) -> tuple[Op, ...]:
    """Ops in their order, each of the added ones where it is first needed, what it reads before it."""
    defined = {r.name: op for op in (*ops, *added) for r in op.results}
    done: set[int] = set()
    found: list[Op] = []

    def place(op: Op) -> None:
        stack, open_ = [op], set[int]()
        while stack:
            top = stack[-1]
            open_.add(id(top))
            missing = [source for v in values(top.inputs)
                       if (source := defined.get(v.name)) is not None and id(source) not in done]
            if any(id(source) in open_ for source in missing):
                raise IRError(f"a block would read what is computed from it: {missing[0].result}")
            if missing:
                stack += missing
                continue
            stack.pop()
            if id(top) not in done:
                done.add(id(top))
                found.append(top)

    for op in (*ops, *added):
        place(op)
    return tuple(found)



