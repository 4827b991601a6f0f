"""Loops over sorted rows of experts as one operator each while a model is captured, `dlbc::grouped_linear`.

Mixtures of experts such as JetMoE's sort their rows by expert, count how many each expert has, and go through the
experts in a Python loop: `x.split(counts.tolist())`, a linear map of each piece by its expert's weight, `torch.cat`.
The exporter only sees sizes that depend on data. Here the integers of `counts.tolist()` stay as the exporter makes
them, but we remember which count each one is; a tensor split by them gives the rows of the experts (`expert_rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

import dlbc.frontends.expert_ops  # noqa: F401  (defines the operator)
from dlbc.frontends.expert_rows import ExpertRows, Group, NotByRow, Rows

JOINS = frozenset({"cat", "concat", "concatenate"})
_NUMBERS = frozenset({"item", "tolist", "__int__", "__index__"})
_SIZES = ("split_size", "split_size_or_sections", "split_sizes")


@dataclass(frozen=True, eq=False)
class Counted(Group):
    """Rows sorted by expert, `counts[e]` of them for each expert e in turn."""

    counts: Tensor

    @property
    def experts(self) -> int:  # type: ignore[override]
        """As many as there are counts."""
        return int(self.counts.shape[0])

    def same(self, other: Group) -> bool:
        """Whether the counts are the same tensor."""
        return isinstance(other, Counted) and self.counts is other.counts

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        """One operator."""
        found: Tensor = torch.ops.dlbc.grouped_linear(x, self.counts, weight, bias, transposed)
        return found


@dataclass
class SortedLoops:
    """Follows loops over pieces of sorted rows. `joined`: how many were found so far; `assumed`: the counts taken to
    be positive (`positive`) whose loops were not found, so far."""

    rows: ExpertRows
    positive: bool
    joined: int = 0
    numbers: dict[Any, tuple[Counted, int, Any]] = field(default_factory=dict)
    assumed: set[tuple[int, int]] = field(default_factory=set)
    wholes: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def handle(self, name: str, func: Any, args: Sequence[Any], given: dict[str, Any]) -> Any:
        """What a call gives that reads counts, splits by them, or puts rows together; else NotImplemented."""
        if name in _NUMBERS and args and self.rows.held(args[0]) is None:
            return self._counted(args[0], func(*args, **given))
        if name == "numpy" and args[0].ndim == 1 and not args[0].is_floating_point():
            return self._counted(args[0], args[0].tolist())  # to go through, as `tolist()`
        if self.numbers and name in ("split", "split_with_sizes"):
            return self._split(*args, **given)
        if self.numbers and name == "__getitem__" and self.rows.held(args[0]) is None:
            return self._sliced(*args)
        if self.numbers and name == "slice" and args[1:2] == (0,) and self.rows.held(args[0]) is None:
            return self._sliced(args[0], slice(*args[2:5]))  # what the exporter makes of a slice by unknown integers
        if name in JOINS and self.rows.among(args):
            return self._join(name, *args, **given)
        return NotImplemented

    def _counted(self, tensor: Tensor, found: Any) -> Any:
        """`item()` of a count, or `tolist()` of several: which each integer is, if unknown while capturing."""
        if isinstance(found, list) and tensor.ndim == 1:
            counts = [(tensor, i, number) for i, number in enumerate(found)]
        else:
            part = self.rows.parts.get(id(tensor))
            counts = [] if part is None or part.whole is None else [(part.whole, part.index, found)]
        for whole, expert, number in counts:
            symbol = _symbol(number)
            if symbol is not None and whole.ndim == 1 and isinstance(whole.shape[0], int):
                self.numbers[symbol] = Counted(whole), expert, number
                if self.positive:
                    torch._check(number > 0)  # type: ignore[no-untyped-call]
                    self.assumed.add((id(whole), expert))
        return found

    def _split(self, x: Tensor, sizes: Any = None, dim: int = 0, **given: Any) -> Any:
        """The rows of each expert, where a tensor is split by all counts of one tensor along its first axis."""
        sizes = next((given[key] for key in _SIZES if key in given), sizes)
        if not isinstance(sizes, list | tuple) or (dim % x.ndim if x.ndim else 1) or self.rows.held(x) is not None:
            return NotImplemented
        found = [self.numbers.get(_symbol(size)) for size in sizes]
        known = [one for one in found if one is not None]
        if len(known) != len(found) or not _all_of_one([(group, expert) for group, expert, _ in known]):
            return NotImplemented
        return tuple(self._piece(x, *one) for one in known)

    def _piece(self, x: Tensor, group: Counted, expert: int, size: Any) -> Tensor:
        _, whole = self.wholes.setdefault(id(x), (x, x.clone()))
        return self.rows.hold(Rows(group, expert, size, torch.ops.dlbc.rows(x), args=(whole,)))

    def _sliced(self, x: Tensor, index: Any) -> Any:
        """The rows of an expert, where a slice takes as many rows as it has, after those of the experts before it."""
        if isinstance(index, tuple) and index and all(one in (slice(None), Ellipsis) for one in index[1:]):
            index = index[0]
        if not isinstance(index, slice) or index.step not in (None, 1):
            return NotImplemented
        before, upto = _terms(index.start), _terms(index.stop)
        own = upto - before if before is not None and upto is not None and before <= upto else frozenset()
        if len(own) != 1 or not upto <= self.numbers.keys():  # type: ignore[operator]
            return NotImplemented
        group, expert, size = self.numbers[next(iter(own))]
        earlier = [self.numbers[symbol] for symbol in before or ()]
        if {e for _, e, _ in earlier} != set(range(expert)) or len(earlier) != expert or not all(
                other.same(group) for other, _, _ in earlier):
            return NotImplemented
        return self._piece(x, group, expert, size)

    def _join(self, name: str, tensors: Sequence[Any], dim: int = 0, **given: Any) -> Tensor:
        """All rows again, in order."""
        pieces = [self.rows.held(one) for one in tensors]
        known = [piece for piece in pieces if piece is not None]
        if dim or given or len(known) != len(pieces) or not _all_of_one([(one.group, one.expert) for one in known]):
            raise NotByRow(f"rows of some experts put together by `{name}`, not those of all of them in order")
        self.joined += 1
        self.assumed -= {(id(cast("Counted", one.group).counts), one.expert) for one in known}
        return self.rows.whole(known)


def _symbol(number: Any) -> Any:
    """The symbol that an integer is while capturing, or None."""
    expression = number.node.expr if isinstance(number, torch.SymInt) else None
    return expression if expression is not None and expression.is_Symbol else None


def _terms(number: Any) -> frozenset[Any] | None:
    """The symbols that an integer is the sum of, each once; None for other numbers."""
    if not isinstance(number, torch.SymInt):
        return frozenset() if number in (None, 0) else None
    expression = number.node.expr
    parts = expression.args if expression.is_Add else (expression,)
    return frozenset(parts) if all(part.is_Symbol for part in parts) else None


def _all_of_one(members: Sequence[tuple[Group, int]]) -> bool:
    """Whether these are all experts of one group of sorted rows, in order."""
    first = members[0][0] if members else None
    return isinstance(first, Counted) and len(members) == first.experts and all(
        group.same(first) and expert == e for e, (group, expert) in enumerate(members))
