"""A kernel as a C function: nests of loops, each over the elements of one shape, which store one value or several.

Sums, products of matrices and results are stored; so is what would be computed again for each element that reads it.
Everything else is written where it is read. A value joins the nest before it where that has its shape and holds at the
same element what the value reads of it.
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dlbc.backends.c.primitives import written_out
from dlbc.backends.c.table import number
from dlbc.backends.c.writer import MOVES, TYPES, Elsewhere, Writer
from dlbc.backends.moves import ZERO, At, Index, aligned
from dlbc.backends.names import WIDTH
from dlbc.backends.site import Scope
from dlbc.ir.core import Kernel, Op, Type, Value, Weight, values
from dlbc.ir.dims import Dim, product
from dlbc.ir.fusible import CHEAP, LOOP_POINTWISE, LOOP_PRODUCTS, VIEWS
from dlbc.ir.ops import attr, axes

SUMS = {"sum": ("0", "{acc} + {x}"), "prod": ("1", "{acc} * {x}"), "any": ("0", "{acc} | ({x} != 0)"),
        "all": ("1", "{acc} & ({x} != 0)"), "amax": ("-INFINITY", "dlbc_maximum_{dtype}({acc}, {x})"),
        "amin": ("INFINITY", "dlbc_minimum_{dtype}({acc}, {x})")}
"""Of each reduction what it starts with and how it goes on."""

QUICK = frozenset({"add", "sub", "mul", "eq", "ne", "lt", "le", "gt", "ge", "where", "logical_and", "logical_or",
                   "logical_not", "stabilise", "relu_adjoint", "sign", "clamp", "threshold"}) | CHEAP
"""Pointwise ops that take no longer than reading a number."""


@dataclass
class _Nest:
    """Loops over a shape, and the lines inside."""

    shape: tuple[Dim, ...]
    index: Index
    lines: list[str]
    done: bool = False


class Nests:
    """The text of one function."""

    def __init__(self, kernel: Kernel, scope: Scope) -> None:
        self.kernel, self.ops = kernel, written_out(kernel.body, scope.definitions)
        self.results = {value.name: f"y{number}" for number, value in enumerate(kernel.results)}
        self.writer = Writer(self.ops, scope)
        self.writer.anew = self.element
        self.readers: dict[str, list[Op]] = defaultdict(list)
        for op in self.ops:
            for value in dict.fromkeys(values(op.operands)):
                self.readers[value.name].append(op)
        self.nests: list[_Nest] = []
        self.scratch: list[tuple[str, Type]] = []
        depths: dict[str, int] = {}  # ops in the longest chain of them that is written with a value
        ways: dict[str, set[tuple[int, ...]]] = {}  # the moves by which what is written with a value is reached
        for place, op in enumerate(self.ops):
            inner = [value.name for value in values(op.operands) if value.name in depths]
            depth = 1 + max((depths[name] for name in inner), default=0)
            step = (place,) if op.name in MOVES else ()
            way = {(), *(step + each for name in inner for each in ways[name])}
            for value in op.results:
                if depth == LONGEST or len(way) > WAYS or self.stored(value, op):
                    self.store(value, op)
                else:
                    depths[value.name], ways[value.name] = depth, way

    # --- what it takes ---

    @property
    def steps(self) -> Dim:
        """About how many numbers the loops add, multiply or write."""
        return sum((_steps(op) for op in self.ops), start=0)

    @property
    def calls(self) -> int:
        """How many calls of an array library they stand for."""
        return sum(op.name not in VIEWS and op.name != "full" for op in self.ops)

    # --- what is stored ----------------------------------------------------------------------------------

    def stored(self, value: Value, op: Op) -> bool:
        """Whether a value gets memory."""
        if value.name in self.results:
            return True
        if op.name in VIEWS or op.name == "full":
            return False
        if op.name not in LOOP_POINTWISE and op.name not in MOVES:
            return True
        if op.name in CHEAP:
            return False
        readers = self.seen(value)
        if any(reader.name in LOOP_PRODUCTS for reader, _ in readers):
            return True
        wider = any(shape != value.type.shape or reader.name in SUMS for reader, shape in readers)
        many = len(readers) > 1
        return wider and (many or op.name not in QUICK) if op.name in LOOP_POINTWISE else many

    def seen(self, value: Value) -> list[tuple[Op, tuple[Dim, ...]]]:
        """The ops that read a value, by way of what is written where it is read; and the shape that each is of."""
        found: list[tuple[Op, tuple[Dim, ...]]] = []
        for op in self.readers[value.name]:
            if (op.name in CHEAP or op.name in VIEWS) and op.result.name not in self.results:
                found += self.seen(op.result)
            else:
                found.append((op, op.result.type.shape))
        return found

    # --- nests -------------------------------------------------------------------------------------------

    def store(self, value: Value, op: Op) -> None:
        """Write a value in the nest before it, if that can be, or in one of its own."""
        memory = self.results.get(value.name) or f"t{len(self.scratch)}"
        if value.name not in self.results:
            self.scratch.append((memory, value.type))
        if op.name == "matmul":
            self.by_columns(value, op, memory)
        elif not (self.nests and not self.nests[-1].done and self.nests[-1].shape == value.type.shape
                  and self.joined(value, memory)):
            self.close()
            index = tuple(ZERO if dim == 1 else At(f"i{place}") for place, dim in enumerate(value.type.shape))
            self.nests.append(_Nest(value.type.shape, index, []))
            self.writer.enter()
            self.put(value, memory)
        self.writer.memory[value.name] = memory

    def joined(self, value: Value, memory: str) -> bool:
        """Write a value in the present nest; False where it needs what that has made at other elements."""
        level = self.writer.levels[-1]
        before, known, count = len(level.lines), dict(level.known), self.writer.count
        depth = len(self.writer.levels)
        try:
            self.put(value, memory)
        except Elsewhere:
            del self.writer.levels[depth:]
            del level.lines[before:]
            level.known, self.writer.count = known, count
            return False
        return True

    def put(self, value: Value, memory: str) -> None:
        """The element of a value, written to memory."""
        index = self.nests[-1].index
        at = self.writer.computed(value, index)
        self.writer.made[value.name] = (index, at)
        self.writer.lines.append(f"{memory}[{self.writer.offset(value.type, index)}] = {at.text};")

    def close(self) -> None:
        """The present nest is done: what it made is in memory."""
        if self.nests and not self.nests[-1].done:
            self.nests[-1].lines, self.nests[-1].done = self.writer.leave(), True
        self.writer.made = {}

    # --- elements that take a loop -----------------------------------------------------------------------

    def element(self, op: Op, value: Value, index: Index, conds: tuple[At, ...]) -> At:
        """The element of a sum, an extreme or a product, in a loop of its own."""
        found = self.dot(op, index) if op.name == "linear" else self.reduced(op, index)
        return self.writer.let(At(found), (value.name, index, conds))

    def reduced(self, op: Op, index: Index) -> str:
        """A sum or an extreme over axes."""
        w, x, result = self.writer, op.operands[0], op.result.type
        assert isinstance(x, Value | Weight)
        over, acc = axes(x.type.rank, attr(op, "dims")), self.writer.name("acc")
        kept = iter(index if not attr(op, "keepdim") else [at for i, at in enumerate(index) if i not in over])
        whole = [At(w.name("r")) if i in over else next(kept) for i in range(x.type.rank)]
        whole = [ZERO if dim == 1 else at for at, dim in zip(whole, x.type.shape, strict=True)]
        start, on = SUMS[op.name]
        wide = op.name == "sum" and result.dtype == "f32"  # added as they come, long sums would lose two digits
        w.lines.append(f"{'double' if wide else TYPES[result.dtype]} {acc} = {start};")
        loops = [(whole[i].text, x.type.shape[i]) for i in over if x.type.shape[i] != 1]
        w.enter()
        element = w.value(x, tuple(whole))
        w.lines.append(f"{acc} = {on.format(acc=acc, x=element.text, dtype=result.dtype)};")
        sign = {"sum": "+", "prod": "*"}.get(op.name)
        inner = w.leave()
        w.lines.extend(looped(inner, [(name, w.size(dim)) for name, dim in loops],
                              f"reduction({sign}:{acc})" if sign else ""))
        if not wide:
            return acc
        w.lines.append(f"const float {(found := w.name())} = (float){acc};")
        return found

    def dot(self, op: Op, index: Index) -> str:
        """An element of `x W^T + b`: rows of both lie in memory."""
        w, (x, weight, *bias) = self.writer, op.operands
        assert isinstance(x, Value | Weight) and isinstance(weight, Value | Weight)
        acc, k = w.name("acc"), At(w.name("k"))
        w.lines.append(f"{TYPES[op.result.type.dtype]} {acc} = 0;")
        w.enter()
        k = ZERO if x.type.shape[-1] == 1 else k
        left, right = (w.value(o, at) for o, at in ((x, (*index[:-1], k)), (weight, (index[-1], k))))
        w.lines.append(f"{acc} = dlbc_mad_{op.result.type.dtype}({left.text}, {right.text}, {acc});")
        inner = w.leave()
        loops = [] if k is ZERO else [(k.text, w.size(x.type.shape[-1]))]
        w.lines.extend(looped(inner, loops, f"reduction(+:{acc})"))
        if bias and bias[0] is not None:
            assert isinstance(bias[0], Value | Weight)
            own = w.value(bias[0], aligned(index, bias[0].type))
            w.lines.append(f"{acc} += {own.text};")
        return acc

    def by_columns(self, value: Value, op: Op, memory: str) -> None:
        """`x W`, a nest of its own: each row of W is added to the row of the result as a whole."""
        self.close()
        w, (x, matrix) = self.writer, op.operands[:2]
        assert isinstance(x, Value | Weight) and isinstance(matrix, Value | Weight)
        shape = value.type.shape
        lead = tuple(ZERO if dim == 1 else At(f"i{place}") for place, dim in enumerate(shape[:-1]))
        last, k = (ZERO if dim == 1 else At(name) for dim, name in ((shape[-1], "j"), (x.type.shape[-1], "k")))
        rows = [(at.text, w.size(dim)) for at, dim in zip(lead, shape[:-1], strict=True) if dim != 1]
        element = f"{memory}[{w.offset(value.type, (*lead, last))}]"
        columns = [("j", w.size(shape[-1]))] if shape[-1] != 1 else []
        w.enter()
        first = looped([f"{element} = {number(0, value.type.dtype)};"], columns, "")
        w.enter()
        left = w.value(x, (*aligned(lead[:-1], _batch(x)), lead[-1], k))
        w.enter()
        right = w.value(matrix, (*aligned(lead[:-1], _batch(matrix)), k, last))
        w.lines.append(f"{element} = dlbc_mad_{value.type.dtype}({left.text}, {right.text}, {element});")
        inner = looped(w.leave(), columns, " ")
        lines = looped([*w.leave(), *inner], [("k", w.size(x.type.shape[-1]))] if k is not ZERO else [], "")
        self.nests.append(_Nest((), (), looped([*w.leave(), *first, *lines], rows, ""), done=True))

    # --- the function ------------------------------------------------------------------------------------

    def text(self) -> str:
        """The function, called `KERNEL`."""
        self.close()
        w = self.writer
        body = [line for nest in self.nests for line in looped(
            nest.lines, [(at.text, w.size(dim)) for at, dim in zip(nest.index, nest.shape, strict=True)
                         if dim != 1], "")]
        scratch = self.scratch_lines()
        params = [f"int64_t {name}" for name in w.sizes.values()]
        params += [f"const {TYPES[x.type.dtype]} *restrict {name}" for x, name in w.pointers.items()]
        params += [f"{TYPES[v.type.dtype]} *restrict {self.results[v.name]}" for v in self.kernel.results]
        lines = [*scratch[0], *body, *scratch[1], "return 0;"]
        head = textwrap.wrap(f"int32_t KERNEL({', '.join(params)})", WIDTH, subsequent_indent=8 * " ",
                             break_long_words=False)
        return "\n".join([*head, "{", *(f"    {line}" for line in lines), "}"])

    def scratch_lines(self) -> tuple[list[str], list[str]]:
        """Lines that get memory for what is stored and no result, and that give it back."""
        w, fixed, opening, places, room = self.writer, [], [], [], STACK
        for name, type_ in self.scratch:
            ctype = TYPES[type_.dtype]
            if all(isinstance(dim, int) for dim in type_.shape) and _elements(type_) <= room:
                room -= _elements(type_)
                fixed.append(f"{ctype} {name}[{max(_elements(type_), 1)}];")
            else:
                places.append((name, ctype, w.times(type_.shape)))
        if places:
            bytes_ = [f"const size_t {name}_bytes = dlbc_bytes({count} * sizeof({ctype}));"
                      for name, ctype, count in places]
            total = " + ".join(f"{name}_bytes" for name, _, _ in places)
            opening += [*bytes_, f"char *const scratch = malloc({total} + 1), *next = scratch;",
                        "if (!scratch) return 1;"]
            for name, ctype, _ in places:
                opening += [f"{ctype} *restrict {name} = ({ctype} *)next;", f"next += {name}_bytes;"]
        return [*fixed, *opening], ["free(scratch);"] if places else []


LONGEST = 64
"""Ops in a chain of which none is stored, at most: each is written by the one that reads it, one call in another."""

WAYS = 16
"""Places that are written out for one element, at most: `x + roll(x)` takes two elements of x, and twice as many for
each such step before it."""

STACK = 4096
"""Elements of all arrays of a function on the stack, at most: a thread may have little of it."""


def looped(lines: Sequence[str], loops: Sequence[tuple[str, str]], simd: str) -> list[str]:
    """Lines inside loops `(index, size)`, the last of which the compiler may run several turns of at once."""
    found = list(lines)
    for place, (name, size) in enumerate(reversed(loops)):
        opened = f"for (int64_t {name} = 0; {name} < {size}; {name}++) {{"
        found = [*([f"#pragma omp simd {simd}".rstrip()] if simd and not place else []), opened,
                 *(f"    {line}" for line in found), "}"]
    return found if loops else ["{", *(f"    {line}" for line in found), "}"]


def _steps(op: Op) -> Dim:
    if op.name in VIEWS or op.name == "full":
        return 0
    if op.name not in SUMS and op.name not in LOOP_PRODUCTS:
        return product(op.result.type.shape)
    x = op.operands[0]
    assert isinstance(x, Value | Weight)
    if op.name in LOOP_PRODUCTS:
        return 2 * product(op.result.type.shape) * x.type.shape[-1]
    return product(x.type.shape)


def _batch(x: Value | Weight) -> Type:
    return Type(x.type.dtype, x.type.shape[:-2])


def _elements(type_: Type) -> int:
    found = 1
    for dim in type_.shape:
        assert isinstance(dim, int)
        found *= dim
    return found
