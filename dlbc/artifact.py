"""Saved explainers and the compiler: what a file must hold to be compiled further, and `load_artifact`.

Nothing stored in a file is executed: the IR is parsed and verified, and every program's source is written
anew from its paired IR. The paired IR names the rule of each op, so no composite is needed for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dlbc.backends.triton.record import kernels_of
from dlbc.compiler import Source, bind_weights, check_weights, draw, explainer_of, finish_program
from dlbc.errors import ArtifactError, DlbcError
from dlbc.ir.core import Graph, Kernel, Section
from dlbc.ir.parser import parse_with_spans
from dlbc.ir.verifier import verify
from dlbc.options import Options, options_of
from dlbc.passes.outputs import input_names
from dlbc_runtime.artifact import Artifact, match_weights, read, weight_specs
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.program import Program, Variant, WeightSpec
from dlbc_runtime.signature import Size, dtype_name
from dlbc_runtime.triton_store import install

_AGAIN = "save the explainer again, or get the file again from where it came"


def load_artifact(path: Path, model: torch.nn.Module | None, *, trust: bool = False) -> Explainer:
    """An explainer from a file, its programs compiled anew from the stored IR; `trust`: its cubins are used.

    The weights are those of `model`, unless there is none; then those in the file. ArtifactError when the
    file is damaged or foreign, or names what does not match.
    """
    artifact = read(path)
    try:
        options = options_of(artifact.recipe, artifact.backend, artifact.reference)
        source = source_of(artifact)
        programs = {variant: _compiled(source, options, variant, program, artifact.where)
                    for variant, program in artifact.programs.items()}
    except ArtifactError:
        raise
    except DlbcError as problem:
        raise ArtifactError(f"its IR cannot be compiled: {problem.fact}", where=f"{path}: {problem.where}".rstrip(": "),
                            hint=problem.hint or _AGAIN) from problem
    except Exception as problem:  # a stranger's IR may be well formed and still nonsense to a pass
        raise ArtifactError(f"its IR cannot be compiled ({type(problem).__name__}: {problem})", where=str(path),
                            hint=_AGAIN) from problem
    specs = weight_specs(program.manifest for program in programs.values())
    weights = weights_of(artifact, specs, model)
    if trust:
        install(artifact.kernels)
    explainer = explainer_of(source, options, artifact.default, weights, programs=programs, model=model,
                             recipe=artifact.recipe)
    if artifact.recipe["rules"]["entries"] is None:  # type: ignore[index, call-overload]
        explainer = Explainer(programs, explainer.weights, default=artifact.default, draw=draw,
                              compile_kernels=kernels_of, recipe=artifact.recipe,
                              build=partial(_refuse, artifact.where), reference=artifact.reference, model=model)
    return explainer


def source_of(artifact: Artifact) -> Source:
    """The graphs that further variants are built from."""
    program = artifact.programs[artifact.default]
    exported, canonical = (parsed(program.ir[level], f"ir/{level}.dlir") for level in ("exported", "canonical"))
    manifest = program.manifest
    named = input_names(canonical)
    inputs = [(spec.name, spec.dtype, spec.shape) for spec in manifest.inputs.tensors]
    params = [(named[p.name], p.type.dtype, _sizes(p.type.shape)) for p in canonical.forward.params]
    if inputs != params or manifest.outputs.names != canonical.attrs["outputs"] or len(
            manifest.outputs.names) != len(canonical.forward.results):
        raise ArtifactError("the inputs or outputs of its manifest are not those of its IR", where=artifact.where,
                            hint=_AGAIN)
    return Source(exported, canonical, manifest.inputs, manifest.outputs, manifest.static, manifest.pad)


def weights_of(artifact: Artifact, specs: Mapping[str, WeightSpec], model: torch.nn.Module | None) -> dict[str, Any]:
    """The tensors that `specs` name, as the backend takes them: the model's own, and the constants of the file.

    ArtifactError naming those that are missing or differ in shape or element type; InputError for NaN.
    """
    found = artifact.tensors()
    if model is None:
        return match_weights(specs, found, artifact.backend, artifact.where,
                             hint="give the model: dlbc.load(path, model), or save it with weights=True")
    constants = {name for name in specs if name in set(_listed(artifact.recipe.get("constants")))}
    own = {name: tensor for name in specs if (tensor := _tensor(model, name)) is not None}
    for name in constants & set(own):  # some other thing of that name
        if dtype_name(own[name]) != specs[name].dtype or tuple(own[name].shape) != specs[name].shape:
            del own[name]
    device = next((tensor.device for tensor in own.values()), torch.device("cpu"))
    stored = {name: torch.as_tensor(found[name]).to(device) for name in constants - set(own) if name in found}
    bound = match_weights(specs, {**stored, **own}, "torch", artifact.where,
                          hint=f"the explainer was compiled from another {type(model).__name__}; compile this one")
    check_weights(bound)
    return bind_weights(bound, artifact.backend)


def parsed(text: str, name: str) -> Graph:
    """A verified graph. IRError where it is not well formed, ArtifactError for names that hold more than a name."""
    graph, spans = parse_with_spans(text, name)
    verify(graph, spans)
    for stated in _names(graph):
        # They end up in comments and docstrings of generated code, which they must not end.
        if not stated.isprintable() or '"""' in stated or "\\" in stated:
            raise ArtifactError(f"{stated!r} is no name", where=name, hint="do not use this file")
    return graph


def _compiled(source: Source, options: Options, variant: Variant, program: Program, where: str) -> Program:
    paired = parsed(program.ir["paired"], f"ir/{variant.name}/paired.dlir")
    count = len(source.canonical.forward.params)
    own, common = paired.forward.params, source.canonical.forward.params
    if own[:count] != common or len(own) > count + 1 or paired.weights.items() - source.canonical.weights.items():
        raise ArtifactError(f"its IR of {variant.name} is of another model", where=where, hint=_AGAIN)
    return finish_program(source, options, variant, paired)


def _refuse(where: str, variant: Variant) -> Program:
    raise ArtifactError(f"the file holds no program for {variant.name}, and its rules hold a predicate (Python code), "
                        "which files do not carry", where=where,
                        hint="compile the model again, or call the explainer so once before saving it")


def _names(graph: Graph) -> Iterable[str]:
    yield graph.name
    yield from graph.dims
    yield from graph.weights
    yield from graph.functions
    bodies = [section.body for _, section in graph.sections()] + [f.body for f in graph.functions.values()]
    for item in (item for body in bodies for item in body):
        if isinstance(item, Kernel):
            yield from (item.name, item.template)
    for op in (op for body in bodies for op in Section(body=body).ops):
        yield op.place
        yield from (result.name for result in op.results)


def _tensor(model: torch.nn.Module, name: str) -> torch.Tensor | None:
    """The parameter, buffer or attribute of that dotted name, if it is a tensor."""
    found: object = model
    for part in name.split("."):
        inside = vars(found) if isinstance(found, torch.nn.Module) else {}
        tables = [inside.get(table, {}) for table in ("_modules", "_parameters", "_buffers")]
        found = next((table[part] for table in (*tables, inside) if part in table), None)
    return found if isinstance(found, torch.Tensor) else None


def _sizes(shape: Iterable[object]) -> tuple[Size, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in shape)


def _listed(stored: object) -> list[str]:
    return [str(item) for item in stored] if isinstance(stored, list) else []
