"""`dlbc cache list|clear`."""

from __future__ import annotations

import typer

from dlbc.commands.shared import console

app = typer.Typer(help="Compiled explainers kept on disk.", no_args_is_help=True, rich_markup_mode="rich")


@app.command("list")
def list_entries() -> None:
    """List what is kept, the newest first."""
    import datetime

    from rich.markup import escape
    from rich.table import Table

    from dlbc.cache import entries
    from dlbc.packaged import converted_models, models_folder

    found = sorted(entries(), key=lambda entry: -entry.made)
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("model", "rules", "backend", "size", "made"):
        table.add_column(name, justify="right" if name == "size" else "left")
    for entry in found:
        made = datetime.datetime.fromtimestamp(entry.made).strftime("%Y-%m-%d %H:%M")
        table.add_row(escape(entry.model), escape(entry.rules), entry.backend, size(entry.size), made)
    for name, bytes_ in converted_models():
        table.add_row(escape(name), "[dim]unpacked GGUF[/]", "", size(bytes_), "")
    out = console()
    if table.row_count:
        out.print(table)
    out.print(f"{len(found)} compiled in {models_folder().parent}", markup=False, highlight=False, style="dim",
              soft_wrap=True)


@app.command("clear")
def clear_entries() -> None:
    """Remove everything that is kept; it is made again when needed."""
    from dlbc.cache import clear
    from dlbc.packaged import clear_models

    count = clear()
    models = clear_models()
    typer.echo(f"removed {count} compiled" + (f" and {models} unpacked models" if models else ""))


def size(count: int) -> str:
    """Bytes in the unit that suits them."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
