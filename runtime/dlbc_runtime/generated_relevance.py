"""Relevance of many tokens of one sequence: groups of them share a forward pass over what stands before the last.

A token is what was predicted at the position before it. In a causal model nothing after that position has any part in
it, so the relevance of all tokens of a sequence comes of one forward pass, and is that of each prefix run alone. Groups
are made where that is cheaper, because relevance of early tokens need not be carried over the length of late ones, and
where memory is short; they are also what can be shown and kept while the rest is not finished.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dlbc_runtime.arrays import Array, as_numpy
from dlbc_runtime.call import Call, check_contrastive
from dlbc_runtime.errors import InputError
from dlbc_runtime.experts import Experts
from dlbc_runtime.explained import Method
from dlbc_runtime.parts import size_of
from dlbc_runtime.program import Manifest
from dlbc_runtime.signature import Constant, SizeError
from dlbc_runtime.target import Target

if TYPE_CHECKING:
    from dlbc_runtime.explainer import Explainer

KINDS = ("chosen", "probability", "alternative")
FORWARD = 8
"""A group of more than sqrt(FORWARD * length) tokens is split: half of a group of n tokens then saves (n/2)**2
positions of relevance, and takes another forward pass, which costs what relevance of two tokens does."""
BUDGETED = 3, 5
"""The share of a budget that a group may take as planned: the rest is for what allocators keep from group to group."""
LOOK_AHEAD = ("dlb_0_1",)
"""Rules of attention that carry relevance to what attention cannot see: a token is explained by its prefix alone."""
SINGLE = 7, 4
"""What a group may take where no budget is given, over what one token takes. With it generation on SmolLM2 stays within
1.3 times plain forward + gradient of one token."""


@dataclass(frozen=True)
class Asked:
    """What to explain, and how: options of `Sampler.generate` and `Sampler.explain`."""

    tokens: str | int | Sequence[int] | None = "all"
    target: str | int = "chosen"
    sinks: str = "keep"
    alternatives: int = 5
    multiplier: float = 100.0
    scaler: float = 1.0
    memory_budget: int | None = None

    @property
    def contrast(self) -> bool:
        """Whether one token is compared with another."""
        return self.target not in ("chosen", "probability")

    def numbers(self, new: int) -> list[int]:
        """The new tokens to explain, in order. InputError for those that there cannot be."""
        if self.tokens is None or self.tokens == "none":
            return []
        if isinstance(self.tokens, str):
            if self.tokens != "all":
                raise InputError(f"explain_tokens={self.tokens!r}",
                                 hint='"all", "none", how many of the first, or a list of indices')
            return list(range(new))
        if isinstance(self.tokens, int | np.integer):
            if isinstance(self.tokens, bool) or self.tokens < 0 or self.tokens > new:
                raise InputError(f"explain_tokens={self.tokens!r} of {new} new tokens",
                                 hint='"all", "none", how many of the first, or a list of indices')
            return list(range(int(self.tokens)))
        found = set()
        for one in self.tokens:
            if isinstance(one, bool) or not isinstance(one, int | np.integer) or not -new <= one < new:
                raise InputError(f"explain_tokens holds {one!r}, and there are {new} new tokens",
                                 hint=f"indices are 0 to {new - 1}; negative ones count from the end")
            found.add(int(one) % new)
        return sorted(found)


@dataclass(frozen=True)
class Text:
    """One sequence: int64 [T] with the first `prompt` of them given, and of an encoder-decoder its source."""

    ids: Array
    prompt: int
    source: Array | None = None

    @property
    def new(self) -> int:
        """How many tokens are new."""
        return len(self.ids) - self.prompt


@dataclass
class Found:
    """What is known of a sequence's new tokens so far: rows by the number of a new token."""

    numbers: list[int] = field(default_factory=list)
    rows: list[Array] = field(default_factory=list)
    source: list[Array] = field(default_factory=list)
    layers: list[Mapping[str, Array]] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    against: list[int] = field(default_factory=list)
    probabilities: dict[int, float] = field(default_factory=dict)
    alternatives: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    method: Method = field(default_factory=Method)
    experts: list[Experts] = field(default_factory=list)

    def relevance(self, length: int) -> Array:
        """[N', length]: each row is continued by zeros, which is what tokens from its own on have to do with it."""
        return _filled(self.rows, length)

    def by_layer(self, length: int) -> dict[str, Array]:
        """The same of each layer."""
        names = self.layers[0] if self.layers else {}
        return {name: _filled([one[name] for one in self.layers], length) for name in names}

    def by_expert(self, order: Array, length: int) -> Experts | None:
        """The experts of all rows, in an order, of a sequence of that length; None where there are none."""
        if not self.experts:
            return None
        whole = Experts.joined(self.experts, "targets")
        return whole.of_targets(order).lengthened(length)


