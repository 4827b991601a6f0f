"""Kernels of products of rows with matrices, with what is computed of their operands and of their results.

Several products of the same shapes share the loads of what they have in common (z = x W^T and D = |x| |W|^T read x and
W once), and each has its accumulator. What is pointwise after them is computed in registers.
"""

from __future__ import annotations

from dlbc.backends.moves import At, Index
from dlbc.backends.triton.choices import Choice, tabled
from dlbc.backends.triton.kernels import POINTERS, Emitted, KernelSite, launched, named, parameters, render
from dlbc.backends.triton.pull import Writer
from dlbc.backends.triton.tiles import BYTES, Product, product_tiles
from dlbc.errors import UnsupportedOpError
from dlbc.ir.core import Op, Operand, Type, Value, Weight
from dlbc.ir.dims import product
from dlbc.ir.fusible import CHEAP, MOVES, PRODUCTS, factors, is_product

LEFT, RIGHT = frozenset("rk"), frozenset("kc")


def emit(site: KernelSite) -> Emitted:
    """The kernel and its launch."""
    writer = GemmWriter(site)
    body, rows = writer.body(), product(writer.lead[0])
    source, name = named(tabled(render("gemm", rows=writer.size(rows), **body), writer.choice.table), "gemm")
    text = site.scope.text(rows)
    return writer.launch(source, name, text, f'blocks({text}, tile["BM"], {writer.width}, tile["BN"])')


