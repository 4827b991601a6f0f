"""Whether a CUDA graph gives the numbers of the kernels launched one by one."""

from __future__ import annotations

from typing import Any

from dlbc_runtime.cuda_driver import Run

NEAR = {"torch.float16": 3e-2, "torch.bfloat16": 1e-1}
"""How far a graph's numbers may be from those of kernels launched one by one, of the largest of each tensor, where two
runs of these differ as well; else nothing may differ. Other element types: `NEAR_ELSE`. As in the trial of kernels."""
NEAR_ELSE = 1e-3


def same(found: Any, expected: Any, run: Run) -> bool:
    """Whether results are the same to the last bit; where kernels launched one by one do not give that twice either,
    whether they are near."""
    if _apart(found, expected) == 0:
        return True
    again = run()
    return _apart(again, expected) > 0 and _apart(found, expected) <= 1


def _apart(found: Any, expected: Any) -> float:
    """0 for the same bits; the largest difference of two tensors, in what is near for their element type."""
    worst = 0.0
    for own, other in zip(flat(found), flat(expected), strict=True):
        if not is_tensor(own):
            worst = max(worst, 0.0 if own == other else float("inf"))
        elif not _equal(own, other):
            if not own.is_floating_point() or own.shape != other.shape:
                return float("inf")
            off, scale = (own.double() - other.double()).abs().max(), other.double().abs().max()
            far = float(off) / (float(scale) + 1e-30) / NEAR.get(str(own.dtype), NEAR_ELSE)
            worst = max(worst, far if far == far else float("inf"))
    return worst


def _equal(own: Any, other: Any) -> bool:
    """Whether two tensors hold the same bits."""
    import torch

    if own.shape != other.shape or own.dtype != other.dtype:
        return False
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (own, other)))


def is_tensor(x: Any) -> bool:
    """Whether something has memory of its own."""
    return hasattr(x, "data_ptr")


def flat(value: Any) -> list[Any]:
    """What tuples and lists hold, however deep."""
    return [each for part in value for each in flat(part)] if isinstance(value, tuple | list) else [value]
