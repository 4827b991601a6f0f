"""Example inputs: their names, the axes that may change, and the signature they give.

Names: a parameter of the forward method, and `name.key` or `name.0` inside of dicts, lists and tuples.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dlbc.errors import InputError
from dlbc.frontends.sizes import Sizes
from dlbc_runtime.signature import Constant, Container, InputSpec, Size, TensorSpec, Tree

Args: TypeAlias = "tuple[Any, ...]"
Kwargs: TypeAlias = "dict[str, Any]"
Dynamic: TypeAlias = "bool | Mapping[str, Collection[int]]"
Axes: TypeAlias = "dict[str, tuple[int, ...]]"

INJECTED = {"use_cache": False, "return_dict": True}
"""Given to a forward method that takes them when the user does not: no cache among the outputs, named outputs."""


def normalise(example_inputs: object) -> tuple[Args, Kwargs]:
    """Example inputs as (args, kwargs): a tensor is one argument, a tuple or list several, a dict keywords."""
    if isinstance(example_inputs, Mapping):
        odd = [key for key in example_inputs if not isinstance(key, str)]
        if odd:
            raise InputError(f"example inputs have the key {odd[0]!r}", hint="keys are names of the model's inputs")
        return (), dict(example_inputs)
    if isinstance(example_inputs, list | tuple):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


@dataclass(frozen=True)
class Signature:
    """The forward method's parameters: by position, `*args` (or ""), `**kwargs` (or ""), defaults by name."""

    positional: tuple[str, ...]
    keyword: tuple[str, ...]
    variadic: str
    keywords: str
    defaults: Mapping[str, object]

    @staticmethod
    def of(model: torch.nn.Module) -> Signature:
        """The signature of a model's forward method."""
        parameters = inspect.signature(model.forward).parameters.values()

        def names(*kinds: object) -> tuple[str, ...]:
            return tuple(p.name for p in parameters if p.kind in kinds)

        kind = inspect.Parameter
        return Signature(names(kind.POSITIONAL_ONLY, kind.POSITIONAL_OR_KEYWORD), names(kind.KEYWORD_ONLY),
                         next(iter(names(kind.VAR_POSITIONAL)), ""), next(iter(names(kind.VAR_KEYWORD)), ""),
                         {p.name: p.default for p in parameters if p.default is not p.empty})

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by parameter name, in the forward method's order; InputError where they do not fit."""
        found: dict[str, Any] = dict(zip(self.positional, args, strict=False))
        surplus = tuple(args[len(self.positional):])
        if surplus and not self.variadic:
            raise InputError(f"{len(args)} example inputs, the model takes {len(self.positional)} by position",
                             hint=f"the model takes ({', '.join((*self.positional, *self.keyword))})")
        if surplus:
            found[self.variadic] = surplus
        for name in (*self.positional, *self.keyword, *kwargs):
            if name in kwargs and name not in found:
                if name not in (*self.positional, *self.keyword) and not self.keywords:
                    raise InputError(f"the model has no input `{name}`",
                                     hint=f"it takes {', '.join((*self.positional, *self.keyword))}")
                found[name] = kwargs[name]
            elif name in kwargs and name in self.positional[:len(args)]:
                raise InputError(f"example input `{name}` is given twice, by position and by name")
        missing = [name for name in (*self.positional, *self.keyword)
                   if name not in found and name not in self.defaults]
        if missing:
            raise InputError(f"example inputs lack `{missing[0]}`",
                             hint=f"the model takes ({', '.join((*self.positional, *self.keyword))})")
        return found


