"""Tiles of products by measuring: `tune=True` measures those that a model needs, other compiles take what it found.

Every product chooses among a few tiles by its number of rows (`backends/triton/tiles.py`), by an estimate. Measuring
runs whole passes, in each of which all products take their first, second, ... candidate in turn, so that what else the
GPU does is the same for all. Choices are kept beside compiled explainers, by the kernel's text, the GPU and Triton's
version.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, cast

from dlbc import gpu, notes
from dlbc.backends.triton.config import device
from dlbc.backends.triton.emit import products
from dlbc.backends.triton.tiles import BOUNDS, Tile, bound_of, candidates, table
from dlbc.errors import InputError
from dlbc.ir.parser import parse_graph
from dlbc.trial import apart, numbers, quiet, tolerance
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.program import Program

log = logging.getLogger(__name__)

ROUNDS = 7
"""How often each candidate is measured."""
FLUSHED = 256 * 2**20
"""Bytes written before each measured kernel: its weights are then not in the GPU's cache, as in a model, and the GPU is
busy while it is launched."""

_TABLE = re.compile(r"^(?P<name>\w+)_tiles = (?P<table>\(\n.*?^\))\n", re.MULTILINE | re.DOTALL)
_LEGAL = {"rows": 1024, "columns": 1024, "depth": 1024, "warps": 32, "stages": 16}
"""The most that a stored number may be."""

Choices = dict[str, dict[str, Tile]]
"""The tile of a kernel (by `key_of`) for a bound ("16", ..., "None")."""


class Clock(Protocol):
    """Measures what it runs."""

    def time(self, run: Callable[[], None]) -> Callable[[], float]:
        """Run something; what it returns says later how many milliseconds that took."""


class Events:
    """A GPU's own clock."""

    def __init__(self, where: Any) -> None:
        import torch

        self.where, self.cuda = where, cast(Any, torch.cuda)
        self.flushed = torch.empty(FLUSHED, dtype=torch.int8, device=where)

    def time(self, run: Callable[[], None]) -> Callable[[], float]:
        """By events before and after, on the present stream."""
        with self.cuda.device(self.where):
            start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
            self.flushed.zero_()
            start.record()
            run()
            end.record()

        def taken() -> float:
            end.synchronize()
            return float(start.elapsed_time(end))

        return taken


def require(backend: str, choice: gpu.Choice, model: Any) -> None:
    """InputError where there is nothing to measure: `backend` was asked for, `choice` is what it means."""
    if backend not in ("auto", "triton"):
        raise InputError(f"tune=True measures kernels, and backend={backend!r} has none", where="tune",
                         hint='leave it out, or choose backend="triton"')
    if choice.why:
        raise InputError(f"tune=True measures kernels, and {choice.why}", where="tune", hint="leave it out")
    if not _on_gpu(model):
        raise InputError("tune=True measures kernels on a GPU, and the model is not on one", where="tune",
                         hint="move it to one, or leave it out: an estimate chooses tiles then")


def tuned(explainer: Explainer, model: Any) -> Explainer:
    """The explainer with the tiles that were measured on this GPU before; itself where there are none."""
    if not _on_gpu(model):
        return explainer
    facts = gpu.facts(gpu.devices_of(model)[0])
    return with_tiles(explainer, _read(_note(facts)), facts["gpu"])


def tune(explainer: Explainer, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, keep: bool = True,
         budget: int | None = None) -> Explainer:
    """The explainer with the fastest tiles for these inputs: those that were measured before, and, where some were not,
    measured now. `keep`: read and write what was measured."""
    where = gpu.devices_of(model)[0]
    facts = gpu.facts(where)
    known = _read(_note(facts)) if keep else {}
    measuring = Measuring(tested := quiet(explainer))
    expected, target = measuring.seen(args, kwargs, budget)
    wanted = [spot for spot in measuring.spots if str(spot[1]) not in known.get(measuring.keys[spot[0]], {})]
    if wanted:
        allowed = tolerance(model.parameters(), str(explainer.recipe.get("precision", "ieee")))

        def right() -> bool:
            return apart(numbers(tested, args, kwargs, target, budget)[0], expected)[0] <= allowed

        with explainer._engine.running():  # out of memory says what to lower
            clock = Events(where)
        for (name, bound), (tile, taken) in measuring.fastest(wanted, right, clock).items():
            known.setdefault(measuring.keys[name], {})[str(bound)] = tile
            log.info("%s, up to %s rows: %s, %.4f ms on %s", name, bound or "any", tile, taken, facts["gpu"])
        if keep:
            _write(_note(facts), known)
    return with_tiles(explainer, known, facts["gpu"])


