"""DL-Backtrace's names on top of dlbc: change the import, keep the program (`docs/compat.md`).

`from dl_backtrace.pytorch_backtrace import DLBacktrace` becomes `from dlbc.compat import DLBacktrace`; so for
`DLBAutoSampler`, `save_relevance` and `load_relevance`. `moe_pytorch_backtrace.Backtrace`, for mixtures of experts, is
`dlbc.compat.moe.Backtrace`, which is `MoEBacktrace` here.
"""

from __future__ import annotations

from dlbc.compat.backtrace import DLBacktrace
from dlbc.compat.files import load_relevance, save_relevance
from dlbc.compat.moe import Backtrace as MoEBacktrace
from dlbc.compat.sampler import DLBAutoSampler

__all__ = ["DLBAutoSampler", "DLBacktrace", "MoEBacktrace", "load_relevance", "save_relevance"]
