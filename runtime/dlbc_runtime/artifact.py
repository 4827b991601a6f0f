"""Explainers as files: one zip of manifest, IR text, generated source and, if asked for, weights.

A file from a stranger is data. Reading one checks its form, its sizes and the hash of every entry, and
executes nothing. `load` here runs the stored source, so it wants the word `trust=True`; `dlbc.load` does
not need it: it generates the source anew from the stored IR. `docs/artifact.md` describes the format.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np

from dlbc_runtime.arrays import Json
from dlbc_runtime.errors import ArtifactError, InputError
from dlbc_runtime.explanation_file import write_whole
from dlbc_runtime.program import Manifest, Program, Variant, WeightSpec
from dlbc_runtime.reference import Reference
from dlbc_runtime.signature import dtype_name
from dlbc_runtime.triton_store import StoredKernel, install

if TYPE_CHECKING:
    from dlbc_runtime.explainer import Explainer

FORMAT, VERSION = "dlbc-explainer", 1
MANIFEST, CONSTANTS, WEIGHTS = "manifest.json", "constants.safetensors", "weights.safetensors"
REFERENCE = "reference.safetensors"
COMMON_LEVELS = ("exported", "canonical")
"""IR levels that all variants share: stored once, as `ir/<level>.dlir`."""

MAX_TEXT = 1 << 30
"""Bytes that the texts of a file may unpack to."""
MAX_RATIO = 200
"""Times its size in the file that a text may unpack to (IR text is about 20)."""

_AGAIN = "save the explainer again, or get the file again from where it came"
Tensors: TypeAlias = "dict[str, Any]"


@dataclass(frozen=True)
class Artifact:
    """What a file holds, its hashes checked. `recipe`: what the compiler was asked for, as JSON data.

    `tensors` reads the numbers: `constants` (those that no state dict names) and, if saved, `weights`.
    """

    where: str
    default: Variant
    programs: Mapping[Variant, Program]
    recipe: Mapping[str, Json]
    stored: Mapping[str, bytes]
    reference: Reference | None = None
    kernels: Sequence[StoredKernel] = ()
    """Compiled Triton kernels, if they were saved."""

    @property
    def backend(self) -> str:
        """The backend that the programs are for."""
        return self.programs[self.default].manifest.backend

    @property
    def has_weights(self) -> bool:
        """Whether the model's weights are inside."""
        return WEIGHTS in self.stored

    def tensors(self) -> Tensors:
        """All numbers inside by weight name: numpy arrays for the numpy backend, else torch tensors."""
        found: Tensors = {}
        for name in (CONSTANTS, WEIGHTS):
            if name in self.stored:
                found |= _unpack_tensors(self.stored[name], self.backend, self.where)
        return found


def save(explainer: Explainer, path: str | os.PathLike[str], *, weights: bool = False,
         kernels: Sequence[StoredKernel] = ()) -> None:
    """Write an explainer with all programs it has compiled. The file appears whole or not at all.

    `weights=True` puts the model's numbers inside as well, `kernels` compiled Triton kernels. OSError when the path
    cannot be written.
    """
    write_whole(Path(path), pack(explainer, weights=weights, kernels=kernels))


def load(path: str | os.PathLike[str], *, trust: bool = False, weights: Mapping[str, Any] | None = None) -> Explainer:
    """An explainer from a file, without the compiler: the source stored in the file is executed.

    Say `trust=True` for files that you or someone you trust wrote. `weights`: the model's arrays by name,
    where the file does not hold them. ArtifactError for files that are damaged, foreign or not trusted,
    and for weights that are missing or do not match.
    """
    from dlbc_runtime.explainer import Explainer

    where = os.fspath(path)
    if not trust:
        raise ArtifactError("running this file means executing the code in it", where=where,
                            hint="dlbc.load(path) executes nothing stored; or say dlbc_runtime.load(path, trust=True) "
                                 "if you trust who wrote it")
    artifact = read(Path(path))
    specs = weight_specs(program.manifest for program in artifact.programs.values())
    bound = match_weights(specs, {**artifact.tensors(), **(weights or {})}, artifact.backend, where,
                          hint="save it with weights=True, or give load the weights by name")
    install(artifact.kernels)
    return Explainer(artifact.programs, bound, default=artifact.default, recipe=artifact.recipe,
                     reference=artifact.reference)


