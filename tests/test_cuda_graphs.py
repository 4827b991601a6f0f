"""CUDA graphs, without a GPU: a driver that captures what torch is asked to do on the CPU, and does it again.

"auto" here is as on a GPU of 1,600 kB, whose graphs take what their tensors do.

A replay runs every op of the capture on the same memory, as a GPU does: inputs, weights and results are where they
were, and nothing of Python runs. What is not seen here: that torch's own capture takes all of it, and what it is worth.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dlbc
import dlbc_runtime
from dlbc.errors import InputError
from dlbc.trial import tolerance
from dlbc_runtime import cuda_graphs, cuda_same
from dlbc_runtime.cuda_driver import Cuda, waiting
from dlbc_runtime.cuda_graphs import Graphed
from dlbc_runtime.parts import planned

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
        self.total = self.free = 1_600_000
        self.failure: Exception | None = None

    def held(self, graph: Any) -> int:
        return sum(x.nbytes for tape in graph.pool for _, _, _, result in tape.steps for x in tree_leaves(result)
                   if isinstance(x, Tensor))

    def memory(self) -> tuple[int, int]:
        return self.total, self.free

    def able(self, tensors: Iterable[Any]) -> bool:
        return self.capable and all(isinstance(x, Tensor) for x in tensors)

    def flags(self) -> tuple[object, ...]:
        return (torch.get_float32_matmul_precision(),)

    def capture(self, run: Callable[[], Any], like: Any) -> tuple[Any, Any, Any]:
        self.log.append("capture" if like is None else "capture relevance")
        if self.failure is not None:
            raise self.failure
        tape = Tape()
        with tape:
            results = run()
        return Replay(tape, self, [] if like is None else like.pool), results, "point"

    def mark(self) -> Any:
        return "point"

    def wait(self, point: Any) -> None:
        assert point == "point"

    def finish(self, point: Any) -> None:
        assert point == "point"
        self.log.append("finish")


class Replay:
    """A captured graph."""

    def __init__(self, tape: Tape, driver: Driver, pool: list[Tape]) -> None:
        self.tape, self.driver, self.pool = tape, driver, pool
        pool.append(tape)
        self.spoilt: Callable[[Tape], None] | None = None

    def replay(self) -> None:
        self.driver.log.append("replay")
        with torch.inference_mode():  # which may write to what any other made
            self.tape.replay()
            if self.spoilt is not None:
                self.spoilt(self.tape)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """One driver for all explainers, and no question whether there is a GPU."""
    found = Driver()
    monkeypatch.setattr(cuda_graphs, "Cuda", lambda: found)
    monkeypatch.setattr(cuda_graphs, "require", lambda *args: None)
    monkeypatch.setattr(cuda_graphs, "possible", lambda *args: True)
    monkeypatch.setattr(cuda_graphs, "_everyone", weakref.WeakSet())
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
    plain = dlbc.compile(model, torch.zeros(2, 6, dtype=torch.long), rules="dlb", cache=False, precompute="always",
                         cuda_graphs=False)
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
    for seed in range(7):
        same(graphed(ids(seed)), plain(ids(seed)))
    third, fourth, fifth = ["capture"], ["replay", "capture relevance"], ["replay", "replay"]
    assert [each for each in driver.log if each != "finish"] == third + fourth + fifth + 2 * ["replay", "replay"]
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


def lengths_of(explainer: dlbc.Explainer) -> set[int]:
    """The lengths of the texts that graphs are for."""
    module = explainer._load(explainer.default).module
    assert isinstance(module, Graphed)
    return {one.forward.inputs[0].shape[1] for one in module.shelf}


def test_shapes_used_last_are_kept(pair: Any, driver: Driver) -> None:
    plain, graphed, _ = pair
    lengths = range(3, 3 + cuda_graphs.MOST + 2)
    for length in lengths:
        for _ in range(3):
            same(graphed(ids(length, length=length)), plain(ids(length, length=length)))
    assert lengths_of(graphed) == set(list(lengths)[-cuda_graphs.MOST:]) and "finish" in driver.log


def test_shapes_that_grow_or_are_too_many_are_not_captured(pair: Any, driver: Driver) -> None:
    """Texts that are generated, three times over; and one more shape in turn than can be kept."""
    plain, graphed, _ = pair
    for length in [*range(3, 12)] * 3 + [*range(3, 4 + cuda_graphs.MOST)] * 4:
        same(graphed(ids(length, length=length)), plain(ids(length, length=length)))
    assert not driver.log
    for length in (4, 5, 6) * 3:
        graphed(ids(length, length=length))
    assert lengths_of(graphed) == {4, 5, 6}


def test_weights_are_read_where_they_are(pair: Any, driver: Driver) -> None:
    """New numbers in place need no new graph, unless something was prepared of them; new memory does."""
    plain, graphed, model = pair
    for seed in range(7):
        graphed(ids(seed))
    with torch.no_grad():
        model.block.norm1.weight.mul_(1.5)
    same(graphed(ids(0)), plain(ids(0)))
    assert driver.log.count("capture") == 1
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01)
    for seed in range(7):
        same(graphed(ids(seed)), plain(ids(seed)))
    replaced = model.head.weight.detach() * 2
    model.head.weight.data = replaced
    for seed in range(7):
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
    for value in range(6):
        state, r = call(module, float(value))
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
    for value in range(1, 9):
        state, r = call(module, value)
        found = [module.relevance(W, (), own, r * factor)[0] for factor, own in ((1, list(state)), (2, list(state)),
                                                                                (3, state))]
        call(module, 99.0)
        for factor, each in enumerate(found, 1):
            assert torch.equal(each, torch.full((3,), 10.0 * factor * value))


def captured_said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if "CUDA graph" in each.getMessage()]


def test_what_waits_for_the_gpu_runs_as_ever(caplog: pytest.LogCaptureFixture) -> None:
    """And no capture is begun."""
    driver, own = Driver(), Twice(waits=True)
    module = Graphed(own, driver)
    with caplog.at_level("INFO"):
        for value in range(6):
            state, r = call(module, value)
            assert torch.equal(module.relevance(W, (), state, r)[0], r * value)
    assert captured_said(caplog) == ["a pass cannot be captured as a CUDA graph (it waits for the GPU in "
                                     "aten._local_scalar_dense.default); it is launched kernel by kernel"]
    assert not driver.log and own.runs == 6 + 1


X = torch.arange(6.0)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(("run", "op"), [
    (lambda x: x[x > 2], "aten.index.Tensor"), (lambda x: x.nonzero(), "aten.nonzero.default"),
    (lambda x: x[2:].sum().item(), "aten._local_scalar_dense.default"),
    (lambda x: x.repeat_interleave(x.long()), "aten.repeat_interleave.Tensor"),
    (lambda x: x.repeat_interleave(x.long(), output_size=15), ""), (lambda x: x[x.long()], ""),
    (lambda x: x.clone().index_put_((x > 2,), x[:1]), "aten.index_put_.default"),
    (lambda x: x.to("meta"), "aten._to_copy.default"), (lambda x: x.softmax(0) @ x, "")])
def test_ops_that_wait(run: Callable[[Tensor], Any], op: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        x = torch.arange(6.0)
        assert waiting(lambda: run(x)) == op


def test_what_is_not_on_the_gpu_runs_as_ever() -> None:
    driver = Driver()
    driver.capable = False
    module = Graphed(Twice(), driver)
    for value in range(4):
        state, r = call(module, value)
        assert torch.equal(module.relevance(W, (), state, r)[0], r * value)
    assert not driver.log
    assert not Cuda().able([torch.zeros(2)]) and not Cuda().able([torch.zeros(2), torch.zeros(2, device="meta")])


@pytest.mark.parametrize("total", [None, 1_600_000, 16 * 500])
def test_threads(total: int | None) -> None:
    """Calls of several threads do not take each other's numbers, nor do two modules that share a bound of memory (in
    the last case for no more than a few of the shapes)."""
    driver, wrong = Driver(), list[float]()
    driver.total = total or 0
    modules = [Graphed(Twice(), driver, bounded=total is not None) for _ in range(1 if total is None else 2)]

    def work(value: float) -> None:
        for step in range(60):
            size, module = 3 + step // 8 % 3, modules[step // 5 % len(modules)]
            (y,), state = module.forward(W, (), torch.full((size,), value))
            found, _ = module.relevance(W, (), state, torch.full((size,), 10.0))
            if not (torch.equal(y, torch.full((size,), 2 * value))
                    and torch.equal(found, torch.full((size,), 10 * value))):
                wrong.append(value)
            del state

    threads = [threading.Thread(target=work, args=(float(value),)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads) and "replay" in driver.log


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
                       ("graph_pool_handle", lambda: "a pool")):
        monkeypatch.setattr(torch.cuda, name, fake)
    driver = Cuda()
    first, results, point = driver.capture(lambda: 5, None)
    second, _, _ = driver.capture(lambda: 6, first)
    driver.wait(point)
    driver.finish(point)
    assert results == 5 and isinstance(second, Graph)
    assert asked == [("a pool", "thread_local"), "record", ("the pool", "thread_local"), "record", "wait",
                     "synchronize"]


def test_a_capture_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch leaves its stream current, and its allocator at work for the graph."""
    asked: list[Any] = []

    class Stream:
        device_index = 3

    @contextmanager
    def graph(graph: Any, pool: Any, capture_error_mode: str) -> Iterator[None]:
        yield

    own = Stream()
    for name, fake in (("CUDAGraph", object), ("graph", graph), ("current_stream", lambda: own),
                       ("graph_pool_handle", lambda: "a pool"), ("set_stream", asked.append)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *given: asked.append(given), raising=False)

    def fails() -> None:
        raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError, match="previous error"):
        Cuda().capture(fails, None)
    assert asked == [own, (3, "a pool")]


