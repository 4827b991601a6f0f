"""A scene as shapes: nodes, frames of open modules, tables of repeated blocks, and the edges between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dlbc_runtime.views.graph_flow import Edge, Flow, Node
from dlbc_runtime.views.graph_folds import Module, owners, passing, relevance_of
from dlbc_runtime.views.graph_layout import Arc, Key, Point, Size, layered
from dlbc_runtime.views.graph_shapes import Box, Label, Line, Shape, moved, text_width
from dlbc_runtime.views.numbers import signed

SIGNS = {"add": "+", "mul": "×", "sub": "−", "div": "÷"}
NODE, CELL_WIDTH, CELL_HEIGHT, PAD, HEAD = 36.0, 26.0, 15.0, 14.0, 20.0
THICK = 12.0
"""The width of an edge that carries as much as the strongest node holds."""


@dataclass(frozen=True)
class Drawing:
    """Shapes from (0, 0) to (width, height)."""

    shapes: list[Shape]
    width: float
    height: float


@dataclass
class _Placed:
    """An item at its place: shapes from its corner, size, and where wires of outer sources enter and inner leave."""

    shapes: list[Shape]
    size: Size


@dataclass
class Painter:
    """Draws modules of one flow to one scale. `clickable`: folded modules say what they open."""

    flow: Flow
    clickable: bool = False
    limit: float = field(init=False)

    def __post_init__(self) -> None:
        self.limit = self.flow.limit

    def drawing(self, module: Module) -> Drawing:
        """A scene of `graph_folds.scene`."""
        placed = self._open(module, framed=False)
        return Drawing(placed.shapes, placed.size.width, placed.size.height)

    def strength(self, amount: float | None) -> float | None:
        """On the scale from -1 to 1."""
        return None if amount is None or not self.limit else max(-1.0, min(1.0, amount / self.limit))

    def thickness(self, amount: float | None) -> float:
        """Of an edge, in pixels."""
        return 1.2 if amount is None or not self.limit else 1.0 + (THICK - 1.0) * min(1.0, abs(amount) / self.limit)

    # An open module

    def _open(self, module: Module, *, framed: bool) -> _Placed:
        owner = owners(module)
        keys: dict[str, Key] = {leaf: one if isinstance(one, str) else ("module", one.path)
                                for leaf, one in owner.items()}
        placed = {keys[next(iter(one.leaves())) if isinstance(one, Module) else one]: self._item(one)
                  for one in module.items}
        amounts: dict[Arc, float | None] = {}
        entering: dict[str, Key] = {}
        leaving: dict[str, Key] = {}
        for (before, after), amount in self.flow.edges.items():
            start, end = keys.get(before), keys.get(after)
            if (start is None and end is None) or start == end:
                continue
            if start is None:
                start = entering.setdefault(before, ("in", before))
            if end is None:
                end = leaving.setdefault(before, ("out", before))
            arc = Arc(before, start, end)
            known = amounts.get(arc, 0.0)
            amounts[arc] = None if known is None or amount is None else known + amount
        sizes = {key: one.size for key, one in placed.items()}
        ports = {key: Size(8.0, 0.0) for key in (*entering.values(), *leaving.values())}
        layout = layered({**sizes, **ports}, list(amounts), tuple(entering.values()), tuple(leaving.values()))
        title = module.name if framed else ""
        stub = 0.0 if framed else 16.0  # wires that come from outside, or go there, begin and end in the open
        side, top = (PAD, HEAD - 2) if framed else (0.0, stub if entering else 0.0)
        width = max(layout.width, text_width(title, 11.5)) + 2 * side
        across = (width - layout.width) / 2
        height = layout.height + top + (4.0 if framed else stub if leaving else 0.0)
        shapes: list[Shape] = []
        if framed:
            shapes.append(Box(0, 0, width, height, None, "group", 12.0, says=("", module.path)))
            shapes.append(Label(10, 16, title, 11.5, "start", "soft"))
        for key, one in placed.items():
            shapes += moved(one.shapes, layout.places[key][0] + across, layout.places[key][1] + top)
        for arc, way in layout.ways.items():
            shapes.append(self._line([(x + across, y + top) for x, y in way], arc, amounts[arc],
                                     from_edge=arc.start in entering.values(), to_edge=arc.end in leaving.values(),
                                     height=height))
        return _Placed(shapes, Size(
            width, height,
            {source: layout.places[key][0] + across + 4 for source, key in entering.items()},
            {source: layout.places[key][0] + across + 4 for source, key in leaving.items()}))

    def _line(self, way: list[Point], arc: Arc, amount: float | None, *, from_edge: bool, to_edge: bool,
              height: float) -> Line:
        if from_edge:
            way = [(way[0][0], 0.0), *way]
        if to_edge:
            way = [*way, (way[-1][0], height)]
        source = self.flow.nodes[str(arc.source)]
        return Line(tuple(way), self.thickness(amount), self.strength(amount),
                    ("" if amount is None else signed(amount), f"into {source.path}"))

    def _item(self, one: Module | str) -> _Placed:
        if isinstance(one, str):
            return self._node(self.flow.nodes[one])
        if one.open:
            return self._open(one, framed=True)
        return self._run(one) if one.run else self._folded(one)

    # Items

    def _node(self, node: Node) -> _Placed:
        strength, value = self.strength(node.relevance), "" if node.relevance is None else signed(node.relevance)
        says = (value, f"{node.path}, {' '.join(dict.fromkeys(node.ops))} {node.type}".strip())
        sign = SIGNS.get(node.name)
        if sign is not None:
            return _Placed([Box(0, 0, 22, 22, strength, "node", 11.0, says=says), Label(11, 16, sign, 15.0)],
                           Size(22.0, 22.0))
        name = _shortened(node.name, 44)
        width = max(text_width(name), text_width(value, 10.5)) + 20
        height = NODE if value else NODE - 10
        shapes: list[Shape] = [Box(0, 0, width, height, strength, "node", 13.0 if node.input else 7.0, says=says),
                               Label(width / 2, 16 if value else 17, name, bold=node.input)]
        if value:
            shapes.append(Label(width / 2, 29, value, 10.5))
        return _Placed(shapes, Size(width, height))

    def _folded(self, module: Module) -> _Placed:
        amount = relevance_of(self.flow, module)
        count = len(list(module.leaves()))
        below = f"{count} inside" + ("" if amount is None else f" · {signed(amount)}")
        width = max(text_width(module.name), text_width(below, 10.5)) + 24
        says = ("" if amount is None else signed(amount), module.path)
        return _Placed([Box(3, 3, width, NODE, None, "fold", says=says),
                        Box(0, 0, width, NODE, self.strength(amount), "fold", says=says, opens=self._opens(module)),
                        Label(width / 2, 16, module.name), Label(width / 2, 29, below, 10.5)],
                       Size(width + 3, NODE + 3))

    def _run(self, module: Module) -> _Placed:
        """Rows for the blocks, and columns for the modules and nodes inside them; between rows what flows."""
        blocks = module.blocks
        columns = list(dict.fromkeys(name for block in blocks for name, _ in self._parts(block)))
        name_width = max(text_width(block.name, 11.0) for block in blocks) + 8
        stream, gap = 20.0, 4.0
        left = PAD + name_width + stream + 8
        tallest = min(96.0, max((text_width(_shortened(name, 18), 10.5) for name in columns), default=0.0))
        top = HEAD + tallest * 0.80 + 12
        width = left + len(columns) * (CELL_WIDTH + 2) + max(PAD, tallest * 0.62)
        title = f"{module.name} {blocks[0].name}–{blocks[-1].name}"
        middle = PAD + name_width + stream / 2
        width = max(width, middle + 13 + text_width(title, 11.5) + PAD)
        height = top + len(blocks) * (CELL_HEIGHT + gap) + PAD
        shapes: list[Shape] = [Box(0, 0, width, height, None, "group", 12.0, says=("", module.path)),
                               Label(middle + 13, 16, title, 11.5, "start", "soft")]
        shapes += [Label(left + place * (CELL_WIDTH + 2) + CELL_WIDTH / 2, top - 7, _shortened(name, 18), 10.5, "start",
                         "soft", turned=-52) for place, name in enumerate(columns)]
        ends = [top - 4.0, *(top + (row + 1) * (CELL_HEIGHT + gap) - gap / 2 for row in range(len(blocks)))]
        ends[-1] = height
        flows = [self._entering(block) for block in blocks]
        flows.append(self._leaving(blocks[-1]))
        shapes.append(self._stream(middle, 0.0, ends[0] + 6, flows[0], blocks[0]))
        for row, block in enumerate(blocks):
            y = top + row * (CELL_HEIGHT + gap)
            amount = relevance_of(self.flow, block)
            says = ("" if amount is None else signed(amount), block.path)
            shapes.append(self._stream(middle, y, ends[row + 1] + (0 if row == len(blocks) - 1 else 2.1),
                                       flows[row + 1], block))
            shapes.append(Box(PAD - 4, y - 1, width - PAD, CELL_HEIGHT + 2, None, "row", 4.0, self._opens(block), says))
            shapes.append(Label(PAD + name_width - 8, y + 11.5, block.name, 11.0, "end"))
            parts = dict(self._parts(block))
            for place, name in enumerate(columns):
                if name in parts:
                    part = parts[name]
                    shapes.append(Box(left + place * (CELL_WIDTH + 2), y, CELL_WIDTH, CELL_HEIGHT, self.strength(part),
                                      "cell", 3.0, self._opens(block),
                                      ("" if part is None else signed(part), f"{block.path}.{name}")))
        sources, ends_of = passing(self.flow, set(module.leaves()))
        enters: dict[Key, float] = {before: middle for before, _ in sources}
        leaves: dict[Key, float] = {before: middle for before, _ in ends_of}
        return _Placed(shapes, Size(width, height, enters, leaves))

    def _stream(self, x: float, top: float, bottom: float, amount: float | None, block: Module) -> Line:
        return Line(((x, top), (x, bottom)), self.thickness(amount), self.strength(amount),
                    ("" if amount is None else signed(amount), block.path))

    def _parts(self, block: Module) -> list[tuple[str, float | None]]:
        """The modules in a block with their relevance; what the block adds itself is its stream."""
        found: list[tuple[str, float | None]] = []
        for one in block.items:
            if isinstance(one, Module):
                found.append((one.name, relevance_of(self.flow, one)))
            elif self.flow.nodes[one].name not in SIGNS:
                found.append((self.flow.nodes[one].name, self.flow.nodes[one].relevance))
        names: dict[str, int] = {}
        numbered = []
        for name, amount in found:  # a module that is used twice
            names[name] = names.get(name, 0) + 1
            numbered.append((name if names[name] == 1 else f"{name} {names[name]}", amount))
        return numbered

    def _entering(self, block: Module) -> float | None:
        return _sum(passing(self.flow, set(block.leaves()))[0])

    def _leaving(self, block: Module) -> float | None:
        return _sum(passing(self.flow, set(block.leaves()))[1])

    def _opens(self, module: Module) -> str:
        return module.path if self.clickable else ""


def _sum(edges: Mapping[Edge, float | None]) -> float | None:
    return None if not edges or any(amount is None for amount in edges.values()) else \
        sum(amount or 0.0 for amount in edges.values())


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length - 1] + "…"
