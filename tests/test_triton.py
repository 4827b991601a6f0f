"""The Triton backend without a GPU: what its kernels compute, in Triton's interpreter, in processes of its own.

What is tested is in `triton_interpreted.py`; here are its groups, and errors that need no kernel to run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import dlbc
from dlbc.errors import InputError
from dlbc.gpu import Choice, choose

pytest.importorskip("triton")
HERE = Path(__file__).parent
GROUPS = {
    "ops": "test_op or test_adjoint or test_functions or test_every or template",
    "graphs": "test_random_graphs",
    "mlp and cnn": "test_presets and (mlp or cnn)",
    "transformers": "test_presets and (transformer or llama)",
    "whole": "float16 or explainer or strides or wide or compile or again",
}


@pytest.mark.parametrize("group", GROUPS)
def test_interpreted(group: str) -> None:
    """Run a group of `triton_interpreted.py`."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly",
               str(HERE / "triton_interpreted.py"), "-k", GROUPS[group]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=False,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


MODEL, X = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(2, 4)


def test_source_and_plan_are_there_without_a_gpu_and_running_is_an_error() -> None:
    explainer = dlbc.compile(MODEL, X, backend="triton", target="sm_86", cache=False)
    assert "@triton.jit" in explainer.source and explainer.plan().target == "sm_86"
    assert 'target="triton:sm_86"' in explainer.ir("fused")
    with pytest.raises(InputError, match="written for a GPU, and its inputs are not on one"):
        explainer(X)


def test_auto_is_torch_on_a_cpu() -> None:
    explainer = dlbc.compile(MODEL, X, cache=False)
    assert explainer.manifest.backend == "torch"
    assert "writes no kernels" in str(explainer.plan())


@pytest.mark.parametrize(("options", "said"), [
    ({"backend": "triton"}, "the model is not on a GPU"),
    ({"backend": "triton", "target": "sm_70"}, "kernels cannot be written for `sm_70`"),
    ({"backend": "torch", "target": "sm_90"}, "has no target"),
    ({"backend": "triton", "target": "sm_90", "precision": "half"}, "precision='half'"),
])
def test_what_cannot_be_compiled_is_said(options: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        dlbc.compile(MODEL, X, cache=False, **options)


class _OnGpu(nn.Module):
    """A model whose tensors say where they are; those on a CPU are single numbers."""

    def __init__(self, *devices: str) -> None:
        super().__init__()
        self.devices = devices or ("cuda:0", "cpu")

    def parameters(self, recurse: bool = True) -> object:  # type: ignore[override]
        class Tensor:
            def __init__(self, device: str) -> None:
                self.device = torch.device(device)

            def dim(self) -> int:
                return int(self.device.type != "cpu")

        return map(Tensor, self.devices)

    def buffers(self, recurse: bool = True) -> object:  # type: ignore[override]
        return iter([])


@pytest.mark.parametrize(("capability", "chosen"), [((9, 0), "sm_90"), ((8, 9), "sm_89"), ((8, 7), "sm_86"),
                                                    ((12, 0), "sm_90"), ((7, 5), "")])
def test_auto_is_triton_on_a_gpu_it_knows(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int],
                                          chosen: str) -> None:
    """And then on trial: test_trial.py."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    if chosen:
        assert choose(_OnGpu(), "auto", None) == Choice("triton", chosen, trial=True)
        assert choose(_OnGpu(), "triton", None) == Choice("triton", chosen)
        return
    assert choose(_OnGpu(), "auto", None) == Choice(
        "torch", why="no kernels are written for Old GPU (sm_75): torch runs it")
    with pytest.raises(InputError, match=r"cannot be written for Old GPU \(sm_75\)"):
        choose(_OnGpu(), "triton", None)


def test_auto_is_torch_for_a_model_in_several_places() -> None:
    assert choose(_OnGpu("cuda:1", "cuda:0"), "auto", None) == Choice(
        "torch", why="the model is on cuda:0, cuda:1, and kernels need it on one GPU: torch runs it")
    assert choose(_OnGpu("cuda:1", "meta"), "auto", None).backend == "torch"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlbc.gpu.find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose(_OnGpu(), "auto", None) == Choice("torch", why="there are no kernels: Triton is not installed")
    with pytest.raises(InputError, match="Triton is not installed"):
        choose(MODEL, "triton", None)


def test_a_driver_that_is_too_old_is_said() -> None:
    from dlbc_runtime.triton_launch import _is_compilation

    with pytest.raises(InputError, match="driver is too old"):
        _is_compilation(RuntimeError("Triton Error [CUDA]: the PTX was compiled with an unsupported toolchain."))
    assert not _is_compilation(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize(("dtype", "precision", "dots", "way"), [
    (torch.bfloat16, "auto", 3, ""), (torch.bfloat16, "ieee", 4, ""), (torch.float16, "auto", 3, "tf32"),
    (torch.float16, "ieee", 3, "tf32x3"), (torch.float32, "auto", 3, "ieee"), (torch.float32, "tf32", 3, "tf32")])
def test_how_relevance_meets_weights(dtype: torch.dtype, precision: str, dots: int, way: str) -> None:
    """z and |W||x| of one layer, and |W| relevance: that as one product by default, exact where it is asked for."""
    model, x = nn.Linear(64, 64).eval().to(dtype), torch.zeros(8, 64, dtype=dtype)
    source = dlbc.compile(model, x, rules="dlb", backend="triton", target="sm_90", precision=precision, cache=False,
                          precompute="never").source
    assert source.count("tl.dot(") == dots
    assert source.count(f'input_precision="{way}"') == (0 if not way else 3 if dtype == torch.float32 else 1)


def test_a_saved_explainer_has_its_kernels(tmp_path: Path) -> None:
    explainer = dlbc.compile(MODEL, X, backend="triton", target="sm_80", precision="tf32", cache=False)
    explainer.save(tmp_path / "x.dlbc")
    loaded = dlbc.load(tmp_path / "x.dlbc", MODEL)
    assert loaded.source == explainer.source and loaded.plan() == explainer.plan()
    assert 'input_precision="tf32"' in loaded.source
