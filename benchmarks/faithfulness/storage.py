"""Archives of the package index and weights trained here, both kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dlbc_runtime.folders import folder as cache_folder

INDEX = "https://pypi.org/simple"
Model = TypeVar("Model", bound=nn.Module)


def folder() -> Path:
    """The benchmark's folder in dlbc's cache folder, made if need be."""
    found = cache_folder() / "benchmarks"
    found.mkdir(parents=True, exist_ok=True)
    return found


@dataclass(frozen=True)
class Archive:
    """A file of the package index, and what it must hash to."""

    project: str
    file: str
    sha256: str

    def read(self, members: Collection[str]) -> dict[str, bytes]:
        """The files whose path in the archive ends with one of `members`, by that ending.

        They are kept; the archive is not. Nothing in it is run. Raises OSError when it cannot be fetched,
        ValueError when it is not the file that it was or lacks a member.
        """
        kept = folder() / "archives" / self.file
        paths = {member: kept / hashlib.sha256(member.encode()).hexdigest()[:16] for member in members}
        missing = {member for member, path in paths.items() if not path.is_file()}
        if missing:
            kept.mkdir(parents=True, exist_ok=True)
            for member, data in _members(self.file, self._fetched(), missing).items():
                _write(paths[member], data)
        return {member: path.read_bytes() for member, path in paths.items()}

    def _fetched(self) -> bytes:
        page = f"{os.environ.get('PIP_INDEX_URL', INDEX).rstrip('/')}/{self.project}/"
        with urllib.request.urlopen(page, timeout=120) as answer:
            links = re.findall(r'href="([^"#]+)', answer.read().decode())
        link = next((one for one in links if urllib.parse.unquote(one.rsplit("/", 1)[-1]) == self.file), None)
        if link is None:
            raise OSError(f"{page} has no file {self.file}")
        with urllib.request.urlopen(urllib.parse.urljoin(page, link), timeout=600) as answer:
            data: bytes = answer.read()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise ValueError(f"{self.file} is not the file that was measured with: its sha256 differs")
        return data


def trained(name: str, build: Callable[[], Model], train: Callable[[Model], None], *, version: int = 1, seed: int = 0
            ) -> Model:
    """The model of `build`, trained by `train` once and read from the cache afterwards; in eval mode, frozen.

    Both run under their own seed. Raise `version` when either changes.
    """
    path = folder() / "weights" / f"{name}-{version}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        if not path.is_file():
            train(model.train())
            weights = {key: value.detach().contiguous().clone() for key, value in model.state_dict().items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            save_file(weights, part)
            os.replace(part, path)
    with safe_open(path, "pt") as file:
        model.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return model.eval().requires_grad_(False)


def remembered(name: str, make: Callable[[], list[dict[str, object]]]) -> list[dict[str, object]]:
    """Rows of JSON, made once."""
    path = folder() / f"{name}.json"
    if not path.is_file():
        _write(path, json.dumps(make()).encode())
    found: list[dict[str, object]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def fit(model: nn.Module, batches: Callable[[], tuple[torch.Tensor, ...]],
        loss: Callable[..., torch.Tensor], *, steps: int, rate: float, decay: float = 0.01) -> None:
    """Train by AdamW under a one-cycle schedule: `loss(*batches())` at every step."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.15)
    for _ in range(steps):
        optimiser.zero_grad(set_to_none=True)
        loss(*batches()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()


def _members(file: str, data: bytes, wanted: Collection[str]) -> Mapping[str, bytes]:
    found: dict[str, bytes] = {}

    def member(name: str) -> str | None:
        return next((one for one in wanted if f"/{name}".endswith("/" + one)), None)

    if file.endswith((".whl", ".zip")):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                if (key := member(name)) is not None:
                    found.setdefault(key, archive.read(name))
    else:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for entry in tar:
                if entry.isfile() and (key := member(entry.name)) is not None and (part := tar.extractfile(entry)):
                    found.setdefault(key, part.read())
    lacking = sorted(set(wanted) - set(found))
    if lacking:
        raise ValueError(f"{file} holds no {', '.join(lacking)}")
    return found


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
        part.write(data)
    os.replace(part.name, path)
