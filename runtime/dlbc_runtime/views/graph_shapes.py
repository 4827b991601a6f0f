"""What a drawing is made of, and how it is written: SVG, or PNG with matplotlib.

Colours stand twice in the SVG: as numbers, for programs that know no style sheets, and as a strength `--t` with a
class, by which a page draws them in its own light or dark.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from dlbc_runtime.errors import DlbcError
from dlbc_runtime.views import colour

INK, SOFT, LINE, PAGE, CARD = "#1c1d20", "#5f636b", "#cfcfca", "#f6f6f4", "#ffffff"
ROLES = {"ink": INK, "soft": SOFT}


@dataclass(frozen=True)
class Box:
    """A rectangle; `strength` colours it from -1 to 1 (None: not coloured). `kind`: node, cell, group, row or fold.
    `opens`: the module that a click opens; `says`: what the pointer reads, a value and a place."""

    x: float
    y: float
    width: float
    height: float
    strength: float | None = None
    kind: str = "node"
    radius: float = 7.0
    opens: str = ""
    says: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Line:
    """A curve through points that goes down at each of them; `width` in pixels, `strength` its colour."""

    points: tuple[tuple[float, float], ...]
    width: float
    strength: float | None
    says: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Label:
    """Text at a base line; `anchor`: start, middle or end; `turned` by so many degrees around its place."""

    x: float
    y: float
    text: str
    size: float = 12.0
    anchor: str = "middle"
    role: str = "ink"
    bold: bool = False
    turned: float = 0.0


Shape: TypeAlias = Box | Line | Label


def moved(shapes: Iterable[Shape], x: float, y: float) -> list[Shape]:
    """The same further right and down."""
    return [replace(one, points=tuple((a + x, b + y) for a, b in one.points)) if isinstance(one, Line)
            else replace(one, x=one.x + x, y=one.y + y) for one in shapes]


def text_width(text: str, size: float = 12.0) -> float:
    """About how wide text is in a sans-serif font."""
    return sum(0.36 if one in "iljtfr.,:;|'()[] " else 0.92 if one in "mwMW@" else 0.64 for one in text) * size


def svg(shapes: Sequence[Shape], width: float, height: float, title: str, *, alone: bool = True) -> str:
    """The drawing as SVG; `alone` as a file of its own, otherwise as a part of a page."""
    body = "\n".join(_svg(one, alone) for one in sorted(shapes, key=_layer))
    name = html.escape(title)
    start = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
             f'height="{height:.0f}" role="{"img" if alone else "group"}" aria-label="{name}"')
    if not alone:
        return f"{start}>\n{body}\n</svg>"
    return (f'<?xml version="1.0" encoding="UTF-8"?>\n{start} font-family="system-ui, -apple-system, Segoe UI, Roboto, '
            f'Helvetica Neue, Arial, sans-serif">\n<title>{name}</title>\n<rect width="100%" height="100%" '
            f'fill="{PAGE}"/>\n{body}\n</svg>\n')


def png(shapes: Sequence[Shape], width: float, height: float) -> bytes:
    """The drawing as PNG, two pixels to a unit. DlbcError when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise DlbcError("a PNG is drawn with matplotlib, which is not installed", where="draw()",
                        hint="pip install 'dlbc[plots]', or write .svg or .html") from problem
    from matplotlib.patches import FancyBboxPatch, PathPatch
    from matplotlib.path import Path

    figure = Figure(figsize=(width / 72, height / 72), dpi=144, facecolor=PAGE)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    for order, one in enumerate(sorted(shapes, key=_layer)):
        match one:
            case Box():
                fill, stroke = _box_colours(one)
                style = f"round,pad=0,rounding_size={min(one.radius, one.width / 2, one.height / 2):.2f}"
                axes.add_patch(FancyBboxPatch((one.x, one.y), one.width, one.height, boxstyle=style, facecolor=fill,
                                              edgecolor=stroke, linewidth=1.0 if stroke != "none" else 0.0,
                                              zorder=order))
            case Line():
                points, codes = [one.points[0]], [int(Path.MOVETO)]
                for before, after in zip(one.points, one.points[1:], strict=False):
                    points += _bend(before, after)
                    codes += [int(Path.CURVE4)] * 3
                axes.add_patch(PathPatch(Path(points, codes), facecolor="none", edgecolor=_line_colour(one),
                                         linewidth=one.width, alpha=0.75, capstyle="butt", zorder=order))
            case Label():
                place = {"start": "left", "middle": "center", "end": "right"}[one.anchor]
                axes.text(one.x, one.y, one.text.replace("$", r"\$"), size=one.size * 0.94, ha=place, va="baseline",
                          color=ROLES[one.role], weight="bold" if one.bold else "normal", rotation=-one.turned,
                          rotation_mode="anchor", zorder=order)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=PAGE)
    return buffer.getvalue()