def test_the_driver_counts_the_segments_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        def pool(self) -> tuple[int, int]:
            return (0, 7)

    segments = [{"segment_pool_id": (0, each % 2 * 7), "total_size": 10**each} for each in range(4)]
    for name, fake in (("memory_snapshot", lambda: segments), ("mem_get_info", lambda: (50, 900)),
                       ("memory_reserved", lambda: 30), ("memory_allocated", lambda: 10)):
        monkeypatch.setattr(torch.cuda, name, fake)
    assert Cuda().held(Graph()) == 1010 and Cuda().memory() == (900, 70)


# --- by themselves -----------------------------------------------------------------------------------


def run_all(module: Graphed, sizes: list[int], times: int = 1) -> None:
    """Calls of these sizes in turn, whose numbers must be right."""
    for value in range(times):
        for size in sizes:
            (y,), state = module.forward(W, (), torch.full((size,), float(value)))
            assert torch.equal(y, torch.full((size,), 2.0 * value))
            found, x = module.relevance(W, (), state, torch.full((size,), 10.0))
            assert torch.equal(found, torch.full((size,), 10.0 * value)) and torch.equal(x, torch.full((size,), value))
            del y, state, found, x


def sizes_of(module: Graphed) -> list[int]:
    return [one.forward.inputs[0].shape[0] for one in module.shelf]


