"""Attention by tiles: what a program that holds a tile of query rows, or a tile of keys, computes of a block function.

The function that a `stream` op runs (`passes/stream_attention.py`) computes from values with query rows, values with
keys and *wide* ones with both. A GPU program holds one tile of rows and walks over the tiles of keys (a *sweep*), or
holds a tile of keys and walks over rows; wide values exist for one tile of each at a time. `Region` says what each
value is (`Tile`, `Kind`), in which sweep each sum over keys is complete, and what the second program must be told by
the first.

Axes are called `s` (seeds), `b` (batch), `h` (heads), `r` (query rows), `k` (keys) and `d` (numbers of a head).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from dlbc.ir.core import Function, Op, Operand, Type, Value, Weight, values
from dlbc.ir.dims import Dim, symbol, symbols
from dlbc.ir.fusible import ELEMENTS, POINTWISE, fits
from dlbc.ir.ops import attr, axes, axis

ROWS, KEYS = symbol("rows"), symbol("keys")
"""What the functions of blocks call the sizes of a block."""

WIDEST = 256
"""Numbers of a head that a program can hold."""


class Unfit(Exception):
    """Why a function cannot be computed by tiles: a plain sentence."""


class Kind(Enum):
    """How a value comes about in a tile."""

    GIVEN = "a parameter, loaded"
    WEIGHTS = "softmax of scores over keys"
    ALIAS = "the same tile under another layout"
    MAP = "one number from one number of each operand"
    SCORES = "product over the numbers of a head"
    OVER_KEYS = "sum, maximum or product over keys"
    OVER_ROWS = "sum or product over query rows"
    WITHIN = "sum or maximum over the numbers of a head"


@dataclass(frozen=True)
class Tile:
    """A value in a program. `axes`: those of `rkd` that it has; `heads`: "query", "group" or "" for one for all."""

    axes: str
    roles: tuple[str, ...]
    """The role of each axis of its type, "" for one of size 1."""
    seeds: bool
    stacked: bool
    """The rows of the heads of a group lie one after the other in its axis of rows."""
    heads: str
    width: int
    """Numbers of a head, 1 without axis `d`."""
    dtype: str


SCALAR = Tile("", (), False, False, "", 1, "f32")


class Region:
    """A block function understood as tiles. Raises Unfit where it cannot be."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.definitions = {op.result.name: op for op in self._single(function)}
        self.softmaxes = tuple(op for op in self.definitions.values() if op.name == "attention_weights")
        if not self.softmaxes:
            raise Unfit("it has no attention weights")
        first = self.softmaxes[0]
        q, k = _type(first.operands[0]), _type(first.operands[1])
        if q.rank != 4 or k.rank != 4:
            raise Unfit(f"its queries have {q.rank} axes and its keys {k.rank}, not 4 each")
        self.batch = q.shape[0]
        self.heads, self.groups = _number(q.shape[1], "heads"), _number(k.shape[1], "key groups")
        self.repeats = self.heads // self.groups
        self.sinks = self._sinks()
        self.seeds: Dim = 1
        self.tiles: dict[str, Tile] = {}
        self.kinds: dict[str, Kind] = {}
        for param in function.params:
            if not isinstance(param, Value):
                raise Unfit(f"it reads the weight {param}")
            self.tiles[param.name], self.kinds[param.name] = self._tile(param), Kind.GIVEN
        for op in self.definitions.values():
            self.tiles[op.result.name] = self._tile(op.result)
            self.kinds[op.result.name] = self._kind(op)
        self.late = self._late()
        self.stages: dict[str, int] = {p.name: 0 for p in function.params}
        self.online: dict[str, str] = {}
        """Sums over keys that are complete with the softmax that they are linear in, by name."""
        for op in self.definitions.values():
            if op.result.name not in self.late:
                self.stages[op.result.name] = self._stage(op)
        self._check_results()

    # --- what the two programs compute ------------------------------------------------------------------

    @property
    def row_results(self) -> tuple[Value, ...]:
        """Results that the program of a tile of rows computes."""
        return tuple(v for v in self.function.results if "r" in self.tiles[v.name].axes)

    @property
    def key_results(self) -> tuple[Value, ...]:
        """Results that the program of a tile of keys computes."""
        return tuple(v for v in self.function.results if "k" in self.tiles[v.name].axes)

    @property
    def handed(self) -> tuple[str, ...]:
        """Values with rows that the program of keys reads of the program of rows; a softmax stands for its logarithm
        of the sum of exponentials."""
        found: dict[str, None] = {}
        seen: set[str] = set()
        waiting = [v.name for v in self.key_results]
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            if self.kinds[name] is Kind.WEIGHTS:
                found[name] = None
            if name not in self.late and "k" not in self.tiles[name].axes and self.stages[name] > 0:
                found[name] = None
                continue
            waiting += [v.name for v in self.reads(name)]
        order = list(self.definitions)
        return tuple(sorted(found, key=order.index))

    def reads(self, name: str) -> tuple[Value, ...]:
        """The values that the op of a value reads."""
        op = self.definitions.get(name)
        return () if op is None else tuple(values(op.operands))

    def tile(self, operand: Operand) -> Tile:
        """The tile of an operand; literals have no axes."""
        return self.tiles[operand.name] if isinstance(operand, Value) else SCALAR

    def sweep(self, name: str) -> int:
        """In which sweep a sum over keys, or the sum of a softmax, is computed."""
        return self.stages[name] - 1

    # --- understanding ----------------------------------------------------------------------------------

    @staticmethod
    def _single(function: Function) -> Iterator[Op]:
        for op in function.body:
            if not isinstance(op, Op) or len(op.results) != 1 or op.reads:
                raise Unfit("it holds a kernel or an op of several results")
            yield op

    def _sinks(self) -> set[str]:
        """The scores [H] that no key has, and what they are casts of."""
        found: set[str] = set()
        waiting = [o.name for op in self.softmaxes for o in op.operands[3:] if isinstance(o, Value)]
        while waiting:
            name = waiting.pop()
            found.add(name)
            waiting += [v.name for v in self.reads(name)]
        return found

    def _tile(self, value: Value) -> Tile:
        """A value's axes, told from the sizes in its type."""
        type_ = value.type
        if value.name in self.sinks:
            if type_.shape != (self.heads,) or type_.dtype not in ELEMENTS:
                raise Unfit(f"its sinks are {type_}")
            return Tile("", ("h",), False, False, "query", 1, type_.dtype)
        if type_.rank > 5:
            raise Unfit(f"a value has {type_.rank} axes: {type_}")
        if type_.dtype not in ELEMENTS:
            raise Unfit(f"it computes with {type_.dtype}, which no kernel does")
        names = ("s", "b", "h", "", "")[5 - type_.rank:]
        roles: list[str] = []
        stacked, heads, width, repeats = False, "", 1, 1
        for dim, name in zip(type_.shape, names, strict=True):
            if dim == 1:
                roles.append("")
                continue
            if name:
                roles.append(name)
                if name == "b" and dim != self.batch:
                    raise Unfit(f"a value has a batch of {dim}, the queries have {self.batch}")
                if name == "s":
                    if self.seeds not in (1, dim):
                        raise Unfit(f"values have {self.seeds} and {dim} seeds")
                    self.seeds = dim
                if name == "h":
                    heads = "query" if dim == self.heads else "group" if dim == self.groups else "?"
                continue
            found = symbols(dim)
            if str(ROWS) in found:
                repeats = 1 if dim == ROWS else self.repeats if dim == ROWS * self.repeats else 0
                stacked = repeats != 1
                roles.append("r")
            elif str(KEYS) in found:
                if dim != KEYS:
                    raise Unfit(f"a value has an axis of {dim}")
                roles.append("k")
            elif isinstance(dim, int):
                if dim > WIDEST:
                    raise Unfit(f"a head has {dim} numbers, more than {WIDEST}")
                width = dim
                roles.append("d")
            else:
                raise Unfit(f"a value has an axis of {dim}, whose size is not known to the kernel")
        if heads == "?" or not repeats:
            raise Unfit(f"a value of {type_} does not fit {self.heads} heads in {self.groups} groups")
        if heads == "group" and self.heads == self.groups:
            heads = "query"
        if "r" in roles and not stacked and heads == "group":
            raise Unfit(f"a value of {type_} has rows by group of heads")
        if stacked and heads == "query":
            raise Unfit(f"a value of {type_} stacks rows of heads that it also has")
        tail = [role for role in roles if role in ("r", "k", "d")]
        if len(set(tail)) != len(tail):
            raise Unfit(f"a value of {type_} has an axis twice")
        return Tile("".join(a for a in "rkd" if a in tail), tuple(roles), "s" in roles, stacked, heads, width,
                    type_.dtype)

    def _kind(self, op: Op) -> Kind:
        tile, name = self.tiles[op.result.name], op.name
        own = [self.tile(o) for o in op.operands]
        if any(isinstance(o, Weight) for o in op.operands):
            raise Unfit(f"`{name}` reads a weight")
        if name == "attention_weights":
            return self._softmax(op, own)
        if name == "matmul":
            return self._product(own, tile)
        if name in ("sum", "amax", "amin"):
            return self._reduction(op, own[0])
        if name == "permute":
            dims = op.attrs["dims"]
            assert isinstance(dims, tuple)
            moved = tuple(own[0].roles[axis(len(dims), d)] for d in dims if isinstance(d, int))
            if moved != tile.roles:
                raise Unfit(f"`permute` moves heads, batch or seeds: {dims}")
            return Kind.ALIAS
        if name == "reshape":
            return self._reshape(own[0], tile)
        if name == "full":
            if tile.axes or not isinstance(op.attrs["value"], int | float):
                raise Unfit("`full` makes more than a number")
            return Kind.MAP
        if name not in POINTWISE or not fits(op):
            raise Unfit(f"no tile can compute `{name}`")
        if set().union(*(t.axes for t in own)) != set(tile.axes) or len(tile.axes) > 2:
            raise Unfit(f"`{name}` combines rows, keys and the numbers of a head")
        if len({t.width for t in own if "d" in t.axes}) > 1:
            raise Unfit(f"`{name}` combines heads of different widths")
        return Kind.MAP

    def _softmax(self, op: Op, own: Sequence[Tile]) -> Kind:
        q, k, *mask = own[:3]
        if q.axes != "rd" or k.axes != "kd" or q.seeds or k.seeds or q.stacked:
            raise Unfit("its queries and keys are not laid out as [B,H,T,D]")
        if mask and ("d" in mask[0].axes or mask[0].stacked):
            raise Unfit("its mask is not broadcast to [B,H,T,U]")
        return Kind.WEIGHTS

    def _product(self, own: Sequence[Tile], tile: Tile) -> Kind:
        a, b = own
        left, right = a.roles[-2:], b.roles[-2:]
        if "" in left or "" in right or len(left) < 2 or len(right) < 2 or left[1] != right[0]:
            raise Unfit("a product has an axis of size 1")
        over, kept = left[1], {left[0], right[1]}
        if over == "d" and kept == {"r", "k"} and a.width == b.width:
            return Kind.SCORES
        if over == "k" and kept == {"r", "d"} and tile.axes == "rd":
            return Kind.OVER_KEYS
        if over == "r" and kept == {"k", "d"} and tile.axes == "kd":
            self._check_groups(own)
            return Kind.OVER_ROWS
        raise Unfit(f"a product over `{over}` leaves {', '.join(sorted(kept))}")

    def _reduction(self, op: Op, own: Tile) -> Kind:
        gone = {own.roles[i] for i in axes(len(own.roles), attr(op, "dims"))} - {""}
        if not attr(op, "keepdim") or len(gone) > 1:
            raise Unfit(f"`{op.name}` is over several axes, or drops them")
        if not gone:
            return Kind.ALIAS
        over = gone.pop()
        if over == "k" and own.axes == "rk":
            return Kind.OVER_KEYS
        if over == "r" and own.axes == "rk" and op.name == "sum":
            self._check_groups([own])
            return Kind.OVER_ROWS
        if over == "d" and len(own.axes) == 2:
            return Kind.WITHIN
        raise Unfit(f"`{op.name}` is over the axis `{over}` of a value with {own.axes or 'none'}")

    def _check_groups(self, own: Iterable[Tile]) -> None:
        """What is summed over rows is summed over the heads of a group."""
        if self.repeats > 1 and not all(tile.stacked for tile in own):
            raise Unfit("a sum over rows is of one head, not of a group of heads")

    def _reshape(self, own: Tile, tile: Tile) -> Kind:
        def kept(of: Tile) -> tuple[str, ...]:
            return tuple(role for role in of.roles if role and role != "h")

        if kept(own) != kept(tile) or own.width != tile.width:
            raise Unfit("`reshape` is more than heads laid out as rows")
        if own.stacked != tile.stacked and tile.roles[-2:-1] != ("r",):
            raise Unfit("`reshape` lays out heads as columns")
        return Kind.ALIAS

    # --- when -------------------------------------------------------------------------------------------

    def _late(self) -> set[str]:
        """What is computed from sums over rows: after the walk of the program of keys."""
        found: set[str] = set()
        for name, op in self.definitions.items():
            if self.kinds[name] is Kind.OVER_ROWS or any(v.name in found for v in values(op.operands)):
                found.add(name)
                if "r" in self.tiles[name].axes:
                    raise Unfit("rows read what is summed over rows")
        return found

    def _stage(self, op: Op) -> int:
        """How many sweeps must be over before a value is known for a tile."""
        name, own = op.result.name, [self.stages[v.name] for v in values(op.operands)]
        before = max(own, default=0)
        if self.kinds[name] is Kind.WEIGHTS:
            return before + 1
        if self.kinds[name] is not Kind.OVER_KEYS:
            return before
        if op.name in ("sum", "matmul"):
            for softmax in self.softmaxes:
                if self._linear_in(op, softmax.result.name):
                    self.online[name] = softmax.result.name
                    return self.stages[softmax.result.name]
        return before + 1

    def _linear_in(self, op: Op, softmax: str) -> bool:
        """True if a sum over keys is linear in a softmax, and the rest of it known before the softmax is."""
        if softmax not in self.stages:
            return False
        known = self.stages[softmax] - 1
        first, *rest = (o for o in op.operands if isinstance(o, Value))
        if rest and self.tiles[first.name].axes != "rk":
            first, rest = rest[0], [first]
        return all(self.stages[o.name] <= known for o in rest) and self._linear(first, softmax, known)

    def _linear(self, operand: Operand, softmax: str, known: int) -> bool:
        if not isinstance(operand, Value) or operand.name not in self.definitions:
            return False
        if operand.name == softmax:
            return True
        op = self.definitions[operand.name]

        def free(other: Operand) -> bool:
            return not isinstance(other, Value) or self.stages[other.name] <= known

        def linear(other: Operand) -> bool:
            return self._linear(other, softmax, known)

        if self.kinds[operand.name] is Kind.ALIAS or op.name in ("neg", "cast"):
            return (op.name != "cast" or operand.type.floating) and linear(op.operands[0])
        if op.name == "mul":
            a, b = op.operands
            return (linear(a) and free(b)) or (free(a) and linear(b))
        if op.name in ("div", "safe_div"):
            return linear(op.operands[0]) and free(op.operands[1])
        if op.name in ("add", "sub"):
            return all(map(linear, op.operands))
        return False

    def _check_results(self) -> None:
        for value in self.function.results:
            tile = self.tiles[value.name]
            if "r" in tile.axes and "k" in tile.axes:
                raise Unfit(f"%{value.name} has rows and keys: it would be kept")
            if not {"r", "k"} & set(tile.axes):
                raise Unfit(f"%{value.name} is one sum over all rows and keys")
            if value.name not in self.definitions:
                raise Unfit(f"%{value.name} is a parameter")
            if "k" in tile.axes and value.name not in self.late:
                raise Unfit(f"%{value.name} is no sum over rows")


