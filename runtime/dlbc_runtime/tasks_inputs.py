"""Inputs as people have them (texts, pictures, tables, what a tokenizer returned) as inputs of a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dlbc_runtime.arrays import Array, as_numpy
from dlbc_runtime.errors import InputError
from dlbc_runtime.signature import TensorSpec
from dlbc_runtime.tasks_kinds import Kinds
from dlbc_runtime.tasks_pictures import pictures_of, processed

if TYPE_CHECKING:
    from dlbc_runtime.explainer import Explainer

log = logging.getLogger(__name__)
_NUMPY = {"f64": "float64", "f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32", "i16": "int16",
          "i8": "int8", "u8": "uint8", "bool": "bool"}
_TEXT_KEYS = ("text", "text_pair")


@dataclass(frozen=True)
class Given:
    """The inputs of a call, and what they are shown with: the tokenizer, the pictures, the names of the columns."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    pictures: tuple[Array, ...] = ()
    features: tuple[str, ...] = ()


def prepare(explainer: Explainer, inputs: object, tokenizer: Any, kinds: Kinds) -> Given:
    """The model's inputs from what a task was given. InputError where that cannot be done, or they do not fit."""
    if inputs is None:
        raise InputError("there are no inputs", where="inputs",
                         hint="give a text, a picture, a tensor or a dict of them")
    if isinstance(inputs, Mapping):
        return _named(explainer, inputs, tokenizer, kinds)
    if kinds.input == "text":
        texts = texts_of(inputs)
        if texts is not None:
            return encoded(explainer, texts, None, tokenizer, kinds)
    elif kinds.input == "image":
        pictures = pictures_of(inputs)
        if pictures is not None:
            return _seen(explainer, pictures, tokenizer, kinds)
    elif hasattr(inputs, "columns") and hasattr(inputs, "to_numpy"):  # a data frame of pandas or polars
        names = tuple(map(str, inputs.columns))
        return Given((_fitting(explainer, _spec(explainer, kinds.name), inputs.to_numpy()),), {}, features=names)
    if isinstance(inputs, str | bytes | Path):
        raise InputError(f"the model takes {kinds.input} input, not {type(inputs).__name__} {inputs!r:.40}",
                         where="inputs", hint=f"give a tensor for {kinds.shown.partition(', output')[0]}")
    if isinstance(inputs, tuple):
        return Given(_positional(explainer, inputs), {}, tokenizer)
    spec = _spec(explainer, kinds.name)
    if kinds.input == "text" and isinstance(inputs, list):
        rows = inputs if inputs and not np.isscalar(inputs[0]) else [inputs]
        check_ids(rows, kinds)
        return Given((), {kinds.name: rows}, tokenizer)
    value = _fitting(explainer, spec, inputs)
    if kinds.input == "text":
        check_ids([value], kinds)
    return Given((), _masked(explainer, {kinds.name: value}, kinds), tokenizer)


def texts_of(inputs: object) -> list[str] | None:
    """The texts that were given: one, or a list or tuple of them. None where they are no texts; InputError where one is
    empty, or not all are texts."""
    if isinstance(inputs, str):
        texts = [inputs]
    elif isinstance(inputs, list | tuple) and inputs and any(isinstance(one, str) for one in inputs):
        texts = list(inputs)
    else:
        return None
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"entry {number} is {type(text).__name__}, others are texts", where="inputs",
                             hint="give texts only, or tensors only")
        if not text.strip():
            raise InputError("the text is empty" if len(texts) == 1 else f"text {number} is empty", where="inputs",
                             hint="give at least one word")
    return texts


def tokenizer_for(explainer: Explainer, tokenizer: Any) -> Any:
    """The tokenizer given, or the one in the folder that the model was loaded from. InputError where there is none."""
    if tokenizer is None:
        tokenizer = _from_folder(explainer, "AutoTokenizer")
    if tokenizer is None:
        raise InputError("there is no tokenizer for the text", where="tokenizer",
                         hint="give the model's own: tokenizer=AutoTokenizer.from_pretrained(...); or give token ids")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor of several kinds of input holds one
    if not callable(tokenizer) or not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise InputError(f"the tokenizer is {type(tokenizer).__name__}, not one as transformers has them",
                         where="tokenizer", hint="give tokenizer=AutoTokenizer.from_pretrained(...), or a "
                                                 "PreTrainedTokenizerFast(tokenizer_object=...) around another one")
    return tokenizer


