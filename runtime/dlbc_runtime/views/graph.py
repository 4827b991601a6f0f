"""A model's graph as a picture or a page: what relevance passes, module by module, repeated blocks folded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dlbc_runtime.errors import InputError
from dlbc_runtime.views.graph_drawing import Drawing, Painter
from dlbc_runtime.views.graph_flow import Flow, flow_of, strongest, totals
from dlbc_runtime.views.graph_folds import Module, module_tree, scene
from dlbc_runtime.views.graph_shapes import Box, Label, Shape, moved, png, svg
from dlbc_runtime.views.numbers import signed
from dlbc_runtime.views.page import rendered

if TYPE_CHECKING:
    import networkx

    from dlbc_runtime.explanation import Explanation

By = Literal["module", "op"]
MARGIN, BETWEEN, CAPTION = 28.0, 44.0, 52.0
SUFFIXES = (".svg", ".png", ".html")


@dataclass(frozen=True)
class Scene:
    """A drawing on the page: the module's path ("" for the model) and its parts for the trail above it."""

    path: str
    picture: str
    trail: tuple[str, ...]


def draw(graph: networkx.MultiDiGraph, explained: Collection[str], path: str | Path, *,
         explanation: Explanation | None = None, by: By = "module", top_k: int | None = None,
         opened: Sequence[str] = (), title: str = "") -> Path:
    """Write the forward part of `graph` from the explained inputs on, by the suffix of `path`; returns the path.

    `explanation`: one that holds relevance of inner places (`keep="all"` or "modules"), summed over rows and targets;
    without one nothing is coloured. `top_k`: only so many of the most relevant places. `opened`: modules to draw
    beside the whole. InputError for what does not fit, DlbcError when `.png` lacks matplotlib.
    """
    from dlbc_runtime.explanation_file import write_whole

    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"cannot draw a graph as {path.suffix!r}", where=str(path),
                         hint="use a name that ends in .svg, .png or .html")
    relevance = {} if explanation is None else _relevance(explanation)
    flow = flow_of(graph, explained, relevance, by)
    if top_k is not None:
        strongest(flow, top_k, by)
        flow.nodes = {key: replace(node, name=node.path, place="") for key, node in flow.nodes.items()}
    tree = module_tree(flow) if top_k is None else Module("", list(flow.nodes))
    unknown = [one for one in opened if one not in {module.path for module in tree.modules()}]
    if unknown:
        some = ", ".join([module.path for module in tree.modules()][:8])
        raise InputError(f"there is no module {unknown[0]!r} with several places inside", where="draw()",
                         hint=f"modules: {some}" if some else "leave `opened` out")
    title = title or (explanation.method.model if explanation is not None else "") or "Graph"
    if suffix == ".html":
        write_whole(path, _page(flow, tree, title, opened, _whole(tree, top_k)).encode("utf-8"))
        return path
    painter = Painter(flow)
    drawings = [painter.drawing(_scene(tree, one, top_k)) for one in ("", *opened)]
    shapes, width, height = _beside(drawings, ("", *opened), title, caption(flow))
    content = svg(shapes, width, height, title).encode("utf-8") if suffix == ".svg" else png(shapes, width, height)
    write_whole(path, content)
    return path


def caption(flow: Flow) -> str:
    """What colours and widths say."""
    if not flow.limit:
        return "from the inputs, above, to the output"
    return f"relevance: full colour is {signed(flow.limit)} (red) or {signed(-flow.limit)} (blue); edges are as " \
           "thick as what flows along them"


def _relevance(explanation: Explanation) -> dict[str, float]:
    from dlbc_runtime.explanation import Explanation as Drawable

    if not isinstance(explanation, Drawable):
        raise InputError(f"{type(explanation).__name__} holds no relevance of the model's places", where="draw()",
                         hint='give what explainer(..., keep="all") returns, or keep="modules"')
    if not explanation.nodes:
        raise InputError("this explanation holds relevance of its inputs alone", where="draw()",
                         hint='explain with keep="all", or keep="modules"')
    return {**totals(explanation.relevance), **totals(explanation.nodes)}


def _whole(tree: Module, top_k: int | None) -> int:
    """How many items are drawn at once: all of those that were chosen."""
    return 30 if top_k is None else len(tree.items)


def _scene(tree: Module, path: str, top_k: int | None) -> Module:
    return scene(tree, path, _whole(tree, top_k))


def _beside(drawings: Sequence[Drawing], names: Sequence[str], title: str, says: str
            ) -> tuple[list[Shape], float, float]:
    """Drawings from left to right under a title, with a caption."""
    shapes: list[Shape] = [Label(MARGIN, MARGIN + 8, title, 17.0, "start", bold=True)]
    x = MARGIN
    for drawing, name in zip(drawings, names, strict=True):
        if name:
            shapes.append(Label(x, MARGIN + CAPTION - 22, name, 12.0, "start", "soft"))
        shapes += moved(drawing.shapes, x, MARGIN + CAPTION - 8)
        x += drawing.width + BETWEEN
    height = MARGIN + CAPTION + max(drawing.height for drawing in drawings)
    lines = _wrapped(says, max(26, int((x - BETWEEN - MARGIN) / 6)))
    shapes += [Label(MARGIN, height + 22 + 15 * place, line, 11.0, "start", "soft") for place, line in enumerate(lines)]
    width = max(x - BETWEEN + MARGIN, 260.0)
    return shapes, width, height + 22 + 15 * len(lines) + MARGIN / 2


def _wrapped(text: str, length: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, length)


def _page(flow: Flow, tree: Module, title: str, opened: Sequence[str], room: int) -> str:
    """The whole on the left, and what is opened by a click beside it; every drawing that can be opened is in it."""
    painter, scenes, waiting = Painter(flow, clickable=True), dict[str, Scene](), ["", *opened]
    while waiting:
        path = waiting.pop(0)
        if path in scenes:
            continue
        drawing = painter.drawing(scene(tree, path, room))
        waiting += [shape.opens for shape in drawing.shapes if isinstance(shape, Box) and shape.opens]
        picture = svg(moved(drawing.shapes, 8, 8), drawing.width + 16, drawing.height + 16, path or title, alone=False)
        scenes[path] = Scene(path, picture, tuple(path.split(".")) if path else ())
    return rendered("graph.html.jinja", title, ("graph.css",), ("graph.js",), whole=scenes.pop(""),
                    scenes=list(scenes.values()), first=opened[0] if opened else "", caption=caption(flow),
                    limit=signed(flow.limit) if flow.limit else "", low=signed(-flow.limit) if flow.limit else "")
