"""Experts on the terminal: a line for each layer, with its map, its strongest experts, and how even the routing is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.color import Color
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text as Line

from dlbc_runtime.expert_layer import ExpertLayer
from dlbc_runtime.experts import Experts
from dlbc_runtime.views import colour
from dlbc_runtime.views.experts import described, short_names
from dlbc_runtime.views.numbers import percent, signed
from dlbc_runtime.views.terminal import dark_terminal, shown_in_notebook

NARROW = 62  # columns of the terminal that the other columns of the table take
WIDEST = 64  # columns of a map
STRONGEST = 3  # experts named for each layer


def show(experts: Experts, *, row: int = 0, seed: int = 0, limit: int = 24) -> None:
    """Display in a notebook, otherwise print: because the user asks."""
    if not shown_in_notebook(experts):
        Console().print(table(experts, row=row, seed=seed, limit=limit))


def table(experts: Experts, *, row: int = 0, seed: int = 0, limit: int = 24) -> RenderableType:
    """What `show` prints: the layers with most relevance, at most `limit`, in the order of the model."""
    of_row = experts.of_row(row, seed)
    heading = Line("experts: ", style="bold").append(described(experts), style="not bold")
    if of_row.target:
        heading.append(f"; explains {of_row.target[0]}", style="dim")
    return Group(heading, Line(), _Fitted(of_row, limit))


@dataclass(frozen=True)
class _Fitted:
    """The table, its maps as wide as the terminal allows."""

    experts: Experts
    limit: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _lines(self.experts, self.limit, options.max_width if console.color_system else 0)


def _lines(experts: Experts, limit: int, width: int) -> RenderResult:
    """The table in a terminal of that width; 0 for one without colours, in which a map says nothing."""
    layers = experts.layers
    names = short_names(list(experts))
    sizes = [abs(float(layer.entering)) for layer in layers]
    kept = sorted(sorted(range(len(layers)), key=lambda place: -sizes[place])[:max(limit, 0)])
    found = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    shared = any(layer.spec.shared for layer in layers)
    room = min(WIDEST, width - NARROW - max(map(len, names), default=0) - (10 if shared else 0))
    found.add_column("layer", no_wrap=True)
    if room >= 8:
        found.add_column("relevance over frequency", no_wrap=True)
    for heading in ("relevance", *(("shared",) if shared else ())):
        found.add_column(heading, justify="right", no_wrap=True)
    found.add_column("strongest experts", overflow="fold")
    found.add_column("busiest", justify="right", no_wrap=True)
    found.add_column("evenness", justify="right", no_wrap=True)
    most = max((colour.limit(layer.totals) for layer in layers), default=0.0)
    load = max((float(layer.load.max(initial=0.0)) for layer in layers), default=0.0)
    for place in kept:
        layer = layers[place]
        top = ", ".join(f"#{expert} {signed(total)}" for expert, total in layer.top(STRONGEST))
        busy = int(layer.load.argmax()) if layer.counts.any() else None
        found.add_row(Line(names[place]), *([_map(layer, most, load, room)] if room >= 8 else []),
                      Line(signed(float(layer.entering)), style="bold"),
                      *([Line(signed(float(layer.shared_total)) if layer.spec.shared else "")] if shared else []),
                      Line(top or "none has relevance", style="" if top else "dim"),
                      Line("" if busy is None else f"#{busy} {percent(float(layer.load[busy]))}", style="dim"),
                      Line(f"{layer.normalised_entropy:.2f}", style="dim"))
    yield found
    hidden = len(layers) - len(kept)
    if hidden:
        yield Line(f"… {hidden} more {'layer' if hidden == 1 else 'layers'}, with less relevance", style="dim")


def _map(layer: ExpertLayer, most: float, load: float, room: int) -> Line:
    """A column for each expert, its relevance above and how often it was routed to below; of more experts than there
    is room for the strongest of neighbours, and the mean of how often."""
    each = -(-layer.experts // room)
    scale, grey = (colour.HEAT_DARK, 0.75) if dark_terminal() else (colour.HEAT, 0.35)
    columns = 1 if each > 1 or 2 * layer.experts > room else 2
    line = Line(no_wrap=True)
    for start in range(0, layer.experts, each):
        totals, loads = layer.totals[start:start + each], layer.load[start:start + each]
        strongest = float(totals[np.abs(totals).argmax()])
        upper = scale.colour(float(colour.strengths(np.array([strongest]), most)[0]))
        share = float(loads.mean()) / load if load else 0.0
        lower = colour.rgb(scale.neutral + (grey - scale.neutral) * share, 0.0, 0.0)
        line.append("▀" * columns, style=Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower)))
    return line
