"""Kernels of pointwise ops and moves: every program writes a block of rows and columns of the results.

The results have one shape; its last axis are the columns, the axes before it the rows.
"""

from __future__ import annotations

from dlbc.backends.moves import ZERO, At, Index
from dlbc.backends.triton.blocks import pointwise_blocks
from dlbc.backends.triton.choices import tabled
from dlbc.backends.triton.kernels import Emitted, KernelSite, launched, named, parameters, render
from dlbc.backends.triton.pull import Writer
from dlbc.ir.dims import product


def emit(site: KernelSite) -> Emitted:
    """The kernel and its launch."""
    shape = site.results[0].type.shape
    lead, width = shape[:-1], shape[-1] if shape else 1
    choice = pointwise_blocks(site.device, width if isinstance(width, int) else None, single=product(lead) == 1)
    columns = int(choice.table[0][1]["BN"])
    several, cut = not isinstance(width, int) or width > columns, not isinstance(width, int) or width % columns != 0
    writer = Writer(site)
    conds: list[At] = []
    index: Index = writer.rows_of(lead)
    if product(lead) != 1:
        conds.append(At(f"rows < {writer.size(product(lead))}", frozenset("r")))
    if shape:
        index = (*index, ZERO if width == 1 else At("cols", frozenset("c")))
        if cut:
            conds.append(At(f"cols < {writer.size(width)}", frozenset("c")))
    values = [writer.value(result, index, tuple(conds)) for result in site.results]
    for number, (result, value) in enumerate(zip(site.results, values, strict=True)):
        writer.store(f"y{number}", result.type, index, value, tuple(conds))
    legal = "" if several and cut else f"{width} % BN == 0" if several else f"BN == {columns}"
    text = render("elementwise", parameters=parameters(writer.parameters()), fixed=writer.unspecialised(),
                  width=writer.size(width), several=several, legal=legal, lines=writer.lines)
    source, name = named(tabled(text, choice.table), "elementwise")
    rows = site.scope.text(product(lead))
    return Emitted(source, (
        *(site.empty(result) for result in site.results),
        *launched(name, rows, f'blocks({rows}, tile["BM"], {site.scope.text(width)}, tile["BN"])',
                  writer.arguments())), {name: choice})
