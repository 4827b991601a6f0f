"""What must hold of every pass on every graph, and what is written down where it does not.

`Checker.step` runs one pass and holds its result to the graph before: the verifier accepts it, its text reads back
and prints the same, and the float64 interpreter finds the same numbers, zeros staying zeros. A `Bug` names the pass.
"""

from __future__ import annotations

import json
import shlex
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from dlbc.compiler import lowering
from dlbc.errors import InputError, RuleError, UnsupportedOpError
from dlbc.ir.core import Graph, Type
from dlbc.ir.dims import evaluate
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc.ir.printer import print_graph
from dlbc.ir.reference import REFERENCE
from dlbc.ir.verifier import verify
from dlbc.options import Options
from dlbc.passes import PASSES, Pass, load_all
from dlbc.passes.carriers import MOVES
from dlbc.passes.lower import Lower
from dlbc.passes.pipeline import CANONICALISE
from tests.random_graphs import WORDS, K

Array = NDArray[Any]
Arrays = dict[str, Array]
USERS = (UnsupportedOpError, RuleError, InputError)
"""Errors that say what a model may not have: no failure of a pass."""
TOLERANCE = 1e-9

# --- inputs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Sizes and kind of the numbers that a graph is run with."""

    batch: int = 2
    length: int = 3
    seeds: int = 2
    kind: str = "normal"
    number: int = 0

    def arrays(self, graph: Graph) -> Arrays:
        """Numbers for the parameters of both sections, by name."""
        params = (*graph.forward.params, *(graph.relevance.params if graph.relevance is not None else ()))
        return {p.name: self._array(p.name, p.type) for p in params}

    @property
    def sizes(self) -> dict[str, int]:
        return {"B": self.batch, "T": self.length, "S": self.seeds, "P": min(2, self.length), "K": 2}

    def _array(self, name: str, type_: Type) -> Array:
        rng = np.random.default_rng([self.number, zlib.crc32(name.encode())])
        shape = tuple(evaluate(dim, self.sizes) for dim in type_.shape)
        if type_.dtype == "bool" or "mask" in name:
            seen = rng.random(shape) < 0.7
            return seen if type_.dtype == "bool" else seen.astype(np.int64)
        if not type_.floating:  # positions, all different; targets; ids
            rows = [rng.permutation(self.length)[:shape[-1]] for _ in range(int(np.prod(shape[:-1])))]
            below = K if "target" in name else WORDS
            return np.reshape(rows, shape) if "position" in name else rng.integers(0, below, shape)
        array = rng.normal(size=shape)
        if name.startswith(("R.", "M.")):
            return array * (rng.random(shape) < 0.8)
        scale = {"zeros": 0.0, "large": 1e3, "tiny": 1e-9}.get(self.kind, 1.0)
        array = np.round(array) if self.kind == "whole" else array  # many ties and zeros
        return array * scale * ((rng.random(shape) < 0.6) if self.kind == "sparse" else 1.0)


KINDS = ("normal", "zeros", "large", "tiny", "whole", "sparse")


def cases() -> st.SearchStrategy[Case]:
    return st.builds(Case, st.integers(1, 2), st.integers(1, 4), st.integers(1, 3), st.sampled_from(KINDS),
                     st.integers(0, 255))


# --- passes ------------------------------------------------------------------------------------------

CHANGING = frozenset({"sink_positions", "sink_targets", "contrast", "record_experts", "pair", "lower"})
"""Passes after which a graph computes something else, or has what it did not have before."""


TIGHT: dict[str, dict[str, Any]] = {
    "outline": {"least": 1}, "checkpoint": {"every": 2}, "stream_attention": {"budget": 1}, "recompute": {"least": 1}}
"""Options with which passes for large models find something to do in small ones."""


def late(*, tight: bool = False) -> tuple[Pass, ...]:
    """The passes of the pipeline that work on a lowered graph, in order; `tight`: as small models need them."""
    steps = (step for step in lowering(Options(), ledger=False, checkpoint=True) if step.name != "lower")
    return tuple(replace(step, **TIGHT.get(step.name, {})) if tight else step for step in steps)


