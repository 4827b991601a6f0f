"""Torch and Triton on a CUDA device: the same explanations as on the CPU, deterministic, in half precision too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

import dlbc
from dlbc_runtime.explanation import Explanation
from tests import zoo

pytestmark = pytest.mark.gpu


def explained(name: str, device: str, rules: str, dtype: torch.dtype = torch.float32,
              backend: str = "torch") -> Explanation:
    case = zoo.CASES[name]()

    def move(leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.to(device, dtype) if leaf.is_floating_point() else leaf.to(device)

    model = case.model.to(device, dtype)
    args, kwargs = tree_map(move, (case.args, case.kwargs))
    explainer = dlbc.compile(model, args if args else kwargs, rules=rules, backend=backend, cache=False)
    first, again = explainer(*args, **kwargs), explainer(*args, **kwargs)
    for key, value in first.relevance.items():
        np.testing.assert_array_equal(value, again.relevance[key])
    return first


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rules", ["attnlrp", "cp-lrp", "dlb", "input-x-gradient"])
@pytest.mark.parametrize("name", ["mlp", "lenet", "resnet18_small", "bert", "llama_ids_only", "gemma2", "vit"])
def test_cuda_equals_cpu(name: str, rules: str, backend: str) -> None:
    if zoo.CASES[name]().args and zoo.CASES[name]().kwargs:
        pytest.skip("this case mixes positional and keyword inputs")
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = explained(name, "cuda", rules, backend=backend)
    for key, value in explained(name, "cpu", rules).relevance.items():
        difference = np.linalg.norm(found.relevance[key] - value) / np.linalg.norm(value)
        assert difference <= 1e-4, (key, difference)


def test_auto_can_write_kernels_for_this_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlbc.gpu.AUTOMATIC", True)
    case = zoo.CASES["mlp"]()
    explainer = dlbc.compile(case.model.cuda(), tuple(x.cuda() for x in case.args), cache=False)
    assert explainer.manifest.backend == "triton" and explainer.plan().target.startswith("sm_")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "llama_ids_only"])
def test_half_precision_stays_near_float32(name: str, dtype: torch.dtype, backend: str) -> None:
    half, full = explained(name, "cuda", "attnlrp", dtype, backend), explained(name, "cpu", "attnlrp")
    for key, value in full.relevance.items():
        assert half.relevance[key].dtype == np.float32
        difference = np.linalg.norm(half.relevance[key] - value) / np.linalg.norm(value)
        assert difference <= 0.1, difference
