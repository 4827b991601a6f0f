"""What Python does with the rows of one expert after the other, done to the rows of all experts at once.

While a model is captured, a tensor that holds the rows of one expert is in truth a tensor of all rows, and it is
written down which expert's rows it stands for and what was done to it (`Rows`). That is sound as long as everything
that is done to it works row by row, which `ExpertRows.used` sees to. Where the experts' rows come together again,
what was written down must be the same for every expert but for the weights; `ExpertRows.whole` does it once for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor

EACH = frozenset({
    "abs", "add", "bfloat16", "celu", "clamp", "clamp_max", "clamp_min", "clip", "clone", "contiguous", "cos",
    "detach", "div", "double", "dropout", "elu", "erf", "exp", "expm1", "float", "gelu", "half", "hardsigmoid",
    "hardswish", "hardtanh", "leaky_relu", "log", "log1p", "logical_not", "logsigmoid", "maximum", "minimum", "mish",
    "mul", "multiply", "neg", "negative", "pow", "reciprocal", "relu", "relu6", "rsqrt", "rsub", "selu", "sigmoid",
    "sign", "silu", "sin", "softplus", "sqrt", "square", "sub", "subtract", "tanh", "to", "true_divide", "type",
    "type_as", "where", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__",
    "__rtruediv__", "__pow__", "__rpow__", "__neg__", "__abs__",
})
"""What works element by element, by the names of torch's functions, methods and operators."""
LAST: dict[str, tuple[int, int | None]] = {"softmax": (1, None), "log_softmax": (1, None), "chunk": (2, 0),
                                           "split": (2, 0)}
"""What works along one axis, which must not be that of the rows: the axis's place among the arguments, and the axis
that is taken if none is said."""
PRODUCTS = frozenset({"linear", "matmul", "mm", "__matmul__"})
VIEWS = frozenset({"__getitem__", "select", "unsqueeze", "squeeze", "view", "reshape", "t", "T", "transpose"})
"""What gives the same part of a tensor each time it is called."""
SHAPES = frozenset({"shape", "size", "numel", "dim", "ndim"})
_TURNS = frozenset({"T", "mT", "t", "transpose", "swapaxes"})


class NotByRow(RuntimeError):
    """Rows of one expert are used in a way that cannot be done for all experts at once."""


class Group(ABC):
    """Rows that belong to experts 0 to `experts - 1`, each to one."""

    experts: int

    @abstractmethod
    def same(self, other: Group) -> bool:
        """Whether both mean the same rows in the same order."""

    @abstractmethod
    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        """All rows x [N, in], each by the weight [E, out, in] (turned if transposed) and bias of its expert."""


@dataclass(eq=False)
class Rows:
    """The rows of one expert: those of a whole tensor (`made` is None), or what `made` does to such rows.

    `size`: how many they are, known to the exporter only. `tensor` has the rows of all experts. `item`: which of
    several results it is.
    """

    group: Group
    expert: int
    size: Any
    tensor: Tensor
    made: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    item: int | None = None

    @property
    def axis(self) -> int:
        """The axis of the rows in the tensor: not the first for `x[None, places]`."""
        return int(self.made is torch.Tensor.__getitem__ and isinstance(self.args[1], tuple)
                   and self.args[1][0] is None)

    def beside(self, other: Rows) -> bool:
        """Whether both are rows of the same expert."""
        return self.expert == other.expert and self.group.same(other.group)


@dataclass(frozen=True, eq=False)
class _Part:
    """A matrix or vector that may be `whole[index]`, `turned` if transposed after that."""

    whole: Tensor | None
    index: int
    own: Tensor
    turned: bool = False


