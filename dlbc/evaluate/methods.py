"""Methods: whatever gives relevance per unit of an item for some targets.

A method is given as an explainer, the name of a preset ("attnlrp"), a `Composite`, the name of a baseline
("random", "latest first", "centre first", "gradient x input", "integrated gradients"), a `Method`, or a function of
yours `f(model, inputs, target) -> relevance` of the explained input's shape (or one number for each unit).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from dlbc.errors import InputError
from dlbc.evaluate.items import Item
from dlbc.evaluate.units import Units
from dlbc_runtime.arrays import Array, as_numpy

if TYPE_CHECKING:
    import torch

    from dlbc.composite import Composite
    from dlbc_runtime.explainer import Explainer

Function: TypeAlias = Callable[[Any, Any, int], Any]
Given: TypeAlias = "str | Composite | Explainer | Method | Function"
Several: TypeAlias = "Given | Sequence[Given] | Mapping[str, Given]"


@dataclass(frozen=True, eq=False)
class Scene:
    """What a method works on: the model (in eval mode), the items, and which units of them are asked for."""

    model: torch.nn.Module
    items: Sequence[Item]
    units: Units

    def number(self, item: Item) -> int:
        """The place of an item among all: what its random numbers are drawn for."""
        return next((place for place, one in enumerate(self.items) if one is item), 0)


@runtime_checkable
class Method(Protocol):
    """Relevance per unit. `control`: it explains nothing, it is what every method must beat."""

    @property
    def name(self) -> str:
        """What it is called in reports."""
        ...

    @property
    def control(self) -> bool:
        """Whether it is a control."""
        ...

    def maps(self, scene: Scene, item: Item, targets: Sequence[int]) -> Array:
        """Relevance for each target, float64 [targets, units]; the higher, the more a unit speaks for the target."""
        ...


@dataclass(frozen=True, eq=False)
class _Explained:
    """The relevance that an explainer gives: all targets from one forward pass."""

    name: str
    explainer: Explainer
    control = False

    def maps(self, scene: Scene, item: Item, targets: Sequence[int]) -> Array:
        args, kwargs = item.call()
        explanation = self.explainer(*args, target=[int(target) for target in targets], **kwargs)
        name = self._input(scene, item, list(explanation.relevance))
        return np.stack([scene.units.summed(item, relevance[0]) for relevance in explanation.relevance[name]])

    def _input(self, scene: Scene, item: Item, names: list[str]) -> str:
        key = scene.units.key(item)
        positional = self.explainer.manifest.inputs.positional
        name = key if isinstance(key, str) else positional[key] if key < len(positional) else ""
        if name in names:
            return name
        if len(names) == 1:
            return names[0]
        raise InputError(f"the explainer `{self.name}` has no relevance for input {key!r}", where="methods",
                         hint=f"it explains {', '.join(names)}; say which with e.g. Features(input=...)")


@dataclass(eq=False)
class _Compiled:
    """An explainer made by rules when first asked for; made anew for another model (a randomised copy)."""

    name: str
    rules: str | Composite
    options: Mapping[str, Any] = field(default_factory=dict)
    control = False

    def __post_init__(self) -> None:
        self._made: tuple[object, _Explained] | None = None

    def maps(self, scene: Scene, item: Item, targets: Sequence[int]) -> Array:
        if self._made is None or self._made[0] is not scene.model:
            from dlbc.api import compile as compile_model

            args, kwargs = item.call()
            explainer = compile_model(scene.model, kwargs if kwargs else args, rules=self.rules, **self.options)
            self._made = scene.model, _Explained(self.name, explainer)
        return self._made[1].maps(scene, item, targets)


@dataclass(frozen=True, eq=False)
class _Function:
    """A function of the user's: `f(model, inputs, target)`, called once for each target."""

    name: str
    function: Function
    control: bool = False

    def maps(self, scene: Scene, item: Item, targets: Sequence[int]) -> Array:
        shape = tuple(scene.units.value(item).shape)
        found = []
        for target in targets:
            relevance = as_numpy(self.function(scene.model, item.inputs, int(target))).astype(np.float64)
            found.append(scene.units.summed(item, relevance[0] if relevance.shape == shape else relevance))
        return np.stack(found)


def function(name: str, explain: Function, *, control: bool = False) -> Method:
    """A method from `explain(model, inputs, target) -> relevance`, of the explained input's shape (with or without its
    batch axis), or one number for each unit."""
    return _Function(name, explain, control)


def compiled(rules: str | Composite = "auto", *, name: str = "", **options: Any) -> Method:
    """A method that compiles the model when first asked, with these rules and other options of `dlbc.compile`."""
    return _Compiled(name or (rules if isinstance(rules, str) else rules.name), rules, options)


def as_methods(given: Several, scene: Scene, *, controls: bool = False) -> list[Method]:
    """The methods with different names, then the controls of the units where wanted and not given themselves.

    InputError for what is no method, for none, and for two of one name.
    """
    from dlbc.evaluate.baselines import controls_for

    if isinstance(given, Mapping):
        found = [_method(one, str(name)) for name, one in given.items()]
    elif isinstance(given, list | tuple):
        found = [_method(one, "") for one in given]
    else:
        found = [_method(given, "")]  # type: ignore[arg-type]  # what is left is one method
    if not found:
        raise InputError("there are no methods", where="methods", hint='give an explainer, or names: ["attnlrp"]')
    names = [one.name for one in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two methods are called {twice!r}", where="methods",
                         hint="give them as a mapping from name to method")
    if controls:
        found += [one for one in controls_for(scene) if one.name not in names]
    return found


def _method(given: Given, name: str) -> Method:
    from dlbc.composite import Composite
    from dlbc.evaluate.baselines import NAMED, renamed
    from dlbc_runtime.explainer import Explainer

    if isinstance(given, str):
        if given in NAMED:
            return renamed(NAMED[given](), name or given)
        return compiled(given, name=name)
    if isinstance(given, Composite):
        return compiled(given, name=name)
    if isinstance(given, Explainer):
        return _Explained(name or given.manifest.composite, given)
    if isinstance(given, Method):
        return renamed(given, name or given.name)
    if callable(given):
        return _Function(name or getattr(given, "__name__", "function"), given)
    raise InputError(f"a method cannot be {type(given).__name__} {given!r:.60}", where="methods",
                     hint='give an explainer, the name of a preset or baseline, or f(model, inputs, target)')


def per_model(method: Method) -> bool:
    """Whether a method follows the model that it is shown, and not the one that it was compiled for."""
    from dlbc.evaluate.baselines import Renamed

    return per_model(method.method) if isinstance(method, Renamed) else not isinstance(method, _Explained)
