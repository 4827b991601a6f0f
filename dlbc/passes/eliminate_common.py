"""Common subexpressions: the same op on the same operands is computed once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import ClassVar

from dlbc.ir.core import Attr, Graph, Kernel, Op, Operand, Value, Weight
from dlbc.passes import Pass, register
from dlbc.passes.rewrite import substitute_op, substitute_section, with_section


@register
@dataclass(frozen=True)
class EliminateCommon(Pass):
    """Keep the first of equal ops of a section and let its results stand for the others'.

    Relevance of a value that is read twice is the sum over both uses, so this leaves explanations as they
    are. An op's place is that of the first. Two results of a section stay two, even when they are equal.
    """

    name: ClassVar[str] = "eliminate_common"

    def run(self, graph: Graph) -> Graph:
        """The graph without repeated ops."""
        replaced: dict[str, Operand] = {}
        for name, section in list(graph.sections()):
            kept: list[Op | Kernel] = []
            first: dict[Hashable, Op] = {}
            returned = {v.name for v in section.results}
            for item in section.body:
                if isinstance(item, Kernel):
                    kept.append(replace(item, body=tuple(substitute_op(op, replaced) for op in item.body)))
                    continue
                op = substitute_op(item, replaced)
                same = first.setdefault(_key(op), op)
                if same is op or (name != "prepare" and any(r.name in returned for r in op.results)):
                    kept.append(op)
                else:
                    replaced |= {old.name: new for old, new in zip(op.results, same.results, strict=True)}
            section = substitute_section(replace(section, body=tuple(kept)), replaced, body=False)
            section = replace(section, results=tuple(dict.fromkeys(section.results))) if name == "prepare" else section
            graph = with_section(graph, name, section)
        return graph


def _key(op: Op) -> Hashable:
    attrs = tuple(sorted((name, _typed(value)) for name, value in op.attrs.items()))
    paired = op.of if op.rule is not None else ""  # a rule belongs to its forward op; what it expands into does not
    return (op.name, tuple(map(_identity, op.operands)), tuple(map(_identity, op.reads)), attrs, op.rule, paired)


def _identity(operand: Operand) -> Hashable:
    if isinstance(operand, (Value, Weight)):
        return type(operand).__name__, operand.name
    return _typed(operand)


def _typed(attr: Attr | Operand) -> Hashable:
    """1, 1.0 and True are equal in Python, but not in the IR."""
    if isinstance(attr, tuple):
        return "tuple", *map(_typed, attr)
    return type(attr).__name__, str(attr)
