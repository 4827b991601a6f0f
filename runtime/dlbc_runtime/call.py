"""One call of an explainer: the model's forward pass, seeds for what is explained, and relevance back to the inputs."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dlbc_runtime.arrays import NOTHING, Array, Arrays, as_numpy
from dlbc_runtime.errors import InputError
from dlbc_runtime.expert_layer import ExpertLayer
from dlbc_runtime.experts import Experts
from dlbc_runtime.explained import Explained, Meaning, Method
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.ledger import Ledger, ledger_of
from dlbc_runtime.parts import carried, together
from dlbc_runtime.program import Manifest, Program, Variant
from dlbc_runtime.reference import Reference
from dlbc_runtime.references import (
    AtReference,
    ReferenceRuns,
    at_reference,
    differences_of,
    reference_arguments,
    reference_key,
    reference_values,
)
from dlbc_runtime.seeds import dense_seeds, distinct_columns, sparse_seeds, with_rivals
from dlbc_runtime.target import Target

if TYPE_CHECKING:
    from dlbc_runtime.explainer import Explainer


Prepared: TypeAlias = "tuple[object, Any, object]"
"""The state of the weights that values were prepared from, those values, and the state of all weights then."""


@dataclass(eq=False)
class Loaded:
    """A program's module, and the values that it prepared from weights."""

    program: Program
    module: Any
    prepared: Prepared = (None, (), None)
    lock: threading.Lock = field(default_factory=threading.Lock)
    references: ReferenceRuns = field(default_factory=ReferenceRuns)


