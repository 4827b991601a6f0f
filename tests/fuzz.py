"""Fuzzing of the passes: random models, random rules, every pass alone, in pipeline order and in any order.

    python -m tests.fuzz --minutes 10                         random models until one shows a bug; `make fuzz`
    python -m tests.fuzz FILE.dlir --pass "simplify"          show again what a pass does wrong
    python -m tests.fuzz FILE.dlir --backend torch            ... or generated code: numpy, torch or c

A bug is shrunk by hypothesis to a small graph, which is written with its numbers; what passes are held to is in
`fuzz_checks.py`, the models in `fuzz_graphs.py`.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from dlbc.backends import load
from dlbc.compiler import FUSE
from dlbc.composite import Composite, resolve
from dlbc.ir.core import Graph
from dlbc.ir.interpreter import interpret
from dlbc.ir.ops import attr
from dlbc.ir.parser import parse_graph
from dlbc.ir.printer import print_graph
from dlbc.ir.verifier import verify
from dlbc.passes import Pass, parse
from dlbc.passes.contrast import Contrast
from dlbc.passes.eliminate_common import EliminateCommon
from dlbc.passes.eliminate_dead import EliminateDead
from dlbc.passes.lower import Lower
from dlbc.passes.pair import Pair
from dlbc.passes.pipeline import CANONICALISE
from dlbc.passes.record_experts import RecordExperts
from dlbc.passes.sink_positions import SinkPositions
from dlbc.passes.sink_targets import SinkTargets
from dlbc.presets import PRESETS
from dlbc_runtime.c_library import compiler
from dlbc_runtime.module import load_module
from tests.fuzz_checks import (
    USERS,
    Array,
    Bug,
    Case,
    Checker,
    Results,
    cases,
    difference,
    final,
    late,
    passes_at,
    read_numbers,
    results,
    rewriting,
    shaken,
)
from tests.fuzz_graphs import KINDS as MODELS
from tests.fuzz_graphs import models
from tests.random_graphs import Model

LIBRARIES = ("numpy", "torch")
RULES = (*PRESETS, "dlb{activation_aware=true}", "gamma{gamma=0.5}")
TARGETS = SinkTargets(at_least=1)


@dataclass(frozen=True)
class Trial:
    """A model, the numbers it runs on, how it is explained, and a seed for orders of passes."""

    model: Model
    case: Case
    rules: str = "attnlrp"
    keep: str = "inputs"
    ledger: bool = False
    raised: bool = True
    sinks: bool = False
    reference: bool = False
    order: int = 0

    @property
    def checker(self) -> Checker:
        return Checker(self.model.weights, self.case)

    @property
    def canonical(self) -> Graph:
        """The graph after the canonicalising passes, unchecked, or as it was made."""
        return self.checker.quickly(CANONICALISE if self.raised else (), self.model.graph)

    def pick(self, steps: Sequence[Pass], count: int) -> list[Pass]:
        """Passes in a random order, some more than once."""
        rng = np.random.default_rng(self.order)
        return [steps[int(i)] for i in rng.integers(len(steps), size=count)]


def trials(kinds: tuple[str, ...] = MODELS, most: int = 8) -> st.SearchStrategy[Trial]:
    return st.builds(Trial, models(kinds, most), cases(), st.sampled_from(RULES), st.sampled_from(["inputs", "all"]),
                     st.booleans(), st.booleans(), st.booleans(), st.sampled_from([False, False, True]),
                     st.integers(0, 2**16))


# --- what is tried -----------------------------------------------------------------------------------

def canonical(trial: Trial) -> None:
    """The canonicalising passes: each alone on the model as made and at the end, the pipeline, and any order."""
    graph, check = trial.model.graph, trial.checker
    for step in passes_at(1):
        check.step(step, graph)
    after = check.order(CANONICALISE, graph)
    for step in passes_at(1):
        check.step(step, after)
    check.order(trial.pick(passes_at(1), 8), graph)


def explained(trial: Trial) -> None:
    """The passes behind: sinks, pairing, lowering; those that keep what a graph computes alone, in order, in any."""
    try:
        check, paired = _paired(trial)
        lowered = check.step(Lower(ledger=trial.ledger), paired)
        for step in passes_at(2):
            check.step(step, paired)
        check.step(Lower(), check.order(trial.pick(passes_at(2), 3), paired))
    except USERS:
        return
    for step in passes_at(3):
        check.step(step, lowered)
    check.order(late(tight=bool(trial.order % 3)), lowered)
    check.order((*trial.pick(rewriting(), 6), *final()), lowered)


def _paired(trial: Trial) -> tuple[Checker, Graph]:
    graph, check = trial.canonical, trial.checker
    composite = resolve(trial.rules, "gradient").fitted(graph)
    mean = composite.contrast == "mean"
    if not trial.ledger and not trial.reference:
        graph = check.step(RecordExperts(), graph)
    if trial.sinks:
        graph = check.order((SinkPositions(), EliminateDead()), graph)
        if composite.streams == 1 and not trial.reference:
            graph = check.step(SinkTargets(at_least=1, contrast=mean), graph)
    if mean:
        graph = check.step(Contrast(), graph)
    if trial.reference:
        graph = check.step(EliminateCommon(), graph)
    return check, check.step(Pair(keep=trial.keep, rules=composite, reference=trial.reference), graph)


def sunk(trial: Trial) -> None:
    """Explanations at some positions, and of some targets, are those of the whole output seeded there alone."""
    try:
        graph = trial.canonical
        composite = resolve(trial.rules, "gradient").fitted(graph)
        graph = graph if trial.ledger else trial.checker.step(RecordExperts(), graph)
        _hold_sink(trial.checker, SinkPositions(), graph, composite)
        if composite.streams == 1:
            _hold_sink(trial.checker, TARGETS, graph, composite)
    except USERS:
        return


def _hold_sink(check: Checker, step: Pass, graph: Graph, composite: Composite) -> None:
    after = check.step(step, graph)
    if after is graph:
        return
    whole, part = (check.quickly((Pair(rules=composite), Lower()), g) for g in (graph, after))
    assert whole.relevance is not None and part.relevance is not None
    of_whole = check.case.arrays(whole)  # what is computed at the positions may have kept its name
    check.arrays = {**of_whole, **check.arrays, **check.case.arrays(part)}
    name, own = whole.relevance.params[0].name, part.relevance.params[0].name
    sizes = (*check.arrays[own].shape[:2], *of_whole[name].shape[2:])
    seeds = np.zeros(sizes)
    if step.name == "sink_positions":
        rows, chosen = np.arange(check.case.batch)[:, None], check.arrays["positions"]
        np.add.at(seeds, (slice(None), rows, chosen), check.arrays[own])
    else:
        places = np.indices(check.arrays["targets"].shape, sparse=True)[:-1]
        np.add.at(seeds, (slice(None), *places, check.arrays["targets"]), check.arrays[own])
    before = results(whole, {**check.arrays, name: seeds}, check.weights)
    found = results(part, check.arrays, check.weights)
    if not before.finite:
        return
    outputs = tuple(y[rows, chosen] if new.type != old.type else y for y, old, new in zip(
        before.outputs, graph.forward.results, after.forward.results, strict=True))
    with check.blame(step, graph, rules=composite.name):
        why = difference(Results(outputs, before.relevance), found, lambda: [
            Results(outputs, r.relevance) for r in shaken(whole, {**check.arrays, name: seeds}, check.weights)],
            exact=False, tolerance=1e-6)  # each op has its stabiliser, and there are others
        assert not why, f"with rules {composite.name}: {why}"


def generated(trial: Trial) -> None:
    """Generated code, its numbers widened to float64, against the interpreter."""
    _generated(trial, LIBRARIES)


def in_c(trial: Trial) -> None:
    """Generated code with functions in C, which takes a compiler's time for each model."""
    _generated(trial, ("c",))


