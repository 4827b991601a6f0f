"""Writes a kernel's body from its results back: the element of a value at an index, from those it is made of.

An index is one expression for each axis (`At`), which says over which axes of a block it varies: a block of row numbers
[BM, 1] over "r", of column numbers [1, BN] over "c", a number over none. A move (`permute`, `slice`, `cat`, ...) is an
index made of an index; a value from outside is a load; what was written once, at the same index, is not written again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dlbc.backends.moves import MOVED, ZERO, At, Index, aligned, grouped
from dlbc.backends.triton.kernels import KernelSite
from dlbc.backends.triton.table import expression, number
from dlbc.errors import UnsupportedOpError
from dlbc.ir.core import Op, Operand, Type, Value, Weight
from dlbc.ir.dims import Dim, Sym, product, substitute, symbol, symbols
from dlbc.ir.fusible import POINTWISE


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

    def number(self, value: float, type: Type) -> str:
        """A literal of a type."""
        return number(float(value) if type.floating else value)

    def either(self, condition: str, yes: str, no: str) -> str:
        """One block or another, element by element."""
        return f"tl.where({condition}, {yes}, {no})"

    def quotient(self, left: str, right: str) -> str:
        """Of two whole numbers, without the rest."""
        return f"{left} // {right}"

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
        moved = MOVED.get(op.name)
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
                terms.append(f"{grouped(at.text)} * {stride}")
        if not terms and over:  # a single number, for a whole block: Triton takes the block's mask with a block only
            terms = [f"0 * {grouped(next(at.text for at in index if at.axes))}"]
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
                terms.append(grouped(entry.text) + ("" if inner == 1 else f" * {self.size(inner)}"))
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
