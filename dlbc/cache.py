"""The compile cache: explainers on disk, found by what the model is without exporting it again.

An entry is an artifact (`dlbc_runtime/artifact.py`) whose stored source is run, so the folder must belong
to the user and be writable by nobody else. A reused explainer is checked against the model's own forward.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dlbc
import dlbc_runtime
from dlbc.artifact import source_of, weights_of
from dlbc.backends.triton.record import kernels_of
from dlbc.compiler import Source, build_program, compile_now, draw
from dlbc.errors import ArtifactError, InputError
from dlbc.fingerprint import Fingerprint, Uncapturable
from dlbc.frontends.expert_capture import portable_experts, switches
from dlbc.frontends.inputs import Signature, dynamic_axes, injected, mapped, tensors
from dlbc.frontends.quiet import EXPORTING
from dlbc.frontends.registered_capture import registered
from dlbc.options import Options
from dlbc_runtime.arrays import as_numpy
from dlbc_runtime.artifact import Artifact, pack, unpack, weight_specs
from dlbc_runtime.c_library import BINARIES
from dlbc_runtime.explainer import Explainer, Recompile
from dlbc_runtime.folders import folder, ours, say_once, trusted_folder, write
from dlbc_runtime.program import Program, Variant
from dlbc_runtime.signature import Container, TensorSpec, Tree, dtype_name

log = logging.getLogger(__name__)

SUFFIX = ".dlbc"
NOTE = ".note.json"
"""What else is kept here (`dlbc/notes.py`)."""
TOLERANCE = {"f16": 3e-2, "bf16": 1e-1}
"""How far the compiled forward may be from the model's, of its largest output, by the model's element type."""


@dataclass(frozen=True)
class Entry:
    """One explainer in the cache. `size` in bytes, `made` in seconds since 1970."""

    path: Path
    model: str
    rules: str
    backend: str
    size: int
    made: float


def cached(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Options,
           default: Variant, *, verify: bool = True) -> Explainer:
    """The explainer of a model from the cache; compiled and kept there when there is none or it does not fit.

    `verify`: run the model and a reused explainer forward once on the example inputs, and compile anew, with a
    warning, when they differ.
    """
    def again(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Explainer:
        return cached(model, args, kwargs, options, default, verify=verify)

    try:
        keys = keys_of(model, args, kwargs, options, default)
    except Uncapturable as problem:
        log.info("%s is not cached: %s", type(model).__name__, problem)
        return compile_now(model, args, kwargs, options, default)
    folder = trusted_folder()
    if folder is None:
        return compile_now(model, args, kwargs, options, default)
    general, sized = (folder / f"{key}{SUFFIX}" for key in keys)
    occupied = False
    for path in (general, sized):
        artifact = _read(path)
        if artifact is None:
            continue
        if not _fits(artifact, args, kwargs):
            occupied = path == general
            continue
        found = _reused(artifact, path, model, options, default, again)
        different = _difference(found, model, args, kwargs) if found is not None and verify else ""
        if different:
            log.warning("the cached explainer of %s does not do what the model does: %s; compiling it again",
                        type(model).__name__, different)
            break
        if found is not None:
            log.info("%s comes from the cache: %s", type(model).__name__, path)
            return _keeping(found, path)
    explainer = compile_now(model, args, kwargs, options, default, recompile=again)
    # A program for certain sizes only is found by those sizes, as is one that another's sizes keep out.
    path = sized if explainer.manifest.static or occupied else general
    write(path, pack(explainer, extra={"key": path.stem}))
    return _keeping(explainer, path)


def _keeping(explainer: Explainer, path: Path) -> Explainer:
    """The explainer, which adds the program of its ledger to its entry when that is first built: it takes seconds
    for a large model."""
    build = explainer._build

    def kept(variant: Variant) -> Program:
        assert build is not None
        program = build(variant)
        if variant.ledger and replace(variant, ledger=False) == explainer.default:
            whole = Explainer({**explainer.programs, variant: program}, explainer.weights, default=explainer.default,
                              recipe=explainer.recipe, reference=explainer.reference)
            write(path, pack(whole, extra={"key": path.stem}))
        return program

    if build is not None:
        explainer._build = kept
    return explainer


def entries() -> tuple[Entry, ...]:
    """What the cache holds, newest first. Entries that cannot be read are left out; `clear` removes them too."""
    found = []
    for path in folder().glob(f"*{SUFFIX}"):
        try:
            status, (artifact, _) = path.stat(), unpack(path.read_bytes(), str(path))
        except (OSError, ArtifactError):
            continue
        manifest = artifact.programs[artifact.default].manifest
        found.append(Entry(path, manifest.model, manifest.composite, manifest.backend, status.st_size, status.st_mtime))
    return tuple(sorted(found, key=lambda entry: (-entry.made, entry.path)))


def clear() -> int:
    """Remove every entry, also damaged and half-written ones, all notes and all compiled kernels; how many entries
    there were. OSError if one stays."""
    paths = [*folder().glob(f"*{SUFFIX}"), *folder().glob(f".*{SUFFIX}.*")]
    others = [path for kept in (f"*{NOTE}", BINARIES) for path in (*folder().glob(kept), *folder().glob(f".{kept}.*"))]
    for path in (*paths, *others):
        path.unlink(missing_ok=True)
    return len(paths)


def keys_of(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Options,
            default: Variant) -> tuple[str, str]:
    """Two names for what is to be compiled: for inputs of any sizes, and for inputs of these sizes.

    Uncapturable when the model's state cannot be described; InputError when it does not take these inputs.
    """
    bound = Signature.of(model).bind(args, kwargs)
    weights = (*model.named_parameters(), *model.named_buffers())
    unmade = next((name for name, weight in weights if weight.is_meta), None)
    if unmade is not None:
        raise Uncapturable(f"`{unmade}` is on the meta device and has no numbers, to keep or to compare with")
    named = {path: x for name, value in bound.items() for path, x in tensors(value, name)}
    axes = dynamic_axes(named, options.dynamic)

    def form(path: str, x: torch.Tensor) -> Any:
        free = axes.get(path, ())
        return ("tensor", x.dtype, x.device.type, tuple("any" if i in free else n for i, n in enumerate(x.shape)))

    key = Fingerprint()
    asked = {**vars(options), "reference": options.reference is not None}  # which one, the program does not know
    key.add((_versions(), asked, vars(default), torch.get_default_dtype(), torch.is_autocast_enabled("cpu"),
             torch.is_autocast_enabled("cuda")), "options")
    key.add({name: mapped(value, name, form) for name, value in bound.items()}, "inputs")
    with EXPORTING if switches(model) else nullcontext(), portable_experts(model):  # as it is captured
        key.add(model, "")
    key.add([(path, forward) for path, (_, forward) in registered(model).items()], "register_moe")
    general = key.hexdigest()
    key.add({path: tuple(x.shape) for path, x in named.items()}, "sizes")
    return general, key.hexdigest()


def _read(path: Path) -> Artifact | None:
    """The entry of that name; None when there is none, or, said, when it is damaged, foreign or not ours."""
    try:
        with path.open("rb") as file:
            if not ours(os.fstat(file.fileno())):
                raise ArtifactError("others could have written it")
            content = file.read()
        artifact, manifest = unpack(content, str(path))
        if manifest["extra"].get("key") != path.stem:
            raise ArtifactError("it was made for something else")
    except FileNotFoundError:
        return None
    except (OSError, ArtifactError) as problem:
        fact = problem.fact if isinstance(problem, ArtifactError) else problem.strerror
        say_once(log, f"cache entry {path} cannot be used ({fact}); compiling again")
        return None
    return artifact


def _fits(artifact: Artifact, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the artifact's program takes inputs of these sizes."""
    try:
        artifact.programs[artifact.default].manifest.inputs.bind(args, kwargs)
    except InputError:
        return False
    return True


