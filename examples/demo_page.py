"""The page that shows all explanations of the demo together and leads to the interactive ones."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from demo import Result

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1c1d20; --soft: #5f636b; --line: #e4e4e0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #17181a; --card: #1f2023; --ink: #ececee; --soft: #9da1a8; --line: #33353a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1440px; padding: 2.5rem 2rem 4rem; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 0; }
p { margin: .3rem 0 1rem; color: var(--soft); max-width: 75ch; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1.5rem;
          margin: 1.5rem 0; }
header { display: flex; justify-content: space-between; gap: 1rem; align-items: baseline; }
a { color: inherit; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(28rem, 1fr)); gap: 1.25rem; }
figure { margin: 0; display: flex; flex-direction: column; }
figure a { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: .5rem; display: block; }
img { width: 100%; display: block; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; margin-top: 1rem; table-layout: fixed; }
th:nth-child(1) { width: 6rem; }
th:nth-child(5) { width: 6rem; }
th:nth-child(6) { width: 9rem; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: .35rem 1rem .35rem 0; vertical-align: top; border-top: 1px solid var(--line); }
thead th { border: 0; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; padding: .35rem 0 .35rem 1rem; }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>dlbc demo</title><style>{style}</style></head><body>
<h1>What made them say so</h1>
<p>Trained models, each explained by two sets of rules. Red speaks for what was predicted, blue against it; the two
columns use their own scales. Every picture opens its interactive page. The last number is the
time of an explanation over that of a forward pass and an input gradient of the same model in plain PyTorch.</p>
{sections}
</body></html>
"""
SECTION = """<section><header><h2>{title}</h2><a href="{key}.html">interactive page</a></header><p>{question}</p>
<div class="pair">{figures}</div>
<table><thead><tr><th>rules</th><th>prediction</th><th>strongest</th><th>conservation</th>
<th class="number">time</th><th class="number">over plain PyTorch</th></tr></thead><tbody>{rows}</tbody></table>
</section>
"""


def write_index(results: Sequence[Result], path: Path) -> Path:
    """Write the page; returns its path."""
    parts = {one.part.key: one.part for one in results}
    sections = "".join(SECTION.format(
        key=key, title=html.escape(part.title), question=html.escape(part.question),
        figures="".join(_figure(one) for one in results if one.part.key == key),
        rows="".join(_row(one) for one in results if one.part.key == key)) for key, part in parts.items())
    path.write_text(PAGE.format(style=STYLE, sections=sections), encoding="utf-8")
    return path


def _figure(one: Result) -> str:
    alt = html.escape(f"{one.part.title} explained by {one.rules}")
    return f'<figure><a href="{one.part.key}.html"><img src="{html.escape(one.files[0])}" alt="{alt}"></a></figure>'


def _row(one: Result) -> str:
    texts = (one.rules, one.said, one.strongest, one.conservation)
    numbers = (one.time, f"{one.ratio:.2f}")
    cells = "".join(f"<td>{html.escape(text)}</td>" for text in texts)
    return "<tr>" + cells + "".join(f'<td class="number">{number}</td>' for number in numbers) + "</tr>"
