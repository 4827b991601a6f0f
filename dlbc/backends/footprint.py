"""What the generated code of a lowered graph holds in memory at each step, with sizes as expressions.

It follows the order of the ops, the `del` statements and the overwritten buffers that `python_module` writes, and knows
which results are views. What kernels need for themselves is a table by op, read off their code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dlbc.backends.layout import Layout, numbers, shape_of, typical_sizes
from dlbc.backends.liveness import deaths, reusable, whole
from dlbc.ir.core import Graph, Kernel, Op, Operand, Type, Value, Weight, values
from dlbc.ir.dims import Dim, Sym, maximum, minimum, product
from dlbc.ir.ops import OPS
from dlbc_runtime.memory import KINDS, SECTIONS, Plan
from dlbc_runtime.streams import BUDGET

BYTES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1, "bool": 1}
INPUTS, SAVED, WORKING, RESULTS = range(len(KINDS))


@dataclass(eq=False)
class _Buffer:
    """Memory of one or more values: a size in bytes, the first and last step that it is held at."""

    size: Dim
    first: int
    last: int = -1
    saved: bool = False
    result: bool = False
    given: bool = False
    holders: int = 0

    @property
    def kind(self) -> int:
        return RESULTS if self.result else INPUTS if self.given else SAVED if self.saved else WORKING


@dataclass
class _Place:
    """Where a value is: a buffer (None: in a weight), and how it lies there."""

    buffer: _Buffer | None
    layout: Layout


def bytes_of(type: Type) -> Dim:
    """The bytes of an array of a type."""
    return product(type.shape) * BYTES[type.dtype]


def plan_of(graph: Graph, overwriting: Mapping[str, object], *, fused: bool = False) -> Plan:
    """The plan of a lowered graph; `overwriting` are the ops that the backend can write over an operand. `fused`:
    kernels are run as one, and hold nothing but their results; otherwise op by op."""
    return _Planner(graph, overwriting, fused).plan()


@dataclass
class _Planner:
    graph: Graph
    overwriting: Mapping[str, object]
    fused: bool = False
    buffers: list[_Buffer] = field(default_factory=list)
    steps: list[tuple[str, str, str]] = field(default_factory=list)
    called_at: str = ""

    def __post_init__(self) -> None:
        self.sizes = typical_sizes(self.graph)
        self.state: set[str] = set()
        self.returned: set[str] = set()

    def plan(self) -> Plan:
        forward, relevance = self.graph.forward, self.graph.relevance
        prepared = {v.name: _Place(None, self._plain(v)) for v in self.graph.prepare.results}
        env = dict(prepared)
        for param in forward.params:
            env[param.name] = self._given(param)
        own = {r.name for op in forward.ops for r in op.results}
        if relevance is not None:
            self.state = {v.name for op in relevance.ops for v in values(op.inputs)}
            self.state |= {v.name for v in relevance.results}
        self.state &= own
        self.returned = {v.name for v in forward.results}
        self._body("forward", forward.body, {*self.state, *self.returned}, {p.name for p in forward.params}, env)
        if relevance is not None:
            for param in relevance.params:
                env[param.name] = self._given(param)
            self.returned = {v.name for v in relevance.results}
            self._body("relevance", relevance.body, self.returned, {*own, *(p.name for p in relevance.params)}, env)
        return self._packed()

    def _given(self, param: Value) -> _Place:
        """A parameter: the caller holds it to the end."""
        buffer = _Buffer(bytes_of(param.type), len(self.steps), given=True, holders=1)
        self.buffers.append(buffer)
        return _Place(buffer, self._plain(param))

    def _body(self, section: str, items: Sequence[Op | Kernel], keep: set[str], own: Iterable[str],
              env: dict[str, _Place]) -> None:
        """The steps of ops; values that nothing reads any more leave `env`."""
        items = [whole(item) if isinstance(item, Kernel) and self.fused else item for item in items]
        ops = [op for item in items for op in (item.body if isinstance(item, Kernel) else (item,))]
        dying = deaths(ops, keep, list(own))
        reused = reusable(ops, dying, keep, self.overwriting)
        for number, op in enumerate(ops):
            if op.name == "call":
                self._call(section, op, dying[number], env)
            else:
                self._step(section, op, reused.get(number), env)
            for name in dying[number]:
                if name in env:
                    self._release(env.pop(name))

    def _call(self, section: str, op: Op, dying: Sequence[str], env: dict[str, _Place]) -> None:
        """A function's steps; operands that the caller reads no more are the function's to free."""
        function = self.graph.functions[str(op.attrs["function"])]
        inner: dict[str, _Place] = {}
        for param, operand in zip(function.params, op.operands, strict=True):
            if isinstance(param, Value):
                place = self._place(operand, env)
                inner[param.name] = place
                if place.buffer is not None:
                    place.buffer.holders += 1
        for name in {v.name for v in values(op.operands)} & set(dying):
            self._release(env.pop(name))
        params = [p.name for p in function.params if isinstance(p, Value)]
        before, self.called_at = self.called_at, _within(op.place, self.called_at)
        self._body(section, function.body, {v.name for v in function.results}, params, inner)
        self.called_at = before
        for outer, value in zip(op.results, function.results, strict=True):
            self._bind(outer, inner[value.name], env)
        for place in inner.values():
            self._release(place)

    def _step(self, section: str, op: Op, reused: int | None, env: dict[str, _Place]) -> None:
        self.steps.append((section, op.name, _within(op.place, self.called_at)))
        now = len(self.steps) - 1
        if reused is not None:
            self._bind(op.result, self._place(op.operands[reused], env), env)
        else:
            view = self._view(op, env)
            if view is not None:
                self._bind(op.result, view, env)
            else:
                for result in op.results:
                    self._bind(result, _Place(self._fresh(bytes_of(result.type), now), self._laid(op, result, env)),
                               env)
        extra = self._inside(op, env)
        if extra != 0:
            self.buffers.append(_Buffer(extra, now, now))

    def _fresh(self, size: Dim, now: int) -> _Buffer:
        buffer = _Buffer(size, now)
        self.buffers.append(buffer)
        return buffer

    def _bind(self, value: Value, place: _Place, env: dict[str, _Place]) -> None:
        env[value.name] = place
        buffer = place.buffer
        if buffer is not None:
            buffer.holders += 1
            buffer.saved = buffer.saved or value.name in self.state
            buffer.result = buffer.result or value.name in self.returned

    def _release(self, place: _Place) -> None:
        buffer = place.buffer
        if buffer is not None:
            buffer.holders -= 1
            if buffer.holders == 0:
                buffer.last = len(self.steps) - 1

    def _place(self, operand: Operand, env: Mapping[str, _Place]) -> _Place:
        if isinstance(operand, Value) and operand.name in env:
            return env[operand.name]
        if isinstance(operand, Value | Weight):
            return _Place(None, Layout.plain(numbers(operand.type.shape, self.sizes)))
        return _Place(None, Layout((), ()))

    def _plain(self, value: Value) -> Layout:
        return Layout.plain(shape_of(value, self.sizes))

    # What is a view

    def _view(self, op: Op, env: Mapping[str, _Place]) -> _Place | None:
        """Where the result is, if the op copies nothing."""
        if op.name not in ("reshape", "permute", "expand", "slice", "select"):
            return None
        place, shape = self._place(op.operands[0], env), shape_of(op.result, self.sizes)
        layout = place.layout
        if op.name == "permute":
            dims = op.attrs["dims"]
            assert isinstance(dims, tuple)
            return _Place(place.buffer, layout.permuted([int(str(d)) % len(shape) for d in dims]))
        if op.name == "expand":
            return _Place(place.buffer, layout.expanded(shape))
        if op.name == "reshape":
            found = layout.reshaped(shape)
            return None if found is None else _Place(place.buffer, found)
        axis = int(str(op.attrs.get("dim", OPS[op.name].attrs.get("dim")))) % len(layout.shape)
        if op.name == "select":
            kept = [i for i in range(len(layout.shape)) if i != axis]
            return _Place(place.buffer, layout.permuted(kept))
        strides = list(layout.strides)
        step = op.attrs.get("step", 1)
        strides[axis] *= step if isinstance(step, int) else 1
        return _Place(place.buffer, Layout(shape, tuple(strides)))

    def _laid(self, op: Op, result: Value, env: Mapping[str, _Place]) -> Layout:
        """How a new result lies: elementwise ops keep the order of axes of what they read."""
        shape = shape_of(result, self.sizes)
        if op.name == "attention":
            return Layout.plain(shape, (0, 2, 1, 3))
        if op.name in OPS and OPS[op.name].elementwise:
            for operand in op.operands:
                layout = self._place(operand, env).layout
                if layout.shape == shape and layout.dense:
                    return Layout.plain(shape, layout.order)
        return Layout.plain(shape)

    # What a kernel needs for itself

    def _inside(self, op: Op, env: Mapping[str, _Place]) -> Dim:
        if op.name == "matmul":
            return self._multiplied(op, env)
        if op.name == "linear":
            return self._copied(op.operands[0], env)
        if op.name == "stream":
            return self._streamed(op)
        rule = _INSIDE.get(op.name)
        return rule(op) if rule is not None else 0

    def _copied(self, operand: Operand, env: Mapping[str, _Place]) -> Dim:
        """The copy of an operand that lies out of order."""
        layout = self._place(operand, env).layout
        rows = Layout(layout.shape[:-1], layout.strides[:-1])
        in_order = layout.contiguous or (layout.shape and rows.reshaped((_count(rows.shape),)) is not None)
        return 0 if in_order or not isinstance(operand, Value | Weight) else bytes_of(operand.type)

    def _streamed(self, op: Op) -> Dim:
        """What a block holds: as many of its largest intermediates as live at once, and what a product copies."""
        function = self.graph.functions[str(op.attrs["function"])]
        ops = [item for item in function.body if isinstance(item, Op)]
        wide = {op.result.name for op in ops if {"rows", "keys"} <= {str(d) for d in op.result.type.shape}}
        living, most = set[str](), 1
        for inner, dying in zip(ops, deaths(ops, {v.name for v in function.results}, ()), strict=True):
            living |= {inner.result.name} & wide if inner.name not in ("permute", "reshape") else set()
            most = max(most, len(living))
            living -= set(dying)
        width, rows, budget = op.attrs["width"], op.attrs["rows"], op.attrs.get("budget", BUDGET)
        assert isinstance(width, int | Sym) and isinstance(rows, int | Sym) and isinstance(budget, int)
        return 4 * (most + 1) * minimum(width * rows, maximum(budget, width))

    def _multiplied(self, op: Op, env: Mapping[str, _Place]) -> Dim:
        """What torch.matmul copies: operands that lie out of order, or whose leading axes are repeated."""
        total: Dim = 0
        sides = [o for o in op.operands if isinstance(o, Value | Weight)]
        if len(sides) != 2 or any(side.type.rank < 3 for side in sides):
            return self._copied(sides[0], env) if sides and sides[0].type.rank > 2 else 0
        lead = op.result.type.shape[:-2]
        for side in sides:
            own = side.type.shape[:-2]
            layout = self._place(side, env).layout
            shape = (*numbers(lead, self.sizes), *layout.shape[-2:])
            whole = layout.expanded(shape).reshaped((_count(shape[:-2]), *shape[-2:]))
            if whole is None:
                grown = product((*lead, *side.type.shape[-2:])) * BYTES[side.type.dtype]
                more = len(lead) - len(own)
                # Repeated along leading axes alone: nothing is copied where those are 1.
                alone = Layout.plain(layout.shape) == layout and more > 0 and own == lead[more:]
                total += grown * minimum(product(lead[:more]) - 1, 1) if alone else grown
        return total

    def _packed(self) -> Plan:
        texts = list(dict.fromkeys(text for _, op, place in self.steps for text in (op, place)))
        number = {text: i for i, text in enumerate(texts)}
        sizes: dict[str, int] = {}
        rows = [(sizes.setdefault(str(b.size), len(sizes)), b.first, b.last, b.kind) for b in self.buffers
                if b.first < len(self.steps)]
        return Plan(texts=tuple(texts),
                    steps=tuple((SECTIONS.index(section), number[op], number[place])
                                for section, op, place in self.steps),
                    sizes=tuple(sizes), buffers=tuple(rows), between=_between(self.graph))


def _between(graph: Graph) -> int:
    """Bytes of the prepared values, which are not those of weights themselves."""
    defined = graph.prepare.definitions()
    views = {"reshape", "permute", "expand", "slice", "select"}
    return sum(size for v in graph.prepare.results if isinstance(size := bytes_of(v.type), int)
               and defined[v.name].name not in views)


def _within(place: str, called_at: str) -> str:
    """`model.layers.*.mlp` of a function as it is where that is called: `model.layers.3.mlp`."""
    known = called_at.split(".")
    return ".".join(known[i] if part == "*" and i < len(known) else part for i, part in enumerate(place.split(".")))


def _count(shape: Iterable[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _results(op: Op, times: int) -> Dim:
    return bytes_of(op.result.type) * times


def _operand(op: Op, position: int, times: int = 1) -> Dim:
    operand = op.operands[position] if position < len(op.operands) else None
    return bytes_of(operand.type) * times if isinstance(operand, Value | Weight) else 0


def _elements(op: Op, bytes: int) -> Dim:
    return product(op.result.type.shape) * bytes


def _sunk(op: Op) -> Dim:
    """Queries, keys, values and result with the channels and the key of a sink."""
    q, k, v = (o.type for o in op.operands[:3] if isinstance(o, Value | Weight))
    if len(op.operands) < 5 or not isinstance(q.shape[-1], int) or not isinstance(v.shape[-1], int):
        return 0
    width = -(-(max(q.shape[-1], v.shape[-1]) + 2) // 8) * 8 * BYTES[op.result.type.dtype]
    rows = product((*q.shape[:2], q.shape[2] + 1)) + product((*k.shape[:2], k.shape[2] + 1))
    return rows * (2 * width)


def _unpooled(op: Op) -> Dim:
    """Shares and counts, of the sizes of what arrives and of what was pooled; where windows overlap the places that
    windows read, and sums there, else the winners, unless the result is written over them."""
    small = _operand(op, 0) + _operand(op, 2)
    if op.attrs["kernel"] != op.attrs["stride"]:
        return small + _operand(op, 1) + _results(op, 1)
    return small + _operand(op, 1) * minimum(op.result.type.shape[0] - 1, 1)


def _attended(op: Op) -> Dim:
    """Scores beside their softmax, and the mask as numbers."""
    return _results(op, 1) + _operand(op, 2, 4)


_INSIDE: Mapping[str, Callable[[Op], Dim]] = {
    **dict.fromkeys(("glu", "gelu"), lambda op: _results(op, 1)),
    "rotary": lambda op: _results(op, 2),
    "attention": _sunk,
    "attention_weights": _attended,
    "safe_div": lambda op: _operand(op, 1),
    "damp": lambda op: _operand(op, 1),
    "where": lambda op: _elements(op, 4) if all(isinstance(o, Value | Weight) for o in op.operands[1:]) else 0,
    "max_pool": lambda op: _elements(op, 8),
    "max_pool_adjoint": _unpooled,
    "row_statistics": lambda op: _operand(op, 0),
    "var": lambda op: _operand(op, 0),
    "conv2d": lambda op: _operand(op, 0) + _results(op, 1),
    "conv_transpose2d": lambda op: _operand(op, 0) + _results(op, 1),
}
"""Bytes that an op holds while it runs, besides operands and results."""
