"""The program of an attention region that holds a tile of keys: one walk over the query rows that see them.

It reads what the program of rows handed on (the logarithm of a softmax's sum of exponentials, sums over keys) and
computes the softmax again. Its tiles of rows and keys are [BLOCK_K, BLOCK_R]: it sums over the last axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dlbc.backends.triton.attention_writer import Program, Writer, handed_tile, lse_tile
from dlbc.backends.triton.kernels import render
from dlbc.ir.attention_tiles import Kind, Region, needed
from dlbc.ir.core import Value
from dlbc.ir.ops import attr


def keys_program(region: Region, seeds: int, results: Sequence[Value] | None = None) -> Program | None:
    """The program of a tile of keys, for some of the results that it can compute, by default all; None for none."""
    return _Keys(region, seeds, region.key_results if results is None else results).program()


class _Keys(Writer):
    """Holds keys: one walk over the rows of the heads that share them."""

    def __init__(self, region: Region, seeds: int, results: Sequence[Value]) -> None:
        super().__init__(region, seeds, order="krd")
        self.results = results
        self.done: set[str] = set()

    def program(self) -> Program | None:
        region, results = self.region, self.results
        if not results:
            return None
        own = {v.name for v in region.row_results}
        wanted = [v.name for v in results]
        handed = [name for name in region.handed if region.kinds[name] is not Kind.WEIGHTS]
        handed = [name for name in handed if name in {
            v.name for each in needed(region, wanted, handed) for v in region.reads(each)}]
        before: list[str] = []
        heads: list[str] = []
        inside: list[str] = []
        after: list[str] = []
        cone = needed(region, wanted, handed)
        sums = [name for name in cone if region.kinds[name] is Kind.OVER_ROWS]
        fixed: set[str] = set()
        for name in cone:  # what has no rows stays outside the walk, and heads apart where it depends on them
            if "r" in self.tile(name).axes or name in region.late or any(
                    v.name not in fixed for v in region.reads(name)):
                continue
            if self.tile(name).heads == "query" and region.repeats > 1:
                continue
            fixed.add(name)
            self.one(name, before, before)
        for name in sums:
            tile = self.tile(name)
            before += [f"{self.new(name, seed)} = tl.full({self.shape(tile.axes, tile.width)}, 0.0, tl.float32)"
                       for seed in self.copies(name)]
        for name in handed:
            buffer = self.buffer(name, self.tile(name) if name in own else handed_tile(region, name))
            self.load(name, buffer, inside, heads)
        local = {*fixed, *handed}
        for name in cone:
            if name in local or name in region.late:
                continue
            local.add(name)
            self.one(name, inside, heads)
            self.add_ready(sums, local, inside)
        for name in sums:
            if "d" in self.tile(name).axes:
                self.padded.add(name)
        for name in cone:
            if name in region.late and name not in sums:
                self.op(name, after)
        for value in results:
            self.store(self.buffer(value.name, self.tile(value.name)),
                       [self.text(value.name, seed) for seed in self.copies(value.name)], after)
        return Program(render(
            "attention_keys", arguments=self.arguments(), groups=region.groups, repeats=region.repeats,
            before=[*self.counters(), *before], bounds=self.bounds(), heads=heads, inside=inside, after=after,
            summary="A tile of keys, over all tiles of query rows that see it."), tuple(self.buffers.values()))

    def bounds(self) -> list[str]:
        softmax = self.region.softmaxes[0]
        causal, window = attr(softmax, "causal"), attr(softmax, "window")
        first = "tl.maximum(first_k + ROWS - KEYS, 0) // BLOCK_R * BLOCK_R" if causal else "0"
        last = ("ROWS" if window is None else
                f"tl.maximum(tl.minimum(ROWS, first_k + BLOCK_K + ROWS - KEYS + {int(str(window)) - 1}), 0)")
        return [f"low = {first}", f"high = {last}"]

    def one(self, name: str, lines: list[str], addresses: list[str]) -> None:
        """A parameter, or an op of a tile."""
        region = self.region
        if name not in region.definitions:
            self.given(name, lines, addresses)
        elif region.kinds[name] is Kind.WEIGHTS:
            buffer = self.buffer(f"{name}.lse", lse_tile(region, name))
            scores = self.scores(region.definitions[name], lines)
            for seed, score in zip(self.copies(name), scores, strict=True):
                address, lse = self.address(buffer, seed, addresses), self.names[f"{name} lse {seed}"]
                lines += [f"{lse} = tl.load({address}{self.offsets(buffer)}, mask=in_r, other=float(\"inf\"))",
                          f"{self.new(name, seed)} = tl.exp({score} - {lse}[None, :])"]
        else:
            self.op(name, lines)

    def add_ready(self, sums: Sequence[str], local: Iterable[str], lines: list[str]) -> None:
        """Add to the sums over rows whose terms are known."""
        for name in sums:
            if name in self.done or not {v.name for v in self.region.reads(name)} <= set(local):
                continue
            self.done.add(name)
            op = self.region.definitions[name]
            for seed in self.copies(name):
                target = self.text(name, seed)
                if op.name == "matmul":
                    total = self.product(op.operands[0], op.operands[1], seed, "r", lines, target)
                    lines.append(f"{target} = {total}")
                else:
                    source = op.operands[0]
                    assert isinstance(source, Value)
                    text = f"tl.where(in_r[None, :], {self.wide(source.name, seed)}, 0.0)"
                    lines.append(f"{target} += tl.sum({text}, axis=1)")
