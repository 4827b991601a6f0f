"""Kernels of pointwise ops and moves: every program writes a block of rows and columns of the results.

The results have one shape; its last axis are the columns, the axes before it the rows.
"""

from __future__ import annotations

from dlbc.backends.triton.kernels import Emitted, KernelSite, launched, named, parameters, render
from dlbc.backends.triton.pull import ZERO, At, Index, Writer
from dlbc.ir.dims import product

ELEMENTS = 1024
"""Elements of a block."""


def emit(site: KernelSite) -> Emitted:
    """The kernel and its launch."""
    shape = site.results[0].type.shape
    lead, width = shape[:-1], shape[-1] if shape else 1
    columns = min(_power_of_two(width), 256) if isinstance(width, int) else 128
    tile = {"BM": max(1, ELEMENTS // columns), "BN": columns}
    if product(lead) == 1:
        tile["BM"] = 1
    writer = Writer(site)
    conds: list[At] = []
    index: Index = writer.rows_of(lead)
    if product(lead) != 1:
        conds.append(At(f"rows < {writer.size(product(lead))}", frozenset("r")))
    if shape:
        index = (*index, ZERO if width == 1 else At("cols", frozenset("c")))
        if width != 1 and not (isinstance(width, int) and width % columns == 0):
            conds.append(At(f"cols < {writer.size(width)}", frozenset("c")))
    values = [writer.value(result, index, tuple(conds)) for result in site.results]
    for number, (result, value) in enumerate(zip(site.results, values, strict=True)):
        writer.store(f"y{number}", result.type, index, value, tuple(conds))
    source, name = named(render("elementwise", parameters=parameters(writer.parameters()), fixed=writer.unspecialised(),
                                width=writer.size(width), several=not isinstance(width, int) or width > columns,
                                lines=writer.lines), "elementwise")
    grid = f"blocks({site.scope.text(product(lead))}, {tile['BM']}, {site.scope.text(width)}, {tile['BN']})"
    options = [f"{key}={value}" for key, value in tile.items()]
    return Emitted(source, (*(site.empty(result) for result in site.results),
                            *launched([name, grid, *writer.arguments(), *options, "num_warps=4"])))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
