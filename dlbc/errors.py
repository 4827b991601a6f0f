"""Every error of dlbc: what was being done, where, the fact, and the remedy."""

from __future__ import annotations

from dlbc_runtime.errors import ArtifactError, DlbcError, InputError

__all__ = ["ArtifactError", "DlbcError", "ExportError", "IRError", "InputError", "LevelError", "PassError",
           "RuleError", "UnsupportedOpError"]


class IRError(DlbcError):
    """A graph or its text is not well formed."""


class LevelError(IRError):
    """A pass was asked for a graph of another level."""


class PassError(IRError):
    """A pass failed, or what it made is not well formed: a mistake in dlbc.

    `step`: the pass as text. `reproducer`: the file with the graph before it, "" where none was written; `command`:
    what shows the failure again.
    """

    def __init__(self, fact: str, *, where: str = "", hint: str = "", step: str = "", reproducer: str = "",
                 command: str = "") -> None:
        super().__init__(fact, where=where, hint=hint)
        self.step, self.reproducer, self.command = step, reproducer, command


class ExportError(DlbcError):
    """torch.export could not capture the user's model."""


class UnsupportedOpError(DlbcError):
    """An operation has no entry in the catalogue, no rule, or no code in a backend."""


class RuleError(DlbcError):
    """A rule, preset or composite is unknown or has parameters that make no sense."""
