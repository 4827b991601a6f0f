"""Torch and Triton on a CUDA device: the same explanations as on the CPU, twice the same, in every element type."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

import dlbc
from dlbc_runtime.cuda_driver import Cuda
from dlbc_runtime.cuda_graphs import Graphed
from tests import zoo
from tests.narrow import HALF, MODELS, How, cast, check

pytestmark = pytest.mark.gpu


FEW = ("mlp", "lenet", "resnet18_small", "bert", "llama_ids_only", "gemma2", "vit", "moe_gpt_oss", "moe_qwen3",
       "moe_deepseek_v3")
REST = tuple(name for name in MODELS if name not in FEW)


def convolutions() -> contextlib.AbstractContextManager[None]:
    """cuDNN's that give the same bits twice, in float32 proper."""
    found: contextlib.AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, deterministic=True, allow_tf32=False)
    return found


@pytest.mark.parametrize(("name", "rules", "backend"), [
    *((name, rules, backend) for name in FEW for rules in ("attnlrp", "cp-lrp", "dlb", "input-x-gradient")
      for backend in ("torch", "triton")),
    *((name, rules, "triton") for name in REST for rules in ("cp-lrp", "dlb"))])
def test_float32(name: str, rules: str, backend: str) -> None:
    with convolutions():
        check(name, rules, How(backend, "cuda"))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("name", "rules", "backend"), [
    *((name, rules, backend) for name in FEW for rules in ("attnlrp", "dlb") for backend in ("torch", "triton")),
    *((name, "dlb", "triton") for name in REST)])
def test_half_precision(name: str, rules: str, backend: str, dtype: torch.dtype) -> None:
    with convolutions():
        check(name, rules, How(backend, "cuda", dtype))


@pytest.mark.parametrize("precision", ["tf32x3", "tf32"])
@pytest.mark.parametrize(("name", "rules"), [*((name, "attnlrp") for name in FEW), *((name, "dlb") for name in MODELS)])
def test_float32_by_tensor_cores(name: str, rules: str, precision: str) -> None:
    with convolutions():
        check(name, rules, How("triton", "cuda", precision=precision))


def test_auto_tries_kernels_and_keeps_them() -> None:
    """Twice: the second time from the cache."""
    case = zoo.CASES["mlp"]()
    for _ in range(2):
        explainer = dlbc.compile(case.model.cuda(), tuple(x.cuda() for x in case.args))
        assert explainer.manifest.backend == "triton" and explainer.plan().target.startswith("sm_")
        assert "kernels were tried on the example inputs" in str(explainer.plan())


def test_measured_tiles_change_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are measured once."""
    case = zoo.CASES["bert"]()
    args, kwargs = tree_map(lambda x: x.cuda() if isinstance(x, torch.Tensor) else x, (case.args, case.kwargs))
    given = args if args else kwargs
    model = case.model.cuda()
    plain = dlbc.compile(model, given, rules="dlb", backend="triton")(*args, **kwargs)
    tuned = dlbc.compile(model, given, rules="dlb", backend="triton", tune=True)
    assert "were measured on" in str(tuned.plan())
    monkeypatch.setattr("dlbc.tuning.Measuring.fastest", None)
    for explainer in (tuned, dlbc.compile(model, given, rules="dlb", backend="triton", tune=True)):
        for key, value in explainer(*args, **kwargs).relevance.items():
            np.testing.assert_allclose(value, plain.relevance[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    """Addresses out of bounds, and races for shared memory, in kernels of four models."""
    found = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if found is None:
        pytest.skip("needs compute-sanitizer, of the CUDA toolkit: kernels are not checked for races")
    command = [found, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all",
               sys.executable, "-m", "tests.gpu_sanitized", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
                          env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count(" done") == 8


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["mlp", "bert", "llama_ids_only", "moe_gpt_oss"])
def test_cuda_graphs_come_by_themselves_and_change_nothing(name: str, backend: str, caplog: pytest.LogCaptureFixture
                                                           ) -> None:
    """For other inputs of the same shapes, of both passes; each was compared to the last bit; their memory is known."""
    case = zoo.CASES[name]()
    args, kwargs = cast((case.args, case.kwargs), torch.float32, "cuda")
    graphed = dlbc.compile(case.model.cuda(), args if args else kwargs, rules="dlb", backend=backend, cache=False)
    plain = graphed.with_options(cuda_graphs=False)
    stream = torch.cuda.current_stream()
    for step in range(9):
        def rolled(x: object, by: int = step) -> object:
            return x.roll(by, -1) if isinstance(x, torch.Tensor) else x

        given = tree_map(rolled, (args, kwargs))
        found, expected = graphed(*given[0], **given[1]), plain(*given[0], **given[1])
        for key, value in expected.relevance.items():
            np.testing.assert_allclose(found.relevance[key], value, rtol=1e-5, atol=1e-7)
    assert torch.cuda.current_stream() == stream and "did not give the numbers" not in caplog.text
    module = graphed._load(graphed.default).module
    assert isinstance(module, Graphed)
    if name.startswith("moe") and backend == "torch":
        return  # torch's products for experts wait for the counts of rows: such code runs as ever
    (one,) = module.shelf
    assert one.forward.right and [each is not None and each.right for each in one.relevance.values()] == [True]
    assert one.size <= torch.cuda.memory_reserved() and "(1 shape now, " in str(graphed.plan())


def test_a_capture_that_fails_leaves_torch_as_it_was() -> None:
    """The stream is the caller's again, memory can be given back, other graphs are captured."""
    def waits() -> None:
        torch.ones(3, device="cuda").sum().item()

    torch.ones(3, device="cuda")
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        Cuda().capture(waits, None)
    assert torch.cuda.current_stream() == stream
    x = torch.rand(1000, 1000, device="cuda")  # also asks the generator
    reserved = torch.cuda.memory_reserved()
    big = torch.empty(2**28, device="cuda")
    del big
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved
    graph, y, _ = Cuda().capture(lambda: x * 2, None)
    graph.replay()
    torch.testing.assert_close(y, x * 2)
    assert Cuda().held(graph) >= y.nbytes
