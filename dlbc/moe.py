"""Mixtures of experts that cannot be captured as they are written: an equivalent forward for a class of modules.

    def forward(module, x):                              # what MyMoE.forward computes, without loops over data
        weights, ids = module.router(x).softmax(-1).topk(2)
        return dlbc.moe.experts(x, ids, weights, up=[e.up for e in module.experts],
                                down=[e.down for e in module.experts], activation=torch.nn.functional.silu)

    dlbc.register_moe(MyMoE, forward)

The class stays as it is: the function takes part when a model is compiled, and nowhere else. See docs/moe_models.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from dlbc.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

Forward: TypeAlias = "Callable[..., Any]"
Linears: TypeAlias = "Tensor | Sequence[Tensor] | Sequence[nn.Linear]"
"""The linear maps of all experts: weights [E, out, in], or for each expert its weight [out, in] or its `nn.Linear`."""

_FORWARDS: dict[type, Forward] = {}


def register_moe(module_class: type, forward: Forward | None) -> None:
    """Capture modules of a class by `forward(module, *args, **kwargs)` in place of their own forward method.

    `forward` gets and gives what the method does, and must compute the same with operators that torch.export takes,
    or the functions of `dlbc.moe`. Each time a model is compiled it is compared with the method on the example inputs
    (ExportError when they differ). Holds for this process, for the class and for subclasses that inherit its forward;
    a second registration replaces the first, None takes it back. InputError for what is no module class or function.
    """
    nn = sys.modules.get("torch.nn")
    if not isinstance(module_class, type) or nn is None or not issubclass(module_class, nn.Module):
        raise InputError(f"`{getattr(module_class, '__name__', module_class)}` is not a class of modules",
                         where="register_moe", hint="give the class itself, such as `MyMoE`")
    if forward is None:
        _FORWARDS.pop(module_class, None)
        return
    if not callable(forward) or isinstance(forward, type):
        raise InputError(f"the forward of `{module_class.__name__}` is a {type(forward).__name__}, not a function",
                         where="register_moe", hint="give a function `forward(module, *args, **kwargs)`")
    _FORWARDS[module_class] = forward


def forward_of(module_class: type) -> Forward | None:
    """What is registered for modules of a class, None when nothing is."""
    for base in module_class.__mro__:
        if base in _FORWARDS:
            same = getattr(module_class, "forward", None) is getattr(base, "forward", None)
            return _FORWARDS[base] if same else None
    return None


def experts(x: Tensor, ids: Tensor, weights: Tensor, *, up: Linears, down: Linears,
            activation: Callable[[Tensor], Tensor], gate: Linears | None = None, up_bias: Tensor | None = None,
            down_bias: Tensor | None = None, gate_bias: Tensor | None = None) -> Tensor:
    """`y = sum_k weights[k] down[ids[k]](h_k)` with `h_k = activation(up[ids[k]](x))`, or with a gate
    `h_k = activation(gate[ids[k]](x)) up[ids[k]](x)`.

    x [*rows, D]; ids (int64) and weights [*rows, K]; the result is [*rows, D]. Biases [E, out] go with weights given
    as tensors; an `nn.Linear` brings its own. Inside of functions for `register_moe` only: it has no gradient.
    """
    rows = x.unsqueeze(-2)
    hidden = expert_linear(rows, ids, up, up_bias)
    hidden = activation(hidden) if gate is None else activation(expert_linear(rows, ids, gate, gate_bias)) * hidden
    return combine(expert_linear(hidden, ids, down, down_bias), weights)


def expert_linear(x: Tensor, ids: Tensor, linears: Linears, bias: Tensor | None = None) -> Tensor:
    """`y[..., k, :] = linears[ids[..., k]](x[..., k, :])`: each row by the expert chosen for it.

    ids [*rows, K], int64; x [*rows, K, in], or [*rows, 1, in] where all experts get the same; the result is
    [*rows, K, out]. Tensors of single experts are stacked: in a compiled explainer once, when it is made, which takes
    their memory a second time; a module that holds one tensor [E, out, in] is not copied. No gradient.
    """
    import torch

    import dlbc.frontends.expert_ops  # noqa: F401  (defines the operator)

    if not isinstance(linears, torch.Tensor):
        modules = [one for one in linears if isinstance(one, torch.nn.Linear)]
        if bias is None and modules and modules[0].bias is not None:
            bias = torch.stack([one.bias for one in modules])
        linears = torch.stack([one for one in linears if isinstance(one, torch.Tensor)] or [
            one.weight for one in modules])
    found: Tensor = torch.ops.dlbc.expert_linear(x, ids, linears, bias)
    return found


def combine(u: Tensor, weights: Tensor) -> Tensor:
    """`y = sum_k weights[..., k] u[..., k, :]`: what the chosen experts say, weighted. u [*rows, K, D], weights
    [*rows, K]; the result is [*rows, D]. No gradient."""
    import torch

    import dlbc.frontends.expert_ops  # noqa: F401  (defines the operator)

    found: Tensor = torch.ops.dlbc.combine(u, weights)
    return found
