"""The straight way for a call like one before.

`Explainer.__call__` and `Call` serve every option, model and kind of input. Most calls ask for the relevance of one
class and nothing else, for inputs of the shapes and types that the last ones had. For a small model, finding out each
time that nothing else is asked for takes longer than explaining. So a call that went the whole way is remembered by the
kind of its inputs, and what it made is the pattern for calls of that kind: they copy and check the numbers of their
inputs, look at the weights' state, choose the target, and run the generated code. Whatever is unusual goes the whole
way, which finds the words for it where it is wrong.

No numbers of a call are kept for another one, and what an explanation makes when it is read, it makes of copies.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dlbc_runtime.arrays import NOTHING, Array, Arrays, as_numpy
from dlbc_runtime.call import Call, Loaded
from dlbc_runtime.explained import Explained, Meaning, Method
from dlbc_runtime.explanation import Explanation, Once
from dlbc_runtime.ledger import Ledger
from dlbc_runtime.program import Manifest, Variant
from dlbc_runtime.seeds import FEW, dense_seeds, rivals_of_row, with_rivals
from dlbc_runtime.target import Target, as_targets

if TYPE_CHECKING:
    from dlbc_runtime.explainer import Explainer

Kind: TypeAlias = "tuple[object, ...]"

MOST = 64
"""Kinds of inputs that are remembered at most."""
LARGE = 1e38
"""Multipliers beyond it may be infinite in float32."""
_ARRAYS = ("Tensor", "Parameter", "ndarray")
_FLOATS = ("f64", "f32", "f16", "bf16")
_NUMBERS = (float, int)
_OWN = ("outputs", "relevance", "positive", "negative", "inputs", "target", "method", "ledger_source", "draw_source",
        "features", "lengths")


@dataclass(frozen=True)
class Pattern:
    """What calls of one kind have in common: for each input of the program which one of the call it is, and whether it
    may hold NaN; and what of an explanation and its method is always the same."""

    inputs: tuple[tuple[int, bool], ...]
    explanation: Mapping[str, Any]
    method: Mapping[str, Any]


class Straight:
    """The straight way of an explainer's default program. The explainer has it, and it has no reference back: so an
    explainer's memory is free as soon as nobody has it."""

    def __init__(self, variant: Variant, loaded: Loaded) -> None:
        manifest = loaded.program.manifest
        self.variant, self.loaded = variant, loaded
        self.inputs, self.outputs, self.explained = manifest.inputs.names, manifest.outputs.names, manifest.explained
        self.output, self.signed, self.contrast = manifest.output, manifest.seed == "signed", manifest.contrast
        self.streams = manifest.streams
        self.returned = manifest.outputs.names.index(manifest.output)
        self.place = -1 if manifest.before else self.returned
        self.patterns: dict[Kind, Pattern] = {}

    @staticmethod
    def serves(manifest: Manifest) -> bool:
        """Whether a program's calls can be so plain: relevance of inputs alone, for an output [B] or [B, V]."""
        rank = next(len(spec.shape) for spec in manifest.outputs.tensors if spec.name == manifest.output)
        return rank in (1, 2) and not (manifest.sequence or manifest.sparse or manifest.nodes or manifest.experts
                                       or manifest.reference or manifest.bounds)

    def learn(self, args: Sequence[Any], kwargs: Mapping[str, Any], made: Explanation) -> None:
        """Remember a call that went the whole way, and what it made."""
        kind, given = kind_of(args, kwargs), (*args, *kwargs.values())
        if kind is None or len(given) != len(self.inputs) or any(type(each).__name__ not in _ARRAYS for each in given):
            return
        if len(set(map(id, given))) < len(given):  # the same array twice does not tell which input is which
            return
        if len(self.patterns) >= MOST:
            self.patterns.clear()
        spec = self.loaded.program.manifest.inputs
        bound, dtypes = spec.bind(args, kwargs).values(), [tensor.dtype for tensor in spec.tensors]
        inputs = tuple((next(place for place, each in enumerate(given) if each is value), dtype in _FLOATS)
                       for value, dtype in zip(bound, dtypes, strict=True))
        self.patterns[kind] = Pattern(
            inputs, {name: value for name, value in vars(made).items() if name not in _OWN},
            {name: value for name, value in vars(made.method).items() if name != "seconds"})

    def run(self, explainer: Explainer, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: object,
            multiplier: float, scaler: float) -> Explanation | None:
        """The explanation of a call; None where it must go the whole way. InputError as there."""
        pattern = self.patterns.get(kind_of(args, kwargs))  # type: ignore[arg-type]  # there is none for None
        if pattern is None or not _plain(target, multiplier, scaler):
            return None
        if self.streams > 1 and (isinstance(target, Target) or multiplier < 0):
            return None
        given = (*args, *kwargs.values()) if kwargs else args
        module, engine, weights = self.loaded.module, explainer._engine, explainer._weights
        with engine.inferring():
            inputs = []
            for place, floats in pattern.inputs:
                copy = engine.copied(given[place], finite=floats)
                if copy is None:
                    return None
                inputs.append(copy)
            state = explainer._weights_state()
            prepared = explainer._prepared(self.loaded, state)
            started = time.perf_counter()
            results, saved = module.forward(weights, prepared, *inputs)
            seeds, source = self._seeds(results, target, multiplier)
            forwarded = time.perf_counter()
            found = module.relevance(weights, prepared, saved, engine.array(seeds))
            finished = time.perf_counter()
            shares = [engine.entries(each) for each in found]
            positive, negative = NOTHING, NOTHING
            if self.streams > 1:
                positive, negative = (self._named([each[side] for each in shares], scaler) for side in (0, 1))
            relevance = self._named([each[0] - each[1] if self.streams > 1 else each[0] for each in shares], scaler)
        named = dict(zip(self.inputs, inputs, strict=True))

        def ledger() -> Ledger:
            return Call(explainer, self.variant, named, as_targets(target)[0], False, multiplier, scaler,
                        state=state).ledger()

        method = Method.of_fields({**pattern.method, "multiplier": multiplier, "scaler": scaler, "seconds": {
            "forward": forwarded - started, "relevance": finished - forwarded}})
        return Explanation.of_fields({
            **pattern.explanation, "outputs": Arrays.adopted(dict(zip(self.outputs, results, strict=False))),
            "relevance": relevance, "positive": positive, "negative": negative, "inputs": Arrays(named),
            "target": Meaning(source), "method": method, "ledger_source": Once(ledger), "draw_source": explainer.draw,
            "features": {}, "lengths": {}})

    def _named(self, found: Sequence[Any], scaler: float) -> Arrays:
        """Relevance of each input as it is returned."""
        found = found if scaler == 1 else [each * scaler for each in found]
        return Arrays.adopted(dict(zip(self.explained, found, strict=True)))

    def _seeds(self, results: Sequence[Any], target: object, multiplier: float
               ) -> tuple[Array, Callable[[], Sequence[Explained]]]:
        """Seeds float32 [streams, *output], and what tells their meaning."""
        output = results[self.place]
        shape = output.shape
        if len(shape) == 2 and shape[0] * shape[1] <= FEW and (target is None or isinstance(target, int)):
            rows = (self._explained(output) if self.contrast else output).tolist()
            seeds = np.zeros((self.streams, *shape), np.float32)
            for row, numbers in enumerate(rows):
                index = _chosen(numbers, target)
                if index is None or not 0 <= index < shape[1]:
                    break
                seeds[0, row, index] = -multiplier if self.signed and numbers[index] < 0 else multiplier
                if self.streams > 1:
                    seeds[1, row] = rivals_of_row(numbers, index, float(seeds[0, row, index]))
            else:
                return seeds, lambda: as_targets(target)[0][0].seed(
                    np.array(rows).reshape(shape), self.output, None, 0, signed=self.signed).explained()
        array, shown = self._explained(output), as_numpy(results[self.returned])
        targets, _ = as_targets(target)
        seed = targets[0].seed(array, self.output, None, 0, signed=self.signed, shown=shown)
        (seeds,) = dense_seeds(array, [seed], np.zeros((1, len(array)), np.int64), False, np.float32(multiplier))
        return with_rivals(array, seeds, targets) if self.streams > 1 else seeds, seed.explained

    def _explained(self, output: Any) -> Array:
        """The numbers that are explained: of some rules each less the mean of its row."""
        array = as_numpy(output)
        if not self.contrast:
            return array
        less: Array = array - np.add.reduce(array, -1, keepdims=True) / array.dtype.type(array.shape[-1])
        return less


def kind_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Kind | None:
    """All that decides how inputs are bound, beside their numbers; None where they are not arrays."""
    try:
        if kwargs:
            args = (*args, *kwargs.values())
        return (*[(each.__class__, each.dtype, each.shape, each.device) for each in args], *kwargs)
    except AttributeError:
        return None


def _plain(target: object, multiplier: float, scaler: float) -> bool:
    """Whether a call asks for one number of each row, in amounts that are numbers. Those beyond all bounds go the whole
    way, which finds out which factor it is."""
    if target is not None and target.__class__ is not int and not (
            isinstance(target, Target) and target.position is None and not target.weighs):
        return False
    if multiplier.__class__ not in _NUMBERS or scaler.__class__ not in _NUMBERS:
        return False
    product = multiplier * scaler
    return product != 0 and math.isfinite(product) and abs(multiplier) < LARGE


def _chosen(numbers: list[float], target: int | None) -> int | None:
    """The place of a target, or of the first largest number; None where one of them may be NaN."""
    whole = sum(numbers)
    if whole != whole:
        return None
    return numbers.index(max(numbers)) if target is None else target
