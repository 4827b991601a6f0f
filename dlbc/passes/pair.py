"""Pair: one `rel.*<rule>` op for each forward op that relevance passes, from the outputs back.

Reads level 1, gives level 2. A value that several ops use gets one contribution from each, joined by
`rel.sum`; where a rule carries the other form (relevance R, multiplier M = R / value) a conversion stands
between: `rel.to_relevance`, `rel.to_multiplier`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial, reduce
from typing import ClassVar

from dlbc.composite import Composite, resolve
from dlbc.errors import InputError, RuleError, UnsupportedOpError
from dlbc.ir.builder import Builder
from dlbc.ir.core import Attr, Graph, Op, Operand, Rule, Section, Type, Value, Weight, values
from dlbc.ir.ops import STABILISER
from dlbc.passes import Pass, register
from dlbc.passes.carriers import constant_operands, data_operands, explained_inputs
from dlbc.passes.defer import of_targets
from dlbc.passes.differences import with_references
from dlbc.passes.expand import expand_rule, facts
from dlbc.passes.outputs import FINAL, explainable_outputs, explained_output, input_names, output_names
from dlbc.passes.record_experts import for_all_rows, mixtures_of, share_of_experts, share_of_shared
from dlbc.passes.rewrite import live, names
from dlbc.passes.rules import RULES, Form, reference_of, seeded
from dlbc.passes.signs import rectifies
from dlbc.selectors import Sites


def read_composite(text: str) -> Composite:
    """A composite from its JSON text. ValueError for something else."""
    from dlbc.composite_json import composite_from_json

    return composite_from_json(json.loads(text))


def write_composite(composite: Composite) -> str:
    """A composite as JSON in one line."""
    from dlbc.composite_json import composite_to_json

    return json.dumps(composite_to_json(composite))


@register
@dataclass(frozen=True)
class Pair(Pass):
    """Give every carrying forward op its relevance op, by the rules of `composite` (a preset's name).

    `output`: the user's name of the output that is explained (default `logits`, else the first that carries
    relevance). `keep`: also return the relevance of inner places: "modules", "all", or module-path globs with
    commas between them.
    `reference`: explain differences to a reference input, whose values are parameters `%ref.*` (`differences.py`).
    """

    name: ClassVar[str] = "pair"
    composite: str = "attnlrp"
    output: str = ""
    keep: str = "inputs"
    reference: bool = False
    rules: Composite | None = field(default=None, repr=False, compare=False,
                                    metadata={"read": read_composite, "write": write_composite})

    def for_text(self, graph: Graph) -> Pair:
        """With the rules fitted to the graph and, where they are those of a preset, called by its name."""
        if self.rules is None:
            return self
        try:
            if resolve(self.rules.name) == self.rules:
                return replace(self, composite=self.rules.name, rules=None)
        except RuleError:
            pass  # a name of the user's
        from dlbc.composite_json import without_predicates

        return replace(self, rules=without_predicates(self.rules, graph))

    def run(self, graph: Graph) -> Graph:
        """The graph with its relevance section."""
        composite = (self.rules or resolve(self.composite)).fitted(graph, self.output)
        composite.check(graph)
        if self.reference:
            graph = graph.with_attrs(reference="gradient" if composite.seed == "M" else "secant")
        return with_references(_Pairing(graph, composite, self.output, self.keep).run())


class _Pairing:
    """The state of one run: contributions found so far, by forward value."""

    def __init__(self, graph: Graph, composite: Composite, output: str, keep: str) -> None:
        self.graph, self.composite, self.keep = graph, composite, keep
        self.facts = facts(graph)
        self.carriers = self.facts.carriers
        self.at = Builder(names(graph))
        self.contributions: dict[str, list[tuple[Form, Value]]] = {}
        self.uses = Counter(o.name for op in graph.forward.ops for o in values(data_operands(op)))
        self.output = self._explained_output(output)
        self.sites = Sites.of(graph, output)
        self.mixtures = mixtures_of(graph)
        self.shares: dict[str, Value] = {}
        """Relevance of experts by the name of the value whose op shared it out: of `combine`, of `total`."""

    def run(self) -> Graph:
        forward = self.graph.forward
        seeded_value, skipped = self._before_softmax(self.output)
        form = self.composite.seed
        seed = Value(self.at.name(f"{form}.{seeded_value.name}"), seeded(seeded_value.type))
        self.contributions[seeded_value.name] = [(form, seed)]
        kept = self._kept()
        found: dict[str, Value] = {}
        for op in reversed(list(forward.ops)):
            for result in op.results:
                if result.name in kept and result.name in self.contributions:
                    found[result.name] = self._joined(result, "R")
            if any(r.name in self.contributions for r in op.results):
                self._pair(op)
        inputs = [p for p in explained_inputs(self.graph) if p.name in self.carriers]
        relevant = [self._at_input(p) for p in inputs]
        nodes = [(kept[name], value) for name, value in reversed(found.items())]
        results = (*relevant, *(value for _, value in nodes), *self._of_experts())
        body = live(self.at.ops, results)
        graph = replace(self.graph, relevance=Section((seed,), tuple(body), results),
                        dims={**self.graph.dims, "S": (1, 1024)})
        named = input_names(graph)
        position = [r.name for r in forward.results].index(self.output.name)
        graph = graph.with_attrs(
            composite=self.composite.name, explained=tuple(named[p.name] for p in inputs),
            nodes=tuple(place for place, _ in nodes), output=output_names(graph)[position], before=skipped,
            seed=_meaning(seed, body), **({"reason": self.composite.reason} if self.composite.reason else {}),
            **({"streams": self.composite.streams} if self.composite.streams > 1 else {}))
        saved = {v.name: v for op in body for v in values(op.reads if op.name.startswith("rel.") else op.inputs)}
        defined = {p.name: p for p in forward.params} | {r.name: r for op in forward.ops for r in op.results}
        return replace(graph, forward=replace(
            forward, results=(*forward.results, *(defined[name] for name in reversed(found)),
                              *((seeded_value,) if skipped else ())),
            saves=tuple(v for n, v in saved.items() if n in defined)))

    def _explained_output(self, wanted: str) -> Value:
        found = explained_output(self.graph, wanted)
        if found is None:
            known = ", ".join(explainable_outputs(self.graph))
            if not known:
                raise InputError("no output depends on an explained input in a differentiable way",
                              hint="outputs that are integers or constants cannot be explained")
            raise InputError(f"`{wanted}` is no output that can be explained", hint=f"it can be {known}")
        return found

    def _before_softmax(self, output: Value) -> tuple[Value, str]:
        """The value to seed: `%scores` where targets are sparse, or what enters a final softmax or sigmoid; and the
        name of what was skipped."""
        scores = self.graph.attrs.get("scores")
        if scores is not None:
            return next(r for op in self.graph.forward.ops for r in op.results if r.name == scores), ""
        op = self.graph.forward.definitions().get(output.name)
        over = op.attrs.get("dim", -1) if op is not None else -1
        classes = over in (-1, output.type.rank - 1)  # a softmax over another axis is part of the model
        if op is not None and op.name in FINAL and classes and isinstance(op.operands[0], Value):
            return op.operands[0], op.name
        return output, ""

    def _kept(self) -> dict[str, str]:
        """Forward values whose relevance is asked for, with the name each is returned under. They are returned, too:
        what depends on targets is not among them."""
        if self.keep == "inputs":
            return {}
        known = self.carriers - of_targets(self.graph)
        if self.keep == "all":
            return {r.name: r.name for op in self.graph.forward.ops for r in op.results if r.name in known}
        last: dict[str, str] = {}
        for op in self.graph.forward.ops:
            parts = op.place.split(".") if op.place else []
            for depth in range(1, len(parts) + 1):
                if op.result.name in known:
                    last[".".join(parts[:depth])] = op.result.name
        chosen = {place: name for place, name in last.items()
                  if self.keep == "modules" or any(fnmatchcase(place, one.strip()) for one in self.keep.split(","))}
        if not chosen:
            raise InputError(f"keep={self.keep!r} matches no module", hint=f"modules: {', '.join(list(last)[:8])}, ...")
        found: dict[str, str] = {}
        for place, name in chosen.items():
            found[name] = min((found.get(name, place), place), key=len)
        return found

    def _pair(self, op: Op) -> None:
        self._check_constants(op)
        rule = self.composite.rule_for(op, constant_factor=self._constant_factor(op), sites=self.sites)
        definition = RULES[op.name, rule.name]
        form = definition.form if definition.form != "any" else self._form(op)
        eps = dict(rule.params).get("eps", STABILISER)
        incoming = tuple(self._joined(r, form, eps) if r.name in self.contributions else None for r in op.results)
        trial, contributed = expand_rule(op, rule, incoming, self.facts, self.at.taken, form)
        targets = [(i, o) for i, o in enumerate(op.operands)
                   if contributed[i] is not None and isinstance(o, Value) and o.name in self.carriers]
        if not targets:
            return
        results = []
        for _, operand in targets:
            stem = f"{form}.{operand.name}"
            results.append(Value(self.at.name(stem if self.uses[operand.name] == 1 else f"{stem}.0"),
                                 seeded(operand.type)))
            self.contributions.setdefault(operand.name, []).append((form, results[-1]))
        if form == "M" and rectifies(op, rule):
            self.facts.rectified.add(results[0].name)
        self.at.ops.append(Op(f"rel.{op.name}", incoming, tuple(results), {}, op.place, rule,
                              _reads(trial.ops, [contributed[i] for i, _ in targets], incoming), op.result.name))
        self._record_experts(op, {o.name: r for (_, o), r in zip(targets, results, strict=True)},
                             form, conserves=definition.conserves)

    def _form(self, op: Op) -> Form:
        """What an op that lets either form through is given: as it comes; relevance where both come. A ReLU, behind
        which stands a layer with a form of its own, is given that where a conversion is due in any case."""
        forms = {f for r in op.results for f, _ in self.contributions.get(r.name, ())}
        if forms == {"M"}:
            return "M"
        if op.name == "relu" and (self.facts.reference or len(forms) > 1):
            return "M"
        return self._asked(op.operands[0]) if op.name == "relu" else "R"

    def _asked(self, operand: Operand) -> Form:
        """The form that the op which makes a value is given; of inputs, relevance is what is wanted."""
        while isinstance(operand, Value) and (op := self._definitions.get(operand.name)) is not None:
            rule = self.composite.rule_for(op, constant_factor=self._constant_factor(op), sites=self.sites)
            form = RULES[op.name, rule.name].form
            if form != "any":
                return form
            operand = next((v for v in data_operands(op) if isinstance(v, Value) and v.name in self.carriers), None)
        return "R"

    def _record_experts(self, op: Op, given: Mapping[str, Value], form: Form, *, conserves: bool) -> None:
        """Keep what the terms of a mixture get, `given` by the names of the op's operands."""
        self.at.place, self.at.of = op.place, op.result.name
        for mixture in self.mixtures:
            operands = {v.name: v for v in values(op.operands)}
            if op.result.name == mixture.combine:
                u, weights = values(op.operands)
                to_weights = given.get(weights.name) if conserves else None
                if u.name in given:
                    self.shares[mixture.combine] = share_of_experts(
                        self.at, form, given[u.name], u, to_weights, weights)
            elif op.result.name == mixture.total and mixture.shared in given:
                self.shares[mixture.total] = share_of_shared(self.at, form, given[mixture.shared],
                                                             operands[mixture.shared])

    def _of_experts(self) -> list[Value]:
        """Relevance of the experts of every mixture, [S, *rows, K], and of its shared expert, [S, *rows], for all rows:
        0 where none arrived."""
        found = []
        known = self._definitions
        returned = {v.name: v for v in self.graph.forward.results}
        for mixture in self.mixtures:
            weights = returned[mixture.weights]
            combine = known[mixture.combine]
            self.at.place, self.at.of = combine.place, mixture.combine
            choices, own = [], combine.operands[1]
            while isinstance(own, Value) and own.name != mixture.weights:
                choices.append(known[own.name])
                own = choices[-1].operands[0]
            for name, type_ in ((mixture.combine, weights.type), (mixture.total, Type("f32", weights.type.shape[:-1]))):
                if name:
                    share = self.shares.get(name)
                    found.append(self.at.zeros(seeded(type_)) if share is None
                                 else reduce(partial(for_all_rows, self.at), choices, share))
        return found

    def _check_constants(self, op: Op) -> None:
        """UnsupportedOpError where relevance should reach a weight, bias or mask, which no rule gives any."""
        for operand in constant_operands(op):
            if operand.name in self.carriers:
                raise UnsupportedOpError(
                    f"operand {op.operands.index(operand) + 1} of `{op.name}`, `%{operand.name}`, is computed from an "
                    "explained input, and no rule gives it relevance", where=f"#{op.place or 'model'}",
                    hint="compute it from weights alone, or write this part of the model with sums and products")

    def _constant_factor(self, op: Op) -> bool:
        return sum(v.name in self.carriers for v in values(op.operands)) == 1

    def _joined(self, value: Value, form: Form, eps: Attr = STABILISER) -> Value:
        """All contributions to a value as one, in the form asked for.

        Relevance that joins multipliers is divided with the small stabiliser: the rule's own `eps` then damps the sum.
        """
        parts = self.contributions[value.name]
        sums: dict[Form, Value] = {}
        for own in ("R", "M"):
            if same := [v for f, v in parts if f == own]:
                sums[own] = self._sum(same, own, value)
        self.contributions[value.name] = list(sums.items())  # a later asker finds the sums
        eps = eps if len(sums) == 1 else STABILISER
        converted = [v if f == form else self._convert(v, value, form, eps) for f, v in sums.items()]
        return self._sum(converted, form, value)

    def _sum(self, parts: Sequence[Value], form: Form, value: Value) -> Value:
        if len(parts) == 1:
            return parts[0]
        result = Value(self.at.name(f"{form}.{value.name}"), seeded(value.type))
        self.at.ops.append(Op("rel.sum", tuple(parts), (result,), {}, self._place(value), of=value.name))
        return result

    def _convert(self, part: Value, value: Value, form: Form, eps: Attr) -> Value:
        result = Value(self.at.name(f"{form}.{value.name}"), seeded(value.type))
        name, rule = ("rel.to_multiplier", Rule("epsilon", (("eps", eps),))) if form == "M" else (
            "rel.to_relevance", None)
        if form == "M":
            self.facts.stabilised.add(result.name)
        reads = (value, reference_of(value)) if value.name in self.facts.varying else (value,)
        self.at.ops.append(Op(name, (part,), (result,), {}, self._place(value), rule, reads, value.name))
        return result

    def _place(self, value: Value) -> str:
        op = self._definitions.get(value.name)
        return op.place if op is not None else ""

    @property
    def _definitions(self) -> dict[str, Op]:
        if not hasattr(self, "_found"):
            self._found = self.graph.forward.definitions()
        return self._found

    def _at_input(self, param: Value) -> Value:
        if param.name in self.contributions:
            return self._joined(param, "R")
        kind = seeded(param.type)
        return self.at.op("full", result=f"R.{param.name}", shape=kind.shape, value=0.0, dtype="f32")[0]


def _reads(trial: Sequence[Op], wanted: Sequence[Value | None], incoming: Sequence[Value | None]
           ) -> tuple[Value | Weight, ...]:
    """The forward values and weights that an expansion reads on the way to what is wanted."""
    kept = live(trial, [v for v in wanted if v is not None])
    own = {r.name for op in kept for r in op.results} | {v.name for v in incoming if v is not None}
    found = {str(o): o for op in kept for o in op.operands
             if isinstance(o, Weight) or (isinstance(o, Value) and o.name not in own)}
    found |= {str(v): v for v in wanted if v is not None and v.name not in own}
    return tuple(found.values())


def _meaning(seed: Value, body: Sequence[Op]) -> str:
    """What the run time must seed: `multiplier` (of the output), `signed` relevance where rules divide by the
    output (the relevance of a negative number is negative), or plain `relevance`."""
    if seed.name.startswith("M."):
        return "multiplier"
    divided = any(op.name == "rel.to_multiplier" and seed in op.operands for op in body)
    return "signed" if divided else "relevance"
