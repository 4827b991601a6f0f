"""Which backend runs where: whether kernels can be written for the GPU that a model is on.

Nothing here changes the GPU's state, and a machine without one imports neither Triton nor a CUDA driver.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dlbc.backends.triton.config import DEVICES, device
from dlbc.errors import InputError

if TYPE_CHECKING:
    import torch

_CPU = 'backend="torch" runs on anything torch runs on'


@dataclass(frozen=True)
class Choice:
    """A backend, and the architecture it writes kernels for ("" where it writes none).

    `trial`: nobody asked for kernels, so they are tried first (`dlbc/trial.py`). `why`: why "auto" chose torch for a
    model that might have had kernels.
    """

    backend: str
    target: str = ""
    trial: bool = False
    why: str = ""


def choose(model: torch.nn.Module, backend: str, target: str | None) -> Choice:
    """The backend that is meant.

    "auto" is Triton, on trial, for a model on a GPU that kernels can be written for; else torch. InputError where
    Triton or C is asked for and cannot be, or where a target has no meaning.
    """
    if backend not in ("auto", "triton"):
        if target is not None:
            raise InputError(f"backend={backend!r} has no target", where="target",
                             hint='leave it out, or say backend="triton"')
        if backend == "c":
            _require_c(model)
        return Choice(backend)
    if target is not None:
        return Choice("triton", device(target).name)
    devices = devices_of(model)
    if backend == "auto":
        return _automatic(devices)
    where = next(iter(devices), None)
    if find_spec("triton") is None:
        raise InputError("backend=\"triton\", and Triton is not installed", where="backend",
                         hint=f"pip install triton; or {_CPU}")
    if where is not None and where.type == "cuda":
        found = supported(where)
        if not found:
            raise InputError(f"kernels cannot be written for {_name(where)}", where="backend",
                             hint=f"they can for {', '.join(DEVICES)}; {_CPU}")
        return Choice("triton", found)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return Choice("triton", "sm_90")
    raise InputError("backend=\"triton\", and the model is not on a GPU", where="target",
                     hint='move the model to one, or name the architecture to compile for: target="sm_90"')


def _require_c(model: torch.nn.Module) -> None:
    """InputError where functions in C cannot be compiled, or the model is not where they run."""
    from dlbc_runtime.c_library import require_compiler

    require_compiler()
    where = next((each for each in devices_of(model) if each.type != "cpu"), None)
    if where is not None:
        raise InputError(f'backend="c", and the model is on {where}', where="backend",
                         hint='move the model to the CPU, or use backend="auto"')


def _automatic(devices: Collection[torch.device]) -> Choice:
    """What "auto" is for a model on these devices."""
    kinds = {where.type for where in devices}
    if "meta" in kinds:
        return Choice("torch", why="the model is on the meta device, where kernels cannot be tried: torch runs it")
    if "cuda" not in kinds:
        return Choice("torch")
    if len(devices) > 1:
        named = ", ".join(sorted(map(str, devices)))
        return Choice("torch", why=f"the model is on {named}, and kernels need it on one GPU: torch runs it")
    (where,) = devices
    if find_spec("triton") is None:
        return Choice("torch", why="there are no kernels: Triton is not installed")
    found = supported(where)
    return Choice("triton", found, trial=True) if found else Choice(
        "torch", why=f"no kernels are written for {_name(where)}: torch runs it")


def devices_of(model: torch.nn.Module) -> list[torch.device]:
    """Where a model's tensors are, each device once; single numbers may be anywhere."""
    return list({x.device: None for x in (*model.parameters(), *model.buffers()) if x.dim()})


def facts(where: torch.device) -> dict[str, str]:
    """What a kernel's numbers may depend on besides its text: the GPU, the driver and Triton's version ("": none)."""
    import torch

    try:
        import triton
    except ImportError:
        version = ""
    else:
        version = str(triton.__version__)
    try:
        driver = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        driver = ""
    level = getattr(torch._C, "_cuda_getDriverVersion", lambda: "")()
    return {"gpu": _name(where), "driver": f"{driver} {level}".strip(), "triton": version}


def usable(where: torch.device) -> bool:
    """Whether the GPU still does what this process asks: after an illegal access of memory it never does again."""
    import torch

    try:
        torch.cuda.synchronize(where)
    except RuntimeError:
        return False
    return True


def supported(where: torch.device) -> str:
    """The architecture whose kernels run on a GPU: its own, or the last one before it that is known; "" for none."""
    import torch

    if torch.version.hip is not None:
        return ""
    major, minor = torch.cuda.get_device_capability(where)
    known = sorted(int(str(each.arch)) for each in DEVICES.values() if each.kind == "cuda")
    below = [arch for arch in known if arch <= major * 10 + minor]
    return f"sm_{below[-1]}" if below else ""


def _name(where: torch.device) -> str:
    import torch

    major, minor = torch.cuda.get_device_capability(where)
    return f"{torch.cuda.get_device_name(where)} (sm_{major}{minor})"
