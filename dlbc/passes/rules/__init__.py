"""The rules: how relevance passes each op. One file per family; a rule is a function that expands into
primitives.

A rule carries one of two forms. `"R"`, relevance itself; or `"M"`, the multiplier, with R = value * M:
the epsilon family divides by the value that the next rule multiplies by, so carrying M makes it as cheap
as a gradient. `"any"` marks moves and their like, which treat both alike.

A rule function gets the expansion (a Builder), the forward op, and the incoming value for each result of
that op (None where none arrives), and returns one contribution per operand: shape [S, *operand], or None.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Literal, TypeAlias

from dlbc.errors import RuleError
from dlbc.ir.builder import Builder
from dlbc.ir.core import Attr, Op, Operand, Rule, Type, Value
from dlbc.ir.dims import Dim, symbol

Form: TypeAlias = Literal["R", "M", "any"]
Contributions: TypeAlias = "tuple[Value | None, ...]"
RuleFunction: TypeAlias = Callable[..., Contributions]

SEEDS = symbol("S")
LARGE = 1e38
"""What stands for infinity: the sum of two is still a float32."""
FAMILIES = ("linear", "sums", "products", "activations", "selections", "norms", "attention", "moves",
            "reductions")


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


RULES: dict[tuple[str, str], RuleDef] = {}


def rule(ops: str | Iterable[str], name: str, *, form: Form, conserves: bool = True
         ) -> Callable[[RuleFunction], RuleFunction]:
    """Register the decorated expansion as rule `name` of one or several op kinds."""

    def register(expand: RuleFunction) -> RuleFunction:
        parameters = inspect.signature(expand).parameters.values()
        params = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        for op in (ops,) if isinstance(ops, str) else ops:
            RULES[op, name] = RuleDef(op, name, form, expand, params, conserves, inspect.getdoc(expand) or "")
        return expand

    return register


def load_rules() -> dict[tuple[str, str], RuleDef]:
    """Every rule, after importing the files that define them."""
    for family in FAMILIES:
        import_module(f"{__name__}.{family}")
    return RULES


def parse_rule(text: str) -> Rule:
    """Read `epsilon`, `epsilon(1e-3)` or `epsilon(eps=1e-3)`; RuleError for names and numbers unknown."""
    load_rules()
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", text)
    known: dict[str, dict[str, Attr]] = {}
    for (_, name), definition in RULES.items():
        known.setdefault(name, {}).update(definition.params)
    if not match or match[1] not in known:
        near = get_close_matches(match[1] if match else text, known, 3)
        raise RuleError(f"unknown rule `{text}`",
                        hint=f"did you mean {', '.join(near)}?" if near else f"rules: {', '.join(sorted(known))}")
    names = list(known[match[1]])
    given: dict[str, Attr] = {}
    for position, item in enumerate(filter(None, (match[2] or "").split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            key, value = (names[position] if position < len(names) else ""), item
        if key.strip() not in names:
            raise RuleError(f"rule `{match[1]}` has no parameter `{key.strip() or item.strip()}`",
                            hint=f"it has {', '.join(names) or 'none'}")
        try:
            given[key.strip()] = float(value)
        except ValueError as problem:
            raise RuleError(f"`{value.strip()}` is no number for `{key.strip()}` of rule `{match[1]}`") from problem
    if given.get("eps", 1.0) == 0.0 or any(isinstance(v, float) and v < 0 for v in given.values()):
        raise RuleError(f"the parameters of `{text}` must be positive",
                        hint="epsilon is added to denominators to keep them away from 0")
    return Rule(match[1], tuple({**known[match[1]], **given}.items()))


@dataclass(frozen=True)
class Facts:
    """What rules may know of the graph: names of the values that carry relevance, of those that are attention
    weights (a softmax, or a move of one), and of multipliers that were just divided by a stabilised value."""

    carriers: set[str]
    softmaxes: set[str]
    stabilised: set[str] = field(default_factory=set)


class Expansion(Builder):
    """The builder a rule expands with: it knows the carriers, casts to float32, and keeps the ledger."""

    def __init__(self, taken: Iterable[str], facts: Facts, *, place: str = "", of: str = "") -> None:
        super().__init__(taken, place=place, of=of, prefix=f"r.{of}.")
        self.facts = facts
        self.absorbed: list[tuple[str, Value]] = []

    def carries(self, operand: Operand) -> bool:
        """True where the operand takes relevance; otherwise it is a constant, and absorbs."""
        return isinstance(operand, Value) and operand.name in self.facts.carriers

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
        """`R_y / e(y)` from M_y = R_y / y: M_y y / e(y), where it is not so already; y's loss is absorbed."""
        if m.name in self.facts.stabilised:
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


def seeded(type_: Type) -> Type:
    """The type of relevance of a value: float32 with the seed dimension in front."""
    return Type("f32", (SEEDS, *type_.shape))


def only(op: Op, position: int, value: Value | None) -> Contributions:
    """Contributions with one entry: all relevance goes to the operand at `position`."""
    return tuple(value if i == position else None for i in range(len(op.operands)))
