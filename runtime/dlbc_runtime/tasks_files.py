"""Relevance of a task as a file: `.safetensors`, `.json` or `.npz`. Data only, whoever wrote it."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dlbc_runtime.arrays import Array, Json, array_from_json, array_to_json
from dlbc_runtime.errors import ArtifactError, InputError
from dlbc_runtime.explanation_file import write_whole

Format = Literal["json", "safetensors", "npz"]
FORMATS: tuple[Format, ...] = ("json", "safetensors", "npz")
KIND, VERSION = "dlbc-relevance", 1
_METADATA = "metadata"


@dataclass(frozen=True)
class SavedRelevance:
    """What was read: for each step relevance by name, and what is said about it."""

    steps: tuple[Mapping[str, Array], ...]
    metadata: Mapping[str, Json]


def check_place(path: str | os.PathLike[str], format: str) -> tuple[Path, Format]:
    """The path and format. InputError where the format is unknown, or path and format are at odds, or the path is a
    file where a folder is needed."""
    chosen = next((one for one in FORMATS if one == format), None)
    if chosen is None:
        pickled = " (a pickle runs code of whoever wrote it)" if format in ("pt", "pth", "pkl", "pickle", "npy") else ""
        raise InputError(f"relevance cannot be saved as {format!r}{pickled}", where="save_format",
                         hint=f"formats: {', '.join(FORMATS)}")
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise InputError(f"save_path is {path!r}", where="save_path", hint="give a folder, or the name of a file")
    place = Path(path).expanduser()
    if place.suffix and not place.is_dir() and place.suffix != f".{chosen}":
        raise InputError(f"the file ends in {place.suffix}, the format is {chosen}", where="save_path",
                         hint=f'name it {place.stem}.{chosen}, or give save_format, one of {", ".join(FORMATS)}')
    nearest = place if not place.suffix else place.parent
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise InputError(f"{nearest} is a file", where="save_path", hint="give a folder, or the name of a file in one")
    return place, chosen


def check_name(name: str) -> None:
    """InputError for a file's name that would lead out of its folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(mark in name for mark in "/\\:\0"):
        raise InputError(f"the name of a file is {name!r}", where="save_name",
                         hint="give a name without folders; the folder is save_path")


def save_relevance(steps: Sequence[Mapping[str, Array]], path: str | os.PathLike[str], format: str = "safetensors", *,
                   metadata: Mapping[str, Json] | None = None, name: str = "relevance") -> Path:
    """Write relevance by step, and return the file's path. `path`: a file's name with the format's suffix, which is
    replaced, or a folder: there it is called `name`, with a number where that is taken. InputError for places and
    formats that cannot be."""
    place, chosen = check_place(path, format)
    check_name(name)
    if not place.suffix or place.is_dir():
        names = (f"{name}{f'-{number}' if number > 1 else ''}.{chosen}" for number in range(1, 2**31))
        place = next(place / one for one in names if not (place / one).exists())
    arrays = {f"{number}/{key}": np.ascontiguousarray(array)
              for number, step in enumerate(steps) for key, array in step.items()}
    about: dict[str, Json] = {"format": KIND, "version": VERSION, "steps": len(steps), **dict(metadata or {})}
    try:
        write_whole(place, _content(chosen, arrays, about))
    except OSError as problem:
        raise InputError(f"cannot be written: {problem.strerror}", where=str(place),
                         hint="give a place that can be written to") from problem
    return place


def load_relevance(path: str | os.PathLike[str]) -> SavedRelevance:
    """Read what `save_relevance` wrote. ArtifactError for what is damaged or something else."""
    place = Path(path)
    try:
        content = place.read_bytes()
    except OSError as problem:
        raise ArtifactError(f"cannot be read: {problem.strerror}", where=str(place), hint="check the name") from problem
    try:
        about, arrays = _read(place.suffix.removeprefix("."), content)
        if about.get("format") != KIND or about.get("version") != VERSION:
            raise ValueError(f"it is {about.get('format')!r} version {about.get('version')!r}, not {KIND} {VERSION}")
        count = about["steps"]
        if not isinstance(count, int) or not 0 <= count <= len(arrays):
            raise ValueError(f"it says that it holds {count!r} steps")
        steps: list[dict[str, Array]] = [{} for _ in range(count)]
        for key, array in arrays.items():
            number, _, name = key.partition("/")
            steps[int(number)][name] = array
    except (ValueError, TypeError, KeyError, IndexError, OSError, EOFError, RecursionError) as problem:
        raise ArtifactError(f"no saved relevance: {problem}", where=str(place),
                            hint="give a file that run_task(save_relevance=True) wrote: "
                                 f"{', '.join(f'.{one}' for one in FORMATS)}") from problem
    rest = {name: value for name, value in about.items() if name not in ("format", "version", "steps")}
    return SavedRelevance(tuple(steps), rest)


def _content(format: Format, arrays: Mapping[str, Array], about: dict[str, Json]) -> bytes:
    text = json.dumps(about, allow_nan=False, ensure_ascii=False)
    if format == "json":
        whole: dict[str, Json] = {**about, "arrays": {key: array_to_json(array) for key, array in arrays.items()}}
        return json.dumps(whole, allow_nan=False, ensure_ascii=False).encode("utf-8")
    if format == "safetensors":
        from safetensors.numpy import save

        return save(dict(arrays), {_METADATA: text})
    buffer, stored = io.BytesIO(), {_METADATA: np.array(text), **arrays}
    np.savez_compressed(buffer, **stored)  # type: ignore[arg-type]  # numpy's stub takes them for its own options
    return buffer.getvalue()


def _read(format: str, content: bytes) -> tuple[dict[str, Json], dict[str, Array]]:
    if format == "json":
        whole = json.loads(content)
        if not isinstance(whole, dict):
            raise ValueError("it holds no object")
        arrays = whole.pop("arrays", None)
        if not isinstance(arrays, dict):
            raise ValueError("it holds no arrays")
        return whole, {key: array_from_json(value) for key, value in arrays.items()}
    if format == "safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            loaded = load(content)
        except SafetensorError as problem:
            raise ValueError(str(problem)) from problem
        header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
        return json.loads(header.get("__metadata__", {})[_METADATA]), loaded
    if format == "npz":
        import zipfile

        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as stored:
                loaded = {name: stored[name] for name in stored.files}
        except zipfile.BadZipFile as problem:
            raise ValueError(str(problem)) from problem
        return json.loads(str(loaded.pop(_METADATA))), loaded
    raise ValueError(f"a file that ends in {format!r}")
