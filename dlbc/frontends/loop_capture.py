"""Loops over experts followed while a model is captured (`grouped_capture`, `chosen_capture`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from dlbc.frontends.chosen_capture import ChoosingLoops
from dlbc.frontends.expert_rows import ExpertRows, NotByRow, name_of
from dlbc.frontends.grouped_capture import SortedLoops

_ASSUMPTIONS = frozenset({"_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"})


@contextmanager
def expert_loops(positive: bool = False) -> Iterator[ExpertLoops]:
    """While it is entered, loops over experts in this thread are followed, and captured for all experts at once.

    `positive`: take it that every expert has rows, so that `if not len(rows): continue` can be decided. That is no
    restriction: an expert without rows adds nothing either way. NotByRow where it was taken of something else.
    """
    loops = ExpertLoops(positive)
    with loops:
        yield loops
    loops.finish()


class ExpertLoops(TorchFunctionMode):
    """Calls of torch as they are made."""

    def __init__(self, positive: bool) -> None:
        super().__init__()
        self.rows = ExpertRows()
        self.sorted, self.choosing = SortedLoops(self.rows, positive), ChoosingLoops(self.rows, positive)

    @property
    def joined(self) -> int:
        """How many loops were found so far."""
        return self.sorted.joined + self.choosing.joined

    def finish(self) -> None:
        """NotByRow where a loop leaves out experts, or where sizes were taken to be positive that are no expert's."""
        self.choosing.finish()
        if self.sorted.assumed or self.choosing.assumed:
            raise NotByRow("a decision by how many rows there are, which is about something else than rows of experts")

    def __torch_function__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        """What a call of torch gives; loops over experts are followed."""
        name, given = name_of(func), dict(kwargs or {})
        for loops in (self.sorted, self.choosing):
            found = loops.handle(name, func, args, dict(given))
            if found is not NotImplemented:
                return found
        if self.rows.among((args, given)):
            return self.rows.used(name, func, tuple(args), given)
        found = func(*args, **given)
        self.rows.note(name, args, given, found)
        self.choosing.note(name, args, given, found)
        return found


def by_content(what: object) -> bool:
    """Whether a failure of the exporter is about sizes that depend on data; or whether a symbol is such a size."""
    if not isinstance(what, Exception):
        return re.fullmatch(r"u\d+", str(what)) is not None
    found = re.search(r"[Dd]ata-?[Dd]epend|[Uu]nbacked|\bu\d+\b|numpy", f"{type(what).__name__}: {what}")
    return found is not None and not isinstance(what, NotByRow)


def drop_assumptions(program: ExportedProgram) -> None:
    """Remove what the exporter asserts of sizes that depend on data, where no loop needs them any more."""
    for node in list(program.graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "").partition(".")[0] in _ASSUMPTIONS:
            program.graph.erase_node(node)
    program.graph_module.recompile()
