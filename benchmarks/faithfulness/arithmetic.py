"""How much arithmetic a call does: FLOPs of its matrix products, convolutions and attention.

`torch.utils.flop_counter.FlopCounterMode` follows modules by hooks that `torch.autograd.grad` refuses; this uses its
formulas without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class _Counter(TorchDispatchMode):
    total: int = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(function._overloadpacket)
        if formula is None and function is not torch.ops.prim.device.default:
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = function(*args, **kwargs)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=result))
        return result


def flops(case: Callable[[], object]) -> int:
    """FLOPs of a call; attention counts as the products that it is."""
    with sdpa_kernel([SDPBackend.MATH]), _Counter() as counter:
        case()
    found: int = counter.total
    return found
