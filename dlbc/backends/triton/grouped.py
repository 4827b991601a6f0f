"""Kernels of products whose rows each have the matrix of their expert, rows sorted by expert (`grouped_linear`).

The rows of an expert, of all seeds together, are cut into tiles; a program finds the expert of its tile from `ends`,
which it reads on the GPU, so nothing waits for the host and other routings run the same kernel. There are as many
programs as the most uneven routing needs; those without rows end at once. The matrices of experts without rows are not
read. All else (accumulators, |W| in registers, what is pointwise afterwards) is as in `gemm.py`.
"""

from __future__ import annotations

from dlbc.backends.moves import At, Index
from dlbc.backends.triton.choices import tabled
from dlbc.backends.triton.gemm import GemmWriter
from dlbc.backends.triton.kernels import Emitted, KernelSite, named, render
from dlbc.ir.core import Op, Operand, Value, Weight
from dlbc.ir.dims import product
from dlbc.ir.fusible import factors
from dlbc.ir.ops import attr

EXPERT = At("expert")
PARTS = {"": "", "abs": "tl.abs({0})", "positive": "tl.where({0} < 0, 0.0, {0})",
         "negative": "tl.where({0} > 0, 0.0, -{0})",
         "square": "{0} * {0}"}
"""What a product takes of its weights."""


def emit(site: KernelSite) -> Emitted:
    """The kernel and its launch."""
    writer = GroupedWriter(site)
    experts = writer.groups()
    *lead, rows = writer.products[0].result.type.shape[:-1]
    seeds = product(tuple(lead))
    found = {"seeds": writer.size(seeds), "rows": writer.size(rows), "experts": experts,
             "block": max(2, 1 << (experts - 1).bit_length())}
    found |= {name: writer.end(at) for name, at in (("own", "expert"), ("before", "(expert - 1)"),
                                                    ("every", "experts"), ("every_before", "(experts - 1)"))}
    source, name = named(tabled(render("grouped", **found, **writer.body()), writer.choice.table), "grouped")
    mean = f"({site.scope.text(product((*lead, rows)))}) // {experts}"
    counts = (site.scope.text(rows), site.scope.text(seeds), str(experts))
    return writer.launch(source, name, mean, f'expert_blocks({", ".join(counts)}, tile["BM"], {writer.width}, '
                                             'tile["BN"])')


class GroupedWriter(GemmWriter):
    """A writer of products with `expert`, a number that all rows of a program share."""

    def end(self, at: str) -> str:
        """The address of where the rows of an expert end, also where there is one expert."""
        ends = self.products[0].operands[1]
        assert isinstance(ends, Value | Weight)
        pointer = self.pointer(ends)
        self.strides[f"{pointer}_s0"] = f"{self.site.text(ends)}.stride(0)"
        return f"{pointer} + {at} * {pointer}_s0"

    def inside(self) -> At:
        """The condition that a row is one of the program's expert."""
        return At("inside", frozenset("r"))

    def groups(self) -> int:
        """How many experts there are."""
        matrix = factors(self.products[0])[1]
        assert isinstance(matrix, Value | Weight) and isinstance(matrix.type.shape[0], int)
        return matrix.type.shape[0]

    def matrix(self, op: Op, down: At, across: At) -> Index:
        """Where in the experts' matrices the number is."""
        return (EXPERT, down, across) if attr(op, "transposed") else (EXPERT, across, down)

    def part(self, op: Op, at: At) -> At:
        """The weights' sizes, parts or squares, made where they are read."""
        written = PARTS[str(attr(op, "part"))]
        return self.let(At(written.format(at.text), at.axes)) if written else at

    def dtypes(self, op: Op) -> tuple[str, str]:
        """As for plain products; squares have twice the digits of the weights."""
        left, right = super().dtypes(op)
        return left, "f32" if attr(op, "part") == "square" else right

    def bias(self, op: Op) -> tuple[Operand, Index]:
        """The bias (or None), and where that of the expert is."""
        return op.operands[3] if len(op.operands) > 3 else None, (EXPERT, *self.index[-1:])

    def combined(self) -> int:
        """How many values with one number for each result are read after the products: the biases are none."""
        biases = {self.bias(op)[0] for op in self.products}
        return super().combined() - sum(o in biases and o.type.rank > 1 for o in self.site.inputs)
