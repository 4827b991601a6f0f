"""Checks a graph: `verify`. What it promises is listed in `docs/ir.md`, section "Contracts".

Run after every pass when `DLBC_DEBUG` is set, and in all tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from keyword import iskeyword
from typing import NoReturn

from dlbc.errors import IRError
from dlbc.ir.core import DTYPES, Attr, Function, Graph, Kernel, Op, Operand, Section, Type, Value, Weight
from dlbc.ir.dims import Dim, Sym, substitute, symbol, symbols
from dlbc.ir.ops import infer
from dlbc.ir.printer import print_op, print_operand
from dlbc.ir.signature import check
from dlbc.ir.source import Spans, nearest
from dlbc.ir.syntax import CONSTANTS

SEEDS = symbol("S")
RESERVED = ("max", "min", *CONSTANTS)
"""Words that the text of sizes and literals uses."""
_SOUND: dict[int, Op] = {}
"""Ops whose result types were found right, by identity: ops do not change, and passes hand most of them on. They are
kept alive here, so that no other op gets their number, and forgotten together when there are `_MANY`."""
_MANY = 20_000
_BOOKKEEPING = ("rel.sum", "rel.to_relevance", "rel.to_multiplier")


def verify(graph: Graph, spans: Spans | None = None) -> None:
    """Raise IRError at the first thing that is wrong; with `spans` (of the parser) it points into the text."""
    _Verifier(graph, spans).graph_()


@dataclass
class _Scope:
    """What the ops of a section or function may read, and why they may not read the rest."""

    name: str
    weights: Mapping[str, Weight]
    callable: Mapping[str, Function]
    values: dict[str, Type] = field(default_factory=dict)
    hidden: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Values that exist, but not for this scope: the fact and the hint to say so."""


