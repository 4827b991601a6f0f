"""A digest of a live model: its code, attributes, hooks, and the form (not the numbers) of its weights.

Two models of one fingerprint compute the same function of inputs and weights. What cannot be described,
such as an open file or a lock, is an error (`Uncapturable`), never left out.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
import re
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LARGEST_TENSOR = 1 << 26
"""Bytes of a tensor that is a plain attribute: its numbers are part of the program, and hashed."""
MOST_PARTS = 1_000_000

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented), range, slice,
          torch.dtype, torch.device, torch.layout, torch.memory_format)
_CONTAINERS = (dict, list, tuple, set, frozenset, str, int, float, bytes)
_READABLE = (object, *_CONTAINERS, OrderedDict, defaultdict, types.SimpleNamespace)
"""Types written in C whose instances can be read in full."""
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
          "_forward_pre_hooks_with_kwargs")
_OF_EVERY_CLASS = frozenset({"__dict__", "__weakref__", "__module__", "__doc__", "__annotations__", "__qualname__",
                             "__abstractmethods__", "_abc_impl", "__parameters__", "__orig_bases__", "__slots__",
                             "__firstlineno__", "__static_attributes__", "__annotate_func__", "__match_args__",
                             "__dataclass_fields__", "__dataclass_params__"})
_VOLATILE = frozenset({"_original_object_hash"})
"""Attributes that differ from process to process and say nothing: transformers keeps `hash()` of a config."""
_HEAP_TYPE = 1 << 9


class Uncapturable(Exception):
    """Something whose state cannot be described; the text says where and what."""


class Fingerprint:
    """Collects descriptions; `hexdigest` is the digest of them all, in the order they were added."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._seen: dict[int, str] = {}
        self._alive: list[object] = []  # what was seen stays alive, so that no address is seen twice
        self._parts = 0

    def add(self, value: object, where: str) -> None:
        """Describe any value. Raises Uncapturable, naming the place `where` and what is there."""
        try:
            self._add(value, where)
        except RecursionError as problem:
            raise Uncapturable(f"`{where}` is nested too deeply") from problem

    def hexdigest(self) -> str:
        """64 characters."""
        return self._hash.hexdigest()

    def _token(self, *texts: object) -> None:
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise Uncapturable("the model refers to too many objects")
        for text in texts:
            self._hash.update(f"{text}\0".encode("utf-8", "surrogatepass"))

    def _met(self, value: object) -> bool:
        """True, with a reference to the first meeting, for an object that was described before."""
        if id(value) in self._seen:
            self._token("again", self._seen[id(value)])
            return True
        self._seen[id(value)] = str(len(self._seen))
        self._alive.append(value)
        return False

    def _add(self, value: object, where: str) -> None:
        kind = type(value)
        if kind in _PLAIN:
            self._token(kind.__name__, repr(value))
        elif isinstance(value, enum.Enum):
            self._token("enum", kind.__module__, kind.__qualname__, value.name, repr(value.value))
        elif isinstance(value, np.dtype | PurePath | re.Pattern):
            self._token(kind.__name__, repr(value))
        elif kind in (tuple, torch.Size):
            self._token(kind.__name__, len(value))  # type: ignore[arg-type]
            for i, item in enumerate(value):  # type: ignore[arg-type, var-annotated]
                self._add(item, f"{where}[{i}]")
        elif self._met(value):
            return
        elif isinstance(value, type):
            self._class(value, where)
        elif isinstance(value, nn.Module):
            self._model(value, where)
        elif isinstance(value, Tensor):
            self._tensor(value, where)
        elif isinstance(value, types.FunctionType):
            self._function(value, where)
        elif isinstance(value, types.MethodType):
            self._token("method")
            self._add(value.__func__, where)
            self._add(value.__self__, f"{where}.__self__")
        elif isinstance(value, functools.partial):
            self._token("partial")
            self._add((value.func, value.args, dict(value.keywords)), where)
        elif isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType
                        | types.GetSetDescriptorType | types.MemberDescriptorType):
            self._token("builtin", getattr(value, "__module__", ""), getattr(value, "__qualname__", repr(value)))
            owner = getattr(value, "__self__", None)
            if owner is not None and not isinstance(owner, types.ModuleType):
                self._add(owner, f"{where}.__self__")
        elif isinstance(value, types.ModuleType):
            self._token("module", value.__name__, _stamp(value.__name__))
        elif isinstance(value, logging.Logger):
            self._token("logger")
        elif kind is list:
            self._token("list")
            self._add(tuple(value), where)  # type: ignore[arg-type]
        elif kind in (set, frozenset):
            self._token(kind.__name__, *sorted(_element(item, where) for item in value))  # type: ignore[attr-defined]
        elif kind in (dict, types.MappingProxyType):
            self._items(value, where)  # type: ignore[arg-type]
        elif kind.__module__ == "numpy":
            self._numpy(value, where)
        elif isinstance(value, property):
            self._add((value.fget, value.fset), where)
        elif isinstance(value, staticmethod | classmethod):
            self._add(value.__func__, where)
        elif isinstance(value, functools.cached_property):
            self._add(value.func, where)
        elif hasattr(value, "__wrapped__"):
            self._token(kind.__qualname__)
            self._add(value.__wrapped__, where)
        else:
            self._object(value, where)

    def _items(self, value: Mapping[object, object], where: str) -> None:
        self._token("dict", len(value))
        for key, item in value.items():
            self._add(key, f"a key of {where}")
            self._add(item, f"{where}[{key!r}]" if isinstance(key, str | int) else where)

    def _tensor(self, tensor: Tensor, where: str) -> None:
        self._token("tensor", *_form(tensor))
        if tensor.device.type == "meta":
            return
        if tensor.numel() * tensor.element_size() > LARGEST_TENSOR:
            raise Uncapturable(f"`{where}` is a large tensor that is no parameter and no buffer")
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        self._hash.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")

    def _numpy(self, value: Any, where: str) -> None:
        if not hasattr(value, "dtype") or value.dtype.hasobject:
            return self._object(value, where)
        self._token("numpy", value.dtype, value.shape)
        self._hash.update(value.tobytes())

    # Code

    def _function(self, function: types.FunctionType, where: str) -> None:
        self._token("function", function.__module__, function.__qualname__)
        if _installed(function.__module__) and _installed_file(function.__code__.co_filename):
            self._token(_stamp(function.__module__))
        else:
            self._code(function.__code__, where)
            for name in dict.fromkeys(_names(function.__code__)):
                if name in function.__globals__:
                    self._global(name, function.__globals__[name], function, where)
        self._add((function.__defaults__, function.__kwdefaults__), f"a default of {where}")
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._token(name)
            try:
                content = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            self._add(content, f"{where}:{name}")
        if vars(function):
            self._add(vars(function), where)

    def _global(self, name: str, value: object, function: types.FunctionType, where: str) -> None:
        self._token("global", name)
        self._add(value, f"{function.__module__}.{name}")
        if isinstance(value, types.ModuleType) and not _installed(value.__name__):
            for attribute in dict.fromkeys(_names(function.__code__)):
                if attribute in vars(value):
                    self._token(attribute)
                    self._add(vars(value)[attribute], f"{value.__name__}.{attribute}")

    def _code(self, code: types.CodeType, where: str) -> None:
        # Line numbers are part of it: error messages and the IR show them.
        self._token("code", code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars,
                    code.co_flags, code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount,
                    Path(code.co_filename).name, code.co_firstlineno)
        self._hash.update(code.co_code + code.co_linetable + getattr(code, "co_exceptiontable", b""))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, where)
            else:
                self._constant(constant, where)

    def _constant(self, constant: object, where: str) -> None:
        """Constants of code are shared or not as the interpreter likes, so they are not remembered by address."""
        if isinstance(constant, tuple):
            self._token("tuple", len(constant))
            for item in constant:
                self._constant(item, where)
        elif isinstance(constant, frozenset):
            self._token("frozenset", *sorted(map(repr, constant)))
        else:
            self._token(type(constant).__name__, repr(constant))

    def _class(self, cls: type, where: str) -> None:
        self._token("class", cls.__module__, cls.__qualname__)
        if cls.__module__ in ("builtins", "typing", "abc"):
            return
        for base in cls.__bases__:
            if base is not object:
                self._add(base, where)
        installed = _installed(cls.__module__)
        if installed:
            self._token(_stamp(cls.__module__))
        for name, value in vars(cls).items():
            if name in _OF_EVERY_CLASS or (installed and not _patched(value)):
                continue
            self._token(name)
            self._add(value, f"{cls.__qualname__}.{name}")

    # Objects

    def _model(self, model: nn.Module, where: str) -> None:
        """A module and all below it: one met from outside its tree is described in full, its numbers too."""
        self._token("model")
        outside, tree = where != "", dict(model.named_modules(remove_duplicate=False))
        new = {id(module): module for module in tree.values() if module is model or id(module) not in self._seen}
        weights = [t for m in new.values() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        for value in (*new.values(), *weights):
            if id(value) not in self._seen:  # so that attributes that refer to a part of the tree mean just that part
                self._seen[id(value)] = str(len(self._seen))
                self._alive.append(value)
        for path, module in tree.items():
            self._token("at", path, self._seen[id(module)])
            if new.pop(id(module), None) is not None:
                place = f"{where}.{path}" if outside and path else where or path
                self._module(module, place, values=outside)

    def _module(self, module: nn.Module, where: str, *, values: bool) -> None:
        self._add(type(module), where)
        self._token("training", module.training, sorted(module._non_persistent_buffers_set))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            self._token(name, name in module._parameters)
            if tensor is None:
                self._token("none")
            elif values:
                self._tensor(tensor, f"{where}.{name}")
            else:
                self._token(self._seen[id(tensor)], *_form(tensor))  # the number tells which are one tensor
        for name, part in vars(module).items():
            place = f"{where}.{name}" if where else name
            if name in _HOOKS:
                self._token(name, len(part))  # keys are a process-wide count of hooks
                for hook in part.values():
                    self._add(hook, place)
            elif name not in _OF_EVERY_MODULE or name == "forward":
                self._token(name)
                self._add(part, place)

    def _object(self, value: object, where: str) -> None:
        cls = type(value)
        foreign = any(not base.__flags__ & _HEAP_TYPE and base not in _READABLE for base in cls.__mro__)
        state: dict[str, object] = dict(getattr(value, "__dict__", {}))
        for base in cls.__mro__:
            slots = vars(base).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else tuple(slots):
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    state[name] = getattr(value, name)
        stateless = not hasattr(value, "__dict__") and not any("__slots__" in vars(base) for base in cls.__mro__)
        if foreign or (stateless and not isinstance(value, _CONTAINERS)) or _is_io(cls):
            raise Uncapturable(f"`{where}` is a {cls.__module__}.{cls.__qualname__}, whose state cannot be read")
        self._token("object")
        self._add(cls, where)
        if isinstance(value, dict):
            self._items(value, where)
        elif isinstance(value, list | tuple):
            self._add(list(value), where)
        elif isinstance(value, set | frozenset):
            self._token(*sorted(_element(item, where) for item in value))
        elif isinstance(value, str | int | float | bytes):
            self._token(repr(value))
        for name, part in state.items():
            if name not in _VOLATILE:
                self._token(name)
                self._add(part, f"{where}.{name}" if where else name)


def _form(tensor: Tensor) -> tuple[object, ...]:
    """What the compiler sees of a weight."""
    return type(tensor).__qualname__, tuple(tensor.shape), tensor.dtype, tensor.device.type


def _names(code: types.CodeType) -> Iterator[str]:
    """Names that code and the code inside of it looks up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _element(item: object, where: str) -> str:
    """Text of an element of a set, the same in every process."""
    if isinstance(item, type | types.FunctionType):
        return f"{item.__module__}.{item.__qualname__}"
    if isinstance(item, _PLAIN):
        return f"{type(item).__name__}:{item!r}"
    if isinstance(item, tuple):
        return f"({','.join(_element(part, where) for part in item)})"
    raise Uncapturable(f"`{where}` is a set that holds a {type(item).__name__}")


def _patched(value: object) -> bool:
    """Whether a method of an installed class was put there by code that is not installed."""
    function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
    function = function.fget if isinstance(function, property) else function
    return isinstance(function, types.FunctionType) and not _installed(function.__module__)


def _is_io(cls: type) -> bool:
    return any(base.__module__ in ("_io", "io", "_thread", "threading", "weakref", "_weakref", "socket")
               for base in cls.__mro__)


@functools.cache
def _installed_file(path: str) -> bool:
    """Whether a source file belongs to Python, an installed package, or is made by one (`<string>`)."""
    return (path.startswith("<") and "ipython" not in path) or any(
        part in ("site-packages", "dist-packages") for part in Path(path).parts) or _in_stdlib(path)


def _in_stdlib(path: str) -> bool:
    return path.startswith(str(Path(functools.__file__).parent)) or "frozen" in path


@functools.cache
def _installed(module: str | None) -> bool:
    """Whether a module is Python's, torch's, ours, or of an installed package: its files vouch for its code."""
    top = (module or "").partition(".")[0]
    if top == "__main__":
        return False
    if top in sys.stdlib_module_names:
        return True
    if top in ("torch", "numpy", "dlbc", "dlbc_runtime"):
        return True
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file is not None and any(part in ("site-packages", "dist-packages") for part in Path(file).parts)


@functools.cache
def _stamp(module: str) -> str:
    """What changes when the file of an installed module does: size and time of change."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or module.partition(".")[0] in ("torch", "numpy", "dlbc", "dlbc_runtime"):
        return ""  # their versions are in the key
    try:
        stat = Path(file).stat()
    except OSError:
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"
