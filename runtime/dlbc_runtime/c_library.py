"""How generated modules get functions written in C: compiled once by the machine's compiler, and kept.

    C = library("...", {"f0": (1, 7)})  # a function of 1 size and 7 pointers
    C.f0(len(x), x.data_ptr(), ...)

Sources may call what `c_math.h` defines. Binaries are kept in the compile cache's folder whatever the user says of
keeping explainers: they are found by what they are made of (source, compiler, flags, CPU), never by a model, so a stale
one cannot be found. Without a folder that is the user's alone they are compiled for this process only.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlbc_runtime import c_compiler
from dlbc_runtime.c_compiler import compiler, require_compiler
from dlbc_runtime.errors import KernelError
from dlbc_runtime.folders import ours, say_once, trusted_folder, write

__all__ = ["BINARIES", "KernelError", "Library", "compiler", "library", "require_compiler"]
log = logging.getLogger(__name__)

Function = Callable[..., object]
Counts = Mapping[str, tuple[int, int]]
"""Functions by name: how many sizes, and then how many pointers each takes."""

MATH = Path(__file__).with_name("c_math.h")
"""What stands before every source."""

BINARIES = "c-*.so"
"""The names of binaries in the cache folder: c-KEY-DIGEST.so, by what it is made of and by what it holds."""

_opened: dict[str, Library] = {}
"""What this process has loaded, by key. What does not compile is not tried again."""


class Library:
    """C functions as attributes: called with sizes and addresses (int).

    MemoryError where a function has no memory for what it needs; KernelError where there is no compiled function.
    Other threads run meanwhile. Addresses are not checked: generated code gives those of contiguous tensors on the CPU
    that it holds.
    """

    def __init__(self, functions: Mapping[str, Function]) -> None:
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Function:
        raise AttributeError(f"the library has no function {name!r}")


def library(source: str, functions: Counts) -> Library:
    """The functions of a C source, by name with how many int64 sizes and then pointers each takes.

    They return int32: 0, or 1 where memory is short. Compiled now, unless an earlier process has; where that cannot be,
    it is logged once, and the functions raise KernelError.
    """
    command = c_compiler.command()
    if command is None:
        say_once(log, f"{c_compiler.missing()}: ops run in torch one by one, which is slower; {c_compiler.REMEDY}")
        return _absent(functions)
    whole = f"{MATH.read_text(encoding='utf-8')}\n{source}"
    key = _key(whole, functions, command)
    if key not in _opened:
        _opened[key] = _open(key, whole, command, functions)
    return _opened[key]


def _key(source: str, functions: Counts, command: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in (*c_compiler.facts(command), str(dict(functions)), source):
        digest.update(f"{len(part)} {part}".encode())
    return digest.hexdigest()


def _open(key: str, source: str, command: Sequence[str], functions: Counts) -> Library:
    """The library, from the cache or compiled. Where it does not compile, or cannot be loaded, that is said, with a
    file to see it again."""
    folder = trusted_folder()
    for path in sorted(folder.glob(f"c-{key}-*.so")) if folder else ():
        content = _read(path)
        if content is not None:
            try:
                return _load(content, path, functions)
            except OSError as problem:  # such as made for another libc
                say_once(log, f"{path} cannot be loaded ({problem}); compiling it again")
    said, report = "", ""
    try:
        content = c_compiler.compiled(source, command)
        kept = folder / _name(key, content) if folder else None
        if kept:
            write(kept, content)
        return _load(content, kept, functions)
    except OSError as problem:
        said = str(problem)
    except KernelError as problem:
        lines = str(problem).splitlines()
        said = next((line for line in lines if "error" in line), lines[0])
        report = _reproducer(key, source, [*command, *c_compiler.FLAGS], lines)
    log.warning("kernels in C cannot be made (%s); their ops run in torch one by one, which is slower%s", said[:200],
                report and f". Please report it with the file {report}")
    return _absent(functions)


def _name(key: str, content: bytes) -> str:
    return f"c-{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _read(path: Path) -> bytes | None:
    """A binary of the cache; None, said, where others could have written it or it is damaged: a library that is cut
    short would end the process."""
    try:
        with path.open("rb") as file:
            trusted, content = ours(os.fstat(file.fileno())), file.read()
    except FileNotFoundError:
        return None
    except OSError as problem:
        say_once(log, f"{path} cannot be read ({problem.strerror}); compiling it again")
        return None
    if not trusted or not path.stem.endswith(_name("", content)[3:-3]):
        fact = "is damaged" if trusted else "could have been written by others"
        say_once(log, f"{path} {fact}; compiling it again")
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    return content


def _load(content: bytes, path: Path | None, functions: Counts) -> Library:
    """A binary as a library: from its file, or, where there is none or its folder must not be executed from, from one
    that is there only meanwhile. OSError where it cannot be loaded."""
    if path is not None:
        try:
            return Library(_bound(ctypes.CDLL(str(path)), functions))
        except OSError as problem:
            log.info("%s: %s", path, problem)
    with tempfile.TemporaryDirectory(prefix="dlbc-") as folder:
        file = Path(folder) / "kernels.so"
        file.write_bytes(content)
        return Library(_bound(ctypes.CDLL(str(file)), functions))


def _bound(opened: ctypes.CDLL, functions: Counts) -> dict[str, Function]:
    """The functions of an opened library. KernelError where it has not one of them."""
    found: dict[str, Function] = {}
    for name, (sizes, pointers) in functions.items():
        try:
            function = opened[name]
        except AttributeError as problem:
            raise KernelError(f"error: {problem}") from problem
        function.argtypes = [ctypes.c_int64] * sizes + [ctypes.c_void_p] * pointers
        function.restype, function.errcheck = ctypes.c_int32, _checked
        found[name] = function
    return found


def _checked(result: Any, *_: object) -> Any:
    if result:
        raise MemoryError("there is no memory for what a kernel in C needs")
    return result


def _absent(names: Counts) -> Library:
    def absent(name: str) -> Function:
        def function(*arguments: int) -> None:
            raise KernelError(name)

        return function

    return Library({name: absent(name) for name in names})


def _reproducer(key: str, source: str, command: Sequence[str], lines: Sequence[str]) -> str:
    """A file with all that is needed to see the failure again: the source, the command and what it said; "" where it
    cannot be written."""
    text = "".join(f"// {line}\n" for line in (shlex.join(command), *lines)) + f"\n{source}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix=f"dlbc-{key[:8]}-", suffix=".c", delete=False,
                                         encoding="utf-8") as file:
            file.write(text)
    except OSError:
        return ""
    return file.name
