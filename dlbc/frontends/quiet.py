"""Captures leave no trace: not on the user's terminal (what the exporter says becomes our errors and logs), not in
the model."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from torch import nn

log = logging.getLogger(__name__)

EXPORTING = threading.RLock()
"""Held while a model is captured: torch.export is not made for several threads at once."""


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


def _handlers() -> list[logging.Handler]:
    """The handlers that what torch logs can reach."""
    loggers = [logging.getLogger(), *(one for name, one in logging.root.manager.loggerDict.items()
                                      if name.partition(".")[0] == "torch" and isinstance(one, logging.Logger))]
    return list(dict.fromkeys(handler for one in loggers for handler in one.handlers))


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, partial graphs or log lines of the exporter's own while it runs."""
    thread = threading.get_ident()

    def hushed(record: logging.LogRecord) -> bool:
        if record.thread != thread or not record.name.startswith("torch."):
            return True
        log.debug("%s: %s", record.name, record.getMessage())
        return False

    handlers = _handlers()
    before = sys.stderr
    with EXPORTING, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*assigned during export")
        sys.stderr = _Stream(before)
        for handler in handlers:
            handler.addFilter(hushed)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(hushed)
            sys.stderr = before


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode (without calling the model's own `eval`); afterwards its flags, attributes,
    lists and dicts are what they were, whatever the model's forward stored in itself."""
    before: list[tuple[dict[Any, Any] | list[Any], dict[Any, Any] | list[Any]]] = []
    for module in model.modules():
        attributes: dict[Any, Any] = vars(module)
        before += [(inner, inner.copy()) for inner in attributes.values() if isinstance(inner, dict | list)]
        before.append((attributes, attributes.copy()))
    for module in model.modules():
        module.training = False
    try:
        yield
    finally:
        for held, copy in before:
            _restore(held, copy)


def _restore(held: dict[Any, Any] | list[Any], copy: dict[Any, Any] | list[Any]) -> None:
    """Put back what changed, and only that: another thread may be running the model."""
    if isinstance(held, list):
        if list(map(id, held)) != list(map(id, copy)):
            held[:] = copy
        return
    assert isinstance(copy, dict)
    for key in held.keys() - copy.keys():
        del held[key]
    for key, value in copy.items():
        if key not in held or held[key] is not value:
            held[key] = value
