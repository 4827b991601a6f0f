"""A report as a picture: curves with bands of one standard error, or bars where there are no curves."""

from __future__ import annotations

import math
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from dlbc.errors import DlbcError, InputError
from dlbc.evaluate.report import Curve, Report

TITLES = {"morf": "most relevant first", "lerf": "least relevant first", "randomisation": "weights shuffled"}
AXES = {"randomisation": ("layers shuffled, from the output", "rank correlation with the map")}
COLOURS = ("#3366cc", "#dd7722", "#2a9d5c", "#aa3377", "#008b9a", "#8a6d3b", "#cc3311", "#5d4aa8")
"""Told apart also by those who see no red or green, in this order."""


def plot(report: Report, path: Path | None) -> Any:
    """Draw the curves of a report (a panel for each data set, fill and kind of curve), or its means as bars; write the
    picture to `path` if there is one. DlbcError when matplotlib is missing; InputError for an empty report."""
    try:
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise DlbcError("pictures are drawn with matplotlib, which is missing",
                        hint="pip install 'dlbc[plots]'") from problem
    if not report.results:
        raise InputError("the report is empty", where="plot", hint="measure something first")
    if path is not None and not path.absolute().parent.is_dir():
        raise InputError(f"there is no folder {path.absolute().parent}", hint="create it, or write elsewhere")
    panels = list(dict.fromkeys((one.data, one.how, one.name) for one in report.curves))
    colours = dict(zip(dict.fromkeys(one.method for one in report.curves if not one.control), cycle(COLOURS),
                       strict=False))
    if panels:
        figure = Figure(figsize=(4.2 * min(len(panels), 4), 3.4 * math.ceil(len(panels) / 4)), layout="constrained")
        for place, panel in enumerate(panels):
            _curves(figure.add_subplot(math.ceil(len(panels) / 4), min(len(panels), 4), place + 1), panel,
                    [one for one in report.curves if (one.data, one.how, one.name) == panel], colours, legend=not place)
    else:
        figure = _bars(Figure(figsize=(6, 0.4 * len(report.results) + 1), layout="constrained"), report)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _curves(axes: Any, panel: tuple[str, str, str], curves: list[Curve], colours: dict[str, str], *, legend: bool
            ) -> None:
    data, how, name = panel
    for curve in curves:
        middle, error = curve.band()
        colour = colours.get(curve.method, "0.6")
        at = np.array(curve.at)
        axes.plot(at, middle, color=colour, label=curve.method, lw=1.5,
                  ls=("--" if curve.method == "random" else ":") if curve.control else "-")
        axes.fill_between(at, middle - error, middle + error, color=colour, alpha=0.18, lw=0)
    across, up = AXES.get(name, ("units perturbed", how.rpartition(", ")[2]))
    fill = "" if name in AXES else how.partition(", ")[0]
    axes.set_title(", ".join(filter(None, (data, TITLES.get(name, name), fill))), fontsize=9)
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(up, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=7, frameon=False)


def _bars(figure: Any, report: Report) -> Any:
    axes = figure.add_subplot()
    names = [" ".join(filter(None, (one.data, one.method, one.metric))) for one in report.results]
    errors = [one.standard_error if math.isfinite(one.standard_error) else 0.0 for one in report.results]
    axes.barh(names, [one.mean if math.isfinite(one.mean) else 0.0 for one in report.results], xerr=errors,
              color=["0.6" if one.control else COLOURS[0] for one in report.results], height=0.6)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure
