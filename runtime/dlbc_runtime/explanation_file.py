"""Explanations as files: `.safetensors` and `.json` that load again, `.html` and `.png` to look at.

A file is data, whoever wrote it: nothing in it is executed, and what does not fit is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dlbc_runtime.arrays import Array, Arrays, Json, array_from_json, array_to_json
from dlbc_runtime.errors import ArtifactError, InputError
from dlbc_runtime.experts_file import GROUP as EXPERTS
from dlbc_runtime.experts_file import arrays_of, described, experts_of
from dlbc_runtime.explained import Explained, Method
from dlbc_runtime.explanation import Explanation, known
from dlbc_runtime.ledger import Ledger, number_from_json, number_to_json

FORMAT, VERSION = "dlbc-explanation", 1
GROUPS = ("inputs", "relevance", "outputs", "nodes", "activations", "positive", "negative", "sinks")
ALWAYS = ("inputs", "relevance", "positive", "negative", "sinks")
LARGE = 4096  # elements; outputs, nodes and activations above it are left out unless `complete`
SUFFIXES = ".safetensors, .json, .html or .png"


def save(explanation: Explanation, path: Path, *, complete: bool | None = None) -> Path:
    """Write `explanation` to `path` by its suffix; the file appears whole or not at all."""
    match path.suffix.lower():
        case ".safetensors":
            content = _safetensors(explanation, complete is not False)
        case ".json":
            content = _json(to_dict(explanation, complete=complete is True))
        case ".html":
            from dlbc_runtime.views.html import page

            content = page([explanation]).encode("utf-8")
        case ".png":
            from dlbc_runtime.views.image import draw

            content = draw(explanation)
        case suffix:
            raise InputError(f"cannot write an explanation as {suffix!r}", where=str(path),
                             hint=f"use a name that ends in {SUFFIXES}")
    write_whole(path, content)
    return path


def load(path: Path) -> Explanation:
    """Read an explanation back from `.safetensors` or `.json`. Raises ArtifactError when it cannot be."""
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".json"):
        raise ArtifactError(f"an explanation cannot be loaded from {suffix!r}", where=str(path),
                            hint="load a .safetensors or .json file; .html and .png are for looking at")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror}", where=str(path),
                            hint="check the name; Explanation.save writes such a file") from error
    try:
        stored, arrays = _read_safetensors(content) if suffix == ".safetensors" else _read_json(content)
        return _from_parts(stored, arrays)
    except (VersionError, ForeignError) as error:
        raise ArtifactError(str(error), where=str(path), hint=error.remedy) from error
    except (ValueError, TypeError, RecursionError, InputError) as error:
        raise ArtifactError(f"damaged: {error}", where=str(path),
                            hint="save the explanation again, or get the file again from where it came") from error


def to_dict(explanation: Explanation, *, complete: bool = False) -> dict[str, Json]:
    """The explanation as JSON-able data: what describes it, and its arrays as flat lists with their shape."""
    chosen, omitted = _chosen(explanation, complete)
    stored = _description(explanation, omitted)
    stored["arrays"] = {key: array_to_json(array) for key, array in chosen.items()}
    return stored


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _chosen(explanation: Explanation, complete: bool) -> tuple[dict[str, Array], list[str]]:
    """Arrays to write by `group/name`, and the keys of those left out."""
    chosen: dict[str, Array] = {}
    omitted = list(explanation.omitted)
    for group in GROUPS:
        arrays: Arrays = getattr(explanation, group)
        for name, array in arrays.items():
            if complete or group in ALWAYS or array.size <= LARGE:
                chosen[f"{group}/{name}"] = array
            else:
                omitted.append(f"{group}/{name}")
    for row, image in enumerate(explanation.images or ()):
        chosen[f"images/{row}"] = image
    return {**chosen, **arrays_of(explanation.experts)}, omitted


def _description(explanation: Explanation, omitted: list[str]) -> dict[str, Json]:
    """Everything but the arrays."""
    ledger = explanation.ledger
    return {
        "format": FORMAT, "version": VERSION, "rules": explanation.rules,
        "many_targets": explanation.many_targets,
        "target": [_explained_to_json(one) for one in explanation.target],
        "method": method_to_json(explanation.method),
        "tokens": None if explanation.tokens is None else [list(row) for row in explanation.tokens],
        "features": {name: list(names) for name, names in explanation.features.items()},
        "lengths": {name: list(lengths) for name, lengths in explanation.lengths.items()},
        "ledger": None if ledger is None else ledger.to_dict(),
        "omitted": list(omitted),
        **described(explanation.experts),
    }


def _explained_to_json(one: Explained) -> Json:
    """Only the fields that say something."""
    return {name: number_to_json(value) if isinstance(value, float) else value
            for name, value in asdict(one).items() if value is not None and value != ""}


def _json(stored: dict[str, Json]) -> bytes:
    return json.dumps(stored, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def _safetensors(explanation: Explanation, complete: bool) -> bytes:
    from safetensors.numpy import save as pack

    chosen, omitted = _chosen(explanation, complete)
    # Packing reads memory as it lies, so every array is copied into plain order first.
    plain = {key: np.array(array, order="C") for key, array in chosen.items()}
    # A safetensors file keeps its arrays in an order of its own; ours is that of the user's inputs.
    stored = _description(explanation, omitted)
    stored["order"] = list(plain)
    metadata = {"format": FORMAT, "version": str(VERSION), "digest": digest_of(plain),
                "explanation": _json(stored).decode("utf-8")}
    return pack(plain, metadata)


def unpacked(content: bytes, written: str) -> tuple[dict[str, str], dict[str, Array]]:
    """The texts and the arrays of a safetensors file of the format `written`. Raises ForeignError for another one, and
    ValueError where it cannot be read or its arrays are not those that were saved."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as unpack

    try:
        arrays = unpack(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8:8 + length]).get("__metadata__", {})
    except SafetensorError as error:
        raise ValueError(f"not a readable safetensors file ({error})") from error
    if metadata.get("format") != written:
        raise ForeignError
    if metadata.get("digest") != digest_of(arrays):
        raise ValueError("the arrays are not those that were saved")
    return metadata, arrays