@dataclass
class ExpertRows:
    """The tensors that stand for rows of experts, by address; and parts of weights, which experts multiply by."""

    rows: dict[int, Rows] = field(default_factory=dict)
    parts: dict[int, _Part] = field(default_factory=dict)
    origins: dict[int, tuple[str, Tensor, Any]] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)

    def hold(self, rows: Rows) -> Tensor:
        """The tensor of these rows, known as such from now on."""
        self.rows[id(rows.tensor)] = rows
        return rows.tensor

    def held(self, one: Any) -> Rows | None:
        """The rows that a tensor stands for, None for other things."""
        return self.rows.get(id(one)) if isinstance(one, Tensor) else None

    def among(self, args: Any) -> list[Rows]:
        """All rows among nested arguments."""
        return [row for row in map(self.held, pytree.tree_leaves(args)) if row is not None] if self.rows else []

    # What is done with them

    def used(self, name: str, func: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """A call that has rows of one expert among its arguments. NotByRow where it mixes rows."""
        if any(row.axis for row in self.among((args, given))) and name not in ("reshape", "view"):
            raise NotByRow(f"rows of one expert read by `{name}`")
        if name in SHAPES or func.__name__ == "__get__":
            return self._asked(name, self.held(args[0]), func, args, given)
        read = self.among((args, given))
        if not self._by_row(name, args, given, [row.tensor for row in read]):
            raise NotByRow(f"rows of one expert read by `{name}`")
        if not all(row.beside(read[0]) for row in read):
            raise NotByRow(f"rows of different experts read by `{name}`")
        return self.record(read[0], func, func(*args, **given), args, given)

    def record(self, of: Rows, func: Any, found: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """Write down that rows are what `func` makes of its arguments."""
        def plain(one: Any) -> Any:
            return self.held(one) or one

        kept = pytree.tree_map(plain, args), pytree.tree_map(plain, given)
        several = isinstance(found, tuple | list)
        made = [self.hold(Rows(of.group, of.expert, of.size, one, func, *kept, item=i if several else None))
                for i, one in enumerate(found if several else (found,))]
        return type(found)(made) if several else made[0]

    def _asked(self, name: str, rows: Rows | None, func: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """A property of rows of one expert, of which there are only as many as it has."""
        if rows is None or name in ("T", "mT", "H", "mH", "data", "grad"):
            raise NotByRow(f"rows of one expert read by `{name}`")
        found = func(*args, **given)
        if name == "shape" or (name == "size" and isinstance(found, tuple)):
            return torch.Size((rows.size, *found[1:]))
        if name == "size":
            axis = given.get("dim", args[-1])
            return rows.size if axis in (0, -rows.tensor.ndim) else found
        return rows.size * (found // rows.tensor.shape[0]) if name == "numel" else found

    def _by_row(self, name: str, args: tuple[Any, ...], given: dict[str, Any], read: list[Tensor]) -> bool:
        """Whether a call does the same to each row of a piece, whatever the other rows are."""
        rank, first = read[0].ndim, self.held(args[0]) is not None
        if given.get("inplace") or "out" in given or (name == "dropout" and any(flag is True for flag in args[2:])):
            return False
        if name in PRODUCTS:
            return first and rank == 2 and len(read) == 1
        if any(one.ndim != rank for one in read):
            return False
        if name in EACH:
            others = [one for one in pytree.tree_leaves((args, given))
                      if isinstance(one, Tensor) and self.held(one) is None]
            return all(one.ndim < rank or (one.ndim == rank and is_size(one.shape[0], 1)) for one in others)
        if name in LAST and first:
            place, usual = LAST[name]
            axis = given.get("dim", args[place] if len(args) > place else usual)
            return isinstance(axis, int) and axis % rank != 0
        if name in ("unsqueeze", "squeeze") and first:
            axis = given.get("dim", args[1] if len(args) > 1 else None)
            return isinstance(axis, int) and axis % (rank + (name == "unsqueeze")) != 0
        if name in ("reshape", "view") and first and not given:
            shape = tuple(args[1]) if isinstance(args[1], tuple | list) else args[1:]
            last = len(shape) - 1
            return shape[:1] == (-1,) and 0 <= last < rank and all(
                map(is_size, args[0].shape[rank - last:], shape[1:])) and all(
                is_size(size, 1) for size in args[0].shape[:rank - last - 1])
        return name == "__getitem__" and first and _keeps_rows(args[1], rank)

    # All experts at once

    def whole(self, rows: Sequence[Rows], done: dict[int, Any] | None = None) -> Tensor:
        """What is done to the rows of each expert, in order, done to all rows at once. NotByRow where experts differ
        in more than weights."""
        first, done = rows[0], {} if done is None else done
        if id(first) in done:
            return cast("Tensor", done[id(first)])
        if any(row.made is not first.made or row.item != first.item for row in rows):
            raise NotByRow("not every expert does the same")
        leaves, specs = zip(*(pytree.tree_flatten((row.args, row.kwargs)) for row in rows), strict=True)
        if any(spec != specs[0] for spec in specs):
            raise NotByRow("not every expert does the same")
        columns = list(zip(*leaves, strict=True))
        if first.made is None:
            found: Tensor = self._same(columns[0])
            return found
        if name_of(first.made) in PRODUCTS:
            found = self._product(first, self.whole(columns[0], done), columns[1:])
        else:
            values = [self.whole(column, done) if isinstance(column[0], Rows) else self._same(column)
                      for column in columns]
            args, kwargs = pytree.tree_unflatten(values, specs[0])
            made = first.made(*args, **kwargs)
            found = made if first.item is None else made[first.item]
        done[id(first)] = found
        return found

    def _product(self, first: Rows, x: Tensor, columns: list[tuple[Any, ...]]) -> Tensor:
        """`linear(x, w[e], b[e])` or `x @ w[e]` for each expert as one operator."""
        tensors = [column for column in columns if isinstance(column[0], Tensor)]
        if not tensors or any(column[0] is not None and not isinstance(column[0], Tensor) for column in columns):
            raise NotByRow(f"rows of one expert read by `{name_of(first.made)}`")
        weight, turned = self._stacked(tensors[0])
        bias = self._stacked(tensors[1])[0] if len(tensors) > 1 else None
        if weight.ndim != 3:
            raise NotByRow(f"rows of one expert multiplied by a tensor of rank {weight.ndim - 1}")
        return first.group.product(x, weight, bias, turned if name_of(first.made) == "linear" else not turned)

    def _stacked(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, bool]:
        """One tensor of the experts' tensors, and whether each is the transposed of its slice of that one."""
        parts = [self.parts.get(id(one)) or _Part(None, 0, one) for one in tensors]
        whole, turned = parts[0].whole, parts[0].turned
        if any(part.turned != turned for part in parts):
            return torch.stack(tensors), False
        if whole is not None and is_size(whole.shape[0], len(parts)) and all(
                self._same_part(part.whole, whole) and part.index == e for e, part in enumerate(parts)):
            return whole, turned
        return torch.stack([part.own for part in parts]), turned

    def _same(self, column: tuple[Any, ...]) -> Any:
        """An argument that is the same for every expert."""
        first = column[0]
        if isinstance(first, Tensor):
            if not all(self._same_part(one, first) for one in column):
                raise NotByRow("experts read different tensors outside of a linear map")
        elif any(isinstance(one, Tensor | Rows) or one != first for one in column):
            raise NotByRow("not every expert does the same")
        return first

    def _same_part(self, one: Any, other: Tensor) -> bool:
        """Whether tensors are the same, or the same parts of one tensor."""
        if one is other:
            return True
        own, origin = self.origins.get(id(one)), self.origins.get(id(other))
        if own is None or origin is None or own[0] != origin[0]:
            return False
        (leaves, spec), (others, other_spec) = pytree.tree_flatten(own[2]), pytree.tree_flatten(origin[2])
        return self._same_part(own[1], origin[1]) and spec == other_spec and all(
            x is y or is_size(x, y) or (isinstance(x, slice | type(None)) and x == y)
            for x, y in zip(leaves, others, strict=True))

    def note(self, name: str, args: Sequence[Any], given: dict[str, Any], found: Any) -> None:
        """Remember matrices and vectors that are parts of larger tensors, and transposed ones."""
        if not isinstance(found, tuple | Tensor) or not args or not isinstance(args[0], Tensor):
            return
        x = args[0]
        if name in VIEWS and isinstance(found, Tensor):
            self.origins[id(found)] = name, x, (tuple(args[1:]), given)
            self.alive.append(found)  # so that no address is seen twice
        if name == "__getitem__" and isinstance(args[1], int) and isinstance(found, Tensor):
            self.parts[id(found)] = _Part(x, args[1] if args[1] >= 0 else x.shape[0] + args[1], found)
        elif name in ("unbind", "__iter__") and isinstance(found, tuple):
            if not (args[1:] and args[1]) and not given.get("dim"):
                self.parts |= {id(one): _Part(x, i, one) for i, one in enumerate(found)}
        elif name == "select" and not given and len(args) == 3 and args[1] == 0 and isinstance(found, Tensor):
            self.parts[id(found)] = _Part(x, args[2], found)
        elif name in _TURNS and x.ndim == 2 and isinstance(found, Tensor):
            old = self.parts.get(id(x)) or _Part(None, 0, x)
            self.parts[id(found)] = _Part(old.whole, old.index, old.own, not old.turned)
            self.alive.append(found)  # so that no address is seen twice


def name_of(func: Any) -> str:
    """The name of a function, method or property of torch."""
    name: str = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def is_size(size: Any, number: Any) -> bool:
    """Whether two sizes are known to be equal, without asking the exporter to take it for granted."""
    if isinstance(size, int) and isinstance(number, int):
        return size == number
    return isinstance(size, torch.SymInt) and isinstance(number, torch.SymInt) and bool(
        size.node.expr == number.node.expr)


def _keeps_rows(index: Any, rank: int) -> bool:
    """Whether `x[index]` has all of x's rows, in order, along its first axis."""
    entries = index if isinstance(index, tuple) else (index,)
    if any(isinstance(entry, Tensor | list) for entry in entries):
        return False
    if entries[0] is Ellipsis:
        return len([entry for entry in entries[1:] if entry is not None]) < rank
    return isinstance(entries[0], slice) and entries[0] == slice(None)