def rewriting() -> list[Pass]:
    """The passes of `late` that may come in any order; those after them give a graph its final form, and come last."""
    steps = late()
    last = max(i for i, step in enumerate(steps) if step.name in {p.name for p in CANONICALISE})
    return [other for step in steps[:last + 1] for other in switched(type(step))]


def final() -> tuple[Pass, ...]:
    """The passes of `late` after those."""
    names = {step.name for step in rewriting()}
    return tuple(step for step in late(tight=True) if step.name not in names)


def passes_at(level: int) -> list[Pass]:
    """Every pass that keeps what a graph of a level computes, with each of its switches: those of the canonicalising
    pipeline at level 1, all others at level 3, and those of both pipelines anywhere."""
    load_all()
    early, after = {p.name for p in CANONICALISE}, {p.name for p in late()}
    at = {1: early, 2: early & after, 3: after | (set(PASSES) - early - CHANGING)}[level]
    return [step for name in sorted(at - CHANGING) for step in switched(PASSES[name])]


def switched(cls: type[Pass]) -> list[Pass]:
    """A pass with its defaults, with each switch the other way, and as small models need it."""
    if any(f.init and f.default is f.default_factory for f in fields(cls)):  # an option that has no default
        return []
    plain = cls()
    options = [{f.name: not f.default} for f in fields(cls) if isinstance(f.default, bool)]
    return [plain, *(replace(plain, **given) for given in (*options, TIGHT.get(cls.name, {})) if given)]


# --- results -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Results:
    outputs: tuple[Array, ...]
    relevance: tuple[Array, ...]

    @property
    def finite(self) -> bool:
        return all(np.isfinite(x).all() for x in (*self.outputs, *self.relevance))


def results(graph: Graph, arrays: Mapping[str, Array], weights: Mapping[str, Array]) -> Results:
    """What the interpreter finds; of a paired graph, when it is lowered."""
    if graph.relevance is not None and any(op.name.startswith("rel.") for op in graph.relevance.ops):
        graph = Lower().run(graph)
    wanted = {p.name for section in (graph.forward, graph.relevance) if section for p in section.params}
    given = {name: array for name, array in arrays.items() if name in wanted}
    run = interpret(graph, given, weights, given if graph.relevance is not None else None)
    values = graph.attrs.get("references", ())  # returned for the reference's sake, as long as relevance reads them
    count = len(run.outputs) - (len(values) if isinstance(values, tuple) else 0)
    return Results(run.outputs[:count], run.relevance)


EXACT = MOVES | {"relu", "neg", "abs", "sign", "clamp", "where", "maximum", "minimum", "amax", "amin", "topk", "sort",
                 "max_with_index", "min_with_index", "max_pool", "adaptive_max_pool", "floor", "ceil", "round", "full",
                 "arange", "negative_part", "route_topk", "expert_order"}
"""Ops that give numbers as they found them: these do not round."""


SUMS = frozenset({
    "linear", "linear_rows", "matmul", "einsum", "sum", "mean", "cumsum", "avg_pool", "adaptive_avg_pool",
    "interpolate", "attention", "expert_linear", "grouped_linear", "combine",
    *(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3))})


def shaken(graph: Graph, arrays: Mapping[str, Array], weights: Mapping[str, Array], *, sums: bool = False,
           times: int = 3) -> list[Results]:
    """The results when every op rounds to twelve digits, at random: how much a result depends on rounding.

    Zeros stay zeros, and ops that round nothing stay exact. `sums`: sums may be taken in another order, so that terms
    that cancel leave something.
    """
    found = []
    for number in range(times):
        rng = np.random.default_rng(number)

        def rounded(name: str, function: Callable[..., Any], rng: np.random.Generator = rng) -> Callable[..., Any]:
            def run(*operands: Any, **attrs: Any) -> Any:
                made = function(*operands, **attrs)
                return tuple(map(noisy, made)) if isinstance(made, tuple) else noisy(made)

            def noisy(x: Any) -> Any:
                x = np.asarray(x)
                if x.dtype.kind != "f":
                    return x
                size = np.where(np.isfinite(x), np.abs(x), 0.0)  # infinities, as masks have them, are not rounded
                more = size.max(initial=0.0) if sums and name in SUMS else 0.0
                return x + 1e-12 * rng.standard_normal(x.shape) * (size + more)

            return run

        with mock.patch.dict(REFERENCE, {name: rounded(name, f) for name, f in REFERENCE.items() if name not in EXACT}):
            found.append(results(graph, arrays, weights))
    return found