def _layer(shape: Shape) -> int:
    """Groups lie below edges, edges below nodes, text above all."""
    match shape:
        case Box(kind="group" | "row"):
            return 0
        case Line():
            return 1
        case Box():
            return 2
        case Label():
            return 3


def _svg(shape: Shape, alone: bool) -> str:
    match shape:
        case Box():
            fill, stroke = _box_colours(shape)
            classes, style = _scaled(shape.kind, shape.strength)
            opens = (f' data-open="{html.escape(shape.opens)}" tabindex="0" role="button" '
                     f'aria-label="open {html.escape(shape.opens)}"' if shape.opens else "")
            return (f'<rect x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" height="{shape.height:.1f}" '
                    f'rx="{shape.radius:g}" fill="{fill}" stroke="{stroke}" class="{classes}"{style}{opens}'
                    + (f">{_title(shape.says)}</rect>" if alone else f"{_says(shape.says)}/>"))
        case Line():
            path = f"M{shape.points[0][0]:.1f} {shape.points[0][1]:.1f}" + "".join(
                "C" + " ".join(f"{x:.1f} {y:.1f}" for x, y in _bend(before, after))
                for before, after in zip(shape.points, shape.points[1:], strict=False))
            classes, style = _scaled("edge", shape.strength)
            return (f'<path d="{path}" fill="none" stroke="{_line_colour(shape)}" stroke-width="{shape.width:.1f}" '
                    f'stroke-opacity=".75" class="{classes}"{style}'
                    + (f">{_title(shape.says)}</path>" if alone else f"{_says(shape.says)}/>"))
        case Label():
            turned = f' transform="rotate({shape.turned:g} {shape.x:.1f} {shape.y:.1f})"' if shape.turned else ""
            weight = ' font-weight="600"' if shape.bold else ""
            anchor = f' text-anchor="{shape.anchor}"' if shape.anchor != "start" else ""
            return (f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size:g}" fill="{ROLES[shape.role]}" '
                    f'class="{shape.role}"{anchor}{weight}{turned}>{html.escape(shape.text)}</text>')


def _says(says: tuple[str, str]) -> str:
    value, place = map(html.escape, says)
    return f' data-v="{value}" data-d="{place}"' if value or place else ""


def _title(says: tuple[str, str]) -> str:
    """What a viewer shows when the pointer rests."""
    text = ": ".join(one for one in reversed(says) if one)
    return f"<title>{html.escape(text)}</title>" if text else ""


def _bend(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    middle = (start[1] + end[1]) / 2
    return [(start[0], middle), (end[0], middle), end]


def _scaled(kind: str, strength: float | None) -> tuple[str, str]:
    """Class names and the style that carries the strength."""
    if strength is None:
        return kind, ""
    return f"{kind} {'f' if strength > 0 else 'a'}", f' style="--t:{abs(strength):.3f}"'


def _box_colours(box: Box) -> tuple[str, str]:
    if box.kind in ("group", "row"):
        return (CARD, LINE) if box.kind == "group" else ("none", "none")
    scale = colour.HEAT if box.kind == "cell" else colour.LIGHT
    fill = CARD if box.strength is None else scale.hex(box.strength)
    return fill, "none" if box.kind == "cell" else LINE


def _line_colour(line: Line) -> str:
    if line.strength is None:
        return "#b9bbbf"
    return colour.HEAT.hex(0.55 if line.strength > 0 else -0.55)
