"""An explanation as a picture: heat map beside the image, tokens in colour, bars. Needs matplotlib."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from dlbc_runtime.arrays import Array
from dlbc_runtime.errors import DlbcError
from dlbc_runtime.explanation import Explanation, strongest
from dlbc_runtime.views import colour
from dlbc_runtime.views.numbers import number, signed
from dlbc_runtime.views.panels import Features, Panel, Picture, Text, cards, total
from dlbc_runtime.views.tokens import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure, SubFigure

WIDTH = 9.0  # inches
CARDS = 8
BARS = 20
SOFT = "#5f636b"


def draw(explanation: Explanation, *, dpi: int = 150) -> bytes:
    """PNG of the first rows. Raises DlbcError when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DlbcError("a PNG is drawn with matplotlib, which is not installed", where="explanation.save",
                        hint="pip install 'dlbc[plots]', or save as .html, which needs nothing more") from error
    shown = [(card, panel) for card in cards(explanation) for panel in card.panels][:CARDS]
    heights = [_height(panel) for _, panel in shown] or [1.0]
    figure = Figure(figsize=(WIDTH, sum(heights)), facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.14)  # inches
    parts = np.atleast_1d(np.asarray(figure.subfigures(len(heights), 1, height_ratios=heights)))
    for part, (card, panel) in zip(parts, shown, strict=False):
        about = str(card.explained) if card.explained is not None else "the output"
        row = f"row {card.row} · " if explanation.rows > 1 else ""
        rules = f" · {explanation.rules}" if explanation.rules else ""
        rules += f" · reference {explanation.method.reference}" if explanation.method.reference else ""
        name = f" · {panel.input}" if len(card.panels) > 1 else ""
        lost = int(panel.relevance.size - np.isfinite(panel.relevance).sum())
        wrong = f" · {lost} not finite" if lost else ""
        part.suptitle(_literal(row + about + rules + name + wrong), x=0.016, ha="left", fontsize=12, fontweight="bold")
        _draw(part, panel)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()


def _height(panel: Panel) -> float:
    """Inches."""
    match panel:
        case Text():
            return 1.1 + 0.32 * len(_lines(panel))
        case Features():
            return 1.2 + 0.24 * min(BARS, len(panel.names))
        case Picture():
            height, width = panel.relevance.shape
            columns = 2.3 if panel.pixels is None else 3.4
            return min(8.0, 0.9 + WIDTH / columns * float(height) / float(width))


def _draw(part: SubFigure | Figure, panel: Panel) -> None:
    match panel:
        case Text():
            _draw_text(part.add_subplot(), panel)
        case Features():
            _draw_bars(part.add_subplot(), panel)
        case Picture():
            _draw_picture(part, panel)


def _lines(panel: Text, columns: int = 92) -> list[list[tuple[int, str]]]:
    """Tokens in lines of at most `columns` characters."""
    lines: list[list[tuple[int, str]]] = [[]]
    used = 0
    for place in panel.shown:
        token = panel.tokens[place]
        text = (" " if token.space and used else "") + visible(token)
        if used and used + len(text) > columns:
            lines.append([])
            used, text = 0, text.lstrip(" ")
        lines[-1].append((place, text))
        used += len(text)
        if token.breaks:
            lines.append([])
            used = 0
    return [line for line in lines if line] or [[]]


def _draw_text(axes: Axes, panel: Text) -> None:
    """Tokens on a grid of equal characters, so that no text needs to be measured."""
    from matplotlib.patches import Rectangle

    columns, lines = 96, _lines(panel)
    strength = colour.strengths(panel.relevance, panel.limit)
    axes.set(xlim=(0, columns), ylim=(len(lines) + 0.9, -0.2))
    axes.axis("off")
    for y, line in enumerate(lines):
        x = 0
        for place, text in line:
            bare = text.lstrip(" ")
            x += len(text) - len(bare)
            axes.add_patch(Rectangle((x - 0.1, y + 0.08), len(bare) + 0.2, 0.84, linewidth=0,
                                     facecolor=colour.LIGHT.hex(float(strength[place]))))
            for offset, character in enumerate(bare):
                axes.text(x + offset + 0.5, y + 0.5, _literal(character), family="monospace", fontsize=11,
                          ha="center", va="center_baseline")
            if place == panel.position:
                axes.plot([x, x + len(bare)], [y + 0.94, y + 0.94], color="black", linewidth=1.4)
            x += len(bare)
    axes.text(0, len(lines) + 0.6, f"{signed(-panel.limit)} against … for {signed(panel.limit)}    "
              f"sum {signed(total(panel))}", fontsize=9, color=SOFT, va="center")


def _draw_bars(axes: Axes, panel: Features) -> None:
    places = strongest(panel.relevance, BARS, "absolute")
    relevance = [float(panel.relevance[place]) for place in places]
    names = [panel.names[place] if panel.values is None
             else f"{panel.names[place]} = {number(panel.values[place])}" for place in places]
    axes.barh(range(len(places)), relevance, height=0.68,
              color=[colour.HEAT.hex(1.0 if one > 0 else -1.0) for one in relevance])
    axes.set_yticks(range(len(places)), [_literal(name) for name in names], fontsize=9)
    axes.invert_yaxis()
    full = panel.limit or 1.0
    axes.set_xlim(-1.22 * full, 1.22 * full)
    axes.axvline(0, color="#c9c9c4", linewidth=0.8)
    for y, one in enumerate(relevance):
        axes.annotate(signed(one), (one, y), xytext=(4 if one > 0 else -4, 0), textcoords="offset points",
                      ha="left" if one > 0 else "right", va="center", fontsize=8, color=SOFT)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_picture(part: SubFigure | Figure, panel: Picture) -> None:
    """Image, heat map, and the heat map over the image."""
    height, width = panel.relevance.shape
    place = (-0.5, width - 0.5, height - 0.5, -0.5)
    full = panel.limit or 1.0
    several = panel.pixels is not None
    axes = np.atleast_1d(np.asarray(part.subplots(1, 3 if several else 1)))
    heat = axes[1 if several else 0].imshow(panel.relevance, cmap=_colormap(), vmin=-full, vmax=full, extent=place)
    if panel.pixels is not None:
        axes[0].imshow(panel.pixels, extent=place)
        axes[2].imshow(panel.pixels.mean(axis=2), cmap="gray", vmin=0, vmax=255, extent=place)
        axes[2].imshow(_overlay(panel.relevance, full), extent=place)
    for one, title in zip(axes, ("input", "relevance", "overlay") if several else ("relevance",), strict=True):
        one.set_title(title, fontsize=10, color=SOFT)
        one.axis("off")
    bar = part.colorbar(heat, ax=list(axes), shrink=0.72, aspect=26, pad=0.01)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2)


def _overlay(relevance: Array, full: float) -> Array:
    """RGBA in 0..1: the colour of the sign, the weaker the more transparent."""
    strength = colour.strengths(relevance, full)
    ends = np.array([colour.HEAT.colour(-1.0), colour.HEAT.colour(1.0)]) / 255
    return np.concatenate([ends[(strength > 0).astype(int)], 0.85 * np.abs(strength)[..., None]], axis=-1)


def _colormap() -> LinearSegmentedColormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("dlbc", [colour.HEAT.hex(step / 16) for step in range(-16, 17)])


def _literal(text: str) -> str:
    """`text` with matplotlib's markup for formulas made harmless."""
    return text.replace("$", r"\$")