def encoded(explainer: Explainer, texts: list[str], pairs: list[str] | None, tokenizer: Any, kinds: Kinds) -> Given:
    """Texts as rows of token ids, each of its own length: the explainer pads and masks them."""
    tokenizer = tokenizer_for(explainer, tokenizer)
    check_vocabulary(tokenizer, kinds)
    found = dict(tokenizer(texts) if pairs is None else tokenizer(texts, pairs))
    rows: list[list[int]] = [list(row) for row in found["input_ids"]]
    check_ids(rows, kinds, tokenizer)
    longest = max(map(len, rows))
    limit = _longest(explainer, kinds)
    if longest > limit:
        raise InputError(f"the text has {longest} tokens, the model takes at most {limit}", where="inputs",
                         hint="shorten it, or explain it in parts")
    named = {name: value for name, value in found.items() if name != "input_ids"}
    return Given((), {kinds.name: rows, **_wanted(explainer, named)}, tokenizer)


def check_vocabulary(tokenizer: Any, kinds: Kinds) -> None:
    """InputError where a tokenizer knows more tokens than the model, those added to it apart; a warning where it knows
    less than half of them."""
    size = getattr(tokenizer, "vocab_size", None)
    if not isinstance(size, int) or kinds.vocabulary is None:
        return
    if size > kinds.vocabulary:
        raise InputError(f"the tokenizer has {size} tokens, the model {kinds.vocabulary}: it is another model's",
                         where="tokenizer", hint="load both from the same place")
    if 2 * len(tokenizer) < kinds.vocabulary:
        log.warning("the tokenizer has %s tokens, the model %s: are they of the same model?", len(tokenizer),
                    kinds.vocabulary)


def check_ids(rows: Sequence[Any], kinds: Kinds, tokenizer: Any = None) -> None:
    """InputError for token ids that the model does not know: the tokenizer is another model's, or ids are wrong."""
    for row in rows:
        ids = as_numpy(row)
        if not ids.size:
            raise InputError("the text has no tokens", where="inputs", hint="give at least one word")
        if ids.dtype.kind not in "iu" or kinds.vocabulary is None:
            continue
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= kinds.vocabulary:
            wrong = low if low < 0 else high
            whose = "" if tokenizer is None else f", the tokenizer {len(tokenizer)}"
            raise InputError(f"token id {wrong} is not in the model's vocabulary of {kinds.vocabulary}{whose}",
                             where="inputs" if tokenizer is None else "tokenizer",
                             hint=f"ids go from 0 to {kinds.vocabulary - 1}: give the tokenizer that belongs to this "
                                  "model")


def _named(explainer: Explainer, inputs: Mapping[str, Any], tokenizer: Any, kinds: Kinds) -> Given:
    """A dict of the model's inputs, as a tokenizer or processor returns; or of texts to be tokenized."""
    if kinds.input == "text" and "text" in inputs and "text" not in explainer.manifest.inputs.trees:
        unknown = [name for name in inputs if name not in _TEXT_KEYS]
        if unknown:
            raise InputError(f"{unknown[0]!r} is given beside a text", where="inputs",
                             hint='give {"text": ...}, {"text": ..., "text_pair": ...}, or what a tokenizer returns')
        texts, pairs = texts_of(inputs["text"]), texts_of(inputs.get("text_pair"))
        if texts is None or (pairs is not None and len(pairs) != len(texts)):
            raise InputError(f"there are {len(texts or ())} texts and {len(pairs or ())} second texts", where="inputs",
                             hint="give one second text for each")
        return encoded(explainer, texts, pairs, tokenizer, kinds)
    specs = {spec.name: spec for spec in explainer.manifest.inputs.tensors}
    found = {name: _fitting(explainer, specs[name], value) if name in specs else value
             for name, value in inputs.items()}
    if kinds.name in found and kinds.input == "text":
        value = found[kinds.name]
        check_ids(value if isinstance(value, list) else [value], kinds)
    return Given((), _masked(explainer, _wanted(explainer, found), kinds), tokenizer)


