"""What was found out on this machine, kept beside compiled explainers: small JSON files, which are only read.

A note that is damaged, or that others could have written, is as none. `dlbc.cache.clear()` removes them too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlbc.cache import NOTE
from dlbc_runtime.folders import ours, trusted_folder
from dlbc_runtime.folders import write as keep


def read(name: str) -> dict[str, Any]:
    """The note of that name; empty where there is none."""
    path = _path(name)
    if path is None:
        return {}
    try:
        with path.open("rb") as file:
            found = json.loads(file.read()) if ours(os.fstat(file.fileno())) else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(name: str, data: Mapping[str, Any]) -> None:
    """Keep a note, in place of one of the same name; where that cannot be, it is said once and not raised."""
    path = _path(name)
    if path is not None:
        keep(path, json.dumps(data, indent=1).encode())


def forget(name: str) -> None:
    """Remove a note, if there is one."""
    path = _path(name)
    if path is not None:
        path.unlink(missing_ok=True)


def _path(name: str) -> Path | None:
    folder = trusted_folder()
    return None if folder is None else folder / f"{name}{NOTE}"
