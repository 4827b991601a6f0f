"""A call within a memory budget: how many rows and targets are in work at a time, and the parts put together.

Rows of a batch that do not depend on each other are explained in parts, each with its own forward pass: nothing is
computed twice. Targets share a forward pass; in parts, relevance is carried for some at a time, and what it takes of
the forward pass is kept, while what it computes of that alone is computed for each part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dlbc_runtime.arrays import Array, Arrays, as_numpy
from dlbc_runtime.errors import ArtifactError, InputError
from dlbc_runtime.experts import Experts
from dlbc_runtime.explained import Explained
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.ledger import Ledger
from dlbc_runtime.memory import Memory, Plan, as_text, memory_of
from dlbc_runtime.program import Manifest, Variant
from dlbc_runtime.target import RIVALS, Target

if TYPE_CHECKING:
    from dlbc_runtime.call import Call


ARRAYS = 4, 5
"""The share of a budget that planned arrays may take; the rest is for the allocator's slack, which is of that order."""


@dataclass(frozen=True)
class Work:
    """Which program runs, and on how many rows and targets at a time."""

    variant: Variant
    rows: int
    targets: int
    peak: int = 0


@dataclass(frozen=True)
class Size:
    """The size of a call: every named size, the name of the batch ("" where it stays whole), the targets."""

    sizes: Mapping[str, int]
    batch: str
    targets: int
    streams: int = 1

    @property
    def rows(self) -> int:
        """Rows that could be explained apart: 1 where they cannot."""
        return self.sizes[self.batch] if self.batch else 1

    def part(self, rows: int, targets: int) -> dict[str, int]:
        """The sizes of a part of the call."""
        return {**self.sizes, **({self.batch: rows} if self.batch else {}), "S": targets * self.streams}

    def peak(self, plan: Plan, rows: int, targets: int) -> int:
        """The bytes that a call in such parts takes: those of one part, inputs and results being there whole."""
        part, whole = self.part(rows, targets), self.part(self.rows, self.targets)
        held = plan.peak(part, state_kept=targets < self.targets)
        if part == whole:
            return held
        return held + plan.kept(whole) - plan.kept(part)


def run_within(call: Call, budget: int) -> Explanation:
    """The explanation of a call, made in parts where it would take more than the budget. InputError before any work
    where the smallest parts take more."""
    load = call.explainer.program_of
    work = divided(load, call.variant, size_of(load(call.variant).manifest, call), budget)
    call = replace(call, variant=work.variant, at_a_time=work.targets)
    size = size_of(load(work.variant).manifest, call)
    if work.rows >= size.rows:
        return call.run()
    calls = [_of_rows(call, size.batch, slice(first, first + work.rows)) for first in range(0, size.rows, work.rows)]
    return _in_parts(call, calls, work.rows, size.rows)


def plan_within(load: Callable[[Variant], Any], variant: Variant, size: Size, budget: int | None) -> Memory:
    """What `explainer.memory` shows."""
    work = Work(variant, size.rows, size.targets) if budget is None else divided(load, variant, size, budget)
    manifest = load(work.variant).manifest
    first = next(spec.shape for spec in manifest.inputs.tensors if spec.name == manifest.explained[0])[0]
    rows = work.rows if size.batch else first if isinstance(first, int) else size.sizes[first]
    return memory_of(manifest.memory, size.part(work.rows, work.targets), state_kept=work.targets < size.targets,
                     model=manifest.model, rows=rows, targets=work.targets,
                     checkpoint=work.variant.checkpoint, budget=budget)


