"""Loops over experts as one operator each while a model is captured, `dlbc::grouped_linear`.

Mixtures of experts such as JetMoE's sort their rows by expert, count how many each expert has, and go through the
experts in a Python loop: `x.split(counts.tolist())`, a linear map of each piece by its expert's weight, `torch.cat`.
The exporter only sees sizes that depend on data. Inside `grouped_rows` such a loop is followed as it runs:

- the integers of `counts.tolist()` stay as the exporter makes them, and we remember which count each one is;
- a tensor split by them gives pieces that hold all rows, and we remember which rows each one stands for;
- what is done with a piece is written down, if it works row by row; anything else is refused;
- where all pieces are put together again, what was written down must be the same for every expert but for the
  weights. It is done once, to all rows, its linear maps by `dlbc::grouped_linear` with the weights of all experts.

Nothing here knows a class or a module: only what is done to the tensors counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.overrides import TorchFunctionMode

import dlbc.frontends.expert_ops  # noqa: F401  (defines the operator)

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
LAST = {"softmax": None, "log_softmax": None, "chunk": 0, "split": 0}
"""What works along one axis, which must not be that of the rows; with the axis it takes if none is said."""
PRODUCTS = frozenset({"linear", "matmul", "mm", "__matmul__"})
JOINS = frozenset({"cat", "concat", "concatenate"})
_NUMBERS = frozenset({"item", "tolist", "__int__", "__index__"})
_ASSUMPTIONS = frozenset({"_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"})
_TURNS = frozenset({"T", "mT", "t", "transpose", "swapaxes"})


class NotByRow(RuntimeError):
    """Rows of one expert are used in a way that cannot be done for all experts at once."""


@dataclass(frozen=True, eq=False)
class _Count:
    """The integer `counts[expert]`."""

    counts: Tensor
    expert: int

    def is_that_of(self, other: _Count) -> bool:
        """Whether both are the same number, perhaps read twice."""
        return self.counts is other.counts and self.expert == other.expert


@dataclass(eq=False)
class _Rows:
    """The rows of one expert: those of a whole tensor (`made` is None), or what `made` does to such rows.

    `tensor` has the rows of all experts. `item`: which of several results it is.
    """

    count: _Count
    size: Any
    tensor: Tensor
    made: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    item: int | None = None


@dataclass(frozen=True, eq=False)
class _Part:
    """A matrix or vector that may be `whole[index]`, `turned` if transposed after that."""

    whole: Tensor | None
    index: int
    own: Tensor
    turned: bool = False


@contextmanager
def grouped_rows() -> Iterator[GroupedRows]:
    """While it is entered, loops over experts in this thread are captured as `dlbc::grouped_linear`."""
    found = GroupedRows()
    with found:
        yield found


def drop_counts(program: ExportedProgram) -> None:
    """Remove the integers of counts, and what the exporter assumes of them, where loops no longer need them."""
    for node in list(program.graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "").partition(".")[0] in _ASSUMPTIONS:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code(_has_effects)
    program.graph_module.recompile()


def _has_effects(node: Node) -> bool:
    return node.op in ("placeholder", "output") or (
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)


@dataclass
class GroupedRows(TorchFunctionMode):
    """Calls of torch as they are made. `joined`: how many loops were found so far."""

    joined: int = 0
    counts: dict[Any, tuple[_Count, Any]] = field(default_factory=dict)
    rows: dict[int, _Rows] = field(default_factory=dict)
    parts: dict[int, _Part] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        """What a call of torch gives; loops over experts are followed."""
        name, given = _name(func), dict(kwargs or {})
        if name in _NUMBERS:
            return self._counted(args[0], func(*args, **given))
        if self.counts and name in ("split", "split_with_sizes"):
            sizes = self._sizes(args[0], *args[1:], **given)
            if sizes is not None:
                return self._pieces(args[0], sizes)
        if self.rows:
            inside = [one for one in pytree.tree_leaves((args, given)) if self._held(one) is not None]
            if inside:
                return self._used(name, func, tuple(args), given)
        found = func(*args, **given)
        self._part(name, args, given, found)
        return found

    # Where rows come from

    def _counted(self, tensor: Tensor, found: Any) -> Any:
        """`item()` of a count, or `tolist()` of several: which each integer is, if unknown while capturing."""
        if isinstance(found, list) and tensor.ndim == 1:
            counts = [(_Count(tensor, i), number) for i, number in enumerate(found)]
        else:
            part = self.parts.get(id(tensor))
            counts = [] if part is None or part.whole is None else [(_Count(part.whole, part.index), found)]
        for count, number in counts:
            symbol = _symbol(number)
            if symbol is not None and count.counts.ndim == 1:
                self.counts[symbol] = count, number
        return found

    def _sizes(self, x: Tensor, sizes: Any = None, dim: int = 0, **given: Any) -> list[tuple[_Count, Any]] | None:
        """The counts that a tensor is split by, if it is by all of one tensor's, along its first axis."""
        sizes = next((given[key] for key in ("split_size", "split_size_or_sections", "split_sizes") if key in given),
                     sizes)
        if not isinstance(sizes, list | tuple) or (dim % x.ndim if x.ndim else 1) or self._held(x) is not None:
            return None
        found = [self.counts.get(_symbol(size)) for size in sizes]
        known = [one for one in found if one is not None]
        if len(known) != len(found) or not _all_of_one([count for count, _ in known]):
            return None
        return known

    def _pieces(self, x: Tensor, sizes: list[tuple[_Count, Any]]) -> tuple[Tensor, ...]:
        return tuple(self._hold(_Rows(count, size, x.clone(), args=(x,))) for count, size in sizes)

    def _hold(self, rows: _Rows) -> Tensor:
        self.rows[id(rows.tensor)] = rows
        return rows.tensor

    def _held(self, one: Any) -> _Rows | None:
        return self.rows.get(id(one)) if isinstance(one, Tensor) else None

    # What is done with them

    def _used(self, name: str, func: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """A call that has rows of one expert among its arguments."""
        if name in JOINS:
            return self._join(name, *args, **given)
        first = self._held(args[0]) if args else None
        if name in ("shape", "size", "numel", "dim", "ndim") or func.__name__ == "__get__":
            return self._asked(name, first, func, args, given)
        if not self._by_row(name, args, given):
            raise NotByRow(f"rows of one expert read by `{name}`")
        read = [row for row in map(self._held, pytree.tree_leaves((args, given))) if row is not None]
        if not all(row.count.is_that_of(read[0].count) for row in read):
            raise NotByRow(f"rows of different experts read by `{name}`")

        def plain(one: Any) -> Any:
            return self._held(one) or one

        kept = pytree.tree_map(plain, args), pytree.tree_map(plain, given)
        found = func(*args, **given)
        several = isinstance(found, tuple | list)
        made = [self._hold(_Rows(read[0].count, read[0].size, one, func, *kept, item=i if several else None))
                for i, one in enumerate(found if several else (found,))]
        return type(found)(made) if several else made[0]

    def _asked(self, name: str, rows: _Rows | None, func: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """A property of rows of one expert, of which there are as many as their count."""
        found = func(*args, **given)
        if rows is None or name in ("T", "mT", "H", "mH", "data", "grad"):
            raise NotByRow(f"rows of one expert read by `{name}`")
        if name == "shape" or (name == "size" and isinstance(found, tuple)):
            return torch.Size((rows.size, *found[1:]))
        if name == "size":
            axis = given.get("dim", args[-1])
            return rows.size if axis in (0, -rows.tensor.ndim) else found
        return rows.size * (found // rows.tensor.shape[0]) if name == "numel" else found

    def _by_row(self, name: str, args: tuple[Any, ...], given: dict[str, Any]) -> bool:
        """Whether a call does the same to each row of a piece, whatever the other rows are."""
        read = [one for one in pytree.tree_leaves((args, given)) if self._held(one) is not None]
        rank = read[0].ndim
        if given.get("inplace") or "out" in given or (name == "dropout" and any(flag is True for flag in args[2:])):
            return False
        if name in PRODUCTS:
            return self._held(args[0]) is not None and rank == 2 and len(read) == 1
        if any(one.ndim != rank for one in read):
            return False
        if name in EACH:
            return all(one.ndim < rank or (one.ndim == rank and one.shape[0] == 1)
                       for one in pytree.tree_leaves((args, given))
                       if isinstance(one, Tensor) and self._held(one) is None)
        if name in LAST and self._held(args[0]) is not None:
            axis = given.get("dim", args[1 if LAST[name] is None and len(args) > 1 else 2]
                             if len(args) > (1 if LAST[name] is None else 2) else LAST[name])
            return isinstance(axis, int) and axis % rank != 0
        if name == "__getitem__" and self._held(args[0]) is not None:
            return _keeps_rows(args[1], rank)
        return False

    # Where they are put together

    def _join(self, name: str, tensors: Sequence[Any], dim: int = 0, **given: Any) -> Tensor:
        """All rows again, in order."""
        pieces = [self._held(one) for one in tensors]
        known = [piece for piece in pieces if piece is not None]
        if dim or given.keys() - {"dim"} or given.get("dim", 0) or len(known) != len(pieces) or not _all_of_one(
                [piece.count for piece in known]):
            raise NotByRow(f"rows of some experts put together by `{name}`, not those of all of them in order")
        self.joined += 1
        return self._whole(known, {})

    def _whole(self, rows: list[_Rows], done: dict[int, Any]) -> Tensor:
        """What is done to the rows of each expert, in order, done to all rows at once."""
        first = rows[0]
        if first.made is None:
            if any(row.made is not None or row.args[0] is not first.args[0] for row in rows):
                raise NotByRow("each expert reads other rows")
            whole: Tensor = first.args[0]
            return whole
        if id(first) in done:
            return cast("Tensor", done[id(first)])
        if any(row.made is not first.made or row.item != first.item for row in rows):
            raise NotByRow("not every expert does the same")
        leaves, specs = zip(*(pytree.tree_flatten((row.args, row.kwargs)) for row in rows), strict=True)
        if any(spec != specs[0] for spec in specs):
            raise NotByRow("not every expert does the same")
        columns = list(zip(*leaves, strict=True))
        operands = [self._whole(list(column), done) if isinstance(column[0], _Rows) else None for column in columns]
        if _name(first.made) in PRODUCTS:
            found = self._product(first, cast("Tensor", operands[0]), columns)
        else:
            values = [_same(column) if whole is None else whole
                      for whole, column in zip(operands, columns, strict=True)]
            args, kwargs = pytree.tree_unflatten(values, specs[0])
            found = first.made(*args, **kwargs)
            found = found if first.item is None else found[first.item]
        done[id(first)] = found
        return found

    def _product(self, first: _Rows, x: Tensor, columns: list[tuple[Any, ...]]) -> Tensor:
        """`linear(x, w[e], b[e])` or `x @ w[e]` for each expert as one operator."""
        tensors = [column for column in columns[1:] if isinstance(column[0], Tensor)]
        if not tensors or any(column[0] is not None and not isinstance(column[0], Tensor) for column in columns[1:]):
            raise NotByRow(f"rows of one expert read by `{_name(first.made)}`")
        weight, turned = self._stacked(tensors[0])
        bias = self._stacked(tensors[1])[0] if len(tensors) > 1 else None
        if weight.ndim != 3:
            raise NotByRow(f"rows of one expert multiplied by a tensor of rank {weight.ndim - 1}")
        transposed = turned if _name(first.made) == "linear" else not turned
        found: Tensor = torch.ops.dlbc.grouped_linear(x, first.count.counts, weight, bias, transposed)
        return found

    def _stacked(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, bool]:
        """One tensor of the experts' tensors, and whether each is the transposed of its slice of that one."""
        parts = [self.parts.get(id(one)) or _Part(None, 0, one) for one in tensors]
        whole, turned = parts[0].whole, parts[0].turned
        if any(part.turned != turned for part in parts):
            return torch.stack(tensors), False
        if whole is not None and whole.shape[0] == len(parts) and all(
                part.whole is whole and part.index == e for e, part in enumerate(parts)):
            return whole, turned
        return torch.stack([part.own for part in parts]), turned

    def _part(self, name: str, args: Sequence[Any], given: dict[str, Any], found: Any) -> None:
        """Remember matrices and vectors that are parts of larger tensors, and transposed ones."""
        if not isinstance(found, tuple | Tensor) or not args or not isinstance(args[0], Tensor):
            return
        x = args[0]
        if name == "__getitem__" and type(args[1]) is int and isinstance(found, Tensor):
            self.parts[id(found)] = _Part(x, args[1] % x.shape[0], found)
        elif name in ("unbind", "__iter__") and isinstance(found, tuple):
            if not (args[1:] and args[1]) and not given.get("dim"):
                self.parts |= {id(one): _Part(x, i, one) for i, one in enumerate(found)}
        elif name == "select" and not given and len(args) == 3 and args[1] == 0 and isinstance(found, Tensor):
            self.parts[id(found)] = _Part(x, args[2], found)
        elif name in _TURNS and x.ndim == 2 and isinstance(found, Tensor):
            old = self.parts.get(id(x)) or _Part(None, 0, x)
            self.parts[id(found)] = _Part(old.whole, old.index, old.own, not old.turned)
            self.alive.append(found)  # so that no address is seen twice


def _name(func: Any) -> str:
    """The name of a function, method or property of torch."""
    name: str = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def _symbol(number: Any) -> Any:
    """The symbol that an integer is while capturing, or None."""
    expression = number.node.expr if isinstance(number, torch.SymInt) else None
    return expression if expression is not None and expression.is_Symbol else None


def _all_of_one(counts: Sequence[_Count]) -> bool:
    """Whether counts are all those of one tensor, in order."""
    return bool(counts) and len(counts) == counts[0].counts.shape[0] and all(
        count.counts is counts[0].counts and count.expert == e for e, count in enumerate(counts))


def _keeps_rows(index: Any, rank: int) -> bool:
    """Whether `x[index]` has all of x's rows, in order, along its first axis."""
    entries = index if isinstance(index, tuple) else (index,)
    if any(isinstance(entry, Tensor | list) for entry in entries):
        return False
    if entries[0] is Ellipsis:
        return len([entry for entry in entries[1:] if entry is not None]) < rank and all(
            entry is not None for entry in entries[1:2])
    return isinstance(entries[0], slice) and entries[0] == slice(None)


def _same(column: tuple[Any, ...]) -> Any:
    """An argument that is the same for every expert."""
    first = column[0]
    if isinstance(first, Tensor):
        if any(one is not first for one in column):
            raise NotByRow("experts read different tensors outside of a linear map")
    elif any(isinstance(one, Tensor) or one != first for one in column):
        raise NotByRow("not every expert does the same")
    return first
