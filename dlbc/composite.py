"""Which rule explains which op: an ordered list of (what matches, rule), first match wins.

What matches is a selector written as text (`dlbc.selectors`: `"linear"`, `"convolution & first"`,
`"model.layers.0.*"`) or a predicate of the op. `dlbc.presets` has the named composites.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self, TypeAlias

from dlbc.errors import RuleError, UnsupportedOpError
from dlbc.ir.core import Graph, Op, Rule
from dlbc.ir.ops import attr
from dlbc.passes.rules import RULES, Form, checked, load_rules, parse_rule
from dlbc.presets import Preset, find
from dlbc.selectors import NOWHERE, Sites, selector

What: TypeAlias = "str | Callable[[Op], bool]"

@dataclass(frozen=True)
class Composite:
    """An ordered choice of rules. `Composite([("linear", "epsilon(1e-3)"), ("head.*", "absolute")], base="attnlrp")`.

    Entries are tried in order, then those of `base` (a preset name). An entry applies to an op that it
    matches and for which its rule exists. RuleError at construction for names that are unknown and for
    parameters that a rule cannot have; at pairing for a module glob that matches nothing.
    """

    entries: tuple[tuple[What, Rule], ...]
    name: str = "custom"
    fallback: str | None = None
    seed: Form = "R"
    """What a seed is: relevance of the output, or (for `input-x-gradient`) its multiplier, the gradient."""
    contrast: str = ""
    """"mean": what is explained is each output minus the mean of all."""
    plan: str = ""
    """An `auto` preset, which adds entries made for the graph at hand (`fitted`)."""
    reason: str = ""
    """Why a plan chose as it did."""

    def __init__(self, entries: Iterable[tuple[What, str | Rule]], *, base: str | None = None, name: str = "",
                 fallback: str | None = None, seed: Form | None = None, contrast: str | None = None,
                 plan: str | None = None) -> None:
        load_rules()
        own = tuple((what, checked(rule) if isinstance(rule, Rule) else parse_rule(rule)) for what, rule in entries)
        for what, _ in own:
            if isinstance(what, str):
                selector(what)
        _check_fallback(fallback)
        if contrast not in (None, "", "mean"):
            raise RuleError(f"unknown contrast `{contrast}`", hint='use contrast="mean", or none')
        given = find(base) if base else Preset(())
        based = tuple((what, parse_rule(rule)) for what, rule in given.entries)
        self._set(entries=own + based, name=name or (f"{base}+" if base else "custom"), fallback=fallback,
                  seed=seed or given.seed, contrast=given.contrast if contrast is None else contrast,
                  plan=given.plan if plan is None else plan, reason="")

    def _set(self, **fields: object) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def but(self, **fields: object) -> Self:
        """The same composite with other fields."""
        found = copy.copy(self)
        found._set(**fields)
        return found

    @property
    def streams(self) -> int:
        """How many relevances are carried: 2 where rules compare that of the target with that of its rivals."""
        two = {name for (_, name), definition in RULES.items() if definition.streams > 1}
        return 2 if any(rule.name in two for _, rule in self.entries) else 1

    def fitted(self, graph: Graph, output: str = "") -> Self:
        """The composite for a graph: with the entries that its plan makes for it, and why; else itself."""
        if not self.plan:
            return self
        from dlbc.auto import PLANS

        chosen = PLANS[self.plan](graph, output)
        return self.but(entries=self.entries + chosen.entries, contrast=self.contrast or chosen.contrast, plan="",
                        name=self.name if chosen.name in self.name else f"{self.name} ({chosen.name})",
                        reason=chosen.reason)

    def rule_for(self, op: Op, *, constant_factor: bool, sites: Sites = NOWHERE) -> Rule:
        """The rule for an op; UnsupportedOpError when none fits. `constant_factor`: it is a linear map; `sites`: what
        the graph's ops are to each other."""
        for what, rule in self.entries:
            if (op.name, rule.name) in RULES and _fits(op, rule, constant_factor) and (
                    selector(what)(op, sites) if isinstance(what, str) else bool(what(op))):
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
        """RuleError, with the nearest names, for a module glob or value name that matches no op of the graph."""
        for what, rule in self.entries:
            if isinstance(what, str):
                selector(what).check(graph, rule.name)

    def __str__(self) -> str:
        """Its entries, one a line, in the order they are tried."""
        shown = [(what if isinstance(what, str) else f"{getattr(what, '__name__', 'a function')}()", str(rule))
                 for what, rule in self.entries]
        width = max((len(what) for what, _ in shown), default=0)
        return "\n".join([f"composite {self.name}", *(f"  {what:<{width}}  {rule}" for what, rule in shown)])


def completed(kind: str, rule: Rule) -> Rule:
    """A rule with exactly the parameters it has for an op kind: those it states, and the defaults of the others."""
    stated = dict(rule.params)
    return Rule(rule.name, tuple((name, stated.get(name, default))
                                 for name, default in RULES[kind, rule.name].params.items()))


_TWO_CARRIERS = frozenset({"half", "signal", "signal_relevance", "share", "product_gradient", "contrastive_product"})


def _fits(op: Op, rule: Rule, constant_factor: bool) -> bool:
    if op.name == "index_put":
        return (rule.name == "move") != bool(attr(op, "accumulate"))
    return op.name not in ("matmul", "einsum") or (rule.name in _TWO_CARRIERS) != constant_factor


def preset(name: str) -> Composite:
    """The composite of a preset's name; RuleError with the nearest names when there is none."""
    return Composite([], base=name, name=name)


def resolve(rules: str | Composite, fallback: str | None = None) -> Composite:
    """A composite from what the user gave: a preset name or a Composite."""
    chosen = preset(rules) if isinstance(rules, str) else rules
    _check_fallback(fallback)
    return chosen.but(fallback=fallback) if fallback else chosen


def _check_fallback(fallback: str | None) -> None:
    if fallback not in (None, "gradient"):
        raise RuleError(f"unknown fallback `{fallback}`", hint='use fallback="gradient", or none')