@dataclass
class Call:
    """One call of an explainer. `at_a_time`: for how many targets relevance is carried at once (0: all)."""

    explainer: Explainer
    variant: Variant
    inputs: dict[str, Any]
    targets: tuple[Target, ...]
    many: bool
    multiplier: float
    scaler: float = 1.0
    reference: Reference | None = None
    state: object = None
    at_a_time: int = 0

    def run(self) -> Explanation:
        explainer, engine = self.explainer, self.explainer._engine
        loaded = explainer._load(self.variant)
        manifest = loaded.program.manifest
        self.state = explainer._weights_state()
        with engine.running():
            prepared = explainer._prepared(loaded, self.state)
            started = time.perf_counter()
            arguments, columns = self.with_positions(manifest)
            compared = self._at_reference(loaded, prepared, arguments)
            results, state = loaded.module.forward(explainer._weights, prepared, *arguments)
            results = own_results(manifest, results)
            outputs = dict(zip(manifest.outputs.names, results, strict=False))
            seeds, explained = self._seeds(manifest, results, columns, compared)
            forwarded = time.perf_counter()
            relevance = together(self._carried(loaded, prepared, state, seeds, compared), len(seeds[0]))
            finished = time.perf_counter()
        if manifest.before:
            explainer._say_once(f"`{manifest.output}` ends in {manifest.before}: the value before it is explained")
        count = len(manifest.explained) + len(manifest.nodes)
        named = dict(zip((*manifest.explained, *manifest.nodes), relevance[:count], strict=True))
        positive, negative = self._streams(manifest, named)
        single = {name: self._found(value if not positive else positive[name] - negative[name])
                  for name, value in named.items()}
        inner = results[len(manifest.outputs.names):]
        activations = dict(zip(manifest.nodes, inner[2 * len(manifest.experts):], strict=False))
        return Explanation(
            outputs=Arrays(outputs), relevance=Arrays({n: single[n] for n in manifest.explained}),
            inputs=Arrays(self.inputs), target=explained,
            nodes=Arrays({n: single[n] for n in manifest.nodes}) if manifest.nodes else NOTHING,
            activations=Arrays(activations) if activations else NOTHING,
            rules=manifest.composite, many_targets=self.many, ledger_source=self.ledger,
            draw_source=explainer.draw, experts=self._experts(manifest, inner, relevance[count:]),
            positive=Arrays({n: self._found(positive[n]) for n in manifest.explained}) if positive else NOTHING,
            negative=Arrays({n: self._found(negative[n]) for n in manifest.explained}) if negative else NOTHING,
            method=Method(manifest.model, manifest.backend, self.multiplier,
                          {"forward": forwarded - started, "relevance": finished - forwarded}, manifest.versions,
                          self.scaler, str(self.reference or "")))

    def _streams(self, manifest: Manifest, named: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of contrastive rules the relevance of targets and that of their rivals, [targets, ...]; of others nothing."""
        if manifest.streams == 1:
            return {}, {}
        count = len(self.targets)
        return {n: v[:count] for n, v in named.items()}, {n: v[count:] for n, v in named.items()}

    def _experts(self, manifest: Manifest, inner: Sequence[Any], relevance: Sequence[Any]) -> Experts | None:
        """What is known of the experts: ids and weights of the model's layers, and the relevance of each."""
        if not manifest.experts:
            return None
        visible = self._visible()
        chosen, found, layers = iter(inner), iter(relevance), []
        for spec in manifest.experts:
            own = [self._found(self._difference(manifest, next(found))) for _ in range(1 + spec.shared)]
            layers.append(ExpertLayer.of(spec, next(chosen), next(chosen), *own, many_targets=self.many,
                                         visible=visible))
        return Experts(tuple(layers))

    def _visible(self) -> Array | None:
        """Which tokens the attention mask shows, bool [B, T]; None without a mask."""
        mask = next((value for name, value in self.inputs.items()
                     if "attention_mask" in name and value.ndim == 2), None)
        return None if mask is None else as_numpy(mask) != 0

    def _difference(self, manifest: Manifest, value: Any) -> Any:
        """Of contrastive rules the relevance of targets less that of their rivals."""
        count = len(self.targets)
        return value if manifest.streams == 1 else value[:count] - value[count:]

    def _found(self, value: Any) -> Any:
        """Relevance [targets, ...] as it is returned: scaled, of one target without the first axis."""
        value = value if self.scaler == 1 else value * self.scaler
        return value if self.many else value[0]

    def forward(self) -> tuple[dict[str, Any], Any]:
        """The outputs alone, and the positions at which a sequence output is computed."""
        explainer, loaded = self.explainer, self.explainer._load(self.variant)
        self.state = explainer._weights_state()
        with explainer._engine.running():
            arguments, _ = self.with_positions(loaded.program.manifest)
            prepared = explainer._prepared(loaded, self.state)
            results, _ = loaded.module.forward(explainer._weights, prepared, *arguments)
        return (dict(zip(loaded.program.manifest.outputs.names, results, strict=False)),
                arguments[-1] if len(arguments) > len(self.inputs) else None)

    def _carried(self, loaded: Loaded, prepared: Any, state: list[Any], seeds: Sequence[Array],
                 compared: AtReference | None) -> Iterator[tuple[Array, tuple[Any, ...]]]:
        """Relevance, for some of the targets after the other where they are too many for one go."""
        weights, manifest = self.explainer._weights, loaded.program.manifest
        return carried(lambda state, *given: loaded.module.relevance(weights, prepared, state, *given), state, seeds,
                       self._values(manifest, compared), self.explainer._engine.array, streams=manifest.streams,
                       at_a_time=self.at_a_time)

    def ledger(self) -> Ledger:
        """Run the same call again with the ledger kept. InputError where the weights have changed since."""
        return self.ledger_from(self.totals())

    def ledger_from(self, totals: list[float]) -> Ledger:
        """The ledger from its sums."""
        manifest = self.explainer.program_of(replace(self.variant, keep="inputs", ledger=True)).manifest
        count = len(manifest.explained)
        return ledger_of(manifest.ledger, totals[count:], dict(zip(manifest.explained, totals, strict=False)))

    def totals(self) -> list[float]:
        """The sums of the ledger, those of the inputs first."""
        explainer, engine = self.explainer, self.explainer._engine
        if explainer._weights_state() != self.state:
            raise InputError("the model's weights have changed since this explanation was made", where="conservation()",
                             hint="explain the input again, and ask that explanation")
        loaded = explainer._load(replace(self.variant, keep="inputs", ledger=True))
        manifest = loaded.program.manifest
        with engine.running():
            prepared = explainer._prepared(loaded)
            arguments, columns = self.with_positions(manifest)
            compared = self._at_reference(loaded, prepared, arguments)
            results, state = loaded.module.forward(explainer._weights, prepared, *arguments)
            seeds, _ = self._seeds(manifest, own_results(manifest, results), columns, compared)
            sums = [[float(as_numpy(value).astype(np.float64).sum()) for value in found]
                    for _, found in self._carried(loaded, prepared, state, seeds, compared)]
        return [math.fsum(parts) * self.scaler for parts in zip(*sums, strict=True)]

    def _at_reference(self, loaded: Loaded, prepared: Any, arguments: list[Any]) -> AtReference | None:
        """The model at the reference, kept where it is the same for other inputs."""
        manifest, engine, weights = loaded.program.manifest, self.explainer._engine, self.explainer._weights
        if self.reference is None:
            return None
        reference, named = self.reference, {**self.inputs, **dict(zip(("positions",), arguments[len(self.inputs):],
                                                                      strict=False))}

        def run() -> AtReference:
            given = reference_arguments(manifest, reference, named, engine)
            results, _ = loaded.module.forward(weights, prepared, *given.values())
            own = own_results(manifest, results)
            return at_reference(manifest, results, explained_value(manifest, own, returned_value(manifest, own)))

        return loaded.references.at(reference_key(manifest, reference, named, self.state), run)

    def _values(self, manifest: Manifest, compared: AtReference | None) -> tuple[Any, ...]:
        """The activations at the reference that relevance takes."""
        if compared is None:
            return ()
        batch = next((int(self.inputs[name].shape[0]) for name in manifest.explained if self.inputs[name].ndim), 1)
        return reference_values(manifest, compared, batch, self.explainer._engine)

    def with_positions(self, manifest: Manifest) -> tuple[list[Any], Array | None]:
        """The forward's arguments; and for each target the position of each row, int64 [targets, B]."""
        arguments = list(self.inputs.values())
        if not manifest.sequence:
            return arguments, None
        _, columns = self.columns(manifest)
        if not manifest.positions:
            return arguments, columns
        unique, _ = distinct_columns(columns)
        return [*arguments, self.explainer._engine.array(unique)], columns

    def columns(self, manifest: Manifest) -> tuple[int, Array]:
        """The length of the sequence, and the position that each target explains in each row, int64 [targets, B]."""
        length, last = self._last(manifest.sequence)
        return length, np.stack([target.positions(last, length) for target in self.targets])

    def _last(self, sequence: str) -> tuple[int, Array]:
        """The sequence length, and the last position of each row that is no padding."""
        batch, length = self.inputs[sequence].shape[:2]
        mask = next((as_numpy(v) for n, v in self.inputs.items()
                     if "attention_mask" in n and tuple(v.shape) == (batch, length)), None)
        if mask is None:
            return length, np.full(batch, length - 1, np.int64)
        visible = mask != 0
        return length, (length - 1 - visible[:, ::-1].argmax(1)).astype(np.int64)

    def _seeds(self, manifest: Manifest, results: tuple[Any, ...], columns: Array | None,
               compared: AtReference | None = None) -> tuple[tuple[Array, ...], Sequence[Explained]]:
        """The relevance section's arguments, seeds times the multiplier and (sparse) targets; and their meaning."""
        shown = returned_value(manifest, results)
        output = explained_value(manifest, results, shown)
        batch = output.shape[0] if output.ndim else 1
        places = np.zeros((len(self.targets), batch), np.int64) if columns is None else (
            distinct_columns(columns)[1] if manifest.positions else columns)
        found = self._weightings if any(target.weighs for target in self.targets) else self._numbers
        if compared is not None:
            plain = replace(manifest, seed="relevance", sparse=False)
            seeds, explained = found(plain, output, shown, columns, places)
            return (differences_of(seeds[0], output, compared.explained, signed=manifest.seed == "signed"),), explained
        seeds, explained = found(manifest, output, shown, columns, places)
        return (with_rivals(output, seeds[0], self.targets),) if manifest.streams > 1 else seeds, explained

    def _numbers(self, manifest: Manifest, output: Array, shown: Array, columns: Array | None, places: Array
                 ) -> tuple[tuple[Array, ...], Sequence[Explained]]:
        """Seeds of single numbers of the output, those of each target at its place in each row."""
        rows = np.arange(places.shape[1])
        found = [target.seed(output if columns is None else output[rows, places[number]], manifest.output,
                             None if columns is None else columns[number], number, signed=manifest.seed == "signed",
                             shown=shown if columns is None else shown[rows, places[number]])
                 for number, target in enumerate(self.targets)]
        explained = Meaning(*(seed.explained for seed in found))
        return (sparse_seeds if manifest.sparse else dense_seeds)(
            output, found, places, columns is not None, np.float32(self.multiplier)), explained

    def _weightings(self, manifest: Manifest, output: Array, shown: Array, columns: Array | None, places: Array
                    ) -> tuple[tuple[Array, ...], Sequence[Explained]]:
        """Dense seeds, where a target weights the whole output: of a sequence, the position that it explains, or
        all of them where all are computed."""
        rows = np.arange(places.shape[1])
        seeds = np.zeros((len(self.targets), *output.shape), np.float32)
        explained: list[Explained] = []
        for number, target in enumerate(self.targets):
            one = slice(number, number + 1)
            if columns is not None and target.kind in ("mask", "box"):
                raise InputError(f"output `{manifest.output}` is a sequence, and has neither pixels nor boxes",
                                 where="target", hint="give Target.token(id, position)")
            if target.weighs and (columns is None or not manifest.positions):
                seeds[number], meaning = target.weighting(output, manifest.output, number, shown=shown,
                                                          signed=manifest.seed == "signed")
                explained += meaning
            elif target.weighs:
                own_place = output[rows, places[number]][:, None]
                weights, meaning = target.weighting(own_place, manifest.output, number)
                seeds[number, rows, places[number]] = weights[:, 0]
                explained += meaning
            else:
                single = replace(self, targets=(target,))
                own, told = single._numbers(replace(manifest, sparse=False), output, shown,
                                               None if columns is None else columns[one], places[one])
                seeds[number] = own[0][0] / np.float32(self.multiplier)
                explained += [replace(each, seed=number) for each in told]
        return (seeds * np.float32(self.multiplier),), tuple(explained)


def check_contrastive(targets: Sequence[Target], multiplier: float) -> None:
    """InputError where a target, or the multiplier, would make a contrastive relevance negative."""
    if multiplier < 0:
        raise InputError(f"multiplier is {multiplier!r}, and contrastive relevances cannot be negative",
                         hint="give a positive number; scaler multiplies what is found")
    for target in targets:
        target.check_contrastive()


def own_results(manifest: Manifest, results: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the forward returns of itself, without what only the relevance of differences takes."""
    return results[:len(results) - len(manifest.references)]


def returned_value(manifest: Manifest, results: tuple[Any, ...]) -> Array:
    """The output as the model returns it."""
    return as_numpy(results[manifest.outputs.names.index(manifest.output)])


def explained_value(manifest: Manifest, results: tuple[Any, ...], returned: Array) -> Array:
    """The value that is explained: the returned output, or what went into its final softmax; minus its mean, where the
    rules contrast it."""
    value = as_numpy(results[-1]) if manifest.before else returned
    return value - value.mean(-1, keepdims=True) if manifest.contrast else value
