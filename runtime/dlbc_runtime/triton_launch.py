"""How generated code launches its Triton kernels.

`launch` is what every launch goes through. Under `recording()` nothing runs: launches are noted, with the arguments'
element types, so that kernels can be compiled for architectures that are not there. With TRITON_INTERPRET=1, set before
Triton is imported, kernels run in Triton's interpreter, on a CPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dlbc_runtime.errors import InputError, KernelError

log = logging.getLogger(__name__)

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
"""Whether kernels run in the interpreter: Triton itself decides at import."""

WIDE = 2**31 - 1
"""Offsets beyond this do not fit into 32 bits."""


_failed: set[Any] = set()
"""Kernels that did not compile: they are not tried again."""


@dataclass
class Launch:
    """A launch as it was recorded."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: Mapping[str, Any]

    @property
    def signature(self) -> dict[str, str]:
        """Triton's types of the arguments, by name."""
        names = [name for name in self.kernel.arg_names if name not in self.meta]
        return {**{name: kind(arg) for name, arg in zip(names, self.args, strict=True)},
                **{name: "constexpr" for name in self.kernel.arg_names if name in self.meta}}


@dataclass
class Recording:
    """What was launched while it lasted."""

    launches: list[Launch] = field(default_factory=list)


_recording: list[Recording] = []
_collecting: list[list[str]] = []


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """Note launches instead of running them: results hold whatever was in their memory."""
    found = Recording()
    _recording.append(found)
    try:
        yield found
    finally:
        _recording.remove(found)


@contextlib.contextmanager
def failures() -> Iterator[list[str]]:
    """Collect what is said of kernels that do not compile, instead of logging it."""
    found: list[str] = []
    _collecting.append(found)
    try:
        yield found
    finally:
        _collecting.remove(found)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run a kernel on a grid of programs. InputError where there is no GPU to run it on."""
    meta |= widths(kernel, args)
    if _recording:
        _recording[-1].launches.append(Launch(kernel, grid, args, meta))
        return
    if not grid[0]:
        return
    if kernel in _failed:
        raise KernelError(kernel.__name__)
    try:
        run(kernel, grid, args, meta)
    except KernelError as failure:
        _failed.add(kernel)
        problem = failure.__cause__ or failure
        said = str(problem).splitlines()[0][:200] if str(problem) else type(problem).__name__
        file = _reproducer(Launch(kernel, grid, args, meta), problem)
        if _collecting:
            _collecting[-1].append(f"kernel {kernel.__name__} does not compile ({said}), see {file}")
        else:
            log.warning("kernel %s does not compile (%s); its ops run in torch one by one, which is slower. Please "
                        "report it with the file %s", kernel.__name__, said, file)
        raise


def widths(kernel: Any, args: Sequence[Any]) -> dict[str, Any]:
    """Of a kernel that asks for it: whether offsets do not fit into 32 bits."""
    if "WIDE" not in kernel.arg_names:
        return {}
    return {"WIDE": any(type(arg) is torch.Tensor and _extent(arg) > WIDE for arg in args)}


def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: Mapping[str, Any]) -> None:
    """Run a kernel now. KernelError, and nothing else is said, where it does not compile."""
    if not INTERPRETED and not _on_gpu(args):
        raise InputError("this explainer's kernels are written for a GPU, and its inputs are not on one",
                         where="backend=\"triton\"",
                         hint="move the model and its inputs to a GPU, or compile with backend=\"torch\"")
    if INTERPRETED:
        exact = {"PRECISION": "ieee"} if "PRECISION" in meta else {}  # the interpreter knows no other, and needs none
        kernel[grid](*args, **{**meta, **exact})
        return
    where = args[0].device
    elsewhere = where.type == "cuda" and where.index != torch.cuda.current_device()
    try:
        with torch.cuda.device(where) if elsewhere else contextlib.nullcontext():
            kernel[grid](*args, **meta, enable_fp_fusion=True)
    except Exception as problem:
        if not _is_compilation(problem):
            raise
        raise KernelError(kernel.__name__) from problem


def _is_compilation(problem: Exception) -> bool:
    """Whether a kernel failed before it ran. InputError where the driver is the reason, which no other code would
    change."""
    text = str(problem)
    if "unsupported toolchain" in text or "driver version is insufficient" in text:
        raise InputError(f"the GPU's driver is too old for this Triton: {text.splitlines()[0]}", where="triton",
                         hint='update the driver, install an older Triton, or compile with backend="torch"'
                         ) from problem
    names = {each.__name__ for each in type(problem).__mro__}
    return bool(names & {"TritonError", "CompilationError", "OutOfResources", "PTXASError"}) or (
        type(problem).__module__.startswith("triton")) or "PassManager" in text or "ptxas" in text


def _reproducer(failed: Launch, problem: BaseException) -> str:
    """A file with all that is needed to see the failure again: source, types, options and the error."""
    import tempfile

    text = "\n".join([f"# {line}" for line in (
        f"kernel {failed.kernel.__name__}", f"grid {failed.grid}", f"signature {failed.signature}",
        f"options {dict(failed.meta)}", *str(problem).splitlines())]) + "\n\n"
    text += "import triton\nimport triton.language as tl\nfrom dlbc_runtime import triton_math as math\n\n\n"
    text += str(getattr(failed.kernel, "raw_src", None) or getattr(failed.kernel, "src", ""))
    with tempfile.NamedTemporaryFile("w", prefix=f"dlbc-{failed.kernel.__name__}-", suffix=".py", delete=False) as file:
        file.write(text)
    return file.name


def blocks(rows: int, height: int, columns: int = 1, width: int = 1) -> tuple[int, ...]:
    """The grid of programs that each write `height` rows and `width` columns."""
    return (-(-rows // height) * -(-columns // width),)


def expert_blocks(rows: int, seeds: int, experts: int, height: int, columns: int, width: int) -> tuple[int, ...]:
    """The grid of programs that each write `height` rows of one expert and `width` columns: enough for any routing of
    `rows` rows (of each seed) to experts, of which each that has rows may leave one tile unfilled."""
    tiles = (rows * seeds + min(rows, experts) * (height - 1)) // height
    return (tiles * -(-columns // width),)


def chosen(tiles: Sequence[tuple[int | None, dict[str, Any]]], size: int) -> dict[str, Any]:
    """The first tile that is for a size, of a table whose last is for all."""
    for bound, tile in tiles:
        if bound is None or size <= bound:
            return tile
    return tiles[-1][1]


def kind(arg: Any) -> str:
    """Triton's type of an argument."""
    if isinstance(arg, torch.Tensor):
        return f"*{_KINDS[arg.dtype]}"
    if isinstance(arg, float):
        return "fp32"
    return "i32" if -2**31 <= arg < 2**31 else "i64"


_KINDS = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
          torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
          torch.bool: "i1"}


def _extent(x: torch.Tensor) -> int:
    """How far the last element is from the first, in elements."""
    return x.numel() if x.is_contiguous() else sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1


def _on_gpu(args: Sequence[Any]) -> bool:
    return all(arg.is_cuda for arg in args if type(arg) is torch.Tensor)
