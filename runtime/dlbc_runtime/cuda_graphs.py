"""CUDA graphs of generated code: for shapes that come again, one call makes the GPU run all kernels of a pass.

    module = Graphed(module)  # used as the module itself is

Launching a kernel from Python takes longer than running a small one, and a large model launches hundreds. A pass whose
shapes come for the third time among the last few is captured. The next time it runs both ways, and the graph stays
where it gives the same numbers. From then on its inputs are copied into the graph's own, the graph runs, and results
are copied out. Weights are read where they are, so later changes of their numbers are seen. A graph keeps the memory
of its pass between calls.

Whatever does not fit runs as ever: code that waits for the GPU, inputs that are not on it, a call that comes while
another still needs what a graph's forward pass saved, a pass of more memory than graphs may keep.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from dlbc_runtime.cuda_captured import Captured, Key, Pass, Times
from dlbc_runtime.cuda_driver import Cuda, Driver, Run, waiting
from dlbc_runtime.cuda_same import flat, is_tensor, same
from dlbc_runtime.errors import InputError
from dlbc_runtime.memory import as_text

log = logging.getLogger(__name__)

MOST = 4
"""Shapes of which an explainer's program keeps graphs, at most: those used last."""
TIMES = 3
"""The time at which a shape is captured, where fewer than `MOST` others have come since the last: shapes that grow from
call to call never are, nor more of them in turn than can be kept."""
SHARE = 16
"""With `cuda_graphs="auto"`, graphs of all explainers of a process keep at most one part in so many of a GPU's
memory."""
REFUSED = 64
"""Shapes that are remembered as not to be captured."""
AFTER = 16
"""How much oftener a shape has to come whose graphs had to go, for others."""

Forward = tuple[Any, list[Any]]
"""Outputs and state."""

_paused: ContextVar[bool] = ContextVar("dlbc_no_cuda_graphs", default=False)
_everyone: weakref.WeakSet[Graphed] = weakref.WeakSet()
_everyone_lock = threading.Lock()
_uses = itertools.count()


