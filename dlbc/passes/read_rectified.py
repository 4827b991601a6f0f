"""Read rectified: relevance reads `relu(y)` in place of y, where both are kept and a 0 stands wherever they differ.

Rules of a layer read what it gave, y, and rules of the layer behind read `relu(y)`: both would be kept, twice what
a gradient keeps. But what passes back through a ReLU is 0 wherever y is not positive, and 0 times y is 0 times
`relu(y)`. So where all that relevance reads y for ends in such a product, it need not be kept, and nothing is computed
again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from dlbc.ir.core import Graph, Kernel, Op, Operand, Value
from dlbc.passes import Pass, register
from dlbc.passes.rewrite import users, with_saves

_FIRST = frozenset({"div", "damp", "relu_adjoint", "neg", "abs", "sign", "relu", "negative_part", "safe_div"})
"""Elementwise ops that give 0 (or NaN, whatever else they read) where their first operand is 0."""

_FINITE = frozenset({"neg", "abs", "sign", "relu", "negative_part", "add", "sub", "mul", "stabilise", "maximum",
                     "minimum", "safe_div", "gt", "ge", "lt", "le", "where"})
"""Elementwise ops that give a finite number (or a bool) for finite ones, whichever operand that is."""

_NUMERATORS = frozenset({"div", "damp", "relu_adjoint"})
"""The same for their first operand."""

_NEVER_ZERO = frozenset({"stabilise", "threshold"})


@register
@dataclass(frozen=True)
class ReadRectified(Pass):
    """Let relevance read `relu(y)` for y, where it reads both and the result is the same (finite numbers taken for
    granted). For lowered graphs; others stay as they are."""

    name: ClassVar[str] = "read_rectified"

    def run(self, graph: Graph) -> Graph:
        """The graph with a forward section that keeps fewer values."""
        relevance = graph.relevance
        if relevance is None or any(isinstance(item, Kernel) or item.name.startswith("rel.")
                                    for item in relevance.body):
            return graph
        readers, definitions = users(relevance), relevance.definitions()
        returned = {v.name for v in relevance.results}
        replaced: dict[str, Value] = {}
        for op in graph.forward.ops:
            y = op.operands[0] if op.name == "relu" else None
            if not isinstance(y, Value) or op.result.name not in readers or y.name not in readers:
                continue
            places = _Places(y, op.result, readers, definitions)
            if y.type.rank and y.name not in returned and places.hidden(returned):
                replaced[y.name] = op.result
        if not replaced:
            return graph

        def swapped(operand: Operand) -> Operand:
            return replaced.get(operand.name, operand) if isinstance(operand, Value) else operand

        body = tuple(replace(op, operands=tuple(map(swapped, op.operands))) for op in relevance.ops)
        return with_saves(replace(graph, relevance=replace(relevance, body=body)))


class _Places:
    """What is known of numbers of the relevance section in the places where y is not positive."""

    def __init__(self, y: Value, rectified: Value, readers: Mapping[str, list[Op]],
                 definitions: Mapping[str, Op]) -> None:
        self.y, self.readers, self.definitions = y, readers, definitions
        self.zero: set[str] = {rectified.name}
        """Values that are 0 there."""
        waiting = [y, rectified]
        while waiting:
            for op in readers.get(waiting.pop().name, ()):
                if op.result.name not in self.zero and self._vanishes(op):
                    self.zero.add(op.result.name)
                    waiting.append(op.result)

    def hidden(self, returned: set[str]) -> bool:
        """True where nothing depends on the numbers that y has in those places, as long as they are finite."""
        waiting, seen = [self.y], {self.y.name}
        while waiting:
            value = waiting.pop()
            for op in self.readers.get(value.name, ()):
                if self._absorbs(op, value):
                    continue
                position = [i for i, o in enumerate(op.operands) if o == value]
                follows = op.name in _FINITE or (op.name in _NUMERATORS and position == [0])
                if not follows or not self._aligned(op.result) or op.result.name in returned:
                    return False
                if op.result.name not in seen:
                    seen.add(op.result.name)
                    waiting.append(op.result)
        return True

    def _absorbs(self, op: Op, value: Value) -> bool:
        """True where an op gives the same there for any finite number of a value."""
        if op.name == "relu_adjoint" and op.operands[1] == value == self.y:
            return op.operands[0] != value  # y and relu(y) are positive in the same places
        if op.result.name not in self.zero:
            return False
        first = op.operands[0]
        if op.name == "mul":
            return any(self._is_zero(o) for o in op.operands if o != value)
        if op.name == "div":
            made = self.definitions.get(value.name)
            return first != value and self._is_zero(first) and made is not None and made.name in _NEVER_ZERO
        return op.name in ("damp", "safe_div", "relu_adjoint") and first != value and self._is_zero(first)

    def _vanishes(self, op: Op) -> bool:
        if not self._aligned(op.result):
            return False
        if op.name == "relu_adjoint" and op.operands[1] == self.y:
            return True
        if op.name == "mul":
            return any(self._is_zero(o) for o in op.operands)
        if op.name in ("add", "sub"):
            return all(self._is_zero(o) for o in op.operands)
        return op.name in _FIRST and self._is_zero(op.operands[0])

    def _is_zero(self, operand: Operand) -> bool:
        return isinstance(operand, Value) and operand.name in self.zero and self._aligned(operand)

    def _aligned(self, value: Value) -> bool:
        """True for a value with the places of y, once or for each seed."""
        return value.type.shape[-self.y.type.rank:] == self.y.type.shape
