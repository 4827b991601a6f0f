"""FuseAttention: attention regions become kernels in which nothing with query rows and keys is a result.

`stream_attention` has found the regions, and proven by their axes which ops can run on some of the rows; each of its
`stream` ops that can also be computed by tiles (`ir/attention_tiles.py`) becomes one kernel, template `attention`.
Moves of what a stream reads (q with the heads of a group stacked, k turned) and cheap ops of it (|v|, casts) go into
its function first: by tiles they are the same numbers, read once and as the model stores them. A stream that cannot
stays as it is: the array library runs it block by block.

With `forward` the attention of the forward pass becomes such a kernel too. It is off by default: the array library's
own fused attention is at least as fast, and what relevance needs of the softmax costs it one product to compute again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from dlbc.errors import IRError
from dlbc.ir.attention_tiles import KEYS, ROWS, Region, Unfit, region_of, why_not_tiles
from dlbc.ir.core import Attr, Function, Graph, Kernel, Op, Type, Value
from dlbc.ir.dims import Dim
from dlbc.ir.fusible import CHEAP
from dlbc.ir.ops import axis, infer
from dlbc.passes import Pass, register
from dlbc.passes.eliminate_dead import EliminateDead
from dlbc.passes.rewrite import live, with_section

TEMPLATE = "attention"


@register
@dataclass(frozen=True)
class FuseAttention(Pass):
    """Attention regions as kernels; `forward`: also the attention of the forward pass.

    `seeds`: how many seeds share a program, and in it the scores and softmax that they have in common. More than one
    pays where most calls explain many targets; a call with fewer computes some of them twice.
    """

    name: ClassVar[str] = "fuse_attention"
    forward: bool = False
    seeds: int = 1

    def run(self, graph: Graph) -> Graph:
        """The graph with kernels of the template `attention`; one that has kernels already as it is."""
        if any(isinstance(item, Kernel) for body in _bodies(graph) for item in body):
            return graph
        moved = _Moved(dict(graph.functions))
        graph = _each(graph, moved.body)
        # Before what calls them:
        added = {name: f for name, f in moved.functions.items() if name not in graph.functions}
        graph = EliminateDead().run(_without_unused(replace(graph, functions={**added, **graph.functions})))
        return _each(graph, _Kernels(graph.functions, self).body)


def _each(graph: Graph, rewrite: Callable[[Sequence[Op], Sequence[Value]], tuple[Op | Kernel, ...]]) -> Graph:
    """The graph with the forward and relevance sections and the repeated blocks rewritten."""
    for name, section in graph.sections():
        if name != "prepare":
            kept = (*section.results, *section.saves)
            graph = with_section(graph, name, replace(section, body=rewrite(_ops(section.body), kept)))
    return replace(graph, functions={
        name: f if _of_blocks(f) else replace(f, body=rewrite(_ops(f.body), f.results))
        for name, f in graph.functions.items()})


def _ops(body: Sequence[Op | Kernel]) -> tuple[Op, ...]:
    return tuple(item for item in body if isinstance(item, Op))


def declined(graph: Graph) -> tuple[tuple[str, str], ...]:
    """The places of attention that runs outside of kernels, and why: plain sentences."""
    return tuple((op.place, why_not_tiles(op, graph.functions)) for op in _outside(graph)
                 if op.name in ("stream", "attention", "attention_weights"))


def _bodies(graph: Graph) -> list[tuple[Op | Kernel, ...]]:
    """What is run but for functions of blocks."""
    bodies = [section.body for name, section in graph.sections() if name != "prepare"]
    return bodies + [f.body for f in graph.functions.values() if not _of_blocks(f)]


def _outside(graph: Graph) -> Iterator[Op]:
    """Ops that are in no kernel and no function of a block."""
    return (item for body in _bodies(graph) for item in body if isinstance(item, Op))


def _of_blocks(function: Function) -> bool:
    """True for a function that a `stream` op runs."""
    return any(str(size) in str(dim) for p in function.params for dim in p.type.shape if not isinstance(dim, int)
               for size in (ROWS, KEYS))


@dataclass
class _Kernels:
    """The kernels made so far."""

    functions: Mapping[str, Function]
    options: FuseAttention
    count: int = 0

    def body(self, items: Sequence[Op], _: Sequence[Value]) -> tuple[Op | Kernel, ...]:
        """A section or function with kernels."""
        return tuple(map(self.kernel, items))

    def kernel(self, op: Op) -> Op | Kernel:
        """The kernel of an op; the op where it is none."""
        if op.name != "stream" and not (op.name == "attention" and self.options.forward):
            return op
        try:
            region_of(op, self.functions)
        except Unfit:
            return op
        self.count += 1
        config = {"seeds": self.options.seeds} if self.options.seeds > 1 else {}
        return Kernel(f"a{self.count - 1}", TEMPLATE, (op,), op.results, config)


@dataclass
class _Moved:
    """Streams whose functions do moves of what they read; the functions made so far."""

    functions: dict[str, Function]
    known: dict[object, str] = field(default_factory=dict)

    def body(self, items: Sequence[Op], kept: Sequence[Value]) -> tuple[Op | Kernel, ...]:
        """A section or function, without the moves that nothing else reads."""
        definitions = {r.name: op for op in items for r in op.results}
        return tuple(live([self.stream(op, definitions) for op in items], kept))

    def stream(self, op: Op, definitions: Mapping[str, Op]) -> Op:
        """A stream that can be computed by tiles, with moves in its function."""
        if op.name != "stream":
            return op
        try:
            region_of(op, self.functions)
        except Unfit:
            return op
        return self.moved(op, definitions)

    def moved(self, op: Op, definitions: Mapping[str, Op]) -> Op:
        """A stream with moves of what it reads in its function, one after the other as long as it can be computed."""
        position, function = 0, self.functions[str(op.attrs["function"])]
        while position < len(op.operands):
            found = _absorbed(op, function, position, definitions)
            if found is None:
                position += 1
            else:
                op, function = found
        return replace(op, attrs={**op.attrs, "function": self.named(function)})

    def named(self, function: Function) -> str:
        """The name of a function with this text."""
        key = (function.params, tuple((op.name, op.operands, op.results, tuple(op.attrs.items()))
                                      for op in function.body if isinstance(op, Op)), function.results)
        if key not in self.known:
            name = _free("attention_tiles", set(self.functions))
            self.known[key] = name
            self.functions[name] = replace(function, name=name)
        return self.known[key]


def _absorbed(op: Op, function: Function, position: int, definitions: Mapping[str, Op]) -> tuple[Op, Function] | None:
    """The stream that reads what an operand is a move of, and its function; None where there is nothing to gain."""
    operand, old = op.operands[position], function.params[position]
    move = definitions.get(operand.name) if isinstance(operand, Value) else None
    if move is None or move.name not in ("permute", "reshape", *CHEAP) or not isinstance(old, Value):
        return None
    source, over = move.operands[0], op.attrs["over"]
    assert isinstance(over, tuple)
    label = _label(over[position])
    before = _before(move, label)
    if before is None or not isinstance(source, Value):
        return None
    params, operands, labels = list(function.params), list(op.operands), list(over)
    same = [p for p, o, own in zip(params, operands, labels, strict=True)
            if o == source and own == before and isinstance(p, Value)]
    inner = Type(source.type.dtype, _shape_before(move, old.type.shape, source.type.shape))
    taken = {p.name for p in params} | {r.name for o in _ops(function.body) for r in o.results}
    new = same[0] if same else Value(_free(old.name, taken), inner)
    attrs = {**move.attrs, "shape": old.type.shape} if move.name == "reshape" else dict(move.attrs)
    keep = slice(position, position + 1)
    params[keep], operands[keep], labels[keep] = ([], [], []) if same else ([new], [source], [before])
    try:
        if infer(move.name, (new,), attrs) != (old.type,):
            return None
        made = replace(function, params=tuple(params), body=(Op(move.name, (new,), (old,), attrs), *function.body))
        Region(made)
    except (Unfit, IRError):
        return None
    return replace(op, operands=tuple(operands), attrs={**op.attrs, "over": tuple(labels)}), made


def _label(over: Attr) -> tuple[int | None, int | None]:
    """The axes of rows and keys that an entry of `over` states."""
    assert isinstance(over, tuple)
    row, key = (None if at is None else int(str(at)) for at in over)
    return row, key


def _before(move: Op, label: tuple[int | None, int | None]) -> tuple[int | None, int | None] | None:
    """The axes of rows and keys before a move, of those after it; None for one that does more than that."""
    source, result = move.operands[0], move.result
    if not isinstance(source, Value) or not source.type.floating or not result.type.floating:
        return None
    if move.name in CHEAP:
        return label
    if move.name == "permute":
        dims = move.attrs["dims"]
        assert isinstance(dims, tuple)
        found = [None if at is None else axis(result.type.rank, int(str(dims[at]))) for at in label]
        return found[0], found[1]
    row, key = label
    shapes: tuple[tuple[Dim, ...], ...] = (source.type.shape, result.type.shape)
    if key is not None or row != result.type.rank - 2 or len(shapes[0]) != len(shapes[1]):
        return None
    (heads, rows), (groups, stacked) = (shape[-3:-1] for shape in shapes)
    if shapes[0][:-3] + shapes[0][-1:] != shapes[1][:-3] + shapes[1][-1:] or not isinstance(heads, int) or (
            not isinstance(groups, int)) or heads % groups or stacked != rows * (heads // groups):
        return None
    return row, None


def _shape_before(move: Op, inner: tuple[Dim, ...], outer: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The shape in a block of what a move reads, from that of its result, `inner`; outside of it, it is `outer`."""
    if move.name == "reshape":
        return (*outer[:-2], ROWS, outer[-1])
    if move.name != "permute":
        return inner
    dims = move.attrs["dims"]
    assert isinstance(dims, tuple)
    back = {axis(len(inner), int(str(dim))): size for dim, size in zip(dims, inner, strict=True)}
    return tuple(back[i] for i in range(len(inner)))


def _free(stem: str, taken: set[str]) -> str:
    name, number = stem, 0
    while name in taken:
        number += 1
        name = f"{stem}.{number}"
    return name


def _without_unused(graph: Graph) -> Graph:
    """Without functions of blocks that no stream runs any more."""
    used = {op.attrs["function"] for body in _bodies(graph) for op in _ops(body) if "function" in op.attrs}
    return replace(graph, functions={name: f for name, f in graph.functions.items()
                                     if name in used or not _of_blocks(f)})