def _reused(artifact: Artifact, path: Path, model: torch.nn.Module, options: Options, default: Variant,
            recompile: Recompile) -> Explainer | None:
    """An explainer that runs the entry's stored source on the model's weights; None, said, if they do not match."""
    try:
        specs = weight_specs(program.manifest for program in artifact.programs.values())
        weights = weights_of(artifact, specs, model)
    except ArtifactError as problem:
        say_once(log, f"cache entry {path} cannot be used ({problem.fact}); compiling again")
        return None
    return Explainer(artifact.programs, weights, default=default, build=_Build(artifact, options),
                     recompile=recompile, draw=draw, compile_kernels=kernels_of, recipe=artifact.recipe,
                     reference=options.reference, model=model)


@dataclass
class _Build:
    """Builds further variants; the stored IR is read when the first is asked for."""

    artifact: Artifact
    options: Options

    def __call__(self, variant: Variant) -> Program:
        return build_program(self.source, self.options, variant)

    @functools.cached_property
    def source(self) -> Source:
        """The graphs that variants are built from."""
        return source_of(self.artifact)


def _difference(explainer: Explainer, model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What differs between the compiled forward and the model's own; "" where they agree."""
    from dlbc.frontends.torch_export import evaluating

    try:
        results, positions = explainer.forward(*args, **kwargs)
        added = injected(model, Signature.of(model), args, kwargs)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(model):
            expected = dict(_outputs(explainer.manifest.outputs.tree, model(*args, **kwargs, **added), "the output"))
    except Exception as problem:  # generated code or the model's own: either way, compile again and see
        return f"{type(problem).__name__}: {problem}"
    for name, own in expected.items():
        if not own.is_floating_point():
            continue
        if name == explainer.manifest.output and positions is not None:
            own = own[torch.arange(len(own)).unsqueeze(1), torch.as_tensor(as_numpy(positions))]
        wanted, found = as_numpy(own), as_numpy(results[name])
        if wanted.shape != found.shape:
            return f"`{name}` has the shape {list(found.shape)}, the model's is {list(wanted.shape)}"
        scale = float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0))
        allowed = TOLERANCE.get(dtype_name(own), 1e-3) * scale + 1e-6
        if not np.allclose(found, wanted, rtol=0.0, atol=allowed, equal_nan=True):
            error = float(np.nanmax(np.abs(found - wanted), initial=0.0))
            return f"`{name}` differs by {error:.3g}, where {allowed:.3g} is allowed"
    return ""


