"""Temperature: logits divided by it, fitted on held-out data so that probabilities say how often a model is right.

Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599. A temperature never changes which class is
predicted, and relevance of a logit is relevance of that logit over a temperature: explanations stay as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dlbc_runtime.arrays import Array, as_numpy
from dlbc_runtime.errors import InputError

LIMITS = (1e-2, 1e2)
"""Between these a temperature is sought."""


@dataclass(frozen=True)
class Calibration:
    """A fitted temperature and what it does on the held-out data. ECE: expected calibration error, the mean distance
    of confidence and accuracy over bins of confidence, 0 to 1. NLL: mean negative log likelihood, in nats."""

    temperature: float
    ece_before: float
    ece_after: float
    nll_before: float
    nll_after: float
    samples: int
    bins: int

    def __str__(self) -> str:
        return (f"temperature {self.temperature:.4g} on {self.samples} samples: ECE {self.ece_before:.4f} -> "
                f"{self.ece_after:.4f}, NLL {self.nll_before:.4f} -> {self.nll_after:.4f}")


def fit_temperature(logits: object, labels: object, *, bins: int = 15) -> Calibration:
    """The temperature that makes held-out labels most likely, with ECE before and after.

    `logits`: [N, C], or [N] or [N, 1] of a binary classifier's one number; `labels`: whole numbers [N], 0 .. C-1.
    The negative log likelihood is convex in 1 / temperature, so the fit is exact. InputError for shapes or labels that
    do not fit, NaN, and where there is no best temperature: all held-out samples predicted right, or logits that say
    nothing of the labels.
    """
    given, wanted = _checked(logits, labels, bins)
    low, high = 1 / LIMITS[1], 1 / LIMITS[0]
    if _slope(given, wanted, low) >= 0 or _slope(given, wanted, high) <= 0:
        right = float((given.argmax(1) == wanted).mean())
        raise InputError(f"no temperature between {LIMITS[0]:g} and {LIMITS[1]:g} is best: {right:.0%} of "
                         f"{len(wanted)} predictions are right", where="fit_temperature()",
                         hint="give more held-out data, not seen in training, on which the model is sometimes wrong; "
                              "and check that labels belong to the logits")
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _slope(given, wanted, middle) < 0 else (low, middle)
    temperature = 1 / math.sqrt(low * high)
    return Calibration(temperature, _ece(given, wanted, bins), _ece(given / temperature, wanted, bins),
                       _nll(given, wanted), _nll(given / temperature, wanted), len(wanted), bins)


def expected_calibration_error(logits: object, labels: object, *, bins: int = 15, temperature: float = 1.0) -> float:
    """ECE of logits [N, C] (or [N]) over `temperature`, for labels [N], with bins of equal width. InputError as in
    `fit_temperature`, and for a temperature that is not above 0."""
    given, wanted = _checked(logits, labels, bins)
    return _ece(given / check_temperature(temperature), wanted, bins)


def check_temperature(temperature: object) -> float:
    """A temperature as a number. InputError where it is not finite and above 0."""
    if (not isinstance(temperature, int | float) or isinstance(temperature, bool) or not math.isfinite(temperature)
            or temperature <= 0):
        raise InputError(f"temperature is {temperature!r}", where="temperature",
                         hint="give a number above 0: more makes probabilities more even, 1 leaves them as they are")
    return float(temperature)


def tempered(output: Array, temperature: float, before: str = "") -> Array:
    """What a model would return, its logits divided by `temperature`: [..., C] in the element type of `output`.

    `before`: the function that ends the model, as in `Manifest.before` ("softmax", "log_softmax", "sigmoid"; "" where
    it returns the logits themselves).
    """
    if temperature == 1 or output.dtype.kind != "f":
        return output
    values = output.astype(np.float64)
    with np.errstate(divide="ignore"):
        if before == "sigmoid":
            odds = (np.log(values) - np.log1p(-values)) / temperature
            found = 1 / (1 + np.exp(-odds))
        elif before in ("softmax", "log_softmax"):
            logits = (np.log(values) if before == "softmax" else values) / temperature
            logs = logits - _log_sum(logits)[..., None]
            found = np.exp(logs) if before == "softmax" else logs
        else:
            found = values / temperature
    return found.astype(output.dtype)


def _checked(logits: object, labels: object, bins: object) -> tuple[Array, Array]:
    """Logits float64 [N, C] with C >= 2, and labels int64 [N]."""
    where = "fit_temperature()"
    if not isinstance(bins, int) or isinstance(bins, bool) or bins < 1:
        raise InputError(f"bins is {bins!r}", where=where, hint="give a whole number from 1 on; 15 is usual")
    given, wanted = as_numpy(logits), as_numpy(labels)
    if given.ndim not in (1, 2) or given.dtype.kind != "f":
        raise InputError(f"logits are {given.dtype}{list(given.shape)}", where=where,
                         hint="give what the model returns for held-out rows: floats [N, C], or [N] of a binary one")
    if wanted.ndim == 2 and wanted.shape[1] == 1:
        wanted = wanted[:, 0]
    if wanted.shape != given.shape[:1] or not len(wanted):
        raise InputError(f"labels have shape {list(wanted.shape)}, logits {list(given.shape)}", where=where,
                         hint="give one label for each row of logits, and at least one")
    if wanted.dtype.kind not in "iub":
        raise InputError(f"labels are {wanted.dtype}", where=where, hint="give whole numbers: the class of each row")
    if not np.isfinite(given).all():
        raise InputError("logits hold NaN or infinity", where=where, hint="leave those rows out")
    given = given.astype(np.float64).reshape(len(given), -1)
    if given.shape[1] == 1:
        given = np.concatenate([np.zeros_like(given), given], 1)
    wanted = wanted.astype(np.int64)
    if wanted.min() < 0 or wanted.max() >= given.shape[1]:
        raise InputError(f"labels are {wanted.min()} to {wanted.max()}, the logits are of {given.shape[1]} classes",
                         where=where, hint=f"labels go from 0 to {given.shape[1] - 1}")
    return given, wanted


def _log_sum(logits: Array) -> Array:
    top = logits.max(-1, keepdims=True)
    found: Array = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    return found


def _slope(logits: Array, labels: Array, inverse: float) -> float:
    """The derivative of the NLL by 1 / temperature: the mean logit expected less that of the label. It only rises."""
    scaled = logits * inverse
    probabilities = np.exp(scaled - _log_sum(scaled)[:, None])
    return float(((probabilities * logits).sum(1) - logits[np.arange(len(labels)), labels]).mean())


def _nll(logits: Array, labels: Array) -> float:
    return float((_log_sum(logits) - logits[np.arange(len(labels)), labels]).mean())


def _ece(logits: Array, labels: Array, bins: int) -> float:
    probabilities = np.exp(logits - _log_sum(logits)[:, None])
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    gaps = np.abs(np.bincount(bin_of, confidence, bins) - np.bincount(bin_of, right.astype(float), bins))
    return float(gaps[counts > 0].sum() / len(labels))
