"""Models in half precision, without a GPU: by torch, and by kernels in Triton's interpreter, in a process of its own
(`triton_narrow_runs.py`). test_devices.py holds all models of the zoo to the same on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import narrow
from tests.narrow import HALF, Checked, How, check

HERE = Path(__file__).parent


@pytest.mark.parametrize(("name", "rules", "dtype"), [
    *((name, rules, dtype) for dtype in HALF for name, rules in (
        ("mlp_tanh", "attnlrp"), ("mlp_batch_norm", "dlb"), ("lenet", "epsilon-plus"), ("convolutions", "attnlrp"),
        ("conv_transpose2d", "dlb"), ("pool_max_ceil", "attnlrp"), ("torch_encoder_masked", "attnlrp"))),
    ("llama_ids_only", "dlb", torch.bfloat16)])
def test_torch(name: str, rules: str, dtype: torch.dtype) -> None:
    check(name, rules, How(dtype=dtype))


def test_interpreted_kernels() -> None:
    """Run `triton_narrow_runs.py`."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly",
               str(HERE / "triton_narrow_runs.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=False,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_what_is_wrong_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near, or as near as the judge twice over; nothing else."""
    assert Checked(0.05, "", 0.1).right and not Checked(0.15, "", 0.1).right
    assert Checked(0.15, "", 0.1, 0.08).right and not Checked(0.15, "", 0.1, 0.07).right
    exact, target = narrow.wide("mlp", "dlb", torch.bfloat16)
    off = {key: value * np.float32(1.3) for key, value in exact.items()}
    monkeypatch.setattr(narrow, "wide", lambda *args: (off, target))
    with pytest.raises(AssertionError, match="mlp, dlb, "):
        check("mlp", "dlb", How(dtype=torch.bfloat16))


def test_what_torch_cannot_run_is_said() -> None:
    with pytest.raises(pytest.skip.Exception, match=r"torch does not run conv3d in this type on this device: .*not im"):
        check("conv3d", "dlb", How(dtype=torch.bfloat16))