def _read_safetensors(content: bytes) -> tuple[Json, dict[str, Array]]:
    metadata, arrays = unpacked(content, FORMAT)
    _check_version(metadata.get("version"))
    stored: Json = json.loads(metadata.get("explanation", ""))
    order = texts_of(fields_of(stored, "the description").get("order"), "order")
    if sorted(order) != sorted(arrays):
        raise ValueError("the arrays are not those that were saved")
    return stored, {key: arrays[key] for key in order}


def _read_json(content: bytes) -> tuple[Json, dict[str, Array]]:
    try:
        stored: Json = json.loads(content)
    except UnicodeDecodeError as error:
        raise ValueError("not text") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise ForeignError
    _check_version(stored.get("version"))
    arrays = stored.get("arrays")
    if not isinstance(arrays, dict):
        raise ValueError("arrays are missing")
    return stored, {key: array_from_json(array) for key, array in arrays.items()}


def _from_parts(stored: Json, arrays: Mapping[str, Array]) -> Explanation:
    """An explanation of its description and arrays. Raises ValueError or TypeError when they do not fit."""
    if not isinstance(stored, dict):
        raise ValueError("the description is missing")
    grouped: dict[str, dict[str, Array]] = {group: {} for group in (*GROUPS, "images", EXPERTS)}
    for key, array in arrays.items():
        group, _, name = key.partition("/")
        if group not in grouped or not name:
            raise ValueError(f"unknown array {key!r}")
        grouped[group][name] = array
    images, experts = grouped.pop("images"), grouped.pop(EXPERTS)
    if sorted(images) != sorted(map(str, range(len(images)))):
        raise ValueError("the pictures are not numbered")
    for image in images.values():
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError("a picture must be uint8 [H,W,3]")
    many, rules, ledger = stored.get("many_targets"), stored.get("rules"), stored.get("ledger")
    if not isinstance(many, bool) or not isinstance(rules, str):
        raise ValueError("many_targets or rules is missing")
    tokens = stored.get("tokens")
    explanation = Explanation(
        **{group: Arrays(grouped[group]) for group in GROUPS},  # type: ignore[arg-type]
        rules=rules, many_targets=many,
        target=tuple(map(_explained_from_json, items_of(stored.get("target"), "target"))),
        method=method_from_json(stored.get("method")),
        ledger_source=None if ledger is None else known(Ledger.from_dict(ledger)),
        tokens=None if tokens is None else tuple(texts_of(row, "tokens") for row in items_of(tokens, "tokens")),
        features={name: texts_of(names, "features")
                  for name, names in fields_of(stored.get("features"), "features").items()},
        images=tuple(images[str(row)] for row in range(len(images))) or None,
        omitted=texts_of(stored.get("omitted"), "omitted"),
        lengths={name: _lengths(rows) for name, rows in fields_of(stored.get("lengths", {}), "lengths").items()},
        experts=experts_of(stored, experts, many=many))
    for name, lengths in explanation.lengths.items():
        shape: tuple[int, ...] = explanation.inputs[name].shape if name in explanation.inputs else ()
        if len(shape) < 2 or len(lengths) != shape[0] or not all(0 < length <= shape[1] for length in lengths):
            raise ValueError(f"the lengths of the rows of {name!r} are not those of an input")
    for row_of in (explanation.tokens, explanation.images):
        if row_of is not None and len(row_of) != explanation.rows:
            raise ValueError(f"{len(row_of)} rows of tokens or pictures for {explanation.rows} batch rows")
    for part in (explanation.positive, explanation.negative) if explanation.positive or explanation.negative else ():
        if {name: array.shape for name, array in part.items()} != {
                name: array.shape for name, array in explanation.relevance.items()}:
            raise ValueError("the relevance of the target, or of its rivals, is not that of the inputs")
    for name in explanation.relevance:
        if explanation.relevance[name].dtype.kind != "f":
            raise ValueError(f"the relevance of {name!r} is not floating point")
        names, of_row = explanation.features.get(name), explanation.relevance_of(name)
        if names is not None and of_row.shape[:1] != (len(names),):
            raise ValueError(f"{len(names)} feature names for {name!r}")
    return explanation


