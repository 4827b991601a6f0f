"""Loops that look for the rows of each expert, as the products of chosen experts, while a model is captured.

The eager way to write a mixture of experts goes through the experts (or those that were hit), finds their rows with
`torch.where(ids == e)` or the mask of a one-hot encoding, and adds what the expert says with `index_add_`. How many
rows there are depends on the data. But where ids come from top-k or argmax over the scores of E experts, each place of
ids [N, K] belongs to exactly one of experts 0 to E-1: once all of them have been added, the sum is that over K of what
each place's expert says, as `batched_mm` of transformers computes it. Until then nobody may read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import dlbc.frontends.expert_ops  # noqa: F401  (defines the operator)
from dlbc.frontends.expert_rows import SHAPES, ExpertRows, Group, NotByRow, Rows, is_size

_KEEP = frozenset({"reshape", "view", "flatten", "long", "int", "to", "contiguous", "detach", "clone", "squeeze",
                   "unsqueeze", "t", "T", "transpose", "permute", "__getitem__", "type"})
_CAST = frozenset({"bool", "to", "long", "int", "float", "contiguous", "detach"})
_CHOICES: dict[str, tuple[int, int | None]] = {"topk": (2, -1), "sort": (1, -1), "argsort": (1, -1),
                                               "argmax": (1, None), "max": (1, None)}
"""What gives indices along an axis: the axis's place among the arguments, and which it is if none is said."""
_POSITIVE = frozenset({"gt", "greater", "__gt__", "ne", "__ne__", *_CAST})
_KNOWN = frozenset({"dtype", "device", "layout", "is_floating_point", "requires_grad", *SHAPES})
"""What may be asked of a tensor before all experts have been added to it."""
_ADDS = frozenset({"add", "__add__", "__radd__", "__iadd__"})


V = TypeVar("V")


class Expert(int):
    """The number of an expert that was hit: in truth each expert's in turn. `rank` 1: in a tensor of one element."""

    rank: int = 0

    @staticmethod
    def of(number: int, rank: int) -> Expert:
        """A number as `nonzero()` (rank 1) or `unique()` (rank 0) lists it."""
        made = Expert(number)
        made.rank = rank
        return made

    def __getitem__(self, index: int) -> Expert:
        if index not in (0, -1) or not self.rank:
            raise NotByRow("the number of an expert is indexed")
        return Expert(self)

    def __iter__(self) -> Iterator[Expert]:
        return iter([self[0]])

    def item(self) -> int:
        """The number."""
        return int(self)

    tolist = item

    def squeeze(self, dim: int = 0) -> Expert:
        """The number."""
        return Expert(self)


class Hits(list[Expert]):
    """The experts that were hit, all of them."""

    def tolist(self) -> list[Any]:
        """Numbers, or lists of one number."""
        return [[int(one)] if one.rank else int(one) for one in self]

    def flatten(self) -> Hits:
        """Numbers."""
        return Hits(Expert(one) for one in self)

    def squeeze(self, dim: int = -1) -> Hits:
        """Numbers."""
        return self.flatten()

    def cpu(self) -> Hits:
        """These."""
        return self


@dataclass(frozen=True, eq=False)
class Chosen(Group):
    """Rows for all places of ids, [N] or [N, K], in order; a place belongs to the expert it names. `order`: of the
    axes, as they were where the rows were looked for."""

    ids: Tensor
    experts: int
    order: tuple[int, ...]

    def same(self, other: Group) -> bool:
        """Whether the ids are the same tensor, looked at in the same way."""
        return isinstance(other, Chosen) and self.ids is other.ids and self.order == other.order

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        """A product for each place, with the weight of its expert: what `raise_experts` knows."""
        ids = self.ids.reshape(-1)
        y = torch.bmm(x.unsqueeze(1), weight[ids]).squeeze(1) if transposed else torch.bmm(
            weight[ids], x.unsqueeze(-1)).squeeze(-1)
        return y if bias is None else y + bias[ids]

    def places(self) -> list[Tensor]:
        """For each axis of ids, where the places are along it."""
        n, *k = self.ids.shape
        rows = torch.arange(n, device=self.ids.device)
        if not k:
            return [rows]
        slots = torch.arange(k[0], device=self.ids.device)
        return [rows.repeat_interleave(k[0]), slots.repeat(n)]

    def gathered(self, x: Tensor, axes: tuple[int, ...], places: Sequence[Tensor]) -> Tensor:
        """`x[places]`, one for each of these axes of ids; without an index where it takes rows or numbers in order."""
        sizes = self.ids.shape
        if axes == tuple(range(len(sizes))) and all(map(is_size, x.shape, sizes)):
            return x.reshape(-1, *x.shape[len(sizes):])
        if axes == (0,) and is_size(x.shape[0], sizes[0]):
            return x.repeat_interleave(sizes[1], dim=0)
        return x[tuple(places)]


