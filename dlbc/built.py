"""Models made by a function in a user's Python file: `file.py:build`."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from dlbc.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Built:
    """What a `file.py:build` returned: the model, what came second, and names of the classes if they came third."""

    name: str
    model: torch.nn.Module
    second: Any
    labels: Mapping[int, str] = field(default_factory=dict)


def is_built(spec: str) -> bool:
    """Whether a spec names a Python file: `file.py` or `file.py:function`."""
    return spec.endswith(".py") or ".py:" in spec


def load_built(spec: str) -> Built:
    """Call the function of `file.py:function` (default `build`) that makes a model. InputError when it fails."""
    file, _, function = spec.partition(".py:")
    path = Path(file.removesuffix(".py") + ".py").expanduser()
    function = function or "build"
    if not path.is_file():
        raise InputError(f"there is no file {path}", hint="give file.py:function; it returns (model, example_inputs)")
    found = getattr(_module(path), function, None)
    if not callable(found):
        raise InputError(f"`{path.name}` has no function `{function}`", where=str(path),
                         hint=f"define `def {function}(): return model, example_inputs`")
    with _users_code(path, function):
        result = found()
    import torch

    if not isinstance(result, tuple) or len(result) not in (2, 3) or not isinstance(result[0], torch.nn.Module):
        shown = f"({', '.join(type(part).__name__ for part in result)})" if isinstance(result, tuple) else \
            type(result).__name__
        raise InputError(f"`{function}` returned {shown}", where=str(path),
                         hint="it returns (model, example_inputs), and as a third the names of the classes if you like")
    labels = result[2] if len(result) == 3 else {}
    return Built(f"{path.stem}:{type(result[0]).__name__}", result[0].eval(), result[1],
                 dict(labels) if isinstance(labels, Mapping) else dict(enumerate(map(str, labels))))


def _module(path: Path) -> Any:
    """A Python file as a module under its own name; files beside it can be imported by it, as in a script."""
    name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"_dlbc_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    folder = str(path.resolve().parent)
    sys.modules[name] = module
    if folder not in sys.path:
        sys.path.insert(0, folder)
    with _users_code(path, "the file"):
        specification.loader.exec_module(module)
    return module


@contextmanager
def _users_code(path: Path, what: str) -> Iterator[None]:
    """Whatever the user's code raises, as an InputError at the line of theirs where it was."""
    try:
        yield
    except Exception as problem:
        frames = [frame for frame in traceback.extract_tb(problem.__traceback__) if PurePath(frame.filename) in (
            path, path.resolve())]
        line = frames[-1].lineno if frames else getattr(problem, "lineno", None)
        raise InputError(f"{what} failed with {type(problem).__name__}: {first_line(problem)}",
                         where=f"{path}:{line}" if line else str(path), hint="--debug shows the whole traceback"
                         ) from problem


def first_line(problem: BaseException) -> str:
    """The first line of an exception, or its kind when it has no text."""
    return next(iter(str(problem).strip().splitlines()), "") or type(problem).__name__
