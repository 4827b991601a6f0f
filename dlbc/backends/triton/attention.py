"""Kernels of attention, of its relevance and of anything else that stands between its queries and its keys.

One kernel of the IR becomes two or more launches: the program of query rows (`attention_rows.py`), which hands on what
it knows of each row (the logarithm of the sum of exponentials, other sums over keys), and that of keys
(`attention_keys.py`). What is handed on has at most the size of the queries; nothing has rows and keys.
"""

from __future__ import annotations

from collections.abc import Mapping

from dlbc.backends.names import deleted
from dlbc.backends.triton.attention_keys import keys_program
from dlbc.backends.triton.attention_rows import rows_program
from dlbc.backends.triton.attention_shapes import attention_tiles, keys_shape, precision, rows_shape
from dlbc.backends.triton.attention_writer import Buffer, Program
from dlbc.backends.triton.choices import Choice, tabled
from dlbc.backends.triton.kernels import Emitted, KernelSite, launched, named
from dlbc.errors import UnsupportedOpError
from dlbc.ir.attention_tiles import Region, Unfit, region_of
from dlbc.ir.core import Attr, Op, Operand, Type, Value, Weight
from dlbc.ir.dims import Dim, product


def emit(site: KernelSite) -> Emitted:
    """The programs and their launches. UnsupportedOpError where a region cannot be computed by tiles."""
    (op,) = site.kernel.body
    assert isinstance(op, Op)
    try:
        region = region_of(op, site.scope.graph.functions)
    except Unfit as problem:
        raise UnsupportedOpError(f"attention is not computed by tiles: {problem}", where=f"#{op.place}",
                                 hint="it runs as torch ops") from problem
    return _Launches(site, op, region).emitted()


class _Launches:
    """The lines that launch the programs of one kernel."""

    def __init__(self, site: KernelSite, op: Op, region: Region) -> None:
        self.site, self.op, self.region = site, op, region
        self.sizes = _sizes(op, region)
        params = region.function.params
        given = [o for o in op.operands if o is not None]
        self.bound: dict[str, Operand] = {p.name: o for p, o in zip(params, given, strict=True)}
        self.bound |= {v.name: r for v, r in zip(region.function.results, op.results, strict=True)}
        self.handed: dict[str, str] = {}
        self.sources: list[str] = []
        self.lines = [site.empty(result) for result in op.results]
        self.choices: dict[str, Choice] = {}

    def emitted(self) -> Emitted:
        """Text and lines."""
        region, device = self.region, self.site.device
        seeds = self.site.kernel.config.get("seeds", 1)
        assert isinstance(seeds, int)
        rows = rows_program(region, seeds)
        if rows is not None:
            self.add(rows, "r", seeds)
        apart = keys_shape(region, device).apart
        for results in [[v] for v in region.key_results] if apart else [region.key_results]:
            keys = keys_program(region, seeds, results)
            if keys is not None:
                self.add(keys, "k", seeds)
        return Emitted("\n\n\n".join(self.sources), (*self.lines, *deleted(list(self.handed.values()))), self.choices)

    def add(self, program: Program, across: str, seeds: int) -> None:
        """Add a program and its launch."""
        region, device, kind = self.region, self.site.device, "rows" if across == "r" else "keys"
        exact = precision(str(self.site.options.get("precision", "ieee")), region, device)
        shape = rows_shape(region, device) if across == "r" else keys_shape(region, device)
        choice = attention_tiles(region, device, shape, across, exact)
        source, name = named(tabled(program.source, choice.table, f"KERNEL_{kind}"), "attention")
        self.sources.append(source.rstrip())
        self.choices[f"{name}_{kind}"] = choice
        self.lines += self.allocated(program)
        self.lines += self.launch(program, f"{name}_{kind}", across, seeds)

    def allocated(self, program: Program) -> list[str]:
        """Lines that allocate what one program hands to the other."""
        lines = []
        for buffer in program.buffers:
            if buffer.name in self.bound or buffer.name in self.handed:
                continue
            result = self.site.scope.names[self.op.result.name]
            name = self.handed[buffer.name] = self.site.scope.names[f"{result}.{buffer.name}"]
            shape = tuple(self.sizes[role] if role != "d" else buffer.tile.width for role in buffer.tile.roles)
            dtype = self.site.scope.dialect.dtype(buffer.tile.dtype)
            self.site.scope.device = True
            lines.append(f"{name} = torch.empty({self.site.scope.text(shape)}, dtype={dtype}, device=device)")
        return lines

    def launch(self, program: Program, name: str, across: str, seeds: int) -> list[str]:
        """The lines that launch a program."""
        scope, sizes = self.site.scope, self.sizes
        heads = self.region.heads if across == "r" else self.region.groups
        copies = product((sizes["b"], heads))
        programs = scope.text(product((copies, sizes["s"])))
        if seeds > 1:
            programs = f"{scope.text(copies)} * -(-{scope.text(sizes['s'])} // {seeds})"
        length, arguments = scope.text(sizes[across]), list[str]()
        for buffer in program.buffers:
            text = self.text(buffer)
            arguments += [text, f"*{text}.stride()"]
        arguments += [scope.text(sizes[role]) for role in "sbrk"]
        block = "BLOCK_R" if across == "r" else "BLOCK_K"
        return launched(name, length, f'blocks({length}, tile["{block}"], {programs})', arguments)

    def text(self, buffer: Buffer) -> str:
        """A tensor as the launching function calls it."""
        bound = self.bound.get(buffer.name)
        return self.handed[buffer.name] if bound is None else self.site.text(bound)


def _sizes(op: Op, region: Region) -> Mapping[str, Dim]:
    """The size of each axis, as the types outside say it."""
    found: dict[str, Dim] = {"s": 1, "b": 1, "h": region.heads}
    values = [*(o for o in op.operands if o is not None), *op.results]
    for inner, outer in zip((*region.function.params, *region.function.results), values, strict=True):
        assert isinstance(outer, Value | Weight)
        for role, dim in zip(region.tiles[inner.name].roles, outer.type.shape, strict=True):
            if role in ("s", "b"):
                found[role] = dim
    rows, keys = (op.attrs["rows"], op.attrs["keys"]) if op.name == "stream" else _attended(op)
    return {**found, "r": _dim(rows), "k": _dim(keys)}


def _attended(op: Op) -> tuple[Attr, Attr]:
    q, k = op.operands[:2]
    return _type(q).shape[2], _type(k).shape[2]


def _type(operand: Operand) -> Type:
    assert isinstance(operand, Value | Weight)
    return operand.type


def _dim(value: Attr) -> Dim:
    assert not isinstance(value, float | str | tuple | bool) and value is not None
    return value
