"""How a user's call of the model becomes named inputs, and named outputs become the model's result.

Both are plain data: `to_json` gives what an artifact's manifest stores, `from_json` reads it back.
A nested input is a tree of the user's containers; its leaves are tensors (named, typed) or constants
fixed when the model was captured. Tensors are anything with `.shape` and `.dtype`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, TypeAlias

from dlbc_runtime.errors import InputError

Size: TypeAlias = "int | str"
Json: TypeAlias = "None | bool | int | float | str | list[Json] | dict[str, Json]"

UNBOUNDED = 2**31 - 1
"""The upper end of a size's range where the model sets none."""

_DTYPES = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "int64": "i64",
           "int32": "i32", "int16": "i16", "int8": "i8", "uint8": "u8", "bool": "bool"}

_FULL = {short: name for name, short in _DTYPES.items()}


class SizeError(InputError):
    """The shape of an input is one that the captured model was not made for."""


class RangeError(SizeError):
    """Sizes of axes that may change are ones that the model treats otherwise: another capture may take them."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor: its unique name, element type (`f32`, `i64`, ...) and shape (numbers, or size names)."""

    name: str
    dtype: str
    shape: tuple[Size, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Constant:
    """A value that is no tensor and was fixed at capture. `optional`: a call may leave it out."""

    value: bool | int | float | str | None
    optional: bool = False


@dataclass(frozen=True)
class Container:
    """A dict (with `keys`), list or tuple of parts."""

    kind: str
    parts: tuple[Tree, ...]
    keys: tuple[str, ...] = ()

    def named(self) -> Iterator[tuple[str, Tree]]:
        """The parts with their key, or their index as text."""
        return zip(self.keys or map(str, range(len(self.parts))), self.parts, strict=True)


Tree: TypeAlias = "TensorSpec | Constant | Container"


@dataclass(frozen=True)
class InputSpec:
    """The forward method's parameters as captured.

    `positional` are the names that may be given by position, in order; `variadic` the name of `*args`
    (or ""); `trees` what each captured parameter holds; `defaults` the parameters with a default that
    the capture left alone; `sizes` the range of every named size; `conditions` what else the capture took for
    granted of them, such as `B % 2 != 0`.
    """

    positional: tuple[str, ...]
    trees: Mapping[str, Tree]
    variadic: str = ""
    defaults: tuple[str, ...] = ()
    sizes: Mapping[str, tuple[int, int]] | None = None
    conditions: tuple[str, ...] = ()

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensor inputs, in the order of the compiled forward's parameters."""
        return tuple(spec for tree in self.trees.values() for spec in leaves(tree) if isinstance(spec, TensorSpec))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the tensor inputs, in the order of the compiled forward's parameters."""
        return tuple(spec.name for spec in self.tensors)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors of a call by name, in order. InputError for what is unknown, missing, surplus or of a
        wrong rank or element type; SizeError for sizes the captured model was not made for."""
        given = self._assign(args, kwargs)
        found: dict[str, Any] = {}
        for name, tree in self.trees.items():
            if name in given:
                _collect(tree, given.pop(name), name, found)
                continue
            absent = [leaf for leaf in leaves(tree) if not (isinstance(leaf, Constant) and leaf.optional)]
            if absent:
                what = f"input `{name}`" if isinstance(absent[0], TensorSpec) else f"`{name}={absent[0].value!r}`" \
                    if isinstance(absent[0], Constant) else f"`{name}`"
                raise InputError(f"{what} is missing", hint=f"the model was captured with {self}")
        for name, value in given.items():
            if value is not None:
                raise InputError(f"`{name}` was not given when the model was captured",
                                 hint=f"compile with `{name}` among the example inputs, or leave it out")
        self._check_sizes(found)
        return found

    def _assign(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        given = dict(zip(self.positional, args, strict=False))
        surplus = tuple(args[len(self.positional):])
        if surplus and self.variadic:
            given[self.variadic] = surplus
        elif surplus:
            raise InputError(f"{len(args)} inputs by position, the model takes {len(self.positional)}",
                             hint=f"the model takes {self}")
        known = {*self.positional, *self.trees, *self.defaults} - {self.variadic}
        for name, value in kwargs.items():
            if name not in known:
                near = get_close_matches(name, known, 1)
                raise InputError(f"unknown input `{name}`",
                                 hint=f"did you mean `{near[0]}`?" if near else f"the model takes {self}")
            if name in given:
                raise InputError(f"input `{name}` is given twice, by position and by name")
            given[name] = value
        return given

    def _check_sizes(self, found: Mapping[str, Any]) -> None:
        sizes: dict[str, tuple[int, str]] = {}
        pending: list[tuple[TensorSpec, int, str]] = []
        for spec in self.tensors:
            for position, (wanted, size) in enumerate(zip(spec.shape, found[spec.name].shape, strict=True)):
                if isinstance(wanted, int):
                    if wanted != size:
                        raise SizeError(f"axis {position} of `{spec.name}` is {size}, the model was captured for "
                                        f"{wanted}", hint="compile again with inputs of this size")
                elif not wanted.isidentifier():
                    pending.append((spec, position, wanted))
                elif sizes.setdefault(wanted, (size, spec.name))[0] != size:
                    other, where = sizes[wanted]
                    raise SizeError(f"axis {position} of `{spec.name}` is {size}, but `{where}` has {other} there",
                                    hint=f"both are the size {wanted}")
        for spec, position, wanted in pending:
            size, known = found[spec.name].shape[position], {name: size for name, (size, _) in sizes.items()}
            if evaluate(wanted, known) != size:
                raise SizeError(f"axis {position} of `{spec.name}` is {size}, it should be {wanted} = "
                                f"{evaluate(wanted, known)}", hint="compile again with inputs of this size")
        for name, (low, high) in (self.sizes or {}).items():
            size, where = sizes.get(name, (low, ""))
            if not low <= size <= high:
                raise RangeError(f"the size {name} of `{where}` is {size}; the model takes {low} to "
                                 f"{'any' if high == UNBOUNDED else high}", hint="give inputs of a size in that range")
        known = {name: size for name, (size, _) in sizes.items()}
        for condition in self.conditions:
            if not holds(condition, known):
                raise RangeError(f"the model was captured for sizes with {condition}, these are "
                                 + ", ".join(f"{name} = {size}" for name, size in known.items()),
                                 hint="compile again with inputs of these sizes")

    def __str__(self) -> str:
        return "(" + ", ".join(f"{name}: {_shown(tree)}" for name, tree in self.trees.items()) + ")"

    def to_json(self) -> dict[str, Json]:
        """The same as plain JSON data."""
        return {"positional": list(self.positional), "variadic": self.variadic, "defaults": list(self.defaults),
                "trees": {name: _tree_to_json(tree) for name, tree in self.trees.items()},
                "sizes": {name: [low, high] for name, (low, high) in (self.sizes or {}).items()},
                "conditions": list(self.conditions)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> InputSpec:
        """Read what `to_json` wrote."""
        return InputSpec(tuple(data["positional"]), {k: _tree_from_json(v) for k, v in data["trees"].items()},
                         data["variadic"], tuple(data["defaults"]),
                         {name: (low, high) for name, (low, high) in data["sizes"].items()},
                         tuple(map(str, data["conditions"])))


@dataclass(frozen=True)
class OutputSpec:
    """The model's result: a tree whose tensor leaves are the compiled forward's results in order."""

    tree: Tree

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensor outputs in order."""
        return tuple(spec for spec in leaves(self.tree) if isinstance(spec, TensorSpec))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the tensor outputs in order: `logits`, `extra.0`, or `output` for a lone tensor."""
        return tuple(spec.name for spec in self.tensors)

    def pack(self, results: Sequence[Any]) -> Any:
        """The results in the containers that the model returns (a dict for an object with named fields)."""
        return _pack(self.tree, iter(results))

    def to_json(self) -> dict[str, Json]:
        """The same as plain JSON data."""
        return {"tree": _tree_to_json(self.tree)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> OutputSpec:
        """Read what `to_json` wrote."""
        return OutputSpec(_tree_from_json(data["tree"]))


def leaves(tree: Tree) -> Iterator[TensorSpec | Constant]:
    """The leaves of a tree in order."""
    if isinstance(tree, Container):
        for part in tree.parts:
            yield from leaves(part)
    else:
        yield tree


def dtype_name(tensor: Any) -> str:
    """The element type of a torch tensor or numpy array: `f32`; its own name where we have none."""
    name = str(tensor.dtype).rpartition(".")[2]
    return _DTYPES.get(name, name)


def evaluate(text: str, sizes: Mapping[str, int]) -> int:
    """The number that a size expression such as `2*T + 1` stands for. Arithmetic only: the text is data."""
    return _evaluate(ast.parse(text, mode="eval").body, sizes)


def evaluate_parsed(expression: ast.expr, sizes: Mapping[str, int]) -> int:
    """`evaluate`, of an expression that was parsed before."""
    return _evaluate(expression, sizes)


def holds(condition: str, sizes: Mapping[str, int]) -> bool:
    """Whether sizes fulfil a comparison of two size expressions."""
    node = ast.parse(condition, mode="eval").body
    if not isinstance(node, ast.Compare) or len(node.ops) != 1 or type(node.ops[0]) not in _COMPARISONS:
        raise InputError(f"`{condition}` is not a comparison of sizes")
    try:
        return _COMPARISONS[type(node.ops[0])](_evaluate(node.left, sizes), _evaluate(node.comparators[0], sizes))
    except ZeroDivisionError:  # `12 % (T - 3) == 0` where T is 3
        return False


_COMPARISONS: dict[type, Callable[[int, int], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge}
_ARITHMETIC: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod}


def _evaluate(node: ast.expr, sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.Name(id=name) if name in sizes:
            return sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_evaluate(inner, sizes)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _ARITHMETIC:
            return _ARITHMETIC[type(sign)](_evaluate(left, sizes), _evaluate(right, sizes))
        case ast.Call(func=ast.Name(id="max" | "min" as name), args=[left, right]):
            return (max if name == "max" else min)(_evaluate(left, sizes), _evaluate(right, sizes))
    raise InputError(f"`{ast.unparse(node)}` is not a size", hint=f"known sizes: {', '.join(sizes) or 'none'}")


def _collect(tree: Tree, value: Any, path: str, found: dict[str, Any]) -> None:
    """Put the tensors of `value` into `found` by name, checking it against `tree`."""
    if isinstance(tree, TensorSpec):
        found[tree.name] = _checked(tree, value, path)
    elif isinstance(tree, Constant):
        if hasattr(value, "shape") or value != tree.value or (value is None) != (tree.value is None):
            shown = "a tensor" if hasattr(value, "shape") else repr(value)
            raise InputError(f"`{path}` is {shown}; the model was captured with {tree.value!r}",
                             hint=f"pass {tree.value!r}, or compile again with this value")
    else:
        for key, part, inner in _parts(tree, value, path):
            _collect(part, inner, f"{path}.{key}", found)


def _parts(tree: Container, value: Any, path: str) -> Iterator[tuple[str, Tree, Any]]:
    if tree.kind == "dict":
        if not isinstance(value, Mapping):
            raise InputError(f"`{path}` is {type(value).__name__}, it should be a dict",
                             hint=f"with the keys {', '.join(tree.keys)}")
        odd = [str(key) for key in value if str(key) not in tree.keys] + [k for k in tree.keys if k not in value]
        if odd:
            raise InputError(f"`{path}.{odd[0]}` is {'missing' if odd[0] in tree.keys else 'unknown'}",
                             hint=f"`{path}` has the keys {', '.join(tree.keys)}")
        yield from ((key, part, value[key]) for key, part in tree.named())
    else:
        if not isinstance(value, list | tuple) or len(value) != len(tree.parts):
            shown = f"{type(value).__name__}" + (f" of {len(value)}" if isinstance(value, list | tuple) else "")
            raise InputError(f"`{path}` is {shown}, it should be a {tree.kind} of {len(tree.parts)}")
        yield from ((key, part, inner) for (key, part), inner in zip(tree.named(), value, strict=True))


def _checked(spec: TensorSpec, value: Any, path: str) -> Any:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise InputError(f"`{path}` is {type(value).__name__}, not a tensor", hint=f"the model takes {spec}")
    if len(value.shape) != len(spec.shape):
        raise InputError(f"`{path}` has {len(value.shape)} axes {tuple(value.shape)}, the model takes "
                         f"{len(spec.shape)}: {spec}", hint="`.unsqueeze(0)` adds a batch axis of size 1")
    if dtype_name(value) != spec.dtype:
        raise InputError(f"`{path}` holds {dtype_name(value)}, the model takes {spec.dtype}",
                         hint=f"convert it with `.to(torch.{_FULL.get(spec.dtype, spec.dtype)})`")
    return value


def _pack(tree: Tree, results: Iterator[Any]) -> Any:
    if isinstance(tree, TensorSpec):
        return next(results)
    if isinstance(tree, Constant):
        return tree.value
    parts = [_pack(part, results) for part in tree.parts]
    if tree.kind == "dict":
        return dict(zip(tree.keys, parts, strict=True))
    return parts if tree.kind == "list" else tuple(parts)


def _shown(tree: Tree) -> str:
    if isinstance(tree, Container):
        inner = ", ".join(f"{key}: {_shown(part)}" if tree.keys else _shown(part) for key, part in tree.named())
        return f"{{{inner}}}" if tree.kind == "dict" else f"[{inner}]" if tree.kind == "list" else f"({inner})"
    return str(tree) if isinstance(tree, TensorSpec) else repr(tree.value)


def _tree_to_json(tree: Tree) -> Json:
    if isinstance(tree, TensorSpec):
        return {"tensor": tree.name, "dtype": tree.dtype, "shape": list(tree.shape)}
    if isinstance(tree, Constant):
        return {"constant": tree.value, "optional": tree.optional}
    return {"container": tree.kind, "keys": list(tree.keys), "parts": [_tree_to_json(part) for part in tree.parts]}


def _tree_from_json(data: Mapping[str, Any]) -> Tree:
    if "tensor" in data:
        return TensorSpec(data["tensor"], data["dtype"], tuple(data["shape"]))
    if "constant" in data:
        return Constant(data["constant"], data["optional"])
    return Container(data["container"], tuple(map(_tree_from_json, data["parts"])), tuple(data["keys"]))
