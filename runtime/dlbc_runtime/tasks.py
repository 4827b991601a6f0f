"""A task in one call: inputs as people have them, the right target, the explanation, and traces of it all."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dlbc_runtime.arrays import Array, Arrays, Json
from dlbc_runtime.calibration import check_temperature, tempered
from dlbc_runtime.errors import InputError
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.target import Target, pixel_probabilities
from dlbc_runtime.tasks_files import Format, check_place, save_relevance
from dlbc_runtime.tasks_inputs import Given, prepare
from dlbc_runtime.tasks_kinds import Kinds, Task, choose, kinds_of, labels_of
from dlbc_runtime.tasks_result import TaskResult

if TYPE_CHECKING:
    from dlbc_runtime.explainer import Explainer

log = logging.getLogger(__name__)
MODES = ("default", "contrastive")


@dataclass(frozen=True)
class Options:
    """What a task was asked for, besides its inputs."""

    multiplier: float = 100.0
    scaler: float = 1.0
    thresholding: float = 0.5
    temperature: float = 1.0
    target: object = None
    scores: bool = False
    relevance: bool = False
    layers: bool = False
    debug: bool = False
    save: tuple[Path, Format] | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)


def run_task(explainer: Explainer, task: str = "auto", inputs: object = None, tokenizer: Any = None, *,
             mode: str = "default", multiplier: float = 100.0, scaler: float = 1.0, thresholding: float = 0.5,
             temperature: float = 1.0, return_scores: bool = False, return_relevance: bool = False,
             return_layerwise_output: bool = False, debug: bool = False, save_relevance: bool = False,
             save_path: str | os.PathLike[str] = "relevance_output", save_format: str = "safetensors",
             target: object = None, **generation_kwargs: Any) -> TaskResult:
    """Run a task and explain it; `Explainer.run_task` says what the options are. InputError for whatever does not fit,
    before anything is run."""
    _check(explainer, mode, thresholding, generation_kwargs)
    options = Options(multiplier, scaler, float(thresholding), check_temperature(temperature), target, return_scores,
                      return_relevance or save_relevance, return_layerwise_output, debug,
                      check_place(save_path, save_format) if save_relevance else None, generation_kwargs)
    kinds = kinds_of(explainer)
    chosen, reason = choose(explainer, task, kinds)
    if chosen != "generation" and generation_kwargs:
        raise InputError(f"`{next(iter(generation_kwargs))}` is no option of {chosen}", where="run_task()",
                         hint='options beyond those of run_task are for task="generation"')
    if chosen == "generation":
        from dlbc_runtime.tasks_generation import generate

        result = generate(explainer, inputs, tokenizer, options, kinds, reason)
    else:
        given = prepare(explainer, inputs, tokenizer, kinds)
        result = _explained(explainer, chosen, reason, given, options, kinds)
    if options.debug:
        _log_details(result)
    return result if options.save is None else _saved(explainer, result, options)


def _check(explainer: Explainer, mode: str, thresholding: float, generation_kwargs: Mapping[str, Any]) -> None:
    if mode not in MODES:
        raise InputError(f"mode={mode!r}", where="mode", hint='"default": the rules that the explainer was compiled '
                                                              'with; "contrastive": those with two relevances')
    if mode == "contrastive" and explainer.manifest.streams == 1:
        raise InputError(f"this explainer's rules, {explainer.manifest.composite!r}, are not contrastive", where="mode",
                         hint='compile with rules="dlb-contrastive"')
    if (not isinstance(thresholding, int | float) or isinstance(thresholding, bool) or not math.isfinite(thresholding)
            or not 0 <= thresholding < 1):
        raise InputError(f"thresholding is {thresholding!r}", where="thresholding",
                         hint="give a probability from 0 to below 1: pixels and objects above it are explained")
    positional = [name for name in ("keep", "output", "positions", "reference") if name in generation_kwargs]
    if positional:
        raise InputError(f"`{positional[0]}` is an option of calls of the explainer, not of run_task",
                         where="run_task()", hint=f"call explainer(..., {positional[0]}=...)")


def _explained(explainer: Explainer, task: Task, reason: str, given: Given, options: Options, kinds: Kinds
               ) -> TaskResult:
    """A task with one forward pass and one explanation of it."""
    manifest = explainer.manifest
    described: dict[int, str] = {}
    if task == "segmentation":
        target: object = _region(explainer, given, options, kinds)
    elif task == "object-detection" and not isinstance(options.target, Target | list):
        target, described = _object(explainer, given, options, kinds)
    else:
        target = options.target
    found = explainer(*given.args, target=target, keep="modules" if options.layers else None,
                      multiplier=options.multiplier, scaler=options.scaler,
                      output=None if kinds.explained == manifest.output else kinds.explained, **given.kwargs)
    if described:
        found = replace(found, target=tuple(replace(one, text=described[one.row]) for one in found.target))
    explanation = _named(explainer, found, given)
    predictions = tempered(explanation.outputs[kinds.explained], options.temperature,
                           manifest.before if kinds.explained == manifest.output else "")
    node_io = Arrays({**explanation.inputs, **explanation.activations, **explanation.outputs})
    relevance = Arrays({**explanation.relevance, **explanation.nodes})
    return TaskResult(
        task, reason, explanation, node_io, relevance, predictions=predictions,
        scores_trace=[{"output": predictions}] if options.scores else None,
        relevance_trace=[dict(relevance)] if options.relevance else None,
        layerwise_output_trace=[dict(explanation.activations)] if options.layers else None)


def _named(explainer: Explainer, explanation: Explanation, given: Given) -> Explanation:
    """The explanation with the text of its tokens, its pictures, its columns, and the names of its classes."""
    if hasattr(given.tokenizer, "convert_ids_to_tokens"):
        explanation = explanation.with_tokens(given.tokenizer)
    if given.pictures:
        explanation = explanation.with_image(list(given.pictures))
    if given.features:
        explanation = explanation.with_features(given.features)
    labels = labels_of(explainer.model)
    return explanation.with_labels(labels) if labels else explanation


# --- segmentation and detection ----------------------------------------------------------------------

def _region(explainer: Explainer, given: Given, options: Options, kinds: Kinds) -> object:
    """The pixels of one class whose probability is above the threshold: of the class asked for, otherwise of the one
    with the most such pixels in each row."""
    asked = options.target
    # A final softmax of the model is skipped: what it returns are probabilities already.
    logits = not explainer.manifest.before
    if isinstance(asked, int) and not isinstance(asked, bool):
        return Target.mask(asked, options.thresholding, logits=logits)
    if asked is not None:
        return asked
    outputs, _ = explainer.forward(*given.args, **given.kwargs)
    scores = Arrays(outputs)[kinds.explained]
    pixels = scores.reshape(*scores.shape[:2], -1)
    likely = pixel_probabilities(pixels) if logits else pixels
    areas = (likely > options.thresholding).sum(-1)
    empty = np.flatnonzero(~areas.any(1))
    if len(empty):
        row = int(empty[0])
        raise InputError(f"no pixel of row {row} is of any class with a probability above {options.thresholding:g}; "
                         f"the highest is {float(likely[row].max()):.3g}", where="thresholding",
                         hint="lower thresholding")
    return Target.mask(areas.argmax(1).tolist(), options.thresholding, logits=logits)


def softmax(scores: Array, axis: int) -> Array:
    """The softmax along an axis, in float64."""
    powers = np.exp(scores.astype(np.float64) - scores.max(axis, keepdims=True))
    found: Array = powers / powers.sum(axis, keepdims=True)
    return found


def _object(explainer: Explainer, given: Given, options: Options, kinds: Kinds) -> tuple[Target, dict[int, str]]:
    """The surest object of each row (of the class asked for) as a target, and what it is called."""
    outputs, _ = explainer.forward(*given.args, **given.kwargs)
    scores = Arrays(outputs)[kinds.explained]
    likely = object_probabilities(scores, getattr(explainer.model, "config", None))
    wanted = options.target
    if wanted is not None:
        if not isinstance(wanted, int | np.integer) or isinstance(wanted, bool) or not 0 <= wanted < likely.shape[2]:
            raise InputError(f"target {wanted!r} is no class", where="target",
                             hint=f"give a class, 0 to {likely.shape[2] - 1}, or dlbc.Target.box(query, class)")
        likely = np.where(np.arange(likely.shape[2]) == wanted, likely, -1.0)
    labels = labels_of(explainer.model)
    seed, names = np.zeros(scores.shape, np.float32), {}
    for row, of_row in enumerate(likely):
        query, index = (int(one) for one in np.unravel_index(int(of_row.argmax()), of_row.shape))
        surest = float(of_row[query, index])
        if surest <= options.thresholding:
            raise InputError(f"no object in row {row} has a probability above {options.thresholding:g}; the surest, "
                             f"query {query}, class {index}, has {surest:.3g}", where="thresholding",
                             hint="lower thresholding, or name the object: target=dlbc.Target.box(query, class)")
        # Relevance of a negative number has the sense that more relevance raises it, as for any other target.
        negative = explainer.manifest.seed == "signed" and scores[row, query, index] < 0
        seed[row, query, index] = -1 if negative else 1
        names[row] = f"{labels.get(index, f'class {index}')} of query {query} (p={surest:.2f})"
    return Target.tensor(seed), names


def object_probabilities(scores: Array, config: Any = None) -> Array:
    """Probabilities [B,Q,C] of a detector's logits, without a class that stands for "no object".

    With as many scores as the configuration has labels each is a sigmoid of its own (Deformable DETR); otherwise, and
    where no configuration says, they are a softmax whose last class is "no object" (DETR, YOLOS).
    """
    if getattr(config, "num_labels", None) == scores.shape[2]:
        found: Array = 1 / (1 + np.exp(-scores.astype(np.float64)))
        return found
    return softmax(scores, 2)[..., :-1]


# --- keeping and telling -----------------------------------------------------------------------------

def _saved(explainer: Explainer, result: TaskResult, options: Options) -> TaskResult:
    assert options.save is not None and result.relevance_trace is not None
    about: dict[str, Json] = {"task": result.task, "rules": explainer.manifest.composite,
                              "model": explainer.manifest.model, "multiplier": float(options.multiplier),
                              "scaler": float(options.scaler), "versions": dict(explainer.manifest.versions)}
    about |= {"explained": [_told(one) for one in result.explanations]}
    path = save_relevance(result.relevance_trace, *options.save, metadata=about)
    return replace(result, save_path=path)


def _told(explanation: Any) -> Json:
    """What is explained, in words, with the tokens of it."""
    if isinstance(explanation, Explanation):
        return {"target": [str(one) for one in explanation.target],
                "tokens": [list(row) for row in explanation.tokens or ()]}
    return {"text": explanation.text, "tokens": list(explanation.tokens), "prompt_length": explanation.prompt_length,
            "explained": [int(one) for one in explanation.explained]}


def _log_details(result: TaskResult) -> None:
    """What `debug` tells: shapes, what was explained, and how much of the relevance arrived."""
    for name, array in result.node_io.items():
        log.info("%s: %s%s", name, array.dtype, list(array.shape))
    for one in result.explanations:
        if isinstance(one, Explanation):
            log.info("explained: %s", "; ".join(map(str, one.target)))
            log.info("%s", one.conservation())
    for name, array in result.relevance.items():
        log.info("relevance of %s: %s, sum %.6g", name, list(array.shape), float(array.sum(dtype=np.float64)))