def difference(before: Results, after: Results, shake: Callable[[], list[Results]], *, exact: bool,
               tolerance: float = TOLERANCE, floor: float = 0.0) -> str:
    """What differs between results beyond rounding; "" for nothing. `exact`: relevance of zero stays exactly zero;
    `floor`: what is as small does not count.

    Numbers are equal to `tolerance` of the largest of their array or, where that is more, to what rounding does to it.
    """
    pairs = [*((f"result {i + 1} of forward", x, y, False, lambda r, i=i: r.outputs[i])
               for i, (x, y) in enumerate(zip(before.outputs, after.outputs, strict=False))),
             *((f"result {i + 1} of relevance", x, y, exact, lambda r, i=i: r.relevance[i])
               for i, (x, y) in enumerate(zip(before.relevance, after.relevance, strict=False)))]
    for what, x, y, zeros, of in pairs:
        if x.shape != y.shape:
            return f"{what} has shape {y.shape}, it was {x.shape}"
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        apart = np.abs(x - y)
        new = (x == 0) & (y != 0) if zeros else np.zeros(x.shape, bool)
        if (apart <= tolerance * np.abs(x).max(initial=0.0) + floor).all() and not new.any():
            continue
        others = [np.asarray(of(r), np.float64) for r in shake()]
        noise = np.max([np.abs(other - x) for other in others], axis=0)
        if new.any() and not (noise[new] == 0).any():
            new[...] = False
        limit = floor + tolerance * np.abs(x).max(initial=0.0) + 10 * noise.max(initial=0.0)
        if new.any() or not (apart <= limit).all():
            at = tuple(int(i) for i in np.unravel_index(np.argmax(np.where(new, np.inf, apart)), apart.shape))
            return f"{what} is {y[at]!r} at {list(at)}, it was {x[at]!r}" + (
                "" if np.isfinite(limit) else " (and rounding makes it anything)")
    return ""


# --- checks ------------------------------------------------------------------------------------------

class Bug(AssertionError):
    """A pass failed: its text, the graph before it, and the numbers that show it."""

    def __init__(self, step: Pass | str, graph: Graph, why: str, arrays: Mapping[str, Array],
                 weights: Mapping[str, Array], backend: str = "", rules: str = "") -> None:
        self.step, self.graph, self.why, self.backend, self.rules = step, graph, why, backend, rules
        self.arrays, self.weights = arrays, weights
        self.name = f"backend {backend}" if backend else f"pass `{self.text}`"
        super().__init__(f"{self.name}: {why}")

    @property
    def text(self) -> str:
        try:
            return str(self.step.for_text(self.graph)) if isinstance(self.step, Pass) else self.step
        except Exception:
            return str(getattr(self.step, "name", self.step))

    def write(self, folder: Path) -> tuple[Path, str]:
        """Write the graph and the numbers; the file of the graph, and the command that shows the difference."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = self.backend or getattr(self.step, "name", "passes")
        text = print_graph(self.graph)
        file = folder / f"{stem}-{zlib.crc32((text + self.text).encode()):08x}.dlir"
        chosen = f"--backend {self.backend}" if self.backend else f"--pass {shlex.quote(self.text)}"
        chosen += f" --rules {shlex.quote(self.rules)}" if self.rules else ""
        command = f"python -m tests.fuzz {shlex.quote(str(file))} {chosen}"
        why = "".join(f"// {line}\n" for line in self.why.splitlines())
        file.write_text(f"// {command}\n{why}{text}", encoding="utf-8")
        numbers = {kind: {name: {"dtype": str(a.dtype), "shape": a.shape, "data": a.ravel().tolist()}
                          for name, a in ((n, np.asarray(x)) for n, x in given.items())}
                   for kind, given in (("arrays", self.arrays), ("weights", self.weights))}
        file.with_suffix(".json").write_text(json.dumps(numbers), encoding="utf-8")
        return file, command


def read_numbers(file: Path) -> tuple[Arrays, Arrays]:
    """The arrays and weights next to a graph's file."""
    data = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    arrays, weights = ({name: np.asarray(a["data"], a["dtype"]).reshape(a["shape"]) for name, a in data[kind].items()}
                       for kind in ("arrays", "weights"))
    return arrays, weights


