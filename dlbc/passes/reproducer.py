"""What a failed pass leaves behind: the graph before it, as text, and the command that shows the failure again."""

from __future__ import annotations

import logging
import os
import re
import shlex
import tempfile
import traceback
from pathlib import Path, PurePath

from dlbc.errors import DlbcError, PassError
from dlbc.ir.core import Graph
from dlbc.ir.printer import print_graph
from dlbc.passes import Pass

log = logging.getLogger(__name__)


def explained(step: Pass, graph: Graph, problem: Exception, *, write: bool = True) -> PassError:
    """The failure of a pass on a graph as a PassError, to be raised from `problem`; with `write` it names the file
    that `written` made."""
    fact, where, hint = f"{type(problem).__name__}: {problem}", _line(problem), ""
    if isinstance(problem, DlbcError):
        fact, where, hint = problem.fact, problem.where, problem.hint
    name = _text(step, graph)
    file, command = written(step, graph, fact) if write else ("", "")
    found = f"the graph before it is in {file}; to see this again: {command}" if file else ""
    return PassError(f"pass `{name}` failed: {fact}", where=where, step=name, reproducer=file, command=command,
                     hint=f"this is a mistake in dlbc. {found}\n  {hint}".rstrip() if found or hint else "")


def written(step: Pass, graph: Graph, fact: str = "") -> tuple[str, str]:
    """Write `<graph>.<pass>.dlir` into the folder DLBC_DUMP, else into a fresh temporary one; its path, and the command
    that runs the pass on it. Empty texts where it cannot be written: a failure stays the failure that it was."""
    try:
        folder = Path(os.environ.get("DLBC_DUMP") or tempfile.mkdtemp(prefix="dlbc-"))
        folder.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"[^\w.-]+", "_", f"{graph.name}.{step.name}")
        file = _free(folder.resolve(), stem)
        command = f"dlbc-opt {shlex.quote(str(file))} -p {shlex.quote(_text(step, graph))}"
        lines = [command, *fact.splitlines()]
        file.write_text("".join(f"// {line}\n" for line in lines) + print_graph(graph), encoding="utf-8")
    except Exception:  # a graph that does not even print, a disk that is full
        log.debug("no reproducer of %s", step.name, exc_info=True)
        return "", ""
    return str(file), command


def _free(folder: Path, stem: str) -> Path:
    """A file that is not there yet."""
    file, number = folder / f"{stem}.dlir", 1
    while file.exists():
        file, number = folder / f"{stem}.{number}.dlir", number + 1
    return file


def _text(step: Pass, graph: Graph) -> str:
    """The pass as `dlbc-opt` reads it; its bare name where its options cannot be told."""
    try:
        return str(step.for_text(graph))
    except Exception:
        return step.name


def _line(problem: Exception) -> str:
    """Where in the code it happened: `simplify.py:55`."""
    frames = traceback.extract_tb(problem.__traceback__)
    return f"{PurePath(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
