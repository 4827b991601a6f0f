"""An explanation on the terminal: tokens in colour, bars to the left and right, a small heat map."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.color import Color
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text as Line

from dlbc_runtime.arrays import Array
from dlbc_runtime.explanation import Explanation, Order, strongest
from dlbc_runtime.views import colour
from dlbc_runtime.views.numbers import number, percent, signed
from dlbc_runtime.views.panels import CONTRASTIVE, Card, Features, Panel, Picture, Text, cards, total
from dlbc_runtime.views.png import resized
from dlbc_runtime.views.tokens import visible

BAR = 18  # columns on each side of zero
LISTED = 8  # bars below a text
FEATURES = 24  # bars of a table
THUMBNAIL = 36  # columns of a heat map
NUMBERS = 29  # columns of the numbers beside it
WEAK = 0.03  # below this strength a token keeps the terminal's own colours

Theme = Literal["auto", "light", "dark"]


def show(explanation: Explanation, *, theme: Theme = "auto", rows: int = 8) -> None:
    """Display in a notebook, otherwise print: the one place of dlbc that does, because the user asks."""
    if not shown_in_notebook(explanation):
        Console().print(render(explanation, theme=theme, rows=rows))


def render(explanation: Explanation, *, theme: Theme = "auto", rows: int = 8, listed: int | None = None
           ) -> RenderableType:
    """What `show` prints: at most `rows` batch rows, each for all its targets; `listed` bars below each."""
    dark = theme == "dark" or (theme == "auto" and dark_terminal())
    scale = colour.DARK if dark else colour.LIGHT
    parts: list[RenderableType] = []
    for card in cards(explanation):
        if card.row >= rows:
            break
        parts += [_heading(explanation, card), Line()]
        for panel in card.panels:
            several = len(card.panels) > 1
            parts += [Line(f"  {panel.input}", style="bold")] if several else []
            parts += [Padding(part, (0, 0, 0, 2)) for part in _panel(panel, scale, listed)] + [Line()]
    hidden = explanation.rows - rows
    if hidden > 0:
        parts.append(Line(f"… {hidden} more {'row' if hidden == 1 else 'rows'}", style="dim"))
    return Group(*parts) if parts else Line("nothing was explained", style="dim")


def _heading(explanation: Explanation, card: Card) -> Line:
    line = Line()
    if explanation.rows > 1:
        line.append(f"row {card.row}  ", style="dim")
    line.append("explains: ", style="dim")
    if card.explained is None:
        line.append("the output")
    else:
        name = card.explained.name
        line.append(name, style="bold").append(str(card.explained)[len(name):])
    line.append(f", rules {explanation.rules}" if explanation.rules else "", style="dim")
    compared = explanation.method.reference
    line.append(f", compared with reference {compared}" if compared else "", style="dim")
    return line.append(f": {CONTRASTIVE}" if explanation.contrastive else "", style="dim")


def _panel(panel: Panel, scale: colour.Scale, listed: int | None) -> Iterable[RenderableType]:
    match panel:
        case Text():
            yield _tokens(panel, scale)
            yield Line()
            yield _legend(panel, scale)
            if panel.apart:
                yield Line(panel.apart, style="dim")
            yield Line()
            places = strongest(panel.relevance, LISTED if listed is None else listed, "absolute")
            yield _bars([(f"{visible(panel.tokens[place])}", str(place), float(panel.relevance[place]))
                         for place in places], panel.limit)
        case Features():
            places = strongest(panel.relevance, FEATURES if listed is None else listed, "absolute")
            values = panel.values
            yield _bars([(panel.names[place], "" if values is None else number(values[place]),
                          float(panel.relevance[place])) for place in places], panel.limit)
            rest = len(panel.names) - len(places)
            if rest:
                yield Line(f"… {rest} more, all weaker", style="dim")
            yield Line()
            yield _legend(panel, scale)
        case Picture():
            heat = colour.HEAT_DARK if scale is colour.DARK else colour.HEAT
            yield _Fitted(panel, heat)
            yield Line()
            yield _legend(panel, heat)


def _tokens(panel: Text, scale: colour.Scale) -> Line:
    line = Line()
    strength = colour.strengths(panel.relevance, panel.limit)
    for place in panel.shown:
        token = panel.tokens[place]
        if token.space and line.plain and not line.plain.endswith("\n"):
            line.append(" ")
        style = _on(scale, strength[place])
        if place == panel.position:
            style += Style(underline=True, bold=True)
        line.append(visible(token) if token.breaks or not token.text else token.text, style=style)
        line.append("\n" * token.breaks)
    hidden = len(panel.tokens) - len(panel.shown)
    if hidden:
        line.append(f"  ({hidden} masked not shown)", style="dim")
    return line


def _legend(panel: Panel, scale: colour.Scale) -> Line:
    """The scale with its ends, and the sum."""
    line = Line().append(f"{signed(-panel.limit)} against ", style="dim")
    for step in range(-8, 9):
        line.append(" ", style=Style(bgcolor=Color.from_rgb(*scale.colour(step / 8))))
    line.append(f" for {signed(panel.limit)}", style="dim")
    line.append(f"   sum {signed(total(panel))}", style="dim")
    lost = int(np.size(panel.relevance) - np.isfinite(panel.relevance).sum())
    return line.append(f"   {lost} not finite", style="bold red") if lost else line


def _bars(rows: list[tuple[str, str, float]], limit: float) -> Table:
    """Names, values, and bars that grow from a middle line: against to the left, for to the right."""
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column(justify="right", max_width=32, overflow="ellipsis", no_wrap=True)
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(width=2 * BAR + 1, no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, value, relevance in rows:
        table.add_row(Line(name), Line(value), _bar(relevance, limit), Line(signed(relevance)))
    return table


def _bar(relevance: float, limit: float) -> Line:
    length = abs(float(colour.strengths(np.array([relevance]), limit)[0])) * BAR
    whole, part = int(length), int((length - int(length)) * 8)
    style = Style(color=Color.from_rgb(*colour.HEAT_DARK.colour(1.0 if relevance > 0 else -1.0)))
    if relevance > 0:
        fine = "▏▎▍▌▋▊▉"[part - 1] if part else ""
        return Line(" " * BAR).append("│", style="dim").append("█" * whole + fine, style=style)
    half = "▐" if part >= 4 else ""  # there are no finer blocks that grow from the right
    return Line().append((half + "█" * whole).rjust(BAR), style=style).append("│", style="dim")


@dataclass(frozen=True)
class _Fitted:
    """A picture drawn as wide as the terminal allows."""

    panel: Picture
    scale: colour.Scale

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        pictures = 1 if self.panel.pixels is None else 2
        yield _picture(self.panel, self.scale, (options.max_width - NUMBERS) // pictures - 2)


def _picture(panel: Picture, scale: colour.Scale, room: int) -> Table:
    """The image and its heat map in half blocks, two pixels to a character, with the main numbers beside."""
    height, width = panel.relevance.shape
    columns = max(8, min(THUMBNAIL, width, room))
    lines = max(1, round(columns * height / width / 2))
    finite = np.nan_to_num(panel.relevance)
    small = resized(finite, 2 * lines, columns)
    strength = colour.strengths(small, colour.limit(small, 0.99))
    heat = np.array([[scale.colour(float(one)) for one in row] for row in strength])
    pictures = [_half_blocks(heat)]
    if panel.pixels is not None:
        pictures.insert(0, _half_blocks(resized(panel.pixels, 2 * lines, columns)))
    amount = np.abs(finite).sum()
    numbers = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    numbers.add_column(style="dim")
    numbers.add_column(justify="right")
    for name, value in (("for", signed(float(finite[finite > 0].sum()))),
                        ("against", signed(float(finite[finite < 0].sum())))):
        numbers.add_row(name, value)
    ends: tuple[tuple[str, Order], ...] = (("peak", "positive"), ("low", "negative"))
    for name, order in ends:
        for place in strongest(finite.ravel(), 1, order):
            row, column = divmod(place, width)
            numbers.add_row(f"{name} at {row}, {column}", signed(float(finite[row, column])))
    if amount:
        largest = np.sort(np.abs(finite).ravel())[::-1]
        share = largest[:max(1, round(largest.size / 20))].sum() / amount
        numbers.add_row("held by the top 5 %", percent(float(share)))
    table = Table.grid(padding=(0, 2))
    table.add_row(*pictures, numbers)
    return table


def _half_blocks(pixels: Array) -> Line:
    """RGB [2 n, W, 3] as n lines of `▀`, its colour the upper pixel and its background the lower."""
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        line = Line(no_wrap=True)
        for top, bottom in zip(upper, lower, strict=True):
            line.append("▀", style=Style(color=_colour(top), bgcolor=_colour(bottom)))
        lines.append(line)
    return Line("\n").join(lines)


def _colour(pixel: Array) -> Color:
    return Color.from_rgb(*(int(channel) for channel in pixel))


def _on(scale: colour.Scale, strength: float) -> Style:
    if abs(strength) < WEAK:
        return Style()
    return Style(color=Color.from_rgb(*scale.ink), bgcolor=Color.from_rgb(*scale.colour(float(strength))))


def dark_terminal() -> bool:
    """Some terminals say what is behind the text ("15;0": white on black); most are dark."""
    behind = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    return behind not in ("7", "15")


def shown_in_notebook(explanation: object) -> bool:
    """Display it if this is a notebook, which has IPython loaded and a kernel running."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    if getattr(shell, "kernel", None) is None:
        return False
    importlib.import_module("IPython.display").display(explanation)
    return True
