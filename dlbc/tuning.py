"""Tiles by measuring: `tune=True` measures those of the kernels that a model needs, other compiles take what it found.

Every kernel chooses its tile by a size from a table that an estimate wrote (`backends/triton/choices.py`). Measuring
runs whole passes, in each of which all kernels take their first, second, ... candidate in turn, so that what else the
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
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from dlbc import gpu, notes
from dlbc.backends.triton.choices import Options, at, bound_of, bounds, legal, lines, measured, table
from dlbc.backends.triton.emit import choices
from dlbc.errors import InputError
from dlbc.ir.parser import parse_graph
from dlbc.trial import apart, numbers, quiet, tolerance
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.program import Program

log = logging.getLogger(__name__)

ROUNDS = 7
"""How often each candidate is measured."""
FLUSHED = 256 * 2**20
"""Bytes written before each measured kernel: what it reads is then not in the GPU's cache, and the GPU is busy while it
is launched."""
COLD = ("gemm", "grouped")
"""Kinds of kernels of which most of what they read, weights, is not in the cache in a model either. What others read
has just been written."""

_TABLE = re.compile(r"^(?P<name>\w+)_tiles = (?P<table>\(\n.*?^\))\n", re.MULTILINE | re.DOTALL)

Choices = dict[str, dict[str, Options]]
"""What is measured of the tile of a kernel (by `key_of`) for a bound ("16", ..., "None")."""


class Clock(Protocol):
    """Measures what it runs."""

    def time(self, run: Callable[[], None], *, cold: bool) -> Callable[[], float]:
        """Run something; what it returns says later how many milliseconds that took. `cold`: while what it reads is not
        in the cache."""


class Events:
    """A GPU's own clock."""

    def __init__(self, where: Any) -> None:
        import torch

        self.where, self.cuda = where, cast(Any, torch.cuda)
        self.flushed = torch.empty(FLUSHED, dtype=torch.int8, device=where)

    def time(self, run: Callable[[], None], *, cold: bool) -> Callable[[], float]:
        """By events before and after, on the present stream. What is not `cold` runs once before: kernels write the
        same again."""
        with self.cuda.device(self.where):
            start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
            self.flushed.zero_()
            if not cold:
                run()
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
            known.setdefault(measuring.keys[name], {})[str(bound)] = measured(name, tile)
            log.info("%s, up to %s: %s, %.4f ms on %s", name, bound or "any", tile, taken, facts["gpu"])
        if keep:
            _write(_note(facts), known)
    return with_tiles(explainer, known, facts["gpu"])


Spot = tuple[str, "int | None"]
"""A kernel, and the bound of its size."""


