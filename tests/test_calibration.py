"""Temperatures fitted on held-out logits, and the deterministic context."""

from __future__ import annotations

import os
import random
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import dlbc
from dlbc.errors import InputError
from dlbc_runtime.calibration import expected_calibration_error, tempered


def sampled(temperature: float, rows: int = 20_000, classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from their softmax at a temperature: that is the temperature to find."""
    random_numbers = np.random.default_rng(seed)
    logits = random_numbers.normal(size=(rows, classes)) * 3
    noise = random_numbers.gumbel(size=logits.shape)
    return logits, (logits / temperature + noise).argmax(1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5, 8.0])
def test_the_temperature_that_drew_the_labels_is_found(temperature: float) -> None:
    fitted = dlbc.fit_temperature(*sampled(temperature))
    assert fitted.temperature == pytest.approx(temperature, rel=0.06)
    assert fitted.ece_after < 0.02 and fitted.nll_after <= fitted.nll_before
    assert (fitted.samples, fitted.bins) == (20_000, 15)
    assert f"temperature {fitted.temperature:.4g} on 20000 samples" in str(fitted)


def test_a_miscalibrated_model_gets_better() -> None:
    fitted = dlbc.fit_temperature(*sampled(3.0))
    assert fitted.ece_before > 0.2 > 0.02 > fitted.ece_after


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_no_other_temperature_is_more_likely(seed: int, classes: int) -> None:
    logits, labels = sampled(1.5, 200, classes, seed)
    fitted = dlbc.fit_temperature(torch.from_numpy(logits), torch.from_numpy(labels))
    for other in (fitted.temperature * 0.97, fitted.temperature * 1.03):
        nll = F.cross_entropy(torch.from_numpy(logits) / other, torch.from_numpy(labels))
        assert fitted.nll_after < float(nll)
    own = F.cross_entropy(torch.from_numpy(logits) / fitted.temperature, torch.from_numpy(labels))
    assert fitted.nll_after == pytest.approx(float(own), rel=1e-9)


def test_one_number_is_a_binary_classifier() -> None:
    logits, labels = sampled(2.0, classes=2)
    margin = logits[:, 1] - logits[:, 0]
    for form in (margin, margin[:, None]):
        assert dlbc.fit_temperature(form, labels).temperature == pytest.approx(
            dlbc.fit_temperature(logits, labels).temperature, rel=1e-6)


def test_ece_by_hand() -> None:
    """Ten rows sure to 0.9, seven of them right: |0.9 - 0.7|; and at a temperature that makes it 0.75, 0.05."""
    logits = np.tile([np.log(9.0), 0.0], (10, 1))
    labels = np.array([0] * 7 + [1] * 3)
    assert expected_calibration_error(logits, labels) == pytest.approx(0.2)
    assert expected_calibration_error(logits, labels, temperature=2.0) == pytest.approx(0.05)
    assert expected_calibration_error(logits, labels, bins=1) == pytest.approx(0.2)


@pytest.mark.parametrize(("logits", "labels", "options", "says"), [
    (np.zeros((3, 2, 2)), [0, 1, 0], {}, ["[3, 2, 2]", "[N, C]"]),
    (np.zeros((3, 2), np.int64), [0, 1, 0], {}, ["int64"]),
    (np.zeros((3, 2)), [0, 1], {}, ["[2]", "[3, 2]"]),
    (np.zeros((0, 2)), [], {}, ["at least one"]),
    (np.zeros((3, 2)), [0.0, 1.0, 0.0], {}, ["float64", "whole numbers"]),
    (np.zeros((3, 2)), [0, 2, 1], {}, ["0 to 2", "2 classes", "0 to 1"]),
    (np.full((2, 2), np.nan), [0, 1], {}, ["NaN"]),
    (np.array([[1.0, 0.0], [0.0, 1.0]]), [0, 1], {}, ["100% of 2", "more held-out data"]),
    (np.array([[1.0, 0.0], [0.0, 1.0]]), [1, 0], {}, ["0% of 2", "belong to the logits"]),
    (np.zeros((3, 2)), [0, 1, 0], {"bins": 0}, ["bins is 0"]),
])
def test_bad_input(logits: np.ndarray, labels: list[float], options: dict[str, int], says: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        dlbc.fit_temperature(logits, np.asarray(labels) if labels else np.zeros(0, np.int64), **options)
    assert all(word in str(caught.value) for word in says), str(caught.value)


@pytest.mark.parametrize(("before", "function"), [
    ("", lambda z: z), ("softmax", lambda z: z.softmax(-1)), ("log_softmax", lambda z: z.log_softmax(-1)),
    ("sigmoid", torch.sigmoid)])
def test_tempered_is_the_model_with_its_logits_divided(before: str, function: object) -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    assert callable(function)
    for temperature in (0.5, 1.0, 3.0):
        np.testing.assert_allclose(tempered(function(logits).numpy(), temperature, before),
                                   function(logits / temperature).numpy(), rtol=1e-9)


# --- the deterministic context -----------------------------------------------------------------------

def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def flags() -> tuple[object, ...]:
    return (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark,
            os.environ.get("CUBLAS_WORKSPACE_CONFIG"))


def test_random_numbers_repeat_inside_and_go_on_outside() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    wanted = draw(), draw()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    first = draw()
    with dlbc.deterministic(7):
        inside = draw()
    with dlbc.deterministic(7):
        assert draw() == inside
        with dlbc.deterministic(8):
            assert draw() != inside
        after_nested = draw()
    with dlbc.deterministic(7):
        draw()
        assert draw() == after_nested
    assert (first, draw()) == wanted


def test_all_flags_are_put_back_also_after_an_error() -> None:
    before, benchmark = flags(), torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with pytest.raises(ZeroDivisionError), dlbc.deterministic(0, warn_only=True):
            assert flags() == (True, True, True, False, ":4096:8")
            raise ZeroDivisionError
        assert flags()[3]
    finally:
        torch.backends.cudnn.benchmark = benchmark
    assert flags() == before


def test_what_has_no_deterministic_kernel_says_so() -> None:
    with dlbc.deterministic(0):
        assert torch.are_deterministic_algorithms_enabled()
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.empty(3).put_(torch.tensor([0, 0]), torch.ones(2))


def test_one_thread_at_a_time() -> None:
    problems: list[str] = []

    def enter() -> None:
        try:
            with dlbc.deterministic(1):
                problems.append("entered")
        except InputError as problem:
            problems.append(str(problem))

    with dlbc.deterministic(0):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert "another thread" in problems[0] and "one thread at a time" in problems[0]
    enter()
    assert problems[1] == "entered"


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "0", True, None])
def test_seeds_that_are_none(seed: object) -> None:
    with pytest.raises(InputError, match="seed is"), dlbc.deterministic(seed):  # type: ignore[arg-type]
        pass
