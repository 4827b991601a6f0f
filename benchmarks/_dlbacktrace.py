"""dl-backtrace's own code for the CPU, beside dlbc and the baseline: the runs that `cost_peers.py` measures alone.

dl-backtrace 0.1.24 does not import without CUDA. What is stood in for, and nothing of its arithmetic is:

- `wt_fc_v3_ops`, `wt_embedding_v2_ops`, `wt_selfattention_v3_ops`, its CUDA extensions: built for one version of
  Python, loaded when it is imported, called with device="cuda" only. Empty modules here: a call is an AttributeError.
- `torch.export.export_for_training`: dl-backtrace asks for torch 2.6; in later ones the name is `export`.

It gets a copy of the model, and attention masks as constants of the shape that attention adds: masks that transformers
makes inside the model have operations that its forward pass does not know. It turns autograd off for good, sets one
thread and other flags of torch: they are put back once it is set up, so that all have the same threads, and after each
run. It goes on after operations that failed; here a failure is an error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from types import ModuleType
from typing import IO, Any

import torch
from _cases import BASELINE, Case, Run, bert_base, llama, mlp, resnet18
from torch import Tensor, nn

EXTENSIONS = ("wt_fc_v3_ops", "wt_embedding_v2_ops", "wt_selfattention_v3_ops")
PRESETS = ("dlb-0.1", "dlb")  # the first has the formulas of dl-backtrace 0.1


class _Prompt(nn.Module):
    """Logits of the last token, from token ids only."""

    def __init__(self, model: nn.Module, tokens: int) -> None:
        super().__init__()
        self.model = model
        ahead = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)
        self.register_buffer("mask", ahead[None, None])

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, attention_mask=self.mask, use_cache=False, logits_to_keep=1).logits
        return logits


class _Text(nn.Module):
    """Logits of classes, from token ids only."""

    def __init__(self, model: nn.Module, tokens: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mask", torch.ones(1, tokens, tokens))
        self.register_buffer("types", torch.zeros(1, tokens, dtype=torch.long))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, attention_mask=self.mask, token_type_ids=self.types).logits
        return logits


def _runs(case: Case, model: nn.Module, task: str = "multi-class classification") -> dict[str, Run]:
    def ours(preset: str) -> Run:
        return _with_autograd(_once(lambda: case.explanation(preset)))

    return {BASELINE: _with_autograd(case.baseline), **{f"dlbc {preset}": ours(preset) for preset in PRESETS},
            "dl-backtrace": _once(lambda: _dl_backtrace(model, case.inputs, task))}


def rows_of_a_table() -> dict[str, Run]:
    """MLP 30-64-2, one row."""
    return _runs(case := mlp(), case.model)


def prompt() -> dict[str, Run]:
    """LLaMA 8 x 512, 8 tokens."""
    return _runs(case := llama(8), _Prompt(case.model, 8), "generation")


def text() -> dict[str, Run]:
    """BERT-base, one text of 8 tokens."""
    return _runs(case := bert_base(1, 8), _Text(case.model, 8))


def picture() -> dict[str, Run]:
    """ResNet-18, one picture of 224 x 224."""
    return _runs(case := resnet18(1), case.model)


def _once(made: Callable[[], Run]) -> Run:
    """A run that is set up when it is first run: memory is measured of one in a process."""
    once = cache(made)

    def run() -> object:
        return once()()

    return run


def _with_autograd(run: Run) -> Run:
    def runs() -> object:
        with torch.enable_grad():
            return run()

    return runs


def _dl_backtrace(model: nn.Module, inputs: Tensor, task: str) -> Run:
    """Its forward pass and its relevance of every node, in its default mode."""
    failures: list[str] = []
    with stood_in(), _flags_kept(), _unseen():
        from dl_backtrace.pytorch_backtrace import DLBacktrace

        _Failures(failures).listen()
        explainer = DLBacktrace(deepcopy(model), (inputs,), device="cpu")

    def run() -> object:
        with _flags_kept(), _unseen():
            found = explainer.predict(inputs)
            if failures or "output" not in found:
                raise RuntimeError(failures[0] if failures else "its forward pass does not reach the output")
            return explainer.evaluation(mode="default", multiplier=100.0, task=task)

    return run


@contextlib.contextmanager
def stood_in() -> Iterator[None]:
    """While this holds, `dl_backtrace` can be imported, and export, without CUDA and on a newer torch."""
    import torch.export

    before: dict[str, Any] = {name: sys.modules.get(name) for name in EXTENSIONS}
    sys.modules.update({name: ModuleType(name) for name, there in before.items() if there is None})
    lacks = not hasattr(torch.export, "export_for_training")
    if lacks:
        torch.export.export_for_training = lambda *args, **kwargs: torch.export.export(  # type: ignore[attr-defined]
            *args, strict=True, **kwargs)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
        if lacks:
            del torch.export.export_for_training  # type: ignore[attr-defined]


@contextlib.contextmanager
def _flags_kept() -> Iterator[None]:
    threads, mkldnn, dtype = torch.get_num_threads(), torch.backends.mkldnn.enabled, torch.get_default_dtype()
    same, autograd = torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.mkldnn.enabled = mkldnn
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(same)
        torch.set_grad_enabled(autograd)


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """What it prints, logs and draws goes nowhere."""
    with contextlib.redirect_stdout(_nowhere()), contextlib.redirect_stderr(_nowhere()):
        yield


@cache
def _nowhere() -> IO[str]:
    return open(os.devnull, "w")  # stays open: its log keeps it


class _Failures(logging.Handler):
    """Keeps the messages of its log that say that an operation failed."""

    def __init__(self, kept: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._kept = kept

    def listen(self) -> None:
        logging.getLogger("dlbacktrace.execution_engine").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append(record.getMessage())
