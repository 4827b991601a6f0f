"""`dlbc-opt`: run passes on the text of a graph, and print the graph that results.

    dlbc-opt model.dlir -p "raise_norms,pair{composite=attnlrp}" -o paired.dlir

A file may hold several graphs, with lines `// -----` between them. With `--verify-diagnostics` nothing is
printed; instead each `// expected-error: text` must meet an error with that text on its line.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from dlbc.backends import load
from dlbc.errors import DlbcError
from dlbc.ir.core import Graph
from dlbc.ir.parser import parse_with_spans
from dlbc.ir.printer import print_graph
from dlbc.ir.source import LocatedError
from dlbc.ir.verifier import verify

_SEPARATOR = re.compile(r"^// -----[^\n]*$", re.MULTILINE)
_EXPECTED = re.compile(r"//\s*expected-error:\s*(.*?)\s*$", re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 on an error, 2 on wrong usage."""
    parser = argparse.ArgumentParser(prog="dlbc-opt", description="Run passes on the text of a graph.")
    parser.add_argument("file", help="the text of a graph (.dlir), `-` for standard input")
    parser.add_argument("-p", "--passes", default="", metavar="PASSES",
                        help='passes in order: "name{option=value},name"')
    parser.add_argument("--emit", metavar="BACKEND", help="print the module that a backend makes of the graph")
    parser.add_argument("-o", "--output", metavar="FILE", help="where to write; standard output if not given")
    parser.add_argument("--no-verify", action="store_true", help="do not verify the graph, read or rewritten")
    parser.add_argument("--verify-diagnostics", action="store_true",
                        help="expect the errors that `// expected-error: text` announces")
    options = parser.parse_args(arguments)
    file = "<stdin>" if options.file == "-" else options.file
    try:
        text = sys.stdin.read() if options.file == "-" else Path(file).read_text(encoding="utf-8")
        if options.verify_diagnostics:
            wrong = [line for part in split(text)
                     for line in diagnose(part, file, options.passes, checked=not options.no_verify)]
            print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
            return 1 if wrong else 0
        write, between = (load(options.emit).emit, "\n\n") if options.emit else (print_graph, "\n// -----\n\n")
        printed = between.join(
            write(rewritten(part, file, options.passes, checked=not options.no_verify)) for part in split(text))
        if options.output:
            Path(options.output).write_text(printed, encoding="utf-8")
        else:
            sys.stdout.write(printed)
    except (DlbcError, OSError, UnicodeDecodeError) as problem:
        print(problem if isinstance(problem, LocatedError) else f"dlbc-opt: error: {problem}", file=sys.stderr)
        return 1
    return 0


def split(text: str) -> list[str]:
    """The graphs of a text, each with as many empty lines in front as make its line numbers right."""
    parts, start = [], 0
    for separator in [*_SEPARATOR.finditer(text), None]:
        end = separator.start() if separator else len(text)
        parts.append("\n" * text.count("\n", 0, start) + text[start:end])
        start = separator.end() if separator else end
    return parts


def rewritten(text: str, file: str, passes: str, *, checked: bool) -> Graph:
    """The graph of a text after passes; verified as read and after each pass when `checked`."""
    graph, spans = parse_with_spans(text, file)
    if checked:
        verify(graph, spans)
    if not passes:
        return graph
    from dlbc.passes import parse, run

    steps = parse(passes)
    return run(graph, steps, verified=checked, reproducer=len(steps) > 1)  # of one pass, the text itself is one


def diagnose(text: str, file: str, passes: str, *, checked: bool) -> list[str]:
    """What differs between the error that a graph's text announces and the one that it has."""
    expected = [(text.count("\n", 0, match.start()) + 1, match[1]) for match in _EXPECTED.finditer(text)]
    try:
        rewritten(text, file, passes, checked=checked)
    except DlbcError as problem:
        line = problem.line if isinstance(problem, LocatedError) else 0
        found = f"{problem.fact} hint: {problem.hint}"
        met = [item for item in expected if item[1] in found and (not line or item[0] == line)]
        return [f"{file}:{number}: expected error `{wanted}` did not come"
                for number, wanted in expected if (number, wanted) not in met] + (
                    [] if met else [f"this error was not expected here:\n{problem}"])
    return [f"{file}:{number}: expected error `{wanted}` did not come" for number, wanted in expected]


if __name__ == "__main__":
    sys.exit(main())
