"""An explanation as one HTML page that needs nothing else: no network, no fonts, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlbc_runtime.arrays import Array
from dlbc_runtime.explained import Explained
from dlbc_runtime.explanation import Explanation, strongest
from dlbc_runtime.ledger import Ledger
from dlbc_runtime.views import colour, experts
from dlbc_runtime.views.experts import ExpertsView
from dlbc_runtime.views.numbers import number, percent, seconds, signed
from dlbc_runtime.views.page import framed, packed, rendered
from dlbc_runtime.views.panels import CONTRASTIVE, Card, Features, Panel, Picture, Text, cards
from dlbc_runtime.views.png import data_uri, encode, heat_map, resized, shades
from dlbc_runtime.views.tokens import visible

CARDS = 64  # rows and targets on one page
BARS_FIRST, BARS_ALL = 12, 120  # bars in sight, and with those behind "show more"
LEDGER_ROWS = 200
PIXELS = 512  # the longer side of a picture on the page


def report(explanations: Sequence[Explanation], title: str, path: str | Path) -> Path:
    """Write one page with several explanations side by side, as to compare presets; returns its path."""
    from dlbc_runtime.explanation_file import write_whole

    write_whole(Path(path), page(explanations, title).encode("utf-8"))
    return Path(path)


def page(explanations: Sequence[Explanation], title: str = "") -> str:
    """The page as text."""
    name = title or next((one.method.model for one in explanations if one.method.model), "") or "Explanation"
    routed = any(one.experts for one in explanations)
    return rendered("explanation.html.jinja", name, ("explanation.css", *(experts.STYLES if routed else ())),
                    ("explanation.js", *(experts.SCRIPTS if routed else ())),
                    columns=[_column(explanation, place, name, several=len(explanations) > 1)
                             for place, explanation in enumerate(explanations)])


def notebook(explanation: Explanation) -> str:
    """The page in a frame of its own."""
    shown = min(explanation.rows * explanation.seeds, CARDS)
    return framed(page([explanation]), "explanation", min(960, 200 + 640 * shown))


@dataclass(frozen=True)
class Bar:
    """A row of a bar list: `strength` in [-1, 1]; `value` is the feature's, or the token's position; `key` links
    it to its token."""

    name: str
    value: str
    relevance: str
    detail: str
    strength: float
    key: str


@dataclass(frozen=True)
class Word:
    """A token in the text."""

    text: str
    label: str
    space: bool
    breaks: int
    relevance: str
    detail: str
    strength: float
    key: str
    here: bool


@dataclass(frozen=True)
class Legend:
    """The colour scale of a panel and what it adds up to."""

    limit: str
    low: str
    total: str
    lost: int
    clipped: bool


@dataclass(frozen=True)
class View:
    """A panel ready for the template; `kind` is text, features or picture."""

    kind: str
    input: str
    legend: Legend
    words: tuple[Word, ...] = ()
    masked: int = 0
    apart: str = ""
    bars: tuple[Bar, ...] = ()
    more_bars: tuple[Bar, ...] = ()
    beyond: int = 0
    original: str = ""
    heat: str = ""
    shades: str = ""
    full: float = 0.0
    height: int = 0
    width: int = 0


@dataclass(frozen=True)
class CardView:
    """A card ready for the template."""

    row: int
    several_rows: bool
    name: str
    value: str
    probability: float | None
    likely: str
    position: int | None
    panels: tuple[View, ...]


@dataclass(frozen=True)
class Share:
    """A part of the seed: at an input, or absorbed by a cause; `width` in percent of all parts."""

    name: str
    amount: str
    width: float
    absorbed: bool
    negative: bool
    shade: int


@dataclass(frozen=True)
class LedgerView:
    """The conservation table ready for the template: the largest absorbers first, and the sum of all."""

    seed: str
    closes: bool
    residual: str
    shares: tuple[Share, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    total: tuple[str, ...]
    hidden: int


@dataclass(frozen=True)
class Column:
    """One explanation ready for the template."""

    place: int
    heading: str
    facts: tuple[tuple[str, str], ...]
    cards: tuple[CardView, ...]
    hidden: int
    experts: ExpertsView | None
    ledger: LedgerView | None


def _column(explanation: Explanation, place: int, title: str, several: bool) -> Column:
    method = explanation.method
    facts = [("model", method.model)] if method.model != title else []
    facts += [] if several else [("rules", explanation.rules)]  # which are the heading of a column
    facts += [("shown", CONTRASTIVE)] if explanation.contrastive else []
    facts += [("compared with reference", method.reference), ("backend", method.backend)]
    facts += [("seed × ", f"{method.multiplier:g}")] if method.multiplier != 1 else []
    facts += [("relevance × ", f"{method.scaler:g}")] if method.scaler != 1 else []
    facts += [(stage, seconds(time)) for stage, time in method.seconds.items()]
    facts += list(method.versions.items())
    shown = [card for _, card in zip(range(CARDS), cards(explanation), strict=False)]
    return Column(place, explanation.rules or f"explanation {place + 1}",
                  tuple((name, text) for name, text in facts if text),
                  tuple(_card(explanation, card) for card in shown),
                  explanation.rows * explanation.seeds - len(shown),
                  experts.view(explanation.experts) if explanation.experts else None,
                  None if explanation.ledger is None else _ledger(explanation.ledger))


def _card(explanation: Explanation, card: Card) -> CardView:
    about = card.explained or Explained(card.row, card.seed)
    return CardView(
        row=card.row, several_rows=explanation.rows > 1, name=about.plain_name,
        value="" if about.value is None else number(about.value), probability=about.probability,
        likely="" if about.probability is None else percent(about.probability), position=about.position,
        panels=tuple(_view(panel, f"{card.row}.{card.seed}.{place}") for place, panel in enumerate(card.panels)))


def _view(panel: Panel, key: str) -> View:
    match panel:
        case Text():
            bars = _bars(panel, [visible(token) for token in panel.tokens], None, key)
            return View("text", panel.input, _legend(panel.relevance, panel.relevance, panel.limit),
                        words=_words(panel, key), masked=len(panel.tokens) - len(panel.shown), apart=panel.apart,
                        bars=bars[:BARS_FIRST], more_bars=bars[BARS_FIRST:],
                        beyond=len(strongest(panel.relevance, len(panel.tokens), "absolute")) - len(bars))
        case Features():
            first = 40 if len(panel.names) <= 40 else 30
            bars = _bars(panel, list(panel.names), panel.values, key)
            return View("features", panel.input, _legend(panel.relevance, panel.relevance, panel.limit),
                        bars=bars[:first], more_bars=bars[first:], beyond=len(panel.names) - len(bars))
        case Picture():
            # Made smaller for the page, a map has another scale: means of pixels are smaller than the largest.
            seen = _fitted(panel.relevance)
            full = colour.image_limit(seen)
            original = "" if panel.pixels is None else data_uri(
                encode(np.rint(_fitted(panel.pixels)).astype(np.uint8)))
            return View("picture", panel.input, _legend(panel.relevance, seen, full), original=original,
                        heat=data_uri(heat_map(seen, full)), full=full, height=seen.shape[0], width=seen.shape[1],
                        shades=packed(shades(seen, full).tobytes()))


def _legend(relevance: Array, seen: Array, full: float) -> Legend:
    finite = np.isfinite(relevance)
    return Legend(limit=signed(full), low=signed(-full), total=signed(float(relevance[finite].sum())),
                  lost=int(finite.size - finite.sum()), clipped=colour.limit(seen) > full)


def _words(panel: Text, key: str) -> tuple[Word, ...]:
    strength, detail = colour.strengths(panel.relevance, panel.limit), _details(panel.relevance)
    return tuple(
        Word(text=token.text, label=visible(token), space=token.space, breaks=token.breaks,
             relevance=signed(float(panel.relevance[place])), detail=f"position {place}{detail[place]}",
             strength=round(float(strength[place]), 3), key=f"{key}.{place}", here=place == panel.position)
        for place, token in ((place, panel.tokens[place]) for place in panel.shown))


def _bars(panel: Text | Features, names: list[str], values: Array | None, key: str) -> tuple[Bar, ...]:
    """The strongest first; features without relevance stand last, tokens without are left out."""
    places = strongest(panel.relevance, len(names), "absolute")
    if isinstance(panel, Features):
        places += [place for place in range(len(names)) if place not in set(places)]
    strength, detail = colour.strengths(panel.relevance, panel.limit), _details(panel.relevance)
    text = isinstance(panel, Text)
    return tuple(
        Bar(name=names[place], value=str(place) if text else "" if values is None else number(values[place]),
            relevance=signed(float(panel.relevance[place])),
            detail=(f"position {place}" if text else names[place]) + detail[place],
            strength=round(float(strength[place]), 3), key=f"{key}.{place}")
        for place in places[:BARS_ALL])


def _details(relevance: Array) -> list[str]:
    """For each element its share of all |relevance|, as words."""
    sizes = np.abs(np.nan_to_num(relevance, posinf=0.0, neginf=0.0))
    total = float(sizes.sum())
    return [f", {percent(float(size) / total)} of all" if total else "" for size in sizes]


def _fitted(image: Array) -> Array:
    """The image itself, or made smaller for the page: its longer side at most `PIXELS`."""
    height, width = image.shape[:2]
    ratio = PIXELS / max(height, width)
    if ratio >= 1:
        return image
    return resized(np.nan_to_num(image), max(1, round(height * ratio)), max(1, round(width * ratio)))


def _ledger(ledger: Ledger) -> LedgerView:
    parts = [(f"at {name}", amount, False) for name, amount in ledger.inputs.items()]
    parts += [(cause, amount, True) for cause, amount in ledger.absorbed.items()]
    total = sum(abs(amount) for _, amount, _ in parts if np.isfinite(amount)) or 1.0
    causes = tuple(ledger.absorbed)
    rows = tuple((row.place, row.op, row.rule, number(row.incoming), number(row.outgoing),
                  *(number(row.absorbed[cause]) if cause in row.absorbed else "" for cause in causes),
                  _left(row.residual, ledger.size)) for row in ledger.by_absorbed()[:LEDGER_ROWS])
    summed = ("sum", "", "", number(ledger.seed), number(ledger.at_inputs),
              *(number(ledger.absorbed[cause]) for cause in causes), _left(ledger.residual, ledger.size))
    shades: dict[bool, int] = {False: 0, True: 0}
    shares = []
    for name, amount, absorbed in parts:
        width = 100 * abs(amount) / total if np.isfinite(amount) else 0.0
        shares.append(Share(name, number(amount), round(width, 2), absorbed, amount < 0, shades[absorbed] % 5))
        shades[absorbed] += 1
    columns = ("place", "operation", "rule", "in", "out", *causes, "residual")
    return LedgerView(number(ledger.seed), ledger.closes(), number(ledger.residual), tuple(shares), columns, rows,
                      summed, max(0, len(ledger.rows) - LEDGER_ROWS))


def _left(residual: float, size: float) -> str:
    """What an operation leaves unaccounted for; nothing where it is below what float32 resolves."""
    return "" if abs(residual) <= 1e-7 * size else f"{residual:.1e}"
