"""An exported program as a level-0 forward section: walks the nodes, checks every type, names every value."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import PurePath
from typing import Any, TypeAlias, TypeVar

import torch
from torch import fx

from dlbc.errors import DlbcError, ExportError, IRError, UnsupportedOpError
from dlbc.frontends.aten import TABLE, UNSUPPORTED, Handler, Tracer, is_tensor, type_of
from dlbc.frontends.aten_complex import COMPLEX, Pair
from dlbc.frontends.sizes import DTYPES, Sizes
from dlbc.ir.core import Location, Op, Operand, Type, Value, Weight, values
from dlbc.ir.dims import Sym

FAMILIES = ("aten_elementwise", "aten_create", "aten_reduce", "aten_linear", "aten_interpolate", "aten_embedding",
            "aten_moves", "aten_index", "aten_recurrent", "aten_experts")

E = TypeVar("E")
Known: TypeAlias = "Operand | tuple[Operand, ...] | fx.GraphModule"

_TORCH = str(PurePath(torch.__file__).parent)
_CHECKS = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range",
           "sym_constrain_range_for_size", "_functional_assert_async", "_functional_assert_scalar"}
_SIZES = {"sym_size", "sym_numel", "sym_stride", "sym_storage_offset", "sym_is_contiguous"}
_SECOND = {"lstm": ".cells"}
"""What the second of two results is called, where it is not the indices of the first."""
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4, "hints_wrapper": 0}
"""Higher-order operators that only wrap a region, with the number of their arguments before the region."""


@dataclass
class Translation:
    """The ops so far. `calls` says for each op which call of which module it came from."""

    sizes: Sizes
    leaves: frozenset[str]
    at: Tracer = field(default_factory=Tracer)
    known: dict[fx.Node, Known] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)
    locations: dict[str, Location] = field(default_factory=dict)

    def run(self, module: fx.GraphModule) -> tuple[Any, ...]:
        """Translate every node after the placeholders, which must be known; the output node's arguments (complex ones
        as `Pair`)."""
        alive = _alive(module.graph)
        for node in module.graph.nodes:
            if node not in alive:
                continue
            if node.op == "output":
                found: tuple[Any, ...] = self._arguments(node.args[0])
                return found
            if node.op == "get_attr":
                self.known[node] = self._attribute(module, str(node.target))
            elif node.op == "call_function":
                self._call(module, node)
        raise IRError("the exported program has no output")

    def _attribute(self, module: fx.GraphModule, name: str) -> Known:
        found = module
        for part in name.split("."):
            found = getattr(found, part)
        if isinstance(found, fx.GraphModule):
            return found
        raise ExportError(f"the exporter left `{name}` as an attribute", hint="register it as a buffer")

    def _call(self, module: fx.GraphModule, node: fx.Node) -> None:
        place, cls, source, call = provenance(node)
        self.at.place = place
        self.at.origin = described(place, cls, source)
        if place and place not in self.locations:
            self.locations[place] = Location(cls, source)
        before = len(self.at.ops)
        try:
            self.known[node] = self._result(module, node)
        except DlbcError as problem:
            if problem.where.startswith(self.at.origin) and self.at.origin:
                raise
            raise type(problem)(f"{problem.fact} (node `{node.format_node()}`)" if isinstance(problem, IRError)
                                else problem.fact, where=self.at.origin, hint=problem.hint) from problem
        self.calls += [call] * (len(self.at.ops) - before)

    def _result(self, module: fx.GraphModule, node: fx.Node) -> Known:
        target, meta = node.target, node.meta.get("val")
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._region(str(target), node)
        if target is operator.getitem:
            return self._item(node)
        if isinstance(meta, torch.SymBool):
            return None
        if isinstance(meta, int | float | torch.SymInt):
            return meta if isinstance(meta, int | float) else self.sizes.dim(meta)
        if isinstance(meta, torch.SymFloat):
            return self._number(meta.node.expr)
        if not isinstance(target, torch._ops.OpOverload):
            raise UnsupportedOpError(f"`{getattr(target, '__name__', target)}` is not an ATen operator",
                                     where=self.at.origin)
        packet = _names(target)[1]
        if packet in _CHECKS or packet in _SIZES:
            return None
        handler = _handler(target, self.at, numbers=COMPLEX if _complex(node) else TABLE)
        self.at.target, self.at.dtypes = f"{packet}.{target._overloadname}", DTYPES
        self.at.expected = self._expected(meta)
        args, kwargs = self._arguments(node.args), self._arguments(node.kwargs)
        try:
            result = handler(self.at, *args, **kwargs)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as problem:
            raise IRError(f"the handler of `{target}` failed: {problem}",
                          hint="this is a mistake in dlbc/frontends, please report it") from problem
        if isinstance(meta, tuple | list):
            many = result if isinstance(result, tuple) else (result,)
            many = many + (None,) * (len(self.at.expected) - len(many))
            return tuple(self._checked(one, type_, node) if one is not None and type_ is not None else None
                         for one, type_ in zip(many, self.at.expected, strict=True))
        return self._checked(result[0] if isinstance(result, tuple) else result, self.at.out, node)

    def _expected(self, meta: object) -> tuple[Type | None, ...]:
        if isinstance(meta, torch.Tensor):
            return (self.sizes.inner_type(meta),)
        if isinstance(meta, tuple | list):
            return tuple(self.sizes.inner_type(one) if isinstance(one, torch.Tensor) else None for one in meta)
        return ()

    def _checked(self, found: Operand, expected: Type, node: fx.Node) -> Operand:
        """The result, cast to the exporter's element type. IRError where the shapes disagree."""
        if not is_tensor(found):
            return self.at.full(shape=expected.shape, value=_number(found), dtype=expected.dtype)
        type_ = type_of(found)
        if len(type_.shape) != len(expected.shape) or not all(map(self.sizes.same, type_.shape, expected.shape)):
            raise IRError(f"`{node.target}` gives {expected} where we find {type_}",
                          hint="the catalogue's type inference (dlbc/ir/ops.py) or a frontend handler is wrong")
        if type_.shape != expected.shape:  # equal sizes written in two ways: keep the exporter's
            found = self.at.reshape(found, shape=expected.shape)
        return self.at.converted(found, expected.dtype)

    def _arguments(self, arguments: Any) -> Any:
        def given(a: Any) -> Any:
            if not isinstance(a, fx.Node):
                return a
            return Pair(self._known(a)) if _is_complex(a.meta.get("val")) else self._known(a)

        return _plain(fx.node.map_aggregate(arguments, given))

    def _known(self, node: fx.Node) -> Any:
        found = self.known[node]
        if found is None and node.meta.get("val") is not None and not isinstance(node.meta["val"], torch.SymBool):
            source = node.args[0] if node.target is operator.getitem else node
            target = source.target if isinstance(source, fx.Node) else None
            name = f"aten.{_names(target)[1]}" if isinstance(target, torch._ops.OpOverload) else str(node)
            if "max_pool" in name:
                raise UnsupportedOpError(f"the indices of `{name}` are used, which is not supported",
                                         where=self.at.origin,
                                         hint="in place of unpooling use interpolation or a transposed convolution")
            raise UnsupportedOpError(f"a further result of `{name}` is used, which is not supported",
                                     where=self.at.origin, hint="write this part of the model with other operators")
        return found

    def _item(self, node: fx.Node) -> Known:
        source, position = node.args
        assert isinstance(source, fx.Node) and isinstance(position, int)
        found = self.known[source]
        return found[position] if isinstance(found, tuple) else found

    def _region(self, name: str, node: fx.Node) -> Known:
        if name not in _REGIONS:
            raise UnsupportedOpError(f"the control flow operator `{name}` is not supported", where=self.at.origin,
                                     hint="use torch.where, or a loop over a fixed number of steps")
        region, *operands = self._region_arguments(node, _REGIONS[name])
        placeholders = [inner for inner in region.graph.nodes if inner.op == "placeholder"]
        self.known |= dict(zip(placeholders, operands, strict=True))
        found = self.run(region)
        return tuple(one.value if isinstance(one, Pair) else one
                     for one in (found if isinstance(found, tuple) else (found,)))

    def _region_arguments(self, node: fx.Node, skipped: int) -> list[Any]:
        return [self.known[arg] if isinstance(arg, fx.Node) else arg for arg in node.args[skipped:]]

    def _number(self, expression: Any) -> Operand:
        """A number computed from sizes (`T / 2`, `T ** 0.5`), as a tensor of rank 0."""
        at, kind = self.at, type(expression).__name__
        if expression.is_Integer:
            return int(expression)
        if expression.is_number:
            return float(expression)
        if kind == "ToFloat" or expression.is_Symbol:
            return at.full(shape=(), value=self.sizes.dim(expression), dtype="f64")
        parts = [self._number(arg) for arg in expression.args]
        if kind in ("Add", "Mul"):
            found = parts[0]
            for part in parts[1:]:
                found = at.op("add" if kind == "Add" else "mul", found, part)[0]
            return found
        if kind in ("IntTrueDiv", "FloatTrueDiv", "FloatPow", "PowByNatural", "Pow"):
            return at.op("div" if "Div" in kind else "pow", at.tensor(parts[0], "f64"), parts[1])[0]
        if "sqrt" in kind:
            return at.sqrt(parts[0])
        raise UnsupportedOpError(f"the number `{expression}` is computed from sizes in a way that is not supported",
                                 where=self.at.origin, hint="compile with dynamic=False")

    def named(self, results: Iterable[Value], taken: Iterable[str]) -> tuple[tuple[Op, ...], Callable[[Value], Value]]:
        """The ops that results depend on, every value under its final name; and how values were renamed."""
        alive = {value.name for value in results}
        kept: list[tuple[Op, tuple[str, str]]] = []
        for op, call in reversed(list(zip(self.at.ops, self.calls, strict=True))):
            if any(value.name in alive for value in op.results):
                alive |= {value.name for value in values(op.operands)}
                kept.append((op, call))
        kept.reverse()
        last = {call: op for op, call in kept}
        namer, renamed = Tracer(), dict[str, Value]()
        namer.taken = set(taken)
        ops: list[Op] = []
        for op, call in kept:
            stem = self._stem(op, last[call] is op)
            for i, value in enumerate(op.results):
                suffix = "" if i == 0 else _SECOND.get(op.name, ".indices") if len(op.results) == 2 else f".{i}"
                renamed[value.name] = Value(namer.name(stem + suffix), value.type)
            operands = tuple(renamed.get(o.name, o) if isinstance(o, Value) else o for o in op.operands)
            ops.append(replace(op, operands=operands, results=tuple(renamed[v.name] for v in op.results)))
        return tuple(ops), lambda value: renamed.get(value.name, value)

    def _stem(self, op: Op, is_last: bool) -> str:
        own = op.place.rpartition(".")[2]
        speaks = is_last and op.place in self.leaves and re.fullmatch(r"(?!([A-Z]|s\d+)$)[A-Za-z_]\w*", own)
        return own if speaks else op.name


