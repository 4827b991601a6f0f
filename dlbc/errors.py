"""Every error of dlbc: what was being done, where, the fact, and the remedy."""

from __future__ import annotations

from dlbc_runtime.errors import ArtifactError, DlbcError, InputError

__all__ = ["ArtifactError", "DlbcError", "ExportError", "IRError", "InputError", "RuleError",
           "UnsupportedOpError"]


class IRError(DlbcError):
    """A graph or its text is not well formed."""


class ExportError(DlbcError):
    """torch.export could not capture the user's model."""


class UnsupportedOpError(DlbcError):
    """An operation has no entry in the catalogue, no rule, or no code in a backend."""


class RuleError(DlbcError):
    """A rule, preset or composite is unknown or has parameters that make no sense."""
