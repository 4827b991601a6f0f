"""`dlbc doctor`: does a model compile, with which rules, and is its explanation right? If not, where and why not.

Compiling stops at the first problem; this goes on and names them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dlbc.compiler import Source, check_weights, explainer_of
from dlbc.composite import Composite
from dlbc.errors import DlbcError, UnsupportedOpError
from dlbc.ir.core import Graph, Op, Rule
from dlbc.options import Options
from dlbc.passes import run
from dlbc.passes.pair import Pair
from dlbc.passes.pipeline import CANONICALISE
from dlbc.selectors import NOWHERE, Sites
from dlbc_runtime.arrays import Array, as_numpy
from dlbc_runtime.ledger import Ledger
from dlbc_runtime.program import Variant
from dlbc_runtime.signature import UNBOUNDED, InputSpec

if TYPE_CHECKING:
    import torch

    from dlbc.frontends.torch_export import Imported

AGREES = 1e-4
"""How far the compiled forward may be from the model's, of its largest output: both compute in float32."""


@dataclass(frozen=True)
class Problem:
    """Something that keeps the model from being explained, or the explanation from being right."""

    step: str
    fact: str
    where: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Input:
    """A tensor input: its type with named sizes, and why an axis is fixed, by axis."""

    name: str
    type: str
    fixed: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RuleUse:
    """A rule, the operation it explains, how often, and the first place."""

    op: str
    rule: str
    count: int
    place: str


