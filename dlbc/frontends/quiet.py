"""Keeps the exporter's own messages off the user's terminal: what it says becomes our errors and logs."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

log = logging.getLogger(__name__)

EXPORTING = threading.RLock()
"""Held while a model is captured: torch.export is not made for several threads at once."""

_CHATTY = ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._export", "torch._dynamo")


class _Stream:
    """Standard error without the partial graphs that torch.export writes there when it fails."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.thread = stream, threading.get_ident()
        self.dropped = False

    def write(self, text: str) -> int:
        """Write, unless it is a graph written by the capturing thread, or the newline after one."""
        own = threading.get_ident() == self.thread
        if own and ("def forward(self, arg0_1" in text or (self.dropped and text == "\n")):
            self.dropped = text != "\n"
            log.debug("%s", text)
            return len(text)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, partial graphs or log lines of the exporter's own while it runs."""
    def hushed(record: logging.LogRecord) -> bool:
        log.debug("torch: %s", record.getMessage())
        return False

    loggers = [logging.getLogger(name) for name in _CHATTY]
    before = sys.stderr
    with EXPORTING, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
        sys.stderr = _Stream(before)
        for logger in loggers:
            logger.addFilter(hushed)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(hushed)
            sys.stderr = before
