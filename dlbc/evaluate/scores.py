"""What is watched while units are perturbed: a number of the model's output for the target.

The raw logit of a language model is refused. Softmax does not see what all logits have in common, but the raw logit
does, and by perturbation it moves with the norm of the last hidden state: it ranks explanation methods upside down.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dlbc.errors import InputError
from dlbc_runtime.arrays import Array

Score = Callable[[Array, int], Array]
"""Scores float64 [K] of the target, from outputs float64 [K, V]."""


def probability(outputs: Array, target: int) -> Array:
    """`softmax(y)_t`."""
    return np.exp(log_probability(outputs, target))


def log_probability(outputs: Array, target: int) -> Array:
    """`y_t - log sum exp y`."""
    return _log_probabilities(outputs)[:, target]


def centred_logit(outputs: Array, target: int) -> Array:
    """`y_t - mean_v y_v`."""
    logits = _log_probabilities(outputs) if is_distribution(outputs) else outputs
    found: Array = logits[:, target] - logits.mean(1)
    return found


def sigmoid(outputs: Array, target: int) -> Array:
    """`1 / (1 + exp(-y_t))`: of a model with one output, or with several labels that do not exclude each other."""
    found: Array = 0.5 * (1 + np.tanh(0.5 * outputs[:, target]))
    return found


def output(outputs: Array, target: int) -> Array:
    """`y_t` itself: of a model that gives numbers rather than choices."""
    return outputs[:, target]


SCORES: dict[str, Score] = {"probability": probability, "log_probability": log_probability,
                            "centred_logit": centred_logit, "sigmoid": sigmoid, "output": output}


def score_named(name: str) -> Score:
    """The score of a name. InputError when there is none such."""
    found = SCORES.get("output" if name == "logit" else name)
    if found is None:
        raise InputError(f"unknown score {name!r}", where="score", hint=f"one of {', '.join(SCORES)}")
    return found


def check_score(name: str, *, outputs: int, language_model: bool) -> None:
    """InputError for a score that says nothing about such a model."""
    if name in ("logit", "output") and language_model:
        raise InputError("the raw logit of a language model is no measure: it rises and falls with all logits alike, "
                         "which changes no prediction, and ranks methods upside down", where="score",
                         hint="use probability, log_probability or centred_logit")
    if outputs == 1 and name not in ("logit", "output", "sigmoid"):
        raise InputError(f"the model has one output, of which {name} is always the same", where="score",
                         hint='score="output" watches the number itself, score="sigmoid" the probability of a yes')


def is_distribution(outputs: Array) -> bool:
    """Whether outputs are probabilities already: no negative ones, and rows that add up to 1."""
    return outputs.shape[1] > 1 and bool((outputs >= 0).all() and np.allclose(outputs.sum(1), 1, atol=1e-4))


def _log_probabilities(outputs: Array) -> Array:
    if is_distribution(outputs):
        return np.log(np.maximum(outputs, np.finfo(np.float64).tiny))
    shifted = outputs - outputs.max(1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return found
