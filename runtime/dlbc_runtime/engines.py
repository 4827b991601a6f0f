"""How arrays are handled beside the generated code: by torch tensors or numpy arrays."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from dlbc_runtime.arrays import Array, as_numpy
from dlbc_runtime.errors import InputError


class Engine(Protocol):
    """What an explainer asks of its array library."""

    def inputs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs as this library's arrays; InputError for another device or for NaN."""

    def copied(self, value: Any, *, finite: bool) -> Any:
        """A copy of an input of a kind that `inputs` took before, made while `inferring`; None where it holds NaN or
        infinity (`finite`: it is looked at)."""

    def array(self, value: Array) -> Any:
        """A numpy array as this library's, on the explainer's device."""

    def like(self, value: Array, other: Any) -> Any:
        """A numpy array as this library's, of the element type and on the device of `other`."""

    def entries(self, value: Any) -> Any:
        """An array whose entries along axis 0 are asked for; on the CPU as a numpy array."""

    def rows(self, value: Any, count: int) -> Any:
        """An array with axis 0 repeated to `count` where it is 1; nothing is copied."""

    def running(self) -> contextlib.AbstractContextManager[None]:
        """The context that generated code runs in."""

    def inferring(self) -> contextlib.AbstractContextManager[None]:
        """The same, where nobody but the explainer sees the arrays."""

    def versions(self, weights: Iterable[Any]) -> tuple[object, ...]:
        """For each weight something that changes when its numbers change."""

    def finite(self, weight: Any) -> bool:
        """Whether a weight holds neither NaN nor infinity."""


class NumpyEngine:
    """Arrays are numpy's."""

    def inputs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs as numpy arrays."""
        found = {name: as_numpy(value).copy() for name, value in given.items()}  # it stays what it was
        for name, value in found.items():
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise _not_finite(name)
        return found

    def copied(self, value: Any, *, finite: bool) -> Array | None:
        """A copy as numpy array."""
        found: Array = as_numpy(value).copy()
        return found if not finite or self.finite(found) else None

    def array(self, value: Array) -> Array:
        """The array itself."""
        return value

    def like(self, value: Array, other: Any) -> Array:
        """The array in the element type of `other`."""
        return value.astype(other.dtype)

    def entries(self, value: Any) -> Any:
        """The array itself."""
        return value

    def rows(self, value: Any, count: int) -> Any:
        """A view with its one row repeated."""
        return value if value.shape[0] == count else np.broadcast_to(value, (count, *value.shape[1:]))

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Floating-point warnings are off: safe divisions divide by zero on purpose."""
        return np.errstate(all="ignore")

    def inferring(self) -> contextlib.AbstractContextManager[None]:
        """Generated code sets its own warnings off."""
        return contextlib.nullcontext()

    def versions(self, weights: Iterable[Any]) -> tuple[object, ...]:
        """The array, and torch's counter of in-place changes where the array lies in a tensor's memory."""
        return tuple([(id(weight), getattr(weight.base, "_version", None)) for weight in weights])

    def finite(self, weight: Any) -> bool:
        """Whether a weight holds neither NaN nor infinity."""
        return weight.dtype.kind != "f" or bool(np.isfinite(weight).all())


