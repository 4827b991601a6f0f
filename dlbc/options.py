"""How to compile, and the same as JSON data for files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dlbc.composite import Composite, resolve
from dlbc.ir.core import Attr, Rule
from dlbc_runtime.arrays import Json

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Options:
    """How to compile: all that changes the program besides the model and its inputs."""

    rules: str | Composite = "attnlrp"
    backend: str = "torch"
    dynamic: bool | Mapping[str, Collection[int]] = True
    explain: tuple[str, ...] = ()
    fallback: str | None = None
    dump: str | None = None

    @property
    def composite(self) -> Composite:
        """The composite that the rules name; RuleError for unknown names."""
        return resolve(self.rules, self.fallback)


def recipe_of(options: Options, weights: Iterable[str], model: torch.nn.Module | None) -> dict[str, Json]:
    """What was asked for, as JSON data, and which weights have no name in the model's state dict."""
    composite = options.composite
    entries: list[Json] | None = [[what, rule.name, [[name, _number(value)] for name, value in rule.params]]
                                  for what, rule in composite.entries if isinstance(what, str)]
    if any(not isinstance(what, str) for what, _ in composite.entries):
        entries = None  # a predicate is Python code, which files do not carry
    dynamic: Json = options.dynamic if isinstance(options.dynamic, bool) else {
        name: [int(axis) for axis in axes] for name, axes in options.dynamic.items()}
    known = _state_names(model) if model is not None else set(weights)
    return {"rules": {"name": composite.name, "seed": composite.seed, "fallback": composite.fallback,
                      "entries": entries},
            "dynamic": dynamic, "explain": list(options.explain),
            "constants": [name for name in weights if name not in known]}


def options_of(recipe: Mapping[str, Any], backend: str) -> Options:
    """The options that `recipe_of` wrote down. KeyError, TypeError, ValueError or RuleError for something else."""
    rules, dynamic = recipe["rules"], recipe["dynamic"]
    entries = [(str(what), Rule(str(name), tuple((str(key), value) for key, value in params)))
               for what, name, params in rules["entries"] or ()]
    composite = Composite(entries, name=str(rules["name"]), fallback=rules["fallback"],
                          seed="M" if rules["seed"] == "M" else "R")
    return Options(composite, backend, dynamic if isinstance(dynamic, bool) else {
        str(name): tuple(map(int, axes)) for name, axes in dynamic.items()}, tuple(map(str, recipe["explain"])),
        None, None)


def _number(value: Attr) -> Json:
    if not isinstance(value, bool | int | float | str | None):
        raise TypeError(f"a rule's parameter is {value!r}")
    return value


def _state_names(model: torch.nn.Module) -> set[str]:
    """The names of the model's state dict, without running its hooks."""
    hidden = {f"{path}.{name}" if path else name for path, module in model.named_modules(remove_duplicate=False)
              for name in module._non_persistent_buffers_set}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name for name, _ in named} - hidden