def _masked(explainer: Explainer, named: dict[str, Any], kinds: Kinds) -> dict[str, Any]:
    """With a mask that hides nothing, where the model takes one and token ids were given without."""
    ids = named.get(kinds.name)
    mask = next((spec for spec in explainer.manifest.inputs.tensors if "attention_mask" in spec.name
                 and len(spec.shape) == 2), None)
    if kinds.input != "text" or ids is None or isinstance(ids, list) or mask is None or mask.name in named:
        return named
    return {**named, mask.name: explainer._engine.array(np.ones(tuple(ids.shape), _NUMPY[mask.dtype]))}


def _wanted(explainer: Explainer, named: Mapping[str, Any]) -> dict[str, Any]:
    """Without inputs that the model was not captured with, where they say nothing: a mask of ones, segments of 0."""
    known, found = explainer.manifest.inputs.trees, {}
    for name, value in named.items():
        silent = {"attention_mask": 1, "token_type_ids": 0}.get(name)
        if name not in known and silent is not None and all(
                bool((as_numpy(row) == silent).all()) for row in value):
            continue
        found[name] = value
    return found


def _positional(explainer: Explainer, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    specs = {spec.name: spec for spec in explainer.manifest.inputs.tensors}
    names = explainer.manifest.inputs.positional
    own = tuple(_fitting(explainer, specs[name], value) if name in specs else value
                for name, value in zip(names, inputs, strict=False))
    return (*own, *inputs[len(own):])


def _fitting(explainer: Explainer, spec: TensorSpec, value: Any) -> Any:
    """A tensor on the model's device, with a batch axis; lists and numpy arrays in the model's element type."""
    if isinstance(value, list | tuple) and value and len(getattr(value[0], "shape", ())):
        if spec.dtype.startswith("f") and len({tuple(one.shape) for one in value}) == 1:
            value = np.stack([as_numpy(one) for one in value])
        else:
            return list(value)  # rows of different lengths, which the explainer pads
    if not hasattr(value, "detach"):
        try:
            array = np.asarray(value)
        except ValueError:
            return value
        if array.dtype.kind not in "biuf":
            raise InputError(f"input `{spec.name}` is {type(value).__name__} {value!r:.40}, not numbers",
                             where="inputs", hint=f"the model takes {spec}")
        value = explainer._engine.array(array.astype(_NUMPY.get(spec.dtype, "float32")))
    elif hasattr(explainer._engine, "device"):
        value = value.to(explainer._engine.device)
    return value[None] if len(value.shape) == len(spec.shape) - 1 else value


def _seen(explainer: Explainer, pictures: list[Any], processor: Any, kinds: Kinds) -> Given:
    """Pictures as the model sees them, by its processor or a function that makes a tensor [C,H,W] of a picture."""
    processor = _from_folder(explainer, "AutoImageProcessor") if processor is None else processor
    spec = _spec(explainer, kinds.name)
    pixels, others, shown = processed(pictures, processor, spec)
    given = {one.name: _fitting(explainer, one, others[one.name]) for one in explainer.manifest.inputs.tensors
             if one.name in others}
    return Given((), {kinds.name: _fitting(explainer, spec, pixels), **given}, pictures=shown)


def _from_folder(explainer: Explainer, kind: str) -> Any:
    """The tokenizer or processor that lies in the folder which the model was loaded from; None without."""
    name = getattr(explainer.model, "name_or_path", "")
    if not name or not Path(name).is_dir():
        return None
    try:
        import transformers

        found = getattr(transformers, kind).from_pretrained(name, local_files_only=True)
    except (ImportError, OSError, ValueError, KeyError):
        return None
    log.info("%s of the model's folder: %s", kind.removeprefix("Auto"), type(found).__name__)
    return found


def _spec(explainer: Explainer, name: str) -> TensorSpec:
    return next(spec for spec in explainer.manifest.inputs.tensors if spec.name == name)


def _longest(explainer: Explainer, kinds: Kinds) -> int:
    """How many tokens the model can take."""
    size = _spec(explainer, kinds.name).shape[1]
    return size if isinstance(size, int) else (explainer.manifest.inputs.sizes or {}).get(size, (1, 2**31))[1]
