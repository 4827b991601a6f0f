"""Runs a graph op by op in float64 numpy: slow, obvious, the oracle that passes and backends are held to.

Every floating type is computed in float64, every integer in int64 (narrow ones wrap as their type does).
What an op computes is in `reference.py`; here is how a graph is run: sizes are bound from the shapes of
the parameters, then prepare, forward and relevance are run in order.

    run = interpret(graph, {"x": x}, weights, seeds={"R.y": seed})
    run.outputs, run.relevance, run.values["h"]
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from dlbc.errors import InputError, IRError
from dlbc.ir.core import FLOATS, Attr, Graph, Kernel, Op, Operand, Type, Value, Weight
from dlbc.ir.dims import Sym, evaluate
from dlbc.ir.ops import definition
from dlbc.ir.reference import REFERENCE
from dlbc.ir.reference_layers import Array
from dlbc_runtime.streams import BUDGET, stream

Expand: TypeAlias = "Callable[[Graph, Op], Sequence[Op]]"

CALL = "call"
"""The op that runs a function of the graph: attribute `function`, operands in the order of its parameters."""

STREAM = "stream"
"""As a call, on some rows of the operands after the others: `passes/stream_attention.py`."""

_INTEGERS = {"i64": np.int64, "i32": np.int32, "i16": np.int16, "i8": np.int8, "u8": np.uint8}


@dataclass(frozen=True, slots=True)
class Run:
    """What a run computed: `values` has every value of the sections by name (those of functions: not)."""

    sizes: dict[str, int]
    values: dict[str, Array]
    outputs: tuple[Array, ...]
    relevance: tuple[Array, ...]


def interpret(graph: Graph, inputs: Mapping[str, ArrayLike], weights: Mapping[str, ArrayLike],
              seeds: Mapping[str, ArrayLike] | None = None, *, saved: Mapping[str, ArrayLike] | None = None,
              expand: Expand | None = None) -> Run:
    """Run a graph of any level; without `seeds` the relevance section is left out.

    `saved`: what a backend's own forward saved for relevance, by value name: the forward section is not run, and
    `outputs` is empty. So relevance is compared apart from the forward, whose rounding decides what a kink does.

    `inputs` and `seeds` are keyed by the names of the sections' parameters, `weights` by weight name.
    `expand` turns a `rel.*` op (level 2) into primitive ops that define its results. Raises InputError
    when arrays are missing or do not fit their types, IRError when an op does not do what its type says.
    """
    params = list(graph.forward.params)
    given = dict(inputs)
    if seeds is not None and graph.relevance is not None:
        params += graph.relevance.params
        given |= seeds
    machine = _Machine(graph, weights, {}, expand)
    values: dict[str, Array] = {}
    for param in params:
        if param.name not in given:
            raise InputError(f"no array is given for `{param}`", hint=f"the graph takes {_names(params)}")
        values[param.name] = stored(given[param.name], param.type.dtype)
    sizes = bind(params, values, {})
    if saved is not None:
        _give(graph, saved, values, sizes)
    skipped = {"relevance"} if seeds is None else {"forward"} if saved is not None else set()
    with np.errstate(all="ignore"):
        for name, section in graph.sections():
            if name not in skipped:
                machine.run(section.body, values, sizes)
    relevance = graph.relevance.results if graph.relevance is not None and seeds is not None else ()
    results = () if "forward" in skipped else graph.forward.results
    return Run(sizes, values, tuple(values[v.name] for v in results),
               tuple(values[v.name] for v in relevance))


def _give(graph: Graph, saved: Mapping[str, ArrayLike], values: dict[str, Array], sizes: Mapping[str, int]) -> None:
    """Put in what relevance reads of the forward section."""
    for value in graph.forward.saves:
        if value.name not in saved and value.name not in values:
            raise InputError(f"no array is given for the saved `{value}`",
                             hint=f"relevance reads {_names(graph.forward.saves)}")
        if value.name in saved:
            values[value.name] = stored(saved[value.name], value.type.dtype)
            _check(f"the saved {value}", value.type, values[value.name], sizes, InputError)


def stored(array: ArrayLike, dtype: str) -> Array:
    """An array as the interpreter keeps values of an element type: float64, int64 or bool."""
    array = np.asarray(array)
    if dtype == "bool":
        return array.astype(np.bool_, copy=False)
    if dtype in FLOATS:
        return array.astype(np.float64, copy=False)
    return array.astype(_INTEGERS[dtype], copy=False).astype(np.int64, copy=False)


def bind(params: Sequence[Value], arrays: Mapping[str, Array], known: Mapping[str, int]) -> dict[str, int]:
    """The sizes that the shapes of parameters' arrays give to their dims. InputError where they disagree."""
    sizes, fixed = dict(known), set[str]()
    for param in params:
        shape = arrays[param.name].shape
        if len(shape) != param.type.rank:
            raise InputError(f"`{param}` has shape {shape}, its type is {param.type}")
        for dim, size in zip(param.type.shape, shape, strict=True):
            if isinstance(dim, Sym) and str(dim).isidentifier() and str(dim) not in fixed:
                fixed.add(str(dim))
                sizes[str(dim)] = size
    for param in params:
        _check(str(param), param.type, arrays[param.name], sizes, InputError)
    return sizes


