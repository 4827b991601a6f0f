"""What several commands do: options, progress, compiling, showing and keeping an explanation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlbc.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from dlbc_runtime.explainer import Explainer
    from dlbc_runtime.explanation import Explanation
    from dlbc_runtime.reference import Reference

_HOW, _OUT = "How to explain", "Where to put it"

Model = Annotated[str, typer.Option("--model", "-m", show_default=False)]
Data = Annotated[Path, typer.Argument(metavar="DATA.csv", help="Numbers, with the names of the columns first.",
                                      show_default=False)]
Built = Annotated[str, typer.Option(
    "--model", "-m", show_default=False,
    help="file.py:build, which returns (model, example_inputs) or (model, example_inputs, names of the classes).")]
Drop = Annotated[list[str] | None, typer.Option("--drop", help="A column that the model does not take.")]
Rules = Annotated[str, typer.Option("--rules", "-r", rich_help_panel=_HOW,
                                    help="A preset: auto, attnlrp, cp-lrp, epsilon, gamma, epsilon-plus-flat, dlb, "
                                         "dlb-contrastive, input-x-gradient and others (docs/rules.md).")]
Backend = Annotated[str, typer.Option("--backend", rich_help_panel=_HOW, help="auto, torch, numpy, c or triton.")]
Device = Annotated[str, typer.Option("--device", rich_help_panel=_HOW, help="A torch device, e.g. cpu or cuda.")]
Fallback = Annotated[str | None, typer.Option(
    "--fallback", rich_help_panel=_HOW, help="`gradient`: pass operations without a rule by their gradient.")]
Cache = Annotated[bool, typer.Option("--cache/--no-cache", rich_help_panel=_HOW, help="Reuse compiled explainers.")]
Budget = Annotated[str | None, typer.Option(
    "--memory-budget", rich_help_panel=_HOW,
    help="Memory that explaining may take besides the weights, e.g. 2GB; it is then done in parts as far as needed.")]
Top = Annotated[int, typer.Option("--top", rich_help_panel=_OUT, min=0, help="How many of the strongest to list.")]
Html = Annotated[Path | None, typer.Option("--html", rich_help_panel=_OUT, help="Write a page, complete in one file.")]
Png = Annotated[Path | None, typer.Option("--png", rich_help_panel=_OUT, help="Write a picture.")]
Save = Annotated[Path | None, typer.Option("--save", rich_help_panel=_OUT,
                                           help="Write the numbers: .safetensors or .json; loads again.")]
Check = Annotated[bool, typer.Option("--check", rich_help_panel=_OUT,
                                     help="Check conservation: fail unless all relevance is accounted for.")]
Tolerance = Annotated[float, typer.Option("--tolerance", rich_help_panel=_OUT, min=0.0,
                                          help="Of --check, relative to the amounts in play.")]


@dataclass(frozen=True)
class Output:
    """Where an explanation goes."""

    top: int = 10
    html: Path | None = None
    png: Path | None = None
    save: Path | None = None
    check: bool = False
    tolerance: float = 1e-4
    experts: bool = False

    def check_names(self) -> None:
        """InputError, before any work, for a file that could not be written at the end."""
        for path, suffixes in ((self.html, (".html",)), (self.png, (".png",)), (self.save, (".safetensors", ".json"))):
            if path is None:
                continue
            if path.suffix.lower() not in suffixes:
                raise typer.BadParameter(f"{path} must end in {' or '.join(suffixes)}")
            if not path.absolute().parent.is_dir():
                raise InputError(f"there is no folder {path.absolute().parent}", hint="create it, or write elsewhere")

    def deliver(self, explanation: Explanation) -> None:
        """Show the explanation, write its files, and with `check` fail when its ledger does not close."""
        from dlbc.commands.experts import print_experts
        from dlbc_runtime.views.terminal import render

        out = console()
        if self.check:
            with working("checking conservation"):
                explanation.conservation()
        out.print(render(explanation, listed=self.top))
        if self.experts:
            print_experts(explanation.experts, out)
        for path in filter(None, (self.html, self.png, self.save)):
            out.print(f"wrote {explanation.save(path)}", markup=False, highlight=False, soft_wrap=True)
        if self.check:
            self._check(explanation, out)

    def _check(self, explanation: Explanation, out: Console) -> None:
        from rich.console import Console

        ledger = explanation.conservation()
        plain: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
        said = f"conservation: {ledger.summary()}"
        if ledger.closes(self.tolerance):
            out.print(f"{said}, closes to {self.tolerance:g}", style="green", **plain)
            return
        out.print(said, **plain)
        leaks, error = ledger.leaks(self.tolerance), Console(stderr=True)
        for row in leaks[:5]:
            error.print(f"  {row}", style="red", **plain)
        if len(leaks) > 5:
            error.print(f"  … and {len(leaks) - 5} more operations", style="red", **plain)
        where = f", {len(leaks)} operations do not balance" if leaks else ""
        error.print(f"dlbc: error: conservation does not close to {self.tolerance:g}: {ledger.residual:.3g} of "
                    f"{ledger.seed:.3g} is unaccounted for{where}", style="bold red", **plain)
        raise typer.Exit(1)


@dataclass(frozen=True)
class How:
    """How to compile."""

    rules: str = "auto"
    backend: str = "auto"
    fallback: str | None = None
    cache: bool = True
    reference: Reference | None = None

    def compile(self, model: Any, inputs: object) -> Explainer:
        """The explainer of a model."""
        from dlbc.api import compile as compile_model

        with working("compiling"):
            return compile_model(model, inputs, rules=self.rules, backend=self.backend, fallback=self.fallback,
                                 cache=self.cache, reference=self.reference)


def console() -> Console:
    """The terminal, or whatever stands for it now."""
    from rich.console import Console

    return Console()


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say on stderr what goes on, while somebody watches."""
    from rich.console import Console

    watched = Console(stderr=True)
    if not watched.is_terminal:
        yield
        return
    with watched.status(f"{what} …"):
        yield


def bytes_of(budget: str | None) -> int | None:
    """The bytes of `--memory-budget`. InputError, before any work, for what is none."""
    if budget is None:
        return None
    from dlbc_runtime.memory import as_bytes

    return as_bytes(int(budget) if budget.isdigit() else budget)


def index_of(target: str | None, labels: dict[int, str] | None = None) -> int | None:
    """An index given as a number or as the name of a class. InputError with the nearest names."""
    if target is None:
        return None
    if target.lstrip("-").isdigit():
        return int(target)
    names = {name.lower(): index for index, name in (labels or {}).items()}
    if target.strip().lower() in names:
        return names[target.strip().lower()]
    from difflib import get_close_matches

    near = get_close_matches(target.lower(), names, 3)
    shown = ", ".join((labels or {})[names[name]] for name in near) or ", ".join(list((labels or {}).values())[:8])
    raise InputError(f"there is no class {target!r}", where="--target",
                     hint=f"did you mean {shown}?" if near else f"classes: {shown}" if shown else
                     "this model's classes have no names; give a number")
