"""Run by test_trial.py under pytest in a process of its own, with TRITON_INTERPRET=1: `backend="auto"` on a machine
that says it has a GPU, whose kernels are interpreted.
"""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dlbc
from dlbc import cache, gpu, notes
from dlbc.backends.triton.table import TABLE
from dlbc.errors import DlbcError
from dlbc.trial import Trial
from dlbc_runtime import folders, triton_launch
from dlbc_runtime.explainer import Explainer
from tests.triton_attention_runs import interpret_with_any_numpy

interpret_with_any_numpy()
assert triton_launch.INTERPRETED, "run by test_trial.py"

X = torch.linspace(-1, 2, 8).reshape(2, 4)
TRIED = "kernels were tried on the example inputs (Some GPU, Triton 3): the largest difference to torch was "


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 3)).eval()


@pytest.fixture(autouse=True)
def facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """A GPU of which the rest of dlbc knows what is said here."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = {"gpu": "Some GPU", "driver": "1", "triton": "3"}
    monkeypatch.setattr(gpu, "devices_of", lambda model: [torch.device("cuda", 0)])
    monkeypatch.setattr(gpu, "supported", lambda where: "sm_90")
    monkeypatch.setattr(gpu, "facts", lambda where: dict(found))
    monkeypatch.setattr(gpu, "usable", lambda where: True)
    monkeypatch.setattr(triton_launch, "_failed", set())
    folders.say_once.cache_clear()
    return found


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for each trial."""
    found: list[str] = []
    real = Trial.compared

    def counted(self: Trial, *args: Any) -> Any:
        found.append(type(self.model).__name__)
        return real(self, *args)

    monkeypatch.setattr(Trial, "compared", counted)
    return found


def wrong(monkeypatch: pytest.MonkeyPatch, text: str = "{a} * tl.sigmoid({a} * 1.1)") -> None:
    """Kernels that compute something else."""
    monkeypatch.setitem(TABLE, "silu", text)


def said(explainer: Explainer) -> str:
    (note,) = explainer.plan().notes
    return note


