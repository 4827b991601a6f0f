"""Compiles recorded launches for GPUs that need not be there, and tells what the compiler made of them.

    with recording() as found:
        module.forward(...)
    for one in distinct(found.launches):
        facts = compiled(one, "cuda", 90, 32)
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlbc_runtime.triton_launch import Launch


@dataclass(frozen=True)
class Facts:
    """What a compiled kernel takes and uses."""

    name: str
    binary: bytes
    """The cubin, or the hsaco."""
    assembly: str
    """PTX, or the AMD GPU's assembly."""
    shared: int
    """Bytes of shared memory."""
    registers: int = 0
    """Registers of a thread; 0: not known."""
    stack: int = 0
    """Bytes of a thread's stack, where it keeps what registers do not hold."""

    @property
    def tensor_cores(self) -> bool:
        """Whether products run on tensor cores."""
        return bool(re.search(r"\b(wgmma|mma)\.|v_mfma|wgmma\.mma_async|mma\.sync", self.assembly))


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[str, bool]]:
    """The types of a launch's arguments, those that are constants in the kernel, and those that are multiples of 16:
    what Triton's own launcher tells the compiler."""
    kernel, types, constants, even = launch.kernel, launch.signature, dict[str, Any](), dict[str, bool]()
    plain = {p.name for p in kernel.params if p.do_not_specialize}
    given = {p.name: arg for p, arg in zip((p for p in kernel.params if p.name not in launch.meta), launch.args,
                                           strict=True)}
    for name, arg in given.items():
        if types[name].startswith("*"):
            even[name] = True
        elif name not in plain and arg == 1:
            types[name], constants[name] = "constexpr", 1
        elif name not in plain and arg % 16 == 0:
            even[name] = True
    constants |= {name: value for name, value in launch.meta.items() if name in kernel.arg_names}
    return types, constants, even


def key(launch: Launch) -> tuple[object, ...]:
    """Equal for launches that run one compiled kernel."""
    types, constants, even = specialised(launch)
    return (launch.kernel.__name__, tuple(types.items()), tuple(sorted(constants.items(), key=str)),
            tuple(sorted(even)), launch.meta.get("num_warps"), launch.meta.get("num_stages"))


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """One launch of each compiled kernel."""
    return list({key(one): one for one in launches}.values())


def compiled(launch: Launch, kind: str, arch: int | str, warp: int) -> Facts:
    """A launch's kernel as compiled for an architecture. Triton's own errors where it does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, even = specialised(launch)
    at = {name: (i,) for i, name in enumerate(launch.kernel.arg_names)}
    source = ASTSource(fn=launch.kernel, signature=types, constexprs={at[n]: v for n, v in constants.items()},
                       attrs={at[name]: [["tt.divisibility", 16]] for name in even})
    options = {name: launch.meta[name] for name in ("num_warps", "num_stages") if name in launch.meta}
    made = triton.compile(source, target=GPUTarget(kind, arch, warp), options={**options, "enable_fp_fusion": True})
    name = launch.kernel.__name__
    if kind != "cuda":
        return Facts(name, made.asm["hsaco"], made.asm["amdgcn"], made.metadata.shared)
    registers, stack = usage(made.asm["cubin"])
    return Facts(name, made.asm["cubin"], made.asm["ptx"], made.metadata.shared, registers, stack)


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, as cuobjdump (which comes with Triton) reads them from a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+).*?STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump says {text!r}")
    return int(found[1]), int(found[2])
