"""How to compile, and the same as JSON data for files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dlbc.auto import PLANS
from dlbc.composite import Composite, resolve
from dlbc.errors import RuleError
from dlbc.ir.core import Attr, Rule
from dlbc_runtime.arrays import Json
from dlbc_runtime.ledger import number_to_json
from dlbc_runtime.reference import Reference

if TYPE_CHECKING:
    import torch


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
    entries: list[Json] | None = [[what, rule.name, [[name, _number(value)] for name, value in rule.params]]
                                  for what, rule in composite.entries if isinstance(what, str)]
    if any(not isinstance(what, str) for what, _ in composite.entries):
        entries = None  # a predicate is Python code, which files do not carry
    dynamic: Json = options.dynamic if isinstance(options.dynamic, bool) else {
        name: [int(axis) for axis in axes] for name, axes in options.dynamic.items()}
    known = _state_names(model) if model is not None else set(weights)
    return {"rules": {"name": composite.name, "seed": composite.seed, "fallback": composite.fallback,
                      "contrast": composite.contrast, "plan": composite.plan, "entries": entries},
            "dynamic": dynamic, "explain": list(options.explain), "differences": options.reference is not None,
            "constants": [name for name in weights if name not in known]}


def options_of(recipe: Mapping[str, Any], backend: str, reference: Reference | None = None) -> Options:
    """The options that `recipe_of` wrote down. KeyError, TypeError, ValueError or RuleError for something else."""
    if recipe["differences"] != (reference is not None):
        raise ValueError("a reference is there and not asked for, or the other way round")
    rules, dynamic = recipe["rules"], recipe["dynamic"]
    entries = [(str(what), Rule(str(name), tuple((str(key), _attr(value)) for key, value in params)))
               for what, name, params in rules["entries"] or ()]
    composite = Composite(entries, name=str(rules["name"]), fallback=rules["fallback"],
                          seed="M" if rules["seed"] == "M" else "R", contrast=str(rules["contrast"]),
                          plan=_plan(rules["plan"]))
    return Options(composite, backend, dynamic if isinstance(dynamic, bool) else {
        str(name): tuple(map(int, axes)) for name, axes in dynamic.items()}, tuple(map(str, recipe["explain"])),
        None, None, reference)


def _plan(name: object) -> str:
    if name not in ("", *PLANS):
        raise ValueError(f"there is no plan `{name}`")
    return str(name)


def _attr(value: object) -> Attr:
    """A rule's parameter as it was before it became JSON, which has lists for tuples."""
    if isinstance(value, list):
        return tuple(map(_attr, value))
    if value in ("inf", "-inf"):
        return float(value)
    if not isinstance(value, bool | int | float | str | None):
        raise TypeError(f"a rule's parameter is {value!r}")
    return value


def _number(value: Attr) -> Json:
    if isinstance(value, tuple):
        return [_number(part) for part in value]
    if not isinstance(value, bool | int | float | str | None):
        raise TypeError(f"a rule's parameter is {value!r}")
    return number_to_json(value) if isinstance(value, float) else value  # JSON knows no infinity


def _state_names(model: torch.nn.Module) -> set[str]:
    """The names of the model's state dict, without running its hooks."""
    hidden = {f"{path}.{name}" if path else name for path, module in model.named_modules(remove_duplicate=False)
              for name in module._non_persistent_buffers_set}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name for name, _ in named} - hidden
