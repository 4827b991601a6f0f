"""The explainer: runs a compiled model and carries relevance from an output back to its inputs."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dlbc_runtime import cuda_graphs as cuda_graphs_of
from dlbc_runtime.arrays import Json, as_numpy
from dlbc_runtime.call import Call, Loaded, check_contrastive
from dlbc_runtime.engines import Engine, engine
from dlbc_runtime.errors import ArtifactError, InputError
from dlbc_runtime.expert_layer import ExpertSpec
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.memory import Memory, as_bytes
from dlbc_runtime.padding import padded
from dlbc_runtime.parts import plan_within, planned, run_within, size_by_name, size_of
from dlbc_runtime.prefix import lengthened, shortened
from dlbc_runtime.program import Manifest, Program, Rules, Variant
from dlbc_runtime.reference import Reference
from dlbc_runtime.signature import RangeError, SizeError, dtype_name
from dlbc_runtime.sinks import apart
from dlbc_runtime.sinks import check as check_sinks
from dlbc_runtime.straight import Straight
from dlbc_runtime.target import Target, as_targets
from dlbc_runtime.work import Work, WorkRow

if TYPE_CHECKING:
    import networkx

    from dlbc_runtime.sampler import Sampler
    from dlbc_runtime.tasks_result import TaskResult
    from dlbc_runtime.triton_store import StoredKernel

log = logging.getLogger(__name__)

Build = Callable[[Variant], Program]
Recompile = Callable[[tuple[Any, ...], Mapping[str, Any]], "Explainer"]
Draw = Callable[[str], "networkx.MultiDiGraph"]
CompileKernels = Callable[[Sequence[Program], Sequence[str]], "list[StoredKernel]"]


class Explainer:
    """Compiled code that explains one model. Immutable to its users, reentrant and thread-safe.

    It holds references to the model's weights, sees later in-place changes of their values, and never
    changes the model.
    """

    def __init__(self, programs: Mapping[Variant, Program], weights: Mapping[str, Any], *,
                 default: Variant | None = None, build: Build | None = None, recompile: Recompile | None = None,
                 draw: Draw | None = None, compile_kernels: CompileKernels | None = None,
                 recipe: Mapping[str, Json] | None = None,
                 reference: Reference | None = None, memory_budget: int | None = None, model: Any = None,
                 cuda_graphs: bool | str = "auto") -> None:
        self._model = model
        self._programs = dict(programs)
        self._default = default or next(iter(self._programs))
        self._manifest = self._programs[self._default].manifest
        self._weights = dict(weights)
        self._build, self._recompile, self._draw = build, recompile, draw
        self._compile_kernels = compile_kernels
        self._recipe = dict(recipe or {})
        self._reference = reference
        self._memory_budget = memory_budget
        cuda_graphs_of.check(cuda_graphs)
        self._cuda_graphs = cuda_graphs
        if cuda_graphs is True:
            cuda_graphs_of.require(self._manifest.backend, self._weights, memory_budget)
        self._engine: Engine = engine(self.manifest.backend, self._weights)
        self._loaded: dict[Variant, Loaded] = {}
        self._resized: dict[tuple[tuple[int, ...], ...], Explainer] = {}
        self._lock = threading.Lock()
        self._said: set[str] = set()
        self._state: object = None
        self._straight: Straight | None = None

    # What it is

    @property
    def manifest(self) -> Manifest:
        """What is known about the default program: model, rules, inputs, outputs, weights, versions."""
        return self._manifest

    @property
    def experts(self) -> tuple[ExpertSpec, ...]:
        """The layers of a mixture of experts, in the order of the model: where each is, how many experts it has and how
        many a token is routed to, and whether some are shared; none for other models."""
        return self._manifest.experts

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
    def model(self) -> Any:
        """The model that was compiled, the user's own; None for an explainer that was loaded without it."""
        return self._model

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

    def draw(self, path: str | os.PathLike[str], explanation: Explanation | None = None, *,
             by: Literal["module", "op"] = "module", top_k: int | None = None, opened: Sequence[str] = (),
             title: str = "") -> Path:
        """Draw the model's graph to `.svg`, `.png` or an interactive `.html`; returns the path.

        Modules are laid out from the inputs down, repeated blocks folded; `opened` names modules to draw beside the
        whole. With an explanation made with `keep="all"` (or "modules") nodes are coloured by relevance and edges as
        thick as what flows along them; `top_k` then leaves only so many of the most relevant places. `by`: a node for
        each module that has none inside, or for each operation. InputError for what does not fit.
        """
        from dlbc_runtime.views.graph import draw

        return draw(self.graph("canonical"), self.manifest.explained, os.fspath(path), explanation=explanation, by=by,
                    top_k=top_k, opened=opened, title=title or self.manifest.model)

    def rules(self) -> Rules:
        """Which rule explains which place, from the output back; and what `auto` chose, and why."""
        return Rules(self.manifest.rules, self.manifest.composite, self.manifest.reason)

    def plan(self) -> Work:
        """What runs where, and why: one line for each kernel and for each op that is in none. Printed as a table."""
        m, notes = self.manifest, self._recipe.get("notes")
        said = [*map(str, notes)] if isinstance(notes, list) else []
        if self._graphs:
            said.append(cuda_graphs_of.said_of([loaded.module for loaded in list(self._loaded.values())]))
        elif self._cuda_graphs == "auto" and cuda_graphs_of.possible(m.backend, self._weights):
            said.append("CUDA graphs: none within a memory budget")
        return Work(m.work or (WorkRow("all", m.backend, (), why=f"backend={m.backend!r} writes no kernels"),),
                    str(self._recipe.get("target", "")), said)

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
        plain = (keep is None and output is None and memory_budget is None and reference is None
                 and sinks == "keep" and positions == "explained")
        if plain and self._straight is not None:
            found = self._straight.run(self, args, kwargs, target, multiplier, scaler)
            if found is not None:
                return found
        for name, factor in (("multiplier", multiplier), ("scaler", scaler)):
            if not isinstance(factor, int | float) or not math.isfinite(factor) or factor == 0:
                raise InputError(f"{name} is {factor!r}", hint="give a number that is finite and not 0")
        if positions not in ("explained", "all"):
            raise InputError(f"positions={positions!r}", hint='"explained" or "all"')
        check_sinks(sinks)
        budget = self._memory_budget if memory_budget is None else as_bytes(memory_budget)
        if self._cuda_graphs is True:
            cuda_graphs_of.require(self.manifest.backend, self._weights, budget)
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
        manifest = self._load(variant).program.manifest
        call = Call(self, variant, given, targets, many, multiplier, scaler, compared)
        short = shortened(call, manifest)
        if budget is None:
            found = short.run()
        else:
            with cuda_graphs_of.paused():  # which keep memory
                found = run_within(short, budget)
        found = found if short is call else lengthened(found, call, manifest)
        if plain and not many and variant == self._default:
            self._learn(args, kwargs, found)
        return found if sinks == "keep" else apart(found, sequence=bool(manifest.sequence))

    def run_task(self, task: str = "auto", inputs: object = None, tokenizer: Any = None, *, mode: str = "default",
                 multiplier: float = 100.0, scaler: float = 1.0, thresholding: float = 0.5, temperature: float = 1.0,
                 return_scores: bool = False, return_relevance: bool = False, return_layerwise_output: bool = False,
                 debug: bool = False, save_relevance: bool = False,
                 save_path: str | os.PathLike[str] = "relevance_output", save_format: str = "safetensors",
                 target: object = None, **generation_kwargs: Any) -> TaskResult:
        """Run a task and explain it, with inputs as people have them; `docs/tasks.md` says all about it.

        `task`: "tabular-classification", "image-classification", "text-classification", "generation", "segmentation",
        "object-detection", or "auto": what the model's inputs and outputs say (the reason is logged). `inputs`: a text,
        a picture, a table, tensors; lists and dicts of them. `tokenizer`: the model's own tokenizer, or processor of
        pictures; needed for texts and pictures where the model's folder holds none.
        `mode`: "default", the explainer's rules; "contrastive", of an explainer with such rules. `thresholding`: the
        probability above which pixels or objects are explained. `temperature`: predictions are of logits divided by it;
        it samples what is generated. `return_*`: keep traces, and what each module gave. `debug`: log details.
        `save_relevance`: write the relevance trace to `save_path` (a folder, or a file's name) as "safetensors", "json"
        or "npz". `target`: as in a call; of pixels and objects a class. Other options are those of `Sampler.generate`.

        InputError for options and inputs that do not fit, before anything is run.
        """
        from dlbc_runtime.tasks import run_task

        return run_task(self, task, inputs, tokenizer, mode=mode, multiplier=multiplier, scaler=scaler,
                        thresholding=thresholding, temperature=temperature, return_scores=return_scores,
                        return_relevance=return_relevance, return_layerwise_output=return_layerwise_output,
                        debug=debug, save_relevance=save_relevance, save_path=save_path, save_format=save_format,
                        target=target, **generation_kwargs)

    def _learn(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], made: Explanation) -> None:
        """Remember a call that asked for nothing special, so that those like it go straight."""
        if self._memory_budget is not None or not Straight.serves(self._manifest):
            return
        if self._straight is None:
            self._straight = Straight(self._default, self._load(self._default))
        self._straight.learn(args, kwargs, made)

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
            call = Call(self, variant, given, targets, False, 1.0, reference=self._reference)
            size = size_of(manifest, shortened(call, manifest))
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
        """The same explainer with another default: `keep`, `output`, `all_positions`, `checkpoint`, `memory_budget`; or
        with other `cuda_graphs`: "auto", True or False (`docs/triton.md`)."""
        budget = options.pop("memory_budget", self._memory_budget)
        graphs = options.pop("cuda_graphs", self._cuda_graphs)
        variant = replace(self._default, **options)
        self._load(variant)
        return Explainer(self._programs, self._weights, default=variant, build=self._build,
                         recompile=self._recompile, draw=self._draw, compile_kernels=self._compile_kernels,
                         recipe=self._recipe, model=self._model, cuda_graphs=graphs,
                         reference=self._reference, memory_budget=None if budget is None else as_bytes(budget))

    def forward(self, *args: Any, target: object = None, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """The compiled model alone: its outputs by name, and the positions [B, P] at which a sequence output is
        computed (None: at all), those of the targets."""
        given = self._engine.inputs(self.manifest.inputs.bind(args, kwargs))
        return Call(self, self._default, given, *as_targets(target), 1.0).forward()

    def sampler(self, tokenizer: Any = None) -> Sampler:
        """Generates text with the model, and explains it: `sampler(tokenizer).generate("Once upon a time")`.

        `tokenizer`: the model's own; without one, prompts are token ids. InputError for a model that generates nothing,
        or whose vocabulary is not the tokenizer's; ArtifactError for an explainer that was loaded without its model.
        """
        from dlbc_runtime.sampler import Sampler

        return Sampler(self, tokenizer)

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

    def _load(self, variant: Variant) -> Loaded:
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
                module: Any = program.module()
                self._loaded[variant] = Loaded(program, cuda_graphs_of.Graphed(
                    module, bounded=self._cuda_graphs == "auto",
                    planned=partial(planned, program.manifest)) if self._graphs else module)
            return self._loaded[variant]

    @property
    def _graphs(self) -> bool:
        """Whether passes may become CUDA graphs."""
        return self._cuda_graphs is True or (self._cuda_graphs == "auto" and self._memory_budget is None
                                             and cuda_graphs_of.possible(self._manifest.backend, self._weights))

    def _weights_state(self) -> object:
        """Something that changes when a weight's numbers do. Looked at before each run: InputError for a weight whose
        element type or shape is not what was compiled for, or that now holds NaN or infinity."""
        state = self._engine.versions(self._weights.values())
        if state != self._state:
            for spec in self.manifest.weights:
                weight = self._weights[spec.name]
                if (dtype_name(weight), tuple(weight.shape)) != (spec.dtype, spec.shape):
                    raise InputError(f"weight `{spec.name}` is {dtype_name(weight)}{list(weight.shape)} now, it was "
                                     f"{spec.dtype}{list(spec.shape)} when the model was compiled",
                                     hint="compile the model again")
                if self.manifest.backend == "c" and weight.device.type != "cpu":
                    raise InputError(f"weight `{spec.name}` is on {weight.device} now, and functions in C run on a CPU",
                                     where="backend=\"c\"", hint='move it back, or compile with backend="auto"')
                if self._state is not None and not self._engine.finite(weight):
                    raise InputError(f"weight `{spec.name}` holds NaN or infinity",
                                     hint="an explanation of this model would mean nothing; reload or retrain it")
            self._state = state
        return state

    def _prepared(self, loaded: Loaded, whole: object = None) -> Any:
        """Values computed from weights alone, made anew when one of those weights has changed. `whole`: the state of
        all weights, where it is known."""
        found = loaded.prepared
        if whole is not None and found[2] == whole:
            return found[1]
        state = self._engine.versions([self._weights[n] for n in loaded.program.manifest.prepared_from])
        with loaded.lock:
            found = loaded.prepared
            if found[0] != state:
                found = loaded.prepared = (state, loaded.module.prepare(self._weights), whole)
            elif whole is not None:
                loaded.prepared = (state, found[1], whole)
            return found[1]

    def _for_these_sizes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], problem: SizeError
                         ) -> Explainer | None:
        """Another explainer of the same model for sizes that this one was not captured for."""
        if self._recompile is None or not (self.manifest.static or isinstance(problem, RangeError)):
            return None
        tensors = [v for v in (*args, *kwargs.values()) if hasattr(v, "shape")]
        key = tuple(tuple(int(size) for size in v.shape) for v in tensors)
        if key not in self._resized:
            log.info("compiling again for sizes %s: %s", key, "; ".join(self.manifest.static.values()) or problem.fact)
            other = self._recompile(args, kwargs)
            same = other._cuda_graphs == self._cuda_graphs
            self._resized[key] = other if same else other.with_options(cuda_graphs=self._cuda_graphs)
        return self._resized[key]

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning(text)

    def kernels(self, archs: bool | str | Sequence[str] = True) -> list[StoredKernel]:
        """The Triton kernels of all programs, compiled for NVIDIA architectures (`"sm_90"`); True: the explainer's own.

        No GPU is needed; it takes about a second for each. InputError where there are none, or one does not fit an
        architecture; ArtifactError for an explainer without its compiler.
        """
        if self._compile_kernels is None:
            raise ArtifactError("this explainer was loaded without the compiler, which knows its kernels",
                                hint="use dlbc.load, or save without kernels=")
        names = [str(self._recipe.get("target", ""))] if archs is True else [archs] if isinstance(archs, str) else archs
        return self._compile_kernels(list(self._programs.values()), list(names or ()))

    def save(self, path: str | os.PathLike[str], *, weights: bool = False,
             kernels: bool | str | Sequence[str] = False) -> None:
        """Write this explainer as one zip file: manifest, IR, source; `weights=True` includes the numbers.

        `kernels`: also put in the compiled Triton kernels for these architectures (`("sm_80", "sm_90")`; True: the
        explainer's target), so that a machine that trusts the file need not compile them. Errors as in `kernels`.
        """
        from dlbc_runtime.artifact import save

        save(self, path, weights=weights, kernels=self.kernels(kernels) if kernels else ())
