"""How to compile, and the same as JSON data for files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dlbc.composite import Composite, resolve
from dlbc.composite_json import composite_from_json, composite_to_json
from dlbc.errors import RuleError
from dlbc_runtime.arrays import Json
from dlbc_runtime.reference import Reference

if TYPE_CHECKING:
    import torch


PRECISIONS = ("auto", "ieee", "tf32x3", "tf32")
"""How kernels may multiply numbers of which one is float32; "auto": float32 by float32 as "ieee", and what meets
weights of 16 bits in as many digits as these have."""


@dataclass(frozen=True)
class Options:
    """How to compile: all that changes the program besides the model and its inputs."""

    rules: str | Composite = "auto"
    backend: str = "torch"
    dynamic: bool | Mapping[str, Collection[int]] = True
    explain: tuple[str, ...] = ()
    fallback: str | None = None
    dump: str | None = None
    reference: Reference | None = None
    """What inputs are compared with: the program depends on whether there is one, not on which."""
    precompute: str = "auto"
    """Which parts of weights that rules need (|W|, say) are kept between calls: "auto", "never", "always"."""
    target: str = ""
    """The GPU architecture that kernels are written for ("sm_90"), of the backends that write some."""
    precision: str = "auto"
    """How kernels multiply float32 numbers: one of `PRECISIONS`."""

    @property
    def composite(self) -> Composite:
        """The composite that the rules name; RuleError for unknown names, and for rules that know no reference."""
        found = resolve(self.rules, self.fallback)
        if self.reference is not None and found.streams > 1:
            raise RuleError(f"rules `{found.name}` compare the relevance of two outputs, and have no form for "
                            "differences to a reference", where="reference", hint="choose other rules, or no reference")
        return found


def recipe_of(options: Options, weights: Iterable[str], model: torch.nn.Module | None) -> dict[str, Json]:
    """What was asked for, as JSON data, and which weights have no name in the model's state dict."""
    composite = options.composite
    dynamic: Json = options.dynamic if isinstance(options.dynamic, bool) else {
        name: [int(axis) for axis in axes] for name, axes in options.dynamic.items()}
    known = _state_names(model) if model is not None else set(weights)
    return {"rules": composite_to_json(composite),
            "dynamic": dynamic, "explain": list(options.explain), "differences": options.reference is not None,
            "precompute": options.precompute,
            **({"target": options.target, "precision": options.precision} if options.target else {}),
            "constants": [name for name in weights if name not in known]}


def options_of(recipe: Mapping[str, Any], backend: str, reference: Reference | None = None) -> Options:
    """The options that `recipe_of` wrote down. KeyError, TypeError, ValueError or RuleError for something else."""
    if recipe["differences"] != (reference is not None):
        raise ValueError("a reference is there and not asked for, or the other way round")
    rules, dynamic = recipe["rules"], recipe["dynamic"]
    composite = composite_from_json(rules)
    return Options(composite, backend, dynamic if isinstance(dynamic, bool) else {
        str(name): tuple(map(int, axes)) for name, axes in dynamic.items()}, tuple(map(str, recipe["explain"])),
        None, None, reference, str(recipe["precompute"]), str(recipe.get("target", "")),
        str(recipe.get("precision", "ieee" if recipe.get("target") else "auto")))


def _state_names(model: torch.nn.Module) -> set[str]:
    """The names of the model's state dict, without running its hooks."""
    hidden = {f"{path}.{name}" if path else name for path, module in model.named_modules(remove_duplicate=False)
              for name in module._non_persistent_buffers_set}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name for name, _ in named} - hidden
