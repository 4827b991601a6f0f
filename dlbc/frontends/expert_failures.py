"""Mixtures of experts among the modules that cannot be captured: found by what they hold and do, and what to do."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from dlbc.errors import DlbcError, ExportError
from dlbc.frontends.expert_capture import PORTABLE, switchable

ROUTING = frozenset({"argmax", "argsort", "bincount", "nonzero", "one_hot", "sort", "topk", "unique", "where"})
"""How code chooses experts, or finds the rows of one: names of torch's functions and methods."""
CHOOSING = frozenset({"argmax", "max", "one_hot", "sigmoid", "softmax", "topk"})
BY_CONTENT = ("the model turns a tensor's content into a Python number", "the model decides by the content of a tensor",
              "a size or number depends on the content of a tensor", "indexing by a boolean mask",
              "the model leaves torch for numpy", "rows of the experts are used in a way")
"""Facts, or parts of them, of failures that a mixture of experts may have because of its routing."""


@dataclass(frozen=True)
class Found:
    """A module that looks like a mixture of experts: with so many alike parts, and a map to as many scores."""

    path: str
    module: nn.Module
    experts: int


def experts_at(model: nn.Module, path: str) -> Found | None:
    """The mixture of experts that a module is or directly belongs to, None for other modules.

    It holds at least two alike parts made of linear maps, in a list or as weights [E, ., .]; there is a linear map to E
    scores in it or beside it, of which code there chooses; and its code, or that of the module, chooses or finds
    indices. So does hardly anything else, but it is a guess: for hints only.
    """
    for place in (path, path.rpartition(".")[0]):
        module, parent = _at(model, place), _at(model, place.rpartition(".")[0])
        failing = _at(model, path)
        if module is None or failing is None or (module is model and place != path):
            continue
        number = _experts_in(module)
        scored = number and any(_scores(one, number) for one in (module, parent) if one is not None)
        if scored and ROUTING & {name for one in (module, failing) for name in names_in(one)}:
            return Found(place, module, number)
    return None


def experts_error(problem: DlbcError, model: nn.Module, path: str, at: str) -> DlbcError:
    """The error to raise instead of one at a module and source line, if a mixture of experts could not be captured
    because of what its Python does; else the error itself."""
    found = experts_at(model, path) if any(fact in problem.fact for fact in BY_CONTENT) else None
    if found is None:
        return problem
    name = type(found.module).__name__
    switch = (f"its config's `_experts_implementation` must allow \"{PORTABLE}\"" if switchable(found.module)
              else "if its library has implementations to choose from (transformers: experts_implementation), an "
                   "exportable one such as \"batched_mm\"")
    return ExportError(
        f"a mixture of {found.experts} experts goes by the content of tensors in Python: {problem.fact}",
        where=f"{found.path or 'the model'} ({name}{', ' * bool(at)}{at})",
        hint=f"{switch}; or give an equivalent that can be captured, `dlbc.register_moe({name}, forward)`: "
             "docs/moe_models.md has an example")


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _experts_in(module: nn.Module) -> int:
    """How many experts a module or a child of it holds, 0 if none."""
    for holder in (module, *module.children()):
        own = holder if isinstance(holder, nn.ModuleList | nn.ModuleDict) else None
        for parts in (own, *(child for child in holder.children() if isinstance(child, nn.ModuleList | nn.ModuleDict))):
            if parts is not None and (number := _alike(list(parts.children()))):
                return number
        sizes = {weight.shape[0] for weight in holder.parameters(recurse=False) if weight.ndim == 3}
        if len(sizes) == 1 and (number := sizes.pop()) > 1:
            return number
    return 0


def _alike(parts: list[nn.Module]) -> int:
    """How many parts there are if they are of one class, made of linear maps, of the same sizes; else 0."""
    forms = {(type(part), tuple(tuple(weight.shape) for weight in part.parameters())) for part in parts}
    if len(parts) < 2 or len(forms) != 1:
        return 0
    ranks = {len(shape) for shape in next(iter(forms))[1]}
    return len(parts) if 2 in ranks and max(ranks) == 2 else 0


def _scores(module: nn.Module, number: int) -> bool:
    """Whether a module or a child of it has a linear map to that many scores, and code that chooses by scores."""
    for one in (module, *module.children()):
        near = (one, *one.children()) if CHOOSING & set(names_in(one)) else ()
        if any(weight.ndim == 2 and number in weight.shape for inner in near
               for weight in inner.parameters(recurse=False)):
            return True
    return False


def names_in(module: nn.Module) -> Iterator[str]:
    """What the methods of a module's class look up, up to those of nn.Module."""
    for cls in type(module).__mro__:
        if cls is nn.Module:
            return
        for method in vars(cls).values():
            function = getattr(method, "__wrapped__", method)
            if isinstance(function, types.FunctionType):
                yield from _looked_up(function.__code__)


def _looked_up(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _looked_up(constant)