def _generated(trial: Trial, backends: Sequence[str]) -> None:
    try:
        check, graph = _paired(trial)
        graph = check.quickly((Lower(ledger=trial.ledger), *late(tight=bool(trial.order % 3))), graph)
    except USERS:
        return
    for backend in backends:
        hold_backend(check, graph, backend)


def hold_backend(check: Checker, graph: Graph, backend: str) -> None:
    """Bug where the module that a backend makes of a lowered graph finds other numbers than the interpreter."""
    before = check.results(graph)
    if not before.finite or _tied(check, graph):
        return
    with check.blame("", graph, backend=backend):
        found = _ran(check, graph, backend)
        check.compare("", graph, before, found, exact=False)


def _tied(check: Checker, graph: Graph) -> bool:
    """Whether a `topk` chooses among equals, which backends may do as they like."""
    chosen = [op for op in graph.forward.ops if op.name in ("topk", "route_topk")]
    if not chosen:
        return False
    found = interpret(replace(graph, relevance=None), check.arrays_of(graph), check.weights).values
    axes = [int(str(attr(op, "dim"))) if op.name == "topk" else -1 for op in chosen]
    ranked = (np.sort(found[str(op.operands[-1])[1:]], axis=axis) for op, axis in zip(chosen, axes, strict=True))
    return any((np.diff(x, axis=axis) == 0).any() for x, axis in zip(ranked, axes, strict=True))