@pytest.mark.parametrize("part", ["forward", "relevance"])
def test_a_graph_that_gives_wrong_numbers_is_dropped(part: str, caplog: pytest.LogCaptureFixture) -> None:
    """The call that sees it has the right ones, one warning says so, and it is not tried again."""
    driver = Driver()
    capture = driver.capture

    def spoilt(run: Any, like: Any) -> Any:
        graph, results, point = capture(run, like)
        if (like is None) == (part == "forward"):
            def wrong(tape: Tape) -> None:
                tape.steps[-1][-1].mul_(1.0 + 2.0**-20)

            graph.spoilt = wrong
        return graph, results, point

    driver.capture = spoilt  # type: ignore[method-assign]
    module = Graphed(Twice(), driver, bounded=True)
    run_all(module, [5], times=12)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "did not give the numbers of the kernels launched one by one" in caplog.text
    relevance = [] if part == "forward" else ["capture relevance", "replay", "replay"]
    assert driver.log == ["capture", "replay", *relevance, "finish"] and not module.shelf


class Unsteady(Twice):
    """Its numbers are not twice the same, as those of sums in any order are; a graph's neither."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, weights: Any, prepared: Any, x: Tensor) -> tuple[Any, list[Any]]:
        (y,), state = super().forward(weights, prepared, x)
        return (y * (1.0 + self.by * torch.rand(())),), state


@pytest.mark.parametrize(("by", "kept"), [(1e-5, True), (1e-1, False)])
def test_numbers_that_are_never_twice_the_same_are_near(by: float, kept: bool) -> None:
    module = Graphed(Unsteady(by), Driver())
    for _ in range(5):
        module.forward(W, (), X)
    assert bool(module.shelf) == kept


def test_near_is_what_it_is_in_the_trial() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        near = cuda_same.NEAR.get(str(dtype), cuda_same.NEAR_ELSE)
        assert near == tolerance([torch.ones((), dtype=dtype)])


def test_graphs_keep_a_share_of_the_memory(caplog: pytest.LogCaptureFixture) -> None:
    """The bound is 100 kB. A pass that takes more is not captured; shapes used longest ago go for others, of all
    explainers; no pass is captured that is planned to take more."""
    driver = Driver()
    module, other = (Graphed(Twice(), driver, bounded=True) for _ in range(2))
    run_all(module, [1000], times=7)
    (one,) = module.shelf
    assert one.size == 20_000
    run_all(other, [1000], times=7)
    run_all(module, [1500], times=7)
    assert sizes_of(module) == [1000, 1500] and sizes_of(other) == [1000]
    run_all(other, [3000], times=7)
    held = [one.size for each in (module, other) for one in each.shelf]
    assert 3000 in sizes_of(other) and 1000 not in sizes_of(module) and sum(held) <= 100_000
    caplog.set_level("INFO")
    run_all(module, [20_000], times=7)
    assert 20_000 not in sizes_of(module) and "more than graphs may keep" in caplog.text
    captured = driver.log.count("capture")
    careful = Graphed(Twice(), driver, bounded=True, planned=lambda inputs: 100 * inputs[0].nbytes)
    run_all(careful, [1000], times=7)
    assert driver.log.count("capture") == captured and "more than the 100.0 kB that graphs may keep" in caplog.text
    asked_for = Graphed(Twice(), driver)
    run_all(asked_for, [20_000], times=7)
    assert sizes_of(asked_for) == [20_000]


def test_what_has_no_plan_is_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    def unknown(inputs: Sequence[Any]) -> int:
        raise KeyError("T")

    module = Graphed(Twice(), Driver(), bounded=True, planned=unknown)
    caplog.set_level("INFO")
    run_all(module, [5], times=7)
    assert not module.shelf and "nobody knows what memory it takes" in caplog.text


def test_graphs_make_way_for_calls_that_need_their_memory() -> None:
    driver = Driver()
    module = Graphed(Twice(), driver, bounded=True, planned=lambda inputs: 10 * inputs[0].nbytes)
    run_all(module, [100], times=7)
    assert [one.size for one in module.shelf] == [2000]
    driver.free = 6500
    run_all(module, [110])
    assert sizes_of(module) == [100]
    run_all(module, [200])
    assert not sizes_of(module)


@pytest.mark.parametrize("part", ["forward", "relevance"])
def test_memory_that_is_too_short_for_both_ways(part: str, caplog: pytest.LogCaptureFixture) -> None:
    """The call that would compare a graph fails once, and is made without one; the shape is not captured again."""
    driver, own = Driver(), Twice()
    module, real = Graphed(own, driver, bounded=True), getattr(own, part)
    run_all(module, [5], times=3 if part == "forward" else 4)
    left = [1]

    def short(*given: Any) -> Any:
        if left and left.pop():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB")
        return real(*given)

    setattr(own, part, short)
    caplog.set_level("INFO")
    run_all(module, [5], times=5)
    assert not left and not module.shelf and "memory is too short to compare its numbers" in caplog.text
    assert driver.log.count("capture") == 1


@pytest.mark.parametrize("part", ["forward", "relevance"])
def test_graphs_go_where_a_call_beside_them_has_no_memory(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That call is an error, which says what to lower; the next one has the graph's memory."""
    module = Graphed(Twice(), Driver(), bounded=True)
    run_all(module, [5], times=7)
    (kept,) = module.shelf
    graph = kept.forward.graph if part == "forward" else next(iter(kept.relevance.values())).graph  # type: ignore[union-attr]

    def short() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB")

    monkeypatch.setattr(graph, "replay", short)
    with pytest.raises(torch.OutOfMemoryError):
        run_all(module, [5])
    assert not module.shelf
    run_all(module, [5], times=3)