@dataclass(frozen=True, slots=True)
class _Machine:
    """What ops run on: the graph, its weights, and which weights a function's parameters stand for."""

    graph: Graph
    weights: Mapping[str, ArrayLike]
    names: Mapping[str, str]
    expand: Expand | None

    def run(self, body: Iterable[Op | Kernel], values: MutableMapping[str, Array],
            sizes: Mapping[str, int]) -> None:
        """Run ops and kernels in order; their results are added to `values`."""
        for item in body:
            for op in item.body if isinstance(item, Kernel) else (item,):
                for result, array in zip(op.results, self.compute(op, values, sizes), strict=True):
                    values[result.name] = self.checked(op, result, array, sizes)

    def compute(self, op: Op, values: MutableMapping[str, Array],
                sizes: Mapping[str, int]) -> Sequence[Array]:
        """The results of one op."""
        if op.name == CALL:
            return self.call(op, values, sizes)
        if op.name == STREAM:
            return self.stream(op, values, sizes)
        if op.name.startswith("rel."):
            return self.expanded(op, values, sizes)
        entry = definition(op.name)
        operands = [self.read(operand, values, sizes) for operand in op.operands]
        attrs = {name: _number(value, sizes) for name, value in {**entry.attrs, **op.attrs}.items()}
        try:
            found = REFERENCE[op.name](*operands, **attrs)
        except (IndexError, TypeError, ValueError) as problem:
            shapes = ", ".join("none" if o is None else str(list(o.shape)) for o in operands)
            raise IRError(f"`{op.name}` of shapes {shapes}: {problem}", where=f"#{op.place}") from problem
        return found if isinstance(found, tuple) else (found,)

    def read(self, operand: Operand, values: Mapping[str, Array], sizes: Mapping[str, int]) -> Array | None:
        """The array that an operand stands for."""
        if isinstance(operand, Value):
            if operand.name not in values:
                raise IRError(f"`{operand}` is read before it is defined")
            return values[operand.name]
        if isinstance(operand, Weight):
            return self.weight(operand)
        if operand is None:
            return None
        return np.asarray(evaluate(operand, sizes) if isinstance(operand, Sym) else operand)

    def weight(self, weight: Weight) -> Array:
        """A weight's array, converted at each use: a large model's float64 copy is never held whole."""
        name = self.names.get(weight.name, weight.name)
        if name not in self.weights:
            raise InputError(f"no array is given for the weight `@{name}` : {weight.type}")
        array = stored(self.weights[name], weight.type.dtype)
        _check(f"@{name}", weight.type, array, {}, InputError)
        return array

    def call(self, op: Op, values: Mapping[str, Array], sizes: Mapping[str, int]) -> list[Array]:
        """Run a function with its own values; its weights are those that the caller names."""
        function = self.graph.functions.get(str(op.attrs.get("function")))
        if function is None:
            raise IRError(f"the graph has no function `@{op.attrs.get('function')}`", where=f"#{op.place}",
                          hint=f"it has {', '.join(self.graph.functions) or 'none'}")
        inner: dict[str, Array] = {}
        names: dict[str, str] = {}
        for param, operand in zip(function.params, op.operands, strict=True):
            if isinstance(param, Weight) and isinstance(operand, Weight):
                names[param.name] = self.names.get(operand.name, operand.name)
                continue
            array = self.read(operand, values, sizes)
            if array is not None:
                inner[param.name] = array
        given = [param for param in function.params if isinstance(param, Value) and param.name in inner]
        machine = _Machine(self.graph, self.weights, names, self.expand)
        machine.run(function.body, inner, bind(given, inner, sizes))
        return [inner[result.name] for result in function.results]

    def stream(self, op: Op, values: Mapping[str, Array], sizes: Mapping[str, int]) -> Sequence[Array]:
        """Run a function on blocks of rows: on three at least, so that it shows where that is not the same."""
        function = self.graph.functions.get(str(op.attrs.get("function")))
        if function is None:
            raise IRError(f"the graph has no function `@{op.attrs.get('function')}`", where=f"#{op.place}",
                          hint=f"it has {', '.join(self.graph.functions) or 'none'}")
        params = [param for param in function.params if isinstance(param, Value)]
        how: dict[str, Any] = {n: _number(value, sizes) for n, value in op.attrs.items() if n != "function"}
        how["budget"] = min(how.get("budget") or BUDGET, how["width"] * -(-how["rows"] // 3))

        def block(given: list[Array]) -> list[Array]:
            inner = {param.name: array for param, array in zip(params, given, strict=True)}
            self.run(function.body, inner, bind(params, inner, sizes))
            return [inner[result.name] for result in function.results]

        given = [np.asarray(self.read(operand, values, sizes)) for operand in op.operands]
        return stream(block, given, lambda shape, like: np.zeros(shape, like.dtype), **how)

    def expanded(self, op: Op, values: MutableMapping[str, Array], sizes: Mapping[str, int]) -> list[Array]:
        """Run the primitives of a relevance op; only its results are seen outside."""
        if self.expand is None:
            raise IRError(f"`{op.name}` is no primitive", where=f"#{op.place}",
                          hint="lower the graph, or give interpret() the rules' `expand`")
        inner = ChainMap[str, Array]({}, values)
        self.run(self.expand(self.graph, op), inner, sizes)
        return [inner[result.name] for result in op.results]

    def checked(self, op: Op, result: Value, array: Array, sizes: Mapping[str, int]) -> Array:
        """The result as its type says; IRError when its shape is another."""
        array = stored(array, result.type.dtype)
        _check(f"#{op.place} `{op.name}` to {result}", result.type, array, sizes, IRError)
        return array


def _check(what: str, type_: Type, array: Array, sizes: Mapping[str, int],
           error: type[IRError] | type[InputError]) -> None:
    expected = tuple(evaluate(dim, sizes) for dim in type_.shape)
    if array.shape != expected:
        raise error(f"{what} has shape {list(array.shape)}, its type {type_} says {list(expected)}")


def _number(value: Attr, sizes: Mapping[str, int]) -> Attr:
    """An attribute with its sizes put in."""
    if isinstance(value, Sym):
        return evaluate(value, sizes)
    return tuple(_number(item, sizes) for item in value) if isinstance(value, tuple) else value


def _names(params: Iterable[Value]) -> str:
    return ", ".join(f"{param} : {param.type}" for param in params) or "nothing"
