"""Lower: every rule expanded into primitives. Reads level 2, gives level 3, where no rule is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from dlbc.errors import IRError, LevelError
from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Operand, Value
from dlbc.ir.ops import STABILISER
from dlbc.passes import Pass, register
from dlbc.passes.differences import remainder_cause, with_references
from dlbc.passes.expand import expand_rule, facts
from dlbc.passes.rewrite import live, names, substitute_op, with_saves
from dlbc.passes.rules import RULES, SEEDS, Expansion, load_rules
from dlbc.passes.signs import rectifies

Entry = tuple[str, str, str, str, str]
"""Place, op kind, forward value, side or cause (`in`, `out`, or a cause of absorption), rule."""


@register
@dataclass(frozen=True)
class Lower(Pass):
    """Expand the rules. `ledger`: also return, per op, the relevance that came in, went out and was absorbed.

    The ledger's values are sums over everything but S; `graph.attrs["ledger"]` names each
    (place, op, forward value, cause or `in` / `out`, rule) in the order they are returned.
    """

    name: ClassVar[str] = "lower"
    ledger: bool = False

    def run(self, graph: Graph) -> Graph:
        """The graph with primitives only."""
        if graph.relevance is None:
            raise LevelError("there is no relevance section to lower", hint="run `pair` first")
        return _Lowering(graph, self.ledger).run()


def expand(graph: Graph, op: Op) -> Sequence[Op]:
    """Primitive ops that define the results of one `rel.*` op: what the interpreter runs at level 2."""
    assert graph.relevance is not None
    lowering = _Lowering(graph, ledger=False)
    lowering.step(op)
    replaced = lowering.replaced
    renamed = [replace(o, results=tuple(r for r in o.results)) for o in lowering.ops]
    at = Builder(lowering.taken)
    at.ops = renamed
    for result in op.results:
        new = replaced.get(result.name)
        if isinstance(new, Value):
            at.ops.append(Op("reshape", (new,), (result,), {"shape": result.type.shape}, op.place, of=op.of))
    return live(at.ops, op.results)


class _Lowering:
    """The state of one run."""

    def __init__(self, graph: Graph, ledger: bool) -> None:
        load_rules()
        self.graph, self.ledger = graph, ledger
        self.forward = graph.forward.definitions()
        self.facts = facts(graph)
        if graph.relevance is not None:
            self.facts.divided.update((op.result.name, op.operands[0]) for op in graph.relevance.ops
                                      if op.name == "rel.to_multiplier" and isinstance(op.operands[0], Value))
            self.facts.stabilised.update(self.facts.divided)
            self.facts.rectified.update(
                op.result.name for op in graph.relevance.ops if op.rule is not None and op.result.name.startswith("M.")
                and op.of in self.forward and rectifies(self.forward[op.of], op.rule))
        self.ops: list[Op] = []
        self.replaced: dict[str, Operand] = {}
        self.taken = names(graph)
        self.entries: list[tuple[Entry, Value]] = []

    def run(self) -> Graph:
        assert self.graph.relevance is not None
        if self.ledger:
            self._record_seed(self.graph.relevance.params[0])
        for op in self.graph.relevance.ops:
            self.step(substitute_op(op, self.replaced))
        section = self.graph.relevance
        final = {r.name: new for r in section.results if isinstance(new := self.replaced.get(r.name), Value)}
        self._restore_names(final)
        results = (*section.results, *(value for _, value in self.entries))
        graph = with_references(with_saves(replace(
            self.graph, relevance=replace(section, body=live(self.ops, results), results=results))))
        return graph.with_attrs(ledger=tuple(entry for entry, _ in self.entries)) if self.ledger else graph

    def step(self, op: Op) -> None:
        """Append the primitives of one relevance op."""
        if not op.name.startswith("rel."):
            self.ops.append(op)
            return
        at = Expansion(self.taken, self.facts, place=op.place, of=op.of)
        if op.name == "rel.sum" and op.rule is None:  # with a rule it belongs to a forward `sum`
            results: list[Value] = [_total(at, op.operands)]
        elif op.name == "rel.to_relevance" and at.varies(op.reads[0]):
            results = [at.amount("M", op.operands[0], op.reads[0])]  # type: ignore[arg-type]
        elif op.name == "rel.to_relevance":
            value, defined = at.read(op.reads[0]), self.forward.get(op.of)
            masked = op.of in self.facts.infinite or (  # scores may be -inf there
                defined is not None and defined.name in ("add", "sub", "where"))
            results = [at.mul(op.operands[0], at.finite(value) if masked else value)]
        elif op.name == "rel.to_multiplier":
            results = [self._to_multiplier(at, op)]
        else:
            at, results = self._expand(op)
        self.taken = at.taken
        self.ops += at.ops
        self.replaced |= dict(zip((r.name for r in op.results), results, strict=True))

    def _to_multiplier(self, at: Expansion, op: Op) -> Value:
        value, relevance = op.reads[0], op.operands[0]
        assert op.rule is not None and isinstance(relevance, Value)
        eps, varies = dict(op.rule.params)["eps"], at.varies(value)
        value = at.difference(value) if varies else at.read(value)
        if varies and isinstance(eps, float) and eps <= STABILISER:
            m = at.safe_div(relevance, value)  # a difference may be small: what is stabilised is not conserved
        else:
            m = at.div(relevance, at.stabilise(value, eps=eps))
        self.facts.stabilised.add(m.name)
        self.facts.divided[m.name] = relevance
        if self.ledger:
            at.absorb("stabiliser", at.sub(relevance, at.mul(m, value)))
            self._record(at, op, "to_multiplier", [])
        return m

    def _expand(self, op: Op) -> tuple[Expansion, list[Value]]:
        if op.of not in self.forward or op.rule is None:
            raise IRError(f"`{op.name}` is paired with `%{op.of}`, which no forward op defines",
                          where=f"#{op.place}", hint="a relevance op needs a rule and `of %value`")
        forward = self.forward[op.of]
        incoming = [o if isinstance(o, Value) else None for o in op.operands]
        form = RULES[forward.name, op.rule.name].form
        form = form if form != "any" else "M" if op.results[0].name.startswith("M.") else "R"
        at, contributed = expand_rule(forward, op.rule, incoming, self.facts, self.taken, form)
        found = [v for v in contributed if v is not None]
        if len(found) != len(op.results):
            raise IRError(f"`{op.name}` has {len(op.results)} results, its rule gives {len(found)}",
                          where=f"#{op.place}")
        if op.result.name in self.facts.rectified:
            self.facts.rectified.add(found[0].name)
        if self.ledger:
            pairs = [(r, v) for r, v in zip(forward.results, incoming, strict=True) if v is not None]
            outs = [(o, v) for o, v in zip(forward.operands, contributed, strict=True) if v is not None]
            self._record(at, op, forward.name, [
                *(("in", at.amount(form, v, of)) for of, v in pairs),
                *(("out", at.amount(form, v, of)) for of, v in outs)],
                remainder_cause(at, forward, op.rule.name) if self.facts.reference else None)
        return at, found

    def _record_seed(self, seed: Value) -> None:
        """The relevance that the seed puts on the output: itself, or for a multiplier the output times it."""
        form, name = seed.name.split(".", 1)
        at = Expansion(self.taken, self.facts, of=name)
        value = next(v for v in (*self.graph.forward.params, *(r for op in self.forward.values() for r in op.results))
                     if v.name == name)
        amount = at.amount(form, seed, value)
        self._record(at, Op("seed", (), (), of=name), "seed", [("seed", amount), ("gross", at.abs(amount))])
        self.taken = at.taken
        self.ops += at.ops

    def _record(self, at: Expansion, op: Op, kind: str, sides: Sequence[tuple[str, Value]],
                remainder: str | None = None) -> None:
        rule = op.rule.name if op.rule else ""
        totals = [(side, at.sum(value, dims=tuple(range(1, value.type.rank))) if value.type.rank > 1 else value)
                  for side, value in (*sides, *at.absorbed)]
        remainder = _remainder_cause(kind, rule) if remainder is None else remainder
        if remainder and sides:
            rest = at.full(shape=(SEEDS,), value=0.0, dtype="f32")
            for side, total in totals:
                rest = at.add(rest, total) if side == "in" else at.sub(rest, total)
            totals.append((remainder, rest))
        self.entries += [((op.place, kind, op.of, side, rule), total) for side, total in totals]

    def _restore_names(self, final: dict[str, Value]) -> None:
        """Give what a level-2 value became that value's name again, so that the text stays readable."""
        assert self.graph.relevance is not None
        params = {p.name for p in self.graph.relevance.params}
        defined = {r.name: r for op in self.ops for r in op.results}
        new_names: dict[str, str] = {}
        copies: list[Op] = []
        for old, new in {**{n: v for n, v in self.replaced.items() if isinstance(v, Value)}, **final}.items():
            target = new
            while target.name in self.replaced:
                following = self.replaced[target.name]
                assert isinstance(following, Value)
                target = following
            if target.name in defined and target.name not in new_names:
                new_names[target.name] = old
            elif old in final:
                copies.append(Op("reshape", (target,), (Value(old, target.type),), {"shape": target.type.shape}))
        assert not params & set(new_names)

        def named(value: Operand) -> Operand:
            return Value(new_names[value.name], value.type) if isinstance(
                value, Value) and value.name in new_names else value

        self.ops = [replace(op, operands=tuple(map(named, op.operands)),
                            results=tuple(r if not isinstance(n := named(r), Value) else n for r in op.results))
                    for op in (*self.ops, *copies)]
        self.entries = [(e, v if not isinstance(n := named(v), Value) else n) for e, v in self.entries]


def _remainder_cause(kind: str, rule: str) -> str:
    """What takes the rest of in - out - absorbed: the rule where it does not conserve, a constant where the op
    selects or pads; "" where there may be no rest."""
    if (kind, rule) in RULES and not RULES[kind, rule].conserves:
        return "rule"
    return "constant" if rule in ("select", "move") else ""


def _total(at: Expansion, parts: Sequence[Operand]) -> Value:
    first, *rest = parts
    assert isinstance(first, Value)
    for part in rest:
        first = at.add(first, part)
    return first
