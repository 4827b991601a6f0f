"""CUDA graphs, without a GPU: a driver that captures what torch is asked to do on the CPU, and does it again.

A replay runs every op of the capture on the same memory, as a GPU does: inputs, weights and results are where they
were, and nothing of Python runs. What is not seen here: that torch's own capture takes all of it, and what it is worth.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dlbc
from dlbc.errors import InputError
from dlbc_runtime import cuda_graphs
from dlbc_runtime.cuda_graphs import Cuda, Graphed

WAITING = ("_local_scalar_dense", "nonzero", "item")
"""Ops that a CPU waits for, which a GPU does not capture."""


class Tape(TorchDispatchMode):
    """Notes what torch does."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in WAITING):
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Do it again; what was new memory gets the new numbers."""
        for func, args, kwargs, before in self.steps:
            now = func(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(now), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


class Driver:
    """The CPU as if it were a GPU. `log` has what was asked, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.capable = True

    def able(self, tensors: Iterable[Any]) -> bool:
        return self.capable and all(isinstance(x, Tensor) for x in tensors)

    def flags(self) -> tuple[object, ...]:
        return (torch.get_float32_matmul_precision(),)

    def capture(self, run: Callable[[], Any], like: Any) -> tuple[Any, Any, Any]:
        self.log.append("capture" if like is None else "capture relevance")
        tape = Tape()
        with tape:
            results = run()
        return Replay(tape, self), results, "point"

    def mark(self) -> Any:
        return "point"

    def wait(self, point: Any) -> None:
        assert point == "point"

    def finish(self, point: Any) -> None:
        assert point == "point"
        self.log.append("finish")


class Replay:
    """A captured graph."""

    def __init__(self, tape: Tape, driver: Driver) -> None:
        self.tape, self.driver = tape, driver

    def replay(self) -> None:
        self.driver.log.append("replay")
        with torch.no_grad():
            self.tape.replay()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """One driver for all explainers, and no question whether there is a GPU."""
    found = Driver()
    monkeypatch.setattr(cuda_graphs, "Cuda", lambda: found)
    monkeypatch.setattr(cuda_graphs, "require", lambda *args: None)
    return found