def pack(explainer: Explainer, *, weights: bool = False, extra: Mapping[str, Json] | None = None,
         kernels: Sequence[StoredKernel] = ()) -> bytes:
    """The bytes of the file of an explainer. `extra` goes into the manifest."""
    programs = {_folder(i, variant): (variant, program) for i, (variant, program)
                in enumerate(explainer.programs.items())}
    specs = weight_specs(program.manifest for _, program in programs.values())
    constants = set(_texts(explainer.recipe.get("constants", []))) & set(specs)
    entries: dict[str, bytes] = {}
    for folder, (_, program) in programs.items():
        for level, text in program.ir.items():
            entries[f"ir/{level}.dlir" if level in COMMON_LEVELS else f"ir/{folder}/{level}.dlir"] = text.encode()
        entries[f"source/{folder}.py"] = program.source.encode()
    numbers = explainer.weights
    if constants:
        entries[CONSTANTS] = _pack_tensors({n: numbers[n] for n in specs if n in constants})
    if weights:
        entries[WEIGHTS] = _pack_tensors({n: numbers[n] for n in specs if n not in constants})
    reference = explainer.reference
    if reference is not None and (arrays := dict(reference.arrays())):
        entries[REFERENCE] = _pack_tensors(arrays)
    entries |= {kernel.entry: kernel.cubin for kernel in kernels}
    manifest: dict[str, Any] = {
        "format": FORMAT, "version": VERSION,
        "versions": {**explainer.manifest.versions, "python": platform.python_version(), "numpy": np.__version__,
                     **_torch_version(numbers)},
        "target": explainer.manifest.backend, "rules": explainer.manifest.composite,
        "weights": [[w.name, w.dtype, list(w.shape)] for w in specs.values()], "constants": sorted(constants),
        "default": next(f for f, (variant, _) in programs.items() if variant == explainer.default),
        "variants": {folder: {"variant": asdict(variant), "program": program.manifest.to_json(),
                              "levels": list(program.ir)} for folder, (variant, program) in programs.items()},
        "reference": None if reference is None else reference.to_json(),
        "recipe": dict(explainer.recipe), "extra": dict(extra or {}), "kernels": [k.to_json() for k in kernels],
        "entries": {name: {"sha256": _sha256(content), "size": len(content)} for name, content in entries.items()}}
    entries = {MANIFEST: json.dumps(manifest, indent=1, allow_nan=False).encode(), **entries}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            tensors = name.endswith(".safetensors")
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_STORED if tensors else zipfile.ZIP_DEFLATED, 6)
    return file.getvalue()


def read(path: Path) -> Artifact:
    """Read a file and check it. ArtifactError when it cannot be read, is foreign, or is damaged."""
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise ArtifactError(f"cannot be read: {problem.strerror}", where=str(path),
                            hint="check the name; explainer.save writes such a file") from problem
    return unpack(content, str(path))[0]


