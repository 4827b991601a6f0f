"""What is captured as CUDA graphs: passes, the graphs of one shape, and how often shapes have come."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dlbc_runtime.cuda_same import is_tensor

Key = tuple[object, ...]


@dataclass(eq=False)
class Pass:
    """A captured pass: the graph, its own inputs, and its results. `right`: it was seen to give the same numbers as
    kernels launched one by one."""

    graph: Any
    inputs: list[Any]
    results: Any
    right: bool = False

    def run(self, inputs: Sequence[Any]) -> None:
        """Run it for these inputs."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()


@dataclass(eq=False)
class Captured:
    """The graphs of one shape: of the forward pass, and of relevance for some numbers of targets.

    `held`: prepared values whose addresses are in the graphs. `lent`: the tensors of the state that a call has; while
    one of them is alive, the state's numbers must stay. `point`: after all that the GPU has been asked to do with it.
    `size`: the bytes it keeps; `used`: a number that grows with each use.
    """

    key: Key
    forward: Pass
    state: list[Any]
    held: object
    point: Any
    size: int = 0
    used: int = 0
    lent: list[weakref.ref[Any]] = field(default_factory=list)
    relevance: OrderedDict[Key, Pass | None] = field(default_factory=OrderedDict)

    @property
    def busy(self) -> bool:
        """Whether a call still has the state."""
        return any(ref() is not None for ref in self.lent)

    def lend(self) -> list[Any]:
        """The state for a call, in tensors of its own on the graph's memory."""
        state = [x.detach() if is_tensor(x) else x for x in self.state]
        self.lent = [weakref.ref(x) for x in state if is_tensor(x)]
        return state

    def owns(self, state: Sequence[Any]) -> bool:
        """Whether a state is what was lent."""
        tensors = [x for x in state if is_tensor(x)]
        return bool(tensors) and len(tensors) == len(self.lent) and all(
            ref() is x for ref, x in zip(self.lent, tensors, strict=True))


class Times(OrderedDict[Key, int]):
    """How often each of the last few keys has come."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def again(self, key: Key) -> int:
        """A key comes; how often that was."""
        times = self.pop(key, 0) + 1
        self[key] = times
        while len(self) > self._most:
            self.popitem(last=False)
        return times