def region_of(op: Op, functions: Mapping[str, Function]) -> Region:
    """The region of a `stream` op, or of an `attention` op of the forward pass. Raises Unfit where there is none."""
    if op.name == "attention":
        return Region(forward_function(op))
    if op.name != "stream":
        raise Unfit(f"`{op.name}` is no attention")
    region = Region(functions[str(op.attrs["function"])])
    seen = {(bool(attr(each, "causal")), attr(each, "window")) for each in region.softmaxes}
    if seen != {(bool(op.attrs.get("causal")), op.attrs.get("window"))}:
        raise Unfit("what its mask hides is not what the stream says")
    return region


def why_not_tiles(op: Op, functions: Mapping[str, Function]) -> str:
    """Why attention, or its relevance, runs outside of kernels: a plain sentence."""
    if op.name == "attention_weights":
        return ("one query or key: nothing is as large as queries times keys" if 1 in op.result.type.shape[-2:] else
                "its relevance is not proven to be computable for some of the queries")
    try:
        region_of(op, functions)
    except Unfit as problem:
        return f"{problem}: block by block" if op.name == "stream" else str(problem)
    return "the array library's fused attention is at least as fast"


def forward_function(op: Op) -> Function:
    """What an `attention` op computes, as a function of a block."""
    q, k, v = (_type(o) for o in op.operands[:3])
    mask, sinks = (None if o is None else _type(o) for o in (*op.operands[3:], None, None)[:2])
    (batch, heads, _, width), groups = q.shape, k.shape[1]
    if not isinstance(heads, int) or not isinstance(groups, int):
        raise Unfit("the number of heads is not known to the kernel")
    params = [Value("q", Type(q.dtype, (batch, heads, ROWS, width))),
              Value("k", Type(k.dtype, (batch, groups, KEYS, width))),
              Value("v", Type(v.dtype, (batch, groups, KEYS, v.shape[-1])))]
    read: list[Operand] = [params[0], params[1]]
    if mask is not None:
        tail = tuple(1 if dim == 1 else size for dim, size in zip(mask.shape[-2:], (ROWS, KEYS), strict=True))
        params.append(Value("mask", Type(mask.dtype, (*mask.shape[:-2], *tail))))
        read.append(params[-1])
    if sinks is not None:
        params.append(Value("sinks", sinks))
        read += [params[-1]] if mask is not None else [None, params[-1]]
    attrs = {name: attr(op, name) for name in ("scale", "causal", "window", "softcap")}
    weights = Value("p", Type(op.result.type.dtype, (batch, heads, ROWS, KEYS)))
    body = [Op("attention_weights", tuple(read), (weights,), attrs)]
    repeats = heads // groups
    stacked = Value("p.0", Type(weights.type.dtype, (batch, groups, repeats * ROWS, KEYS)))
    product = Value("o.0", Type(op.result.type.dtype, (batch, groups, repeats * ROWS, v.shape[-1])))
    whole = Value("o", Type(op.result.type.dtype, (batch, heads, ROWS, v.shape[-1])))
    if repeats == 1:
        body.append(Op("matmul", (weights, params[2]), (whole,)))
    else:
        body += [Op("reshape", (weights,), (stacked,), {"shape": stacked.type.shape}),
                 Op("matmul", (stacked, params[2]), (product,)),
                 Op("reshape", (product,), (whole,), {"shape": whole.type.shape})]
    return Function("attention", tuple(params), tuple(body), (whole,))


def _type(operand: Operand) -> Type:
    assert isinstance(operand, Value | Weight)
    return operand.type


def _number(dim: Dim, what: str) -> int:
    if not isinstance(dim, int):
        raise Unfit(f"the number of {what} is {dim}, not known to the kernel")
    return dim


def needed(region: Region, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The values that must be computed for others, in order, without going past those that are known."""
    found, waiting, stop = set[str](), list(names), set(known)
    while waiting:
        name = waiting.pop()
        if name in found or name in stop:
            continue
        found.add(name)
        waiting += [v.name for v in region.reads(name)]
    order = [*(p.name for p in region.function.params), *region.definitions]
    return [name for name in order if name in found]
