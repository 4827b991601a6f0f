"""Which ops an entry of a composite is about: selectors, written as text.

    linear              an op kind; or a group of kinds (`convolution`, `norm`: `GROUPS`)
    model.layers.*      a module path, or a glob of them; what is inside a module belongs to it
    first, last         the layers (linear or convolution) with no other layer between them and the input (the output)
    before(relu)        all that read its result, at once or through moves, are of this kind or group
    after(max_pool)     what it reads comes, at once or through moves, from an op of this kind or group
    %conv2d.3           one op, by the name of its forward value
    a & b, a | b, !a, (a)

A text is parsed once; `Sites` holds what a graph's ops are to each other.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache

from dlbc.errors import RuleError
from dlbc.ir.core import Graph, Op, values
from dlbc.ir.ops import OPS
from dlbc.passes.carriers import carriers, data_operands
from dlbc.passes.outputs import explained_output
from dlbc.passes.rules.activations import STEPS, UNARY
from dlbc.passes.rules.experts import MIXTURES
from dlbc.passes.rules.linear import CONVS, LINEAR, TRANSPOSED
from dlbc.passes.rules.moves import MOVES
from dlbc.passes.rules.norms import NORMS
from dlbc.passes.rules.recurrent import RECURRENT
from dlbc.passes.rules.selections import SELECTIONS
from dlbc.passes.rules.sums import ADDED, SUMS

GROUPS: dict[str, tuple[str, ...]] = {
    "linear_map": LINEAR, "convolution": (*CONVS, *TRANSPOSED), "sum_of_terms": (*SUMS, *ADDED), "product": ("mul",),
    "layer": ("linear", "linear_rows", "expert_linear", "grouped_linear", "matmul", "einsum", *CONVS, *TRANSPOSED),
    "quotient": ("div",), "gate": ("glu",), "activation": (*UNARY, *STEPS), "norm": NORMS,
    "selection": SELECTIONS, "move": MOVES, "probabilities": ("softmax", "log_softmax"),
    "reduction": ("var", "logsumexp", "prod"), "recurrent": RECURRENT, "mixture": MIXTURES,
    "pooling": ("avg_pool", "adaptive_avg_pool", "max_pool", "adaptive_max_pool"),
}
"""Names for several op kinds at once."""

LAYERS = frozenset((*GROUPS["layer"], *RECURRENT))
"""What lies between an op and the input, or the output, when `first` and `last` are told."""

PLACES = ("first", "last")
NEIGHBOURS = ("before", "after")
_TOKEN = re.compile(r"\s*(?:(?P<sign>[&|!()])|(?P<word>[^\s&|!()]+))")


@dataclass(frozen=True)
class Sites:
    """What selectors may ask of a graph: how many layers lie between an op and the input, or the output, at most;
    and the kinds of the ops that its result goes to and its data comes from, moves left out."""

    depth: Mapping[str, int] = field(default_factory=dict)
    height: Mapping[str, int] = field(default_factory=dict)
    readers: Mapping[str, frozenset[str]] = field(default_factory=dict)
    sources: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, output: str = "") -> Sites:
        """The sites of a graph that explains `output`, or `%scores` of it where targets are sparse."""
        ops = [op for op in graph.forward.ops if op.results]
        carrying = carriers(graph)
        explained = explained_output(graph, output)
        end = str(graph.attrs.get("scores") or (explained.name if explained else ""))
        return cls(_depths(ops, carrying), _heights(ops, carrying, end), _readers(ops), _sources(ops))


NOWHERE = Sites()


def is_layer(op: Op, carrying: set[str]) -> bool:
    """A linear layer, also one written as a product with a constant, a convolution or a recurrent layer."""
    return op.name in LAYERS and not (
        op.name in ("matmul", "einsum") and sum(v.name in carrying for v in values(op.operands)) > 1)


def _depths(ops: Sequence[Op], carrying: set[str]) -> dict[str, int]:
    """Layers passed before each op's result, itself left out, on the longest way from an input that carries."""
    passed: dict[str, int] = {}
    found: dict[str, int] = {}
    for op in ops:
        before = max((passed.get(v.name, 0) for v in values(op.operands) if v.name in carrying), default=0)
        found[op.result.name] = before
        for result in op.results:
            passed[result.name] = before + is_layer(op, carrying)
    return found


def _heights(ops: Sequence[Op], carrying: set[str], output: str) -> dict[str, int]:
    """Layers passed after each op, itself left out, on the longest way to the explained output; ops off that way
    are not in it."""
    passed: dict[str, int] = {output: 0}
    found: dict[str, int] = {}
    for op in reversed(ops):
        after = max((passed[r.name] for r in op.results if r.name in passed), default=-1)
        if after < 0:
            continue
        found[op.result.name] = after
        for value in values(op.operands):
            if value.name in carrying:
                passed[value.name] = max(passed.get(value.name, 0), after + is_layer(op, carrying))
    return found


def _readers(ops: Sequence[Op]) -> dict[str, frozenset[str]]:
    kinds: dict[str, set[str]] = defaultdict(set)
    for op in reversed(ops):
        through = set().union(*(kinds[r.name] for r in op.results)) if op.name in MOVES else {op.name}
        for value in values(data_operands(op)):
            kinds[value.name] |= through
    return {op.result.name: frozenset().union(*(kinds[r.name] for r in op.results)) for op in ops}


