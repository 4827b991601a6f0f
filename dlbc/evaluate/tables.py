"""A report as a table for the terminal."""

from __future__ import annotations

import math

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dlbc.evaluate.report import Report, Result

SIDE = ("aopc", "deletion", "insertion", "randomised |map|")
"""Metrics that are shown when asked for: they say little beside the others."""

SHORT = {"comprehensiveness": "compreh.", "sufficiency": "suffic."}
"""Headings, where the name of a metric is long: a table should fit a terminal."""

ARROWS = {"higher": "↑", "lower": "↓", "neither": ""}


def table(report: Report, metrics: tuple[str, ...]) -> Table:
    """Rows are methods (of each data set), columns metrics (with each fill), cells mean ± standard error over items.

    The arrow says which way is better; the best method of a column stands out; controls are dim.
    """
    shown = [one for one in report.results if one.metric in metrics]
    columns = list(dict.fromkeys((one.metric, one.how, one.better) for metric in metrics for one in shown
                                 if one.metric == metric))
    several = {metric for metric, *_ in columns if sum(metric == other for other, *_ in columns) > 1}
    data = list(dict.fromkeys(one.data for one in shown))
    counts = sorted({len(one.values) for one in shown})
    found = Table(box=SIMPLE_HEAD, caption=_caption(shown, counts), caption_justify="left", pad_edge=False)
    if len(data) > 1:
        found.add_column("data")
    found.add_column("method" if len(data) > 1 or not "".join(data) else data[0], no_wrap=True)
    for metric, how, better in columns:
        heading = f"{SHORT.get(metric, metric)} {ARROWS[better]}"
        found.add_column(f"{heading} ({how})" if metric in several else heading, justify="right")
    for name in data:
        for method, control in dict.fromkeys((one.method, one.control) for one in shown if one.data == name):
            cells = [_cell(_find(shown, name, method, *column[:2]), _best(shown, name, *column)) for column in columns]
            first = [Text(name)] if len(data) > 1 else []
            found.add_row(*first, Text(method), *cells, style="dim" if control else None)
        found.add_section()
    return found


def _caption(shown: list[Result], counts: list[int]) -> str:
    items = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else "no"
    hows = "; ".join(dict.fromkeys(one.how for one in shown if one.how))
    return f"{items} item{'s' * (counts != [1])}, mean ± standard error{f'; {hows}' if hows else ''}"


def _find(shown: list[Result], data: str, method: str, metric: str, how: str) -> Result | None:
    return next((one for one in shown if (one.data, one.method, one.metric, one.how) == (data, method, metric, how)),
                None)


def _best(shown: list[Result], data: str, metric: str, how: str, better: str) -> float:
    means = [one.mean for one in shown if (one.data, one.metric, one.how, one.control) == (data, metric, how, False)]
    means = [one for one in means if math.isfinite(one)]
    if len(means) < 2 or better == "neither":
        return math.nan
    return max(means) if better == "higher" else min(means)


def _cell(result: Result | None, best: float) -> Text:
    if result is None or not math.isfinite(result.mean):
        return Text("–")
    error = result.standard_error
    # The sign of -0.0001 says nothing.
    text = f"{round(result.mean, 3) + 0.0:.3f}"
    if math.isfinite(error):
        text += "±" + f"{error:.3f}".removeprefix("0")
    return Text(text, style="bold" if result.mean == best else "")