class GemmWriter(Writer):
    """A writer that knows the accumulators."""

    def __init__(self, site: KernelSite) -> None:
        super().__init__(site)
        self.products = [op for op in site.kernel.body if is_product(op)]
        self.index: Index = ()
        self.special = dict.fromkeys(PRODUCTS, self.accumulated)
        shape, depth = self.products[0].result.type.shape, _type(factors(self.products[0])[0]).shape[-1]
        assert isinstance(depth, int) and isinstance(shape[-1], int)
        self.width, self.depth = shape[-1], depth
        self.choice: Choice = product_tiles(site.device, self.product())

    # --- the kernel --------------------------------------------------------------------------------------

    def body(self) -> dict[str, object]:
        """What the templates of products take: the lines before, in and after the loop in depth, and what they need."""
        tiles = [tile for _, tile in self.choice.table]
        self.index = (*self.rows_of(self.products[0].result.type.shape[:-1]), At("cols", frozenset("c")))
        conds = [self.inside()]
        cut = any(self.width % int(tile["BN"]) for tile in tiles)
        if cut:
            conds.append(At(f"cols < {self.width}", frozenset("c")))
        ragged = any(self.depth % int(tile["BK"]) for tile in tiles)
        legal = [] if cut else [f"{self.width} % BN == 0"]
        legal += [] if ragged else [f"{self.depth} % BK == 0"]
        opening = self.levels[0].lines
        loop = self.loop(tuple(conds), self.depth, ragged=ragged)
        count = len(opening)
        found = [self.value(result, self.index, tuple(conds)) for result in self.site.results]
        for position, (result, value) in enumerate(zip(self.site.results, found, strict=True)):
            self.store(f"y{position}", result.type, self.index, value, tuple(conds))
        return {"parameters": parameters(self.parameters()), "fixed": self.unspecialised(), "width": self.width,
                "depth": self.depth, "opening": opening[:count], "loop": loop, "closing": opening[count:],
                "accumulators": len(self.products), "legal": legal}

    def launch(self, source: str, name: str, rows: str, grid: str) -> Emitted:
        """The kernel and its launch, with the tile for so many rows."""
        return Emitted(source, (
            *(self.site.empty(result) for result in self.site.results),
            *launched(name, rows, grid, self.arguments())), {name: self.choice})

    def product(self) -> Product:
        """What tiles are chosen for."""
        return Product(self.width, self.depth, len(self.products), self.dots(), *self.loads(), self.combined(),
                       self.groups(), self.held())

    # --- what other kinds of products change ---------------------------------------------------------------

    def inside(self) -> At:
        """The condition that a row is one of the result's."""
        return At(f"rows < {self.size(product(self.lead[0]))}", frozenset("r"))

    def groups(self) -> int:
        """How many matrices there are; tiles are chosen by the rows of one."""
        return 1

    def matrix(self, op: Op, down: At, across: At) -> Index:
        """Where in a product's matrix the number is for a place in depth and a column of the result."""
        return (across, down) if op.name == "linear" else (down, across)

    def part(self, op: Op, at: At) -> At:
        """What a product takes of the numbers of its matrix."""
        return at

    def bias(self, op: Op) -> tuple[Operand, Index]:
        """A product's bias (or None), and where it is for a column of the result."""
        return op.operands[2] if len(op.operands) > 2 else None, self.index[-1:]

    # --- element types and sizes ---------------------------------------------------------------------------

    def dtypes(self, op: Op) -> tuple[str, str]:
        """The element types that hold a product's operands without rounding."""
        left, right = factors(op)
        return self.holding(left), self.holding(right)

    def holding(self, operand: object) -> str:
        """The element type of what an operand is read as, where nothing that is computed of it needs more digits."""
        assert isinstance(operand, Value | Weight)
        dtype, root = operand.type.dtype, operand
        while isinstance(root, Value) and root.name in self.definitions and self.definitions[root.name].name in CHEAP:
            under = self.definitions[root.name].operands[0]
            assert isinstance(under, Value | Weight)
            root = under
            dtype = root.type.dtype if BYTES[root.type.dtype] < BYTES[dtype] and root.type.floating else dtype
        return dtype

    def dots(self) -> int:
        """How many products of tiles a step takes: two where a float32 operand is split."""
        return sum(2 if self.way(self.dtypes(op)) == "halves" else 1 for op in self.products)

    def held(self) -> float:
        """Numbers that a thread keeps for each number of an operand (see `Product`). Without tensor cores all of them:
        ptxas loads a whole step ahead, and deep ones do not fit."""
        if not self.loads()[2]:
            return 1.0
        parts = {"halves": 1.5, "tf32x3": 2.0, "tf32": 1.0}
        return sum(parts.get(self.way(self.dtypes(op)), 0.0) for op in self.products)

    def way(self, types: tuple[str, str]) -> str:
        """How numbers of two element types are multiplied: "direct", with the wide one "rounded" to bfloat16 or as
        "halves" of 16 bits, or a precision of `tl.dot`."""
        if types in (("bf16", "bf16"), ("f16", "f16")):
            return "direct"
        chosen, mixed = str(self.site.options.get("precision", "ieee")), set(types) != {"f32"}
        if set(types) == {"f32", "bf16"}:
            return "rounded" if chosen == "auto" else "halves"
        if self.site.device.kind != "cuda" or not mixed:
            return "ieee" if chosen == "auto" else chosen
        return {"auto": "tf32", "ieee": "tf32x3"}.get(chosen, chosen)

    def loads(self) -> tuple[int, int, bool]:
        """Bytes of what is read for one row and for one column, for each step in depth; and whether tensor cores
        compute."""
        left = {self.root(factors(op)[0]) for op in self.products}
        right = {self.root(factors(op)[1]) for op in self.products}
        exact = self.site.options.get("precision", "ieee") in ("auto", "ieee")
        cores = not exact or all(self.dtypes(op) != ("f32", "f32") for op in self.products)
        return sum(BYTES[o.type.dtype] for o in left), sum(BYTES[o.type.dtype] for o in right), cores

    def combined(self) -> int:
        """How many values with one number for each result are read after the products."""
        read = {self.root(operand) for op in self.products for operand in factors(op)}
        return sum(o not in read and o.type.rank > 1 for o in self.site.inputs) + sum(
            o in read and any(o in op.operands for op in self.site.kernel.body if op.name not in CHEAP
                              and op not in self.products) for o in self.site.inputs)

    def root(self, operand: object) -> Value | Weight:
        """What an operand is computed of, one by one."""
        assert isinstance(operand, Value | Weight)
        while isinstance(operand, Value) and operand.name in self.definitions:
            under = self.definitions[operand.name].operands[0]
            assert isinstance(under, Value | Weight)
            operand = under
        return operand

    def loop(self, conds: tuple[At, ...], depth: int, *, ragged: bool) -> list[str]:
        """The lines of one step in depth: loads, what is made of them, products of tiles."""
        self.enter()
        inside = (At(f"kr < {depth}", frozenset("k")),), (At(f"kc < {depth}", frozenset("k")),)
        for number, op in enumerate(self.products):
            x, matrix = factors(op)
            left = self.value(x, (*self.index[:-1], At("kr", frozenset("k"))),
                              (*(c for c in conds if c.axes == {"r"}), *(inside[0] if ragged else ())))
            down, across = At("kc", frozenset("k")), At("cols", frozenset("c"))
            right = self.value(matrix, self.matrix(op, down, across),
                               (*(c for c in conds if c.axes == {"c"}), *(inside[1] if ragged else ())))
            right = self.part(op, right)
            texts = (self.tile(op, 0, left, LEFT, "(BM, BK)", f"kr < {depth}" if ragged else ""),
                     self.tile(op, 1, right, RIGHT, "(BK, BN)", f"kc < {depth}" if ragged else ""))
            self.dot(number, op, *texts)
        return self.leave()

    def tile(self, op: Op, position: int, at: At, over: frozenset[str], shape: str, inside: str) -> str:
        """A whole tile of an operand, with zeros behind the end."""
        text = at.text if at.axes == over else f"tl.broadcast_to({at.text}, {shape})"
        if inside and not self.keeps_zero(factors(op)[position]):
            text = f"tl.where({inside}, {text}, 0.0)"
        return text

    def keeps_zero(self, operand: object) -> bool:
        """Whether an operand is 0 where nothing was read."""
        while isinstance(operand, Value) and operand.name in self.definitions:
            op = self.definitions[operand.name]
            if op.name not in CHEAP and (op.name not in MOVES or op.name == "full"):
                return False
            operand = op.operands[0]
        return True

    def dot(self, number: int, op: Op, left: str, right: str) -> None:
        """Add the product of two tiles to an accumulator: a float32 tile beside one of bfloat16 rounded to that, or as
        the sum of two bfloat16 tiles, which is exact to 16 bits."""
        types, acc = self.dtypes(op), f"acc{number}"
        way = self.way(types)
        if way in ("direct", "rounded"):
            kind = "tl.bfloat16" if way == "rounded" else POINTERS[types[0]]
            self.lines.append(f"{acc} = tl.dot({left}.to({kind}), {right}.to({kind}), {acc})")
        elif way == "halves":
            wide = types.index("f32")
            text = (left, right)[wide]
            high = self.let(At(f"({text}).to(tl.bfloat16)"))
            low = self.let(At(f"({text} - {high.text}.to(tl.float32)).to(tl.bfloat16)"))
            other = f"({(right, left)[wide]}).to(tl.bfloat16)"
            for part in (high.text, low.text):
                pair = (part, other) if wide == 0 else (other, part)
                self.lines.append(f"{acc} = tl.dot({pair[0]}, {pair[1]}, {acc})")
        else:
            self.lines.append(f'{acc} = tl.dot({left}, {right}, {acc}, input_precision="{way}")')

    def accumulated(self, op: Op, value: Value, index: Index, conds: tuple[At, ...]) -> At:
        """A product's result, which is known at its own place only."""
        if index != self.index:
            raise UnsupportedOpError(f"a gemm kernel reads `{op.name}` at other places than its own",
                                     where=f"#{op.place}", hint="leave that outside of the kernel")
        at = At(f"acc{self.products.index(op)}", frozenset("rc"))
        bias, place = self.bias(op)
        if bias is not None:
            at = self.let(At(f"{at.text} + {self.value(bias, place, conds).text}", at.axes))
        self.levels[-1].known[(value.name, index, conds)] = at
        return at


def _type(operand: Operand) -> Type:
    assert isinstance(operand, Value | Weight)
    return operand.type