@pytest.mark.parametrize("part", ["forward", "relevance"])
@pytest.mark.parametrize(("text", "last"), [("CUDA out of memory. Tried to allocate 2 GiB", False),
                                            ("operation not permitted", True)])
def test_a_capture_that_fails_runs_as_ever(text: str, last: bool, part: str, caplog: pytest.LogCaptureFixture) -> None:
    """For want of memory: this shape is not captured. For anything else: nothing more is."""
    driver = Driver()
    module = Graphed(Twice(), driver, bounded=True)
    if part == "relevance":
        run_all(module, [5], times=3)
    driver.failure = RuntimeError(text)
    caplog.set_level("INFO")
    run_all(module, [5], times=7)
    assert len(captured_said(caplog)) == 1 and text in caplog.text
    driver.failure = None
    before = driver.log.count("capture")
    run_all(module, [6], times=7)
    assert (driver.log.count("capture") == before) == last


def test_plans_of_memory_know_the_arguments() -> None:
    explainer = dlbc.compile(Model().eval(), torch.zeros(2, 6, dtype=torch.long), rules="dlb", cache=False)
    given = ids(0, batch=3, length=5)
    assert planned(explainer.manifest, (given,)) == explainer.memory(given).peak.total


def test_auto_is_what_explainers_do(driver: Driver) -> None:
    """Compiled, loaded, with other options; the plan says it; not within a budget of memory, which is no error."""
    model = Model().eval()
    explainer = dlbc.compile(model, ids(0), rules="dlb", cache=False)
    plain = explainer.with_options(cuda_graphs=False)
    for seed in range(7):
        same(explainer(ids(seed)), plain(ids(seed)))
    assert driver.log.count("capture") == 1 and driver.log.count("capture relevance") == 1
    (note,) = explainer.plan().notes
    assert note.startswith("CUDA graphs: a pass is captured when its shapes come the third time (1 shape now, ")
    assert not plain.plan().notes
    count = len(driver.log)
    for _ in range(4):
        explainer(ids(1), memory_budget="1GB")
    assert len(driver.log) == count
    bounded = dlbc.compile(model, ids(0), rules="dlb", cache=False, memory_budget="1GB")
    assert bounded.plan().notes == ("CUDA graphs: none within a memory budget",)
    assert not isinstance(bounded._load(bounded.default).module, Graphed)
    assert not dlbc.compile(model, ids(0), cache=False, cuda_graphs=False).plan().notes


def test_saved_explainers_say_nothing_of_graphs(driver: Driver, tmp_path: Path) -> None:
    """So whether there are any is up to where they are loaded, as for files of earlier versions."""
    model = Model().eval()
    dlbc.compile(model, ids(0), cache=False, cuda_graphs=False).save(tmp_path / "x.dlbc", weights=True)
    for loaded in (dlbc.load(tmp_path / "x.dlbc", model), dlbc_runtime.load(tmp_path / "x.dlbc", trust=True)):
        assert "cuda_graphs" not in loaded.recipe
        assert loaded.plan().notes[-1].startswith("CUDA graphs: ")


# --- bad input ---------------------------------------------------------------------------------------


def test_errors() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(2, 4)
    for wrong in ("always", None, 1.5):
        with pytest.raises(InputError, match=r"cuda_graphs=.*\n.*, True or False"):
            dlbc.compile(model, x, cuda_graphs=wrong, cache=False)  # type: ignore[arg-type]
    assert not dlbc.compile(model, x, cache=False).plan().notes
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