@dataclass
class Measuring:
    """The module of an explainer's default program while its kernels are measured."""

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
        self.choices = choices(graph)
        self.keys = {name: key_of(program.source, name) for name in self.choices}
        self.tables = {id(getattr(self.module, f"{name}_tiles")): name for name in self.choices}
        self.found: dict[Spot, list[Options]] = {}
        self.only: set[Spot] | None = None
        self.chosen, self.launch = self.module.chosen, self.module.launch
        self.last: tuple[Spot, int] | None = None

    def seen(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], budget: int | None) -> tuple[Any, Any]:
        """Run once as ever, and note what kernels are run for what sizes; the numbers, and what they explain."""
        self.module.chosen = self.choose
        try:
            return numbers(self.explainer, args, kwargs, None, budget)
        finally:
            self.module.chosen = self.chosen

    def fastest(self, wanted: Sequence[Spot], right: Callable[[], bool], clock: Clock
                ) -> dict[Spot, tuple[Options, float]]:
        """The fastest tile of each spot that is wanted, and its milliseconds in a call. `right` runs the inputs once
        and tells whether the numbers are as before: candidates that changed them are left."""
        self.found = {spot: self.choices[spot[0]].candidates(spot[1]) for spot in wanted}
        self.module.chosen, self.module.launch = self.choose, self.run
        times: dict[tuple[Spot, int], list[float]] = {}
        good = []
        try:
            for number in range(max(map(len, self.found.values()))):  # compiles, and warms up
                self.round = number
                if self.tried(number, right):
                    good.append(number)
            self.clock = clock
            for _ in range(ROUNDS):
                for number in good:
                    self.round, self.readings = number, {}
                    right()
                    for taken, readings in self.readings.items():
                        times.setdefault(taken, []).append(sum(read() for read in readings))
        finally:
            self.module.chosen, self.module.launch = self.chosen, self.launch
        best: dict[Spot, tuple[Options, float]] = {}
        for (spot, number), each in times.items():
            middle = statistics.median(each)
            if spot not in best or middle < best[spot][1]:
                best[spot] = self.found[spot][number], middle
        return best

    def tried(self, number: int, right: Callable[[], bool]) -> bool:
        """Whether the numbers are right with the candidates of a round, but for those that change them alone: these are
        left."""
        if self.compiled(right):
            return True
        wrong = self.wrong([spot for spot, found in self.found.items() if number < len(found)], right)
        self.only = None
        self.failed |= {(spot, number) for spot in wrong}
        names = ", ".join(sorted({name for name, _ in wrong})) or "all kernels"
        log.warning("tiles number %d of %s (%s) change the numbers: they are left", number, names,
                    self.explainer.manifest.model)
        return bool(wrong) and self.compiled(right)

    def wrong(self, spots: list[Spot], right: Callable[[], bool]) -> list[Spot]:
        """Those of which the candidates of this round change the numbers, found by halves."""
        self.only = set(spots)
        if not spots or self.compiled(right):
            return []
        half = len(spots) // 2
        return spots if not half else [*self.wrong(spots[:half], right), *self.wrong(spots[half:], right)]

    def compiled(self, right: Callable[[], bool]) -> bool:
        """Whether the numbers are right, when all has run: ops in place of a kernel that does not compile hide what
        else is launched for them."""
        while True:
            failed = len(self.failed)
            found = right()
            if len(self.failed) == failed:
                return found

    def choose(self, tiles: Any, size: int) -> dict[str, Any]:
        """In place of the module's `chosen`: the candidate of this round."""
        self.last = None
        name = self.tables.get(id(tiles))
        if name is None:
            return dict(self.chosen(tiles, size))
        spot = (name, bound_of(size))
        self.spots[spot] = None
        found = self.found.get(spot)
        if found is None:
            return dict(self.chosen(tiles, size))
        taken = self.round < len(found) and (spot, self.round) not in self.failed
        number = self.round if taken and (self.only is None or spot in self.only) else 0
        self.last = spot, number
        return dict(found[number])

    def run(self, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        """In place of the module's `launch`: measures, and notes candidates that do not compile."""
        from dlbc_runtime.errors import KernelError
        from dlbc_runtime.triton_launch import run, widths

        last, self.last = self.last, None
        if last is None or not grid[0]:
            self.launch(kernel, grid, *args, **meta)
            return
        meta |= widths(kernel, args)
        try:
            if self.clock is None:
                run(kernel, grid, args, meta)
            else:
                taken = self.clock.time(lambda: run(kernel, grid, args, meta), cold=last[0][0].startswith(COLD))
                self.readings.setdefault(last, []).append(taken)
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
    said = f"tiles of {used} kernels were measured on {where}"
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
        rows = ast.literal_eval(found["table"])
        chosen = table([{**at(rows, bound), **own.get(str(bound), {})} for bound in bounds()])
        return f"{found['name']}_tiles = (\n{lines(chosen)})\n"

    return replace(program, source=_TABLE.sub(written, program.source))


def _note(facts: Mapping[str, str]) -> str:
    text = json.dumps([facts["gpu"], facts["triton"]])
    return f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.tiles"


def _read(name: str) -> Choices:
    """What was measured. Tiles become code, so they are small numbers that are legal for the kernel, or nothing."""
    found: Choices = {}
    for key, own in notes.read(name).items():
        for bound, tile in (own.items() if isinstance(own, dict) else ()):
            if legal(key, tile):
                found.setdefault(key, {})[bound] = tile
    return found


def _write(name: str, choices: Choices) -> None:
    """Keep what was measured, and what others have in the meantime."""
    merged = _read(name)
    for key, own in choices.items():
        merged[key] = {**merged.get(key, {}), **own}
    notes.write(name, merged)


def _on_gpu(model: Any) -> bool:
    return [where.type for where in gpu.devices_of(model)] == ["cuda"]