def _alive(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the output depends on: others may have sizes that only the data knows."""
    alive: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        if node not in alive:
            alive.add(node)
            waiting += node.all_input_nodes
    return alive


def _is_complex(meta: object) -> bool:
    return isinstance(meta, torch.Tensor) and meta.is_complex()


def _complex(node: fx.Node) -> bool:
    """Whether a node computes with or gives complex numbers."""
    return any(_is_complex(one.meta.get("val")) for one in (node, *node.all_input_nodes))


def _handler(target: torch._ops.OpOverload, at: Tracer, numbers: Mapping[str, Handler] = TABLE) -> Handler:
    """The handler of an ATen overload on real or complex numbers. UnsupportedOpError, with a remedy, when there is
    none."""
    full = f"{_names(target)[1]}.{target._overloadname}"
    found = _entry(target, UNSUPPORTED)
    if found is not None:
        raise UnsupportedOpError(f"`aten.{full}` is not supported", where=at.origin, hint=found)
    handler = _entry(target, numbers)
    if handler is not None:
        return handler
    if numbers is COMPLEX:
        raise UnsupportedOpError(f"`aten.{full}` of complex numbers is not supported", where=at.origin,
                                 hint="write this part of the model with real numbers (torch.view_as_real)")
    raise UnsupportedOpError(f"`{_names(target)[0]}.{full}` is not supported", where=at.origin,
                             hint="write this part of the model with other operators, "
                                  "or add a handler in dlbc/frontends")


def unknown(module: fx.GraphModule) -> set[torch._ops.OpOverload]:
    """The operators of an exported program that have neither a handler nor a known reason to have none."""
    found = set()
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            target = node.target
            if isinstance(target, torch._ops.OpOverload) and not (
                    _names(target)[1] in _CHECKS | _SIZES or _entry(target, TABLE) is not None
                    or _entry(target, UNSUPPORTED) is not None or _complex(node)):
                found.add(target)
    return found


def _names(target: torch._ops.OpOverload) -> tuple[str, str]:
    """Namespace and name of an operator: `aten`, `add`."""
    namespace, _, packet = target._schema.name.partition("::")
    return namespace, packet


def _entry(target: torch._ops.OpOverload, table: Mapping[str, E]) -> E | None:
    """What a table has for an overload, else for all overloads of its operator."""
    for family in FAMILIES:
        import_module(f"dlbc.frontends.{family}")
    namespace, packet = _names(target)
    if namespace not in ("aten", "dlbc"):
        return None
    own = table.get(f"{packet}.{target._overloadname}")
    return table.get(packet) if own is None else own


def provenance(node: fx.Node) -> tuple[str, str, str, tuple[str, str]]:
    """Where a node comes from: module path, class, `file.py:line`, and a key for the call of the module."""
    stack: Mapping[str, tuple[str, object]] = node.meta.get("nn_module_stack") or {}
    entries = [(key, path, cls) for key, (path, cls) in stack.items() if not path.startswith("_empty_nn")]
    key, path, cls = entries[-1] if entries else ("", "", "")
    shown = cls if isinstance(cls, str) else getattr(cls, "__name__", str(cls))
    frames = [frame for frame in re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
              if not frame[0].startswith((_TORCH, "<"))]
    source = f"{PurePath(frames[-1][0]).name}:{frames[-1][1]}" if frames else ""
    return path.partition("@")[0], shown.rpartition(".")[2], source, (key, path)


def described(place: str, cls: str, source: str) -> str:
    """A place in words: `encoder.layer.0 (Linear, model.py:12)`."""
    detail = ", ".join(filter(None, (cls, source)))
    return f"{place} ({detail})" if place and detail else place or source or cls


def _number(found: object) -> int | float | bool | Sym:
    if isinstance(found, int | float | Sym):
        return found
    raise IRError(f"`{found}` is not a number")


def _plain(found: Any) -> Any:
    """torch's immutable lists and dicts as plain ones; symbolic numbers cannot be left in them."""
    if isinstance(found, dict):
        return {key: _plain(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return type(found)(map(_plain, found)) if type(found) in (list, tuple) else list(map(_plain, found))
    return found


def weight_operand(name: str, tensor: torch.Tensor, sizes: Sizes) -> Weight:
    """A weight of the graph for one of the model's tensors."""
    return Weight(name, sizes.type(tensor))