class Model(nn.Module):
    """Attention, a norm, a gate: more than one product."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.block(self.embed(ids)).mean(1))
        return out


@pytest.fixture
def pair(driver: Driver) -> Iterator[tuple[dlbc.Explainer, dlbc.Explainer, nn.Module]]:
    """An explainer as ever, one with graphs, and their model."""
    torch.manual_seed(0)
    model = Model().eval()
    plain = dlbc.compile(model, torch.zeros(2, 6, dtype=torch.long), rules="dlb", cache=False, precompute="always")
    yield plain, plain.with_options(cuda_graphs=True), model


def ids(seed: int, batch: int = 2, length: int = 6) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 31, (batch, length)))


def same(one: dlbc.Explanation, other: dlbc.Explanation) -> None:
    """Numbers are equal, to the last bit."""
    for a, b in ((one.outputs, other.outputs), (one.relevance, other.relevance)):
        assert list(a) == list(b)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_calls_become_graphs_and_compute_the_same(pair: Any, driver: Driver) -> None:
    plain, graphed, _ = pair
    for seed in range(5):
        same(graphed(ids(seed)), plain(ids(seed)))
    assert driver.log == ["capture", "replay", "replay", "capture relevance", "replay", "replay", "replay", "replay",
                          "replay"]
    assert graphed(ids(9)).conservation().closes()


def test_earlier_explanations_stay_what_they_were(pair: Any) -> None:
    plain, graphed, _ = pair
    found = [graphed(ids(seed)) for seed in range(6)]
    for seed, each in enumerate(found):
        same(each, plain(ids(seed)))


def test_targets_and_kept_values(pair: Any, driver: Driver) -> None:
    """Several targets are other shapes of relevance on the same forward pass; kept values are other programs."""
    plain, graphed, _ = pair
    for seed in range(4):
        same(graphed(ids(seed), target=[1, 2, 3]), plain(ids(seed), target=[1, 2, 3]))
    captured = driver.log.count("capture")
    for seed in range(4):
        same(graphed(ids(seed)), plain(ids(seed)))
    assert driver.log.count("capture") == captured and driver.log.count("capture relevance") == 2
    for seed in range(4):
        one, other = graphed(ids(seed), keep="all"), plain(ids(seed), keep="all")
        same(one, other)
        for name in one.nodes:
            np.testing.assert_array_equal(one.nodes[name], other.nodes[name])


def test_shapes_used_last_are_kept(pair: Any, driver: Driver) -> None:
    plain, graphed, _ = pair
    lengths = range(3, 3 + cuda_graphs.MOST + 2)
    for _ in range(3):
        for length in lengths:
            same(graphed(ids(length, length=length)), plain(ids(length, length=length)))
    module = graphed._load(graphed.default).module
    assert isinstance(module, Graphed)
    kept = [one for one in module._kept.values() if one is not None]
    assert len(kept) == cuda_graphs.MOST and "finish" in driver.log
    assert {one.forward.inputs[0].shape[1] for one in kept} == set(list(lengths)[-cuda_graphs.MOST:])


def test_weights_are_read_where_they_are(pair: Any, driver: Driver) -> None:
    """New numbers in place need no new graph, unless something was prepared of them; new memory does."""
    plain, graphed, model = pair
    for seed in range(4):
        graphed(ids(seed))
    with torch.no_grad():
        model.block.norm1.weight.mul_(1.5)
    same(graphed(ids(0)), plain(ids(0)))
    assert driver.log.count("capture") == 1
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01)
    for seed in range(4):
        same(graphed(ids(seed)), plain(ids(seed)))
    replaced = model.head.weight.detach() * 2
    model.head.weight.data = replaced
    for seed in range(4):
        same(graphed(ids(seed)), plain(ids(seed)))


def test_switches_of_torch_are_other_graphs(pair: Any, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    _, graphed, _ = pair
    for seed in range(3):
        graphed(ids(seed))
    assert driver.log.count("capture") == 1
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    for seed in range(3):
        graphed(ids(seed))
    assert driver.log.count("capture") == 2


# --- a module by itself ------------------------------------------------------------------------------


class Twice:
    """A generated module in small: y = 2x, relevance r * x. `waits`: it asks the GPU for a number."""

    def __init__(self, *, waits: bool = False) -> None:
        self.waits, self.runs = waits, 0

    def forward(self, weights: Any, prepared: Any, x: Tensor) -> tuple[Any, list[Any]]:
        self.runs += 1
        if self.waits and x.sum().item() > 1e9:
            return (x,), [x]
        return (x * weights["w"],), [3, x * 1]

    def relevance(self, weights: Any, prepared: Any, state: list[Any], r: Tensor) -> tuple[Tensor, ...]:
        _, x = state
        state.clear()
        return r * x, x


W = {"w": torch.tensor([2.0])}


def call(module: Any, value: float) -> tuple[list[Any], Tensor]:
    (y,), state = module.forward(W, (), torch.full((3,), value))
    assert torch.equal(y, torch.full((3,), 2 * value))
    return state, torch.full((3,), 10.0)


def test_a_state_that_is_in_use_is_not_run_over() -> None:
    """Two forward passes, then relevance of either: the second pass runs as ever."""
    driver = Driver()
    module = Graphed(Twice(), driver)
    for value in range(4):
        state, r = call(module, value)
        module.relevance(W, (), state, r)
    replays = driver.log.count("replay")
    first, r = call(module, 5.0)
    second, _ = call(module, 7.0)
    assert driver.log.count("replay") == replays + 1
    for value, state in ((7.0, second), (5.0, first)):
        found, same_x = module.relevance(W, (), state, r)
        assert not state and torch.equal(found, torch.full((3,), 10 * value))
        assert torch.equal(same_x, torch.full((3,), value))


def test_targets_in_parts_take_the_state_several_times() -> None:
    """Copies of the list of a state are that state."""
    module = Graphed(Twice(), Driver())
    for value in range(1, 6):
        state, r = call(module, value)
        found = [module.relevance(W, (), own, r * factor)[0] for factor, own in ((1, list(state)), (2, list(state)),
                                                                                (3, state))]
        call(module, 99.0)
        for factor, each in enumerate(found, 1):
            assert torch.equal(each, torch.full((3,), 10.0 * factor * value))


def test_what_waits_for_the_gpu_runs_as_ever(caplog: pytest.LogCaptureFixture) -> None:
    driver, own = Driver(), Twice(waits=True)
    module = Graphed(own, driver)
    with caplog.at_level("INFO"):
        for value in range(4):
            state, r = call(module, value)
            assert torch.equal(module.relevance(W, (), state, r)[0], r * value)
    said = [each.getMessage() for each in caplog.records if "cannot be captured" in each.getMessage()]
    assert said == ["a pass cannot be captured as a CUDA graph (operation not permitted when stream is capturing); "
                    "it is launched kernel by kernel"]
    assert driver.log == ["capture"] and own.runs == 5


def test_what_is_not_on_the_gpu_runs_as_ever() -> None:
    driver = Driver()
    driver.capable = False
    module = Graphed(Twice(), driver)
    for value in range(4):
        state, r = call(module, value)
        assert torch.equal(module.relevance(W, (), state, r)[0], r * value)
    assert not driver.log
    assert not Cuda().able([torch.zeros(2)]) and not Cuda().able([torch.zeros(2), torch.zeros(2, device="meta")])


def test_threads() -> None:
    """Calls of several threads do not take each other's numbers."""
    module, wrong = Graphed(Twice(), Driver()), list[float]()

    def work(value: float) -> None:
        for _ in range(50):
            (y,), state = module.forward(W, (), torch.full((3,), value))
            found, _ = module.relevance(W, (), state, torch.full((3,), 10.0))
            if not (torch.equal(y, torch.full((3,), 2 * value)) and torch.equal(found, torch.full((3,), 10 * value))):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(value),)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_driver_captures_into_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch is asked: graphs of one shape share a pool, other threads are let be, events order streams."""
    asked: list[Any] = []

    class Graph:
        def pool(self) -> str:
            return "the pool"

    class Event:
        def record(self) -> None:
            asked.append("record")

        def synchronize(self) -> None:
            asked.append("synchronize")

    class Stream:
        def wait_event(self, event: Any) -> None:
            asked.append("wait")

    @contextmanager
    def graph(graph: Any, pool: Any, capture_error_mode: str) -> Iterator[None]:
        asked.append((pool, capture_error_mode))
        yield

    for name, fake in (("CUDAGraph", Graph), ("Event", Event), ("graph", graph), ("current_stream", Stream),
                       ("memory_reserved", lambda: 0)):
        monkeypatch.setattr(torch.cuda, name, fake)
    driver = Cuda()
    first, results, point = driver.capture(lambda: 5, None)
    second, _, _ = driver.capture(lambda: 6, first)
    driver.wait(point)
    driver.finish(point)
    assert results == 5 and isinstance(second, Graph)
    assert asked == [(None, "thread_local"), "record", ("the pool", "thread_local"), "record", "wait", "synchronize"]


# --- bad input ---------------------------------------------------------------------------------------


def test_errors() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(2, 4)
    with pytest.raises(InputError, match="CUDA graphs need a model on an NVIDIA GPU; this one is on cpu"):
        dlbc.compile(model, x, cuda_graphs=True, cache=False)
    explainer = dlbc.compile(model, x, backend="numpy", cache=False)
    with pytest.raises(InputError, match="CUDA graphs need a model on an NVIDIA GPU"):
        explainer.with_options(cuda_graphs=True)


def test_a_call_with_a_budget_is_checked(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, graphed, _ = pair
    asked: list[Any] = []
    monkeypatch.setattr(cuda_graphs, "require", lambda backend, weights, budget: asked.append(budget))
    graphed(ids(0), memory_budget="1GB")
    assert asked == [10**9]


def test_a_memory_budget_is_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device = torch.device("cuda", 0)

        def data_ptr(self) -> int:
            return 0

    cuda_graphs.require("torch", {"w": OnGpu()}, None)
    with pytest.raises(InputError, match="give either cuda_graphs or memory_budget"):
        cuda_graphs.require("torch", {"w": OnGpu()}, 10**9)
