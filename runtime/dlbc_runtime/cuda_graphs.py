"""CUDA graphs of generated code: for shapes that come again, one call makes the GPU run all kernels of a pass.

    module = Graphed(module)  # used as the module itself is

Launching a kernel from Python takes longer than running a small one, and a large model launches hundreds. A pass that
comes for the first time runs as ever, which compiles what is missing. The second time it is captured. From then on its
inputs are copied into the graph's own, the graph runs, and results are copied out. Weights are read where they are, so
later changes of their numbers are seen. A graph keeps the memory of its pass between calls.

Whatever does not fit runs as ever: code that waits for the GPU and cannot be captured, inputs that are not on the GPU,
a call that comes while another still needs what a graph's forward pass saved.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dlbc_runtime.errors import InputError

log = logging.getLogger(__name__)

MOST = 4
"""Shapes of which an explainer's program keeps graphs, at most: those used last."""
SEEN = 64
"""Shapes that are remembered as seen once."""

Key = tuple[object, ...]
Run = Callable[[], Any]


class Driver(Protocol):
    """What graphs ask of the GPU."""

    def able(self, tensors: Iterable[Any]) -> bool:
        """Whether all of these lie on the present GPU: a number on the CPU would become part of a graph, and work for
        another GPU would not."""

    def flags(self) -> tuple[object, ...]:
        """What else decides which kernels run."""

    def capture(self, run: Run, like: Any) -> tuple[Any, Any, Any]:
        """A graph of what `run` does, which has `replay()`, and its result; it shares the memory of the graph `like`
        (None: its own). The last is for `wait`."""

    def mark(self) -> Any:
        """A point in what the GPU has been asked to do."""

    def wait(self, point: Any) -> None:
        """What is asked from now on comes after that point, also where it is asked from another thread."""

    def finish(self, point: Any) -> None:
        """Wait, here, until the GPU has come to that point."""


class Cuda:
    """The GPU, by torch."""

    def able(self, tensors: Iterable[Any]) -> bool:
        """Whether all of these lie on the present GPU, and nobody else captures what it is asked to do."""
        import torch

        devices = {x.device for x in tensors}
        return (len(devices) == 1 and (where := devices.pop()).type == "cuda"
                and where.index == torch.cuda.current_device() and not torch.cuda.is_current_stream_capturing())

    def flags(self) -> tuple[object, ...]:
        """Torch's switches for products."""
        import torch

        return (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark,
                torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cuda"))

    def capture(self, run: Run, like: Any) -> tuple[Any, Any, Any]:
        """A graph of what `run` does. RuntimeError where that waits for the GPU."""
        import torch

        before, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
        pool = None if like is None else like.pool()
        # Other threads may go on to use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            results = run()
        log.info("a pass was captured as a CUDA graph; %.1f MB are kept for it",
                 max(0, torch.cuda.memory_reserved() - before) / 1e6)
        return graph, results, self.mark()

    def mark(self) -> Any:
        """An event on the present stream."""
        import torch

        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self, point: Any) -> None:
        """The present stream waits for an event."""
        import torch

        torch.cuda.current_stream().wait_event(point)

    def finish(self, point: Any) -> None:
        """Wait for an event."""
        point.synchronize()


@dataclass(eq=False)
class _Pass:
    """A captured pass: the graph, its own inputs, and its results."""

    graph: Any
    inputs: list[Any]
    results: Any

    def run(self, inputs: Sequence[Any]) -> None:
        """Run it for these inputs."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()


@dataclass(eq=False)
class _Captured:
    """The graphs of one shape: of the forward pass, and of relevance for some numbers of targets.

    `held`: prepared values whose addresses are in the graphs. `lent`: the tensors of the state that a call has; while
    one of them is alive, the state's numbers must stay. `point`: after all that the GPU has been asked to do with it.
    """

    forward: _Pass
    state: list[Any]
    held: object
    point: Any
    lent: list[weakref.ref[Any]] = field(default_factory=list)
    relevance: OrderedDict[Key, _Pass | None] = field(default_factory=OrderedDict)
    seen: OrderedDict[Key, None] = field(default_factory=OrderedDict)

    @property
    def busy(self) -> bool:
        """Whether a call still has the state."""
        return any(ref() is not None for ref in self.lent)

    def lend(self) -> list[Any]:
        """The state for a call, in tensors of its own on the graph's memory."""
        state = [x.detach() if _is_tensor(x) else x for x in self.state]
        self.lent = [weakref.ref(x) for x in state if _is_tensor(x)]
        return state

    def owns(self, state: Sequence[Any]) -> bool:
        """Whether a state is what was lent."""
        tensors = [x for x in state if _is_tensor(x)]
        return bool(tensors) and len(tensors) == len(self.lent) and all(
            ref() is x for ref, x in zip(self.lent, tensors, strict=True))