class TorchEngine:
    """Tensors are torch's, on the device of the model's weights."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        import torch

        self.torch = torch
        first = next(iter(weights.values()), None)
        self.device = first.device if first is not None else torch.device("cpu")

    def inputs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs as tensors."""
        if self.device.type == "meta":
            raise InputError("the model's weights are on the meta device and have no numbers",
                             hint="load them (`model.to_empty(device=...)`, then a state dict), and compile again")
        found = {}
        for name, value in given.items():
            tensor = self._tensor(value)
            if tensor.device != self.device and tensor.dim():
                raise InputError(f"input `{name}` is on {tensor.device}, the model on {self.device}",
                                 hint=f'move it with `.to("{self.device}")`')
            tensor = found[name] = tensor.detach().clone()  # what is explained stays what it was
            if not self.finite(tensor):
                raise _not_finite(name)
        return found

    def _tensor(self, value: Any) -> Any:
        """A tensor or array as a tensor. Torch takes no array that is read backwards."""
        backwards = isinstance(value, np.ndarray) and min(value.strides, default=0) < 0
        return self.torch.as_tensor(np.ascontiguousarray(value) if backwards else value)

    def copied(self, value: Any, *, finite: bool) -> Any:
        """A copy as tensor; made where no gradients are recorded."""
        found = value.clone() if value.__class__ is self.torch.Tensor else self._tensor(value).clone()
        return found if not finite or self.finite(found) else None

    def array(self, value: Array) -> Any:
        """The array as a tensor on the model's device."""
        tensor = self.torch.from_numpy(value if value.flags.c_contiguous else np.ascontiguousarray(value))
        return tensor if self.device.type == "cpu" else tensor.to(self.device)

    def like(self, value: Array, other: Any) -> Any:
        """The array as a tensor of the element type and on the device of `other`."""
        return self.torch.from_numpy(np.array(value, order="C")).to(device=other.device, dtype=other.dtype)

    def entries(self, value: Any) -> Any:
        """As numpy's array, whose views take a third of the time, where that can be."""
        return value.numpy() if self.device.type == "cpu" and value.dtype is self.torch.float32 else value

    def rows(self, value: Any, count: int) -> Any:
        """A view with its one row repeated."""
        return value if value.shape[0] == count else value.expand(count, *value.shape[1:])

    def running(self) -> contextlib.AbstractContextManager[None]:
        """No gradients are recorded; out of memory says what to lower."""
        return _Running(self.torch.no_grad(), self.device)

    def inferring(self) -> contextlib.AbstractContextManager[None]:
        """Tensors have no counter of changes either, and are the inference mode's: ops take a tenth less."""
        return _Running(self.torch.inference_mode(), self.device)

    def versions(self, weights: Iterable[Any]) -> tuple[object, ...]:
        """Storage address, element type and how a tensor lies there (`weight.data = weight.data.t()` is another and no
        change in place), and torch's own counter of in-place changes."""
        return tuple([(w.data_ptr(), w.dtype, w.shape, w.stride(), None if w.is_inference() else w._version)
                      for w in weights])

    def finite(self, weight: Any) -> bool:
        """Whether a tensor holds neither NaN nor infinity."""
        # A finite sum says all are finite, and is one pass; one that overflows says nothing.
        return (not weight.is_floating_point() or math.isfinite(weight.sum().item())
                or bool(self.torch.isfinite(weight).all()))


class _Running(contextlib.AbstractContextManager[None]):
    """A mode of torch; out of memory says what to lower. No generator: that takes longer than a small op."""

    __slots__ = ("device", "mode")

    def __init__(self, mode: contextlib.AbstractContextManager[None], device: Any) -> None:
        self.mode, self.device = mode, device

    def __enter__(self) -> None:
        self.mode.__enter__()

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self.mode.__exit__(kind, problem, trace)
        if isinstance(problem, MemoryError) or (isinstance(problem, RuntimeError) and _lacks_memory(str(problem))):
            raise InputError(f"out of memory on {self.device}: {str(problem).splitlines()[0]}",
                             hint="give memory_budget=..., less than what is free, and calls work in parts; or lower "
                                  "the batch size or sequence length. explainer.memory(...) shows what takes how much"
                             ) from problem


def _lacks_memory(text: str) -> bool:
    """Whether an error of torch is about memory that is not there; not one about memory that must not be read."""
    return "memory" in text.lower() and "illegal" not in text.lower()


def _not_finite(name: str) -> InputError:
    return InputError(f"input `{name}` holds NaN or infinity",
                      hint="an explanation of it would mean nothing; clean it first")


def engine(backend: str, weights: Mapping[str, Any]) -> Engine:
    """The engine for a backend's arrays."""
    return NumpyEngine() if backend == "numpy" else TorchEngine(weights)