def unpack(content: bytes, where: str) -> tuple[Artifact, Mapping[str, Any]]:
    """What the bytes of a file hold, and its manifest. ArtifactError when they are foreign or damaged."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            manifest, stored = _entries(archive, where)
        return _artifact(manifest, stored, where), manifest
    except ArtifactError:
        raise
    except zipfile.BadZipFile as problem:
        whole = content[:4] == b"PK\x03\x04"
        _fail("cut short or damaged" if whole else "not a saved explainer", where,
              _AGAIN if whole else "dlbc.load reads what explainer.save wrote", problem)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, StopIteration, RecursionError, EOFError,
            OverflowError, NotImplementedError, RuntimeError, OSError, InputError, zipfile.LargeZipFile,
            zipfile.zlib.error) as problem:  # type: ignore[attr-defined]
        _fail(f"damaged ({type(problem).__name__}: {problem})", where, _AGAIN, problem)


def weight_specs(manifests: Iterator[Manifest]) -> dict[str, WeightSpec]:
    """The weights that programs read, by name."""
    return {spec.name: spec for manifest in manifests for spec in manifest.weights}


def match_weights(specs: Mapping[str, WeightSpec], given: Mapping[str, Any], backend: str, where: str, *,
                  hint: str) -> Tensors:
    """The tensors that `specs` ask for, out of those given; ArtifactError naming all that is missing or differs."""
    wrong = []
    for name, spec in specs.items():
        if name not in given:
            wrong.append(f"`{name}` {spec.dtype}[{_shape(spec.shape)}] is missing")
            continue
        tensor = given[name]
        dtypes = {spec.dtype, "f32"} if backend == "numpy" and spec.dtype in ("f16", "bf16") else {spec.dtype}
        if tuple(tensor.shape) != spec.shape or dtype_name(tensor) not in dtypes:
            wrong.append(f"`{name}` is {dtype_name(tensor)}[{_shape(tensor.shape)}], "
                         f"it should be {spec.dtype}[{_shape(spec.shape)}]")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ArtifactError(f"weights do not match: {'; '.join(wrong[:5])}{more}", where=where, hint=hint)
    return {name: given[name] for name in specs}


def _entries(archive: zipfile.ZipFile, where: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest, and every entry that it lists, by name; sizes, names and hashes checked."""
    infos: dict[str, zipfile.ZipInfo] = {}
    unpacked = 0
    for info in archive.infolist():
        name = info.filename
        if name in infos:
            _fail(f"holds two entries `{name}`", where, _AGAIN)
        if not _is_plain(name) or info.flag_bits & 1:
            _fail(f"holds an entry of the name {name!r}", where, "nobody's explainer.save wrote this; do not use it")
        infos[name] = info
        if info.compress_type == zipfile.ZIP_STORED:
            continue
        unpacked += info.file_size
        if unpacked > MAX_TEXT or info.file_size > MAX_RATIO * max(info.compress_size, 1 << 12):
            _fail(f"`{name}` would unpack to {info.file_size:,} bytes", where,
                  "nobody's explainer.save wrote this; do not use it")
    if MANIFEST not in infos:
        _fail("not a saved explainer: it has no manifest", where, "dlbc.load reads what explainer.save wrote")
    manifest = json.loads(archive.read(infos[MANIFEST]))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        _fail("not a saved explainer", where, "dlbc.load reads what explainer.save wrote")
    if manifest.get("version") != VERSION:
        _fail(f"written in version {manifest.get('version')!r} of the format, this is version {VERSION}", where,
              f"load it with the dlbc that wrote it ({manifest.get('versions', {}).get('dlbc', 'unknown')}), "
              "or compile and save again")
    listed = manifest["entries"]
    unknown, missing = sorted(set(infos) - set(listed) - {MANIFEST}), sorted(set(listed) - set(infos))
    if unknown or missing:
        _fail(f"entry `{(unknown or missing)[0]}` is {'not listed' if unknown else 'missing'}", where, _AGAIN)
    stored = {}
    for name, stated in listed.items():
        content = archive.read(infos[name])
        if len(content) != stated["size"] or _sha256(content) != stated["sha256"]:
            _fail(f"entry `{name}` is not what was saved", where, _AGAIN)
        stored[name] = content
    return manifest, stored