Spot = tuple[str, "int | None"]
"""A kernel, and the bound of its rows."""


@dataclass
class Measuring:
    """The module of an explainer's default program while its products are measured."""

    explainer: Explainer
    spots: dict[Spot, None] = field(default_factory=dict)
    """What the inputs need, in order."""
    round: int = 0
    """Which candidates are taken."""
    clock: Clock | None = None
    failed: set[tuple[Spot, int]] = field(default_factory=set)
    readings: dict[tuple[Spot, int], list[Callable[[], float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        program = self.explainer.program_of(self.explainer.default)
        self.module: Any = self.explainer._load(self.explainer.default).module
        graph = parse_graph(program.ir["fused"])
        self.where = device(str(graph.attrs["target"]).removeprefix("triton:"))
        self.products = products(graph)
        self.keys = {name: key_of(program.source, name) for name in self.products}
        self.tables = {id(getattr(self.module, f"{name}_tiles")): name for name in self.products}
        self.found: dict[Spot, list[Tile]] = {}
        self.chosen, self.launch = self.module.chosen, self.module.launch
        self.last: tuple[Spot, int] | None = None

    def seen(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], budget: int | None) -> tuple[Any, Any]:
        """Run once as ever, and note what products are run with how many rows; the numbers, and what they explain."""
        self.module.chosen = self.choose
        try:
            return numbers(self.explainer, args, kwargs, None, budget)
        finally:
            self.module.chosen = self.chosen

    def fastest(self, wanted: Sequence[Spot], right: Callable[[], bool], clock: Clock
                ) -> dict[Spot, tuple[Tile, float]]:
        """The fastest tile of each spot that is wanted, and its milliseconds in a call. `right` runs the inputs once
        and tells whether the numbers are as before: candidates of a round that changed them are left."""
        self.found = {spot: candidates(self.where, self.products[spot[0]], spot[1]) for spot in wanted}
        self.module.chosen, self.module.launch = self.choose, self.run
        times: dict[tuple[Spot, int], list[float]] = {}
        good = []
        try:
            for number in range(max(map(len, self.found.values()))):  # compiles, and warms up
                self.round = number
                if right():
                    good.append(number)
                else:
                    log.warning("tiles number %d of %s change the numbers: they are left", number,
                                self.explainer.manifest.model)
            self.clock = clock
            for _ in range(ROUNDS):
                for number in good:
                    self.round, self.readings = number, {}
                    right()
                    for taken, readings in self.readings.items():
                        times.setdefault(taken, []).append(sum(read() for read in readings))
        finally:
            self.module.chosen, self.module.launch = self.chosen, self.launch
        best: dict[Spot, tuple[Tile, float]] = {}
        for (spot, number), each in times.items():
            middle = statistics.median(each)
            if spot not in best or middle < best[spot][1]:
                best[spot] = self.found[spot][number], middle
        return best

    def choose(self, rows_tiles: Any, rows: int) -> dict[str, Any]:
        """In place of the module's `chosen`: the candidate of this round."""
        self.last = None
        name = self.tables.get(id(rows_tiles))
        if name is None:
            return dict(self.chosen(rows_tiles, rows))
        spot = (name, bound_of(rows))
        self.spots[spot] = None
        found = self.found.get(spot)
        if found is None:
            return dict(self.chosen(rows_tiles, rows))
        number = self.round if self.round < len(found) and (spot, self.round) not in self.failed else 0
        self.last = spot, number
        return dict(ast.literal_eval(found[number].options()))

    def run(self, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        """In place of the module's `launch`: measures, and notes candidates that do not compile."""
        from dlbc_runtime.triton_launch import KernelError, run, widths

        last, self.last = self.last, None
        if last is None or not grid[0]:
            self.launch(kernel, grid, *args, **meta)
            return
        meta |= widths(kernel, args)
        try:
            if self.clock is None:
                run(kernel, grid, args, meta)
            else:
                self.readings.setdefault(last, []).append(self.clock.time(lambda: run(kernel, grid, args, meta)))
        except KernelError:
            log.info("a candidate of %s does not compile: %s", last[0], meta)
            self.failed.add(last)
            raise


# --- choices in sources, and in notes ----------------------------------------------------------------------


def key_of(source: str, name: str) -> str:
    """What tells a kernel from all others: its name, which has a hash of its text and its tiles, and a longer one."""
    start = source.index(f"def {name}(")
    text = source[start:source.index(f"\n{name}_tiles = (", start)]
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def with_tiles(explainer: Explainer, choices: Choices, where: str) -> Explainer:
    """The explainer with chosen tiles in the source of its programs, also of those that it compiles later."""
    used = _used(explainer.source, choices)
    if not used:
        return explainer
    other, build, recompile = explainer.with_options(), explainer._build, explainer._recompile
    other._programs = {variant: _changed(program, choices) for variant, program in explainer.programs.items()}
    if build is not None:
        other._build = lambda variant: _changed(build(variant), choices)
    if recompile is not None:
        other._recompile = lambda args, kwargs: with_tiles(recompile(args, kwargs), choices, where)
    said = f"tiles of {used} products were measured on {where}"
    old = explainer.recipe.get("notes")
    other._recipe["notes"] = [*(note for note in (old if isinstance(old, list) else ()) if note != said), said]
    return other


def _used(source: str, choices: Choices) -> int:
    return sum(key_of(source, found["name"]) in choices for found in _TABLE.finditer(source))


def _changed(program: Program, choices: Choices) -> Program:
    """The program with chosen tiles in the tables of its source."""
    def written(found: re.Match[str]) -> str:
        own = choices.get(key_of(program.source, found["name"]))
        if own is None:
            return found[0]
        rows = [_tile_at(found["table"], bound if at < len(BOUNDS) - 1 else None) for at, bound in enumerate(BOUNDS)]
        chosen = [own.get(str(bound if at < len(BOUNDS) - 1 else None), rows[at]) for at, bound in enumerate(BOUNDS)]
        lines = "".join(f"    ({bound}, {tile.options()}),\n" for bound, tile in table(chosen))
        return f"{found['name']}_tiles = (\n{lines})\n"

    return replace(program, source=_TABLE.sub(written, program.source))


def _tile_at(text: str, bound: int | None) -> Tile:
    """The tile that a table has for a bound."""
    rows = ast.literal_eval(text)
    own = next(tile for most, tile in rows if most is None or (bound is not None and bound <= most))
    return Tile(own["BM"], own["BN"], own["BK"], own["num_warps"], own["num_stages"])


def _note(facts: Mapping[str, str]) -> str:
    text = json.dumps([facts["gpu"], facts["triton"]])
    return f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.tiles"


def _read(name: str) -> Choices:
    """What was measured. Tiles become code, so they are five small numbers or nothing."""
    found: Choices = {}
    for key, own in notes.read(name).items():
        for bound, tile in (own.items() if isinstance(own, dict) else ()):
            if isinstance(tile, dict) and tile.keys() == _LEGAL.keys() and all(
                    type(n) is int and 1 <= n <= _LEGAL[part] for part, n in tile.items()):
                found.setdefault(key, {})[bound] = Tile(**tile)
    return found


def _write(name: str, choices: Choices) -> None:
    """Keep what was measured, and what others have in the meantime."""
    merged = _read(name)
    for key, own in choices.items():
        merged[key] = {**merged.get(key, {}), **own}
    notes.write(name, {key: {bound: {each.name: getattr(tile, each.name) for each in fields(tile)}
                             for bound, tile in own.items()} for key, own in merged.items()})


def _on_gpu(model: Any) -> bool:
    return [where.type for where in gpu.devices_of(model)] == ["cuda"]
