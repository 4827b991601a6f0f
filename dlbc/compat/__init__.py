"""DL-Backtrace's names on top of dlbc: change the import, keep the program (`docs/compat.md`).

`from dl_backtrace.pytorch_backtrace import DLBacktrace` becomes `from dlbc.compat import DLBacktrace`; so for
`DLBAutoSampler`, `save_relevance` and `load_relevance`.
"""

from __future__ import annotations

from dlbc.compat.backtrace import DLBacktrace
from dlbc.compat.files import load_relevance, save_relevance
from dlbc.compat.sampler import DLBAutoSampler

__all__ = ["DLBAutoSampler", "DLBacktrace", "load_relevance", "save_relevance"]