@dataclass
class Checker:
    """The checks of one model with one set of numbers; results of a graph are found once."""

    weights: Mapping[str, Array]
    case: Case
    arrays: Arrays = field(default_factory=dict)
    known: dict[int, tuple[Graph, Results]] = field(default_factory=dict)
    texts: dict[int, tuple[Graph, str]] = field(default_factory=dict)

    def results(self, graph: Graph) -> Results:
        if id(graph) not in self.known:
            self.arrays = {**self.case.arrays(graph), **self.arrays}
            self.known[id(graph)] = graph, results(graph, self.arrays, self.weights)
        return self.known[id(graph)][1]

    def arrays_of(self, graph: Graph) -> Arrays:
        """The inputs of a graph."""
        return {p.name: self.arrays[p.name] for p in graph.forward.params}

    def step(self, step: Pass, graph: Graph) -> Graph:
        """The graph after a pass. Bug where the pass fails; USERS where it refuses the model."""
        text = self.text(graph)
        before = None if step.name == "sink_positions" else self.results(graph)
        with self.blame(step, graph):
            after = step.run(graph)
            if print_graph(graph) != text:
                raise AssertionError("it changed the graph that it was given")
            if after is graph:
                return graph
            verify(after)
            printed = self.text(after)
            if printed == text:
                return graph
            if print_graph(parse_graph(printed)) != printed:
                raise AssertionError("what it gives prints otherwise when it was read back")
            self.arrays = {**self.case.arrays(after), **self.arrays}
            if before is not None and before.finite:
                self.compare(step, graph, before, self.results(after), exact=graph.relevance is not None)
        return after

    def text(self, graph: Graph) -> str:
        """The graph as it prints, which is told once."""
        if id(graph) not in self.texts:
            self.texts[id(graph)] = graph, print_graph(graph)
        return self.texts[id(graph)][1]

    def compare(self, step: Pass | str, graph: Graph, before: Results, after: Results, *, exact: bool) -> None:
        """AssertionError where results differ, or where some went or came without reason."""
        for kind in ("outputs", "relevance"):
            own, new = len(getattr(before, kind)), len(getattr(after, kind))
            grows = getattr(step, "name", "") in CHANGING  # more is returned: the ledger, or what is kept
            if own > new or (own < new and not grows):
                raise AssertionError(f"{new} results of {kind}, there were {own}")
        why = difference(before, after, lambda: shaken(graph, self.arrays, self.weights, sums=not exact), exact=exact,
                         floor=1e-12 if step == "" else 0.0)  # kernels may lose numbers that small
        if why:
            raise AssertionError(why)

    def order(self, steps: Sequence[Pass], graph: Graph) -> Graph:
        """The graph after passes in this order, each held to the graph before it."""
        for step in steps:
            graph = self.step(step, graph)
        return graph

    def quickly(self, steps: Sequence[Pass], graph: Graph) -> Graph:
        """The graph after passes that are checked elsewhere: Bug only where one raises an error."""
        for step in steps:
            self.arrays = {**self.case.arrays(graph), **self.arrays}
            with self.blame(step, graph):
                graph = step.run(graph)
        return graph

    def blame(self, step: Pass | str, graph: Graph, **options: str) -> _Blame:
        return _Blame(self, step, graph, options)


@dataclass
class _Blame:
    """Turns what goes wrong inside of a `with` into a Bug of a pass."""

    checker: Checker
    step: Pass | str
    graph: Graph
    options: dict[str, str]

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, problem: BaseException | None, _: object) -> None:
        if isinstance(problem, Exception) and not isinstance(problem, (*USERS, Bug)):
            why = str(problem) if isinstance(problem, AssertionError) and str(problem) else (
                f"{type(problem).__name__}: {problem}")
            raise Bug(self.step, self.graph, why, self.checker.arrays, self.checker.weights,
                      **self.options) from problem


