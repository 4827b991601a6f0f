"""Builds ops with inferred types and fresh names: `at.linear(x, weight)` appends one op, returns its value.

The same builder serves the frontend, the passes and the rules. It appends to a list of ops; whoever made
it puts that list into a section.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from dlbc.errors import IRError
from dlbc.ir.core import Attr, Op, Operand, Type, Value
from dlbc.ir.ops import definition, infer


class Builder:
    """Appends ops to `ops`. `taken` holds the names already used in the graph; new names avoid them."""

    def __init__(self, taken: Iterable[str] = (), *, place: str = "", of: str = "", prefix: str = "") -> None:
        self.ops: list[Op] = []
        self.taken = set(taken)
        self.place, self.of, self.prefix = place, of, prefix
        self._counters: dict[str, int] = {}

    def name(self, stem: str) -> str:
        """A name that nothing in the graph has: `stem`, or `stem.1`, `stem.2`, ..."""
        candidate, number = stem, self._counters.get(stem, 0)
        while candidate in self.taken:
            number += 1
            candidate = f"{stem}.{number}"
        self._counters[stem] = number
        self.taken.add(candidate)
        return candidate

    def op(self, name: str, *operands: Operand, result: str | tuple[str, ...] = "", place: str | None = None,
           **attrs: Attr) -> tuple[Value, ...]:
        """Append an op; its results. `result` proposes their names; IRError when the op does not fit."""
        while operands and operands[-1] is None:
            operands = operands[:-1]
        try:
            types = infer(name, operands, attrs)
        except IRError as problem:
            raise IRError(problem.fact, hint=problem.hint,
                          where=f"#{self.place if place is None else place}") from problem
        stems = (result,) if isinstance(result, str) else result
        results = tuple(Value(self.name((stems[i] if i < len(stems) else "") or self.prefix + name), type_)
                        for i, type_ in enumerate(types))
        defaults = definition(name).attrs
        stated = {key: value for key, value in attrs.items()
                  if key not in defaults or defaults[key] != value or type(defaults[key]) is not type(value)}
        self.ops.append(Op(name, operands, results, stated, self.place if place is None else place, of=self.of))
        return results

    def __getattr__(self, name: str) -> Callable[..., Value]:
        """`at.<op>(...)`: append the op of that name and return its first result (`slice_` is `slice`)."""
        if name.startswith("__"):
            raise AttributeError(name)
        op_name = name.rstrip("_")

        def append(*operands: Operand, result: str = "", **attrs: Attr) -> Value:
            return self.op(op_name, *operands, result=result, **attrs)[0]  # type: ignore[arg-type]

        return append

    def zeros(self, like: Type) -> Value:
        """A tensor of zeros of a type."""
        return self.full(shape=like.shape, value=0.0, dtype=like.dtype)

    if TYPE_CHECKING:
        full: Callable[..., Value]
