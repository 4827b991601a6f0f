"""Which rule explains which op: an ordered list of (what matches, rule), first match wins.

What matches is an op kind (`"linear"`), a group of them (`"convolution"`, `"norm"`: `GROUPS`), a
module-path glob (`"model.layers.0.*"`), or a predicate of the op. `PRESETS` are the named composites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeAlias

from dlbc.errors import RuleError, UnsupportedOpError
from dlbc.ir.core import Graph, Op, Rule
from dlbc.ir.ops import OPS, attr
from dlbc.passes.rules import RULES, Form, load_rules, parse_rule
from dlbc.passes.rules.activations import STEPS, UNARY
from dlbc.passes.rules.linear import CONVS, LINEAR, TRANSPOSED
from dlbc.passes.rules.moves import MOVES
from dlbc.passes.rules.norms import NORMS
from dlbc.passes.rules.selections import SELECTIONS
from dlbc.passes.rules.sums import ADDED, SUMS

What: TypeAlias = "str | Callable[[Op], bool]"

GROUPS: dict[str, tuple[str, ...]] = {
    "linear_map": LINEAR, "convolution": (*CONVS, *TRANSPOSED), "sum_of_terms": (*SUMS, *ADDED), "product": ("mul",),
    "quotient": ("div",), "gate": ("glu",), "activation": (*UNARY, *STEPS), "norm": NORMS,
    "selection": SELECTIONS, "move": MOVES, "probabilities": ("softmax", "log_softmax"),
    "reduction": ("var", "logsumexp", "prod"),
    "pooling": ("avg_pool", "adaptive_avg_pool", "max_pool", "adaptive_max_pool"),
}
"""Names for several op kinds at once."""


@dataclass(frozen=True)
class Composite:
    """An ordered choice of rules. `Composite([("linear", "epsilon(1e-3)"), ("head.*", "absolute")], base="attnlrp")`.

    Entries are tried in order, then those of `base` (a preset name). An entry applies to an op that it
    matches and for which its rule exists. RuleError at construction for names that are unknown; at pairing
    for a module glob that matches nothing.
    """

    entries: tuple[tuple[What, Rule], ...]
    name: str = "custom"
    fallback: str | None = None
    seed: Form = "R"
    """What a seed is: relevance of the output, or (for `input-x-gradient`) its multiplier, the gradient."""

    def __init__(self, entries: Iterable[tuple[What, str | Rule]], *, base: str | None = None, name: str = "",
                 fallback: str | None = None, seed: Form | None = None) -> None:
        load_rules()
        own = tuple((what, rule if isinstance(rule, Rule) else parse_rule(rule)) for what, rule in entries)
        if fallback not in (None, "gradient"):
            raise RuleError(f"unknown fallback `{fallback}`", hint='use fallback="gradient", or none')
        object.__setattr__(self, "entries", own + (preset(base).entries if base else ()))
        object.__setattr__(self, "name", name or (f"{base}+" if base else "custom"))
        object.__setattr__(self, "fallback", fallback)
        object.__setattr__(self, "seed", seed or ("M" if "input-x-gradient" in (base, name) else "R"))

    def rule_for(self, op: Op, *, constant_factor: bool) -> Rule:
        """The rule for an op; UnsupportedOpError when none fits. `constant_factor`: it is a linear map."""
        for what, rule in self.entries:
            if (op.name, rule.name) in RULES and _matches(what, op) and _fits(op, rule, constant_factor):
                return completed(op.name, rule)
        if self.fallback:
            name = "product_gradient" if op.name in ("matmul", "einsum") and not constant_factor else "gradient"
            for candidate in (name, "taylor", "select", "move", "sum"):
                if (op.name, candidate) in RULES:
                    return completed(op.name, Rule(candidate))
        named = sorted(rule for kind, rule in RULES if kind == op.name)
        raise UnsupportedOpError(
            f"`{op.name}` has no rule in composite `{self.name}`", where=f"#{op.place or 'model'}",
            hint=(f"rules for it: {', '.join(named)}; add ({op.name!r}, rule) to a Composite" if named else
                  "no rule exists for it yet; add one in dlbc/passes/rules/")
            + ', or choose fallback="gradient" to pass it by input x gradient of that op')

    def check(self, graph: Graph) -> None:
        """RuleError, with the nearest names, for a module glob that matches no op of the graph."""
        parts = [op.place.split(".") for op in graph.forward.ops]
        places = sorted({".".join(place[:depth]) for place in parts for depth in range(1, len(place) + 1)})
        for what, rule in self.entries:
            if isinstance(what, str) and what not in OPS and what not in GROUPS and not any(
                    fnmatchcase(place, what) or fnmatchcase(place, what + ".*") for place in places):
                near = get_close_matches(what, [*places, *GROUPS, *OPS], 3, 0.3)
                raise RuleError(f"`{what}` (for rule `{rule.name}`) matches no module and no op kind",
                                hint=f"did you mean {', '.join(near)}?" if near else "see explainer.rules()")


def completed(kind: str, rule: Rule) -> Rule:
    """A rule with exactly the parameters it has for an op kind: those it states, and the defaults of the others."""
    stated = dict(rule.params)
    return Rule(rule.name, tuple((name, stated.get(name, default))
                                 for name, default in RULES[kind, rule.name].params.items()))


def _matches(what: What, op: Op) -> bool:
    if not isinstance(what, str):
        return bool(what(op))
    if what in OPS or what in GROUPS:
        return op.name == what or op.name in GROUPS.get(what, ())
    return fnmatchcase(op.place, what) or fnmatchcase(op.place, what + ".*")


_TWO_CARRIERS = frozenset({"half", "signal", "share", "product_gradient"})


def _fits(op: Op, rule: Rule, constant_factor: bool) -> bool:
    if op.name == "index_put":
        return (rule.name == "move") != bool(attr(op, "accumulate"))
    return op.name not in ("matmul", "einsum") or (rule.name in _TWO_CARRIERS) != constant_factor


def preset(name: str) -> Composite:
    """The composite of a preset name; RuleError with the nearest names when there is none."""
    load_rules()
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, 2)
        raise RuleError(f"unknown rules `{name}`",
                        hint=f"did you mean {', '.join(near)}?" if near else f"presets: {', '.join(PRESETS)}")
    return Composite(PRESETS[name], name=name)


def resolve(rules: str | Composite, fallback: str | None = None) -> Composite:
    """A composite from what the user gave: a preset name or a Composite."""
    chosen = preset(rules) if isinstance(rules, str) else rules
    return replace_fallback(chosen, fallback) if fallback else chosen


def replace_fallback(composite: Composite, fallback: str) -> Composite:
    """The same composite with a fallback for ops without a rule."""
    return Composite(composite.entries, name=composite.name, fallback=fallback, seed=composite.seed)


_SHARED: tuple[tuple[What, str], ...] = (("move", "move"), ("selection", "select"), ("embedding", "sum"))
_MULTIPLIER: tuple[tuple[What, str], ...] = (
    *_SHARED, ("linear_map", "epsilon"), ("sum_of_terms", "epsilon"), ("activation", "identity"),
    ("quotient", "numerator"), ("product", "half"), ("norm", "detach"), ("probabilities", "taylor"))
_RELEVANCE: tuple[tuple[What, str], ...] = (
    *_SHARED, ("activation", "pass"), ("quotient", "numerator_relevance"), ("product", "uniform"),
    ("gate", "uniform"), ("norm", "identity"), ("probabilities", "pass"))
_CONSERVING: tuple[tuple[What, str], ...] = (
    *_MULTIPLIER, ("attention", "cp"), ("matmul", "signal"), ("gate", "signal"))

PRESETS: dict[str, Sequence[tuple[What, str]]] = {
    "attnlrp": (*_MULTIPLIER, ("attention", "attnlrp"), ("matmul", "half"), ("einsum", "half"), ("gate", "half")),
    "cp-lrp": (*_CONSERVING, ("einsum", "signal")),
    "epsilon": (*_CONSERVING, ("einsum", "signal")),
    "dlb": (*_RELEVANCE, ("linear_map", "absolute"), ("sum_of_terms", "absolute"), ("attention", "dlb"),
            ("matmul", "share"), ("einsum", "share")),
    "dlb-0.1": (*_RELEVANCE, ("linear_map", "absolute_0_1"), ("sum_of_terms", "equal"), ("sum_of_terms", "absolute"),
                ("attention", "dlb_0_1"),
                ("matmul", "share"), ("einsum", "share")),
    "input-x-gradient": (
        *_SHARED, ("linear_map", "gradient"), ("sum_of_terms", "gradient"), ("activation", "gradient"),
        ("quotient", "gradient"), ("product", "gradient"), ("gate", "gradient"), ("norm", "gradient"),
        ("probabilities", "taylor"), ("attention", "gradient"), ("matmul", "product_gradient"),
        ("einsum", "product_gradient"), ("reduction", "gradient")),
}
"""The named composites, as entries in order; `docs/rules.md` says when to use which."""