class Graphed:
    """A generated module whose passes become CUDA graphs. `most`: shapes of which graphs are kept."""

    def __init__(self, module: Any, driver: Driver | None = None, most: int = MOST) -> None:
        self._module, self._driver, self._most = module, driver or Cuda(), most
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, _Captured | None] = OrderedDict()
        self._seen: OrderedDict[Key, None] = OrderedDict()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def forward(self, weights: Mapping[str, Any], prepared: Any, *inputs: Any) -> tuple[Any, list[Any]]:
        """As the module's: outputs and state."""
        tensors = [x for x in _flat(prepared) if _is_tensor(x)]
        if self._driver.able((*weights.values(), *tensors, *inputs)):
            key = (_shapes(inputs), self._driver.flags(), tuple(w.data_ptr() for w in weights.values()),
                   tuple(x.data_ptr() for x in tensors))
            with self._lock:
                found = _known(self._kept, self._seen, key, lambda: self._captured(weights, prepared, inputs))
                self._forget()
                if found is not None and not found.busy:
                    self._driver.wait(found.point)
                    found.forward.run(inputs)
                    outputs, state = _copied(found.forward.results), found.lend()
                    found.point = self._driver.mark()
                    return outputs, state
        outputs, state = self._module.forward(weights, prepared, *inputs)
        return outputs, state

    def relevance(self, weights: Mapping[str, Any], prepared: Any, state: list[Any], *seeds: Any) -> tuple[Any, ...]:
        """As the module's: relevance of the inputs; it empties the state."""
        with self._lock:
            owner = next((one for one in self._kept.values() if one is not None and one.owns(state)), None)
            if owner is None:
                found = None
            else:  # the state is a graph's: nobody else may run that before all of this has been asked of the GPU
                self._driver.wait(owner.point)
                found = self._carried(owner, weights, prepared, state, seeds)
                owner.point = self._driver.mark()
        if found is not None:
            return found
        results: tuple[Any, ...] = self._module.relevance(weights, prepared, state, *seeds)
        return results

    def _carried(self, owner: _Captured, weights: Mapping[str, Any], prepared: Any, state: list[Any],
                 seeds: Sequence[Any]) -> tuple[Any, ...]:
        """Relevance from a graph's state, by a graph or as ever; nothing of the graph's memory is handed out."""
        found = None
        if self._driver.able(seeds):
            found = _known(owner.relevance, owner.seen, (_shapes(seeds), self._driver.flags()),
                           lambda: self._captured_relevance(owner, weights, prepared, seeds))
            while len(owner.relevance) > self._most:
                self._driver.finish(owner.point)
                owner.relevance.popitem(last=False)
        if found is None:
            return _copied(self._module.relevance(weights, prepared, state, *seeds))
        found.run(seeds)
        state.clear()
        return _copied(found.results)

    def _captured(self, weights: Mapping[str, Any], prepared: Any, inputs: Sequence[Any]) -> _Captured:
        own = _own(inputs)
        graph, (outputs, state), point = self._driver.capture(
            lambda: self._module.forward(weights, prepared, *own), None)
        return _Captured(_Pass(graph, own, outputs), list(state), prepared, point)

    def _captured_relevance(self, owner: _Captured, weights: Mapping[str, Any], prepared: Any, seeds: Sequence[Any]
                            ) -> _Pass:
        own = _own(seeds)
        graph, results, owner.point = self._driver.capture(
            lambda: self._module.relevance(weights, prepared, list(owner.state), *own), owner.forward.graph)
        return _Pass(graph, own, results)

    def _forget(self) -> None:
        """Drop the graphs that were used longest ago, but not those whose state a call has."""
        kept = [key for key, one in self._kept.items() if one is not None]
        for key in kept[:max(0, len(kept) - self._most)]:
            one = self._kept[key]
            if one is not None and not one.busy:
                self._driver.finish(one.point)
                del self._kept[key]
        while len(self._kept) > SEEN:
            self._kept.popitem(last=False)


def require(backend: str, weights: Mapping[str, Any], memory_budget: int | None) -> None:
    """InputError where there can be no graphs: the model is not on an NVIDIA GPU, or memory is bounded."""
    devices = {str(weight.device) for weight in weights.values() if _is_tensor(weight)}
    if backend == "numpy" or not devices or not all(name.startswith("cuda") for name in devices):
        raise InputError(f"CUDA graphs need a model on an NVIDIA GPU; this one is on {', '.join(devices) or 'the CPU'}",
                         where="cuda_graphs", hint="move the model there and compile it again, or leave it out")
    if memory_budget is not None:
        raise InputError("CUDA graphs keep their memory between calls, and a memory budget bounds it",
                         where="cuda_graphs", hint="give either cuda_graphs or memory_budget")


def _known(kept: OrderedDict[Key, Any], seen: OrderedDict[Key, None], key: Key, capture: Run) -> Any:
    """What is kept under a key; captured when the key comes for the second time; None where it cannot be."""
    if key in kept:
        kept.move_to_end(key)
        return kept[key]
    if key not in seen:
        seen[key] = None
        while len(seen) > SEEN:
            seen.popitem(last=False)
        return None
    try:
        kept[key] = capture()
    except Exception as problem:  # whatever it is: the pass itself is run as ever, and says so if it fails
        log.info("a pass cannot be captured as a CUDA graph (%s); it is launched kernel by kernel",
                 str(problem).splitlines()[0][:200] if str(problem) else type(problem).__name__)
        kept[key] = None
    return kept[key]


def _is_tensor(x: Any) -> bool:
    return hasattr(x, "data_ptr")


def _flat(value: Any) -> list[Any]:
    return [each for part in value for each in _flat(part)] if isinstance(value, tuple | list) else [value]


def _shapes(tensors: Sequence[Any]) -> Key:
    return tuple((tuple(x.shape), x.dtype) for x in tensors)


def _own(tensors: Sequence[Any]) -> list[Any]:
    """Tensors of the same shapes and numbers, for a graph to read."""
    return [x.new_empty(x.shape).copy_(x) for x in tensors]


def _copied(results: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(x.clone() if _is_tensor(x) else x for x in results)
