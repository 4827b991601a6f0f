"""The program of an attention region that holds a tile of query rows: sweeps over the tiles of keys that they see.

A sum over keys is complete after the sweep that its stage says (`ir/attention_tiles.py`). Sums that are linear in a
softmax are taken in the sweep that finds the softmax's own sum, scaled to the largest score so far (Milakov and
Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dlbc.backends.triton.attention_writer import REDUCTIONS, Program, Writer, handed_tile, lse_tile
from dlbc.backends.triton.kernels import render
from dlbc.ir.attention_tiles import Kind, Region, needed
from dlbc.ir.core import Value
from dlbc.ir.ops import attr


def rows_program(region: Region, seeds: int) -> Program | None:
    """The program of a tile of rows; None where there is nothing for it to do."""
    return _Rows(region, seeds).program()


class _Rows(Writer):
    """Holds rows: as many sweeps over the keys as its sums over keys need."""

    def __init__(self, region: Region, seeds: int) -> None:
        super().__init__(region, seeds, order="rkd")
        self.known: set[str] = set()
        self.done: set[str] = set()

    def program(self) -> Program | None:
        region = self.region
        handed = region.handed
        wanted = list(dict.fromkeys([*(v.name for v in region.row_results), *handed]))
        if not wanted:
            return None
        cone = needed(region, wanted, ())
        order = [name for name in cone if self.is_sum(name)]
        sweeps = []
        for sweep in range(max((region.sweep(name) for name in order), default=-1) + 1):
            sweeps.append(self.sweep_of([name for name in order if region.sweep(name) == sweep]))
        after: list[str] = []
        for value in region.row_results:
            self.outer(value.name, after)
            self.store(self.buffer(value.name, self.tile(value.name)), self.stored(value.name), after)
        for name in handed:
            if region.kinds[name] is Kind.WEIGHTS:
                buffer = self.buffer(f"{name}.lse", lse_tile(region, name))
                self.store(buffer, [self.names[f"{name} lse {s}"] for s in self.copies(name)], after)
            elif name not in {v.name for v in region.row_results}:
                self.outer(name, after)
                self.store(self.buffer(name, handed_tile(region, name)), self.stored(name), after)
        return Program(render(
            "attention_rows", arguments=self.arguments(), heads=region.heads, repeats=region.repeats,
            before=self.counters(), bounds=self.bounds(), sweeps=sweeps, after=after,
            summary="A tile of query rows, over all tiles of keys that it sees."), tuple(self.buffers.values()))

    def stored(self, name: str) -> list[str]:
        return [self.text(name, seed) for seed in self.copies(name)]

    def is_sum(self, name: str) -> bool:
        return self.region.kinds[name] in (Kind.WEIGHTS, Kind.OVER_KEYS)

    def bounds(self) -> list[str]:
        softmax = self.region.softmaxes[0]
        causal, window = attr(softmax, "causal"), attr(softmax, "window")
        last = "tl.maximum(tl.minimum(KEYS, first_r + BLOCK_R + KEYS - ROWS), 0)" if causal else "KEYS"
        first = ("0" if window is None else
                 f"tl.maximum(first_r + KEYS - ROWS - {int(str(window)) - 1}, 0) // BLOCK_K * BLOCK_K")
        return [f"low = {first}", f"high = {last}"]

    def outer(self, name: str, lines: list[str]) -> None:
        """Write what a value without keys needs, outside the loop."""
        for each in needed(self.region, [name], self.known):
            self.known.add(each)
            if each not in self.region.definitions:
                self.given(each, lines, lines)
            else:
                self.op(each, lines)

    def sweep_of(self, sums: Sequence[str]) -> dict[str, list[str]]:
        """One walk over the keys: the lines before, inside and after the loop."""
        region = self.region
        before: list[str] = []
        inside: list[str] = []
        after: list[str] = []
        softmaxes = [name for name in sums if region.kinds[name] is Kind.WEIGHTS]
        products = [name for name in sums if region.kinds[name] is Kind.OVER_KEYS]
        operands = [v.name for name in sums for v in region.reads(name)]
        inner = needed(region, operands, self.known)
        inner = list(dict.fromkeys([*inner, *softmaxes]))
        order = [*(p.name for p in region.function.params), *region.definitions]
        inner.sort(key=order.index)
        for name in inner:  # what has no keys stays outside
            if "k" not in self.tile(name).axes:
                self.outer(name, before)
        for name in softmaxes:
            for seed in self.copies(name):
                self.start(name, seed, before)
        for name in products:
            fill = {"amax": 'float("-inf")', "amin": 'float("inf")'}.get(region.definitions[name].name, "0.0")
            tile = self.tile(name)
            before += [f"{self.new(name, seed)} = tl.full({self.shape(tile.axes, tile.width)}, {fill}, tl.float32)"
                       for seed in self.copies(name)]
        local = set(self.known)
        self.products.clear()
        for name in inner:
            if name in local:
                continue
            local.add(name)
            if name not in region.definitions:
                self.given(name, inside, before)
            elif region.kinds[name] is Kind.WEIGHTS:
                self.softmax(name, inside, [p for p in products if region.online.get(p) == name], name in softmaxes)
            else:
                self.op(name, inside)
            for product in products:
                self.accumulate_if_ready(product, local, inside)
        for name in softmaxes:
            self.finish(name, [p for p in products if region.online.get(p) == name], after)
        for name in products:
            self.known.add(name)
            tile = self.tile(name)
            if "d" in tile.axes:
                self.padded.add(name)
        self.done.clear()
        return {"before": before, "inside": inside, "after": after}

    def accumulate_if_ready(self, name: str, local: Iterable[str], lines: list[str]) -> None:
        """Add to a sum over keys as soon as what it sums is known: tiles live as short as can be."""
        if name in self.done or not {v.name for v in self.region.reads(name)} <= set(local):
            return
        self.done.add(name)
        op = self.region.definitions[name]
        for seed in self.copies(name):
            target = self.text(name, seed)
            if op.name == "matmul":
                lines.append(f"{target} = {self.product(op.operands[0], op.operands[1], seed, 'k', lines, target)}")
                continue
            source = op.operands[0]
            assert isinstance(source, Value)
            text = self.wide(source.name, seed)
            if op.name == "sum":
                if not self.hidden(source.name):
                    text = f"tl.where({self.expanded('in_k', 'k', 'rk')}, {text}, 0.0)"
                lines.append(f"{target} += tl.sum({text}, axis=1)")
            else:
                fill, join = (('float("-inf")', "tl.maximum") if op.name == "amax" else
                              ('float("inf")', "tl.minimum"))
                text = f"tl.where({self.expanded('in_k', 'k', 'rk')}, {text}, {fill})"
                lines.append(f"{target} = {join}({target}, {REDUCTIONS[op.name]}({text}, axis=1))")

    def start(self, name: str, seed: int, lines: list[str]) -> None:
        """The maximum and the sum of exponentials before any key: of a sink alone, or of nothing."""
        top, total = self.names[f"{name} max {seed}"], self.names[f"{name} total {seed}"]
        lines.append(f"{top} = tl.full((BLOCK_R,), float(\"-inf\"), tl.float32)")
        sinks = self.region.definitions[name].operands[3:]
        if not sinks:
            lines.append(f"{total} = tl.full((BLOCK_R,), 0.0, tl.float32)")
            return
        assert isinstance(sinks[0], Value)
        lines += [f"{top} = tl.maximum({top}, {self.wide(sinks[0].name, seed)})",
                  f"{total} = tl.where({top} == float(\"-inf\"), 0.0, 1.0)"]

    def softmax(self, name: str, lines: list[str], online: Sequence[str], running: bool) -> None:
        """A tile of a softmax. While its sum is `running` it is not divided by it, and what was summed before is scaled
        to the maximum so far."""
        scores = self.scores(self.region.definitions[name], lines)
        for seed, score in zip(self.copies(name), scores, strict=True):
            target = self.new(name, seed)
            if not running:
                lines.append(f"{target} = tl.exp({score} - {self.names[f'{name} lse {seed}']}[:, None])")
                continue
            top, total = self.names[f"{name} max {seed}"], self.names[f"{name} total {seed}"]
            higher, shrink = self.names[f"{name} higher {seed}"], self.names[f"{name} shrink {seed}"]
            before = self.names[f"{name} before {seed}"]
            lines += [f"{before} = {top}",
                      f"{top} = tl.maximum({top}, tl.max({score}, axis=1))",
                      f"{higher} = tl.where({top} == float(\"-inf\"), 0.0, {top})",
                      f"{shrink} = tl.exp({before} - {higher})",
                      f"{target} = tl.exp({score} - {higher}[:, None])",
                      f"{total} = {total} * {shrink} + tl.sum({target}, axis=1)"]
        for product in online:
            for seed in self.copies(product):
                text, shrink = self.text(product, seed), self.shrink(name, seed)
                axes = self.sorted(self.tile(product).axes)
                lines.append(f"{text} *= {self.expanded(shrink, 'r', axes)}")

    def shrink(self, name: str, seed: int) -> str:
        return self.names[f"{name} shrink {seed if self.tile(name).seeds else 0}"]

    def finish(self, name: str, online: Sequence[str], lines: list[str]) -> None:
        """After the loop: the logarithm of the sum of exponentials, and what was summed divided by it."""
        for seed in self.copies(name):
            top, total = self.names[f"{name} max {seed}"], self.names[f"{name} total {seed}"]
            lse, part = self.names[f"{name} lse {seed}"], self.names[f"{name} part {seed}"]
            lines += [f"{lse} = tl.where({total} > 0.0, {top} + tl.log({total}), float(\"inf\"))",
                      f"{part} = tl.where({total} > 0.0, 1.0 / {total}, 0.0)"]
        for product in online:
            for seed in self.copies(product):
                part = self.names[f"{name} part {seed if self.tile(name).seeds else 0}"]
                axes = self.sorted(self.tile(product).axes)
                lines.append(f"{self.text(product, seed)} *= {self.expanded(part, 'r', axes)}")
