"""Which backend runs where: whether kernels can be written for the GPU that a model is on.

Nothing here changes the GPU's state, and a machine without one imports neither Triton nor a CUDA driver.
"""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from dlbc.backends.triton.config import DEVICES, device
from dlbc.errors import InputError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
_CPU = 'backend="torch" runs on anything torch runs on'

AUTOMATIC = False
"""Whether "auto" is Triton for a model on a GPU. Its kernels have been interpreted and compiled, and none has run on a
GPU yet: that decides (`make gpu-test`)."""


def choose(model: torch.nn.Module, backend: str, target: str | None) -> tuple[str, str]:
    """The backend that is meant, and the architecture it writes kernels for ("" where it writes none).

    "auto" is torch; and, once `AUTOMATIC`, Triton for a model on a GPU that kernels can be written for.
    InputError where Triton is asked for and cannot be, or where a target has no meaning.
    """
    if backend not in ("auto", "triton"):
        if target is not None:
            raise InputError(f"backend={backend!r} has no target", where="target",
                             hint='leave it out, or say backend="triton"')
        return backend, ""
    if target is not None:
        return "triton", device(target).name
    where = _device_of(model)
    if backend == "auto":
        if where.type != "cuda" or not AUTOMATIC:
            return "torch", ""
        found = _supported(where)
        if find_spec("triton") is None or not found:
            log.info("no kernels are written for %s: torch runs everything", where)
            return "torch", ""
        return "triton", found
    if find_spec("triton") is None:
        raise InputError("backend=\"triton\", and Triton is not installed", where="backend",
                         hint=f"pip install triton; or {_CPU}")
    if where.type == "cuda":
        found = _supported(where)
        if not found:
            raise InputError(f"kernels cannot be written for {_name(where)}", where="backend",
                             hint=f"they can for {', '.join(DEVICES)}; {_CPU}")
        return "triton", found
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "triton", "sm_90"
    raise InputError("backend=\"triton\", and the model is not on a GPU", where="target",
                     hint='move the model to one, or name the architecture to compile for: target="sm_90"')


def _device_of(model: torch.nn.Module) -> torch.device:
    import torch

    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def _supported(where: torch.device) -> str:
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