def _outputs(tree: Tree, value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model's result by name. ValueError where it is not built like `tree`."""
    if isinstance(tree, TensorSpec):
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path} is {type(value).__name__}, it was a tensor")
        yield tree.name, value
    elif isinstance(tree, Container):
        parts = value._asdict() if hasattr(value, "_fields") else value
        keys = [str(key) for key in parts] if isinstance(parts, Mapping) else list(map(str, range(len(parts))))
        if tuple(keys) != tuple(key for key, _ in tree.named()):
            raise ValueError(f"{path} has the parts {', '.join(keys)}, it had {', '.join(k for k, _ in tree.named())}")
        inside = parts.values() if isinstance(parts, Mapping) else parts
        for (key, part), inner in zip(tree.named(), inside, strict=True):
            yield from _outputs(part, inner, f"{path}.{key}")


@functools.lru_cache(maxsize=1)
def _versions() -> tuple[str, ...]:
    """Of all that decides what is generated: ours by the digest of our sources."""
    digest = hashlib.sha256()
    for root in (Path(dlbc.__file__).parent, Path(dlbc_runtime.__file__).parent):
        for path in sorted((*root.rglob("*.py"), *root.rglob("*.jinja"), *root.rglob("*.h"))):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    others = [f"{name} {getattr(sys.modules[name], '__version__', '')}" for name in ("transformers", "torchvision")
              if name in sys.modules]
    return (dlbc.__version__, digest.hexdigest(), str(torch.__version__), np.__version__, platform.python_version(),
            *others)