def _artifact(manifest: Mapping[str, Any], stored: Mapping[str, bytes], where: str) -> Artifact:
    programs: dict[str, tuple[Variant, Program]] = {}
    kernels = [StoredKernel.from_json(entry, stored) for entry in manifest.get("kernels", ())]
    left = set(stored) - {CONSTANTS, WEIGHTS, REFERENCE} - {kernel.entry for kernel in kernels}
    for folder, entry in manifest["variants"].items():
        names = {level: f"ir/{level}.dlir" if level in COMMON_LEVELS else f"ir/{folder}/{level}.dlir"
                 for level in _texts(entry["levels"])}
        source = f"source/{folder}.py"
        left -= {source, *names.values()}
        known = {field.name: field.type for field in fields(Variant)}
        stated = entry["variant"]
        if set(stated) != set(known) or any(type(stated[n]).__name__ != kind for n, kind in known.items()):
            raise ValueError(f"variant {stated}")
        programs[folder] = Variant(**stated), Program(
            Manifest.from_json(entry["program"]), stored[source].decode(),
            {level: stored[name].decode() for level, name in names.items()})
    if left:
        _fail(f"entry `{min(left)}` has no place in an explainer", where, _AGAIN)
    if len({program.manifest.backend for _, program in programs.values()}) != 1:
        raise ValueError("programs of several backends")
    recipe = manifest["recipe"]
    if not isinstance(recipe, dict):
        raise ValueError("recipe")
    return Artifact(where, programs[manifest["default"]][0], dict(programs.values()), recipe, {
        name: content for name, content in stored.items() if name in (CONSTANTS, WEIGHTS)},
        _reference(manifest["reference"], stored, where), kernels)


def _reference(data: Any, stored: Mapping[str, bytes], where: str) -> Reference | None:
    """The reference of the explainer, its arrays from the file."""
    arrays = _unpack_tensors(stored[REFERENCE], "numpy", where) if REFERENCE in stored else {}
    found = None if data is None else Reference.from_json(data, arrays)
    if set(arrays) != (set() if found is None else {name for name, _ in found.arrays()}):
        raise ValueError("arrays of another reference")
    return found


def _is_plain(name: str) -> bool:
    """Whether an entry's name is a relative path of ordinary parts."""
    parts = name.split("/")
    return all(part and part not in (".", "..") and part.isprintable() for part in parts) and not (
        set(name) & set("\\:\0"))


def _folder(number: int, variant: Variant) -> str:
    """A name for a variant's entries: readable, unique, and a plain file name whatever `keep` is."""
    readable = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in variant.name).strip(".")
    return f"{number}-{readable[:60]}" if number else readable[:60] or "default"


def _pack_tensors(tensors: Mapping[str, Any]) -> bytes:
    """Safetensors of torch tensors or numpy arrays."""
    if any(hasattr(tensor, "detach") for tensor in tensors.values()):
        from safetensors.torch import save as pack_torch

        # A copy of each: packing refuses tensors that share memory or lie in it out of order.
        return pack_torch({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    from safetensors.numpy import save as pack_numpy

    return pack_numpy({name: np.array(array, order="C") for name, array in tensors.items()})


def _unpack_tensors(content: bytes, backend: str, where: str) -> Tensors:
    from safetensors import SafetensorError

    try:
        if backend == "numpy":
            from safetensors.numpy import load as unpack_numpy

            return dict(unpack_numpy(content))
        from safetensors.torch import load as unpack_torch

        return dict(unpack_torch(content))
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as problem:
        _fail(f"its numbers are damaged ({problem})", where, _AGAIN, problem)


def _torch_version(tensors: Mapping[str, Any]) -> dict[str, str]:
    if not any(hasattr(tensor, "detach") for tensor in tensors.values()):
        return {}
    import torch

    return {"torch": str(torch.__version__)}


def _texts(stored: object) -> tuple[str, ...]:
    if not isinstance(stored, list) or not all(isinstance(text, str) for text in stored):
        raise ValueError(f"{stored!r} is not a list of names")
    return tuple(stored)


def _shape(shape: Any) -> str:
    return ",".join(map(str, shape))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _fail(fact: str, where: str, hint: str, cause: BaseException | None = None) -> NoReturn:
    raise ArtifactError(fact, where=where, hint=hint) from cause
