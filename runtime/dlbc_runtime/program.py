"""A compiled program: the generated module of one variant of an explanation, and all that is known about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from types import ModuleType
from typing import Any, Self

from dlbc_runtime.bounds import Bounds
from dlbc_runtime.expert_layer import ExpertSpec
from dlbc_runtime.memory import Plan
from dlbc_runtime.module import load_module
from dlbc_runtime.signature import InputSpec, OutputSpec
from dlbc_runtime.work import WorkRow


@dataclass(frozen=True)
class Variant:
    """What distinguishes the programs of one explainer: what is kept besides the inputs, the ledger, the output
    that is explained, whether all positions of a sequence output are computed, whether seeds weight the
    whole output (`dense`) where it is wide enough for a few chosen targets to be cheaper, and whether forward values
    are computed again where relevance needs them (`checkpoint`), which takes less memory and more time."""

    keep: str = "inputs"
    ledger: bool = False
    output: str = ""
    all_positions: bool = False
    dense: bool = False
    checkpoint: bool = False

    @property
    def name(self) -> str:
        """A name for files: `default`, or what differs from it."""
        parts = [self.keep if self.keep != "inputs" else "", "ledger" if self.ledger else "", self.output,
                 "all_positions" if self.all_positions else "", "dense" if self.dense else "",
                 "checkpoint" if self.checkpoint else ""]
        return "-".join(p.replace("*", "_").replace("/", "_") for p in parts if p) or "default"


@dataclass(frozen=True)
class WeightSpec:
    """A tensor the program reads: its name, element type and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RuleRow:
    """Which rule explains which place: a line of `explainer.rules()`."""

    place: str
    op: str
    rule: str


class Rules(tuple[RuleRow, ...]):
    """The lines of `explainer.rules()`, from the output back; printed as a table.

    `composite` is the name of the rules, `reason` why they were chosen (of `auto`; else empty).
    """

    composite: str
    reason: str

    def __new__(cls, rows: Iterable[RuleRow], composite: str = "", reason: str = "") -> Self:
        """Rows with what is said of all of them."""
        found = super().__new__(cls, rows)
        found.composite, found.reason = composite, reason
        return found

    def __str__(self) -> str:
        """The name, the reason, and one line for each place; equal lines in a row are counted."""
        place, op = (max((len(getattr(row, name)) for row in self), default=0) for name in ("place", "op"))
        lines = [f"{row.place:<{place}}  {row.op:<{op}}  {row.rule}".rstrip() for row in self]
        counted = [(line, len(list(group))) for line, group in groupby(lines)]
        return "\n".join([self.composite + (f": {self.reason}" if self.reason else ""),
                          *(f"  {line}" + (f"  x{count}" if count > 1 else "") for line, count in counted)])


@dataclass(frozen=True)
class Manifest:
    """Everything about a program but its code. Plain data: `to_json` and `from_json` are inverse."""

    model: str
    backend: str
    composite: str
    inputs: InputSpec
    outputs: OutputSpec
    weights: tuple[WeightSpec, ...]
    prepared_from: tuple[str, ...]
    explained: tuple[str, ...]
    output: str
    before: str
    nodes: tuple[str, ...]
    sequence: str
    positions: bool
    sparse: bool
    seed: str
    contrast: str
    reason: str
    ledger: tuple[tuple[str, ...], ...]
    rules: tuple[RuleRow, ...]
    static: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    streams: int = 1
    """How many relevances the seed dimension holds: 2 for contrastive rules, that of the target and of its rivals."""
    reference: str = ""
    """Of rules on differences to a reference: how it is run, as one "row" for all or as "rows", one for each."""
    references: tuple[bool, ...] = ()
    """Of the activations at the reference that relevance takes, in order: whether axis 0 is the batch."""
    bounds: tuple[Bounds, ...] = ()
    """What `zbox` rules assume of inputs."""
    memory: Plan = field(default_factory=Plan)
    """What is held at which step."""
    batch: str = ""
    """The size whose rows do not depend on each other, axis 0 of what is explained; "" where that is not sure."""
    causal: str = ""
    """The size of the sequence where no position knows a later one; "" where that is not sure."""
    work: tuple[WorkRow, ...] = ()
    """What runs where, of backends that write kernels; else everything is the array library's."""
    experts: tuple[ExpertSpec, ...] = ()
    """The layers of experts whose ids, weights and relevance are returned, in order."""
    pad: int = 0
    """The token id that rows of token ids are padded by."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        return {
            **{name: getattr(self, name) for name in (
                "model", "backend", "composite", "output", "before", "sequence", "seed", "contrast", "reason",
                "reference")},
            "inputs": self.inputs.to_json(), "outputs": self.outputs.to_json(),
            "positions": self.positions, "sparse": self.sparse, "streams": self.streams,
            "references": list(self.references), "bounds": [one.to_json() for one in self.bounds],
            "weights": [[w.name, w.dtype, list(w.shape)] for w in self.weights],
            "prepared_from": list(self.prepared_from), "explained": list(self.explained), "nodes": list(self.nodes),
            "ledger": [list(entry) for entry in self.ledger],
            "rules": [[r.place, r.op, r.rule] for r in self.rules],
            "static": dict(self.static), "versions": dict(self.versions),
            "memory": self.memory.to_json(), "batch": self.batch, "pad": self.pad, "causal": self.causal,
            "work": [row.to_json() for row in self.work], "experts": [spec.to_json() for spec in self.experts]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Manifest:
        """Read what `to_json` wrote. KeyError, TypeError or ValueError when it is something else."""
        return Manifest(
            model=str(data["model"]), backend=str(data["backend"]), composite=str(data["composite"]),
            inputs=InputSpec.from_json(data["inputs"]), outputs=OutputSpec.from_json(data["outputs"]),
            weights=tuple(WeightSpec(str(n), str(d), tuple(int(i) for i in s)) for n, d, s in data["weights"]),
            prepared_from=tuple(data["prepared_from"]), explained=tuple(data["explained"]),
            output=str(data["output"]), before=str(data["before"]), nodes=tuple(data["nodes"]),
            sequence=str(data["sequence"]), positions=bool(data["positions"]), sparse=bool(data["sparse"]),
            seed=str(data["seed"]), contrast=str(data["contrast"]), reason=str(data["reason"]),
            ledger=tuple(tuple(map(str, entry)) for entry in data["ledger"]),
            rules=tuple(RuleRow(*map(str, row)) for row in data["rules"]),
            static=dict(data["static"]), versions=dict(data["versions"]), streams=int(data["streams"]),
            reference=str(data["reference"]), references=tuple(map(bool, data["references"])),
            bounds=tuple(map(Bounds.from_json, data["bounds"])), memory=Plan.from_json(data["memory"]),
            batch=str(data["batch"]), pad=int(data["pad"]), causal=str(data["causal"]),
            work=tuple(map(WorkRow.from_json, data["work"])),
            experts=tuple(map(ExpertSpec.from_json, data["experts"])))


@dataclass(frozen=True)
class Program:
    """One variant: manifest, generated source, and the IR text by level (`canonical`, `paired`, ...)."""

    manifest: Manifest
    source: str
    ir: Mapping[str, str] = field(default_factory=dict)

    def module(self) -> ModuleType:
        """The generated module, loaded."""
        return load_module(self.source, self.manifest.model)