class Graphed:
    """A generated module whose passes become CUDA graphs. `most`: shapes of which graphs are kept.

    `bounded`: what graphs of all such modules keep is at most a share of the GPU's memory (`SHARE`). `planned`: the
    bytes that a call with these inputs of the forward pass is planned to take; None where nobody knows.
    """

    def __init__(self, module: Any, driver: Driver | None = None, most: int = MOST, *, bounded: bool = False,
                 planned: Callable[[Sequence[Any]], int] | None = None) -> None:
        self._module, self._driver, self._most = module, driver or Cuda(), most
        self._bounded, self._planned = bounded, planned
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, Captured | None] = OrderedDict()
        self._forwards, self._relevances = Times(most), Times(most)
        self._off = False
        self._bound: int | None = None
        self.shelf: tuple[Captured, ...] = ()
        """The shapes that have graphs."""
        if bounded:
            with _everyone_lock:
                _everyone.add(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    # --- passes ------------------------------------------------------------------------------------------

    def forward(self, weights: Mapping[str, Any], prepared: Any, *inputs: Any) -> Forward:
        """As the module's: outputs and state."""
        def run() -> Forward:
            outputs, state = self._module.forward(weights, prepared, *inputs)
            return outputs, list(state)

        tensors = [x for x in flat(prepared) if is_tensor(x)]
        if self._off or _paused.get() or not self._driver.able((*weights.values(), *tensors, *inputs)):
            return run()
        key = (_shapes(inputs), self._driver.flags(), tuple(w.data_ptr() for w in weights.values()),
               tuple(x.data_ptr() for x in tensors))
        with self._lock:
            if key not in self._kept:
                times = self._forwards.again(key)
                if times >= TIMES:
                    return self._first(key, run, weights, prepared, inputs)
                if times == 1:
                    self._make_way(inputs)
            else:
                self._kept.move_to_end(key)
                found = self._kept[key]
                if found is not None and not found.busy:
                    found.used = next(_uses)
                    return self._again(found, run, inputs)
        return run()

    def _first(self, key: Key, run: Callable[[], Forward], weights: Mapping[str, Any], prepared: Any,
               inputs: Sequence[Any]) -> Forward:
        """A forward pass as ever, and its graph for the next ones."""
        planned = self._plan(inputs)
        if planned is None or self._too_large(planned):
            self._refuse(key, "nobody knows what memory it takes" if planned is None else
                         f"it takes more than the {as_text(self._bound or 0)} that graphs may keep")
            return run()
        op = waiting(run)
        results = run()
        if op:
            self._refuse(key, f"it waits for the GPU in {op}")
            return results

        def captured() -> Captured:
            own = _own(inputs)
            graph, (outputs, state), point = self._driver.capture(
                lambda: self._module.forward(weights, prepared, *own), None)
            return Captured(key, Pass(graph, own, outputs), list(state), prepared, point, self._size(graph, own),
                             next(_uses))

        made = self._tried(captured, lambda said: self._refuse(key, said))
        if made is not None:
            self._kept[key] = made
            self._settle(made)
        return results

    def _again(self, found: Captured, run: Callable[[], Forward], inputs: Sequence[Any]) -> Forward:
        """A forward pass by its graph, which is looked at first where it is new."""
        self._driver.wait(found.point)
        if not found.forward.right:
            expected, found.forward.right = self._compared(found, found.forward, found.state, run, inputs)
            if not found.forward.right:
                return run() if expected is None else expected
        else:
            with self._refusing(found):
                found.forward.run(inputs)
        with self._refusing(found):
            outputs = _copied(found.forward.results)
        state = found.lend()
        found.point = self._driver.mark()
        return outputs, state

    def relevance(self, weights: Mapping[str, Any], prepared: Any, state: list[Any], *seeds: Any) -> tuple[Any, ...]:
        """As the module's: relevance of the inputs; it empties the state."""
        with self._lock:
            able = not (self._off or _paused.get()) and self._driver.able(seeds)
            key = (_shapes(seeds), self._driver.flags()) if able else ()
            times = self._relevances.again(key) if able else 0
            owner = next((one for one in self._kept.values() if one is not None and one.owns(state)), None)
            if owner is not None:  # nobody else may run its graph before all of this has been asked of the GPU
                self._driver.wait(owner.point)

                def run() -> tuple[Any, ...]:
                    each: tuple[Any, ...] = self._module.relevance(weights, prepared, list(state), *seeds)
                    return each

                with self._refusing(owner):
                    results = (self._carried(owner, key, run, weights, prepared, seeds)
                               if able and (key in owner.relevance or times >= TIMES) else run())
                    results = _copied(results)  # nothing of the graph's memory is handed out
                state.clear()
                owner.point = self._driver.mark()
                return results
        found: tuple[Any, ...] = self._module.relevance(weights, prepared, state, *seeds)
        return found

    def _carried(self, owner: Captured, key: Key, run: Run, weights: Mapping[str, Any], prepared: Any,
                 seeds: Sequence[Any]) -> Any:
        """Relevance from a graph's state, by a graph or as ever."""
        if key not in owner.relevance:
            op = waiting(run)
            results = run()
            if op:
                _say(f"it waits for the GPU in {op}")
                owner.relevance[key] = None
                return results

            def captured() -> Pass:
                own = _own(seeds)
                graph, found, owner.point = self._driver.capture(
                    lambda: self._module.relevance(weights, prepared, list(owner.state), *own), owner.forward.graph)
                owner.size = self._size(graph, (*own, *owner.forward.inputs))
                return Pass(graph, own, found)

            owner.relevance[key] = self._tried(captured, _say)
            while len(owner.relevance) > self._most:
                self._driver.finish(owner.point)
                owner.relevance.popitem(last=False)
            self._settle(owner)
            return results
        owner.relevance.move_to_end(key)
        found = owner.relevance[key]
        if found is None:
            return run()
        if not found.right:
            expected, found.right = self._compared(owner, found, [], run, seeds)
            return run() if expected is None else expected
        found.run(seeds)
        return found.results

    def _compared(self, owner: Captured, made: Pass, state: list[Any], run: Run, inputs: Sequence[Any]
                  ) -> tuple[Any, bool]:
        """What a pass gives as ever (None: there is too little memory for both ways), and whether its new graph gives
        the same; else the shape is never captured again."""
        expected, right = None, None
        with _short_of_memory():
            expected = run()
            made.run(inputs)
            right = same([made.results, state], expected, run)
        owner.point = self._driver.mark()
        if right is None:
            self._refuse(owner.key, "memory is too short to compare its numbers")
        elif not right:
            log.warning("a CUDA graph did not give the numbers of the kernels launched one by one, which are given "
                        "instead; it is dropped. Please report the model, the GPU and torch's version")
            self._never(owner.key)
        return expected, bool(right)

    @contextlib.contextmanager
    def _refusing(self, owner: Captured) -> Iterator[None]:
        """Where memory is too short beside a shape's graphs, they are gone for the next call."""
        try:
            yield
        except Exception as problem:
            if _of_memory(problem):
                self._refuse(owner.key, "memory is too short beside it")
            raise

    # --- what is kept ------------------------------------------------------------------------------------

    def _tried(self, capture: Run, refuse: Callable[[str], None]) -> Any:
        """What is captured; None where that fails. Where it is not for want of memory, nothing more is captured."""
        try:
            return capture()
        except Exception as problem:  # whatever it is: the pass itself is run as ever, and says so if it fails
            said = str(problem).splitlines()[0][:200] if str(problem) else type(problem).__name__
            self._off = self._off or not _of_memory(problem)
            refuse(said)
            return None

    def _refuse(self, key: Key, said: str) -> None:
        """Never capture a shape, and say why."""
        _say(said)
        self._never(key)

    def _never(self, key: Key) -> None:
        """Never capture a shape."""
        self._drop(key)
        self._kept[key] = None
        refused = [each for each, one in self._kept.items() if one is None]
        for each in refused[:max(0, len(refused) - REFUSED)]:
            del self._kept[each]

    def _drop(self, key: Key) -> None:
        """Give a shape's graphs back; what a call still has of their memory stays until it is done."""
        one = self._kept.pop(key, None)
        if one is not None:
            self._driver.finish(one.point)
            self._forwards[key] = -AFTER
        self._stocked()

    def _stocked(self) -> None:
        self.shelf = tuple(one for one in self._kept.values() if one is not None)

    def _settle(self, new: Captured) -> None:
        """Keep within the bounds after a capture: the shapes used longest ago go, or the new one where it is too large,
        but none whose state a call has."""
        self._stocked()
        for one in self.shelf[:max(0, len(self.shelf) - self._most)]:
            if not one.busy:
                self._drop(one.key)
        if not self._bounded:
            return
        if self._too_large(new.size):
            self._refuse(new.key, f"it takes {as_text(new.size)}, more than graphs may keep")
            return
        with _everyone_lock:
            everyone = list(_everyone)
        bound = self._bound or 0
        shelves = sorted(((one.used, at, one, each) for at, each in enumerate(everyone) for one in each.shelf
                          if each._bound == bound), key=lambda entry: entry[:2])
        total = sum(one.size for _, _, one, _ in shelves)
        for _, _, one, each in shelves:
            if total > bound and one is not new and not one.busy and self._gives_back(each, one):
                total -= one.size
        if total > bound:  # others are in use
            self._drop(new.key)

    def _gives_back(self, each: Graphed, one: Captured) -> bool:
        """Whether a module has dropped a shape: another one only where nobody uses it now."""
        if each is not self and not each._lock.acquire(blocking=False):
            return False
        try:
            if one.busy:
                return False
            each._drop(one.key)
        finally:
            if each is not self:
                each._lock.release()
        return True

    def _size(self, graph: Any, inputs: Iterable[Any]) -> int:
        """The bytes that a shape's graphs keep; 0 where nobody asks."""
        return self._driver.held(graph) + sum(x.nbytes for x in inputs) if self._bounded else 0

    def _too_large(self, size: int) -> bool:
        """Whether graphs may not keep so many bytes."""
        if not self._bounded:
            return False
        if self._bound is None:
            self._bound = self._driver.memory()[0] // SHARE
        return size > self._bound

    def _plan(self, inputs: Sequence[Any]) -> int | None:
        """The bytes that a call is planned to take, 0 where nobody asks; None where that cannot be told. A plan is no
        reason for a call to fail."""
        try:
            return self._planned(inputs) if self._planned is not None else 0
        except Exception as problem:
            log.debug("no plan for a CUDA graph: %s", problem)
            return None

    def _make_way(self, inputs: Sequence[Any]) -> None:
        """Before a pass of new shapes: drop graphs, of all modules, where it might not fit beside them."""
        with _everyone_lock:
            everyone = [each for each in _everyone if each.shelf]
        if not self._bounded or self._planned is None or not everyone:
            return
        # What a graph's pool holds unused counts as torch's own, and is of no use to this pass.
        held = sum(one.size for each in everyone for one in each.shelf)
        planned = self._plan(inputs)
        if planned is None or planned > self._driver.memory()[1] - held:
            for each in everyone:
                for one in each.shelf:
                    if not one.busy:
                        self._gives_back(each, one)


# --- whether there can be graphs ----------------------------------------------------------------------------


def check(wanted: object) -> None:
    """InputError for what is no value of the option."""
    if not isinstance(wanted, bool) and wanted != "auto":
        raise InputError(f"cuda_graphs={wanted!r}", hint='"auto", True or False')


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """What is run inside runs as ever."""
    token = _paused.set(True)
    try:
        yield
    finally:
        _paused.reset(token)


def possible(backend: str, weights: Mapping[str, Any]) -> bool:
    """Whether a model is on an NVIDIA GPU, and on one alone."""
    devices = {weight.device for weight in weights.values() if is_tensor(weight)}
    if backend == "numpy" or len(devices) != 1 or devices.pop().type != "cuda":
        return False
    import torch

    return torch.version.hip is None


def require(backend: str, weights: Mapping[str, Any], memory_budget: int | None) -> None:
    """InputError where there can be no graphs: the model is not on an NVIDIA GPU, or memory is bounded."""
    devices = {str(weight.device) for weight in weights.values() if is_tensor(weight)}
    if backend == "numpy" or not devices or not all(name.startswith("cuda") for name in devices):
        raise InputError(f"CUDA graphs need a model on an NVIDIA GPU; this one is on {', '.join(devices) or 'the CPU'}",
                         where="cuda_graphs", hint="move the model there and compile it again, or leave it out")
    if memory_budget is not None:
        raise InputError("CUDA graphs keep their memory between calls, and a memory budget bounds it",
                         where="cuda_graphs", hint="give either cuda_graphs or memory_budget")


def said_of(modules: Sequence[Any]) -> str:
    """A line for `explainer.plan()`: what graphs there are."""
    held = [one for module in modules if isinstance(module, Graphed) for one in module.shelf]
    size = f", {as_text(sum(one.size for one in held))}" if any(one.size for one in held) else ""
    now = f"{len(held)} shape{'s' * (len(held) != 1)} now{size}"
    return f"CUDA graphs: a pass is captured when its shapes come the third time ({now})"


def _of_memory(problem: Exception) -> bool:
    return "out of memory" in str(problem).lower()


@contextlib.contextmanager
def _short_of_memory() -> Iterator[None]:
    """Errors for want of memory, and with them what was made until then, are forgotten."""
    try:
        yield
    except Exception as problem:
        if not _of_memory(problem):
            raise


def _say(said: str) -> None:
    log.info("a pass cannot be captured as a CUDA graph (%s); it is launched kernel by kernel", said)


def _shapes(tensors: Sequence[Any]) -> Key:
    return tuple((tuple(x.shape), x.dtype) for x in tensors)


def _own(tensors: Sequence[Any]) -> list[Any]:
    """Tensors of the same shapes and numbers, for a graph to read; calls within torch's inference mode and outside of
    it may write to them."""
    import torch

    with torch.inference_mode(False), torch.no_grad():
        return [torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x) for x in tensors]


def _copied(results: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(x.clone() if is_tensor(x) else x for x in results)
