"""The pipeline on one page: from a PyTorch model to an explainer.

import -> canonicalise (fold, raise) -> sink positions -> pair -> lower -> simplify -> outline -> emit
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dlbc import __version__
from dlbc.apart import batch_of, causal_length
from dlbc.backends import KernelBackend
from dlbc.backends import load as load_backend
from dlbc.backends.footprint import plan_of
from dlbc.backends.triton.record import kernels_of
from dlbc.backends.work import work_of
from dlbc.bounds import input_bounds
from dlbc.errors import InputError
from dlbc.ir.core import Graph, Weight
from dlbc.ir.parser import parse_graph
from dlbc.ir.printer import print_graph
from dlbc.options import Options, recipe_of
from dlbc.passes import Pass, run
from dlbc.passes.carriers import explained_inputs
from dlbc.passes.checkpoint import Checkpoint
from dlbc.passes.contrast import Contrast
from dlbc.passes.defer import Defer
from dlbc.passes.differences import reference_rows
from dlbc.passes.eliminate_common import EliminateCommon
from dlbc.passes.eliminate_dead import EliminateDead
from dlbc.passes.fuse import Fuse
from dlbc.passes.fuse_attention import FuseAttention
from dlbc.passes.fuse_loops import FuseLoops
from dlbc.passes.group_experts import GroupExperts
from dlbc.passes.guard_denominators import GuardDenominators
from dlbc.passes.hoist_constants import HoistConstants
from dlbc.passes.inline import Inline
from dlbc.passes.lower import Lower
from dlbc.passes.outline import Outline
from dlbc.passes.pair import Pair
from dlbc.passes.pipeline import CANONICALISE
from dlbc.passes.read_rectified import ReadRectified
from dlbc.passes.recompute import Recompute
from dlbc.passes.record_experts import RecordExperts, mixtures_of
from dlbc.passes.simplify import Simplify
from dlbc.passes.sink_positions import SinkPositions, sequence_output
from dlbc.passes.sink_slices import SinkSlices
from dlbc.passes.sink_targets import SinkTargets
from dlbc.passes.stream_attention import StreamAttention
from dlbc_runtime.arrays import Json
from dlbc_runtime.expert_layer import ExpertSpec
from dlbc_runtime.explainer import Explainer, Recompile
from dlbc_runtime.program import Manifest, Program, RuleRow, Variant, WeightSpec
from dlbc_runtime.signature import InputSpec, OutputSpec
from dlbc_runtime.work import WorkRow

if TYPE_CHECKING:
    import networkx
    import torch

log = logging.getLogger(__name__)
LOOK_AHEAD = ("dlb_0_1",)
"""Rules that carry relevance to what attention cannot see."""
LEVELS = ("exported", "canonical", "paired", "lowered")
FUSE: dict[str, tuple[Pass, ...]] = {"c": (FuseLoops(),), "triton": (FuseAttention(), Fuse())}
"""From level 3 to level 4, by backend: those that write kernels."""


@dataclass(frozen=True)
class Source:
    """What the frontend found, at the canonical level: enough to build any variant without the model."""

    exported: Graph
    canonical: Graph
    inputs: InputSpec
    outputs: OutputSpec
    static: Mapping[str, str] = field(default_factory=dict)
    pad: int = 0


def compile_now(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Options,
                default: Variant, *, recompile: Recompile | None = None) -> Explainer:
    """Compile without looking into the cache. `recompile` compiles for other sizes; default: as this does."""
    from dlbc.frontends.torch_export import import_model

    options.composite  # noqa: B018  unknown rules and backends are an error before any work
    load_backend(options.backend)
    imported = import_model(model, args, dict(kwargs), dynamic=options.dynamic)
    check_weights(imported.weights)
    unknown = [name for name in options.explain if name not in imported.inputs.names]
    if unknown:
        raise InputError(f"`{unknown[0]}` is no input that could be explained", where="explain",
                         hint=f"the model takes {', '.join(imported.inputs.names)}")
    chosen = tuple(p.name for p, name in zip(imported.graph.forward.params, imported.inputs.names, strict=True)
                   if name in options.explain)
    graph = imported.graph.with_attrs(explain=chosen) if options.explain else imported.graph
    if options.reference is not None:
        options.reference.by_input(imported.inputs, explained_names(graph, imported.inputs))
    canonical = run(graph, CANONICALISE)
    source = Source(graph, canonical, imported.inputs, imported.outputs, imported.static, pad_of(model))
    return explainer_of(source, options, default, imported.weights, model=model, recompile=recompile)


def explainer_of(source: Source, options: Options, default: Variant, weights: Mapping[str, Any], *,
                 programs: Mapping[Variant, Program] | None = None, model: torch.nn.Module | None = None,
                 recompile: Recompile | None = None, recipe: Mapping[str, Json] | None = None) -> Explainer:
    """An explainer that builds its variants from a canonical graph, the default one at once.

    `model` is what it compiles again for sizes that the capture fixed; None: it does not.
    """
    build = partial(build_program, source, options)
    found = dict(programs or {})
    if default not in found:
        found[default] = build(default)
    bound = bind_weights(weights, options.backend)
    if recompile is None and model is not None:
        recompile = partial(_recompile, model, options, default)
    return Explainer(found, bound, default=default, build=build, recompile=recompile, draw=draw,
                     compile_kernels=kernels_of, reference=options.reference, model=model,
                     recipe=recipe_of(options, weights, model) if recipe is None else recipe)


def build_program(source: Source, options: Options, variant: Variant) -> Program:
    """One variant, from the canonical graph to the generated module."""
    composite = options.composite.fitted(source.canonical, variant.output)
    graph = run(source.canonical, () if variant.ledger or options.reference is not None else (RecordExperts(),))
    graph = run(graph, () if variant.all_positions else (SinkPositions(variant.output), EliminateDead()))
    # Inner values that are asked for, and those that are compared with a reference's, stay whole.
    narrow = variant.keep == "inputs" and options.reference is None
    graph = run(graph, (SinkSlices(), EliminateDead()) if narrow else ())
    contrast = composite.contrast == "mean"
    # The seeds read every number of the output, or those at the reference, which is run before targets are known; or
    # the relevance of the head itself is kept.
    whole = variant.dense or composite.streams > 1 or options.reference is not None or variant.keep != "inputs"
    graph = run(graph, () if whole else (SinkTargets(variant.output, contrast=contrast),))
    graph = run(graph, (Contrast(variant.output),) if contrast else ())
    # What is equal becomes one value before reference values are called by the names of values.
    graph = run(graph, () if options.reference is None else (EliminateCommon(),))
    paired = run(graph, (Pair(output=variant.output, keep=variant.keep, rules=composite,
                              reference=options.reference is not None),))
    return finish_program(source, options, variant, paired)


def finish_program(source: Source, options: Options, variant: Variant, paired: Graph) -> Program:
    """One variant, from the paired graph to the generated module."""
    graph = run(paired, lowering(options, ledger=variant.ledger, checkpoint=variant.checkpoint))
    texts = {"exported": print_graph(source.exported), "canonical": print_graph(source.canonical),
             "paired": print_graph(paired), "lowered": print_graph(graph)}
    if options.dump:
        _dump(Path(options.dump), source.canonical.name, variant, texts)
    backend = load_backend(options.backend)
    work: tuple[WorkRow, ...] = ()
    if options.backend == "triton":
        graph = graph.with_attrs(target=f"triton:{options.target}", precision=options.precision)
    if options.backend in FUSE:
        graph = run(graph, FUSE[options.backend])
        texts["fused"] = print_graph(graph)
        work = work_of(graph, "torch", cast(KernelBackend, backend).refused(graph), backend.name)
    module = backend.emit(graph)
    manifest = replace(describe(source, paired, graph, options.backend, variant.output),
                       memory=plan_of(graph, backend.overwriting, fused=options.backend == "triton"),
                       batch=batch_of(source.canonical), pad=source.pad,
                       causal=_causal(source.canonical, paired, variant.output),
                       work=work)
    program = Program(manifest, module, texts)
    if options.dump:
        (Path(options.dump) / f"{source.canonical.name}.{variant.name}.source.py").write_text(program.source)
    return program


def lowering(options: Options, *, ledger: bool, checkpoint: bool = False) -> tuple[Pass, ...]:
    """The passes from level 2 to level 3. `checkpoint`: less is kept of the forward pass, and more computed again."""
    hoisted = HoistConstants(relevance=options.precompute != "never", few=options.precompute == "auto")
    return (Lower(ledger=ledger), Defer(), EliminateCommon(), ReadRectified(), Simplify(), EliminateCommon(),
            GroupExperts(whole_weights=options.precompute == "always"), EliminateCommon(), hoisted,
            EliminateDead(), StreamAttention(),
            *(() if options.backend == "triton" else (GuardDenominators(),)),  # kernels guard in registers
            *((Checkpoint(),) if checkpoint else ()),
            Recompute(kernels=options.backend == "triton"), Outline())


def describe(source: Source, paired: Graph, graph: Graph, backend: str, output: str) -> Manifest:
    """The manifest of a program that explains `output` ("": the model's main one)."""
    assert paired.relevance is not None
    prepared = {o.name for op in graph.prepare.ops for o in op.inputs if isinstance(o, Weight)}
    return Manifest(
        model=graph.name, backend=backend, composite=str(graph.attrs["composite"]), inputs=source.inputs,
        outputs=source.outputs, static=dict(source.static),
        weights=tuple(WeightSpec(w.name, w.type.dtype, tuple(int(str(d)) for d in w.type.shape))
                      for w in graph.weights.values()),
        prepared_from=tuple(name for name in graph.weights if name in prepared),
        explained=_texts(graph.attrs["explained"]), output=str(graph.attrs["output"]),
        before=str(graph.attrs["before"]),
        nodes=_texts(graph.attrs["nodes"]), sequence=_sequence(source.canonical, source.inputs, output),
        positions="positions" in graph.attrs,
        sparse="targets" in graph.attrs,
        seed=str(graph.attrs["seed"]), contrast=str(graph.attrs.get("contrast", "")),
        reason=str(graph.attrs.get("reason", "")),
        ledger=tuple(_texts(entry) for entry in _tuple(graph.attrs.get("ledger", ()))),
        rules=tuple(RuleRow(op.place, op.name.removeprefix("rel."), str(op.rule))
                    for op in paired.relevance.ops if op.rule is not None),
        versions={"dlbc": __version__}, streams=2 if graph.attrs.get("streams") == 2 else 1,
        experts=_experts(paired),
        bounds=() if graph.attrs.get("reference") else input_bounds(paired), **reference_rows(graph, source.inputs))


def _experts(paired: Graph) -> tuple[ExpertSpec, ...]:
    """The layers of experts whose relevance is returned."""
    weights = {v.name: v.type for v in paired.forward.results}
    return tuple(ExpertSpec(m.place, m.experts, bool(m.shared), int(str(weights[m.weights].shape[-1])))
                 for m in mixtures_of(paired))


def _causal(graph: Graph, paired: Graph, output: str) -> str:
    """The size of the sequence, where neither the model nor a rule lets a position know a later one; else ""."""
    assert paired.relevance is not None
    ahead = any(op.rule is not None and op.rule.name in LOOK_AHEAD for op in paired.relevance.ops)
    return "" if ahead else causal_length(graph, output)


def pad_of(model: torch.nn.Module) -> int:
    """The token id that the model's configuration names for padding; 0 without."""
    found = getattr(getattr(model, "config", None), "pad_token_id", None)
    return found if isinstance(found, int) and found >= 0 else 0


def bind_weights(weights: Mapping[str, Any], backend: str) -> dict[str, Any]:
    """The weights as the backend takes them: torch's own tensors, or numpy arrays sharing their memory."""
    from dlbc_runtime.arrays import as_numpy

    return {n: as_numpy(w) for n, w in weights.items()} if backend == "numpy" else dict(weights)


def explained_names(graph: Graph, inputs: InputSpec) -> tuple[str, ...]:
    """The user's names of the inputs that are explained."""
    chosen = {p.name for p in explained_inputs(graph) if p.type.dtype != "bool"}
    return tuple(name for p, name in zip(graph.forward.params, inputs.names, strict=True) if p.name in chosen)


def check_weights(weights: Mapping[str, Any]) -> None:
    """InputError naming the first weight that holds NaN or infinity."""
    import torch

    for name, weight in weights.items():
        if not weight.is_floating_point() or weight.device.type == "meta":
            continue
        # A finite sum says all are finite, and takes one pass over them; one that overflows says nothing.
        if not bool(torch.isfinite(weight.detach().sum())) and not bool(torch.isfinite(weight).all()):
            raise InputError(f"weight `{name}` holds NaN or infinity",
                             hint="an explanation of this model would mean nothing; reload or retrain it")


def draw(text: str) -> networkx.MultiDiGraph:
    """The ops of a graph as networkx nodes, with an edge for each value that one reads of another; calls are opened."""
    import networkx

    drawn, graph = networkx.MultiDiGraph(), run(parse_graph(text), (Inline(),))
    for section, part in graph.sections():
        for param in part.params:
            drawn.add_node(param.name, op="input", section=section, type=str(param.type))
        for op in part.ops:
            drawn.add_node(op.result.name, op=op.name, section=section, place=op.place, type=str(op.result.type))
    owner = {r.name: op.result.name for _, part in graph.sections() for op in part.ops for r in op.results}
    owner |= {p.name: p.name for _, part in graph.sections() for p in part.params}
    for _, part in graph.sections():
        for op in part.ops:
            for operand in op.inputs:
                if getattr(operand, "name", None) in owner and not isinstance(operand, Weight):
                    drawn.add_edge(owner[operand.name], op.result.name)  # type: ignore[union-attr]
    return drawn


def _recompile(model: torch.nn.Module, options: Options, default: Variant, args: tuple[Any, ...],
               kwargs: Mapping[str, Any]) -> Explainer:
    return compile_now(model, args, kwargs, options, default)


def _dump(folder: Path, name: str, variant: Variant, texts: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for level, text in texts.items():
        (folder / f"{name}.{variant.name}.{level}.dlir").write_text(text)


def _sequence(graph: Graph, inputs: InputSpec, output: str) -> str:
    """The input whose second axis is the sequence of the (position by position) output; "" without."""
    found = sequence_output(graph, output)
    if found is None:
        return ""
    return next(spec.name for spec, param in zip(inputs.tensors, graph.forward.params, strict=False)
                if not param.type.floating and param.type.shape == found[1:])


def _tuple(attr: object) -> tuple[Any, ...]:
    return attr if isinstance(attr, tuple) else ()


def _texts(attr: object) -> tuple[str, ...]:
    return tuple(map(str, _tuple(attr)))