class _Verifier:
    def __init__(self, graph: Graph, spans: Spans | None) -> None:
        self.graph, self.spans = graph, spans
        self.taken: dict[str, str] = {}
        self.good_dims: set[Sym] = set()
        self.good_types: set[Type] = set()
        self.forward_ops: dict[str, Op] = graph.forward.definitions()
        self.forward_types = {p.name: p.type for p in graph.forward.params} | {
            result.name: result.type for op in self.forward_ops.values() for result in op.results}

    def fail(self, fact: str, scope: str, at: Op | str, part: str = "", hint: str = "") -> NoReturn:
        """Raise the error; `at` is an op or a key of the spans, `part` the token in it to point at."""
        own = f"{scope} " if scope.startswith("@") else ""
        key = f"{own}%{at.result.name}" if isinstance(at, Op) else at
        offset = self.spans.find(key, part) if self.spans is not None else None
        if self.spans is not None and offset is not None:
            raise self.spans.error(fact, offset, hint)
        raise IRError(fact, where=f"in {scope}, `{print_op(at)}`" if isinstance(at, Op) else f"in {scope}", hint=hint)

    # --- graph and sections ----------------------------------------------------------------------------

    def graph_(self) -> None:
        """Everything."""
        graph = self.graph
        for name, (low, high) in graph.dims.items():
            if not name.isidentifier() or iskeyword(name) or name in RESERVED:
                self.fail(f"`{name}` cannot name a dimension", "the graph's header", "graph",
                          hint="dimensions are written into generated code: a plain name, no keyword")
            if low > high:
                self.fail(f"dimension {name} ranges from {low} to {high}", "the graph's header", "graph",
                          hint="write the smaller size first")
        for name, weight in graph.weights.items():
            if name != weight.name:
                self.fail(f"weight @{weight.name} is listed as @{name}", "weights", f"@{name}")
            self.type(weight.type, "weights", f"@{name}")
            self.printable(name, "weights", f"@{name}")
        for text in (graph.name, *_strings(tuple(graph.attrs.values())), *graph.locations,
                     *(part for at in graph.locations.values() for part in (at.cls, at.source))):
            self.printable(text, "the graph's header", "graph")
        known: dict[str, Function] = {}
        for function in graph.functions.values():
            self.function(function, known)
            known[function.name] = function
        prepare = self.prepare(graph.prepare)
        forward = self.forward(graph.forward, prepare)
        if graph.relevance is not None:
            self.relevance(graph.relevance, forward, prepare)

    def printable(self, text: str, scope: str, at: Op | str) -> None:
        """Names and strings go into comments and source of generated code: no line breaks, nothing invisible."""
        if not text.isprintable():
            self.fail(f"{text!r} holds a character that does not print", scope, at,
                      hint="names, places and strings hold printable characters only")

    def scope(self, name: str) -> _Scope:
        """What every section may read."""
        return _Scope(name, self.graph.weights, self.graph.functions)

    def function(self, function: Function, known: Mapping[str, Function]) -> None:
        """A function: its own names, and calls of earlier functions only."""
        name = f"@{function.name}"
        self.printable(function.name, name, name)
        own = {param.name: param for param in function.params if isinstance(param, Weight)}
        scope = _Scope(name, {**self.graph.weights, **own}, dict(known))
        outer, self.taken = self.taken, {}
        for param in function.params:
            self.type(param.type, name, name)
            self.printable(param.name, name, name)
            if isinstance(param, Value):
                self.define(param, scope, name)
        self.body(function.body, scope)
        self.results(function.results, scope)
        self.taken = outer

    def prepare(self, section: Section) -> _Scope:
        """The prepare section reads weights alone; later sections see its results."""
        scope = self.scope("prepare")
        for value in section.params:
            self.fail(f"prepare has the parameter %{value.name}", "prepare", f"%{value.name}",
                      hint="prepare computes from weights alone; read weights by their @names")
        for name in self.forward_types:
            scope.hidden[name] = (f"prepare reads the forward value %{name}",
                                  "prepare runs before there are inputs: it reads weights and its own values")
        self.body(section.body, scope)
        self.results(section.results, scope)
        returned = {value.name for value in section.results}
        after = self.scope("prepare")
        for name, type_ in scope.values.items():
            if name in returned:
                after.values[name] = type_
            else:
                after.hidden[name] = (f"%{name} is not returned by prepare", f"write `return ..., %{name}` there")
        return after

    def forward(self, section: Section, prepare: _Scope) -> _Scope:
        """The model: reads its parameters, weights and what prepare returns."""
        scope = self.scope("forward")
        scope.values.update(prepare.values)
        scope.hidden.update(prepare.hidden)
        for param in section.params:
            self.define(param, scope, f"%{param.name}")
        self.body(section.body, scope)
        self.results(section.results, scope)
        self.results(section.saves, scope, "saved")
        for key, values in (("inputs", section.params), ("outputs", section.results)):
            names = self.graph.attrs.get(key)
            # After the user's outputs, forward may return what the explanation shows of inner places.
            if isinstance(names, tuple) and (
                    len(names) > len(values) or (key == "inputs" and len(names) < len(values))):
                self.fail(f"{len(names)} names in {key}, but {len(values)} {key}", "the graph's header", "graph",
                          hint=f"`{key}` names forward's {'parameters' if key == 'inputs' else 'results'} in order")
        return scope

    def relevance(self, section: Section, forward: _Scope, prepare: _Scope) -> None:
        """The explanation: reads seeds, weights, what prepare returns and what forward saves."""
        scope = self.scope("relevance")
        scope.hidden.update(forward.hidden)
        saved = {value.name for value in self.graph.forward.saves}
        for name, type_ in forward.values.items():
            if name in saved or name in prepare.values:
                scope.values[name] = type_
            else:
                scope.hidden[name] = (f"%{name} is not saved", f"write `save %{name}` after forward's return, or "
                                                               "recompute it in the relevance section")
        self.forward_types |= {r.name: r.type for op in section.ops for r in op.results}  # deferred, recomputed
        scores = self.graph.attrs.get("scores")
        for seed in section.params:  # of scores that no rule reads, only their seed is left
            form, _, name = seed.name.partition(".")
            if form in ("R", "M") and name == scores and name not in self.forward_types:
                self.forward_types[name] = Type("f32", seed.type.shape[1:])
        for seed in section.params:
            if not seed.type.floating:  # which numbers of an output are seeded: an index, no seed
                self.define(seed, scope, f"%{seed.name}")
                continue
            form, _, name = seed.name.partition(".")
            explained = self.forward_types.get(name)
            if form == "ref" and explained is not None and self.graph.attrs.get("reference"):
                self.expect(seed.type, explained, f"%{seed.name}", "relevance", f"%{seed.name}", f"%{seed.name}")
                self.define(seed, scope, f"%{seed.name}")
                continue
            if explained is None or form not in ("R", "M"):
                self.fail(f"the seed %{seed.name} belongs to no output", "relevance", f"%{seed.name}",
                          hint=nearest(seed.name, [f"R.{value.name}" for value in self.graph.forward.results], "%")
                          or "a seed is called %R. and the name of the forward value that is explained")
            self.expect(seed.type, _explained(explained), f"the seed %{seed.name}", "relevance", f"%{seed.name}",
                        f"%{seed.name}")
            self.define(seed, scope, f"%{seed.name}")
        self.body(section.body, scope)
        self.results(section.results, scope)

    def results(self, values: Iterable[Value], scope: _Scope, verb: str = "returned") -> None:
        """What a section returns or saves, it can read."""
        for value in values:
            self.read(value, scope, f"return {scope.name}", f"%{value.name} is {verb}, but ")

    # --- ops -------------------------------------------------------------------------------------------

    def body(self, body: Sequence[Op | Kernel], scope: _Scope) -> None:
        """Ops and kernels in order."""
        for item in body:
            if isinstance(item, Op):
                self.op(item, scope)
                continue
            for text in (item.name, item.template, *_strings(tuple(item.config.values()))):
                self.printable(text, scope.name, f"@{item.name}")
            for op in item.body:
                self.op(op, scope)
            inside = {result.name for op in item.body for result in op.results}
            for value in item.results:
                if value.name not in inside:
                    own = f"{scope.name} " if scope.name.startswith("@") else ""
                    self.fail(f"kernel @{item.name} returns %{value.name}, which it does not compute", scope.name,
                              f"{own}@{item.name}", hint=nearest(value.name, sorted(inside), "%"))
            for name in sorted(inside - {value.name for value in item.results}):
                del scope.values[name]
                scope.hidden[name] = (f"%{name} is inside kernel @{item.name}",
                                      f"let the kernel return it: `}} -> ..., %{name}`")

    def op(self, op: Op, scope: _Scope) -> None:
        """One op: what it reads, what it computes, what it defines."""
        for operand in op.inputs:
            if isinstance(operand, Value):
                self.read(operand, scope, op)
            elif isinstance(operand, Weight):
                self.weight(operand, scope, op)
            elif isinstance(operand, Sym):
                self.dim(operand, scope.name, op)
        for value in op.attrs.values():
            self.attr(value, scope.name, op)
        self.printable(op.place, scope.name, op)
        if op.place and self.graph.locations and op.place not in self.graph.locations:
            self.fail(f"unknown place #{op.place}", scope.name, op, f"#{op.place}",
                      nearest(op.place, self.graph.locations, "#") or "list it in `locations {}`")
        if op.of and scope.name == "relevance" and op.of not in self.forward_types:
            self.fail(f"%{op.of} is no forward value", scope.name, op, f"%{op.of}",
                      nearest(op.of, self.forward_types, "%") or "`of` names the forward value that is explained")
        for result in op.results:
            self.type(result.type, scope.name, op)
        if op.name.startswith("rel."):
            self.relevance_op(op, scope)
        elif "function" in op.attrs:
            self.computed(op, self.call(op, scope), scope)
        elif id(op) not in _SOUND:
            self.computed(op, self.inferred(op, scope), scope)
            if len(_SOUND) >= _MANY:
                _SOUND.clear()
            _SOUND[id(op)] = op
        for result in op.results:
            self.define(result, scope, op)

    def inferred(self, op: Op, scope: _Scope) -> tuple[Type, ...]:
        """The types that the catalogue gives the op's results."""
        if op.rule is not None:
            self.fail(f"`{op.name}` takes no rule", scope.name, op, hint=f"a relevance op is `rel.{op.name}<...>`")
        if op.name == "call":
            self.fail("call names no function", scope.name, op, hint="write `call @name(...)`")
        try:
            check(op.name, op.operands, op.attrs)
            return infer(op.name, op.operands, dict(op.attrs))
        except IRError as problem:
            self.fail(problem.fact, scope.name, op, op.name, problem.hint)

    def computed(self, op: Op, types: Sequence[Type], scope: _Scope) -> None:
        """The op's results have the types that it computes."""
        if len(types) != len(op.results):
            self.fail(f"`{op.name}` has {len(types)} results, not {len(op.results)}", scope.name, op,
                      hint=f"their types: {', '.join(map(str, types))}")
        for result, type_ in zip(op.results, types, strict=True):
            self.expect(result.type, type_, f"%{result.name}", scope.name, op)

    def call(self, op: Op, scope: _Scope) -> tuple[Type, ...]:
        """The types that a function returns, if the operands fit its parameters."""
        name = op.attrs["function"]
        function = scope.callable.get(name) if isinstance(name, str) else None
        if function is None:
            self.fail(f"unknown function @{name}", scope.name, op, f"@{name}",
                      nearest(str(name), scope.callable, "@") or "define it above, before it is called")
        if op.name not in ("call", "stream"):
            self.fail(f"`{op.name}` takes no function", scope.name, op, f"@{name}", f"write `call @{name}(...)`")
        sizes = self.streamed(op, function, scope) if op.name == "stream" else {}
        takes = ", ".join(f"{print_operand(param)} : {param.type}" for param in function.params)
        if len(op.operands) != len(function.params):
            self.fail(f"@{name} takes {len(function.params)} operands, got {len(op.operands)}", scope.name, op,
                      f"@{name}", f"it is @{name}({takes})")
        for param, operand in zip(function.params, op.operands, strict=True):
            found = operand.type if isinstance(operand, (Value, Weight)) else None
            if found != _sized(param.type, sizes):
                self.fail(f"{print_operand(param)} of @{name} is {param.type}, got {print_operand(operand)}"
                          f"{f' : {found}' if found else ''}", scope.name, op,
                          print_operand(operand), f"it is @{name}({takes})")
        return tuple(_sized(result.type, sizes) for result in function.results)

    def streamed(self, op: Op, function: Function, scope: _Scope) -> dict[str, Dim]:
        """The sizes that a block's `rows` and `keys` stand for in a whole `stream`."""
        rows, keys, over, into = (op.attrs.get(name) for name in ("rows", "keys", "over", "into"))
        known = isinstance(rows, int | Sym) and isinstance(keys, int | Sym) and "width" in op.attrs
        if not known or not isinstance(over, tuple) or not isinstance(into, tuple) or (
                (len(over), len(into)) != (len(function.params), len(function.results))):
            self.fail("`stream` lacks sizes or axes", scope.name, op, "stream",
                      "it has `rows`, `keys` and `width`; `over` and `into`, the axes of rows and of keys of each "
                      "operand and of each result")
        return {"rows": rows, "keys": keys}  # type: ignore[dict-item]

    def relevance_op(self, op: Op, scope: _Scope) -> None:
        """A `rel.*` op of level 2, against the forward op that it is paired with."""
        if scope.name in ("prepare", "forward"):
            self.fail(f"`{op.name}` in {scope.name}", scope.name, op, op.name, "relevance ops stand in `relevance {}`")
        if not op.of:
            self.fail(f"`{op.name}` is paired with no forward value", scope.name, op, op.name,
                      "write `of %h` after its operands")
        if scope.name != "relevance":
            return  # in a function, `of` names a value of another function
        if op.name in _BOOKKEEPING and (op.name != "rel.sum" or op.rule is None):  # a forward `sum` has a rule
            explained = _explained(self.forward_types[op.of])
            self.computed(op, [explained], scope)
            for operand in op.operands:
                self.incoming(operand, explained, op, scope)
            wanted = 1 if op.name != "rel.sum" else len(op.operands) or 1
            reads = tuple(value.name for value in op.reads if isinstance(value, Value))
            if reads == (op.of, f"ref.{op.of}") and self.graph.attrs.get("reference"):
                reads = (op.of,)  # what is converted is relevance of the difference
            if len(op.operands) != wanted or reads != (() if op.name == "rel.sum" else (op.of,)):
                self.fail(f"`{op.name}` reads other than its kind", scope.name, op, op.name,
                          f"it is `{op.name}(%a, %b) of %{op.of}`" if op.name == "rel.sum" else
                          f"it is `{op.name}(%a; %{op.of}) of %{op.of}`")
            return
        forward = self.forward_ops.get(op.of)
        if forward is None or op.name != f"rel.{forward.name}" or op.of != forward.result.name:
            self.fail(f"`{op.name}` is paired with %{op.of}, "
                      + ("a parameter" if forward is None else f"a result of `{forward.name}`"), scope.name, op,
                      f"%{op.of}", "pair it with the first result of its forward op" if forward is not None
                      and op.name == f"rel.{forward.name}" else
                      f"the rule for it is `rel.{forward.name}`" if forward is not None else "it has no rule")
        if len(op.operands) != len(forward.results):
            self.fail(f"`{op.name}` takes {len(forward.results)} incoming relevances, got {len(op.operands)}",
                      scope.name, op, op.name, "one for each result of the forward op, `none` where none arrives; "
                      "what it reads follows after `;`")
        for operand, value in zip(op.operands, forward.results, strict=True):
            self.incoming(operand, _explained(value.type), op, scope)
        carrying = [_explained(o.type) for o in forward.operands if isinstance(o, Value)]
        left = iter(carrying)
        for result in op.results:
            if not any(type_ == result.type for type_ in left):
                self.fail(f"%{result.name} is {result.type}, which explains no operand of "
                          f"`{forward.name}`", scope.name, op,
                          hint=f"its operands have, in order, relevance {', '.join(map(str, carrying)) or 'of none'}")

    def incoming(self, operand: Operand, type_: Type, op: Op, scope: _Scope) -> None:
        """Relevance that arrives at an op has the shape of the value, and S in front."""
        if isinstance(operand, Value):
            self.expect(operand.type, type_, f"the incoming %{operand.name}", scope.name, op, f"%{operand.name}")
        elif operand is not None:
            self.fail(f"{print_operand(operand)} is no relevance", scope.name, op, print_operand(operand),
                      "forward values and weights follow after `;`")

    # --- names and types -------------------------------------------------------------------------------

    def define(self, value: Value, scope: _Scope, at: Op | str) -> None:
        """A new name, of which the graph (or function) has no other."""
        if value.name in self.taken:
            self.fail(f"%{value.name} is defined twice", scope.name, at,
                      hint=f"it is defined in {self.taken[value.name]}; every value has its own name, in all sections")
        self.type(value.type, scope.name, at)
        self.printable(value.name, scope.name, at)
        self.taken[value.name] = scope.name
        scope.values[value.name] = value.type

    def read(self, value: Value, scope: _Scope, at: Op | str, context: str = "") -> None:
        """A value that the scope can see, with the type it has there."""
        found = scope.values.get(value.name)
        part = print_operand(value)
        if found is None and value.name in scope.hidden:
            fact, hint = scope.hidden[value.name]
            self.fail(context + fact, scope.name, at, part, hint)
        if found is None:
            self.fail(f"{context}%{value.name} is not defined above", scope.name, at, part,
                      nearest(value.name, scope.values, "%") or "define it before it is read")
        if found != value.type:
            self.fail(f"%{value.name} is read as {value.type}, but it is {found}", scope.name, at, part,
                      "replace the value everywhere (passes/rewrite.py does)")

    def weight(self, weight: Weight, scope: _Scope, op: Op) -> None:
        """A weight that the graph lists, with the type it has there."""
        found = scope.weights.get(weight.name)
        if found is None:
            self.fail(f"unknown weight @{weight.name}", scope.name, op, print_operand(weight),
                      nearest(weight.name, scope.weights, "@") or "list it in `weights {}`")
        if found.type != weight.type:
            self.fail(f"@{weight.name} is read as {weight.type}, but it is {found.type}", scope.name, op,
                      print_operand(weight), "take the weight from `graph.weights`")

    def expect(self, found: Type, wanted: Type, what: str, scope: str, at: Op | str, part: str = "") -> None:
        """Two types agree."""
        if found != wanted:
            self.fail(f"{what} is {found}, but must be {wanted}", scope, at, part, f"write `: {wanted}`"
                      if not part else "relevance is f32, and has S in front of the value's shape")

    def type(self, type_: Type, scope: str, at: Op | str) -> None:
        """A known element type, and declared dimensions."""
        if type_ in self.good_types:
            return
        if type_.dtype not in DTYPES:
            self.fail(f"unknown element type `{type_.dtype}`", scope, at, hint=f"types are {', '.join(DTYPES)}")
        for dim in type_.shape:
            self.dim(dim, scope, at)
        self.good_types.add(type_)

    def dim(self, dim: Dim, scope: str, at: Op | str) -> None:
        """A size over declared dimensions."""
        if isinstance(dim, int) or dim in self.good_dims:
            return
        unknown = sorted(symbols(dim) - set(self.graph.dims))
        if unknown:
            self.fail(f"dimension {unknown[0]} is not declared", scope, at, hint=nearest(unknown[0], self.graph.dims)
                      or f"declare it: `graph @{self.graph.name}(..., {unknown[0]}: 1..1024)`")
        self.good_dims.add(dim)

    def attr(self, value: Attr, scope: str, op: Op) -> None:
        """Sizes in attributes are over declared dimensions too, strings are printable."""
        if isinstance(value, Sym):
            self.dim(value, scope, op)
        elif isinstance(value, str):
            self.printable(value, scope, op)
        elif isinstance(value, tuple):
            for item in value:
                self.attr(item, scope, op)


def _sized(type_: Type, sizes: Mapping[str, Dim]) -> Type:
    """A type with sizes put in."""
    return Type(type_.dtype, tuple(substitute(dim, sizes) for dim in type_.shape))


def _explained(type_: Type) -> Type:
    """The type of the relevance of a value: float32 whatever the model's, S explanations in front."""
    return Type("f32", (SEEDS, *type_.shape))


def _strings(value: Attr) -> Iterator[str]:
    """The strings in an attribute."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _strings(item)