def tensors(value: object, path: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested containers with its name. InputError for what cannot be an input."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from tensors(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from tensors(inner, f"{path}.{i}")
    elif not isinstance(value, bool | int | float | str | None):
        raise InputError(f"example input `{path}` is {type(value).__name__}",
                         hint="inputs are tensors, numbers, strings, None, and dicts, lists and tuples of them")


def mapped(value: Any, path: str, change: Callable[[str, Tensor], Tensor]) -> Any:
    """The same containers with every tensor changed."""
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, Mapping):
        return {key: mapped(inner, f"{path}.{key}", change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        parts = [mapped(inner, f"{path}.{i}", change) for i, inner in enumerate(value)]
        return parts if isinstance(value, list) else type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def dynamic_axes(named: Mapping[str, Tensor], dynamic: Dynamic) -> Axes:
    """The axes of each tensor that are to keep any size. By default the batch, and the sequence of ids,
    masks and embeddings. InputError for names and axes that do not exist."""
    if isinstance(dynamic, Mapping):
        return _asked(named, dynamic)
    found = {name: _default_axes(name, x) for name, x in named.items()}
    return {name: axes for name, axes in found.items() if axes} if dynamic else {}


def _default_axes(name: str, x: Tensor) -> tuple[int, ...]:
    sequence = x.ndim == (3 if x.is_floating_point() and "mask" not in name else 2)
    return tuple(d for d in ((0, 1) if sequence else (0,)) if d < x.ndim and x.shape[d] > 0)


def _asked(named: Mapping[str, Tensor], dynamic: Mapping[str, Collection[int]]) -> Axes:
    found: Axes = {}
    for name, axes in dynamic.items():
        inside = [path for path in named if path == name or path.startswith(f"{name}.")]
        if not inside:
            raise InputError(f"dynamic names an input `{name}` that is not there",
                             hint=f"the tensor inputs are {', '.join(named) or 'none'}")
        for path in inside:
            rank = named[path].ndim
            for axis in axes:
                if not -rank <= axis < rank:
                    raise InputError(f"dynamic names axis {axis} of `{path}`, which has {rank} axes")
            found[path] = tuple(sorted({axis % rank for axis in axes}))
    return found


def enlarged(named: Mapping[str, Tensor], axes: Axes) -> dict[str, Tensor]:
    """The tensors with dynamic axes of size 1 doubled, where all inputs have size 1 along that axis: the
    exporter takes 1 for a constant. Every tensor is a new object."""
    found: dict[str, Tensor] = {}
    for name, x in named.items():
        repeats = [2 if d in axes.get(name, ()) and _all_single(named, axes, d) else 1 for d in range(x.ndim)]
        found[name] = x.detach().repeat(repeats) if any(r > 1 for r in repeats) else x.detach()
    return found


def _all_single(named: Mapping[str, Tensor], axes: Axes, axis: int) -> bool:
    return all(named[name].shape[axis] == 1 for name, own in axes.items() if axis in own)


def role(name: str, x: Tensor, axis: int) -> str:
    """What an axis is by default: the batch (`B`), the sequence (`T`), or nothing known ("")."""
    return "B" if axis == 0 else "T" if axis == 1 and 1 in _default_axes(name, x) else ""


def input_tree(value: object, path: str, specs: Mapping[str, TensorSpec], optional: bool) -> Tree:
    """The tree of one parameter: containers, constants, and the tensor specs by name."""
    if isinstance(value, Tensor):
        return specs[path]
    if isinstance(value, Mapping):
        return Container("dict", tuple(input_tree(v, f"{path}.{k}", specs, False) for k, v in value.items()),
                         tuple(map(str, value)))
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return Container(kind, tuple(input_tree(v, f"{path}.{i}", specs, False) for i, v in enumerate(value)))
    assert isinstance(value, bool | int | float | str | None)
    return Constant(value, optional)


def injected(model: torch.nn.Module, signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
             ) -> dict[str, Any]:
    """What is given to a forward method beside the user's arguments (`INJECTED`). Some language models take `use_cache`
    among their `**kwargs`, for a part of theirs."""
    takes = (*signature.positional[len(args):], *signature.keyword)
    inside = bool(signature.keywords) and "past_key_values" in takes and bool(
        getattr(getattr(model, "config", None), "use_cache", False))
    return {name: value for name, value in INJECTED.items()
            if name not in kwargs and (name in takes or (name == "use_cache" and inside))}


def input_spec(signature: Signature, bound: Mapping[str, Any], injected: Collection[str],
               specs: Mapping[str, TensorSpec], sizes: Sizes) -> InputSpec:
    """How later calls are read: the captured parameters in order, the others with their defaults."""
    trees = {}
    for name, value in bound.items():
        is_default = name in signature.defaults and not isinstance(value, Tensor | Mapping | list | tuple) and \
            signature.defaults[name] == value
        trees[name] = input_tree(value, name, specs, name in injected or is_default)
    defaults = tuple(name for name in signature.defaults if name not in bound)
    return InputSpec(signature.positional, trees, signature.variadic, defaults, dict(sizes.ranges),
                     tuple(sizes.conditions))


def value_name(path: str, taken: Collection[str]) -> str:
    """An input's name as a value name: word characters and dots, unlike a size and unlike a relevance value."""
    name = re.sub(r"[^\w.]", "_", path)
    if re.fullmatch(r"[A-Z]|s\d+", name) or re.match(r"(R|M|ref)\.", name) or not re.match(r"[A-Za-z_]", name):
        name = f"in_{name}"
    while name in taken:
        name += "_"
    return name


def text_shape(shape: Sequence[object]) -> tuple[Size, ...]:
    """Dims as plain data: numbers, or the text of symbolic sizes."""
    return tuple(size if isinstance(size, int) else str(size) for size in shape)
