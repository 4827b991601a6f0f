"""Write the op table of `ir.md` from the catalogue: `python docs/generate_ops.py`; a test checks that it is current."""

from __future__ import annotations

import inspect
import re
from itertools import groupby
from pathlib import Path

from dlbc.ir import ops
from dlbc.ir.ops import OPS, OpDef
from dlbc.ir.printer import print_attr

PAGE = Path(__file__).parent / "ir.md"
BEGIN, END = "<!-- ops: begin (python docs/generate_ops.py) -->", "<!-- ops: end -->"


def table() -> str:
    """Every op in the catalogue's order, under the headings of `dlbc/ir/ops.py`."""
    lines: list[str] = []
    for heading, entries in groupby(OPS.values(), key=_heading):
        lines += ["", f"### {heading.capitalize()}", "", "| op | operands | attributes | result |", "|---|---|---|---|"]
        lines += [f"| `{e.name}` | {_operands(e)} | {_attributes(e)} | {_summary(e)} |" for e in entries]
    return "\n".join(lines) + "\n\n"


def page(text: str) -> str:
    """`ir.md` with a current table."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + table() + END + rest.partition(END)[2]


def _heading(entry: OpDef) -> str:
    headings = [(number, match[1]) for number, line in enumerate(inspect.getsource(ops).splitlines(), 1)
                if (match := re.fullmatch(r"# --- (.*?) -+", line))]
    return [name for number, name in headings if number < entry.infer.__code__.co_firstlineno][-1]


def _operands(entry: OpDef) -> str:
    parameters = inspect.signature(entry.infer).parameters.values()
    shown = [("*" if p.kind is p.VAR_POSITIONAL else "") + p.name + ("?" if p.name in entry.optional else "")
             for p in parameters if p.kind is not p.KEYWORD_ONLY]
    return f"`{', '.join(shown)}`" if shown else ""


def _attributes(entry: OpDef) -> str:
    parameters = inspect.signature(entry.infer).parameters.values()
    return ", ".join(f"`{p.name}={print_attr(p.default)}`" if p.name in entry.attrs else f"**`{p.name}`**"
                     for p in parameters if p.kind is p.KEYWORD_ONLY)


def _summary(entry: OpDef) -> str:
    return " ".join(entry.summary.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
