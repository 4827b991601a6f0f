"""Generation explanations as files: `.safetensors` and `.json` that load again, `.html` to look at.

A file is data, whoever wrote it: nothing in it is executed, and what does not fit is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dlbc_runtime.arrays import Array, Json, array_from_json, array_to_json
from dlbc_runtime.errors import ArtifactError, InputError
from dlbc_runtime.experts_file import GROUP, arrays_of, described, experts_of
from dlbc_runtime.explanation_file import (
    ForeignError,
    digest_of,
    fields_of,
    items_of,
    method_from_json,
    method_to_json,
    texts_of,
    unpacked,
    write_whole,
)
from dlbc_runtime.generation import Alternative, GenerationExplanation
from dlbc_runtime.ledger import number_from_json, number_to_json

FORMAT, VERSION = "dlbc-generation", 1
ARRAYS = {"ids": "iu", "probabilities": "f", "explained": "iu", "relevance": "f", "values": "f"}
MAYBE = {"against": "iu", "sinks": "f", "source_ids": "iu", "source_relevance": "f", "spans": "iu"}
TEXTS = ("tokens", "against_tokens", "source_tokens")
PLAIN = ("text", "target", "strategy", "rules")


def save(found: GenerationExplanation, path: Path) -> Path:
    """Write `found` to `path` by its suffix; the file appears whole or not at all."""
    match path.suffix.lower():
        case ".safetensors":
            content = _safetensors(found)
        case ".json":
            content = _bytes(to_dict(found))
        case ".html":
            from dlbc_runtime.views.generation import generation_html

            content = generation_html(found).encode("utf-8")
        case suffix:
            raise InputError(f"cannot write a generation as {suffix!r}", where=str(path),
                             hint="use a name that ends in .safetensors, .json or .html")
    write_whole(path, content)
    return path


def load(path: Path) -> GenerationExplanation:
    """Read one back from `.safetensors` or `.json`. Raises ArtifactError when it cannot be."""
    if path.suffix.lower() not in (".safetensors", ".json"):
        raise ArtifactError(f"a generation cannot be loaded from {path.suffix!r}", where=str(path),
                            hint="load a .safetensors or .json file; .html is for looking at")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror}", where=str(path),
                            hint="check the name; GenerationExplanation.save writes such a file") from error
    try:
        stored, arrays = (_read_safetensors if path.suffix.lower() == ".safetensors" else _read_json)(content)
        return _from_parts(stored, arrays)
    except ForeignError as error:
        raise ArtifactError("not an explained generation", where=str(path),
                            hint="load a file that GenerationExplanation.save wrote; Explanation.load and dlbc.load "
                                 "read others") from error
    except (ValueError, TypeError, KeyError, RecursionError, InputError) as error:
        raise ArtifactError(f"damaged: {error}", where=str(path),
                            hint="save it again, or get the file again from where it came") from error


def to_dict(found: GenerationExplanation) -> dict[str, Json]:
    """All of it as JSON-able data: what describes it, and its arrays as flat lists with their shape."""
    return {**_description(found), "arrays": {name: array_to_json(array) for name, array in _arrays(found).items()}}


def _arrays(found: GenerationExplanation) -> dict[str, Array]:
    named = {name: getattr(found, name) for name in (*ARRAYS, *MAYBE)}
    return {**{name: array for name, array in named.items() if array is not None},
            **{f"layers/{name}": array for name, array in found.layers.items()}, **arrays_of(found.experts)}


def _description(found: GenerationExplanation) -> dict[str, Json]:
    return {"format": FORMAT, "version": VERSION, "prompt_length": found.prompt_length, "finished": found.finished,
            **{name: getattr(found, name) for name in PLAIN},
            **{name: list(getattr(found, name)) for name in TEXTS},
            **described(found.experts), "layers": list(found.layers), "method": method_to_json(found.method),
            "alternatives": [[[i, text, number_to_json(p)] for i, text, p in each] for each in found.alternatives]}


def _bytes(stored: dict[str, Json]) -> bytes:
    return json.dumps(stored, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def _safetensors(found: GenerationExplanation) -> bytes:
    from safetensors.numpy import save as pack

    plain = {name: np.array(array, order="C") for name, array in _arrays(found).items()}
    return pack(plain, {"format": FORMAT, "version": str(VERSION), "digest": digest_of(plain),
                        "generation": _bytes(_description(found)).decode("utf-8")})


def _read_safetensors(content: bytes) -> tuple[Json, dict[str, Array]]:
    metadata, arrays = unpacked(content, FORMAT)
    return json.loads(metadata.get("generation", "")), arrays


def _read_json(content: bytes) -> tuple[Json, dict[str, Array]]:
    stored: Json = json.loads(content)
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise ForeignError
    return stored, {name: array_from_json(array) for name, array in fields_of(stored.get("arrays"), "arrays").items()}


def _from_parts(stored: Json, arrays: Mapping[str, Array]) -> GenerationExplanation:
    """Of a description and arrays. Raises ValueError, TypeError or InputError when they do not fit."""
    fields = fields_of(stored, "the description")
    if fields.get("version") != VERSION:
        raise ValueError(f"written in version {fields.get('version')!r} of the format, this is version {VERSION}")
    layers = texts_of(fields.get("layers"), "layers")
    kinds = {**ARRAYS, **MAYBE, **{f"layers/{name}": "f" for name in layers}}
    own = {name: array for name, array in arrays.items() if name.startswith(f"{GROUP}/")}
    arrays = {name: array for name, array in arrays.items() if name not in own}
    for name, array in arrays.items():
        if name not in kinds or array.dtype.kind not in kinds[name]:
            raise ValueError(f"an array {name!r} of {array.dtype}")
    missing = [name for name in (*ARRAYS, *(f"layers/{name}" for name in layers)) if name not in arrays]
    if missing:
        raise ValueError(f"the array {missing[0]!r} is missing")
    if arrays["ids"].ndim != 1 or arrays["explained"].ndim != 1:
        raise ValueError("ids and explained have one axis")
    prompt, finished = fields.get("prompt_length"), fields.get("finished")
    if isinstance(prompt, bool) or not isinstance(prompt, int) or not isinstance(finished, bool):
        raise ValueError("prompt_length or finished is missing")
    plain = dict(zip(PLAIN, texts_of([fields.get(name) for name in PLAIN], "the description"), strict=True))
    return GenerationExplanation(
        **{name: arrays.get(name) for name in (*ARRAYS, *MAYBE)},  # type: ignore[arg-type]  # checked above
        **plain, **{name: texts_of(fields.get(name), name) for name in TEXTS},  # type: ignore[arg-type]
        prompt_length=prompt, finished=finished, layers={name: arrays[f"layers/{name}"] for name in layers},
        method=method_from_json(fields.get("method")),
        experts=experts_of(fields, {name.partition("/")[2]: array for name, array in own.items()}, many=True),
        alternatives=tuple(tuple(map(_alternative, items_of(each, "alternatives")))
                           for each in items_of(fields.get("alternatives"), "alternatives")))


def _alternative(stored: Json) -> Alternative:
    match stored:
        case [int(token), str(text), probability] if not isinstance(token, bool):
            return token, text, number_from_json(probability)
    raise ValueError("an alternative is a token, its text and its probability")
