"""Draw docs/images/cost.png from the last measurements: `python benchmarks/plots.py`.

Bars: time of an explanation over that of a plain forward pass and the gradient of the input, ours and (where they were
measured, by `cost_peers.py`) other libraries'.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _measure import kept

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "cost.png"
BASELINE = "forward + gradient"
OURS, THEIRS, LINE = "#b3282d", "#8a8f98", "#30343b"


def bars(cost: Mapping[str, Any], peers: Mapping[str, Any]) -> dict[str, list[tuple[str, float, bool]]]:
    """By model: name, median ratio, and whether it is ours; from the fastest on."""
    found: dict[str, list[tuple[str, float, bool]]] = {}
    for row in cost["rows"]:
        if row["case"] != BASELINE:
            found.setdefault(row["model"], []).append((f"dlbc {row['case']}", row["median"], True))
    measured = set(found)
    for row in peers["rows"]:
        ours = row["case"].startswith("dlbc")
        if row["case"] != BASELINE and not (ours and row["model"] in measured):
            found.setdefault(row["model"], []).append((row["case"], row["median"], ours))
    return {model: sorted(rows, key=lambda row: row[1]) for model, rows in found.items()}


def draw(found: Mapping[str, list[tuple[str, float, bool]]], path: Path) -> None:
    """One panel a model, all on one logarithmic scale; the line at 1 is the baseline."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.9 + 0.28 * sum(len(rows) + 1.6 for rows in found.values())), facecolor="white")
    figure.set_layout_engine("constrained")
    panels = figure.subplots(len(found), 1, sharex=True, squeeze=False,
                             height_ratios=[len(rows) + 1.0 for rows in found.values()])[:, 0]
    for panel, (model, rows) in zip(panels, found.items(), strict=True):
        names, medians, ours = zip(*rows[::-1], strict=True)
        panel.barh(names, medians, color=[OURS if own else THEIRS for own in ours], height=0.62)
        for place, median in enumerate(medians):
            panel.text(median * 1.03, place, f"{median:.2f}", va="center", fontsize=9, color=LINE)
        panel.axvline(1.0, color=LINE, linewidth=0.8, linestyle=(0, (4, 3)))
        panel.set_title(model.replace("`", ""), loc="left", fontsize=10.5, fontweight="bold", color=LINE)
        panel.set_xscale("log")
        panel.tick_params(axis="y", length=0, labelsize=9)
        panel.spines[["top", "right", "left"]].set_visible(False)
    ticks = [0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]
    highest = max(median for rows in found.values() for _, median, _ in rows)
    panels[-1].set_xlim(0.2, max(2.5, 1.6 * highest))
    panels[-1].set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    panels[-1].minorticks_off()
    panels[-1].set_xlim(0.2, max(2.5, 1.6 * highest))
    panels[-1].set_xlabel("time ÷ (forward + gradient)", fontsize=9.5, color=LINE)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(bars(kept("cost"), kept("cost_peers")), PICTURE)
