"""Kernels that nobody asked for are tried first, and tiles can be measured. No GPU is needed: kernels run in Triton's
interpreter, in a process of its own (`triton_trial_runs.py`, `triton_tuning_runs.py`); what is known of GPUs is said to
be there, and the clock of one is made up.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dlbc
from dlbc import gpu
from dlbc.errors import InputError
from dlbc.trial import apart
from dlbc.tuning import Events

HERE = Path(__file__).parent


def test_interpreted() -> None:
    """Run what needs the interpreter."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly",
               str(HERE / "triton_trial_runs.py"), str(HERE / "triton_tuning_runs.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=False,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_largest_difference() -> None:
    """Of outputs by their own largest number, of relevance by that of all; what is no number differs by infinity."""
    right = {"output `y`": np.array([1.0, -4.0]), "relevance of `a`": np.array([100.0]),
             "relevance of `b`": np.array([0.1, 0.0])}

    def off(**changed: Any) -> tuple[float, str]:
        names = {"y": "output `y`", "a": "relevance of `a`", "b": "relevance of `b`"}
        return apart({**right, **{names[key]: np.array(value) for key, value in changed.items()}}, right)

    assert off() == (0.0, "nothing")
    assert off(y=[1.0, -4.4]) == (pytest.approx(0.1), "output `y`")
    assert off(b=[0.2, 0.0]) == (pytest.approx(1e-3), "relevance of `b`")
    assert off(a=[np.nan])[0] == off(a=[100.0, 0.0])[0] == off(b=[0.1, np.inf])[0] == np.inf
    nothing = {"output `y`": np.array([np.nan, -np.inf])}
    assert apart(nothing, nothing) == (0.0, "nothing")


def test_a_model_without_numbers_is_torch_s_and_the_plan_says_so() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(3, 2).eval(), torch.zeros(2, 3)
    explainer = dlbc.compile(model, x)
    assert explainer.manifest.backend == "torch" and "meta device, where kernels cannot be tried" in str(
        explainer.plan())


def test_what_is_known_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts are for these. Without Triton, there is nothing of it to know."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: (9, 0))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    found = gpu.facts(torch.device("cuda", 0))
    assert found["gpu"] == "Some GPU (sm_90)" and found["driver"].endswith("13000")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert gpu.facts(torch.device("cuda", 0)) == {**found, "triton": ""}


@pytest.mark.parametrize(("options", "said"), [
    ({"backend": "torch"}, "tune=True measures kernels, and backend='torch' has none"),
    ({"backend": "numpy"}, "tune=True measures kernels, and backend='numpy' has none"),
    ({}, "tune=True measures kernels on a GPU, and the model is not on one"),
    ({"backend": "triton", "target": "sm_90"}, "tune=True measures kernels on a GPU, and the model is not on one"),
])
def test_there_is_something_to_measure_or_it_is_said(options: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        dlbc.compile(nn.Linear(3, 2).eval(), torch.zeros(2, 3), tune=True, **options)


def test_a_gpu_s_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch is asked: memory is written, then an event, the kernel, an event; nothing waits before it is read."""
    asked: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            asked.append("record")

        def synchronize(self) -> None:
            asked.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda where: contextlib.nullcontext())
    clock = Events(torch.device("cpu"))
    monkeypatch.setattr(clock, "flushed", Flushed(asked))
    taken = clock.time(lambda: asked.append("run"), cold=True)
    assert asked == ["flush", "record", "run", "record"] and taken() == 2.5 and asked[-1] == "synchronize"
    asked.clear()
    assert clock.time(lambda: asked.append("run"), cold=False)() == 2.5
    assert asked == ["flush", "run", "record", "run", "record", "synchronize"]  # what it reads is in the cache


class Flushed:
    """Memory that is written."""

    def __init__(self, asked: list[str]) -> None:
        self.asked = asked

    def zero_(self) -> None:
        self.asked.append("flush")