@dataclass(frozen=True)
class Report:
    """What was found; `ok` when there is no problem."""

    model: str
    parameters: int
    inputs: tuple[Input, ...] = ()
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    composite: str = ""
    operations: Mapping[str, int] = field(default_factory=dict)
    rules: tuple[RuleUse, ...] = ()
    difference: float | None = None
    ledger: Ledger | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the model can be explained, and the explanation adds up."""
        return not self.problems

    def with_problem(self, step: str, problem: DlbcError) -> Report:
        """The report with one more problem."""
        return replace(self, problems=(*self.problems, Problem(step, problem.fact, problem.where, problem.hint)))


def examine(model: torch.nn.Module, example_inputs: object, *, rules: str | Composite = "auto", backend: str = "auto",
            fallback: str | None = None) -> Report:
    """Go through all steps of compiling and explaining a model; the report names what is wrong at each."""
    from dlbc.frontends.torch_export import normalise

    args, kwargs = normalise(example_inputs)
    options = Options(rules, "torch" if backend == "auto" else backend, fallback=fallback)
    report = Report(type(model).__name__, sum(weight.numel() for weight in model.parameters()),
                    composite=options.composite.name)
    imported, report = _captured(report, model, args, kwargs)
    if imported is None:
        return report
    try:
        check_weights(imported.weights)
    except DlbcError as problem:
        report = report.with_problem("weights", problem)
    canonical = run(imported.graph, CANONICALISE)
    report = _paired(report, canonical, options.composite)
    if not report.ok:
        return report
    source = Source(imported.graph, canonical, imported.inputs, imported.outputs, imported.static)
    return _ran(report, model, source, options, imported.weights, args, kwargs)


def _captured(report: Report, model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
              ) -> tuple[Imported | None, Report]:
    from dlbc.frontends.survey import unsupported
    from dlbc.frontends.torch_export import import_model

    try:
        imported = import_model(model, args, kwargs)
    except UnsupportedOpError as first:
        problems = {(one.fact, one.where): one for one in (first, *unsupported(model, args, kwargs))}
        for problem in problems.values():
            report = report.with_problem("capture", problem)
        return None, report
    except DlbcError as problem:
        return None, report.with_problem("capture", problem)
    return imported, replace(report, inputs=_inputs(imported.inputs, imported.static),
                             sizes=dict(imported.inputs.sizes or {}))


def _inputs(spec: InputSpec, static: Mapping[str, str]) -> tuple[Input, ...]:
    found = []
    for tensor in spec.tensors:
        fixed = {int(axis): reason for name, _, axis in (key.rpartition(".") for key in static)
                 for reason in [static[f"{name}.{axis}"]] if name == tensor.name}
        found.append(Input(tensor.name, str(tensor), fixed))
    return tuple(found)


class _Recording(Composite):
    """A composite that passes what it has no rule for by its gradient, and remembers it."""

    def rule_for(self, op: Op, *, constant_factor: bool, sites: Sites = NOWHERE) -> Rule:
        """The rule of the composite, or else its gradient."""
        try:
            return super().rule_for(op, constant_factor=constant_factor, sites=sites)
        except UnsupportedOpError as problem:
            self.missing.append(problem)
            return Composite([], fallback="gradient").rule_for(op, constant_factor=constant_factor)

    @property
    def missing(self) -> list[UnsupportedOpError]:
        """What had no rule so far."""
        found: list[UnsupportedOpError] = self.__dict__.setdefault("_missing", [])
        return found


def _paired(report: Report, canonical: Graph, composite: Composite) -> Report:
    fitted = composite.fitted(canonical)
    recording = _Recording(fitted.entries, name=fitted.name, fallback=fitted.fallback)
    try:
        graph = run(canonical, (Pair(rules=recording),))
    except UnsupportedOpError:
        graph = None  # not even a gradient: it is among those recorded
    except DlbcError as problem:
        return report.with_problem("rules", problem)
    for missing in recording.missing:
        report = report.with_problem("rules", missing)
    report = replace(report, operations=dict(Counter(op.name for op in canonical.forward.ops).most_common()))
    if graph is None or graph.relevance is None:
        return report
    uses: dict[tuple[str, str], list[str]] = {}
    for op in graph.relevance.ops:
        if op.rule is not None and op.name != "rel.to_multiplier":
            uses.setdefault((op.name.removeprefix("rel."), str(op.rule)), []).append(op.place)
    return replace(report, rules=tuple(RuleUse(name, rule, len(places), places[-1])
                                       for (name, rule), places in uses.items()))


def _ran(report: Report, model: torch.nn.Module, source: Source, options: Options, weights: Mapping[str, Any],
         args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Report:
    """Compile, run on the examples, and check the result against the model and against itself."""
    try:
        explainer = explainer_of(source, options, Variant(), weights, model=model)
        explanation = explainer(*args, positions="all", **kwargs)
        ledger = explanation.conservation()
    except DlbcError as problem:
        return report.with_problem("run", problem)
    difference = _difference(explanation.outputs[explainer.manifest.output],
                             _own_output(model, args, kwargs, list(explanation.outputs), explainer.manifest.output))
    report = replace(report, difference=difference, ledger=ledger)
    if difference is not None and not difference <= AGREES:
        report = report.with_problem("forward", DlbcError(
            f"the compiled forward is {difference:.2g} of the largest output away from the model's",
            hint="explanations of it would be of another function; please report this"))
    lost = [name for name, value in explanation.relevance.items() if not np.isfinite(value).all()]
    for name in lost:
        report = report.with_problem("relevance", DlbcError(
            f"relevance of `{name}` holds NaN or infinity", hint="try other rules, e.g. --rules epsilon or cp-lrp"))
    if not ledger.closes():
        worst = max(ledger.leaks() or ledger.rows, key=lambda row: abs(row.residual))
        report = report.with_problem("conservation", DlbcError(
            f"conservation does not close: {ledger.residual:.3g} of {ledger.seed:.3g} is unaccounted for",
            where=f"{worst.place or 'model'}: {worst.op} <{worst.rule}>", hint="please report this"))
    return report


def _own_output(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: list[str], wanted: str
                ) -> Array | None:
    """The output of that name of the model itself, in eval mode; None where it cannot be told apart."""
    import torch

    from dlbc.frontends.torch_export import evaluating

    with torch.no_grad(), evaluating(model):
        found = model(*args, **kwargs)
    if isinstance(found, Mapping) or hasattr(found, "_fields"):
        found = (found if isinstance(found, Mapping) else found._asdict()).get(wanted)
    if isinstance(found, list | tuple) and len(found) == len(names):
        found = found[names.index(wanted)]
    return as_numpy(found) if isinstance(found, torch.Tensor) else None


def _difference(ours: Array, own: Array | None) -> float | None:
    if own is None or own.shape != ours.shape:
        return None
    largest = float(np.abs(own).max()) if own.size else 0.0
    return float(np.abs(ours.astype(np.float64) - own).max()) / (largest or 1.0) if own.size else 0.0


def sizes_in_words(sizes: Mapping[str, tuple[int, int]]) -> str:
    """`B: any, T: 1 to 1024`."""
    return ", ".join(f"{name}: " + ("any" if high == UNBOUNDED and low <= 1 else f"{low} or more" if high == UNBOUNDED
                                    else f"{low} to {high}") for name, (low, high) in sizes.items())
