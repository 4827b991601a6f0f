"""`--experts`: which experts of a mixture of experts had a part in what is explained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dlbc.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from dlbc_runtime.experts import Experts
    from dlbc_runtime.explainer import Explainer

WithExperts = Annotated[bool, typer.Option("--experts", help="Also which experts of a mixture of experts had a part in "
                                                             "it: a line for each layer.")]


def check_experts(explainer: Explainer, model: str, *, wanted: bool) -> None:
    """InputError, before anything is explained, where experts are wanted of a model that has none."""
    if wanted and not explainer.manifest.experts:
        raise InputError("the model has no experts: it is no mixture of experts that dlbc knows", where=model,
                         hint="leave --experts out; docs/moe.md says what is recognised as experts")


def print_experts(experts: Experts | None, out: Console) -> None:
    """The table of a row's experts; of several targets of what all of them got."""
    from dlbc_runtime.views.experts_terminal import table

    if experts is not None:
        out.print(table(experts.summed()))
        out.print()
