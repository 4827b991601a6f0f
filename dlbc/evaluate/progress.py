"""How far an evaluation is: a bar on stderr, where somebody wants one and watches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def followed(what: str, parts: Sequence[T], wanted: bool) -> Iterator[Iterable[T]]:
    """`parts`, with a bar that follows the loop over them; nothing unless `wanted` and stderr is a terminal."""
    if not wanted:
        yield parts
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield parts
        return
    with Progress(console=console, transient=True) as bar:
        yield bar.track(parts, description=what)
