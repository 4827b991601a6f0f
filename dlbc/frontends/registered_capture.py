"""Registered forwards (`dlbc.register_moe`) while a model is captured, and whether they do what the modules do."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dlbc.errors import ExportError
from dlbc.moe import Forward, forward_of

log = logging.getLogger(__name__)

EXACT, ROUNDED = 1e-4, 3e-2
"""How far a registered forward may be from the module's own, of the largest number: float32 and float64, others."""


def registered(model: nn.Module) -> dict[str, tuple[nn.Module, Forward]]:
    """The modules that have a registered forward, by path, with it."""
    found = {path: (module, forward_of(type(module))) for path, module in model.named_modules()}
    return {path: (module, forward) for path, (module, forward) in found.items() if forward is not None}


@contextmanager
def registered_forwards(model: nn.Module) -> Iterator[None]:
    """While it is entered, modules run by their registered forwards in this thread; in other threads by their own."""
    with _replaced({module: partial(_in_thread, threading.get_ident(), forward, module, _own(module))
                    for module, forward in registered(model).values()}):
        yield


def check_registered(model: nn.Module, run: Callable[[], object]) -> None:
    """Compare every registered forward with its module's own, on what the module gets when `run` runs the model.
    ExportError, with where and how far, for the first that differs or fails. Nothing can be compared on `meta`."""
    found = registered(model)
    if not found:
        return
    if any(weight.is_meta for weight in (*model.parameters(), *model.buffers())):
        log.info("the registered forwards of %s are not checked: it is on the meta device", type(model).__name__)
        return
    with _replaced({module: partial(_compared, path or "the model", module, forward, _own(module), [])
                    for path, (module, forward) in found.items()}):
        run()


def _own(module: nn.Module) -> Callable[..., Any]:
    """A module's own forward: that of the instance, as some libraries set it, or of its class."""
    own: Callable[..., Any] = module.forward
    return own


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules with other forwards; afterwards each has what it had."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own


def _in_thread(thread: int, forward: Forward, module: nn.Module, own: Callable[..., Any], /, *args: Any,
               **kwargs: Any) -> Any:
    return forward(module, *args, **kwargs) if threading.get_ident() == thread else own(*args, **kwargs)


def _compared(path: str, module: nn.Module, forward: Forward, own: Callable[..., Any], done: list[bool], /, *args: Any,
              **kwargs: Any) -> Any:
    """The module's own result; at the first call also the registered forward's, which must be that."""
    if done:
        return own(*args, **kwargs)
    done.append(True)
    given, named = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    wanted = own(*args, **kwargs)
    where, name = f"{path} ({type(module).__name__})", type(module).__name__
    hint = f"`register_moe({name}, ...)`: the function must compute what `{name}.forward` does"
    try:
        found = forward(module, *given, **named)
    except Exception as problem:
        raise ExportError(f"the registered forward fails with {type(problem).__name__}: {problem}", where=where,
                          hint=hint) from problem
    (ours, our_tree), (theirs, their_tree) = pytree.tree_flatten(found), pytree.tree_flatten(wanted)
    if our_tree != their_tree:
        raise ExportError(f"the registered forward returns {_form(found)}, the module {_form(wanted)}", where=where,
                          hint=hint)
    for x, y in zip(ours, theirs, strict=True):
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            continue
        if x.shape != y.shape or x.dtype != y.dtype:
            raise ExportError(f"the registered forward returns {_form(x)}, the module {_form(y)}", where=where,
                              hint=hint)
        far, largest = _difference(x, y)
        if not far <= _allowed(y.dtype) * largest:
            raise ExportError(f"the registered forward differs from the module's own on the example inputs, by up to "
                              f"{far:.3g} where the largest number is {largest:.3g}", where=where, hint=hint)
    return wanted


def _allowed(dtype: torch.dtype) -> float:
    return 0.0 if not dtype.is_floating_point else EXACT if dtype in (torch.float32, torch.float64) else ROUNDED


def _difference(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The largest difference, NaN where just one is, and the largest number of y."""
    x, y = x.double(), y.double()
    if not y.numel():
        return 0.0, 0.0
    far = (x - y).masked_fill((x == y) | (x.isnan() & y.isnan()), 0.0).abs().max()
    return float(far), float(y[y.isfinite()].abs().max()) if y.isfinite().any() else 0.0


def _form(value: object) -> str:
    """A result in words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(map(_form, value))})"
    return type(value).__name__
