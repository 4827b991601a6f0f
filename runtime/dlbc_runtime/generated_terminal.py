"""An explained generation on the terminal: the text, and for each new token what it owes most to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text as Line

from dlbc_runtime.views.numbers import percent, signed
from dlbc_runtime.views.terminal import shown_in_notebook

if TYPE_CHECKING:
    from dlbc_runtime.generation import GenerationExplanation

TARGETS = {"chosen": "the token's logit", "probability": "its log-odds", "contrast": "why it and not another"}


def show(found: GenerationExplanation, *, k: int = 3) -> None:
    """Display in a notebook, otherwise print: because the user asks."""
    if not shown_in_notebook(found):
        Console().print(render(found, k=k))


def render(found: GenerationExplanation, *, k: int = 3) -> RenderableType:
    """What `show` prints: the prompt and what came, then a row for each new token with its `k` main sources."""
    text = Line(no_wrap=False)
    text.append("".join(found.prompt_tokens), style="dim").append("".join(found.new_tokens), style="bold")
    about = f"explains {TARGETS.get(found.target, found.target)}, rules {found.rules}, {found.strategy}"
    parts: list[RenderableType] = [text, Line(), Line(about, style="dim")]
    if not found.finished:
        parts.append(Line(f"interrupted: {len(found.explained)} of {len(found.new_ids)} new tokens are explained",
                          style="yellow"))
    parts += [Line(), _table(found, k)]
    return Group(*parts)


def _table(found: GenerationExplanation, k: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading, right in (("token", False), ("probability", True)):
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    if found.against is not None:
        table.add_column("rather than", no_wrap=True)
    table.add_column("owes most to", overflow="fold")
    if found.sinks is not None:
        table.add_column("first token", justify="right")
    sources: dict[int, list[str]] = {}
    for one in found.top(k):
        place = f"@{one.index[0]}" if one.input == "ids" else f"source @{one.index[0]}"
        sources.setdefault(one.seed, []).append(f"{_visible(one.name)} {place} {signed(one.relevance)}")
    for number, token in enumerate(found.new_tokens):
        row = found.row_of(number)
        cells = [Line(_visible(token), style="bold"), Line(percent(float(found.probabilities[number])))]
        if found.against is not None:
            cells.append(Line(_visible(found.against_tokens[row]) if row is not None else ""))
        cells.append(Line(", ".join(sources.get(row, ())) if row is not None else "not explained",
                          style="" if row is not None else "dim"))
        if found.sinks is not None:
            cells.append(Line(signed(float(found.sinks[row])) if row is not None else "", style="dim"))
        table.add_row(*cells)
    return table


def _visible(token: str) -> str:
    """The text where it must not look empty."""
    return token.replace("\n", "⏎").strip() or "␣"
