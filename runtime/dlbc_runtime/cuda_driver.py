"""What CUDA graphs (`cuda_graphs.py`) ask of the GPU, by torch; and which passes a graph cannot take."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast

log = logging.getLogger(__name__)

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

    def held(self, graph: Any) -> int:
        """The bytes that a graph, and those which share its memory, keep from the rest of the process."""

    def memory(self) -> tuple[int, int]:
        """The bytes of the present GPU's memory, and those that this process could still take."""

    def mark(self) -> Any:
        """A point in what the GPU has been asked to do."""

    def wait(self, point: Any) -> None:
        """What is asked from now on comes after that point, also where it is asked from another thread."""

    def finish(self, point: Any) -> None:
        """Wait, here, until the GPU has come to that point."""


class Cuda:
    """The GPU, by torch."""

    def able(self, tensors: Iterable[Any]) -> bool:
        """Whether all of these lie on the present GPU, nobody else captures what it is asked to do, and no casts of
        weights are kept by autocast, which would then be in a graph's memory."""
        import torch

        devices = {x.device for x in tensors}
        return (len(devices) == 1 and (where := devices.pop()).type == "cuda"
                and where.index == torch.cuda.current_device() and not torch.cuda.is_current_stream_capturing()
                and not torch.is_autocast_enabled("cuda"))

    def flags(self) -> tuple[object, ...]:
        """Torch's switches for products."""
        import torch

        return (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark,
                torch.are_deterministic_algorithms_enabled())

    def capture(self, run: Run, like: Any) -> tuple[Any, Any, Any]:
        """A graph of what `run` does. RuntimeError where that waits for the GPU, or memory is short; all is then as it
        was before."""
        import torch

        stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle() if like is None else like.pool()
        try:
            # Other threads may go on to use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                results = run()
        except BaseException:
            # Where a capture cannot be ended, torch leaves its own stream current and its memory in the graph's pool.
            torch.cuda.set_stream(stream)
            with contextlib.suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(stream.device_index, pool)
            raise
        return graph, results, self.mark()

    def held(self, graph: Any) -> int:
        """The segments of the graph's memory pool."""
        import torch

        pool, cuda = tuple(graph.pool()), cast(Any, torch.cuda)
        sizes: list[int] = [segment["total_size"] for segment in cuda.memory_snapshot()
                            if tuple(segment["segment_pool_id"]) == pool]
        return sum(sizes)

    def memory(self) -> tuple[int, int]:
        """As the driver says, with what torch keeps of it unused."""
        import torch

        free, total = torch.cuda.mem_get_info()
        return total, free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

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


def waiting(run: Run) -> str:
    """The first op in what `run` does that waits for the GPU, or takes numbers from the CPU; "": none. No graph can
    hold such a pass, and a capture that fails leaves more behind than one that is not begun."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    found: list[str] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Looks at each op; at those that an op is made of, where it is of others."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            result = func(*args, **kwargs)
            if not found:
                given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
                made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
                copies = str(func).startswith(("aten._to_copy", "aten.copy"))
                places = {x.device for x in (*given, *made) if x.dim() or copies}
                if len(places) > 1 or _waits(func, kwargs, given):
                    found.append(str(func))
            return result

    with Watch():  # type: ignore[no-untyped-call]
        run()
    return found[0] if found else ""


def _waits(func: Any, kwargs: dict[str, Any], given: list[Any]) -> bool:
    """Whether an op's result, or its shape, is known only when the GPU has computed it."""
    import torch

    name = str(func)
    if name.startswith(("aten.index.", "aten.index_put")):
        return any(x.dtype in (torch.bool, torch.uint8) for x in given[1:])
    if name.startswith("aten.repeat_interleave.") and kwargs.get("output_size") is not None:
        return False
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