def _ran(check: Checker, graph: Graph, backend: str) -> Results:
    import torch

    assert graph.relevance is not None
    wide = parse_graph(re.sub(r"\b(f32|f16|bf16)(?=\[|\")", "f64", print_graph(graph)))
    for step in FUSE.get(backend, ()):
        wide = step.run(wide)
    module = load_module(load(backend).emit(wide), graph.name)

    def as_given(array: Array) -> Any:
        return np.array(array) if backend == "numpy" else torch.as_tensor(np.array(array))

    def as_found(arrays: Sequence[Any]) -> tuple[Array, ...]:
        return tuple(y.numpy().copy() if isinstance(y, torch.Tensor) else np.array(y) for y in arrays)

    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of `where(c, 0.0, 1.0)`, which is float32 in the text
    try:
        with torch.inference_mode(), np.errstate(all="ignore"):
            weights = {name: as_given(check.weights[name]) for name in graph.weights}
            prepared = module.prepare(weights)
            outputs, state = module.forward(
                weights, prepared, *(as_given(check.arrays[p.name]) for p in graph.forward.params))
            kept = as_found(outputs)  # relevance may write over what it was given
            relevance = module.relevance(
                weights, prepared, list(state), *(as_given(check.arrays[p.name]) for p in graph.relevance.params))
            return Results(kept[:len(check.results(graph).outputs)], as_found(relevance))
    finally:
        torch.set_default_dtype(usual)


CHECKS: dict[str, Callable[[Trial], None]] = {
    "canonical": canonical, "explained": explained, "sunk": sunk, "generated": generated, "in_c": in_c}

# --- running -----------------------------------------------------------------------------------------


def find(check: Callable[[Trial], None], examples: int, number: int, kinds: tuple[str, ...] = MODELS,
         most: int = 8, shrink: bool = True) -> Bug | None:
    """Try random models; the bug that the smallest model shows (`shrink`: else the first), None where all is well."""
    run = settings(max_examples=examples, deadline=None, database=None, report_multiple_bugs=False, print_blob=False,
                   phases=(Phase.generate, *((Phase.shrink,) if shrink else ())), verbosity=Verbosity.quiet,
                   suppress_health_check=list(HealthCheck))(
        seed(number)(given(trials(kinds, most))(check)))
    try:
        run()
    except Bug as bug:
        return bug
    return None


def again(file: Path, passes: str, backend: str, rules: str) -> None:
    """Run passes, or a backend, on a graph and the numbers next to it. Bug where they do not keep what it computes."""
    graph = parse_graph(file.read_text(encoding="utf-8"), str(file))
    verify(graph)
    arrays, weights = read_numbers(file)
    seeds = graph.relevance.params[0].name if graph.relevance is not None else ""
    batch = next((arrays[p.name].shape[0] for p in graph.forward.params), 1)
    length = next((arrays[p.name].shape[1] for p in graph.forward.params if arrays[p.name].ndim > 1), 1)
    check = Checker(weights, Case(batch, length, arrays[seeds].shape[0] if seeds else 2), arrays)
    if backend:
        hold_backend(check, graph, backend)
    for step in parse(passes):
        if rules:
            _hold_sink(check, step, graph, resolve(rules, "gradient").fitted(graph))
        graph = check.step(step, graph)


def report(bug: Bug, folder: Path) -> str:
    """What a bug is, where its graph is, and how to see it again."""
    file, command = bug.write(folder)
    return f"{bug}\n  the graph and its numbers: {file}\n  to see this again: {command}"


def long(minutes: float, number: int, folder: Path, only: Sequence[str]) -> int:
    """Fuzz until the time is over (0) or a bug is found (1)."""
    until, tried, rounds = time.monotonic() + 60 * minutes, 0, 0
    while time.monotonic() < until:
        for name in only:
            examples = 25
            bug = find(CHECKS[name], examples, number + rounds)
            tried += examples
            if bug is not None:
                print(f"fuzz: {name}, seed {number + rounds}, after {tried} models: {report(bug, folder)}")
                return 1
            if time.monotonic() > until:
                break
        rounds += 1
    print(f"fuzz: no bug in {tried} models ({minutes:g} minutes, seeds from {number})")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 where all is well, 1 where there is a bug."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the passes with random models.")
    parser.add_argument("file", nargs="?", type=Path, help="a graph that was written down, to run again")
    parser.add_argument("--pass", dest="passes", default="", help='passes for it: "name{option=value}"')
    parser.add_argument("--backend", default="", choices=("", *LIBRARIES, "c"), help="a backend for it")
    parser.add_argument("--rules", default="", help="the rules that it is explained by, for passes that need to know")
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("MINUTES") or 10))
    parser.add_argument("--seed", type=int, default=None, help="the first seed; random if not given")
    parser.add_argument("--only", choices=tuple(CHECKS), action="append", help="what to try; all if not given")
    parser.add_argument("--folder", type=Path, help="where to write what shows a bug")
    options = parser.parse_args(arguments)
    if options.file is None:
        number = secrets.randbelow(2**31) if options.seed is None else options.seed
        folder = options.folder or Path(os.environ.get("DLBC_DUMP") or tempfile.mkdtemp(prefix="dlbc-fuzz-"))
        able = [name for name in CHECKS if name != "in_c" or compiler()]
        return long(options.minutes, number, folder, options.only or able)
    try:
        again(options.file, options.passes, options.backend, options.rules)
    except Bug as bug:
        print(bug)
        return 1
    print("nothing is wrong: the numbers are the same")
    return 0


if __name__ == "__main__":
    sys.exit(main())