def divided(load: Callable[[Variant], Any], variant: Variant, size: Size, budget: int) -> Work:
    """The parts that fit into a budget with the least computed twice: rows first, then targets or a program that
    computes forward values again, whichever is cheaper. InputError where nothing fits."""
    found: list[tuple[int, Work]] = []
    least: list[int] = []
    room = budget * ARRAYS[0] // ARRAYS[1]
    for one in dict.fromkeys((variant, replace(variant, checkpoint=True))):
        try:
            plan = load(one).manifest.memory
        except ArtifactError:  # loaded without the compiler
            continue
        rows, targets = _largest(plan, size, room)
        if targets:
            parts = -(-size.targets // targets)
            again = parts - 1 + (parts if one.checkpoint else 0)  # in forward passes, about
            found.append((again, Work(one, rows, targets, size.peak(plan, rows, targets))))
            if again == 0:
                break
        least.append(size.peak(plan, 1, 1))
    if not found:
        needed = -(-min(least) * ARRAYS[1] // ARRAYS[0])
        how = "row by row and target by target" if size.batch else "target by target"
        raise InputError(f"memory_budget is {as_text(budget)}, and these inputs take {as_text(needed)} even {how}",
                         where="memory_budget",
                         hint=f"give at least {needed} bytes, or shorter or smaller inputs; explainer.memory() "
                              "shows what takes them")
    return min(found, key=lambda each: each[0])[1]


def size_of(manifest: Manifest, call: Call) -> Size:
    """The size of a call."""
    arguments, _ = call.with_positions(manifest)
    sizes = named_sizes(manifest, call.inputs)
    if manifest.positions:
        sizes["P"] = int(arguments[-1].shape[1])
    if manifest.sparse:
        sizes["K"] = sum(_width(target, manifest) for target in call.targets)
    apart = manifest.batch if call.reference is None and not manifest.nodes else ""
    return Size(sizes, apart, len(call.targets), manifest.streams)


def size_by_name(manifest: Manifest, sizes: Mapping[str, int], targets: Sequence[Target]) -> Size:
    """The size of a call on inputs of these sizes. InputError for a name that is none."""
    known = [str(name) for spec in manifest.inputs.tensors for name in spec.shape if isinstance(name, str)
             and name.isidentifier()]
    for name, size in sizes.items():
        if name not in known or not isinstance(size, int) or size < 1:
            raise InputError(f"size {name!r} = {size!r}", where="sizes",
                             hint=f"the sizes of this model are {', '.join(dict.fromkeys(known)) or 'fixed'}")
    whole = {**dict.fromkeys(known, 1), **sizes, "P": len({str(t.position) for t in targets}),
             "K": sum(_width(target, manifest) for target in targets)}
    return Size(whole, "" if manifest.nodes or manifest.reference else manifest.batch, len(targets), manifest.streams)


def planned(manifest: Manifest, arguments: Sequence[Any]) -> int:
    """The bytes that a call for one target is planned to take, by the arguments of the forward pass."""
    names = manifest.inputs.names
    sizes = {"S": manifest.streams, "K": 1, **named_sizes(manifest, dict(zip(names, arguments, strict=False)))}
    if manifest.positions:
        sizes["P"] = int(arguments[-1].shape[1])
    return manifest.memory.peak(sizes)


def named_sizes(manifest: Manifest, inputs: Mapping[str, Any]) -> dict[str, int]:
    """The named sizes of inputs."""
    return {str(name): int(size) for spec in manifest.inputs.tensors
            for name, size in zip(spec.shape, inputs[spec.name].shape, strict=True)
            if isinstance(name, str) and name.isidentifier()}


def carried(relevance: Callable[..., tuple[Any, ...]], state: list[Any], seeds: Sequence[Array],
            others: Sequence[Any], array: Callable[[Array], Any], *, streams: int, at_a_time: int
            ) -> Iterator[tuple[Array, tuple[Any, ...]]]:
    """Relevance of some targets after the other, and which seeds those are; the last ones empty the state.

    Seeds of several streams hold those of all targets once for each stream, and a target's belong together.
    """
    count = len(seeds[0]) // streams
    rest = [array(each) for each in seeds[1:]]
    if not at_a_time or at_a_time >= count:
        yield np.arange(len(seeds[0])), relevance(state, array(seeds[0]), *rest, *others)
        return
    for first in range(0, count, at_a_time):
        targets = np.arange(first, min(first + at_a_time, count))
        own = state if targets[-1] == count - 1 else list(state)
        which = (np.arange(streams)[:, None] * count + targets).ravel()
        yield which, relevance(own, array(seeds[0][which]), *rest, *others)


def together(pieces: Iterator[tuple[Array, tuple[Any, ...]]], count: int) -> tuple[Any, ...]:
    """Relevance of all seeds [S, ...]; what is in one piece stays as it is."""
    whole: list[Array] = []
    for which, found in pieces:
        if len(which) == count:
            return found
        arrays = [as_numpy(value) for value in found]
        whole = whole or [np.empty((count, *array.shape[1:]), array.dtype) for array in arrays]
        for target, array in zip(whole, arrays, strict=True):
            target[which] = array
    return tuple(whole)


def _largest(plan: Plan, size: Size, budget: int) -> tuple[int, int]:
    """The largest parts that fit: rows, and targets (0: none)."""
    rows = _most(size.rows, lambda n: size.peak(plan, n, size.targets) <= budget)
    if rows:
        return _even(size.rows, rows), size.targets
    targets = _most(size.targets, lambda n: size.peak(plan, 1, n) <= budget)
    return 1, _even(size.targets, targets) if targets else 0


def _most(count: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `count` that fits; 0 where 1 does not."""
    low, high = 0, count + 1
    while high - low > 1:
        middle = high - 1 if low == 0 and high == count + 1 else (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _even(count: int, most: int) -> int:
    """Parts of nearly the same size, none above `most`."""
    return -(-count // -(-count // most))


def _width(target: Target, manifest: Manifest) -> int:
    """How many numbers of the output a target may seed."""
    if target.kind == "labels" or (target.kind == "regression" and target.chosen is None):
        shape = next(spec.shape for spec in manifest.outputs.tensors if spec.name == manifest.output)
        return shape[-1] if isinstance(shape[-1], int) else 1
    return {"difference": 2, "probability": RIVALS + 1}.get(target.kind, 1)


def _of_rows(call: Call, batch: str, rows: slice) -> Call:
    """The call for some rows of its inputs."""
    manifest = call.explainer.program_of(call.variant).manifest
    own = {spec.name for spec in manifest.inputs.tensors if spec.shape and spec.shape[0] == batch}
    rank = len(next(spec.shape for spec in manifest.outputs.tensors if spec.name == manifest.output))
    count = named_sizes(manifest, call.inputs)[batch]
    return replace(call, inputs={name: value[rows] if name in own else value for name, value in call.inputs.items()},
                   targets=tuple(target.of_rows(rows, count, rank) for target in call.targets))


def _in_parts(call: Call, calls: Sequence[Call], rows: int, count: int) -> Explanation:
    """One explanation of the explanations of its rows; each goes to its place before the next is made."""
    groups = {"outputs": 0, **dict.fromkeys(("relevance", "positive", "negative"), int(call.many))}
    whole: dict[str, dict[str, Array]] = {group: {} for group in groups}
    targets: list[Explained] = []
    seconds: dict[str, float] = {}
    experts: list[Experts] = []
    for number, part in enumerate(calls):
        found, own = part.run(), slice(number * rows, min((number + 1) * rows, count))
        for group, axis in groups.items():
            for name, array in getattr(found, group).items():
                shape = (*array.shape[:axis], count, *array.shape[axis + 1:])
                into = whole[group].setdefault(name, np.empty(shape, array.dtype))
                into[(slice(None),) * axis + (own,)] = array
        targets += [replace(one, row=one.row + own.start) for one in found.target]
        experts += [] if found.experts is None else [found.experts]
        for stage, time in found.method.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + time

    def ledger() -> Ledger:
        totals = [part.totals() for part in calls]
        return calls[0].ledger_from([sum(each) for each in zip(*totals, strict=True)])

    return replace(found, inputs=Arrays(call.inputs), ledger_source=ledger,
                   target=tuple(sorted(targets, key=lambda one: (one.seed, one.row))),
                   experts=Experts.joined(experts, "rows") if experts else None,
                   method=replace(found.method, seconds=seconds), outputs=Arrays(whole["outputs"]),
                   relevance=Arrays(whole["relevance"]), positive=Arrays(whole["positive"]),
                   negative=Arrays(whole["negative"]))
