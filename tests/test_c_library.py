"""Functions written in C: compiled once, found again, never trusted from others, and never in the way."""

from __future__ import annotations

import ctypes
import logging
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlbc import cache
from dlbc_runtime import c_compiler, c_library, folders
from dlbc_runtime.c_library import KernelError, Library, compiler, library, require_compiler
from dlbc_runtime.errors import InputError

ROOT = Path(__file__).parents[1]
COMPILER = compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler on this machine")

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <unistd.h>

int32_t scaled(int64_t n, int64_t by, const float *x, const int64_t *shift, float *y) {
    for (int64_t i = 0; i < n; i++) y[i] = (float)by * x[i] + (float)shift[i];
    return 0;
}

int32_t not_finite(int64_t n, const float *x, int64_t *count) {
    for (int64_t i = 0; i < n; i++) {
        count[0] += isnan(x[i]) != 0;
        count[1] += isinf(x[i]) != 0;
        count[2] += x[i] != x[i];
        count[3] += 1.0f / x[i] == 0.0f;
    }
    return 0;
}

int32_t full(int64_t n) { return n > 10; }

int32_t nothing(void) { return 0; }

int32_t meet(int64_t tries, volatile int32_t *mine, volatile int32_t *other) {
    for (*mine = 1; !*other && tries; tries--) usleep(1000);
    return !*other;
}
"""
FUNCTIONS = {"scaled": (2, 3), "not_finite": (1, 2), "full": (1, 0), "nothing": (0, 0), "meet": (1, 2)}
BROKEN = "#include <stdint.h>\nint32_t broken(int64_t n) { return undeclared; }\n"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As in a process that has just begun, with a folder of its own for temporary files."""
    monkeypatch.setattr(c_library, "_opened", {})
    folders.say_once.cache_clear()
    found = tmp_path / "temporary"
    found.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(found))
    return found


def made() -> Library:
    return library(SOURCE, FUNCTIONS)


def forgotten() -> None:
    """As if another process came."""
    c_library._opened.clear()


def runs(functions: Library) -> bool:
    x, shift, y = np.arange(5, dtype=np.float32), np.arange(5) - 2, np.empty(5, np.float32)
    functions.scaled(5, 3, x.ctypes.data, shift.ctypes.data, y.ctypes.data)
    return bool((y == 3 * x + shift).all())


def binaries(cache_dir: Path) -> list[Path]:
    return sorted(cache_dir.iterdir()) if cache_dir.exists() else []


def script(path: Path, before: str = "") -> str:
    """A compiler that notes what it is asked in `path`.log."""
    path.write_text(f'#!/bin/sh\necho "$@" >> "{path}.log"\n{before}\nexec "{COMPILER}" "$@"\n')
    path.chmod(0o755)
    return str(path)


def asked(path: str) -> list[str]:
    """How the script was called so far."""
    log = Path(f"{path}.log")
    return log.read_text().splitlines() if log.exists() else []


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# What the functions do


def test_values() -> None:
    functions = made()
    assert runs(functions)
    x, counts = np.array([0.0, np.nan, np.inf, -np.inf, 1e-38], np.float32), np.zeros(4, np.int64)
    functions.not_finite(5, x.ctypes.data, counts.ctypes.data)
    assert counts.tolist() == [1, 2, 1, 2], "NaN and infinity are meant"
    functions.nothing()


def test_memory_that_is_short() -> None:
    functions = made()
    functions.full(10)
    with pytest.raises(MemoryError, match="no memory for what a kernel in C needs"):
        functions.full(11)


@pytest.mark.parametrize("arguments", [(), ("1",), (None,)])
def test_wrong_arguments_are_errors(arguments: tuple[Any, ...]) -> None:
    functions = made()
    with pytest.raises((TypeError, ctypes.ArgumentError)):
        functions.full(*arguments)
    functions.full(1)
    with pytest.raises(AttributeError, match="no function 'other'"):
        functions.other()


def test_numbers_of_all_sizes_arrive() -> None:
    functions = library("#include <stdint.h>\nint32_t put(int64_t n, int64_t *y) { *y = n; return 0; }\n",
                        {"put": (1, 1)})
    y = np.empty(1, np.int64)
    for number in (-1, 0, -2**63, 2**63 - 1, True):
        functions.put(number, y.ctypes.data)
        assert y[0] == number


