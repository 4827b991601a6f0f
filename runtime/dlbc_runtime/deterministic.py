"""A context in which random numbers and kernels are the same in every run; everything is put back on leaving it."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from dlbc_runtime.errors import InputError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_inside = threading.RLock()


@contextmanager
def deterministic(seed: int = 0, *, warn_only: bool = False) -> Iterator[None]:
    """Seed Python, numpy and torch (CPU and CUDA), and let torch use deterministic kernels only; then restore it all.

    Put back on leaving, also after an error: the states of the random number generators, torch's deterministic mode,
    cuDNN's choice of kernels, and cuBLAS's workspace setting (which cuBLAS reads when it is first used). May be nested
    in one thread. An operation that has no deterministic kernel is an error of torch; with `warn_only` a warning.

    Generators and flags belong to the process, not to the thread: what other threads do meanwhile sees them too, and
    random numbers that they draw are missing here. So only one thread at a time may be inside: a second one gets an
    InputError (it does not wait: it could wait for ever). InputError also for a seed that is no whole number in
    0 .. 2**32 - 1.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed!r}", where="deterministic()", hint="give a whole number from 0 to 2**32 - 1")
    if not _inside.acquire(blocking=False):
        raise InputError("another thread is in deterministic() now", where="deterministic()",
                         hint="seeds and flags belong to the whole process: enter it in one thread at a time")
    try:
        state = _State()
        try:
            state.set(seed, warn_only)
            yield
        finally:
            state.restore()
    finally:
        _inside.release()


class _State:
    """Everything that the context changes, as it was."""

    def __init__(self) -> None:
        import torch

        self.torch: Any = torch
        self.python, self.numpy = random.getstate(), np.random.get_state()
        self.generator = torch.random.get_rng_state()
        self.devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self.mode = (torch.are_deterministic_algorithms_enabled(),
                     torch.is_deterministic_algorithms_warn_only_enabled())
        self.cudnn = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
        self.workspace = os.environ.get(_WORKSPACE)

    def set(self, seed: int, warn_only: bool) -> None:
        torch = self.torch
        os.environ[_WORKSPACE] = self.workspace or ":4096:8"
        random.seed(seed)
        np.random.seed(seed)
        # torch.manual_seed would leave the seed behind, for a device that is first used after this.
        torch.default_generator.manual_seed(seed)
        if self.devices:
            torch.cuda.manual_seed_all(seed)
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False

    def restore(self) -> None:
        torch = self.torch
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.random.set_rng_state(self.generator)
        if self.devices:
            torch.cuda.set_rng_state_all(self.devices)
        torch.use_deterministic_algorithms(self.mode[0], warn_only=self.mode[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = self.cudnn
        if self.workspace is None:
            os.environ.pop(_WORKSPACE, None)
        else:
            os.environ[_WORKSPACE] = self.workspace
