"""The explainer: runs a compiled model and carries relevance from an output back to its inputs."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dlbc_runtime.arrays import Array, Arrays, Json, as_numpy
from dlbc_runtime.engines import Engine, engine
from dlbc_runtime.errors import ArtifactError, InputError
from dlbc_runtime.explained import Explained, Method
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.ledger import Ledger, ledger_of
from dlbc_runtime.program import Manifest, Program, RuleRow, Variant
from dlbc_runtime.seeds import dense_seeds, distinct_columns, sparse_seeds
from dlbc_runtime.signature import RangeError, SizeError, dtype_name
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


class Explainer:
    """Compiled code that explains one model. Immutable to its users, reentrant and thread-safe.

    It holds references to the model's weights, sees later in-place changes of their values, and never
    changes the model.
    """

    def __init__(self, programs: Mapping[Variant, Program], weights: Mapping[str, Any], *,
                 default: Variant | None = None, build: Build | None = None, recompile: Recompile | None = None,
                 draw: Draw | None = None, recipe: Mapping[str, Json] | None = None) -> None:
        self._programs = dict(programs)
        self._default = default or next(iter(self._programs))
        self._weights = dict(weights)
        self._build, self._recompile, self._draw = build, recompile, draw
        self._recipe = dict(recipe or {})
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
        return self._programs[self._default].manifest

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

    def rules(self) -> tuple[RuleRow, ...]:
        """Which rule explains which place, from the output back."""
        return self.manifest.rules

    def __repr__(self) -> str:
        m = self.manifest
        return f"Explainer({m.model}{m.inputs}, rules={m.composite!r}, backend={m.backend!r})"

    # What it does

    def __call__(self, *args: Any, target: object = None, keep: str | None = None, multiplier: float = 100.0,
                 output: str | None = None, positions: str = "explained", **kwargs: Any) -> Explanation:
        """Explain the outputs for these inputs, given as to the model.

        `target`: None (what was predicted), an int, a `Target`, or a list of them (one explanation each from
        one forward pass). `keep`: also return relevance and activations of inner places: "modules", "all" or
        a module-path glob. `multiplier` is the total relevance put on the output: with 100, read it as percent.
        `output`: the name of the output to explain, where there are several. `positions="all"`: a language
        model returns its logits at all positions, not only at the explained one.

        InputError when inputs, target or options do not fit; an output or `keep` that is not there is an error of
        the compiler, IRError.
        """
        if not isinstance(multiplier, int | float) or not math.isfinite(multiplier) or multiplier == 0:
            raise InputError(f"multiplier is {multiplier!r}", hint="give a number that is finite and not 0")
        if positions not in ("explained", "all"):
            raise InputError(f"positions={positions!r}", hint='"explained" or "all"')
        try:
            given = self._engine.inputs(self.manifest.inputs.bind(args, kwargs))
        except SizeError as problem:
            other = self._for_these_sizes(args, kwargs, problem)
            if other is None:
                raise
            return other(*args, target=target, keep=keep, multiplier=multiplier, output=output, positions=positions,
                         **kwargs)
        targets, many = as_targets(target)
        if not self.manifest.sequence and any(one.position is not None for one in targets):
            raise InputError(f"a target has a position, but `{self.manifest.output}` has no sequence of them",
                             where="target", hint="leave `position` out")
        variant = replace(self._default, keep=keep or self._default.keep, output=output or self._default.output,
                          all_positions=positions == "all" or self._default.all_positions,
                          dense=self._default.dense or any(one.kind == "tensor" for one in targets))
        return _Call(self, variant, given, targets, many, multiplier).run()

    def with_options(self, **options: Any) -> Explainer:
        """The same explainer with another default: `keep`, `output`, `all_positions`."""
        variant = replace(self._default, **options)
        self._load(variant)
        return Explainer(self._programs, self._weights, default=variant, build=self._build,
                         recompile=self._recompile, draw=self._draw, recipe=self._recipe)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """The compiled model alone: its outputs by name, and the positions [B, P] at which a sequence output is
        computed (None: at all)."""
        given = self._engine.inputs(self.manifest.inputs.bind(args, kwargs))
        return _Call(self, self._default, given, *as_targets(None), 1.0).forward()

    def _load(self, variant: Variant) -> _Loaded:
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
class _Call:
    """One call of an explainer."""

    explainer: Explainer
    variant: Variant
    inputs: dict[str, Any]
    targets: tuple[Target, ...]
    many: bool
    multiplier: float
    state: object = None

    def run(self) -> Explanation:
        explainer, engine = self.explainer, self.explainer._engine
        loaded = explainer._load(self.variant)
        manifest = loaded.program.manifest
        self.state = explainer._weights_state()
        with engine.running():
            prepared = explainer._prepared(loaded)
            started = time.perf_counter()
            arguments, columns = self._with_positions(manifest)
            results, state = loaded.module.forward(explainer._weights, prepared, *arguments)
            outputs = dict(zip(manifest.outputs.names, results, strict=False))
            seeds, explained = self._seeds(manifest, explained_value(manifest, results), columns)
            forwarded = time.perf_counter()
            relevance = loaded.module.relevance(explainer._weights, prepared, state, *map(engine.array, seeds))
            finished = time.perf_counter()
        if manifest.before:
            explainer._say_once(f"`{manifest.output}` ends in {manifest.before}: the value before it is explained")
        count = len(manifest.explained) + len(manifest.nodes)
        named = dict(zip((*manifest.explained, *manifest.nodes), relevance[:count], strict=True))
        single = {name: value if self.many else value[0] for name, value in named.items()}
        activations = dict(zip(manifest.nodes, results[len(manifest.outputs.names):], strict=False))
        return Explanation(
            outputs=Arrays(outputs), relevance=Arrays({n: single[n] for n in manifest.explained}),
            inputs=Arrays(self.inputs), target=explained,
            nodes=Arrays({n: single[n] for n in manifest.nodes}), activations=Arrays(activations),
            rules=manifest.composite, many_targets=self.many, ledger_source=self.ledger,
            method=Method(manifest.model, manifest.backend, self.multiplier,
                          {"forward": forwarded - started, "relevance": finished - forwarded}, manifest.versions))

    def forward(self) -> tuple[dict[str, Any], Any]:
        """The outputs alone, and the positions at which a sequence output is computed."""
        explainer, loaded = self.explainer, self.explainer._load(self.variant)
        with explainer._engine.running():
            arguments, _ = self._with_positions(loaded.program.manifest)
            results, _ = loaded.module.forward(explainer._weights, explainer._prepared(loaded), *arguments)
        return (dict(zip(loaded.program.manifest.outputs.names, results, strict=False)),
                arguments[-1] if len(arguments) > len(self.inputs) else None)

    def ledger(self) -> Ledger:
        """Run the same call again with the ledger kept. InputError where the weights have changed since."""
        explainer, engine = self.explainer, self.explainer._engine
        if explainer._weights_state() != self.state:
            raise InputError("the model's weights have changed since this explanation was made", where="conservation()",
                             hint="explain the input again, and ask that explanation")
        loaded = explainer._load(replace(self.variant, keep="inputs", ledger=True))
        manifest = loaded.program.manifest
        with engine.running():
            prepared = explainer._prepared(loaded)
            arguments, columns = self._with_positions(manifest)
            results, state = loaded.module.forward(explainer._weights, prepared, *arguments)
            seeds, _ = self._seeds(manifest, explained_value(manifest, results), columns)
            relevance = [as_numpy(r) for r in loaded.module.relevance(
                explainer._weights, prepared, state, *map(engine.array, seeds))]
        totals = [float(value.astype(np.float64).sum()) for value in relevance]
        count = len(manifest.explained)
        return ledger_of(manifest.ledger, totals[count:], dict(zip(manifest.explained, totals, strict=False)))

    def _with_positions(self, manifest: Manifest) -> tuple[list[Any], Array | None]:
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

    def _seeds(self, manifest: Manifest, output: Array, columns: Array | None
               ) -> tuple[tuple[Array, ...], tuple[Explained, ...]]:
        """The relevance section's arguments, seeds times the multiplier and (sparse) targets; and their meaning."""
        batch = output.shape[0] if output.ndim else 1
        places = np.zeros((len(self.targets), batch), np.int64) if columns is None else (
            distinct_columns(columns)[1] if manifest.positions else columns)
        if any(target.kind == "tensor" for target in self.targets):
            return self._weightings(manifest, output, columns, places)
        return self._numbers(manifest, output, columns, places)

    def _numbers(self, manifest: Manifest, output: Array, columns: Array | None, places: Array
                 ) -> tuple[tuple[Array, ...], tuple[Explained, ...]]:
        """Seeds of single numbers of the output, those of each target at its place in each row."""
        rows = np.arange(places.shape[1])
        found = [target.seed(output if columns is None else output[rows, places[number]], manifest.output,
                             None if columns is None else columns[number], number, signed=manifest.seed == "signed")
                 for number, target in enumerate(self.targets)]
        explained = tuple(one for seed in found for one in seed.explained)
        return (sparse_seeds if manifest.sparse else dense_seeds)(
            output, found, places, columns is not None, np.float32(self.multiplier)), explained

    def _weightings(self, manifest: Manifest, output: Array, columns: Array | None, places: Array
                    ) -> tuple[tuple[Array, ...], tuple[Explained, ...]]:
        """Dense seeds, where a target weights the whole output: of a sequence, the position that it explains, or
        all of them where all are computed."""
        rows = np.arange(places.shape[1])
        seeds = np.zeros((len(self.targets), *output.shape), np.float32)
        explained: list[Explained] = []
        for number, target in enumerate(self.targets):
            one = slice(number, number + 1)
            if target.kind == "tensor" and (columns is None or not manifest.positions):
                seeds[number], meaning = target.weighting(output, manifest.output, number)
                explained += meaning
            elif target.kind == "tensor":
                own_place = output[rows, places[number]][:, None]
                weights, meaning = target.weighting(own_place, manifest.output, number)
                seeds[number, rows, places[number]] = weights[:, 0]
                explained += meaning
            else:
                single = replace(self, targets=(target,))
                own, meaning = single._numbers(replace(manifest, sparse=False), output,
                                               None if columns is None else columns[one], places[one])
                seeds[number] = own[0][0] / np.float32(self.multiplier)
                explained += [replace(each, seed=number) for each in meaning]
        return (seeds * np.float32(self.multiplier),), tuple(explained)


def explained_value(manifest: Manifest, results: tuple[Any, ...]) -> Array:
    """The value that is explained: an output, or what went into its final softmax."""
    return as_numpy(results[-1] if manifest.before else results[manifest.outputs.names.index(manifest.output)])
