"""Kernels of ops that take rows together (norms, softmax, sums along the last axis) with what is pointwise around them.

Every program holds some whole rows. The results are as long as the rows, or have one number for each.
"""

from __future__ import annotations

from dlbc.backends.moves import ZERO, At, Index, aligned
from dlbc.backends.triton.blocks import row_blocks
from dlbc.backends.triton.choices import tabled
from dlbc.backends.triton.kernels import Emitted, KernelSite, launched, named, parameters, render
from dlbc.backends.triton.pull import Writer
from dlbc.backends.triton.table import number
from dlbc.errors import UnsupportedOpError
from dlbc.ir.core import Op, Value, Weight
from dlbc.ir.dims import Dim, product
from dlbc.ir.fusible import ROWWISE, is_row
from dlbc.ir.ops import attr


def emit(site: KernelSite) -> Emitted:
    """The kernel and its launch."""
    lead, length = rows_of(site)
    choice = row_blocks(site.device, length, single=product(lead) == 1)
    columns = int(choice.table[0][1]["BN"])
    writer = RowWriter(site, length, columns)
    index = writer.index = writer.rows_of(lead)
    conds: list[At] = []
    if product(lead) != 1:
        conds.append(At(f"rows < {writer.size(product(lead))}", frozenset("r")))
    if length != columns:
        conds.append(At(f"cols < {length}", frozenset("c")))
    places = [_place(result, lead, length, index) for result in site.results]
    found = [writer.value(result, place, tuple(conds)) for result, place in zip(site.results, places, strict=True)]
    for position, (result, place, value) in enumerate(zip(site.results, places, found, strict=True)):
        writer.store(f"y{position}", result.type, place, value, tuple(conds))
    text = render("row", parameters=parameters(writer.parameters()), fixed=writer.unspecialised(), lines=writer.lines)
    source, name = named(tabled(text, choice.table), "row")
    rows = site.scope.text(product(lead))
    return Emitted(source, (
        *(site.empty(result) for result in site.results),
        *launched(name, rows, f'blocks({rows}, tile["BM"])', writer.arguments())), {name: choice})


def rows_of(site: KernelSite) -> tuple[tuple[Dim, ...], int]:
    """The axes before the rows, and how long these are."""
    op = next(op for op in site.kernel.body if is_row(op))
    x = op.operands[0]
    assert isinstance(x, Value | Weight)
    length = x.type.shape[-1]
    assert isinstance(length, int)
    return x.type.shape[:-1], length


def _place(result: Value, lead: tuple[Dim, ...], length: int, index: Index) -> Index:
    """The index of a result of whole rows, or of one number for each row."""
    shape = result.type.shape
    if shape == (*lead, length):
        return (*index, At("cols", frozenset("c")))
    return (*index, ZERO) if shape == (*lead, 1) else index


