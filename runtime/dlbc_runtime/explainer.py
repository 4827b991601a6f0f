"""The explainer: runs a compiled model and carries relevance from an output back to its inputs."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dlbc_runtime.arrays import Array, Arrays, Json, as_numpy
from dlbc_runtime.engines import Engine, engine
from dlbc_runtime.errors import ArtifactError, InputError
from dlbc_runtime.explained import Explained, Method
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.ledger import Ledger, ledger_of
from dlbc_runtime.memory import Memory, as_bytes
from dlbc_runtime.padding import padded
from dlbc_runtime.parts import carried, plan_within, run_within, size_by_name, size_of, together
from dlbc_runtime.program import Manifest, Program, Rules, Variant
from dlbc_runtime.reference import Reference
from dlbc_runtime.references import (
    AtReference,
    ReferenceRuns,
    at_reference,
    differences_of,
    reference_arguments,
    reference_key,
    reference_values,
)
from dlbc_runtime.seeds import dense_seeds, distinct_columns, sparse_seeds, with_rivals
from dlbc_runtime.signature import RangeError, SizeError, dtype_name
from dlbc_runtime.sinks import apart
from dlbc_runtime.sinks import check as check_sinks
from dlbc_runtime.target import Target, as_targets

if TYPE_CHECKING:
    import networkx

log = logging.getLogger(__name__)

Build = Callable[[Variant], Program]
Recompile = Callable[[tuple[Any, ...], Mapping[str, Any]], "Explainer"]
Draw = Callable[[str], "networkx.MultiDiGraph"]


@dataclass(eq=False)
class _Loaded:
    """A program's module, its prepared values, and the weights' state they were made for."""

    program: Program
    module: Any
    prepared: tuple[object, Any] = (None, ())
    lock: threading.Lock = field(default_factory=threading.Lock)
    references: ReferenceRuns = field(default_factory=ReferenceRuns)


class Explainer:
    """Compiled code that explains one model. Immutable to its users, reentrant and thread-safe.

    It holds references to the model's weights, sees later in-place changes of their values, and never
    changes the model.
    """

    def __init__(self, programs: Mapping[Variant, Program], weights: Mapping[str, Any], *,
                 default: Variant | None = None, build: Build | None = None, recompile: Recompile | None = None,
                 draw: Draw | None = None, recipe: Mapping[str, Json] | None = None,
                 reference: Reference | None = None, memory_budget: int | None = None) -> None:
        self._programs = dict(programs)
        self._default = default or next(iter(self._programs))
        self._manifest = self._programs[self._default].manifest
        self._weights = dict(weights)
        self._build, self._recompile, self._draw = build, recompile, draw
        self._recipe = dict(recipe or {})
        self._reference = reference
        self._memory_budget = memory_budget
        self._engine: Engine = engine(self.manifest.backend, self._weights)
        self._loaded: dict[Variant, _Loaded] = {}
        self._resized: dict[tuple[tuple[int, ...], ...], Explainer] = {}
        self._lock = threading.Lock()
        self._said: set[str] = set()
        self._state: object = None

    # What it is

    @property
    def manifest(self) -> Manifest:
        """What is known about the default program: model, rules, inputs, outputs, weights, versions."""
        return self._manifest

    @property
    def programs(self) -> Mapping[Variant, Program]:
        """The programs compiled so far, by variant."""
        return dict(self._programs)

    @property
    def default(self) -> Variant:
        """The variant that calls run when they ask for nothing else."""
        return self._default

    @property
    def recipe(self) -> Mapping[str, Json]:
        """What the compiler was asked for, as JSON data: a saved explainer carries it."""
        return dict(self._recipe)

    @property
    def reference(self) -> Reference | None:
        """What inputs are compared with where a call names nothing else; None: they are explained by themselves."""
        return self._reference

    @property
    def memory_budget(self) -> int | None:
        """The bytes that calls may take where they name nothing else; None: what they need."""
        return self._memory_budget

    @property
    def weights(self) -> Mapping[str, Any]:
        """The model's tensors that the programs read, by name. References, not copies."""
        return dict(self._weights)

    @property
    def source(self) -> str:
        """The generated module."""
        return self._programs[self._default].source

    def ir(self, level: str = "paired") -> str:
        """The IR text of a level: `exported`, `canonical`, `paired`, `lowered`. InputError for other names."""
        levels = self._programs[self._default].ir
        if level not in levels:
            raise InputError(f"there is no IR level `{level}`", hint=f"levels: {', '.join(levels)}")
        return levels[level]

    def graph(self, level: str = "paired") -> networkx.MultiDiGraph:
        """The graph of a level for networkx: a node for each op, an edge for each value that one reads of another."""
        if self._draw is None:
            raise ArtifactError("this explainer was loaded without the compiler, which reads its IR",
                                hint="use dlbc.load, or read the text with explainer.ir()")
        return self._draw(self.ir(level))

    def rules(self) -> Rules:
        """Which rule explains which place, from the output back; and what `auto` chose, and why."""
        return Rules(self.manifest.rules, self.manifest.composite, self.manifest.reason)

    def __repr__(self) -> str:
        m = self.manifest
        return f"Explainer({m.model}{m.inputs}, rules={m.composite!r}, backend={m.backend!r})"

    # What it does

    def __call__(self, *args: Any, target: object = None, keep: str | None = None, multiplier: float = 100.0,
                 scaler: float = 1.0, output: str | None = None, positions: str = "explained",
                 reference: object = None, sinks: str = "keep", memory_budget: int | str | None = None, **kwargs: Any
                 ) -> Explanation:
        """Explain the outputs for these inputs, given as to the model; texts of different lengths as a list of
        token ids for each, padded and masked inside: `explanation.relevance_of(input, row)` has each row's own length.

        `target`: None (what was predicted), an int, a `Target`, or a list of them (one explanation each from
        one forward pass). `keep`: also return relevance and activations of inner places: "modules", "all" or
        a module-path glob. `multiplier` is the total relevance put on the output: with 100, read it as percent;
        `scaler` multiplies what is found.
        `output`: the name of the output to explain, where there are several. `positions="all"`: a language
        model returns its logits at all positions, not only at the explained one. `reference`: what this call
        compares the inputs with, where the explainer was compiled with a reference (`dlbc.Reference`).
        `sinks="apart"`: relevance of each row's first token, where attention is parked, is `explanation.sinks` and no
        part of `relevance`.
        `memory_budget`: bytes, or text such as "2GB", that this call may take besides the weights; batch rows and
        targets are then explained in parts, and forward values computed again, as far as needed (`docs/memory.md`).

        InputError when inputs, target or options do not fit; an output or `keep` that is not there is an error of
        the compiler, IRError.
        """
        for name, factor in (("multiplier", multiplier), ("scaler", scaler)):
            if not isinstance(factor, int | float) or not math.isfinite(factor) or factor == 0:
                raise InputError(f"{name} is {factor!r}", hint="give a number that is finite and not 0")
        if positions not in ("explained", "all"):
            raise InputError(f"positions={positions!r}", hint='"explained" or "all"')
        check_sinks(sinks)
        budget = self._memory_budget if memory_budget is None else as_bytes(memory_budget)
        compared = self._compared(reference)
        if any(isinstance(given, list | tuple) for given in (*args, *kwargs.values())):
            args, kwargs, lengths = padded(self.manifest.inputs, args, kwargs, self.manifest.pad, self._engine.array)
        else:
            lengths = {}
        if lengths:
            targets, many = as_targets(target)
            own = [one.within_rows(next(iter(lengths.values()))) for one in targets]
            found = self(*args, target=own if many else own[0], keep=keep, multiplier=multiplier, scaler=scaler,
                         output=output, positions=positions, sinks=sinks, memory_budget=budget,
                         reference=None if reference is None else compared, **kwargs)
            return replace(found, lengths=lengths)
        try:
            given = self._engine.inputs(self.manifest.inputs.bind(args, kwargs))
        except SizeError as problem:
            other = self._for_these_sizes(args, kwargs, problem)
            if other is None:
                raise
            return other(*args, target=target, keep=keep, multiplier=multiplier, scaler=scaler, output=output,
                         positions=positions, sinks=sinks, reference=None if reference is None else compared,
                         memory_budget=budget, **kwargs)
        self._check_bounds(given)
        targets, many = as_targets(target)
        if not self.manifest.sequence and any(one.position is not None for one in targets):
            raise InputError(f"a target has a position, but `{self.manifest.output}` has no sequence of them",
                             where="target", hint="leave `position` out")
        if self.manifest.streams > 1:
            check_contrastive(targets, multiplier)
        variant = self._variant(keep, output, positions, targets)
        call = Call(self, variant, given, targets, many, multiplier, scaler, compared)
        found = call.run() if budget is None else run_within(call, budget)
        return found if sinks == "keep" else apart(found, sequence=bool(self._programs[variant].manifest.sequence))

    def _variant(self, keep: str | None, output: str | None, positions: str, targets: Sequence[Target]) -> Variant:
        """The program of a call."""
        variant, weighs = self._default, any(one.weighs for one in targets)
        if keep or output or positions == "all" or weighs:
            variant = replace(variant, keep=keep or variant.keep, output=output or variant.output,
                              all_positions=positions == "all" or variant.all_positions, dense=weighs or variant.dense)
        return variant

    def memory(self, *args: Any, target: object = None, keep: str | None = None, output: str | None = None,
               positions: str = "explained", memory_budget: int | str | None = None,
               sizes: Mapping[str, int] | None = None, **kwargs: Any) -> Memory:
        """The bytes that explaining these inputs will take at each step, weights aside; nothing is run.

        Options are those of a call. In place of inputs, `sizes` may name sizes (`{"B": 1, "T": 512}`, the named axes in
        `explainer.manifest.inputs`); the rest of them is 1. Measured memory is more by what allocators and libraries
        keep for themselves. InputError as in a call, and for a budget that is too small.
        """
        budget = self._memory_budget if memory_budget is None else as_bytes(memory_budget)
        targets, _ = as_targets(target)
        variant = self._variant(keep, output, positions, targets)
        manifest = self.program_of(variant).manifest
        if sizes is None:
            args, kwargs, _ = padded(manifest.inputs, args, kwargs, manifest.pad, self._engine.array)
            given = self._engine.inputs(manifest.inputs.bind(args, kwargs))
            size = size_of(manifest, Call(self, variant, given, targets, False, 1.0, reference=self._reference))
        else:
            size = size_by_name(manifest, sizes, targets)
        return plan_within(self.program_of, variant, size, budget)

    def check(self, *args: Any, **kwargs: Any) -> None:
        """InputError where inputs lie beyond what the rules assume of them."""
        if self.manifest.bounds:
            self._check_bounds(self.manifest.inputs.bind(args, kwargs))

    def _check_bounds(self, given: Mapping[str, Any]) -> None:
        for bounds in self.manifest.bounds:
            bounds.check(as_numpy(given[bounds.input]))

    def with_options(self, **options: Any) -> Explainer:
        """The same explainer with another default: `keep`, `output`, `all_positions`, `checkpoint`, `memory_budget`."""
        budget = options.pop("memory_budget", self._memory_budget)
        variant = replace(self._default, **options)
        self._load(variant)
        return Explainer(self._programs, self._weights, default=variant, build=self._build,
                         recompile=self._recompile, draw=self._draw, recipe=self._recipe,
                         reference=self._reference, memory_budget=None if budget is None else as_bytes(budget))

    def forward(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """The compiled model alone: its outputs by name, and the positions [B, P] at which a sequence output is
        computed (None: at all)."""
        given = self._engine.inputs(self.manifest.inputs.bind(args, kwargs))
        return Call(self, self._default, given, *as_targets(None), 1.0).forward()

    def _compared(self, reference: object) -> Reference | None:
        """The reference of a call; InputError where there can be none, or where it does not fit the model's inputs."""
        if not self.manifest.reference:
            if reference is not None:
                raise InputError("this explainer explains inputs by themselves, not their differences to a reference",
                                 where="reference", hint="compile with reference=..., and name others in calls")
            return None
        found = self._reference if reference is None else Reference.of(reference)
        if found is None:
            raise InputError("there is nothing to compare the inputs with", where="reference",
                             hint="give explainer(..., reference=...)")
        found.by_input(self.manifest.inputs, self.manifest.explained)
        return found

    def program_of(self, variant: Variant) -> Program:
        """The program of a variant, compiled when it is first asked for."""
        return self._load(variant).program

    def _load(self, variant: Variant) -> _Loaded:
        found = self._loaded.get(variant)
        if found is not None:
            return found
        with self._lock:
            if variant not in self._loaded:
                if variant not in self._programs:
                    if self._build is None:
                        raise ArtifactError(
                            f"the artifact holds no program for {variant.name}",
                            hint="load it with dlbc.load, which can compile one, or save an explainer that has it")
                    self._programs[variant] = self._build(variant)
                program = self._programs[variant]
                self._loaded[variant] = _Loaded(program, program.module())
            return self._loaded[variant]

    def _weights_state(self) -> object:
        """Something that changes when a weight's numbers do. Looked at before each run: InputError for a weight whose
        element type or shape is not what was compiled for, or that now holds NaN or infinity."""
        state = tuple(self._engine.version(weight) for weight in self._weights.values())
        if state != self._state:
            for spec in self.manifest.weights:
                weight = self._weights[spec.name]
                if (dtype_name(weight), tuple(weight.shape)) != (spec.dtype, spec.shape):
                    raise InputError(f"weight `{spec.name}` is {dtype_name(weight)}{list(weight.shape)} now, it was "
                                     f"{spec.dtype}{list(spec.shape)} when the model was compiled",
                                     hint="compile the model again")
                if self._state is not None and not self._engine.finite(weight):
                    raise InputError(f"weight `{spec.name}` holds NaN or infinity",
                                     hint="an explanation of this model would mean nothing; reload or retrain it")
            self._state = state
        return state

    def _prepared(self, loaded: _Loaded) -> Any:
        """Values computed from weights alone, made anew when one of those weights has changed."""
        state = tuple(self._engine.version(self._weights[n]) for n in loaded.program.manifest.prepared_from)
        with loaded.lock:
            if loaded.prepared[0] != state:
                loaded.prepared = (state, loaded.module.prepare(self._weights))
            return loaded.prepared[1]

    def _for_these_sizes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], problem: SizeError
                         ) -> Explainer | None:
        """Another explainer of the same model for sizes that this one was not captured for."""
        if self._recompile is None or not (self.manifest.static or isinstance(problem, RangeError)):
            return None
        tensors = [v for v in (*args, *kwargs.values()) if hasattr(v, "shape")]
        key = tuple(tuple(int(size) for size in v.shape) for v in tensors)
        if key not in self._resized:
            log.info("compiling again for sizes %s: %s", key, "; ".join(self.manifest.static.values()) or problem.fact)
            self._resized[key] = self._recompile(args, kwargs)
        return self._resized[key]

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning(text)

    def save(self, path: str | os.PathLike[str], *, weights: bool = False) -> None:
        """Write this explainer as one zip file: manifest, IR, source; `weights=True` includes the numbers."""
        from dlbc_runtime.artifact import save

        save(self, path, weights=weights)


