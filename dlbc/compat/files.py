"""Saving and loading relevance as DL-Backtrace's functions do it: in numbers as they are, and never as a pickle."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlbc_runtime import tasks_files
from dlbc_runtime.arrays import Array, as_numpy

log = logging.getLogger(__name__)
ROUNDED = ("fp16", "fp8", "fp4")


def format_of(precision: str) -> str:
    """The format of a file: DL-Backtrace's precisions are safetensors, with nothing rounded."""
    name = str(getattr(precision, "value", precision))
    if name not in ROUNDED:
        return name
    log.info("%s: relevance is saved as safetensors in the precision that it has", name)
    return "safetensors"


def save_relevance(relevance_trace: Sequence[Mapping[str, Any]], output_dir: str | os.PathLike[str] =
                   "./relevance_output", precision: str = "safetensors", name: str | None = None, compress: bool = True,
                   metadata: Mapping[str, Any] | None = None, save_metadata_json: bool = True) -> str:
    """Write a relevance trace to a folder and return the file's path.

    `precision`: "safetensors", "json" or "npz"; "fp16", "fp8" and "fp4" are "safetensors", and nothing is rounded.
    `metadata`: JSON data that goes along. `compress` and `save_metadata_json` change nothing: the file holds its
    metadata. InputError for places and formats that cannot be.
    """
    del compress, save_metadata_json
    steps: list[dict[str, Array]] = [{key: as_numpy(value) for key, value in step.items()} for step in relevance_trace]
    path = tasks_files.save_relevance(steps, output_dir, format_of(precision), metadata=metadata,
                                      name=name or "relevance")
    return str(path)


def load_relevance(filepath: str | os.PathLike[str]) -> dict[str, Any]:
    """What was saved: `{"relevance_trace": [{name: array}, ...], "metadata": {...}}`. ArtifactError for other files,
    also those that DL-Backtrace wrote: they are pickles."""
    found = tasks_files.load_relevance(Path(filepath))
    return {"relevance_trace": [dict(step) for step in found.steps], "metadata": dict(found.metadata)}