class RowWriter(Writer):
    """A writer that knows rows of `length` numbers, held in blocks of `columns`."""

    def __init__(self, site: KernelSite, length: int, columns: int) -> None:
        super().__init__(site)
        self.length, self.columns = length, columns
        self.index: Index = ()
        self.special = dict.fromkeys(ROWWISE, self.row)

    def row(self, op: Op, value: Value, index: Index, conds: tuple[At, ...]) -> At:
        """The result of an op that takes rows together."""
        lead = index[:-1] if len(index) == self.rank(op) else index
        if lead != self.index or (op.name in ("softmax", "log_softmax", "layer_norm", "rms_norm")
                                  and index[-1].text != "cols"):
            raise UnsupportedOpError(f"a row kernel reads `{op.name}` at other places than its own",
                                     where=f"#{op.place}", hint="leave that outside of the kernel")
        x = self.value(op.operands[0], (*lead, At("cols", frozenset("c"))), conds)
        found = getattr(self, f"_{op.name}")(op, value, x, index, conds)
        assert isinstance(found, At)
        self.levels[-1].known[(value.name, index, conds)] = found
        return found

    def rank(self, op: Op) -> int:
        """The rank of what an op reads."""
        x = op.operands[0]
        assert isinstance(x, Value | Weight)
        return x.type.rank

    def whole(self, text: str, over: frozenset[str], neutral: str) -> str:
        """A block of rows with `neutral` behind their ends."""
        if "c" not in over or "r" not in over:
            text = f"tl.broadcast_to({text}, (BM, BN))"
        return text if self.length == self.columns else f"tl.where(cols < {self.length}, {text}, {neutral})"

    def along(self, reduction: str, x: At, neutral: str) -> At:
        """`tl.sum` or `tl.max` along rows: a block [BM, 1]."""
        text = self.whole(x.text, x.axes, neutral)
        return self.let(At(f"tl.{reduction}({text}, 1)[:, None]", frozenset("r")))

    def total(self, x: At) -> At:
        """The sum along rows."""
        return self.along("sum", x, "0.0")

    # One method for each op of ROWWISE: the op, the value asked for, its operand, at which index.

    def _sum(self, op: Op, value: Value, x: At, index: Index, conds: tuple[At, ...]) -> At:
        return self.total(x)

    def _mean(self, op: Op, value: Value, x: At, index: Index, conds: tuple[At, ...]) -> At:
        return self.let(At(f"{self.total(x).text} / {self.length}", frozenset("r")))

    def _amax(self, op: Op, value: Value, x: At, index: Index, conds: tuple[At, ...]) -> At:
        return self.along("max", x, 'float("-inf")')

    def _amin(self, op: Op, value: Value, x: At, index: Index, conds: tuple[At, ...]) -> At:
        return self.along("min", x, 'float("inf")')

    def _logsumexp(self, op: Op, value: Value, x: At, index: Index, conds: tuple[At, ...]) -> At:
        top = self._amax(op, value, x, index, conds)
        top = self.let(At(f'tl.where(tl.abs({top.text}) == float("inf"), 0.0, {top.text})', top.axes))
        powers = self.let(At(f"tl.exp({x.text} - {top.text})", x.axes | top.axes))
        return self.let(At(f"{top.text} + tl.log({self.total(powers).text})", frozenset("r")))

    def _softmax(self, op: Op, value: Value, x: At, index: Index, conds: tuple[At, ...]) -> At:
        top = self._amax(op, value, x, index, conds)
        powers = self.let(At(f"tl.exp({x.text} - {top.text})", x.axes | top.axes))
        return self.let(At(f"{powers.text} / {self.total(powers).text}", powers.axes))

    def _log_softmax(self, op: Op, value: Value, x: At, index: Index, conds: tuple[At, ...]) -> At:
        top = self._amax(op, value, x, index, conds)
        below = self.let(At(f"{x.text} - {top.text}", x.axes | top.axes))
        powers = self.let(At(f"tl.exp({below.text})", below.axes))
        return self.let(At(f"{below.text} - tl.log({self.total(powers).text})", below.axes))

    def statistics(self, op: Op, x: At, centred: bool) -> tuple[At, At]:
        """The mean of rows (0 unless centred) and 1 / sqrt(variance + eps)."""
        mean = self.let(At(f"{self.total(x).text} / {self.length}", frozenset("r"))) if centred else At("0.0")
        off = self.let(At(f"{x.text} - {mean.text}", x.axes | mean.axes)) if centred else x
        square = self.total(self.let(At(f"{off.text} * {off.text}", off.axes)))
        scale = f"1.0 / tl.sqrt_rn({square.text} / {self.length} + {number(attr(op, 'eps'))})"
        return mean, self.let(At(scale, frozenset("r")))

    def _row_statistics(self, op: Op, value: Value, x: At, index: Index, conds: tuple[At, ...]) -> At:
        mean, scale = self.statistics(op, x, bool(attr(op, "centred")))
        return mean if value.name == op.results[0].name else scale

    def _layer_norm(self, op: Op, value: Value, x: At, index: Index, conds: tuple[At, ...]) -> At:
        mean, scale = self.statistics(op, x, centred=True)
        return self.affine(op, At(f"({x.text} - {mean.text}) * {scale.text}", x.axes | scale.axes), index, conds)

    def _rms_norm(self, op: Op, value: Value, x: At, index: Index, conds: tuple[At, ...]) -> At:
        scale = self.statistics(op, x, centred=False)[1]
        return self.affine(op, At(f"{x.text} * {scale.text}", x.axes | scale.axes), index, conds)

    def affine(self, op: Op, at: At, index: Index, conds: tuple[At, ...]) -> At:
        """`at * weight + bias`, of those there are."""
        for sign, operand in zip("*+", op.operands[1:], strict=False):
            if isinstance(operand, Value | Weight):
                own = self.value(operand, aligned(index, operand.type), conds)
                at = At(f"{at.text} {sign} {own.text}", at.axes | own.axes)
        return self.let(at)
