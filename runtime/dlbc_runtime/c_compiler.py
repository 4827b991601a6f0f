"""The machine's C compiler: which it is, what it is asked, and what its answer depends on."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dlbc_runtime.errors import InputError, KernelError

FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
         "-ffp-contract=off", "-Werror=implicit-function-declaration")
"""Never -ffast-math: NaN and infinity are meant. Nor may `a * b - c * d` be contracted, which is 0 where both products
are equal."""
NATIVE = (("-march=native",), ("-mcpu=native",), ())
"""Asked one after the other, where the compiler does not know the one before: for this very CPU, or for any."""
FACTS = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "features", "isa", "cpu", "machine",
         "CPU implementer", "CPU architecture", "CPU variant", "CPU part")
"""The lines of /proc/cpuinfo that tell CPUs apart, on all architectures."""


def compiler() -> str | None:
    """The path of the C compiler: the program in CC where that is set, else the first of cc, gcc and clang on the PATH;
    None where there is none, and on Windows, whose compilers are called otherwise."""
    found = command()
    return found[0] if found else None


def command() -> tuple[str, ...] | None:
    """The compiler with the arguments that CC gives it; None where there is none."""
    if sys.platform == "win32":
        return None
    stated = os.environ.get("CC", "").strip()
    if not stated:
        path = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        return (path,) if path else None
    try:
        program, *arguments = shlex.split(stated)
    except ValueError:  # a quote that is not closed
        return None
    path = shutil.which(program)
    return (path, *arguments) if path else None


def require_compiler() -> None:
    """InputError where there is no C compiler."""
    if compiler() is None:
        raise InputError(missing(), where='backend="c"', hint=REMEDY)


REMEDY = 'install gcc or clang, set CC to a compiler, or compile with backend="torch"'


def missing() -> str:
    """Why there is no C compiler."""
    if sys.platform == "win32":
        return "kernels in C are made on Linux and macOS only"
    stated = os.environ.get("CC", "").strip()
    return f"CC is {stated!r}, which is no program here" if stated else "there is no C compiler (cc, gcc, clang)"


def facts(command: Sequence[str]) -> tuple[str, ...]:
    """What the compiler's answer depends on beside the source. The compiler is known by its file, so that no process
    must be started to ask for its version."""
    file = os.path.realpath(command[0])
    status = os.stat(file)
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else ""
    return (*command, file, str(status.st_size), str(status.st_mtime_ns), *FLAGS, *sum(NATIVE, ()), sys.platform,
            platform.machine(), libc or "", cpu())


@functools.cache
def cpu() -> str:
    """What "native" means on this machine: the CPU's model and its instruction sets; "" where that cannot be told, and
    code is made for any CPU of its kind."""
    if sys.platform == "darwin":
        names = ("machdep.cpu.brand_string", "machdep.cpu.features", "machdep.cpu.leaf7_features")
        return subprocess.run(["/usr/sbin/sysctl", "-n", *names], capture_output=True, text=True, check=False).stdout
    found = list[str]()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip() and found:
                    break  # the CPUs of a machine are alike, and there may be hundreds
                if line.partition(":")[0].strip() in FACTS:
                    found.append(line)
    except OSError:
        return ""
    return "".join(found)


def compiled(source: str, command: Sequence[str]) -> bytes:
    """The shared library made of a C source. KernelError, with all that the compiler said, where it refuses; OSError
    where it does not run or its result cannot be written."""
    with tempfile.TemporaryDirectory(prefix="dlbc-") as folder:
        made = Path(folder) / "kernels.so"
        said = ""
        for native in NATIVE if cpu() else NATIVE[-1:]:
            done = subprocess.run([*command, *FLAGS, *native, "-x", "c", "-", "-o", str(made), "-lm"], input=source,
                                  env={**os.environ, "LC_ALL": "C"}, capture_output=True, encoding="utf-8",
                                  errors="replace", check=False)
            if not done.returncode:
                return made.read_bytes()
            said = done.stderr.strip() or f"{command[0]} ended with {done.returncode}"
            if "native" not in said:
                break
    raise KernelError(said)
