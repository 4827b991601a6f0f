"""What the launches of a compiled explainer read, write and multiply, counted on its fused IR for given sizes.

A kernel reads each tensor from outside once and writes its results; an op in no kernel is one launch of torch's, and a
view none. What a kernel reads of a tensor counts as all of it. Products count as the generated code multiplies: float32
relevance by a bfloat16 matrix is two products, and so on (docs/triton.md, "Numbers"); of attention, those that its text
has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from _floors import RATES, Step

from dlbc.backends.footprint import bytes_of
from dlbc.backends.liveness import inputs_of
from dlbc.backends.python_module import emit_module
from dlbc.backends.site import Scope
from dlbc.backends.triton.attention_shapes import precision
from dlbc.backends.triton.config import device
from dlbc.backends.triton.emit import TRITON
from dlbc.backends.triton.kernels import Emitted, KernelSite, emit_kernel
from dlbc.errors import UnsupportedOpError
from dlbc.ir.attention_tiles import region_of
from dlbc.ir.core import Graph, Kernel, Op, Type, Value, Weight, values
from dlbc.ir.dims import Dim, Sym, evaluate
from dlbc.ir.fusible import CHEAP, VIEWS, factors, is_product
from dlbc.ir.ops import attr
from dlbc.ir.parser import parse_graph
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.memory import SECTIONS, Plan

GATHERS = frozenset({"embedding", "index", "take", "arange", "full"})
"""Ops that read no more than they write."""


def steps_of(explainer: Explainer, sizes: Mapping[str, int], *, asked: str = "") -> list[Step]:
    """The launches of one explanation, in order: the forward pass, then relevance. `asked`: the precision of products,
    where it is another than what the explainer was compiled with."""
    counter = _Counter(parse_graph(explainer.ir("fused")), sizes, explainer.manifest.memory, asked)
    return list(counter.steps())


class _Counter:
    """The launches of a fused graph; `plan` knows which of its moves are views."""

    def __init__(self, graph: Graph, sizes: Mapping[str, int], plan: Plan, asked: str) -> None:
        self.graph, self.sizes, self.plan = graph, sizes, plan
        self.asked = asked or str(graph.attrs.get("precision", "ieee"))
        self.target = device(str(graph.attrs["target"]).removeprefix("triton:"))
        self.written: dict[str, Emitted | None] = {}
        emit_module(graph, replace(TRITON, kernel=self.emitted))
        self.allocating = {first for _, first, _, _ in plan.buffers}
        self.at = 0

    def emitted(self, kernel: Kernel, scope: Scope) -> tuple[str, tuple[str, ...]] | None:
        """A kernel as the backend writes it, kept; None where its template has no code for it."""
        try:
            made: Emitted | None = emit_kernel(KernelSite(
                kernel, scope, self.target, scope.made, {"precision": self.graph.attrs.get("precision", "ieee")}))
        except UnsupportedOpError:
            made = None
        self.written[kernel.name] = made
        return None if made is None else (made.source, made.lines)

    def steps(self) -> Iterator[Step]:
        """All launches."""
        for name, section in self.graph.sections():
            if name in SECTIONS:
                yield from self.body(section.body)
        assert self.at == len(self.plan.steps), "the plan of memory has other steps"

    def body(self, items: Sequence[Op | Kernel]) -> Iterator[Step]:
        """Those of a body, calls opened."""
        for item in items:
            if isinstance(item, Op) and item.name == "call":
                yield from self.body(self.graph.functions[str(item.attrs["function"])].body)
                continue
            fresh, self.at = self.at in self.allocating, self.at + 1
            if isinstance(item, Op):
                yield from self.alone(item, fresh)
            elif self.written[item.name] is None:
                for op in item.body:
                    yield from self.alone(op, op.name not in VIEWS)
            else:
                yield self.kernel(item)

    def kernel(self, kernel: Kernel) -> Step:
        """The launches of a kernel, as one step."""
        made = self.written[kernel.name]
        assert made is not None
        place = next((op.place for op in kernel.body if op.place), "")
        moved = sum(self.bytes(x.type) for x in (*inputs_of(kernel), *kernel.results))
        if kernel.template == "attention":
            products, launches = self.attention(kernel, made)
            return Step("triton attention", "attention", place, moved, products, launches)
        inside = {r.name: op for op in kernel.body for r in op.results}
        products = sum(self.product(op, *(self.holding(o, inside) for o in factors(op)))
                       for op in kernel.body if is_product(op))
        ops = " ".join(dict.fromkeys(op.name for op in kernel.body if op.name not in CHEAP))
        return Step(f"triton {kernel.template}", ops, place, moved, products)

    def holding(self, operand: object, inside: Mapping[str, Op]) -> str:
        """The element type of what an operand is, where nothing computed of it needs more digits."""
        while isinstance(operand, Value) and operand.name in inside and inside[operand.name].name in CHEAP:
            operand = inside[operand.name].operands[0]
        assert isinstance(operand, Value | Weight)
        return operand.type.dtype

    def product(self, op: Op, left: str, right: str) -> float:
        """Seconds of rows times a matrix."""
        x, _ = factors(op)
        assert isinstance(x, Value | Weight)
        return self.seconds(2 * self.count(op.result.type) * self.number(x.type.shape[-1]), left, right)

    def seconds(self, operations: float, left: str, right: str) -> float:
        """Seconds of a product's operations in kernels, by the element types of what is multiplied."""
        types = {left, right}
        if types in ({"bf16"}, {"f16"}):
            return operations / RATES["16 bits"]
        if types == {"f32", "bf16"}:
            return (1 if self.asked == "auto" else 2) * operations / RATES["16 bits"]
        if types == {"f32"} and self.asked in ("auto", "ieee"):
            return operations / RATES["float32"]
        return (1 if self.asked in ("auto", "tf32") else 3) * operations / RATES["tf32"]

    def attention(self, kernel: Kernel, made: Emitted) -> tuple[float, int]:
        """Seconds of its products, and its launches. Each `tl.dot` in a program's text is a product of all rows with
        all keys of a head; where keys behind a row are masked, half of that is skipped."""
        (op,) = kernel.body
        region = region_of(op, self.graph.functions)
        way = precision(self.asked, region, self.target)
        softmax = region.softmaxes[0]
        q, k = (v.type for v in list(values(softmax.operands))[:2])
        streamed = op.name == "stream"
        rows, keys = (op.attrs["rows"], op.attrs["keys"]) if streamed else (q.shape[2], k.shape[2])
        wide = [v.type for v in values(op.operands) if streamed and v.type.rank == 5]
        seeds = self.number(wide[0].shape[0]) if wide else 1
        one = 2.0 * seeds * math.prod(self.number(n) for n in (*q.shape[:2], rows, keys, q.shape[-1]))  # type: ignore[arg-type]
        one /= 2 if attr(softmax, "causal") else 1
        times = {"bf16x3": 3 / RATES["16 bits"], "tf32x3": 3 / RATES["tf32"], "tf32": 1 / RATES["tf32"]}
        asked = made.source.count("input_precision=PRECISION")
        plain = made.source.count("tl.dot(") - asked
        exact = times.get(way, 1 / RATES["float32"])
        halves = all(v.type.dtype in ("bf16", "f16") for v in list(values(op.operands))[:2])
        return one * (asked * exact + plain * (1 / RATES["16 bits"] if halves else exact)), sum(
            "launch(" in line for line in made.lines)

    def alone(self, op: Op, fresh: bool) -> Iterator[Step]:
        """An op that torch runs."""
        if op.name in VIEWS and not fresh:
            return
        written = sum(self.bytes(r.type) for r in op.results)
        read = written if op.name in GATHERS or op.name in VIEWS else sum(
            self.bytes(o.type) for o in op.inputs if isinstance(o, Value | Weight))
        yield Step("torch", op.name, op.place, read + written, self.multiplied(op))

    def multiplied(self, op: Op) -> float:
        """Seconds of the products of an op that torch runs, by torch's defaults: float32 convolutions are tf32."""
        types = [o.type for o in op.operands if isinstance(o, Value | Weight)]
        if op.name in ("matmul", "linear"):
            rate, operations = "float32", 2 * self.count(op.result.type) * self.number(types[0].shape[-1])
        elif op.name.startswith("conv"):
            whole = types[0] if "transpose" in op.name else op.result.type
            rate = "tf32"
            operations = 2 * self.count(whole) * math.prod(self.number(n) for n in types[1].shape[1:])
        elif op.name == "attention":
            rate, operations = "float32", 4 * self.count(types[0]) * self.number(types[1].shape[2])
            operations //= 2 if attr(op, "causal") else 1
        else:
            return 0.0
        return operations / RATES["16 bits" if types[0].dtype in ("bf16", "f16") else rate]

    def bytes(self, type: Type) -> int:
        """Bytes of an array."""
        return self.number(bytes_of(type))

    def count(self, type: Type) -> int:
        """Elements of an array."""
        return math.prod(self.number(n) for n in type.shape)

    def number(self, dim: Dim) -> int:
        """A size as a number."""
        return evaluate(dim, self.sizes) if isinstance(dim, Sym) else dim
