"""`--reference`: what an explained input is compared with, as the command line writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlbc.commands.tables import Table
from dlbc.errors import InputError

if TYPE_CHECKING:
    from dlbc.models import TextModel
    from dlbc_runtime.reference import Reference

TextReference = Annotated[str | None, typer.Option(
    "--reference", help="Explain the difference to a text of as many of these tokens: `mask`, `pad`, `unk`, or a "
                        "token. Special tokens stay.")]
ImageReference = Annotated[str | None, typer.Option(
    "--reference", help="Explain the difference to another picture: `zero` (mean colour), `mean`, `blur`, or a file.")]
TableReference = Annotated[str | None, typer.Option(
    "--reference", help="Explain the difference to another row: `zero`, `mean` of the data, or the number of a row.")]


def text_reference(named: str | None, loaded: TextModel, token_id: Callable[[Any, str, str], int]) -> Reference | None:
    """A text of one token; special tokens stay. InputError for tokens that the model does not have."""
    if named is None:
        return None
    from dlbc_runtime.reference import Reference

    found = getattr(loaded.tokenizer, f"{named}_token_id", None) if named in ("mask", "pad", "unk") else token_id(
        loaded.tokenizer, named, "")
    if found is None:
        raise InputError(f"this model has no {named} token", where="--reference",
                         hint="name a token: its text or its number")
    return Reference.token(int(found), keep=loaded.tokenizer.all_special_ids)


def image_reference(named: str | None, pixels: Callable[[str], Any]) -> Reference | None:
    """Zeros, the mean or a blurred copy; any other name is a picture's, which `pixels` reads."""
    if named is None:
        return None
    from dlbc_runtime.reference import Reference

    made = {"zero": Reference.zero, "mean": Reference.mean, "blur": Reference.blur}
    return made[named]() if named in made else Reference.of(pixels(named))


def table_reference(named: str | None, table: Table) -> Reference | None:
    """Zeros, the mean over all rows, or a row. InputError for what is none of them."""
    if named is None:
        return None
    import numpy as np

    from dlbc_runtime.reference import Reference

    if named == "zero":
        return Reference.zero()
    if named == "mean":
        return Reference.mean(np.asarray(list(table.rows()), np.float32))
    if not named.isdigit():
        raise InputError(f"{named!r} is no reference for a row", where="--reference",
                         hint="zero, mean, or the number of a row")
    return Reference.of(np.asarray([table.row(int(named))], np.float32))