def _explained_from_json(stored: Json) -> Explained:
    fields = fields_of(stored, "target")
    kinds: dict[str, type | tuple[type, ...]] = {
        "row": int, "seed": int, "index": int, "against": int, "position": int, "output": str, "label": str,
        "against_label": str, "text": str, "value": (int, float, str), "probability": (int, float, str)}
    for name, value in fields.items():
        if name not in kinds or isinstance(value, bool) or not isinstance(value, kinds[name]):
            raise ValueError(f"target has {name!r} = {value!r}")
        if name in ("row", "seed") and not 0 <= int(str(value)) < 1_000_000:
            raise ValueError(f"target has {name!r} = {value!r}")
    numbers = {name: number_from_json(fields.pop(name)) for name in ("value", "probability") if name in fields}
    return Explained(**fields, **numbers)  # type: ignore[arg-type]  # the kinds were checked above


def method_to_json(method: Method) -> Json:
    """How an explanation was made, as JSON data."""
    return {"model": method.model, "backend": method.backend,
            "multiplier": number_to_json(method.multiplier), "scaler": number_to_json(method.scaler),
            "reference": method.reference,
            "seconds": {stage: number_to_json(time) for stage, time in method.seconds.items()},
            "versions": dict(method.versions)}


def method_from_json(stored: Json) -> Method:
    """What `method_to_json` wrote. Raises ValueError when it is not that."""
    fields = fields_of(stored, "method")
    model, backend = texts_of([fields.get("model"), fields.get("backend")], "method")
    versions = fields_of(fields.get("versions"), "versions")
    seconds = fields_of(fields.get("seconds"), "seconds")
    return Method(model, backend, number_from_json(fields.get("multiplier")),
                  {stage: number_from_json(time) for stage, time in seconds.items()},
                  dict(zip(versions, texts_of(list(versions.values()), "versions"), strict=True)),
                  number_from_json(fields.get("scaler", 1.0)), *texts_of([fields.get("reference", "")], "method"))


def fields_of(stored: Json, what: str) -> dict[str, Json]:
    """An object's fields. Raises ValueError for what is no object."""
    if not isinstance(stored, dict):
        raise ValueError(f"{what} must be an object")
    return dict(stored)


def items_of(stored: Json, what: str) -> list[Json]:
    """A list's items. Raises ValueError for what is no list."""
    if not isinstance(stored, list):
        raise ValueError(f"{what} must be a list")
    return stored


def texts_of(stored: Json, what: str) -> tuple[str, ...]:
    """A list of texts. Raises ValueError for what is none."""
    texts = items_of(stored, what)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{what} must be text")
    return tuple(map(str, texts))


def _lengths(stored: Json) -> tuple[int, ...]:
    lengths = items_of(stored, "lengths")
    if not all(isinstance(length, int) and not isinstance(length, bool) for length in lengths):
        raise ValueError("lengths must be whole numbers")
    return tuple(int(str(length)) for length in lengths)


def digest_of(arrays: Mapping[str, Array]) -> str:
    """A digest of names, types, shapes and contents, in the order of names."""
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(arrays):
        array = arrays[key]
        digest.update(f"{key}|{array.dtype}|{array.shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _check_version(version: Json) -> None:
    if str(version) != str(VERSION):
        raise VersionError(version)


class ForeignError(ValueError):
    """The file is of another kind."""

    remedy = "load a file that Explanation.save wrote; dlbc.load reads explainers"

    def __str__(self) -> str:
        return "not an explanation"


class VersionError(ValueError):
    """The file was written by another version."""

    def __init__(self, version: Json) -> None:
        super().__init__(f"written in version {version!r} of the format, this is version {VERSION}")
        self.remedy = "load it with the dlbc that wrote it, or explain and save again"