def test_names_are_the_librarys_own() -> None:
    """Also where the process has a function of that name: this one is of libc."""
    functions = library("#include <stdint.h>\nint32_t getpagesize(void) { return 1; }\n", {"getpagesize": (0, 0)})
    with pytest.raises(MemoryError):
        functions.getpagesize()
    other = library("#include <stdint.h>\nint32_t getpagesize(void) { return 0; }\n", {"getpagesize": (0, 0)})
    other.getpagesize()


def test_threads_call_at_once() -> None:
    """Each waits for the other: with Python's lock held, neither would ever see it."""
    functions, flags, errors = made(), np.zeros(2, np.int32), []

    def call(mine: int, other: int) -> None:
        try:
            functions.meet(10_000, flags[mine:].ctypes.data, flags[other:].ctypes.data)
        except MemoryError as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=pair) for pair in ((0, 1), (1, 0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_one_error_for_all_kernels() -> None:
    """Generated modules of both backends catch it, and none needs torch for it."""
    from dlbc_runtime import triton_launch

    assert triton_launch.KernelError is KernelError


# Kept and found


RUN = f"""
import ctypes
from dlbc_runtime.c_library import library
x, shift, y = (ctypes.c_float * 3)(1.0, 2.0, 3.0), (ctypes.c_int64 * 3)(-1, 0, 1), (ctypes.c_float * 3)()
library({SOURCE!r}, {FUNCTIONS!r}).scaled(3, 5, *map(ctypes.addressof, (x, shift, y)))
print(list(y))
"""
RIGHT = ("[4.0, 10.0, 16.0]\n", "")


def process(code: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "runtime")])
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_second_process_starts_no_compiler(cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = script(tmp_path / "counted")
    monkeypatch.setenv("CC", counted)
    assert runs(made()) and made() is made()
    assert len(asked(counted)) == 1 and len(binaries(cache_dir)) == 1
    assert process(RUN).communicate(timeout=120) == RIGHT
    assert len(asked(counted)) == 1


def test_two_processes_at_once(cache_dir: Path) -> None:
    running = [process(RUN) for _ in range(2)]
    assert [one.communicate(timeout=120) for one in running] == [RIGHT] * 2
    assert len(binaries(cache_dir)) == 1


def test_importing_it_is_light() -> None:
    code = "import dlbc_runtime.c_library, sys; print([m for m in ('torch', 'numpy', 'dlbc') if m in sys.modules])"
    assert process(code).communicate(timeout=120) == ("[]\n", "")


def test_what_is_kept_is_the_users_alone_and_nothing_else_is(cache_dir: Path, fresh: Path) -> None:
    before = os.umask(0)
    try:
        made()
    finally:
        os.umask(before)
    (binary,) = binaries(cache_dir)
    assert stat.S_IMODE(cache_dir.stat().st_mode) == 0o700 and stat.S_IMODE(binary.stat().st_mode) == 0o600
    assert not list(fresh.iterdir())


@pytest.mark.parametrize("change", ["source", "functions", "cpu", "flags", "compiler", "arguments", "machine"])
def test_what_it_is_found_by(change: str, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made()
    source, functions = SOURCE, FUNCTIONS
    if change == "source":
        source = SOURCE + "\n"
    elif change == "functions":
        functions = {name: FUNCTIONS[name] for name in ("scaled", "full")}
    elif change == "cpu":
        monkeypatch.setattr(c_compiler, "cpu", lambda: "another CPU")
    elif change == "flags":
        monkeypatch.setattr(c_compiler, "FLAGS", (*c_compiler.FLAGS, "-O1"))
    elif change == "machine":
        monkeypatch.setattr(c_compiler.platform, "machine", lambda: "another machine")
    else:
        monkeypatch.setenv("CC", script(tmp_path / "other") if change == "compiler" else f"{COMPILER} -g0")
    assert runs(library(source, functions))
    assert len(binaries(cache_dir)) == 2


def test_a_compiler_that_was_replaced_is_another(cache_dir: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = script(tmp_path / "replaced")
    monkeypatch.setenv("CC", replaced)
    made()
    script(tmp_path / "replaced", "# a new version")
    assert runs(made()) and len(asked(replaced)) == 2


def test_clear_removes_binaries(cache_dir: Path) -> None:
    made()
    (cache_dir / ".c-abc-def.so.0123").write_text("half written")
    (cache_dir / "c-others.txt").write_text("the user's own")
    assert cache.clear() == 0
    assert [path.name for path in binaries(cache_dir)] == ["c-others.txt"]


# Damage, and others


def _cut(content: bytes) -> bytes:
    return content[:-4096]


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1:]


def _empty(content: bytes) -> bytes:
    return b""


def _same(content: bytes) -> bytes:
    return content


def put(path: Path, content: bytes, mode: int = 0o600) -> None:
    """A file in the place of another: what is written into a library that this process runs would end it."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    path.chmod(mode)


@pytest.mark.parametrize(("damage", "mode", "fact"), [
    (_cut, 0o600, "is damaged"), (_flipped, 0o600, "is damaged"), (_empty, 0o600, "is damaged"),
    (_same, 0o666, "could have been written by others"), (_same, 0o620, "could have been written by others")])
def test_binaries_that_cannot_be_used_are_made_again(damage: Callable[[bytes], bytes], mode: int, fact: str,
                                                     cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     caplog: pytest.LogCaptureFixture) -> None:
    counted = script(tmp_path / "counted")
    monkeypatch.setenv("CC", counted)
    made()
    (binary,) = binaries(cache_dir)
    put(binary, damage(binary.read_bytes()), mode)
    forgotten()
    assert runs(made()) and len(asked(counted)) == 2
    (said,) = warnings(caplog)
    assert fact in said and "compiling it again" in said
    forgotten()
    assert runs(made()) and len(asked(counted)) == 2, "it was mended"
    assert binaries(cache_dir) == [binary] and len(warnings(caplog)) == 1


def test_a_binary_that_does_not_load_here(cache_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whole, but made where another libc is: it stays for that machine, and this one has its own."""
    made()
    (binary,) = binaries(cache_dir)
    content = b"not for this machine"
    other = cache_dir / c_library._name(binary.name.split("-")[1], content)
    binary.unlink()
    put(other, content)
    forgotten()
    assert runs(made()) and set(binaries(cache_dir)) == {binary, other}
    assert ["cannot be loaded" in said for said in warnings(caplog)] == [True]


def test_a_folder_in_the_place_of_a_binary(cache_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    made()
    (binary,) = binaries(cache_dir)
    binary.unlink()
    binary.mkdir()
    forgotten()
    assert runs(made()) and "cannot be read (Is a directory)" in warnings(caplog)[0]


def test_a_folder_that_others_can_write_is_not_used(cache_dir: Path, fresh: Path,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    cache_dir.mkdir()
    cache_dir.chmod(0o777)
    for _ in range(2):
        forgotten()
        assert runs(made())
    assert not binaries(cache_dir) and not list(fresh.iterdir())
    assert ["can be written by others" in said for said in warnings(caplog)] == [True]


def test_a_folder_that_must_not_be_executed_from(cache_dir: Path, tmp_path: Path, fresh: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """The binary is kept there all the same, and compiled once."""
    real = ctypes.CDLL

    def mounted(path: str) -> ctypes.CDLL:
        if path.startswith(str(cache_dir)):
            raise OSError("failed to map segment from shared object: Operation not permitted")
        return real(path)

    counted = script(tmp_path / "counted")
    monkeypatch.setenv("CC", counted)
    monkeypatch.setattr(ctypes, "CDLL", mounted)
    for _ in range(2):
        forgotten()
        assert runs(made())
    assert len(asked(counted)) == 1 and len(binaries(cache_dir)) == 1 and not list(fresh.iterdir())


# No compiler, or one that refuses


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, cache_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert compiler() is None
    for _ in range(2):
        with pytest.raises(KernelError, match="full"):
            made().full(1)
    (said,) = warnings(caplog)
    assert said.startswith("there is no C compiler (cc, gcc, clang): ops run in torch") and "install gcc" in said
    with pytest.raises(InputError) as error:
        require_compiler()
    assert error.value.where == 'backend="c"' and "no C compiler" in error.value.fact
    assert all(remedy in error.value.hint for remedy in ("install gcc or clang", "CC", 'backend="torch"'))
    assert not binaries(cache_dir)


@pytest.mark.parametrize("stated", ["no-such-compiler -O2", "gcc 'unclosed"])
def test_cc_that_is_no_program(stated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another compiler than the one that was asked for is not taken."""
    monkeypatch.setenv("CC", stated)
    assert compiler() is None
    with pytest.raises(InputError, match="which is no program here") as error:
        require_compiler()
    assert stated.split(maxsplit=1)[0] in str(error.value)


def test_windows_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert compiler() is None
    with pytest.raises(InputError, match="on Linux and macOS only"):
        require_compiler()


def test_the_first_compiler_of_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("clang", "gcc", "cc"):
        script(tmp_path / name)
        monkeypatch.setenv("CC", " ")
        monkeypatch.setenv("PATH", str(tmp_path))
        assert compiler() == str(tmp_path / name)
    require_compiler()


def test_cc_with_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = script(tmp_path / "with a space")
    monkeypatch.setenv("CC", f"'{counted}' -DBY=7 -g0")
    functions = library("#include <stdint.h>\nint32_t put(int32_t *y) { *y = BY; return 0; }\n", {"put": (0, 1)})
    y = np.zeros(1, np.int32)
    functions.put(y.ctypes.data)
    assert compiler() == counted and y[0] == 7
    assert asked(counted)[0].startswith("-DBY=7 -g0 -std=gnu11 -O3") and "fast-math" not in asked(counted)[0]


REFUSAL = """case "$*" in *{}*) echo "error: unknown target CPU 'native'" >&2; exit 1;; esac"""


@pytest.mark.parametrize(("refused", "calls"), [("nothing", 1), ("-march=native", 2), ("=native", 3)])
def test_a_compiler_that_does_not_know_native(refused: str, calls: int, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    picky = script(tmp_path / "picky", REFUSAL.format(refused))
    monkeypatch.setenv("CC", picky)
    assert runs(made())
    assert len(asked(picky)) == calls and refused not in asked(picky)[-1]


def test_a_cpu_that_cannot_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled then runs on any CPU of its kind, for it may be found on another."""
    counted = script(tmp_path / "counted")
    monkeypatch.setenv("CC", counted)
    monkeypatch.setattr(c_compiler, "cpu", lambda: "")
    assert runs(made())
    assert len(asked(counted)) == 1 and "native" not in asked(counted)[0]


def test_the_cpu_is_told_by_its_instructions() -> None:
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("not Linux")
    told = c_compiler.cpu()
    assert any(line.startswith(("flags", "Features", "isa", "features", "cpu")) for line in told.splitlines())
    assert "MHz" not in told and "bogomips" not in told.lower(), "the same in every process"


def test_a_source_that_does_not_compile(tmp_path: Path, fresh: Path, cache_dir: Path,
                                        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    counted = script(tmp_path / "counted")
    monkeypatch.setenv("CC", counted)
    for _ in range(2):
        functions = library(BROKEN, {"broken": (1, 0)})
        with pytest.raises(KernelError, match="broken"):
            functions.broken(1)
    assert len(asked(counted)) == 1 and not binaries(cache_dir)
    (said,), (file,) = warnings(caplog), list(fresh.iterdir())
    assert "error: 'undeclared' undeclared" in said or "use of undeclared identifier" in said
    assert said.endswith(f"Please report it with the file {file}") and file.suffix == ".c"
    assert BROKEN in file.read_text() and counted in file.read_text().splitlines()[0]


def test_a_source_without_a_function(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    functions = library("#include <stdint.h>\nint32_t here(void) { return 0; }\n", {"here": (0, 0), "gone": (0, 0)})
    with pytest.raises(KernelError):
        functions.here()
    (said,), (file,) = warnings(caplog), list(fresh.iterdir())
    assert "gone" in said and str(file) in said


def test_a_compiler_that_cannot_be_run(tmp_path: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch,
                                       caplog: pytest.LogCaptureFixture) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\0no program")
    program.chmod(0o755)
    monkeypatch.setenv("CC", str(program))
    with pytest.raises(KernelError):
        made().full(1)
    (said,) = warnings(caplog)
    assert "cannot be made" in said and "format" in said.lower() and not list(fresh.iterdir())
