"""`dlbc doctor` and `dlbc ir`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlbc.commands.shared import Backend, Cache, Fallback, How, Rules, console, working

if TYPE_CHECKING:
    from rich.console import Console

    from dlbc.doctor import Report

Spec = Annotated[str, typer.Argument(
    metavar="MODEL", show_default=False,
    help="file.py:build, a function returning (model, example_inputs); or a folder, package or hub name.")]


def doctor(model: Spec, rules: Rules = "auto", backend: Backend = "auto", fallback: Fallback = None) -> None:
    """Find out whether a model compiles, with which rules, and whether its explanations are right.

    Names everything that is not supported, with the place in the model and what to do about it. Exits with 1
    when there is a problem.

    [dim]dlbc doctor churn.py:build[/dim]
    """
    from dlbc.doctor import examine
    from dlbc.models import load_any

    with working(f"loading {model}"):
        found, inputs = load_any(model)
    with working("examining"):
        report = examine(found, inputs, rules=rules, backend=backend, fallback=fallback)
    show(report, console())
    if not report.ok:
        raise typer.Exit(1)


def ir(
    model: Spec,
    level: Annotated[str, typer.Option(
        "--level", "-l", help="exported, canonical, paired, lowered or source.")] = "paired",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it here.")] = None,
    rules: Rules = "auto", backend: Backend = "auto", fallback: Fallback = None, cache: Cache = True,
) -> None:
    """Print what a model is compiled to: the graph at a level, or the generated source.

    [dim]dlbc ir churn.py:build --level paired[/dim]
    """
    from dlbc.models import load_any

    with working(f"loading {model}"):
        found, inputs = load_any(model)
    explainer = How(rules, backend, fallback, cache).compile(found, inputs)
    text = explainer.source if level == "source" else explainer.ir(level)
    if output is None:
        typer.echo(text, nl=not text.endswith("\n"))
    else:
        output.write_text(text, encoding="utf-8")
        typer.echo(f"wrote {output}")


def show(report: Report, out: Console) -> None:
    """Print a report."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from dlbc.doctor import sizes_in_words

    def line(good: bool, text: str, more: str = "") -> None:
        grid = Table.grid(padding=(0, 1))
        grid.add_row(Text("✓" if good else "✗", "green" if good else "red"), Text(text).append(more, "dim"))
        out.print(grid)

    def detail(text: str, style: str = "", indent: int = 2) -> None:
        out.print(Padding(Text(text, style), (0, 0, 0, indent)))

    bad = {problem.step for problem in report.problems}
    out.print(Text(report.model, "bold").append(f"  {report.parameters:,} weights", "not bold dim"))
    if "capture" not in bad:
        line(True, f"captured: {sum(report.operations.values())} operations of {len(report.operations)} kinds")
        for one in report.inputs:
            detail(f"{one.name}  {one.type}")
            for axis, reason in one.fixed.items():
                detail(f"axis {axis} is fixed: {reason}", "yellow", 4)
        if report.sizes:
            detail(f"sizes  {sizes_in_words(report.sizes)}")
    if report.rules and "rules" not in bad:
        line(True, "every operation has a rule", f" ({report.composite})")
    if report.rules:
        table = Table.grid(padding=(0, 2, 0, 0))
        for use in report.rules:
            table.add_row("", Text(f"{use.count} ×"), Text(use.op), Text(f"<{use.rule}>"), Text(use.place, "dim"))
        out.print(table)
    if report.difference is not None and "forward" not in bad:
        line(True, "the compiled forward is the model's", f" (to {report.difference:.0e} of the largest output)")
    if report.ledger is not None and "conservation" not in bad:
        line(True, "conservation adds up: " + report.ledger.summary())
    for problem in report.problems:
        line(False, f"{problem.where}: {problem.fact}" if problem.where else problem.fact)
        if problem.hint:
            detail(problem.hint, "dim")
