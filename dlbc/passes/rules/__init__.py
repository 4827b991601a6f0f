"""The rules: how relevance passes each op. One file per family; a rule is a function that expands into
primitives.

A rule carries one of two forms. `"R"`, relevance itself; or `"M"`, the multiplier, with R = value * M:
the epsilon family divides by the value that the next rule multiplies by, so carrying M makes it as cheap
as a gradient. `"any"` marks moves and their like, and ReLUs, which treat both alike.

A rule function gets the expansion (a Builder), the forward op, and the incoming value for each result of
that op (None where none arrives), and returns one contribution per operand: shape [S, *operand], or None.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Literal, TypeAlias

from dlbc.errors import RuleError
from dlbc.ir.builder import Builder
from dlbc.ir.core import Attr, Op, Operand, Rule, Type, Value
from dlbc.ir.dims import Dim, symbol
from dlbc.ir.ops import STABILISER
from dlbc.passes.rotations import Rotations

Form: TypeAlias = Literal["R", "M", "any"]
Contributions: TypeAlias = "tuple[Value | None, ...]"
RuleFunction: TypeAlias = Callable[..., Contributions]
Check: TypeAlias = Callable[[Mapping[str, Attr]], None]
"""Raises RuleError for parameters that a rule cannot have."""

SEEDS = symbol("S")
LARGE = 1e38
"""What stands for infinity: the sum of two is still a float32."""
FAMILIES = ("linear", "splitting", "sums", "products", "activations", "selections", "norms", "attention", "moves",
            "reductions", "recurrent", "contrastive", "rotary", "experts")


@dataclass(frozen=True, slots=True)
class RuleDef:
    """A rule of one op kind: form carried, expansion, parameters with defaults, and whether it conserves."""

    op: str
    name: str
    form: Form
    expand: RuleFunction
    params: dict[str, Attr]
    conserves: bool
    doc: str
    check: Check | None = None
    streams: int = 1
    """How many relevances S holds: 2 for rules that compare that of the target with that of its rivals."""


RULES: dict[tuple[str, str], RuleDef] = {}


def rule(ops: str | Iterable[str], name: str, *, form: Form, conserves: bool = True,
         check: Check | None = None, streams: int = 1) -> Callable[[RuleFunction], RuleFunction]:
    """Register the decorated expansion as rule `name` of one or several op kinds.

    `check` raises RuleError, in a plain sentence, for parameters that make no sense.
    """

    def register(expand: RuleFunction) -> RuleFunction:
        parameters = inspect.signature(expand).parameters.values()
        params = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        for op in (ops,) if isinstance(ops, str) else ops:
            RULES[op, name] = RuleDef(op, name, form, expand, params, conserves, inspect.getdoc(expand) or "", check,
                                      streams)
        return expand

    return register


def load_rules() -> dict[tuple[str, str], RuleDef]:
    """Every rule, after importing the files that define them."""
    for family in FAMILIES:
        import_module(f"{__name__}.{family}")
    return RULES


def parse_rule(text: str) -> Rule:
    """Read `epsilon`, `epsilon(1e-3)`, `epsilon(eps=1e-3)` or `zbox(low=[-2, -1.8], high=3)`.

    RuleError for names unknown, for what is no number, and for numbers that the rule cannot have.
    """
    load_rules()
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", text)
    if not match or not _named(match[1]):
        raise _unknown_rule(match[1] if match else text, text)
    known = _parameters(match[1])
    names = list(known)
    given: dict[str, Attr] = {}
    for position, item in enumerate(filter(None, re.split(r",(?![^\[]*\])", match[2] or ""))):
        key, equals, value = item.partition("=")
        if not equals:
            key, value = (names[position] if position < len(names) else ""), item
        if key.strip() not in names:
            raise RuleError(f"rule `{match[1]}` has no parameter `{key.strip() or item.strip()}`",
                            hint=f"it has {', '.join(names) or 'none'}")
        given[key.strip()] = _parameter(match[1], key.strip(), value.strip())
    return checked(Rule(match[1], tuple({**known, **given}.items())))


def checked(rule: Rule) -> Rule:
    """The rule, if it exists and its parameters make sense; RuleError otherwise."""
    load_rules()
    definitions = _named(rule.name)
    if not definitions:
        raise _unknown_rule(rule.name, rule.name)
    params = {**_parameters(rule.name), **dict(rule.params)}
    for name, value in params.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and math.isnan(number) for number in numbers):
            raise RuleError(f"`{name}` of rule `{rule.name}` is not a number")
    eps = params.get("eps", 1.0)
    if not isinstance(eps, int | float) or not eps > 0:
        raise RuleError(f"`eps` of rule `{rule.name}` is {eps}; it must be positive",
                        hint="epsilon is added to denominators to keep them away from 0")
    for check in {definition.check for definition in definitions if definition.check}:
        check(params)
    return rule


def _named(name: str) -> list[RuleDef]:
    return [definition for (_, own), definition in RULES.items() if own == name]


def _parameters(name: str) -> dict[str, Attr]:
    """The parameters of a rule over all op kinds, with their defaults."""
    return {key: default for definition in _named(name) for key, default in definition.params.items()}


def _parameter(rule: str, name: str, text: str) -> Attr:
    """A number, or several in brackets."""
    try:
        if text.startswith("[") and text.endswith("]"):
            return tuple(float(part) for part in text[1:-1].split(","))
        return float(text)
    except ValueError as problem:
        raise RuleError(f"`{text}` is no number for `{name}` of rule `{rule}`") from problem


def _unknown_rule(name: str, text: str) -> RuleError:
    known = sorted({own for _, own in RULES})
    near = get_close_matches(name, known, 3)
    return RuleError(f"unknown rule `{text}`",
                     hint=f"did you mean {', '.join(near)}?" if near else f"rules: {', '.join(known)}")


@dataclass(frozen=True)
class Facts:
    """What rules may know of the graph: names of the values that carry relevance, of those that are attention
    weights (a softmax, or a move of one), of multipliers that were just divided by a stabilised value, of values that
    are never negative, and of multipliers that are 0 wherever their value is negative (a ReLU made them so); and which
    channels of a value rotary embedding turned."""

    carriers: set[str]
    softmaxes: set[str]
    stabilised: set[str] = field(default_factory=set)
    divided: dict[str, Value] = field(default_factory=dict)
    """The relevance that such a multiplier was made of."""
    nonnegative: set[str] = field(default_factory=set)
    rectified: set[str] = field(default_factory=set)
    rotations: Rotations = field(default_factory=dict)
    reference: str = ""
    """"secant" where rules work on differences to a reference input, "gradient" where gradients at the input are
    multiplied with them (`dlbc/passes/differences.py`)."""
    varying: frozenset[str] = frozenset()
    """Of a graph with a reference: the forward values that are others at the reference input."""
    infinite: frozenset[str] = frozenset()
    """The forward values that may be infinite (masked scores)."""


class Expansion(Builder):
    """The builder a rule expands with: it knows the carriers, casts to float32, and keeps the ledger."""

    def __init__(self, taken: Iterable[str], facts: Facts, *, place: str = "", of: str = "", form: str = "") -> None:
        super().__init__(taken, place=place, of=of, prefix=f"r.{of}.")
        self.facts = facts
        self.form = form
        self.absorbed: list[tuple[str, Value]] = []
        self._differences: dict[str, Value] = {}
        self._carrying: set[str] = set()

    def carries(self, operand: Operand) -> bool:
        """True where the operand takes relevance; otherwise it is a constant, and absorbs."""
        return isinstance(operand, Value) and (operand.name in self.facts.carriers or operand.name in self._carrying)

    def varies(self, operand: Operand) -> bool:
        """True where there is a reference and the operand is another number there."""
        return isinstance(operand, Value) and operand.name in self.facts.varying

    def reference(self, operand: Operand) -> Operand:
        """The operand at the reference input: `%ref.x` of `%x`, or the operand itself where it does not vary."""
        if isinstance(operand, Value) and self.varies(operand):
            return reference_of(operand)
        return operand

    def difference(self, operand: Operand) -> Value:
        """The operand minus what it is at the reference input, float32, where it varies; masked scores give 0."""
        assert isinstance(operand, Value)
        if operand.name not in self._differences:
            new, old = self.read(operand), self.read(self.reference(operand))
            if operand.name in self.facts.infinite:
                new, old = self.finite(new), self.finite(old)
            found = self.sub(new, old, result=f"d.{operand.name}")
            self._differences[operand.name] = found
            if operand.name in self.facts.carriers:
                self._carrying.add(found.name)
        return self._differences[operand.name]

    def middle(self, operand: Operand) -> Operand:
        """The mean of the operand and what it is at the reference input, float32."""
        if not self.varies(operand):
            return self.read(operand)
        return self.mul(self.add(self.read(operand), self.read(self.reference(operand))), 0.5)

    def amount(self, form: str, value: Value, of: Operand) -> Value:
        """The relevance that `value` is for `of`: itself, or for a multiplier `of` (its difference to the reference,
        where there is one) times it."""
        if form != "M":
            return value
        return self.mul(value, self.difference(of) if self.varies(of) else self.finite(self.read(of)))

    def read(self, operand: Operand) -> Operand:
        """An operand in float32, the element type of all relevance arithmetic."""
        kind = getattr(operand, "type", None)
        narrow = kind is not None and kind.floating and kind.dtype != "f32"
        return self.cast(operand, dtype="f32") if narrow else operand

    def absorb(self, cause: str, amount: Value) -> None:
        """Record relevance [S, ...] that ends here: cause `bias`, `constant`, `stabiliser`."""
        self.absorbed.append((cause, amount))

    def unbroadcast(self, value: Value, like: Type) -> Value:
        """Sum [S, *wide] over the axes that broadcasting widened, to [S, *like.shape]."""
        extra = value.type.rank - 1 - like.rank
        if extra > 0:
            value = self.sum(value, dims=tuple(range(1, 1 + extra)))
        widened = tuple(i + 1 for i, (own, wide) in enumerate(zip(like.shape, value.type.shape[1:], strict=True))
                        if own == 1 and wide != 1)
        return self.sum(value, dims=widened, keepdim=True) if widened else value

    def widen(self, value: Value, like: Type) -> Value:
        """Expand [S or 1, ...] to [S, *like.shape] where it is narrower."""
        wanted = (value.type.shape[0], *like.shape)
        return value if value.type.shape == wanted else self.expand(value, shape=wanted)

    def shared(self, r: Value, total: Value) -> Value:
        """r / total, for rules that share r out in proportion; where there is nothing to share by, r is absorbed."""
        self.absorb("stabiliser", self.where(self.eq(total, 0.0), r, 0.0))
        return self.safe_div(r, total)

    def finite(self, x: Operand) -> Operand:
        """x with its infinities (masked scores) made large numbers, so that relevance 0 times x is 0."""
        kind = getattr(x, "type", None)
        return self.clamp(x, low=-LARGE, high=LARGE) if kind is not None and kind.floating else x

    def stabilised(self, m: Value, y: Operand, eps: float) -> Value:
        """`R_y / e(y)` from M_y = R_y / y: M_y y / e(y), where it is not so already; y's loss is absorbed.

        Of differences only where the user asks for more than the usual stabiliser: multipliers divide by none of them.
        """
        if m.name in self.facts.stabilised or (self.facts.reference and eps <= STABILISER):
            return m
        kept = self.damp(m, y, eps=eps)
        self.absorb("stabiliser", self.mul(y, self.sub(m, kept)))
        return kept

    def fold_seeds(self, value: Value) -> Value:
        """[S, B, ...] as [S * B, ...], for ops that know one batch axis."""
        s, b, *rest = value.type.shape
        return self.reshape(value, shape=(s * b, *rest))

    def unfold_seeds(self, value: Value, batch: Dim) -> Value:
        """[S * B, ...] as [S, B, ...]."""
        return self.reshape(value, shape=(SEEDS, batch, *value.type.shape[1:]))


def reference_of(value: Value) -> Value:
    """What a forward value is at the reference input: `%ref.x` of `%x`."""
    return Value(f"ref.{value.name}", value.type)


def seeded(type_: Type) -> Type:
    """The type of relevance of a value: float32 with the seed dimension in front."""
    return Type("f32", (SEEDS, *type_.shape))


def only(op: Op, position: int, value: Value | None) -> Contributions:
    """Contributions with one entry: all relevance goes to the operand at `position`."""
    return tuple(value if i == position else None for i in range(len(op.operands)))
