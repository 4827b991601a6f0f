"""Writes a kernel's body from its results back: the element of a value at an index, from those it is made of.

An index is one expression for each axis (`At`), which says over which axes of a block it varies: a block of row numbers
[BM, 1] over "r", of column numbers [1, BN] over "c", a number over none. A move (`permute`, `slice`, `cat`, ...) is an
index made of an index; a value from outside is a load; what was written once, at the same index, is not written again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dlbc.backends.triton.kernels import KernelSite
from dlbc.backends.triton.table import expression, number
from dlbc.errors import UnsupportedOpError
from dlbc.ir.core import Attr, Op, Operand, Type, Value, Weight
from dlbc.ir.dims import Dim, Sym, product, substitute, symbol, symbols
from dlbc.ir.fusible import POINTWISE
from dlbc.ir.ops import attr, axis


@dataclass(frozen=True)
class At:
    """An expression, and the axes of a block that it varies over."""

    text: str
    axes: frozenset[str] = frozenset()


Index = tuple[At, ...]
ZERO = At("0")


@dataclass
class _Level:
    """The lines of one depth of loops, and what they hold."""

    lines: list[str] = field(default_factory=list)
    known: dict[object, At] = field(default_factory=dict)


class Writer:
    """The text of one jit function while it is written, and its arguments."""

    def __init__(self, site: KernelSite) -> None:
        self.site = site
        self.definitions = {result.name: op for op in site.kernel.body for result in op.results}
        self.pointers: dict[Value | Weight, str] = {}
        self.strides: dict[str, str] = {}  # argument: what the launching function passes
        self.sizes: dict[str, None] = {}
        self.levels = [_Level()]
        self.count = 0
        self.special: dict[str, Callable[[Op, Value, Index, tuple[At, ...]], At]] = {}
        """How ops that a template itself computes are written, by op name."""
        self.lead: tuple[tuple[Dim, ...], tuple[str, ...]] = ((), ())

    # --- text ------------------------------------------------------------------------------------------

    @property
    def lines(self) -> list[str]:
        """The lines of the present depth."""
        return self.levels[-1].lines

    def enter(self) -> None:
        """Go one loop deeper."""
        self.levels.append(_Level())

    def leave(self) -> list[str]:
        """The lines of the loop; what they hold is not known outside of it."""
        return self.levels.pop().lines

    def let(self, at: At, key: object = None) -> At:
        """A name for an expression; the same for the same expression."""
        key = at.text if key is None else key
        found = self.find(key)
        if found is None:
            found = At(f"v{self.count}", at.axes)
            self.count += 1
            self.lines.append(f"{found.text} = {at.text}")
            self.levels[-1].known[key] = found
        return found

    def find(self, key: object) -> At | None:
        """What is known by a key, at this depth or one around it."""
        return next((level.known[key] for level in reversed(self.levels) if key in level.known), None)

    def size(self, dim: Dim) -> str:
        """A dim as the jit function writes it: a number, or sizes called `n_T`."""
        if isinstance(dim, int):
            return str(dim)
        names = sorted(symbols(dim))
        self.sizes |= dict.fromkeys(names)
        text = str(substitute(dim, {name: symbol(f"n_{name}") for name in names}))
        return text if text.isidentifier() else f"({text})"

    # --- rows and columns ------------------------------------------------------------------------------

    def rows_of(self, dims: Sequence[Dim]) -> Index:
        """The index along leading axes of the row numbers `rows`, a [BM, 1] block."""
        found: list[At] = []
        self.lead = (tuple(dims), tuple(f"i{i}" for i in range(len(dims))))
        real = [i for i, dim in enumerate(dims) if dim != 1]
        for i, dim in enumerate(dims):
            if dim == 1:
                found.append(ZERO)
                continue
            inner = product(tuple(dims[i + 1:]))
            text = "rows" if inner == 1 else f"rows // {self.size(inner)}"
            if i != real[0]:
                text = f"({text}) % {self.size(dim)}" if inner != 1 else f"rows % {self.size(dim)}"
            self.lines.append(f"i{i} = {text}")
            found.append(At(f"i{i}", frozenset("r")))
        return tuple(found)

    def _from(self, start: int) -> At:
        """The number of the row among the leading axes from one on."""
        before = product(tuple(self.lead[0][:start]))
        if before == 1:
            return At("rows", frozenset("r"))
        return self.let(At(f"rows % {self.size(product(tuple(self.lead[0][start:])))}", frozenset("r")))

    # --- values ----------------------------------------------------------------------------------------

    def value(self, operand: Operand, index: Index, conds: tuple[At, ...]) -> At:
        """The elements of an operand at an index, where `conds` hold."""
        if isinstance(operand, Value | Weight):
            if operand.name in self.definitions and isinstance(operand, Value):
                return self.computed(operand, index, conds)
            return self.loaded(operand, index, conds)
        if isinstance(operand, Sym):
            return At(self.size(operand))
        return At(number(operand))

    def computed(self, value: Value, index: Index, conds: tuple[At, ...]) -> At:
        """The elements of a value that the kernel computes."""
        op = self.definitions[value.name]
        key = (value.name, index, conds)
        found = self.find(key)
        if found is not None:
            return found
        if op.name in self.special:
            return self.special[op.name](op, value, index, conds)
        if op.name in POINTWISE:
            return self.let(self.pointwise(op, index, conds), key)
        moved = _MOVES.get(op.name)
        if moved is None:
            raise UnsupportedOpError(f"a {self.site.kernel.template} kernel has no code for `{op.name}`",
                                     where=f"#{op.place}", hint="leave it outside of kernels")
        at = moved(self, op, index, conds)
        self.levels[-1].known[key] = at
        return at

    def pointwise(self, op: Op, index: Index, conds: tuple[At, ...]) -> At:
        """The expression of a pointwise op."""
        texts: list[str] = []
        over = frozenset[str]()
        for operand in op.operands:
            if isinstance(operand, Value | Weight):
                at = self.value(operand, aligned(index, operand.type), conds)
                text = at.text
                if op.result.type.floating and not operand.type.floating and (op.name, len(texts)) != ("where", 0):
                    text = f"{text}.to(tl.float32)"
            else:
                at = self.value(operand, (), conds)
                text = at.text
            texts.append(text)
            over |= at.axes
        return At(expression(op, texts), over)

    def loaded(self, operand: Value | Weight, index: Index, conds: tuple[At, ...]) -> At:
        """A load of a value from outside; floating numbers become float32."""
        pointer = self.pointer(operand)
        offset, over = self.offset(operand, pointer, index)
        mask = self.mask(conds, over)
        masked = f", mask={mask}, other={'0.0' if operand.type.floating else '0'}" if mask else ""
        text = f"tl.load({pointer}{offset}{masked})"
        if operand.type.floating:
            text += ".to(tl.float32)"
        return self.let(At(text, over))

    def pointer(self, operand: Value | Weight) -> str:
        """The argument that points to a value from outside."""
        if operand not in self.pointers:
            self.pointers[operand] = f"x{len(self.pointers)}"
        return self.pointers[operand]

    def offset(self, operand: Value | Weight, pointer: str, index: Index) -> tuple[str, frozenset[str]]:
        """` + rows * 16 + cols`, and the axes it varies over."""
        over = frozenset[str]().union(*(at.axes for at in index)) if index else frozenset[str]()
        terms: list[str] = []
        if isinstance(operand, Value) and operand.name in self.site.dense:
            terms = self.dense(operand.type, index)
        else:
            for i, (at, dim) in enumerate(zip(index, operand.type.shape, strict=True)):
                if at.text == "0" or dim == 1:
                    continue
                stride = f"{pointer}_s{i}"
                self.strides[stride] = f"{self.site.text(operand)}.stride({i})"
                terms.append(f"{_grouped(at.text)} * {stride}")
        if not terms and over:  # a single number, for a whole block: Triton takes the block's mask with a block only
            terms = [f"0 * {_grouped(next(at.text for at in index if at.axes))}"]
        return "".join(f" + {term}" for term in terms), over

    def dense(self, type: Type, index: Index) -> list[str]:
        """The terms of the offset in memory without gaps; leading axes that are counted together stay together."""
        at, terms, shape = 0, [], type.shape
        names = tuple(entry.text for entry in index)
        while at < len(shape):
            taken, start = self._together(names[at:], shape[at:])
            inner = product(shape[at + taken:])
            entry = self._from(start) if taken > 1 else index[at]
            if entry.text != "0":
                terms.append(_grouped(entry.text) + ("" if inner == 1 else f" * {self.size(inner)}"))
            at += taken
        return terms

    def _together(self, names: tuple[str, ...], shape: tuple[Dim, ...]) -> tuple[int, int]:
        """How many axes from the first on are the last of the leading axes, one by one; and from which of those."""
        dims, own = self.lead
        for start in range(len(dims)):
            count = len(dims) - start
            if count > 1 and len(names) >= count and shape[:count] == dims[start:] and all(
                    name == (text if dim != 1 else "0") for name, text, dim in
                    zip(names, own[start:], dims[start:], strict=False)):
                return count, start
        return 1, 0

    def mask(self, conds: tuple[At, ...], over: frozenset[str]) -> str:
        """The conditions that say something of what is at `over`; the others do not change what is read."""
        texts = [cond.text for cond in conds if cond.axes and cond.axes <= over]
        if len(texts) < 2:
            return texts[0] if texts else ""
        return self.let(At(" & ".join(f"({text})" for text in texts), over)).text

    def store(self, pointer: str, type: Type, index: Index, value: At, conds: tuple[At, ...]) -> None:
        """Write a result, which lies in memory without gaps."""
        terms = self.dense(type, index)
        over = frozenset[str]().union(*(at.axes for at in index)) if index else frozenset[str]()
        if {"r", "c"} <= value.axes and "r" not in over:  # the one row of a block of them
            terms, over = [*terms, "0 * rows"], over | {"r"}
        mask = self.mask(conds, over)
        masked = f", mask={mask}" if mask else ""
        self.lines.append(f"tl.store({pointer}{''.join(f' + {term}' for term in terms)}, {value.text}{masked})")

    # --- the function's arguments ----------------------------------------------------------------------

    def parameters(self) -> list[str]:
        """The names of the arguments: what is read, what is written, sizes, strides."""
        results = [f"y{i}" for i in range(len(self.site.results))]
        return [*self.pointers.values(), *results, *(f"n_{name}" for name in self.sizes), *self.strides]

    def unspecialised(self) -> list[str]:
        """The arguments whose value must not make another kernel: sizes."""
        return [f"n_{name}" for name in self.sizes]

    def arguments(self) -> list[str]:
        """What the launching function passes for them."""
        results = [self.site.text(result) for result in self.site.results]
        sizes = [self.site.scope.text(symbol(name)) for name in self.sizes]
        return [*(self.site.text(operand) for operand in self.pointers), *results, *sizes, *self.strides.values()]


def aligned(index: Index, type: Type) -> Index:
    """The index of an operand that is broadcast: its axes are the last ones, those of size 1 are at 0."""
    own = index[len(index) - type.rank:] if type.rank else ()
    return tuple(ZERO if dim == 1 else at for at, dim in zip(own, type.shape, strict=True))


def _grouped(text: str) -> str:
    return text if text.isidentifier() or text.isdigit() else f"({text})"


# --- moves ---------------------------------------------------------------------------------------------

Move = Callable[[Writer, Op, Index, tuple[At, ...]], At]
_MOVES: dict[str, Move] = {}


def _move(name: str) -> Callable[[Move], Move]:
    def register(function: Move) -> Move:
        _MOVES[name] = function
        return function

    return register


def _type(op: Op, position: int = 0) -> Type:
    operand = op.operands[position]
    assert isinstance(operand, Value | Weight)
    return operand.type


def _dim(value: Attr) -> Dim:
    assert isinstance(value, int | Sym)
    return value


def _put(index: Index, at: int, entry: At) -> Index:
    return (*index[:at], entry, *index[at + 1:])


def _plus(w: Writer, at: At, dim: Dim) -> At:
    if dim == 0:
        return at
    if at.text.isdigit() and isinstance(dim, int):
        return At(str(int(at.text) + dim))
    return w.let(At(f"{at.text} + {w.size(dim)}", at.axes))


@_move("reshape")
def _reshape(w: Writer, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    return w.value(op.operands[0], reshaped(w, index, op.result.type.shape, _type(op).shape), conds)


def reshaped(w: Writer, index: Index, shape: tuple[Dim, ...], before: tuple[Dim, ...]) -> Index:
    """An index of `shape` as one of `before`, which has the same elements in the same order."""
    outer = [(dim, at) for dim, at in zip(shape, index, strict=True) if dim != 1]
    inner = [i for i, dim in enumerate(before) if dim != 1]
    found: dict[int, At] = {}
    a = b = 0
    while a < len(outer) or b < len(inner):
        i, j = _segment([dim for dim, _ in outer[a:]], [before[k] for k in inner[b:]])
        left, right = outer[a:a + i], inner[b:b + j]
        a, b = a + i, b + j
        if len(left) == 1 and len(right) == 1:
            found[right[0]] = left[0][1]
            continue
        flat, over = ZERO.text, frozenset[str]()
        for dim, at in left:
            flat = at.text if flat == "0" else f"({flat}) * {w.size(dim)} + {at.text}"
            over |= at.axes
        rest = w.let(At(flat, over))
        for k in reversed(right[1:]):
            found[k] = w.let(At(f"{rest.text} % {w.size(before[k])}", over))
            rest = w.let(At(f"{rest.text} // {w.size(before[k])}", over))
        for k in right[:1]:
            found[k] = rest
    return tuple(found.get(i, ZERO) for i in range(len(before)))


def _segment(left: Sequence[Dim], right: Sequence[Dim]) -> tuple[int, int]:
    """The fewest leading axes of two shapes that hold the same number of elements; all of them where none do."""
    for total in range(2, len(left) + len(right)):
        for i in range(max(1, total - len(right)), min(len(left), total - 1) + 1):
            if product(tuple(left[:i])) == product(tuple(right[:total - i])):
                return i, total - i
    return len(left), len(right)


@_move("permute")
def _permute(w: Writer, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    dims, rank = op.attrs["dims"], len(index)
    assert isinstance(dims, tuple)
    back = {int(str(dim)) % rank: at for dim, at in zip(dims, index, strict=True)}
    return w.value(op.operands[0], tuple(back[i] for i in range(rank)), conds)


@_move("expand")
def _expand(w: Writer, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    return w.value(op.operands[0], aligned(index, _type(op)), conds)


@_move("slice")
def _slice(w: Writer, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    at = axis(len(index), int(str(op.attrs["dim"])))
    return w.value(op.operands[0], _put(index, at, _plus(w, index[at], _dim(attr(op, "start")))), conds)


@_move("select")
def _select(w: Writer, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    whole = _type(op)
    at, chosen = axis(whole.rank, int(str(op.attrs["dim"]))), _dim(op.attrs["index"])
    if isinstance(chosen, int) and chosen < 0:
        chosen = chosen + whole.shape[at]
    return w.value(op.operands[0], (*index[:at], At(w.size(chosen)), *index[at:]), conds)


@_move("cat")
def _cat(w: Writer, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    at = axis(len(index), int(str(op.attrs["dim"])))
    own, start, found = index[at], _dim(0), None
    for position in range(len(op.operands)):
        stop = start + _type(op, position).shape[at]
        inside = f"({own.text} >= {w.size(start)}) & ({own.text} < {w.size(stop)})"
        entry = _plus(w, own, -start)
        part = w.value(op.operands[position], aligned(_put(index, at, entry), _type(op, position)),
                       (*conds, At(inside, own.axes)))
        found = part if found is None else w.let(At(
            f"tl.where({own.text} < {w.size(start)}, {found.text}, {part.text})", found.axes | part.axes | own.axes))
        start = stop
    assert found is not None
    return found


@_move("slice_adjoint")
def _slice_adjoint(w: Writer, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    at = axis(len(index), int(str(op.attrs["dim"])))
    start, stop, own = _dim(attr(op, "start")), _dim(op.attrs["stop"]), index[at]
    inside = w.let(At(f"({own.text} >= {w.size(start)}) & ({own.text} < {w.size(stop)})", own.axes))
    part = w.value(op.operands[0], _put(index, at, _plus(w, own, -start)), (*conds, inside))
    return w.let(At(f"tl.where({inside.text}, {part.text}, {_zero(op)})", part.axes | own.axes))


@_move("select_adjoint")
def _select_adjoint(w: Writer, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    at = axis(len(index), int(str(op.attrs["dim"])))
    chosen, own = _dim(op.attrs["index"]), index[at]
    if isinstance(chosen, int) and chosen < 0:
        chosen = chosen + op.result.type.shape[at]
    inside = w.let(At(f"{own.text} == {w.size(chosen)}", own.axes))
    part = w.value(op.operands[0], (*index[:at], *index[at + 1:]), (*conds, inside))
    return w.let(At(f"tl.where({inside.text}, {part.text}, {_zero(op)})", part.axes | own.axes))


def _zero(op: Op) -> str:
    return "0.0" if op.result.type.floating else "0"


@_move("full")
def _full(w: Writer, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    value = op.attrs["value"]
    if isinstance(value, Sym):
        return At(w.size(value))
    if isinstance(value, int | float) and op.result.type.floating:
        value = float(value)
    return At(number(value))


@_move("rotary")
def _rotary(w: Writer, op: Op, index: Index, conds: tuple[At, ...]) -> At:
    x, cos, sin = op.operands
    last, half = index[-1], op.result.type.shape[-1] // 2
    first = w.let(At(f"{last.text} < {w.size(half)}", last.axes))
    other = w.let(At(f"tl.where({first.text}, {last.text} + {w.size(half)}, {last.text} - {w.size(half)})", last.axes))
    types = [o.type for o in op.operands if isinstance(o, Value | Weight)]
    here, there = (w.value(x, aligned(_put(index, len(index) - 1, at), types[0]), conds) for at in (last, other))
    c, s = (w.value(o, aligned(index, t), conds) for o, t in zip((cos, sin), types[1:], strict=True))
    text = f"{here.text} * {c.text} + tl.where({first.text}, -{there.text}, {there.text}) * {s.text}"
    return w.let(At(text, here.axes | there.axes | c.axes | s.axes | last.axes))


def moves() -> Mapping[str, Move]:
    """The moves that kernels have code for, by op."""
    return dict(_MOVES)