def test_kernels_that_agree_are_used_and_not_tried_again(trials: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        first, second = dlbc.compile(net(), X), dlbc.compile(net(), X)
        other = dlbc.compile(net(), torch.cat([X, X]))  # of any batch
    assert trials == ["Sequential"] and not caplog.records
    for explainer in (first, second, other):
        assert explainer.manifest.backend == "triton" and said(explainer).startswith(TRIED)
        assert said(explainer).endswith("0.001 is allowed") and TRIED in str(explainer.plan())
        assert explainer.with_options(keep="all").plan().notes == explainer.plan().notes
    expected = dlbc.compile(net(), X, backend="torch")(X).relevance["input"]
    np.testing.assert_allclose(second(X).relevance["input"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changed", ["gpu", "driver", "triton"])
def test_another_machine_tries_again(changed: str, facts: dict[str, str], trials: list[str]) -> None:
    dlbc.compile(net(), X)
    facts[changed] = "another"
    dlbc.compile(net(), X)
    assert len(trials) == 2


def test_kernels_that_differ_are_not_used(monkeypatch: pytest.MonkeyPatch, trials: list[str],
                                          caplog: pytest.LogCaptureFixture) -> None:
    wrong(monkeypatch)
    with caplog.at_level(logging.WARNING):
        first, second = dlbc.compile(net(), X), dlbc.compile(net(), X)
    (record,) = caplog.records
    text = record.getMessage()
    assert trials == ["Sequential"]
    assert text.startswith("Sequential: kernels do not compute what torch does, which runs it: the largest difference "
                           "to torch was 0.")
    assert "of the largest number, in " in text and "where 0.001 is allowed" in text
    assert 'backend="torch" chooses torch without a trial, backend="triton" the kernels' in text
    report = Path(text.split("the file ")[1].split(". ")[0]).read_text()
    assert "# gpu: Some GPU" in report and "tl.sigmoid(" in report
    for explainer in (first, second):
        assert explainer.manifest.backend == "torch" and said(explainer) in text
        assert explainer(X).conservation().closes()
    chosen = dlbc.compile(net(), X, backend="triton", target="sm_90")
    assert chosen.manifest.backend == "triton" and not chosen.plan().notes and len(trials) == 1


def test_kernels_that_fail_are_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    wrong(monkeypatch, "math.not_there({a})")
    with caplog.at_level(logging.WARNING):
        explainer = dlbc.compile(net(), X)
    (record,) = caplog.records
    assert explainer.manifest.backend == "torch" and "kernels failed in their trial" in said(explainer)
    assert "not_there" in Path(record.getMessage().split("the file ")[1].split(". ")[0]).read_text()


def test_kernels_that_do_not_compile_are_not_used(monkeypatch: pytest.MonkeyPatch,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    """Numbers are right, for their ops run in torch: but then torch does that best."""
    from triton.runtime.interpreter import InterpretedFunction

    class CompilationError(Exception):
        pass

    def fails(*args: Any, **meta: Any) -> None:
        raise CompilationError("no such instruction")

    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    monkeypatch.setattr(triton_launch, "_on_gpu", lambda args: True)
    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda self, grid: fails)
    with caplog.at_level(logging.WARNING):
        explainer = dlbc.compile(net(), X)
    assert len(caplog.records) == 1 and explainer.manifest.backend == "torch"
    assert "does not compile (no such instruction), see " in said(explainer)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_memory_that_is_short_decides_nothing(backend: str, monkeypatch: pytest.MonkeyPatch, trials: list[str],
                                              caplog: pytest.LogCaptureFixture) -> None:
    real = Trial.numbers

    def short(self: Trial, explainer: Explainer, target: Any) -> Any:
        if explainer.manifest.backend == backend:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB")
        return real(self, explainer, target)

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(Trial, "numbers", short)
        explainer = dlbc.compile(net(), X)
    assert explainer.manifest.backend == "torch" and "kernels were not tried, torch runs it" in said(explainer)
    assert "give smaller" in caplog.text and "Tried to allocate 3 TiB" in caplog.text
    assert dlbc.compile(net(), X).manifest.backend == "triton"


def test_an_example_that_cannot_be_explained_is_no_trial(trials: list[str], caplog: pytest.LogCaptureFixture) -> None:
    explainer = dlbc.compile(net(), torch.full((2, 4), torch.inf))
    assert explainer.manifest.backend == "torch" and not trials and not caplog.records
    assert "the example inputs cannot be explained (InputError" in said(explainer)


def test_what_a_call_says_is_said_in_calls(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        explainer = dlbc.compile(nn.Sequential(net(), nn.Softmax(-1)).eval(), X)
        assert not caplog.records and explainer.manifest.backend == "triton"
        explainer(X)
    assert "the value before it is explained" in caplog.text and len(caplog.records) == 1


def test_nothing_of_the_trial_stays_in_memory() -> None:
    """Neither torch's explainer nor what kernels have loaded for the trial."""
    model = net()
    explainer = dlbc.compile(model, X, cache=False)
    gc.collect()
    assert [one for one in gc.get_objects() if type(one) is Explainer and one.model is model] == [explainer]
    assert explainer._straight is None


def test_without_a_cache_every_compile_tries(trials: list[str], cache_dir: Path) -> None:
    for _ in range(2):
        assert dlbc.compile(net(), X, cache=False).manifest.backend == "triton"
    assert len(trials) == 2 and not cache_dir.exists()


def test_a_process_that_ended_in_its_trial_is_the_last_one(monkeypatch: pytest.MonkeyPatch, trials: list[str],
                                                           caplog: pytest.LogCaptureFixture) -> None:
    def begun_by(process: int) -> None:
        for path in cache.folder().glob(f"*{cache.NOTE}"):
            path.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(notes, "forget", lambda name: None)
            patch.setattr(os, "getpid", lambda: process)
            patch.setattr(Trial, "compared", lambda self, *args: sys.exit())
            with pytest.raises(SystemExit):
                dlbc.compile(net(), X)

    begun_by(os.getpid())  # one that is still at it
    assert dlbc.compile(net(), X).manifest.backend == "triton" and len(trials) == 1
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    begun_by(ended.pid)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            explainer = dlbc.compile(net(), X)
            assert explainer.manifest.backend == "torch" and len(trials) == 1
            assert "the process that first tried them ended in it" in said(explainer)
    assert len(caplog.records) == 1


def test_what_is_stopped_is_forgotten(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    def stopped(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trial, "compared", stopped)
        dlbc.compile(net(), X)
    assert not list(cache_dir.glob(f"*{cache.NOTE}"))


def test_a_gpu_that_a_kernel_broke_is_an_error_and_the_next_process_has_torch(
        monkeypatch: pytest.MonkeyPatch, facts: dict[str, str]) -> None:
    with monkeypatch.context() as patch:
        wrong(patch, "math.not_there({a})")
        patch.setattr(gpu, "usable", lambda where: False)
        with pytest.raises(DlbcError, match="the GPU does nothing more for this process"):
            dlbc.compile(net(), X)
    assert dlbc.compile(net(), X).manifest.backend == "torch"


def test_sizes_that_were_fixed_are_tried_each(trials: list[str]) -> None:
    for _ in range(2):
        for batch in (2, 3):
            assert dlbc.compile(net(), torch.ones(batch, 4), dynamic=False).manifest.backend == "triton"
    assert len(trials) == 2


@pytest.mark.parametrize(("kernels", "kept"), [("{a} * tl.sigmoid({a})", True), ("{a} * tl.sigmoid({a} * 1.1)", False)])
def test_where_rounding_is_amplified_a_wider_copy_decides(kernels: str, kept: bool, monkeypatch: pytest.MonkeyPatch
                                                          ) -> None:
    """Torch is not near enough to itself here: kernels only have to be as near as it is to what is right."""
    real = Trial.numbers

    def rounded(self: Trial, explainer: Explainer, target: Any) -> Any:
        found, target = real(self, explainer, target)
        if next(self.model.parameters()).dtype == torch.float32 and explainer.manifest.backend == "torch":
            found = {name: x * np.float32(1.002) for name, x in found.items()}
        return found, target

    monkeypatch.setattr(Trial, "numbers", rounded)
    wrong(monkeypatch, kernels)
    explainer = dlbc.compile(net(), X)
    assert explainer.manifest.backend == ("triton" if kept else "torch")
    assert ("a copy in float64 is " in said(explainer)) == kept


def test_notes_that_are_damaged_are_none_and_clear_removes_all(cache_dir: Path, trials: list[str]) -> None:
    dlbc.compile(net(), X)
    for path in cache_dir.glob(f"*{cache.NOTE}"):
        path.write_text("[")
    dlbc.compile(net(), X)
    assert len(trials) == 2 and cache.clear() == 2 and not list(cache_dir.iterdir())
