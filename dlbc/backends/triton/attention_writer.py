"""What the two programs of an attention region share: variables, loads and stores, ops of a tile, products.

Ops are written for one tile of rows and one of keys at a time, in the order of the function, so that nothing with rows
and keys is ever stored. Seeds that share a program share what has no seeds (scores, softmax): ops that have some are
written once for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dlbc.backends.names import Names
from dlbc.backends.triton.table import expression, number
from dlbc.ir.attention_tiles import WIDEST, Kind, Region, Tile
from dlbc.ir.core import Op, Operand, Value, Weight
from dlbc.ir.fusible import CHEAP
from dlbc.ir.ops import attr

HALVES = ("f16", "bf16")
TYPES = {"f16": "tl.float16", "bf16": "tl.bfloat16"}

_TAKEN = ("tl", "triton", "math", "SEEDS", "BATCH", "ROWS", "KEYS", "BLOCK_R", "BLOCK_K", "PRECISION", "WIDE", "tiles",
          "place", "rest", "first_r", "first_k", "h", "g", "b", "seed", "r", "k", "in_r", "in_k", "low", "high",
          "start", "repeat", "back", "float", *(f"d{width}" for width in range(1, WIDEST + 1)))


@dataclass(frozen=True)
class Buffer:
    """A tensor that a program reads or writes: `operand` of the function, a result, or what one program hands on."""

    name: str
    """A value of the function; `name.lse` is the logarithm of the sum of exponentials of a softmax."""
    tile: Tile


@dataclass(frozen=True)
class Program:
    """A jit function as text. `buffers` are its pointers in order, each followed by the strides of its axes."""

    source: str
    buffers: tuple[Buffer, ...]


def lse_tile(region: Region, softmax: str) -> Tile:
    """The row statistic of a softmax."""
    seeds = region.tiles[softmax].seeds
    return Tile("r", ("s", "b", "h", "r") if seeds else ("b", "h", "r"), seeds, False, "query", 1, "f32")


def handed_tile(region: Region, name: str) -> Tile:
    """How a value with rows is laid out between the programs: [S,B,H,T,D], without the axes that it has not."""
    tile = region.tiles[name]
    roles = (("s",) if tile.seeds else ()) + ("b", "h", "r") + (("d",) if "d" in tile.axes else ())
    return Tile(tile.axes, roles, tile.seeds, False, "query", tile.width, "bool" if tile.dtype == "bool" else "f32")


REDUCTIONS = {"sum": "tl.sum", "amax": "tl.max", "amin": "tl.min"}


@dataclass
class Writer:
    """What both programs share. `order`: the axes of its tiles."""

    region: Region
    seeds: int
    order: str = "rkd"
    names: Names = field(default_factory=lambda: Names(_TAKEN))
    texts: dict[tuple[str, int], str] = field(default_factory=dict)
    raw: dict[str, str] = field(default_factory=dict)
    padded: set[str] = field(default_factory=set)
    """Values that are 0 past the numbers of a head."""
    bounded: set[str] = field(default_factory=set)
    """Values that are 0 where rows or keys do not exist."""
    buffers: dict[str, Buffer] = field(default_factory=dict)
    addressed: set[str] = field(default_factory=set)
    widths: set[int] = field(default_factory=set)
    products: dict[tuple[str, ...], str] = field(default_factory=dict)
    """The variables of products over the numbers of a head, in the loop that is being written."""
    count: int = 0
    # --- texts ------------------------------------------------------------------------------------------

    def copies(self, name: str) -> range:
        """The seeds for which a value is written."""
        return range(self.seeds if self.tile(name).seeds else 1)

    def tile(self, name: str) -> Tile:
        """The tile of a value of the function."""
        return self.region.tiles[name]

    def new(self, name: str, seed: int) -> str:
        """The variable of a value, for one of the seeds."""
        found = self.names[name]
        if self.tile(name).seeds and self.seeds > 1:
            found = f"{found}_s{seed}"
        self.texts[name, seed] = found
        return found

    def text(self, name: str, seed: int) -> str:
        """The variable of a value that is known."""
        return self.texts[name, seed if self.tile(name).seeds else 0]

    def wide(self, name: str, seed: int) -> str:
        """A value as numbers to compute with: halves as float32."""
        found = self.text(name, seed)
        return f"{found}.to(tl.float32)" if self.raw.get(name) in HALVES else found

    def expanded(self, text: str, axes: str, wanted: str) -> str:
        """A tile of one axis as one of two."""
        if len(axes) != 1 or len(wanted) != 2:
            return text
        grouped = text if text.isidentifier() else f"({text})"
        return grouped + ("[:, None]" if self.sorted(wanted)[0] == axes else "[None, :]")

    def sorted(self, axes: str) -> str:
        """Axes in the order of this program's tiles."""
        return "".join(axis for axis in self.order if axis in axes)

    def head(self, width: int) -> str:
        """The variable that counts the numbers of a head of a width."""
        self.widths.add(width)
        return f"d{width}"

    def shape(self, axes: str, width: int) -> str:
        """The shape of a tile, as text."""
        sizes = {"r": "BLOCK_R", "k": "BLOCK_K", "d": str(padded(width))}
        found = [sizes[axis] for axis in self.sorted(axes)]
        return f"({', '.join(found)}{',' if len(found) == 1 else ''})"

    # --- memory -----------------------------------------------------------------------------------------

    def buffer(self, name: str, tile: Tile) -> Buffer:
        """A tensor that is now an argument."""
        return self.buffers.setdefault(name, Buffer(name, tile))

    def arguments(self) -> list[str]:
        """The pointers and strides of the buffers."""
        found = []
        for buffer in self.buffers.values():
            pointer = self.pointer(buffer)
            found += [pointer, *(f"{pointer}_{role}" if role else f"{pointer}_{i}"
                                 for i, role in enumerate(buffer.tile.roles))]
        return found

    def pointer(self, buffer: Buffer) -> str:
        """The argument that points to a tensor."""
        return f"{self.names[f'{buffer.name}_ptr']}"

    def address(self, buffer: Buffer, seed: int, lines: list[str]) -> str:
        """The variable with the address of a tensor's part for this batch row, head and seed, set in `lines`."""
        pointer, roles = self.pointer(buffer), buffer.tile.roles
        name = f"{pointer}_at" + (f"_s{seed}" if buffer.tile.seeds and self.seeds > 1 else "")
        if name in self.addressed:
            return name
        self.addressed.add(name)
        parts = [pointer]
        if "s" in roles:
            chosen = "seed" if self.seeds == 1 else f"tl.minimum(seed * {self.seeds} + {seed}, SEEDS - 1)"
            parts.append(f"{chosen} * {pointer}_s")
        if "b" in roles:
            parts.append(f"b * {pointer}_b")
        if "h" in roles:
            parts.append(f"{'h' if buffer.tile.heads == 'query' else 'g'} * {pointer}_h")
        if buffer.tile.stacked:
            parts.append(f"(h % {self.region.repeats}) * ROWS * {pointer}_r")
        lines.append(f"{name} = {' + '.join(parts)}")
        return name

    def offsets(self, buffer: Buffer) -> str:
        """`r[:, None] * x_r + d64[None, :] * x_d`: where the numbers of a tile lie."""
        pointer, axes = self.pointer(buffer), buffer.tile.axes
        found = []
        for axis in self.sorted(axes):
            index = self.head(buffer.tile.width) if axis == "d" else axis
            found.append(f"{self.expanded(index, axis, axes)} * {pointer}_{axis}")
        return "".join(f" + {text}" for text in found)

    def inside(self, tile: Tile) -> str:
        """The condition that a tile's numbers exist; "" where all do."""
        found = []
        for axis in self.sorted(tile.axes):
            if axis == "d":
                if padded(tile.width) != tile.width:
                    found.append(self.expanded(f"({self.head(tile.width)} < {tile.width})", axis, tile.axes))
            else:
                found.append(self.expanded(f"in_{axis}", axis, tile.axes))
        return " & ".join(found)

    def load(self, name: str, buffer: Buffer, lines: list[str], addresses: list[str]) -> None:
        """Load a value."""
        for seed in self.copies(name):
            address = self.address(buffer, seed, addresses)
            condition = self.inside(buffer.tile)
            masked = f", mask={condition}, other=0" if condition else ""
            truth = " != 0" if buffer.tile.dtype == "bool" else ""
            target = self.new(name, seed)
            loaded = f"tl.load({address}{self.offsets(buffer)}{masked})"
            lines.append(f"{target} = {loaded}{truth}")
        if buffer.tile.dtype != "bool":
            self.raw[name] = buffer.tile.dtype
        self.padded.add(name)
        self.bounded.add(name)

    def store(self, buffer: Buffer, texts: Sequence[str], lines: list[str]) -> None:
        """Store a value; one without seeds only once."""
        for seed, text in enumerate(texts):
            address = self.address(buffer, seed, lines)
            condition = self.inside(buffer.tile)
            if not buffer.tile.seeds and self.region.seeds != 1:
                condition = f"{condition} & (seed == 0)"
            lines.append(f"tl.store({address}{self.offsets(buffer)}, {text}, mask={condition})")

    # --- ops --------------------------------------------------------------------------------------------

    def op(self, name: str, lines: list[str]) -> None:
        """Write an op that sums over neither rows nor keys."""
        op, kind = self.region.definitions[name], self.region.kinds[name]
        source = op.operands[0] if op.operands else None
        if isinstance(source, Value) and (kind is Kind.ALIAS or op.name in CHEAP):
            self.like(name, source.name, op, lines)
            return
        for seed in self.copies(name):
            if kind is Kind.MAP:
                right = self.mapped(op, seed)
            elif kind is Kind.SCORES:
                right = self.product(op.operands[0], op.operands[1], seed, "d", lines)
            else:
                assert kind is Kind.WITHIN
                right = self.within(op, seed)
            if kind is Kind.SCORES:
                self.texts[name, seed] = right
            else:
                lines.append(f"{self.new(name, seed)} = {right}")

    def like(self, name: str, source: str, op: Op, lines: list[str]) -> None:
        """Write a value that is 0 where its operand is, and that a half holds exactly if it holds the operand."""
        raw = self.raw.get(source, "")
        same = self.region.kinds[name] is Kind.ALIAS or (
            op.name == "cast" and op.result.type.floating and self.region.tiles[source].dtype != "bool" and (
                raw in HALVES or raw == "f32" or (not raw and self.region.tiles[source].dtype in ("f32", *HALVES))))
        for seed in self.copies(name):
            if same:
                self.texts[name, seed] = self.text(source, seed)
            else:
                back = f".to({TYPES[raw]})" if raw in HALVES else ""
                text = self.mapped(op, seed)
                lines.append(f"{self.new(name, seed)} = {f'({text}){back}' if back else text}")
        if raw in HALVES or (raw and same):
            self.raw[name] = raw
        for known in (self.padded, self.bounded):
            if source in known:
                known.add(name)

    def mapped(self, op: Op, seed: int) -> str:
        """The expression of an op of single numbers."""
        axes = self.tile(op.result.name).axes
        texts = [self.expanded(self.wide(o.name, seed), self.sorted(self.tile(o.name).axes), axes)
                 if isinstance(o, Value) else number(o) for o in op.operands if not isinstance(o, Weight)]
        return expression(op, texts)

    def within(self, op: Op, seed: int) -> str:
        source = op.operands[0]
        assert isinstance(source, Value)
        fill = {"sum": "0.0", "amax": 'float("-inf")', "amin": 'float("inf")'}[op.name]
        text = self.wide(source.name, seed)
        if padded(self.tile(source.name).width) != self.tile(source.name).width and (
                source.name not in self.padded or op.name != "sum"):
            text = self.cut_width(text, source.name, fill)
        return f"{REDUCTIONS[op.name]}({text}, axis=1)"

    def cut_width(self, text: str, name: str, fill: str) -> str:
        """A tile with a number where a head has no more of them."""
        tile = self.tile(name)
        condition = self.expanded(f"({self.head(tile.width)} < {tile.width})", "d", tile.axes)
        return f"tl.where({condition}, {text}, {fill})"

    def product(self, a: Operand, b: Operand, seed: int, over: str, lines: list[str], total: str = "") -> str:
        """The product of two values over an axis, in the order of this program's tiles, added to `total` if given.

        A float32 tile beside one of bfloat16 is the sum of two bfloat16 tiles, which is exact to 16 bits.
        """
        assert isinstance(a, Value) and isinstance(b, Value)
        left, right = sorted((a, b), key=lambda v: self.rank(v, over))
        kinds = (self.kept(left), self.kept(right))
        half = kinds[0] if kinds[0] == kinds[1] and kinds[0] in HALVES else "bf16" if "bf16" in kinds else ""
        texts = [self.factor(value, seed, over, half if kind == half else "")
                 for value, kind in zip((left, right), kinds, strict=True)]
        turned = ["{}", "tl.trans({})"] if over == "d" else ["{}", "{}"]
        key = (over, *texts, *kinds)
        if over == "d" and key in self.products:
            return self.products[key]
        added = f", {total}" if total else ""
        if kinds == (half, half):
            found = f"tl.dot({', '.join(map(str.format, turned, texts))}{added})"
        elif half:
            wide = kinds.index("f32") if "f32" in kinds else 1 - kinds.index(half)
            whole = self.named(texts[wide], lines)
            high = f"{whole}.to(tl.bfloat16)"
            low = f"({whole} - {high}.to(tl.float32)).to(tl.bfloat16)"
            pairs = [[low, texts[1]], [high, texts[1]]] if wide == 0 else [[texts[0], low], [texts[0], high]]
            first, second = (", ".join(map(str.format, turned, pair)) for pair in pairs)
            found = f"tl.dot({second}, tl.dot({first}{added}))"
        else:
            found = f"tl.dot({', '.join(map(str.format, turned, texts))}{added}, input_precision=PRECISION)"
        if over == "d":
            found = self.products[key] = self.named(found, lines)
        return found

    def kept(self, value: Value) -> str:
        """The element type that holds a value exactly, or that the graph rounds it to."""
        raw = self.raw.get(value.name, "")
        return raw if raw in HALVES else value.type.dtype if value.type.dtype in HALVES and not raw else "f32"

    def named(self, text: str, lines: list[str]) -> str:
        """A variable that holds an expression."""
        if text.isidentifier():
            return text
        self.count += 1
        name = self.names[f"t{self.count}"]
        lines.append(f"{name} = {text}")
        return name

    def rank(self, value: Value, over: str) -> int:
        """Which factor comes first: the one with the axis that the result has first."""
        axes = self.tile(value.name).axes
        own = next(axis for axis in self.order if axis in axes and axis != over)
        return self.order.index(own)

    def factor(self, value: Value, seed: int, over: str, half: str) -> str:
        """A factor of a product: 0 where rows, keys or numbers of a head do not exist; as a half, or as float32."""
        tile, raw = self.tile(value.name), self.raw.get(value.name)
        text = self.text(value.name, seed)
        if over == "d":
            if value.name not in self.padded and padded(tile.width) != tile.width:
                text = self.cut_width(text, value.name, "0.0")
        elif value.name not in self.bounded and not self.hidden(value.name):
            text = f"tl.where({self.expanded(f'in_{over}', over, tile.axes)}, {text}, 0.0)"
        if half:
            return text if raw else f"{text}.to({TYPES[half]})"
        return f"{text}.to(tl.float32)" if raw and raw != "f32" else text

    def hidden(self, name: str) -> bool:
        """True for a softmax: 0 where rows or keys do not exist."""
        while self.region.kinds[name] is Kind.ALIAS:
            name = self.region.reads(name)[0].name
        return self.region.kinds[name] is Kind.WEIGHTS

    def scores(self, op: Op, lines: list[str]) -> list[str]:
        """The variables of the scores of a softmax, with -inf where a query does not see a key."""
        q, k, *mask = op.operands
        found = []
        for seed in self.copies(op.result.name):
            text = f"{self.names[f'{op.result.name} scores']}" + (f"_s{seed}" if seed else "")
            lines.append(f"{text} = {self.product(q, k, seed, 'd', lines)} * {attr(op, 'scale')!r}")
            cap = attr(op, "softcap")
            if cap is not None:
                lines.append(f"{text} = {cap!r} * {self.tanh(f'{text} / {cap!r}')}")
            lines.append(f"{text} = tl.where({self.visible(op, mask, lines, seed)}, {text}, float(\"-inf\"))")
            if mask and isinstance(mask[0], Value) and mask[0].type.dtype != "bool":
                added = self.expanded(self.wide(mask[0].name, seed), self.tile(mask[0].name).axes, "rk")
                lines.append(f"{text} = {text} + {added}")
            found.append(text)
        return found

    def tanh(self, text: str) -> str:
        """The hyperbolic tangent, as the expression table writes it."""
        value = Value("x", self.region.softmaxes[0].result.type)
        return expression(Op("tanh", (value,), (value,)), [text])

    def visible(self, op: Op, mask: Sequence[Operand], lines: list[str], seed: int) -> str:
        """The condition that a query sees a key."""
        parts = [self.expanded("in_k", "k", "rk")]
        causal, window = attr(op, "causal"), attr(op, "window")
        if causal or window is not None:
            rows, keys = self.expanded("r", "r", "rk"), self.expanded("k", "k", "rk")
            lines.append(f"back = {rows} + (KEYS - ROWS) - {keys}")
            parts += ["(back >= 0)"] if causal else []
            parts += [f"(back < {window})"] if window is not None else []
        if mask and isinstance(mask[0], Value) and mask[0].type.dtype == "bool":
            parts.append(self.expanded(self.text(mask[0].name, seed), self.tile(mask[0].name).axes, "rk"))
        return " & ".join(parts)

    def counters(self) -> list[str]:
        """The lines that set the variables that count numbers of a head."""
        return [f"d{width} = tl.arange(0, {padded(width)})" for width in sorted(self.widths)]

    def given(self, name: str, lines: list[str], addresses: list[str]) -> None:
        """Load a parameter."""
        self.load(name, self.buffer(name, self.tile(name)), lines, addresses)


def padded(width: int) -> int:
    """Numbers of a head as a tile holds them: a power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def _grouped(text: str) -> str:
    return text if text.isidentifier() else f"({text})"
