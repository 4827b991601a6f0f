"""Reads the text of a graph: `parse_graph`. Errors show file, line, caret, fact and hint.

Types come from the text as they stand; `verifier.verify` compares them with what the ops infer.
"""

from __future__ import annotations

import re

from dlbc.errors import IRError
from dlbc.ir.core import (
    DTYPES,
    Attr,
    Function,
    Graph,
    Kernel,
    Location,
    Op,
    Operand,
    Rule,
    Section,
    Type,
    Value,
    Weight,
)
from dlbc.ir.dims import Dim, parse_dim
from dlbc.ir.source import Spans, nearest
from dlbc.ir.syntax import CONSTANTS, RULE_PARAMETERS
from dlbc.ir.tokens import Tokens

_SECTIONS = ("prepare", "forward", "relevance")
_BLOCKS = ("weights", "function", *_SECTIONS, "locations")
def parse_graph(text: str, file: str = "<text>") -> Graph:
    """The graph that a text holds. LocatedError (an IRError) where it does not read."""
    return parse_with_spans(text, file)[0]


def parse_with_spans(text: str, file: str = "<text>") -> tuple[Graph, Spans]:
    """The graph, and where in the text each thing is defined (for errors of the verifier)."""
    parser = _Parser(text, file)
    try:
        return parser.graph(), parser.spans
    except RecursionError:
        parser.fail("this is nested too deeply")
    except ValueError:  # Python's limit on the length of an integer
        parser.fail("this number is too long")


