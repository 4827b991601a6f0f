"""Errors of running an explainer: what was being done, where, the fact, and the remedy."""

from __future__ import annotations


class DlbcError(Exception):
    """Base of all errors. `fact` says what is wrong, `where` the place, `hint` what to do about it."""

    def __init__(self, fact: str, *, where: str = "", hint: str = "") -> None:
        self.fact, self.where, self.hint = fact, where, hint
        super().__init__("\n".join(line for line in (
            f"{where}: {fact}" if where else fact, f"  hint: {hint}" if hint else "") if line))


class InputError(DlbcError, ValueError):
    """The inputs, target or options of a call do not fit the explainer."""


class KernelError(Exception):
    """There is no compiled kernel: generated code catches it and runs the kernel's ops one by one."""


class ArtifactError(DlbcError):
    """A saved explainer, explanation or cache entry is damaged, foreign, or does not match the model."""