def _sources(ops: Sequence[Op]) -> dict[str, frozenset[str]]:
    kinds: dict[str, frozenset[str]] = {}
    found: dict[str, frozenset[str]] = {}
    for op in ops:
        found[op.result.name] = frozenset().union(*(kinds.get(v.name, frozenset()) for v in values(data_operands(op))))
        for result in op.results:
            kinds[result.name] = found[op.result.name] if op.name in MOVES else frozenset({op.name})
    return found


# --- selectors as text --------------------------------------------------------------------------------

Test = Callable[[Op, Sites], bool]


@dataclass(frozen=True)
class Selector:
    """A parsed selector: its test, and the words in it that must name something in the graph."""

    text: str
    test: Test = field(compare=False)
    globs: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def __call__(self, op: Op, sites: Sites = NOWHERE) -> bool:
        """Whether it selects an op."""
        return self.test(op, sites)

    def check(self, graph: Graph, rule: str) -> None:
        """RuleError, with the nearest names, for a module glob or a value name that matches nothing in the graph."""
        places = sorted({".".join(parts[:depth]) for op in graph.forward.ops for parts in [op.place.split(".")]
                         for depth in range(1, len(parts) + 1)})
        for glob in self.globs:
            if not any(_inside(place, glob) for place in places):
                near = get_close_matches(glob, [*places, *GROUPS, *OPS, *PLACES], 3, 0.3)
                raise RuleError(f"`{glob}` (for rule `{rule}`) matches no module and no op kind",
                                hint=f"did you mean {', '.join(near)}?" if near else "see explainer.rules()")
        defined = {r.name for op in graph.forward.ops for r in op.results}
        for name in self.names:
            if name not in defined:
                near = get_close_matches(name, defined, 3, 0.3)
                raise RuleError(f"`%{name}` (for rule `{rule}`) is no value of the forward section",
                                hint=f"did you mean {', '.join('%' + n for n in near)}?" if near else
                                "see explainer.ir()")


@lru_cache(maxsize=4096)
def selector(text: str) -> Selector:
    """Read a selector. RuleError where it is no expression of selectors."""
    return _Parser(text).parse()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(self._split(text))
        self.globs: list[str] = []
        self.names: list[str] = []

    def _split(self, text: str) -> Iterator[str]:
        place = 0
        while place < len(text.rstrip()):
            match = _TOKEN.match(text, place)
            assert match is not None  # every character is a sign or part of a word
            yield match["sign"] or match["word"]
            place = match.end()

    def parse(self) -> Selector:
        test = self._any()
        if self.tokens:
            raise self._wrong(f"`{self.tokens[0]}` is out of place")
        return Selector(self.text, test, tuple(self.globs), tuple(self.names))

    def _any(self) -> Test:
        tests = [self._all()]
        while self._took("|"):
            tests.append(self._all())
        return tests[0] if len(tests) == 1 else lambda op, sites: any(test(op, sites) for test in tests)

    def _all(self) -> Test:
        tests = [self._one()]
        while self._took("&"):
            tests.append(self._one())
        return tests[0] if len(tests) == 1 else lambda op, sites: all(test(op, sites) for test in tests)

    def _one(self) -> Test:
        if self._took("!"):
            negated = self._one()
            return lambda op, sites: not negated(op, sites)
        if self._took("("):
            inner = self._any()
            self._close()
            return inner
        if not self.tokens or self.tokens[0] in "&|)":
            raise self._wrong("something to select is missing")
        word = self.tokens.pop(0)
        if word in NEIGHBOURS and self.tokens[:1] == ["("]:
            return self._neighbour(word)
        return self._word(word)

    def _neighbour(self, side: str) -> Test:
        self.tokens.pop(0)
        kind = self.tokens.pop(0) if self.tokens else ""
        if kind not in OPS and kind not in GROUPS:
            near = get_close_matches(kind, [*GROUPS, *OPS], 3)
            raise RuleError(f"`{side}({kind})` names no op kind and no group",
                            hint=f"did you mean {', '.join(near)}?" if near else f"groups: {', '.join(GROUPS)}")
        self._close()
        kinds = frozenset(GROUPS.get(kind, (kind,)))

        def test(op: Op, sites: Sites) -> bool:
            found = (sites.readers if side == "before" else sites.sources).get(op.result.name, frozenset())
            return bool(found) and found <= kinds if side == "before" else bool(found & kinds)

        return test

    def _word(self, word: str) -> Test:
        if word in PLACES:
            return lambda op, sites: op.name in GROUPS["layer"] and (
                sites.depth if word == "first" else sites.height).get(op.result.name) == 0
        if word.startswith("%"):
            self.names.append(word[1:])
            return lambda op, sites: any(r.name == word[1:] for r in op.results)
        if word in OPS or word in GROUPS:
            kinds = frozenset((word, *GROUPS.get(word, ())))
            return lambda op, sites: op.name in kinds
        self.globs.append(word)
        return lambda op, sites: _inside(op.place, word)

    def _took(self, sign: str) -> bool:
        if self.tokens[:1] == [sign]:
            self.tokens.pop(0)
            return True
        return False

    def _close(self) -> None:
        if not self._took(")"):
            raise self._wrong("`)` is missing")

    def _wrong(self, fact: str) -> RuleError:
        return RuleError(f"`{self.text}` is no selector: {fact}",
                         hint="write op kinds, groups, module globs, first, last, before(kind), after(kind), %value, "
                              "joined by & | ! and brackets")


def _inside(place: str, glob: str) -> bool:
    return fnmatchcase(place, glob) or fnmatchcase(place, glob + ".*")
