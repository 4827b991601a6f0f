"""Compiled kernels as data: what a saved explainer holds of them, and how a machine with a GPU comes to use them.

Triton keeps what it compiles in a folder, under a hash of all that a kernel depends on: Triton's own files, ptxas, the
architecture, the options, the kernel's source and the types of its arguments. A stored kernel carries that hash. Using
it means putting it there (with Triton's own cache manager), where Triton finds it when, and only when, it is about to
compile that very kernel. One that fits nothing on this machine is never found, and compiling goes on as without it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlbc_runtime.arrays import Json
from dlbc_runtime.errors import InputError

if TYPE_CHECKING:
    from dlbc_runtime.triton_launch import Launch

log = logging.getLogger(__name__)

FOLDER = "kernels/"
"""Where a saved explainer holds cubins: `kernels/<hash>.cubin`."""


@dataclass(frozen=True)
class StoredKernel:
    """One compiled kernel. `metadata` is Triton's own description of it, `triton` the version that compiled it."""

    name: str
    arch: str
    triton: str
    hash: str
    metadata: Mapping[str, Json]
    cubin: bytes

    @property
    def entry(self) -> str:
        """The name of its cubin inside a saved explainer."""
        return f"{FOLDER}{self.hash}.cubin"

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a program takes."""
        return int(str(self.metadata["shared"]))

    def to_json(self) -> dict[str, Any]:
        """All but the cubin, as plain JSON data."""
        return {"name": self.name, "arch": self.arch, "triton": self.triton, "hash": self.hash,
                "metadata": dict(self.metadata)}

    @staticmethod
    def from_json(data: Mapping[str, Any], entries: Mapping[str, bytes]) -> StoredKernel:
        """Read what `to_json` wrote; KeyError, TypeError or ValueError for something else. Names become names of files
        in Triton's cache, so they must be plain."""
        name, arch, version, digest, metadata = (data[key] for key in ("name", "arch", "triton", "hash", "metadata"))
        if not (re.fullmatch(r"[A-Za-z_]\w{0,149}", name, re.ASCII) and re.fullmatch(r"sm_\d{2,3}", arch)
                and re.fullmatch(r"[0-9a-f]{64}", digest)):
            raise ValueError(f"kernel {name!r} for {arch!r}")
        if not isinstance(metadata, dict) or not isinstance(version, str) or not isinstance(metadata["shared"], int):
            raise ValueError(f"metadata of kernel {name}")
        return StoredKernel(name, arch, version, digest, metadata, entries[f"{FOLDER}{digest}.cubin"])


def stored(launch: Launch, arch: str) -> StoredKernel:
    """The kernel of a launch, compiled for an NVIDIA architecture (`sm_90`) exactly as a launch on one would have it:
    the hash is that which Triton looks for. Triton's own errors where it does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, target = launch.kernel, GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    backend = make_backend(target)
    given = {**launch.meta, "enable_fp_fusion": True, "debug": kernel.debug or triton.knobs.runtime.debug,
             "instrumentation_mode": triton.knobs.compilation.instrumentation_mode}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*launch.args, **given)
    options, signature, constants, attrs = kernel._pack_args(backend, given, bound, specialization, None)
    made = triton.compile(ASTSource(kernel, signature, constants, attrs), target=target, options=options.__dict__)
    files = {Path(name).suffix: Path(path) for name, path in made.metadata_group.items()}
    metadata = json.loads(files[".json"].read_text())
    metadata["extern_libs"] = []  # paths on the machine that compiled; nothing reads them after
    return StoredKernel(made.metadata.name, arch, triton.__version__, made.hash, metadata, files[".cubin"].read_bytes())


def install(kernels: Sequence[StoredKernel], archs: Collection[str] | None = None) -> int:
    """Put kernels where Triton will find them instead of compiling; returns how many. They are machine code: only those
    of a file whose writer is trusted.

    Only those for the GPUs that are here (or for `archs`) and of the installed version of Triton; why others are left
    is logged. Nothing is an error: what is not there is compiled.
    """
    if not kernels:
        return 0
    here = present() if archs is None else archs
    fitting = [kernel for kernel in kernels if kernel.arch in here]
    if not fitting:
        log.info("the file's kernels are for %s, and the GPUs here are %s: none is used",
                 ", ".join(sorted({k.arch for k in kernels})), ", ".join(sorted(here)) or "none")
        return 0
    try:
        import triton
        from triton.runtime.cache import get_cache_manager
    except ImportError:
        log.info("the file's kernels are not used: Triton is not installed")
        return 0
    right = [kernel for kernel in fitting if kernel.triton == triton.__version__]
    if len(right) < len(fitting):
        log.info("kernels by Triton %s are not used by Triton %s: they are compiled when they first run",
                 ", ".join(sorted({k.triton for k in fitting} - {triton.__version__})), triton.__version__)
    count = 0
    for kernel in right:
        try:
            manager = get_cache_manager(kernel.hash)
            described = f"{kernel.name}.json"
            if manager.get_group(described) is None:
                group = {f"{kernel.name}.cubin": manager.put(kernel.cubin, f"{kernel.name}.cubin"),
                         described: manager.put(json.dumps(kernel.metadata), described, binary=False)}
                manager.put_group(described, group)
            count += 1
        except OSError as problem:
            log.info("Triton's cache cannot be written (%s): kernels are compiled when they first run", problem)
            return count
    log.info("%d kernels of the file are ready for Triton", count)
    return count


def present() -> set[str]:
    """The architectures of the GPUs of this machine."""
    import torch

    if not torch.cuda.is_available() or torch.version.hip is not None:
        return set()
    return {"sm_{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())}


def compile_all(launches: Sequence[Launch], arch: str, limit: int) -> list[StoredKernel]:
    """All distinct kernels of launches, for one architecture whose programs may take `limit` bytes of shared memory.

    InputError naming a kernel that does not compile for it or takes more.
    """
    found: dict[str, StoredKernel] = {}
    for launch in launches:
        name = launch.kernel.__name__
        hint = f'compile the model with target="{arch}", whose tiles fit it, and save that'
        try:
            one = stored(launch, arch)
        except Exception as problem:
            raise InputError(f"kernel {name} does not compile for {arch}: {str(problem)[:200]}", where="kernels",
                             hint=hint) from problem
        if one.shared > limit:
            raise InputError(f"kernel {name} takes {one.shared:,} bytes of shared memory, {arch} has {limit:,}",
                             where="kernels", hint=hint)
        found[one.hash] = one
    return list(found.values())