@dataclass(frozen=True)
class _Mask:
    """Where ids name an expert. `lead`: with an axis of size 1 in front."""

    group: Chosen
    expert: int
    lead: bool = False


@dataclass(frozen=True)
class _OneHot:
    """A one-hot encoding of ids; `order`: its axes, the last of the encoding is the number of axes of ids."""

    ids: Tensor
    experts: int
    order: tuple[int, ...]


@dataclass
class _Sum:
    """What has been added of the experts to a tensor, or written into it (`assigned`)."""

    into: Tensor
    assigned: bool
    index: Rows
    said: dict[int, Rows] = field(default_factory=dict)


def gather(group: Chosen, x: Tensor, axes: tuple[int, ...], *places: Tensor) -> Tensor:
    """Rows or numbers of x at the places of an expert's rows; as `Rows.made` it tells what was gathered."""
    return group.gathered(x, axes, places)


@dataclass
class ChoosingLoops:
    """Follows loops that look for rows. `joined`: how many were found so far; `assumed`: the experts taken to have
    rows (`positive`) whose loops were not found, so far."""

    rows: ExpertRows
    positive: bool
    joined: int = 0
    ids: dict[int, int] = field(default_factory=dict)
    masks: dict[int, _Mask] = field(default_factory=dict)
    hots: dict[int, _OneHot] = field(default_factory=dict)
    hit: dict[int, int] = field(default_factory=dict)
    found: dict[int, bool] = field(default_factory=dict)
    groups: list[tuple[Chosen, list[Tensor]]] = field(default_factory=list)
    pending: dict[int, _Sum] = field(default_factory=dict)
    lists: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    assumed: set[tuple[int, int]] = field(default_factory=set)
    alive: list[Any] = field(default_factory=list)

    def _tag(self, table: dict[int, V], tensor: Tensor, what: V) -> None:
        table[id(tensor)] = what
        self.alive.append(tensor)  # so that no address is seen twice

    def handle(self, name: str, func: Any, args: Sequence[Any], given: dict[str, Any]) -> Any:
        """What a call gives that looks for rows of an expert, takes them, or adds to them; else NotImplemented."""
        first: Any = args[0] if args else None
        mask = self.masks.get(id(first))
        if name == "__getitem__" and isinstance(args[1], Expert):
            return self._of_expert(func, first, args[1])
        if mask is not None and not mask.lead:
            if (name == "where" and len(args) == 1) or (name == "nonzero" and given.get("as_tuple")):
                return self._places(mask, first.nonzero().shape[0])
            if name in ("nonzero", "argwhere") and len(args) == 1 and not given:
                return self._listed(self._places(mask, first.nonzero().shape[0]))
            if name == "any" and len(args) == 1 and not given:
                return self._any(mask, func(first))
        if id(first) in self.lists:
            return self._of_list(name, self.lists[id(first)], args, given)
        if name == "__bool__" and id(first) in self.found and self.positive:
            return True
        if name == "nonzero" and id(first) in self.hit:
            numbers = Hits(Expert.of(e, 0 if given.get("as_tuple") else 1) for e in range(self.hit[id(first)]))
            return (numbers,) if given.get("as_tuple") else numbers
        if name == "unique" and id(first) in self.ids and len(args) == 1 and not any(
                given.get(asked) not in (None, False) for asked in ("return_inverse", "return_counts", "dim")):
            return Hits(Expert(e) for e in range(self.ids[id(first)]))
        if name == "__getitem__" and self.rows.held(first) is None and (
                found := self._taken(first, args[1])) is not NotImplemented:
            return found
        if name in ("index_add_", "index_add", "__setitem__") and (self.rows.among((args, given)) or self.pending):
            return self._added(name, *args, **given)
        if name in ("__iadd__", "add_") and _gathers(self.rows.held(first)):
            return self.rows.used("add", torch.Tensor.add, tuple(args), given)
        if self.pending and name not in _KNOWN and any(
                id(one) in self.pending for one in pytree.tree_leaves((args, given))):
            raise NotByRow(f"`{name}` reads what has not been added for all experts yet")
        return NotImplemented

    def finish(self) -> None:
        """NotByRow where a loop left out experts."""
        if self.pending:
            raise NotByRow("a loop adds what some of the experts say, not what all of them do")

    # Where rows are looked for

    def note(self, name: str, args: Sequence[Any], given: dict[str, Any], found: Any) -> None:
        """Remember what tensors say of experts: their numbers, masks of them, and whether they were hit."""
        if not args or not isinstance(args[0], Tensor):
            return
        x, indices = args[0], _indices(name, args, given, found)
        if indices is not None:
            self._tag(self.ids, *indices)
        elif not isinstance(found, Tensor):
            return
        elif id(x) in self.ids:
            self._of_ids(name, x, args, found)
        elif id(x) in self.hots:
            self._of_one_hot(name, self.hots[id(x)], args, given, found)
        elif id(x) in self.masks:
            mask = self.masks[id(x)]
            if name in _CAST or (name == "squeeze" and found.ndim == x.ndim):
                self._tag(self.masks, found, mask)
            elif mask.lead and args[1:] == (0,) and name in ("squeeze", "__getitem__"):
                self._tag(self.masks, found, _Mask(mask.group, mask.expert))
        elif id(x) in self.hit and name in _POSITIVE and all(one == 0 for one in args[1:] if isinstance(one, int)):
            self._tag(self.hit, found, self.hit[id(x)])

    def _of_ids(self, name: str, ids: Tensor, args: Sequence[Any], found: Tensor) -> None:
        if name in ("eq", "__eq__") and isinstance(args[1], int) and ids.ndim in (1, 2):
            self._tag(self.masks, found, _Mask(self._group(ids, tuple(range(ids.ndim))), int(args[1])))
        elif name == "one_hot" and ids.ndim in (1, 2):
            self._tag(self.hots, found, _OneHot(ids, self.ids[id(ids)], tuple(range(ids.ndim + 1))))
        elif name in _KEEP:
            self._tag(self.ids, found, self.ids[id(ids)])

    def _of_one_hot(self, name: str, hot: _OneHot, args: Sequence[Any], given: dict[str, Any], found: Tensor) -> None:
        rank = len(hot.order)
        if name in _CAST:
            self._tag(self.hots, found, hot)
        elif name == "permute" and not given:
            dims = args[1] if isinstance(args[1], tuple | list) else args[1:]
            self._tag(self.hots, found, _OneHot(hot.ids, hot.experts, tuple(hot.order[d] for d in dims)))
        elif name == "transpose" and len(args) == 3:
            order = list(hot.order)
            order[args[1]], order[args[2]] = order[args[2]], order[args[1]]
            self._tag(self.hots, found, _OneHot(hot.ids, hot.experts, tuple(order)))
        elif name == "sum" and not given.get("keepdim"):
            dims = given.get("dim", args[1] if len(args) > 1 else ())
            gone = {d % rank for d in (dims if isinstance(dims, tuple | list) else (dims,))}
            if [hot.order[d] for d in range(rank) if d not in gone] == [rank - 1]:
                self._tag(self.hit, found, hot.experts)
        elif name == "__getitem__" and type(args[1]) is int and args[1] >= 0 and hot.order[0] == rank - 1:
            self._tag(self.masks, found, _Mask(self._group(hot.ids, hot.order[1:]), args[1]))

    def _of_expert(self, func: Any, x: Tensor, expert: Expert) -> Any:
        """`x[e]` of an expert e that was hit."""
        found = func(x, int(expert))
        self.rows.note("__getitem__", (x, int(expert)), {}, found)
        self.note("__getitem__", (x, int(expert)), {}, found)
        if not expert.rank:
            return found
        wide, mask = found.unsqueeze(0), self.masks.get(id(found))
        if mask is not None:
            self._tag(self.masks, wide, _Mask(mask.group, mask.expert, lead=True))
        return wide

    def _group(self, ids: Tensor, order: tuple[int, ...]) -> Chosen:
        made = Chosen(ids, self.ids[id(ids)], order)
        for group, _ in self.groups:
            if group.same(made):
                return group
        self.groups.append((made, made.places()))
        return made

    def _places(self, mask: _Mask, size: Any) -> tuple[Tensor, ...]:
        """Where the rows of an expert are, for each axis of its mask."""
        self._assume(mask)
        if self.positive:
            torch._check(size > 0)  # type: ignore[no-untyped-call]
        wholes = next(places for group, places in self.groups if group is mask.group)
        return tuple(self.rows.hold(Rows(mask.group, mask.expert, size, torch.ops.dlbc.rows(wholes[axis]),
                                         args=(wholes[axis],), kwargs={"axis": axis})) for axis in mask.group.order)

    def _listed(self, places: tuple[Tensor, ...]) -> Tensor:
        """`nonzero()`: the places as the columns of one tensor."""
        rows = self.rows.held(places[0])
        assert rows is not None
        table = self.rows.record(rows, torch.stack, torch.stack(places, 1), (places, 1), {})
        self._tag(self.lists, table, places)
        return cast("Tensor", table)

    def _of_list(self, name: str, places: tuple[Tensor, ...], args: Sequence[Any], given: dict[str, Any]) -> Any:
        """A column of `nonzero()`, or all of them."""
        if name in ("T", "t") or (name == "unbind" and (given.get("dim") or args[-1]) in (1, -1)):
            return places
        index = args[1] if len(args) > 1 else None
        if name == "__getitem__" and isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None) and type(
                index[1]) is int:
            return places[index[1]]
        if len(places) == 1 and name in ("squeeze", "flatten", "view", "reshape") and args[1:] in ((), (-1,), (1,)):
            return places[0]
        return NotImplemented

    def _any(self, mask: _Mask, found: Tensor) -> Tensor:
        self._assume(mask)
        self._tag(self.found, found, True)
        return found

    def _assume(self, mask: _Mask) -> None:
        if self.positive and 0 <= mask.expert < mask.group.experts:
            self.assumed.add((id(mask.group.ids), mask.expert))

    # Taking rows and adding to them

    def _taken(self, x: Any, index: Any) -> Any:
        """`x[rows]`, `x[rows, slots]`, with None where axes are added, or `x[mask]`."""
        entries = index if isinstance(index, tuple) else (index,)
        mask = self.masks.get(id(entries[0]))
        if len(entries) == 1 and mask is not None and not mask.lead:
            if mask.group.order != tuple(range(len(mask.group.order))):
                return NotImplemented
            places = self._places(mask, entries[0].nonzero().shape[0])
            return self._gathered(x, [self.rows.held(place) for place in places])
        read = [self.rows.held(entry) for entry in entries if entry is not None]
        if not any(row is not None for row in read):
            return NotImplemented
        found = self._gathered(x, read)
        if not isinstance(index, tuple) or len(read) == len(index):
            return found
        first = next(i for i, entry in enumerate(index) if entry is not None)
        added = (*(None,) * first, slice(None), *(None,) * (len(index) - first - len(read)))
        of = self.rows.held(found)
        assert of is not None
        return self.rows.record(of, torch.Tensor.__getitem__, found[added], (found, added), {})

    def _gathered(self, x: Tensor, read: list[Rows | None]) -> Tensor:
        known = [row for row in read if row is not None]
        axes = tuple(row.kwargs.get("axis") for row in known)
        if len(known) != len(read) or None in axes or any(
                row.made is not None or not row.beside(known[0]) for row in known):
            raise NotByRow("rows of an expert are taken by something else than their places")
        tensors = [row.tensor for row in known]
        found = x[tuple(tensors)]
        made: Tensor = self.rows.record(known[0], gather, found, (known[0].group, x, axes, *tensors), {})
        return made

    def _added(self, name: str, into: Any, *args: Any, **given: Any) -> Any:
        """`into.index_add_(0, rows, y)`, `into[rows] += y`, or `into[rows] = y` where a row has one expert."""
        if name == "__setitem__":
            index, y = args
            mask = self.masks.get(id(index))
            if mask is not None:
                index = self._places(mask, index.nonzero().shape[0])[0] if len(mask.group.order) == 1 else None
        else:
            dim = given.pop("dim", args[0] if args else None)
            index, y = given.pop("index", args[1] if len(args) > 1 else None), given.pop("source", args[-1])
            if dim not in (0, -into.ndim) or given:
                raise NotByRow(f"`{name}` along another axis than that of the rows, or with a factor")
        place, said = self.rows.held(index), self.rows.held(y)
        if place is None or said is None:
            if self.rows.among((into, args)) or id(into) in self.pending:
                raise NotByRow(f"`{name}` of something else than an expert's rows")
            return NotImplemented
        group, assigned = place.group, name == "__setitem__"
        if assigned and said.made is not None and said.made.__name__ in _ADDS:
            parts = [one for one in said.args if isinstance(one, Rows)]
            before = [one for one in parts if _gathers(one) and one.args[1] is into and one.args[2] == (0,)]
            if len(parts) == 2 and len(before) == 1:
                said, assigned = parts[1 - parts.index(before[0])], False
        if (not isinstance(group, Chosen) or place.made is not None or place.kwargs.get("axis") != 0
                or not said.beside(place) or (assigned and group.ids.ndim != 1)
                or not is_size(into.shape[0], group.ids.shape[0])):
            raise NotByRow(f"`{name}` of something else than an expert's rows")
        return self._sum(name, into, assigned, place, said, group)

    def _sum(self, name: str, into: Tensor, assigned: bool, place: Rows, said: Rows, group: Chosen) -> Any:
        if not 0 <= place.expert < group.experts:  # no place of ids names it
            return None if name == "__setitem__" else into
        total = self.pending.setdefault(id(into), _Sum(into, assigned, place))
        if not place.group.same(total.index.group) or total.assigned != assigned or place.expert in total.said:
            raise NotByRow(f"`{name}` of the rows of an expert in two ways, or twice")
        total.said[place.expert] = said
        if len(total.said) == group.experts:
            del self.pending[id(into)]
            self.joined += 1
            self.assumed -= {(id(group.ids), expert) for expert in total.said}
            y = self.rows.whole([total.said[expert] for expert in range(group.experts)])
            if group.ids.ndim == 2:
                y = y.view(*group.ids.shape, *y.shape[1:]).sum(dim=1)
            if name == "index_add":
                return into + y
            into.copy_(y) if assigned else into.add_(y)
            return None if name == "__setitem__" else into
        if name != "index_add":
            return None if name == "__setitem__" else into
        out = into.clone()
        self.pending[id(out)] = _Sum(out, assigned, place, self.pending.pop(id(into)).said)
        return out


def _indices(name: str, args: Sequence[Any], given: dict[str, Any], found: Any) -> tuple[Tensor, int] | None:
    """What a call chooses along an axis: the tensor of indices, all different for one row, and of how many."""
    place, usual = _CHOICES.get(name, (0, None))
    if not place:
        return None
    axis = given.get("dim", args[place] if len(args) > place else usual)
    x = args[0]
    if type(axis) is not int or not x.ndim or not isinstance(x.shape[axis], int):
        return None
    chosen = found[1] if isinstance(found, tuple) and len(found) == 2 else found
    return (chosen, x.shape[axis]) if isinstance(chosen, Tensor) else None


def _gathers(rows: Rows | None) -> bool:
    return rows is not None and rows.made is gather