@dataclass
class Call:
    """One call of an explainer. `at_a_time`: for how many targets relevance is carried at once (0: all)."""

    explainer: Explainer
    variant: Variant
    inputs: dict[str, Any]
    targets: tuple[Target, ...]
    many: bool
    multiplier: float
    scaler: float = 1.0
    reference: Reference | None = None
    state: object = None
    at_a_time: int = 0

    def run(self) -> Explanation:
        explainer, engine = self.explainer, self.explainer._engine
        loaded = explainer._load(self.variant)
        manifest = loaded.program.manifest
        self.state = explainer._weights_state()
        with engine.running():
            prepared = explainer._prepared(loaded)
            started = time.perf_counter()
            arguments, columns = self.with_positions(manifest)
            compared = self._at_reference(loaded, prepared, arguments)
            results, state = loaded.module.forward(explainer._weights, prepared, *arguments)
            results = own_results(manifest, results)
            outputs = dict(zip(manifest.outputs.names, results, strict=False))
            seeds, explained = self._seeds(manifest, results, columns, compared)
            forwarded = time.perf_counter()
            relevance = together(self._carried(loaded, prepared, state, seeds, compared), len(seeds[0]))
            finished = time.perf_counter()
        if manifest.before:
            explainer._say_once(f"`{manifest.output}` ends in {manifest.before}: the value before it is explained")
        count = len(manifest.explained) + len(manifest.nodes)
        named = dict(zip((*manifest.explained, *manifest.nodes), relevance[:count], strict=True))
        positive, negative = self._streams(manifest, named)
        single = {name: self._found(value if not positive else positive[name] - negative[name])
                  for name, value in named.items()}
        activations = dict(zip(manifest.nodes, results[len(manifest.outputs.names):], strict=False))
        return Explanation(
            outputs=Arrays(outputs), relevance=Arrays({n: single[n] for n in manifest.explained}),
            inputs=Arrays(self.inputs), target=explained,
            nodes=Arrays({n: single[n] for n in manifest.nodes}), activations=Arrays(activations),
            rules=manifest.composite, many_targets=self.many, ledger_source=self.ledger,
            positive=Arrays({n: self._found(positive[n]) for n in manifest.explained if positive}),
            negative=Arrays({n: self._found(negative[n]) for n in manifest.explained if negative}),
            method=Method(manifest.model, manifest.backend, self.multiplier,
                          {"forward": forwarded - started, "relevance": finished - forwarded}, manifest.versions,
                          self.scaler, str(self.reference or "")))

    def _streams(self, manifest: Manifest, named: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of contrastive rules the relevance of targets and that of their rivals, [targets, ...]; of others nothing."""
        if manifest.streams == 1:
            return {}, {}
        count = len(self.targets)
        return {n: v[:count] for n, v in named.items()}, {n: v[count:] for n, v in named.items()}

    def _found(self, value: Any) -> Any:
        """Relevance [targets, ...] as it is returned: scaled, of one target without the first axis."""
        value = value if self.scaler == 1 else value * self.scaler
        return value if self.many else value[0]

    def forward(self) -> tuple[dict[str, Any], Any]:
        """The outputs alone, and the positions at which a sequence output is computed."""
        explainer, loaded = self.explainer, self.explainer._load(self.variant)
        with explainer._engine.running():
            arguments, _ = self.with_positions(loaded.program.manifest)
            results, _ = loaded.module.forward(explainer._weights, explainer._prepared(loaded), *arguments)
        return (dict(zip(loaded.program.manifest.outputs.names, results, strict=False)),
                arguments[-1] if len(arguments) > len(self.inputs) else None)

    def _carried(self, loaded: _Loaded, prepared: Any, state: list[Any], seeds: Sequence[Array],
                 compared: AtReference | None) -> Iterator[tuple[Array, tuple[Any, ...]]]:
        """Relevance, for some of the targets after the other where they are too many for one go."""
        weights, manifest = self.explainer._weights, loaded.program.manifest
        return carried(lambda state, *given: loaded.module.relevance(weights, prepared, state, *given), state, seeds,
                       self._values(manifest, compared), self.explainer._engine.array, streams=manifest.streams,
                       at_a_time=self.at_a_time)

    def ledger(self) -> Ledger:
        """Run the same call again with the ledger kept. InputError where the weights have changed since."""
        return self.ledger_from(self.totals())

    def ledger_from(self, totals: list[float]) -> Ledger:
        """The ledger from its sums."""
        manifest = self.explainer.program_of(replace(self.variant, keep="inputs", ledger=True)).manifest
        count = len(manifest.explained)
        return ledger_of(manifest.ledger, totals[count:], dict(zip(manifest.explained, totals, strict=False)))

    def totals(self) -> list[float]:
        """The sums of the ledger, those of the inputs first."""
        explainer, engine = self.explainer, self.explainer._engine
        if explainer._weights_state() != self.state:
            raise InputError("the model's weights have changed since this explanation was made", where="conservation()",
                             hint="explain the input again, and ask that explanation")
        loaded = explainer._load(replace(self.variant, keep="inputs", ledger=True))
        manifest = loaded.program.manifest
        with engine.running():
            prepared = explainer._prepared(loaded)
            arguments, columns = self.with_positions(manifest)
            compared = self._at_reference(loaded, prepared, arguments)
            results, state = loaded.module.forward(explainer._weights, prepared, *arguments)
            seeds, _ = self._seeds(manifest, own_results(manifest, results), columns, compared)
            sums = [[float(as_numpy(value).astype(np.float64).sum()) for value in found]
                    for _, found in self._carried(loaded, prepared, state, seeds, compared)]
        return [math.fsum(parts) * self.scaler for parts in zip(*sums, strict=True)]

    def _at_reference(self, loaded: _Loaded, prepared: Any, arguments: list[Any]) -> AtReference | None:
        """The model at the reference, kept where it is the same for other inputs."""
        manifest, engine, weights = loaded.program.manifest, self.explainer._engine, self.explainer._weights
        if self.reference is None:
            return None
        reference, named = self.reference, {**self.inputs, **dict(zip(("positions",), arguments[len(self.inputs):],
                                                                      strict=False))}

        def run() -> AtReference:
            given = reference_arguments(manifest, reference, named, engine)
            results, _ = loaded.module.forward(weights, prepared, *given.values())
            return at_reference(manifest, results, explained_value(manifest, own_results(manifest, results)))

        return loaded.references.at(reference_key(manifest, reference, named, self.state), run)

    def _values(self, manifest: Manifest, compared: AtReference | None) -> tuple[Any, ...]:
        """The activations at the reference that relevance takes."""
        if compared is None:
            return ()
        batch = next((int(self.inputs[name].shape[0]) for name in manifest.explained if self.inputs[name].ndim), 1)
        return reference_values(manifest, compared, batch, self.explainer._engine)

    def with_positions(self, manifest: Manifest) -> tuple[list[Any], Array | None]:
        """The forward's arguments; and for each target the position of each row, int64 [targets, B]."""
        arguments = list(self.inputs.values())
        if not manifest.sequence:
            return arguments, None
        length, last = self._last(manifest.sequence)
        columns = np.stack([target.positions(last, length) for target in self.targets])
        if not manifest.positions:
            return arguments, columns
        unique, _ = distinct_columns(columns)
        return [*arguments, self.explainer._engine.array(unique)], columns

    def _last(self, sequence: str) -> tuple[int, Array]:
        """The sequence length, and the last position of each row that is no padding."""
        batch, length = self.inputs[sequence].shape[:2]
        mask = next((as_numpy(v) for n, v in self.inputs.items()
                     if "attention_mask" in n and tuple(v.shape) == (batch, length)), None)
        if mask is None:
            return length, np.full(batch, length - 1, np.int64)
        visible = mask != 0
        return length, (length - 1 - visible[:, ::-1].argmax(1)).astype(np.int64)

    def _seeds(self, manifest: Manifest, results: tuple[Any, ...], columns: Array | None,
               compared: AtReference | None = None) -> tuple[tuple[Array, ...], tuple[Explained, ...]]:
        """The relevance section's arguments, seeds times the multiplier and (sparse) targets; and their meaning."""
        output, shown = explained_value(manifest, results), returned_value(manifest, results)
        batch = output.shape[0] if output.ndim else 1
        places = np.zeros((len(self.targets), batch), np.int64) if columns is None else (
            distinct_columns(columns)[1] if manifest.positions else columns)
        found = self._weightings if any(target.weighs for target in self.targets) else self._numbers
        if compared is not None:
            plain = replace(manifest, seed="relevance", sparse=False)
            seeds, explained = found(plain, output, shown, columns, places)
            return (differences_of(seeds[0], output, compared.explained, signed=manifest.seed == "signed"),), explained
        seeds, explained = found(manifest, output, shown, columns, places)
        return (with_rivals(output, seeds[0], self.targets),) if manifest.streams > 1 else seeds, explained

    def _numbers(self, manifest: Manifest, output: Array, shown: Array, columns: Array | None, places: Array
                 ) -> tuple[tuple[Array, ...], tuple[Explained, ...]]:
        """Seeds of single numbers of the output, those of each target at its place in each row."""
        rows = np.arange(places.shape[1])
        found = [target.seed(output if columns is None else output[rows, places[number]], manifest.output,
                             None if columns is None else columns[number], number, signed=manifest.seed == "signed",
                             shown=shown if columns is None else shown[rows, places[number]])
                 for number, target in enumerate(self.targets)]
        explained = tuple(one for seed in found for one in seed.explained)
        return (sparse_seeds if manifest.sparse else dense_seeds)(
            output, found, places, columns is not None, np.float32(self.multiplier)), explained

    def _weightings(self, manifest: Manifest, output: Array, shown: Array, columns: Array | None, places: Array
                    ) -> tuple[tuple[Array, ...], tuple[Explained, ...]]:
        """Dense seeds, where a target weights the whole output: of a sequence, the position that it explains, or
        all of them where all are computed."""
        rows = np.arange(places.shape[1])
        seeds = np.zeros((len(self.targets), *output.shape), np.float32)
        explained: list[Explained] = []
        for number, target in enumerate(self.targets):
            one = slice(number, number + 1)
            if columns is not None and target.kind in ("mask", "box"):
                raise InputError(f"output `{manifest.output}` is a sequence, and has neither pixels nor boxes",
                                 where="target", hint="give Target.token(id, position)")
            if target.weighs and (columns is None or not manifest.positions):
                seeds[number], meaning = target.weighting(output, manifest.output, number, shown=shown,
                                                          signed=manifest.seed == "signed")
                explained += meaning
            elif target.weighs:
                own_place = output[rows, places[number]][:, None]
                weights, meaning = target.weighting(own_place, manifest.output, number)
                seeds[number, rows, places[number]] = weights[:, 0]
                explained += meaning
            else:
                single = replace(self, targets=(target,))
                own, meaning = single._numbers(replace(manifest, sparse=False), output, shown,
                                               None if columns is None else columns[one], places[one])
                seeds[number] = own[0][0] / np.float32(self.multiplier)
                explained += [replace(each, seed=number) for each in meaning]
        return (seeds * np.float32(self.multiplier),), tuple(explained)


def check_contrastive(targets: Sequence[Target], multiplier: float) -> None:
    """InputError where a target, or the multiplier, would make a contrastive relevance negative."""
    if multiplier < 0:
        raise InputError(f"multiplier is {multiplier!r}, and contrastive relevances cannot be negative",
                         hint="give a positive number; scaler multiplies what is found")
    for target in targets:
        target.check_contrastive()


def own_results(manifest: Manifest, results: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the forward returns of itself, without what only the relevance of differences takes."""
    return results[:len(results) - len(manifest.references)]


def returned_value(manifest: Manifest, results: tuple[Any, ...]) -> Array:
    """The output as the model returns it."""
    return as_numpy(results[manifest.outputs.names.index(manifest.output)])


def explained_value(manifest: Manifest, results: tuple[Any, ...]) -> Array:
    """The value that is explained: an output, or what went into its final softmax; minus its mean, where the rules
    contrast it."""
    value = as_numpy(results[-1]) if manifest.before else returned_value(manifest, results)
    return value - value.mean(-1, keepdims=True) if manifest.contrast else value
