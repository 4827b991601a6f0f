"""Rules on differences to a reference input: relevance explains f(x) - f(ref), and nothing ends in a bias.

Each forward value x has a value at the reference input, `%ref.x`, a parameter of the relevance section that the run
time fills from one forward pass (and keeps between calls), and a difference `%d.x = %x - %ref.x`. What an op explains
is then `dy = op(x) - op(ref)`:

- linear maps, sums and moves do to differences what they do to numbers, less their constants: the rule of the
  composite, whichever it is, expanded for the op with differences in place of its operands and result;
- what is not linear has an exact secant (`rules/secants.py`): multipliers with `sum_i m_i dx_i = m dy`;
- rules that hand on relevance without looking at numbers, and gradients, stay as they are (of a composite that seeds a
  gradient all rules do: gradient times difference).

With the epsilon rule this is DeepLIFT's rescale rule (Shrikumar et al. 2017, arXiv 1704.02685).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isinf
from typing import TYPE_CHECKING, Any

from dlbc.errors import UnsupportedOpError
from dlbc.ir.core import Graph, Op, Operand, Rule, Value, Weight, values
from dlbc.ir.dims import Dim, Sym, symbols
from dlbc.passes.carriers import explained_inputs
from dlbc.passes.rewrite import with_saves
from dlbc.passes.rules import RULES, Contributions, Expansion, Facts
from dlbc.passes.rules.linear import CONVS, LINEAR, TRANSPOSED
from dlbc.passes.rules.norms import NORMS
from dlbc.passes.rules.secants import SECANTS, load_secants
from dlbc.passes.rules.sums import ADDED, SUMS
from dlbc.passes.varying import masked, varying

if TYPE_CHECKING:
    from dlbc_runtime.signature import InputSpec

_BIASED = ("linear", "linear_rows", *CONVS, *TRANSPOSED, *NORMS)
"""Ops whose third operand is a bias."""
_BY_DIFFERENCE = frozenset({*LINEAR, *SUMS, *ADDED})
_AS_IT_IS = frozenset({"move", "sum", "pass", "identity", "zbox", "gradient", "product_gradient"})
"""Rules that read no numbers, true gradients, and `zbox`: the box moves with the reference, x - low is what it was."""
_REFUSED = {
    "absolute_0_1": "reproduces dl-backtrace 0.1.24, which knows no reference",
    "equal": "reproduces dl-backtrace 0.1.24, which knows no reference",
    "dlb_0_1": "reproduces dl-backtrace 0.1.24, which knows no reference"}


# --- rules ---------------------------------------------------------------------------------------------

def expand_difference(at: Expansion, op: Op, rule: Rule, incoming: Sequence[Value | None]) -> Contributions:
    """What a rule contributes to each operand of a forward op, on differences to the reference.

    UnsupportedOpError for rules and ops that have no such form.
    """
    load_secants()
    _check(op, rule, at)
    found = _expanded(at, op, rule, incoming)
    return (*found, *(None,) * (len(op.operands) - len(found)))  # for the biases that were left out


def _expanded(at: Expansion, op: Op, rule: Rule, incoming: Sequence[Value | None]) -> Contributions:
    params = dict(rule.params)
    definition = RULES[op.name, rule.name]
    secant = SECANTS.get((op.name, rule.name))
    gradient = at.facts.reference == "gradient"
    if secant is not None and not gradient:
        return secant.expand(at, op, _at_reference(at, op), *incoming, **params)
    if rule.name in ("move", "zbox"):
        return definition.expand(at, op, *incoming, **params)
    if op.name in _BY_DIFFERENCE:
        return definition.expand(at, _on_differences(at, op), *incoming, **params)
    if rule.name in _AS_IT_IS or gradient:
        return definition.expand(at, _without_bias(op), *incoming, **params)
    raise UnsupportedOpError(f"rule `{rule.name}` of `{op.name}` has no form for differences to a reference",
                             where=f"#{op.place or 'model'}", hint="choose other rules for it, or compile without "
                             "reference=; docs/reference.md lists what has one")


def remainder_cause(at: Expansion, op: Op, rule: str) -> str:
    """What takes the rest of in - out - absorbed of an op on differences; "" where there may be none.

    A difference of half-precision numbers is rounded as they were: it is not what the rule makes of dx.
    """
    if rule in ("gradient", "product_gradient") or at.facts.reference == "gradient":
        return "rule"
    carried = [o for o in op.operands if at.carries(o)]
    changed = any(at.varies(o) and o not in carried for o in op.operands)
    if changed or op.name in ("topk", "sort"):
        return "constant"
    narrow = any(v.type.dtype in ("f16", "bf16") for v in (*values(op.operands), *op.results))
    return "rounding" if narrow else ""


def _check(op: Op, rule: Rule, at: Expansion) -> None:
    """UnsupportedOpError for rules that mean something else on differences."""
    reason = _REFUSED.get(rule.name, "")
    if RULES[op.name, rule.name].streams > 1:
        reason = "compares the relevances of two outputs, which is not linear"
    elif rule.name == "absolute" and any(not isinf(float(str(v))) for n, v in rule.params if n in ("low", "high")):
        reason = "with `low` or `high` asks where an activation saturates, which a difference does not tell"
    elif op.name in ("matmul", "einsum", "pow", "mul", "div") and sum(map(at.carries, op.operands)) > (
            1 if op.name == "pow" else 2):
        reason = f"has no secant where {sum(map(at.carries, op.operands))} operands of `{op.name}` carry relevance"
    if reason:
        raise UnsupportedOpError(f"rule `{rule.name}` of `{op.name}` does not work with a reference: it {reason}",
                                 where=f"#{op.place or 'model'}",
                                 hint="choose other rules, or compile without reference=")


def _at_reference(at: Expansion, op: Op) -> Op:
    """The op as it was computed at the reference."""
    results = tuple(at.reference(r) for r in op.results)
    return replace(op, operands=tuple(map(at.reference, op.operands)),
                   results=tuple(r for r in results if isinstance(r, Value)))


def _on_differences(at: Expansion, op: Op) -> Op:
    """The linear op with differences for operands and results; what is the same in both is 0."""
    data = (0, 2) if op.name == "scatter_add" else (0, 1) if op.name in (*SUMS, "index_put") else ()

    def swapped(position: int, operand: Operand) -> Operand:
        floating = isinstance(operand, Value | Weight) and operand.type.floating
        if op.name in (*SUMS, *ADDED) and position in data:
            if at.varies(operand) and floating:
                return at.difference(operand)
            return 0.0 if op.name in SUMS or not isinstance(operand, Value | Weight) else at.zeros(operand.type)
        return at.difference(operand) if floating and at.carries(operand) else operand

    operands = tuple(swapped(i, o) for i, o in enumerate(op.operands))
    if op.name == "batch_norm":
        operands = (operands[0], 0.0, *operands[2:4])
    elif op.name in _BIASED:
        operands = operands[:2]
    return replace(op, operands=operands, results=tuple(at.difference(r) if r.type.floating else r
                                                        for r in op.results))


def _without_bias(op: Op) -> Op:
    return replace(op, operands=op.operands[:2]) if op.name in _BIASED else op


# --- the reference's values as parameters --------------------------------------------------------------

def with_references(graph: Graph) -> Graph:
    """The graph whose relevance section takes exactly the reference values that it reads, as its last parameters.

    The forward section returns the same values of the input, after all else: so one compiled forward serves both.
    `graph.attrs["references"]` names them.
    """
    if graph.relevance is None or not graph.attrs.get("reference"):
        return graph
    forward, relevance = graph.forward, graph.relevance
    before = graph.attrs.get("references", ())
    count = len(before) if isinstance(before, tuple) else 0
    read = {v.name: v for op in relevance.ops for v in values(op.inputs) if v.name.startswith("ref.")}
    wanted = {v.name: v for v in (*forward.params, *(r for op in forward.ops for r in op.results))
              if f"ref.{v.name}" in read}
    params = [p for p in relevance.params if not p.name.startswith("ref.")]
    graph = replace(
        graph, forward=replace(forward, results=(*forward.results[:len(forward.results) - count], *wanted.values())),
        relevance=replace(relevance, params=(*params, *(read[f"ref.{name}"] for name in wanted))))
    return with_saves(graph.with_attrs(references=tuple(wanted)))


def reference_rows(graph: Graph, inputs: InputSpec) -> dict[str, Any]:
    """How a reference is run, for the manifest: `reference` "row" where one row may stand for all, else "rows"; and of
    each reference value whether axis 0 is the batch. Nothing for a graph without a reference."""
    if not graph.attrs.get("reference"):
        return {}
    wanted = graph.attrs.get("references", ())
    assert isinstance(wanted, tuple)
    explained = {p.name for p in explained_inputs(graph)}
    batch = next((p.type.shape[0] for p in graph.forward.params if p.name in explained and p.type.rank), 1)
    values_ = graph.forward.results[len(graph.forward.results) - len(wanted):]
    if isinstance(batch, int) or not _one_row(graph, inputs, batch, explained, values_):
        return {"reference": "rows", "references": (False,) * len(values_)}
    return {"reference": "row", "references": tuple(batch in v.type.shape for v in values_)}


def _one_row(graph: Graph, inputs: InputSpec, batch: Dim, explained: set[str], wanted: Sequence[Value]) -> bool:
    """Whether the model may be run on one row, and what it gives stand for every row: nothing else that it reads has
    rows of its own, no number of rows is asked for, and values have the batch on axis 0 or nowhere."""
    name = str(batch)
    least, _ = (inputs.sizes or {}).get(name, (1, 1))
    free = name.isidentifier() and least <= 1 and not any(name in condition for condition in inputs.conditions)
    shared = all(p.name in explained or name not in _sizes(p.type.shape) for p in graph.forward.params)
    return free and shared and all(
        name not in _sizes(v.type.shape[1:]) and (not v.type.rank or v.type.shape[0] == batch or name not in _sizes(
            v.type.shape[:1])) for v in wanted)


def _sizes(shape: Sequence[Dim]) -> set[str]:
    return {symbol for dim in shape if isinstance(dim, Sym) for symbol in symbols(dim)}


def difference_facts(graph: Graph, known: Facts) -> Facts:
    """The facts of a graph that has a reference."""
    kind = graph.attrs.get("reference")
    return replace(known, reference=str(kind), varying=varying(graph),
                   infinite=known.infinite | masked(graph)) if kind else known
