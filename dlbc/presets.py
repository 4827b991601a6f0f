"""The named composites, as entries in order; `docs/rules.md` says when to use which.

A preset may take options: `dlb{activation_aware=true}`, `epsilon-gamma-box{low=0,high=1}`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TypeAlias

from dlbc.errors import RuleError
from dlbc.passes.rules import Form

Entries: TypeAlias = "tuple[tuple[str, str], ...]"


@dataclass(frozen=True)
class Preset:
    """The entries of a preset and what else a composite has. `options` makes entries that go before them."""

    entries: Entries
    seed: Form = "R"
    contrast: str = ""
    plan: str = ""
    options: Callable[..., Entries] | None = None


_SHARED: Entries = (("move", "move"), ("selection", "select"), ("embedding", "sum"))
_MULTIPLIER: Entries = (
    *_SHARED, ("linear_map", "epsilon"), ("sum_of_terms", "epsilon"), ("activation", "identity"),
    ("quotient", "numerator"), ("product", "half"), ("norm", "detach"), ("probabilities", "taylor"),
    ("recurrent", "epsilon"))
_RELEVANCE: Entries = (
    *_SHARED, ("activation", "pass"), ("quotient", "numerator_relevance"), ("product", "uniform"),
    ("gate", "uniform"), ("norm", "identity"), ("probabilities", "pass"), ("recurrent", "absolute"))
_CONSERVING: Entries = (
    *_MULTIPLIER, ("attention", "cp"), ("matmul", "signal"), ("gate", "signal"), ("einsum", "signal"),
    ("mixture", "signal"))


RANGES = {"relu": "low=0", "sigmoid": "low=-4,high=4", "tanh": "low=-2,high=2", "gelu": "low=-6", "silu": "low=-6"}
"""Where activations respond to what enters them; arXiv 2411.12643."""


def _activation_aware(rule: str) -> Callable[..., Entries]:
    def entries(*, activation_aware: bool = False) -> Entries:
        """Before an activation that saturates, only contributions that take part in it count."""
        return tuple((f"layer & before({kind})", f"{rule}({range_})") for kind, range_ in RANGES.items()
                     ) if activation_aware else ()

    return entries


def _gamma(*, gamma: float = 0.25) -> Entries:
    return (("layer", f"gamma({gamma})"),)


def _gamma_box(*, gamma: float = 0.25, low: float = -3.0, high: float = 3.0) -> Entries:
    return (("convolution & first", f"zbox(low={low},high={high})"), ("convolution", f"gamma({gamma})"))


PRESETS: dict[str, Preset] = {
    "auto": Preset((), plan="auto"),
    "auto-cnn": Preset((), plan="auto-cnn"),
    "auto-lm": Preset((), plan="auto-lm", contrast="mean"),
    "auto-encoder": Preset((), plan="auto-encoder"),
    "auto-vit": Preset((), plan="auto-vit"),
    "attnlrp": Preset((*_MULTIPLIER, ("attention", "attnlrp"), ("matmul", "half"), ("einsum", "half"),
                       ("gate", "half"), ("mixture", "half"))),
    "attnlrp-conserving": Preset((("layer & after(gate)", "gamma(0.05)"), *_MULTIPLIER,
                                  ("attention", "attnlrp_conserving"), ("matmul", "half"), ("einsum", "half"),
                                  ("gate", "half"), ("mixture", "half"))),
    "cp-lrp": Preset(_CONSERVING),
    "epsilon": Preset(_CONSERVING),
    "epsilon-plus": Preset((("convolution", "zplus"), *_CONSERVING)),
    "epsilon-plus-flat": Preset((("layer & first", "flat"), ("convolution", "zplus"), *_CONSERVING)),
    "epsilon-gamma-box": Preset(_CONSERVING, options=_gamma_box),
    "gamma": Preset(_CONSERVING, options=_gamma),
    "alpha2-beta1": Preset((("convolution", "alpha_beta(2,1)"), *_CONSERVING)),
    "dlb": Preset((*_RELEVANCE, ("rotary", "energy"), ("linear_map", "absolute"), ("sum_of_terms", "absolute"),
                   ("attention", "dlb"), ("matmul", "share"), ("einsum", "share"), ("mixture", "absolute")),
                  options=_activation_aware("absolute")),
    "dlb-contrastive": Preset((
        *(entry for entry in _RELEVANCE if entry[0] != "gate"), ("gate", "signal_relevance"),
        ("linear_map", "contrastive"), ("sum_of_terms", "contrastive"), ("mixture", "contrastive"),
        ("attention", "contrastive"), ("matmul", "contrastive_product"), ("einsum", "contrastive_product")),
        options=_activation_aware("contrastive")),
    "dlb-0.1": Preset((*_RELEVANCE, ("linear_map", "absolute_0_1"), ("sum_of_terms", "equal"),
                       ("sum_of_terms", "absolute"), ("attention", "dlb_0_1"), ("matmul", "share"),
                       ("einsum", "share"), ("mixture", "equal"))),
    "input-x-gradient": Preset((
        *_SHARED, ("linear_map", "gradient"), ("sum_of_terms", "gradient"), ("activation", "gradient"),
        ("quotient", "gradient"), ("product", "gradient"), ("gate", "gradient"), ("norm", "gradient"),
        ("probabilities", "taylor"), ("attention", "gradient"), ("matmul", "product_gradient"),
        ("einsum", "product_gradient"), ("reduction", "gradient"), ("recurrent", "gradient"), ("mixture", "gradient")),
        seed="M"),
}


def find(text: str) -> Preset:
    """The preset that a text names, its options applied. RuleError, with the nearest names, for what is not there."""
    match = re.fullmatch(r"\s*([\w.-]+)\s*(?:\{(.*)\})?\s*", text)
    name = match[1] if match else text
    if not match or name not in PRESETS:
        near = get_close_matches(name, PRESETS, 2)
        raise RuleError(f"unknown rules `{text}`",
                        hint=f"did you mean {', '.join(near)}?" if near else f"presets: {', '.join(PRESETS)}")
    found = PRESETS[name]
    given = _options(name, found, match[2] or "")
    return replace(found, entries=(*found.options(**given), *found.entries)) if found.options else found


def _options(name: str, found: Preset, text: str) -> dict[str, float | bool]:
    known = {key: parameter.default for key, parameter in inspect.signature(found.options).parameters.items()
             } if found.options else {}
    given: dict[str, float | bool] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in known:
            near = get_close_matches(key, known, 1)
            raise RuleError(f"preset `{name}` has no option `{key}`",
                            hint=f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}")
        given[key] = _option(name, key, value, known[key])
    return given


def _option(preset: str, key: str, text: str, default: float | bool) -> float | bool:
    """A value of the default's type."""
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise RuleError(f"`{text}` is no value for `{key}` of preset `{preset}`", hint="true or false")
        return text == "true"
    try:
        return float(text)
    except ValueError as problem:
        raise RuleError(f"`{text}` is no number for `{key}` of preset `{preset}`") from problem