class _Parser(Tokens):
    """Recursive descent: one method for each thing that the text is made of."""

    def __init__(self, text: str, file: str) -> None:
        super().__init__(text, file)
        self.values: dict[str, Value] = {}
        self.weights: dict[str, Weight] = {}
        self.own_weights: dict[str, Weight] = {}
        self.key = ""
        self.types: dict[str, Type] = {}

    # --- the graph -------------------------------------------------------------------------------------

    def graph(self) -> Graph:
        """The whole text."""
        if not self.keyword("graph"):
            self.fail("expected `graph`" + (f", found `{self.shown(self.at)}`" if self.kinds[self.at] != "end"
                                            else ", the text ends"),
                      hint="a text starts with `graph @name(B: 1..8)`")
        name = self.take("ref", "the graph's @name")
        dims = dict(self.listed(")", self.dim_range)) if self.accept("(") else {}
        attrs = self.attrs()
        functions: dict[str, Function] = {}
        sections: dict[str, Section] = {}
        locations: dict[str, Location] = {}
        while self.kinds[self.at] != "end":
            start = self.at
            block = self.take("word", "a section")
            if block in sections:
                self.fail(f"a second `{block}` section", self.starts[start])
            if block == "weights":
                self.weights_block()
            elif block == "function":
                function = self.function()
                functions[function.name] = function
            elif block == "locations":
                locations = self.locations()
            elif block in _SECTIONS:
                sections[block] = self.section(block)
            else:
                self.fail(f"unknown section `{block}`", self.starts[start],
                          nearest(block, _BLOCKS) or f"a graph holds {', '.join(_BLOCKS)}")
        if "forward" not in sections:
            self.fail("the graph has no forward section", hint="add `forward(...) { ... return %y }`")
        return Graph(name=name, dims=dims, weights=self.weights, functions=functions,
                     prepare=sections.get("prepare", Section()), forward=sections["forward"],
                     relevance=sections.get("relevance"), locations=locations, attrs=attrs)

    def dim_range(self) -> tuple[str, tuple[int, int]]:
        """`T: 1..1024`"""
        name = self.take("word", "a dimension's name")
        if name in CONSTANTS or "." in name:
            self.fail(f"`{name}` cannot name a dimension", self.starts[self.at - 1])
        self.take(":")
        low = int(self.take("int"))
        self.take("..")
        return name, (low, int(self.take("int")))

    def weights_block(self) -> None:
        """`weights { @name : type ... }`"""
        self.take("{")
        while not self.accept("}"):
            start = self.starts[self.at]
            name = self.take("ref", "a weight's @name, or `}`")
            if name in self.weights:
                self.fail(f"@{name} is listed twice", start)
            self.spans.offsets[f"@{name}"] = start
            self.take(":")
            self.weights[name] = Weight(name, self.type())

    def locations(self) -> dict[str, Location]:
        """`locations { #place : Class "file.py:1:2" ... }`"""
        found: dict[str, Location] = {}
        self.take("{")
        while not self.accept("}"):
            place = self.take("place", "a #place, or `}`")
            self.take(":")
            cls = self.name("the module's class")
            found[place] = Location(cls, self.take("string") if self.kinds[self.at] == "string" else "")
        return found

    def function(self) -> Function:
        """`function @name(%x : type, @w : type) { ... }`"""
        start = self.starts[self.at]
        name = self.take("ref", "the function's @name")
        self.spans.offsets[f"@{name}"] = start
        outer, self.values, self.key = self.values, {}, f"@{name} "
        self.take("(")
        params = tuple(self.listed(")", self.param))
        self.own_weights = {param.name: param for param in params if isinstance(param, Weight)}
        body, results, saves = self.block(f"@{name}")
        if saves:
            self.fail("a function saves nothing", self.spans.offsets[f"return @{name}"],
                      "return the values, and save the results of its calls")
        self.values, self.own_weights, self.key = outer, {}, ""
        return Function(name, params, body, results)

    def section(self, name: str) -> Section:
        """`forward(%x : type) { ... }`; the parameters may be left out."""
        params: list[Value] = []
        if self.accept("("):
            for param in self.listed(")", self.param):
                if isinstance(param, Weight):
                    self.fail(f"a weight cannot be a parameter of `{name}`",
                              hint="list it in `weights {}` and read it where it is needed")
                params.append(param)
        body, results, saves = self.block(name)
        return Section(tuple(params), body, results, saves)

    def param(self) -> Value | Weight:
        """`%x : type`, in a function also `@w : type`."""
        start = self.starts[self.at]
        is_weight = self.kinds[self.at] == "ref"
        name = self.take("ref") if is_weight else self.take("value", "a parameter")
        self.take(":")
        if is_weight:
            return Weight(name, self.type())
        return self.define(name, self.type(), start)

    def define(self, name: str, type_: Type, start: int) -> Value:
        """A value from here on known by its name."""
        self.spans.offsets[f"{self.key}%{name}"] = start
        value = self.values[name] = Value(name, type_)
        return value

    def block(self, name: str) -> tuple[tuple[Op | Kernel, ...], tuple[Value, ...], tuple[Value, ...]]:
        """`{ ... return %y save %x }`: the ops, the results, what is saved."""
        self.take("{")
        body: list[Op | Kernel] = []
        while self.kinds[self.at] == "value" or self.texts[self.at] == "kernel":
            body.append(self.op() if self.kinds[self.at] == "value" else self.kernel())
        self.spans.offsets[f"return {name}"] = self.starts[self.at]
        if not self.keyword("return"):
            self.fail(f"expected an op, `kernel` or `return`, found `{self.shown(self.at)}`",
                      hint="an op reads `%y = relu(%x) : f32[B,4]`; a section ends with `return %y`")
        results, saves = self.value_list(), self.value_list() if self.keyword("save") else ()
        self.take("}")
        return tuple(body), results, saves

    def value_list(self) -> tuple[Value, ...]:
        """`%a, %b`, or nothing."""
        found: list[Value] = []
        while self.kinds[self.at] == "value":
            found.append(self.value())
            if not self.accept(","):
                break
        return tuple(found)

    def kernel(self) -> Kernel:
        """`kernel @name on template(OPTION=1) { ... } -> %a, %b`"""
        self.at += 1
        start = self.starts[self.at]
        name = self.take("ref", "the kernel's @name")
        self.spans.offsets[f"{self.key}@{name}"] = start
        if not self.keyword("on"):
            self.fail("expected `on` and the kernel's template", hint="`kernel @f4 on triton.gemm(BLOCK=64) {`")
        template = self.name("the kernel's template")
        config = dict(self.listed(")", self.attr)) if self.accept("(") else {}
        self.take("{")
        body: list[Op] = []
        while not self.accept("}"):
            body.append(self.op())
        self.take("->", "`->` and what the kernel returns")
        return Kernel(name, template, tuple(body), self.value_list(), config)

    # --- ops -------------------------------------------------------------------------------------------

    def op(self) -> Op:
        """`%a, %b = name<rule>(operands; reads) {attrs} of %v : type, type #place`"""
        start = self.at
        names = [self.take("value", "an op")]
        while self.accept(","):
            names.append(self.take("value"))
        self.take("=")
        name = self.name("an op's name")
        rule = self.rule() if self.accept("<") else None
        callee = self.take("ref") if self.kinds[self.at] == "ref" else None
        self.take("(")
        operands: list[Operand] = []
        reads: list[Operand] = []
        target = operands
        while not self.accept(")"):
            if self.accept(";"):
                target = reads
            target.append(self.operand())
            if not self.accept(",") and self.kinds[self.at] not in (")", ";"):
                self.fail(f"expected `,` or `)`, found `{self.shown(self.at)}`")
        attrs = self.attrs() if callee is None else {"function": callee, **self.attrs()}
        of = self.take("value") if self.keyword("of") else ""
        self.take(":", "`:` and the result's type")
        types = [self.type()]
        while self.accept(","):
            types.append(self.type())
        if len(types) != len(names):
            self.fail(f"{len(names)} results but {len(types)} types", self.starts[start],
                      "give each result its type: `%a, %b = topk(%x) {k=2} : f32[2], i64[2]`")
        place = self.take("place") if self.kinds[self.at] == "place" else ""
        results = tuple(self.define(result, type_, self.starts[start])
                        for result, type_ in zip(names, types, strict=True))
        return Op(name, tuple(operands), results, attrs, place, rule, tuple(reads), of)

    def rule(self) -> Rule:
        """`epsilon(1e-06)>`: parameters by position or by name."""
        name = "" if self.kinds[self.at] == "(" else self.name("a rule")
        params: list[tuple[str, Attr]] = []
        known = RULE_PARAMETERS.get(name, ())
        if self.accept("("):
            def param() -> tuple[str, Attr]:
                if self.kinds[self.at] in ("word", "string") and self.kinds[self.at + 1] == "=":
                    return self.attr()
                if len(params) >= len(known):
                    self.fail(f"rule `{name}` has {len(known) or 'no'} parameters by position",
                              hint="name the parameter: `<rule(name=1.0)>`")
                return known[len(params)], self.literal()

            while not self.accept(")"):
                params.append(param())
                if not self.accept(",") and self.kinds[self.at] != ")":
                    self.fail(f"expected `,` or `)`, found `{self.shown(self.at)}`")
        self.take(">")
        return Rule(name, tuple(params))

    def operand(self) -> Operand:
        """`%value`, `@weight`, `none`, or a literal."""
        kind = self.kinds[self.at]
        if kind == "value":
            return self.value()
        if kind == "ref":
            return self.weight()
        found = self.literal()
        if isinstance(found, (str, tuple)):
            self.fail("an operand is a value, a weight, a number, true, false or none",
                      self.starts[self.at - 1], "strings and lists are attributes: `op(%x) {key=[1,2]}`")
        return found

    def value(self) -> Value:
        """A value that is defined above."""
        name = self.take("value")
        found = self.values.get(name)
        if found is None:
            later = re.search(rf"%{re.escape(name)}(?=[\s,][^()]*=)", self.spans.text[self.starts[self.at]:])
            self.fail(f"%{name} is {'used before it is defined' if later else 'not defined'}",
                      self.starts[self.at - 1], nearest(name, self.values, "%"))
        return found

    def weight(self) -> Weight:
        """A weight of the graph or, in a function, one of its parameters."""
        name = self.take("ref")
        found = self.own_weights.get(name) or self.weights.get(name)
        if found is None:
            self.fail(f"unknown weight @{name}", self.starts[self.at - 1],
                      nearest(name, {**self.weights, **self.own_weights}, "@") or "list it in `weights {}`")
        return found

    def attrs(self) -> dict[str, Attr]:
        """`{key=value, ...}`, or nothing."""
        return dict(self.listed("}", self.attr)) if self.accept("{") else {}

    def attr(self) -> tuple[str, Attr]:
        """`key=value`"""
        key = self.name("an attribute")
        self.take("=")
        return key, self.literal()

    def literal(self) -> Attr:
        """A number, size, string, list, or one of `true false none inf nan`."""
        at, kind, text = self.at, self.kinds[self.at], self.texts[self.at]
        self.at = at + 1
        if kind == "string":
            return text
        if kind == "[":
            return tuple(self.listed("]", self.literal))
        if kind == "float":
            return float(text)
        if kind == "word" and text in CONSTANTS:
            return CONSTANTS[text]
        if kind == "int" and self.kinds[self.at] in ",])}>;":
            return int(text)
        if kind == "-" and (self.kinds[self.at] == "float" or self.texts[self.at] in ("inf", "nan")):
            self.at += 1
            return -float(self.texts[self.at - 1])
        self.at = at
        return self.size()

    def size(self) -> Dim:
        """A size such as `2*T+1`: everything up to the comma or bracket that ends it."""
        at, depth = self.at, 0
        while (kind := self.kinds[self.at]) != "end":
            if depth == 0 and kind in (",", ")", "]", "}", ">", ";", "value", "ref", "place"):
                break
            depth += (kind == "(") - (kind == ")")
            self.at += 1
        if self.at == at:
            self.fail("expected a value" + ("" if self.kinds[at] == "end" else f", found `{self.shown(at)}`"),
                      hint='numbers, sizes (`2*T+1`), "strings", [lists], true, false, none, inf and nan')
        return self.read_size(self.spans.text[self.starts[at]:self.starts[self.at]].strip(), self.starts[at])

    def read_size(self, text: str, offset: int) -> Dim:
        """The size that `text`, which stands at an offset, means."""
        try:
            return parse_dim(text)
        except IRError as problem:
            self.fail(problem.fact, offset, problem.hint)

    def type(self) -> Type:
        """`f32[B,T//2]`"""
        at = self.at
        if self.kinds[at] != "type":
            text = self.texts[at]
            unknown = self.kinds[at] == "word" and self.kinds[at + 1] == "["
            if unknown and text in DTYPES:
                self.fail("this type does not end", hint="its sizes are on one line, as in `f32[B,4]`")
            self.fail(f"unknown element type `{text}`" if unknown else f"expected a type, found `{self.shown(at)}`",
                      hint=(unknown and nearest(text, DTYPES)) or f"types are {', '.join(DTYPES)}, as in `f32[B,4]`")
        self.at = at + 1
        text = self.texts[at]
        found = self.types.get(text)
        if found is None:
            dtype, _, rest = text.partition("[")
            sizes = _split(rest[:-1])
            found = self.types[text] = Type(
                dtype, tuple(self.read_size(size.strip(), self.starts[at]) for size in sizes))
        return found


def _split(text: str) -> list[str]:
    """The parts of `text` between its commas, but those within parentheses."""
    if not text.strip():
        return []
    parts = [""]
    for piece in text.split(","):
        if parts[-1].count("(") > parts[-1].count(")"):
            parts[-1] += f",{piece}"
        else:
            parts.append(piece)
    return parts[1:]
