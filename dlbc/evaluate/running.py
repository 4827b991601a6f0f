"""Running the user's model without changing it: in eval mode, its outputs for the target position, its gradients."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlbc.errors import InputError
from dlbc.evaluate.embeddings import EmbeddingChange
from dlbc.evaluate.items import Item, Key
from dlbc_runtime.arrays import Array

MASK = "attention_mask"


def in_eval(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself if it is in eval mode; otherwise a copy of its structure in eval mode that shares its weights.

    InputError for what is no module, or cannot be copied.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"the model is {type(model).__name__} {model!r:.60}, not a torch.nn.Module", where="model")
    if not any(module.training for module in model.modules()):
        return model
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    try:
        return copy.deepcopy(model, shared).eval()
    except Exception as problem:
        raise InputError("the model is in training mode, and its structure cannot be copied to leave it so",
                         where=type(model).__name__, hint="call model.eval() first") from problem


def output_of(result: Any) -> Tensor:
    """The tensor of a model's result that scores are taken of: itself, `logits`, or the first tensor in it."""
    if isinstance(result, Tensor):
        return result
    named = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    if isinstance(named, Tensor):
        return named
    parts = result.values() if isinstance(result, Mapping) else result if isinstance(result, list | tuple) else ()
    found = next((part for part in parts if isinstance(part, Tensor) and part.is_floating_point()), None)
    if found is None:
        raise InputError(f"the model returned {type(result).__name__}, without a tensor of logits", where="model",
                         hint="wrap it in a module that returns them")
    return found


def run(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """Outputs [B, V], and whether the model has them at every position: then those at the last one that
    `attention_mask` does not hide."""
    kwargs = dict(kwargs)
    mask = kwargs.get(MASK)
    last = mask is None or bool((mask[:, -1] != 0).all())
    options = inspect.signature(model.forward).parameters
    for name, value in (("use_cache", False), ("return_dict", True), ("logits_to_keep", 1 if last else None)):
        if name in options and name not in kwargs and value is not None:
            kwargs[name] = value
    output = output_of(model(*args, **kwargs))
    if output.ndim > 3:
        raise InputError(f"the model's output has shape {list(output.shape)}: which number of it to watch is not clear",
                         where="model", hint="wrap it in a module that returns one score for each class")
    if output.ndim < 3:
        return (output.reshape(-1, 1) if output.ndim < 2 else output), False
    if mask is None or last:
        return output[:, -1], True
    visible = mask != 0
    places = visible.shape[1] - 1 - visible.flip(1).int().argmax(1)
    return output[torch.arange(len(output), device=output.device), places], True


def outputs(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, ids: Tensor | None = None,
            kept: Tensor | None = None) -> Array:
    """Outputs float64 [B, V]. `kept` [B, T] bool: where False, the embedding of `ids` is zero."""
    with torch.inference_mode(), ExitStack() as stack:
        change = None
        if ids is not None and kept is not None:
            factors = kept[..., None]
            change = stack.enter_context(EmbeddingChange(
                ids, lambda found: (found.reshape(*factors.shape[:2], -1) * factors).reshape(found.shape)))
        found: Array = run(model, args, kwargs)[0].cpu().double().numpy()
    if change is not None and not change.seen:
        raise _no_embedding()
    return found


def gradients(model: torch.nn.Module, item: Item, key: Key, points: Tensor | None, targets: Sequence[int]
              ) -> tuple[Tensor, Tensor]:
    """What is differentiated by (the explained input, or the embedding of its ids), and the gradient of each target's
    output: [1, ...] and [targets, 1, ...].

    `points`: take the gradient at this value of it instead, [1, ...]. Neither the model nor the item is changed, and
    the weights receive no gradients.
    """
    value = item.tensors()[key]
    leaves: list[Tensor] = []

    def leaf(found: Tensor) -> Tensor:
        leaves.append((found if points is None else points.reshape(found.shape)).detach().clone().requires_grad_())
        return leaves[-1]

    with torch.inference_mode(False), torch.enable_grad():
        changed: dict[Key, Any] = {place: one.clone() for place, one in item.tensors().items()}
        with ExitStack() as stack:
            if value.is_floating_point():
                changed[key] = leaf(value.clone())
            else:
                stack.enter_context(EmbeddingChange(changed[key], leaf))
            args, kwargs = item.having(changed)
            output, _ = run(model, args, kwargs)
        if not leaves:
            raise _no_embedding()
        check_targets(targets, output.shape[1])
        found = [torch.autograd.grad(output[0, target], leaves[0], retain_graph=True, allow_unused=True)[0]
                 for target in targets]
    zero = torch.zeros_like(leaves[0])
    return leaves[0].detach(), torch.stack([zero if one is None else one for one in found]).detach()


def check_targets(targets: Sequence[int], count: int) -> None:
    """InputError for a target that the output does not have."""
    for target in targets:
        if not 0 <= target < count:
            raise InputError(f"target {target} is out of range", where="target",
                             hint=f"the output has {count} entries: 0 to {count - 1}")


@dataclass(frozen=True, eq=False)
class Look:
    """What the model says to an item as it is: outputs float64 [V], whether it says so at every position, and what is
    explained of it."""

    outputs: Array
    language_model: bool
    target: int


def look(model: torch.nn.Module, item: Item) -> Look:
    """Run the model on an item; its target, or what is predicted. InputError for outputs that are not finite, and a
    target out of range."""
    args, kwargs = item.having({key: value.clone() for key, value in item.tensors().items()})
    with torch.inference_mode():
        output, language_model = run(model, args, kwargs)
    found: Array = output[0].cpu().double().numpy()
    if not np.isfinite(found).all():
        raise InputError("the model's output holds NaN or infinity", where=item.name or "item",
                         hint="check the inputs and the weights")
    if item.target is not None:
        check_targets([item.target], len(found))
    return Look(found, language_model, item.target if item.target is not None else int(found.argmax()))


def _no_embedding() -> InputError:
    return InputError("the model does not look its ids up in an embedding that can be seen", where="tokens",
                      hint="perturb by delete, mask or replace, and leave out methods that need gradients")