def explained(explainer: Explainer, text: Text, numbers: Sequence[int], asked: Asked, keep: str | None,
              found: Found) -> Iterator[Found]:
    """Find relevance of new tokens `numbers`, group by group: after each, `found` with more in it.

    InputError where one token at a time takes more than the memory budget.
    """
    for group in grouped(explainer, text, numbers, asked, keep):
        _explain(explainer, text, group, asked, keep, found)
        yield found


def likelihoods(explainer: Explainer, text: Text, numbers: Sequence[int], count: int, found: Found) -> None:
    """Put probabilities and alternatives of new tokens `numbers` into what is found, from a forward pass alone."""
    missing = [number for number in numbers if number not in found.probabilities]
    at_once = max(1, 2 ** 22 // max(1, _vocabulary(explainer)))
    for first in range(0, len(missing), at_once):
        group = missing[first:first + at_once]
        targets = _targets(text, group, Asked())
        outputs, _ = explainer.forward(**_inputs(explainer, text, group[-1]), target=targets)
        _note(found, text, group, as_numpy(outputs[explainer.manifest.output])[0], explainer.manifest, count)


def grouped(explainer: Explainer, text: Text, numbers: Sequence[int], asked: Asked, keep: str | None = None
            ) -> list[list[int]]:
    """Groups of new tokens that share a forward pass, in order, of about the same size."""
    if not numbers:
        return []
    if _looks_ahead(explainer):
        return [[number] for number in numbers]
    length = text.prompt + numbers[-1]
    most = min(len(numbers), max(1, math.isqrt(FORWARD * length)))
    most = _fitting(explainer, text, numbers, asked, keep, most)
    groups = np.array_split(np.asarray(numbers), -(-len(numbers) // most))
    return [[int(number) for number in group] for group in groups]


def _fitting(explainer: Explainer, text: Text, numbers: Sequence[int], asked: Asked, keep: str | None, most: int
             ) -> int:
    """The largest group up to `most` that fits into memory; 1 where none does, which the call then says or divides."""
    targets = tuple(_targets(text, numbers, asked))
    variant = explainer._variant(keep, None, "explained", targets)
    manifest = explainer.program_of(variant).manifest
    try:
        given = explainer._engine.inputs(manifest.inputs.bind((), _inputs(explainer, text, numbers[-1])))
    except SizeError:  # another capture will take them, whose memory is not known yet
        return most
    call = Call(explainer, variant, given, targets, True, 1.0, reference=explainer.reference)

    def peak(count: int) -> int:
        size = size_of(manifest, replace(call, targets=targets[-count:]))
        return size.peak(manifest.memory, size.rows, count)

    room = (asked.memory_budget * BUDGETED[0] // BUDGETED[1] if asked.memory_budget
            else peak(1) * SINGLE[0] // SINGLE[1])
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2 if high <= most else most
        low, high = (middle, high) if peak(middle) <= room else (low, middle)
    return low


def _explain(explainer: Explainer, text: Text, group: Sequence[int], asked: Asked, keep: str | None, found: Found
             ) -> None:
    """One forward pass, and relevance of a group of new tokens."""
    manifest = explainer.manifest
    targets = _targets(text, group, asked)
    own = explainer(**_inputs(explainer, text, group[-1]), target=targets, keep=keep, multiplier=asked.multiplier,
                    scaler=asked.scaler, memory_budget=asked.memory_budget)
    sequence = manifest.sequence
    relevance = own.relevance.get(sequence)
    if relevance is None:
        raise InputError(f"the explainer does not explain `{sequence}`", where="generate",
                         hint=f"compile without `explain`, or with `{sequence}` in it")
    _note(found, text, group, own.outputs[manifest.output][0], manifest, asked.alternatives)
    source = next((name for name in own.relevance if name != sequence and text.source is not None), None)
    for row, number in enumerate(group):
        length = text.prompt + number
        found.numbers.append(number)
        found.rows.append(relevance[row, 0, :length].astype(np.float32))
        if source is not None:
            found.source.append(own.relevance[source][row, 0].astype(np.float32))
        if keep is not None:
            found.layers.append({name: placed for name, array in own.nodes.items()
                                 if (placed := _over_positions(array[row, 0], length, relevance.shape[2],
                                                               list(group), number)) is not None})
        one = own.explained(0, row)
        assert one is not None
        found.values.append(_value(one.value, one.against, own.outputs[manifest.output][0], row, manifest, text, group))
        if one.against is not None:
            found.against.append(one.against)
    if own.experts is not None:
        found.experts.append(own.experts)
    seconds = {stage: found.method.seconds.get(stage, 0.0) + time for stage, time in own.method.seconds.items()}
    found.method = replace(own.method, seconds={**found.method.seconds, **seconds})


def _value(value: float | None, against: int | None, logits: Array, row: int, manifest: Manifest, text: Text,
           group: Sequence[int]) -> float:
    """The number that was explained: of a contrast the difference."""
    assert value is not None
    if against is None:
        return value
    place = row if manifest.positions else text.prompt + group[row] - 1
    return value - float(logits[place, against])


def _targets(text: Text, numbers: Sequence[int], asked: Asked) -> list[Target]:
    """A target for each new token: at the position before it."""
    found = []
    for number in numbers:
        position = text.prompt + number
        token = int(text.ids[position])
        if asked.target == "chosen":
            found.append(Target.token(token, position - 1))
        elif asked.target == "probability":
            found.append(Target.probability(token, position - 1))
        else:
            against = None if asked.target == "alternative" else int(asked.target)
            found.append(Target.difference(token, against, position - 1))
    return found


def indices(tokens: object) -> str | int | list[int] | None:
    """`explain_tokens` with indices as a list of ints: of any sequence, array or tensor of whole numbers [K]."""
    if tokens is None or isinstance(tokens, str | bool):
        return tokens
    found = as_numpy(tokens)
    if (found.dtype.kind not in "iu" and found.shape != (0,)) or found.ndim > 1:
        raise InputError(f"explain_tokens={tokens!r:.80}",
                         hint='"all", "none", how many of the first, or a list of indices')
    return [int(one) for one in found] if found.ndim else int(found)


def check_budget(explainer: Explainer, start: Array, source: Array | None, asked: Asked, keep: str | None, *,
                 least: int, most: int) -> None:
    """InputError for a memory budget that is too small for a token that will come: one of the first `least` new ones
    of `most`, after `start`. The last of them takes most; what later ones take is known when they are there."""
    listed = asked.tokens if isinstance(asked.tokens, list) else []
    certain = [one for one in asked.numbers(most) if one < least and (not listed or one in listed)]
    if asked.memory_budget is None or not certain:
        return
    filler = 1 if asked.target == 0 else 0  # a token is not compared with itself
    text = Text(np.concatenate([start, np.full(certain[-1] + 1, filler, np.int64)]), len(start), source)
    with contextlib.suppress(SizeError):  # another capture will take them, whose memory is not known yet
        explainer.memory(**_inputs(explainer, text, certain[-1]), target=_targets(text, certain[-1:], asked), keep=keep,
                         memory_budget=asked.memory_budget)


def check_rules(explainer: Explainer, asked: Asked) -> None:
    """InputError where the explainer's rules cannot explain what is asked for."""
    if explainer.manifest.streams > 1:
        check_contrastive(_targets(Text(np.zeros(2, np.int64), 1), [0], asked), asked.multiplier)


def check_inputs(explainer: Explainer, *, decoder: bool) -> None:
    """InputError for an explainer whose inputs are not those of generation."""
    manifest = explainer.manifest
    if not manifest.sequence:
        raise InputError(f"`{manifest.output}` of {manifest.model} is no sequence of next tokens", where="sampler",
                         hint="compile a causal language model or an encoder-decoder, with all of its logits")
    for name in manifest.inputs.names:
        _input(name, np.zeros(1, np.int64), np.zeros(1, np.int64) if decoder else None)


def _inputs(explainer: Explainer, text: Text, last: int) -> dict[str, Any]:
    """The explainer's inputs: what stands before new token `last`, and never one token alone, for which models are
    often captured apart; what comes later has no part in it."""
    ids, spec = text.ids[:_length(explainer, text, last)], explainer.manifest.inputs
    fixed = {name: tree.value for name, tree in spec.trees.items() if isinstance(tree, Constant) and not tree.optional}
    return {**fixed, **{name: explainer._engine.array(_input(name, ids, text.source)[None]) for name in spec.names}}


def _length(explainer: Explainer, text: Text, last: int) -> int:
    """How many tokens are run to explain those up to new token `last`."""
    return text.prompt + last if _looks_ahead(explainer) else max(2, text.prompt + last)


def _looks_ahead(explainer: Explainer) -> bool:
    return any(row.rule.partition("(")[0] in LOOK_AHEAD for row in explainer.manifest.rules)


def _input(name: str, ids: Array, source: Array | None) -> Array:
    """One input of a sequence, without the batch axis."""
    decoder = name.startswith("decoder_")
    own = ids if decoder or source is None else source
    match name.removeprefix("decoder_"):
        case "input_ids":
            return own
        case "attention_mask":
            return np.ones_like(own)
        case "position_ids" | "cache_position":
            return np.arange(len(own))
        case "token_type_ids":
            return np.zeros_like(own)
    raise InputError(f"the explainer takes `{name}`, which is not made by generation", where="sampler",
                     hint='compile with {"input_ids": ..., "attention_mask": ...}, and "decoder_input_ids" for an '
                          "encoder-decoder")


def _note(found: Found, text: Text, group: Sequence[int], logits: Array, manifest: Manifest, count: int) -> None:
    """Put probabilities of a group of new tokens, from logits [P, V] or [T, V], into what is found."""
    for row, number in enumerate(group):
        own = np.asarray(logits[row if manifest.positions else text.prompt + number - 1], np.float64)
        odds = np.exp(own - own.max())
        odds /= odds.sum()
        found.probabilities[number] = float(odds[int(text.ids[text.prompt + number])])
        likely = np.argpartition(-odds, min(count, len(odds) - 1))[:count] if count else np.empty(0, np.int64)
        found.alternatives[number] = [(int(i), float(odds[i])) for i in sorted(likely, key=lambda i: -odds[i])]


def _over_positions(array: Array, length: int, whole: int, group: Sequence[int], number: int) -> Array | None:
    """Relevance of what stands at a place, [positions, features], at each position before a token, float32 [length].

    Above the last attention a place holds only the positions of a group, of which a token's own is the one before it;
    elsewhere `whole` positions. None for a place that holds no positions of this sequence, as an encoder's.
    """
    if array.ndim != 2 or len(array) not in (whole, len(group)):
        return None
    sums = np.asarray(array.sum(-1, dtype=np.float64), np.float32)
    if len(sums) == whole:
        return sums[:length]
    placed = np.zeros(length, np.float32)
    placed[-1] = sums[group.index(number)]
    return placed


def _filled(rows: Sequence[Array], length: int) -> Array:
    whole = np.zeros((len(rows), length), np.float32)
    for number, row in enumerate(rows):
        whole[number, :len(row)] = row
    return whole


def _vocabulary(explainer: Explainer) -> int:
    manifest = explainer.manifest
    shape = next(spec.shape for spec in manifest.outputs.tensors if spec.name == manifest.output)
    return shape[-1] if isinstance(shape[-1], int) else 1
