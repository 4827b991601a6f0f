"""The table in docs/peers.md is what was measured, and what was measured is every comparison, within its tolerance."""

from __future__ import annotations

import runpy
from pathlib import Path

from tests.peers.comparisons import ALL, FLOAT32

ROOT = Path(__file__).parents[2]


def test_the_table_is_current() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "peers.py"))
    text = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    assert script["page"](text, script["kept"]()) == text, "run `python benchmarks/peers.py --table`"


def test_every_comparison_was_measured_and_agrees() -> None:
    """Figures kept from another set of comparisons are stale: run `.venv-peers/bin/python benchmarks/peers.py`."""
    rows = runpy.run_path(str(ROOT / "benchmarks" / "peers.py"))["kept"]()["rows"]
    assert [(row["peer"], row["model"], row["ours"], row["theirs"], row["eps"]) for row in rows] == [
        (one.peer, one.model, one.ours, one.theirs, one.eps) for one in ALL]
    for row, one in zip(rows, ALL, strict=True):
        assert 0 < row["float32"] <= FLOAT32 and 0 <= row["float64"] <= one.exactly, one.name
