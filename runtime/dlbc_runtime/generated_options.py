"""How text is generated, as people say it, and as the arguments of transformers' own `generate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from dlbc_runtime.errors import InputError

SAMPLING = ("temperature", "top_k", "top_p")
STRATEGIES = ("greedy", *SAMPLING, "beam_search")
TOP_K, TOP_P, BEAMS = 50, 0.9, 4

_OWN = {"temperature": SAMPLING, "top_k": SAMPLING, "top_p": SAMPLING, "num_beams": ("beam_search",),
        "length_penalty": ("beam_search",), "early_stopping": ("beam_search",)}
_INSTEAD = {"do_sample": 'strategy="greedy", or one that samples', "max_length": "max_new_tokens",
            "min_length": "min_new_tokens", "stop_strings": "stop", "tokenizer": "explainer.sampler(tokenizer)",
            "generation_config": "its settings as options, or set model.generation_config"}
"""Arguments of `generate` that have another name here: given twice, one of them would silently win."""


@dataclass(frozen=True)
class Decoding:
    """Options of generation; None: as the model's own generation settings have it.

    `strategy`: "greedy"; "temperature" (sampling from all tokens), "top_k" (from the `top_k` likeliest, 50), "top_p"
    (from the likeliest that have `top_p` of the probability together, 0.9), which may be combined; "beam_search"
    (`num_beams`, 4). `seed`: for sampling; torch's own random state is then left as it was. `stop`: texts that end it,
    once generated. `max_time`: seconds. `more`: any other argument of `generate`.
    """

    strategy: str = "greedy"
    max_new_tokens: int = 20
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int | None = None
    num_return_sequences: int = 1
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    stop: str | Sequence[str] | None = None
    max_time: float | None = None
    seed: int | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise InputError(f"strategy={self.strategy!r}", hint=f"one of {', '.join(STRATEGIES)}")
        for name, strategies in _OWN.items():
            if getattr(self, name) is not None and self.strategy not in strategies:
                raise InputError(f"{name}={getattr(self, name)!r} means nothing for strategy={self.strategy!r}",
                                 hint=f"it is for {', '.join(strategies)}")
        other = next((name for name in _INSTEAD if name in self.more), None)
        if other is not None:
            raise InputError(f"{other} is not given to a sampler", where="generate", hint=f"give {_INSTEAD[other]}")
        limits = {"max_new_tokens": 1, "min_new_tokens": 0, "top_k": 1, "num_beams": 2, "num_return_sequences": 1,
                  "no_repeat_ngram_size": 0, "seed": 0}
        for name, least in limits.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise InputError(f"{name}={value!r}", hint=f"give a whole number, at least {least}")
        for name in ("temperature", "top_p", "repetition_penalty", "max_time"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | float) or not math.isfinite(value) or value <= 0):
                raise InputError(f"{name}={value!r}", hint="give a number above 0")
        if self.top_p is not None and self.top_p > 1:
            raise InputError(f"top_p={self.top_p!r}", hint="it is a probability: at most 1")
        if (self.min_new_tokens or 0) > self.max_new_tokens:
            raise InputError(f"min_new_tokens={self.min_new_tokens}, and max_new_tokens={self.max_new_tokens}",
                             hint="the first is at most the second")
        if self.strategy == "greedy" and self.num_return_sequences > 1:
            raise InputError(f"num_return_sequences={self.num_return_sequences}, and greedy decoding has one result",
                             hint="sample, or use beam_search")
        if self.strategy == "beam_search" and self.num_return_sequences > (self.num_beams or BEAMS):
            raise InputError(f"num_return_sequences={self.num_return_sequences} of {self.num_beams or BEAMS} beams",
                             hint="give as many num_beams, or more")
        if self.stop is not None and not (self.stops and all(isinstance(one, str) and one for one in self.stops)):
            raise InputError(f"stop={self.stop!r}", hint="give texts that are not empty")

    @property
    def stops(self) -> list[str]:
        """The texts that end generation."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def arguments(self, *, pad: int | None = None, tokenizer: object = None) -> dict[str, Any]:
        """The keyword arguments of `model.generate`, inputs aside. What is None is left to the model's settings."""
        found: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.strategy in SAMPLING,
                                 "num_beams": 1, "use_cache": True}
        if self.strategy in SAMPLING:
            found |= {"temperature": self.temperature or 1.0, "top_k": self.top_k or 0, "top_p": self.top_p or 1.0}
            if self.strategy == "top_k":
                found["top_k"] = self.top_k or TOP_K
            if self.strategy == "top_p":
                found["top_p"] = self.top_p or TOP_P
        elif self.strategy == "beam_search":
            found["num_beams"] = self.num_beams or BEAMS
        for name in ("min_new_tokens", "length_penalty", "early_stopping", "repetition_penalty", "no_repeat_ngram_size",
                     "bad_words_ids", "max_time"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        if self.num_return_sequences > 1:
            found["num_return_sequences"] = self.num_return_sequences
        if self.stops:
            found |= {"stop_strings": self.stops, "tokenizer": tokenizer}
        if pad is not None:
            found["pad_token_id"] = pad
        return {**found, **self.more}

    @classmethod
    def of(cls, options: dict[str, Any]) -> Decoding:
        """Of keyword options: what is no field goes to `generate` as it is."""
        known = {one.name for one in fields(cls)} - {"more"}
        named = {name: value for name, value in options.items() if name in known}
        return cls(**named, more={name: value for name, value in options.items() if name not in known})
