"""Text of a graph: `print_graph`. Deterministic, and `parser.parse_graph` reads the same graph back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from dlbc.ir.core import Attr, Attrs, Function, Graph, Kernel, Op, Operand, Rule, Section, Value, Weight
from dlbc.ir.dims import Sym
from dlbc.ir.syntax import RULE_PARAMETERS, quoted, quoted_place, word

WIDTH = 110
ALIGNED = 88
"""Ops whose text is longer do not push the types of the others to the right."""
NAMED = 12
"""Results whose names are longer do not push the `=` of the others to the right."""


def print_graph(graph: Graph) -> str:
    """The text of a graph: header, weights, functions, sections, locations. Ends with a newline."""
    dims = ", ".join(f"{name}: {low}..{high}" for name, (low, high) in graph.dims.items())
    parts = [f"graph @{quoted(graph.name)}{f'({dims})' if dims else ''}{_attrs(graph.attrs)}"]
    if graph.weights:
        parts.append(_table("weights", [(f"@{quoted(w.name)}", str(w.type)) for w in graph.weights.values()]))
    parts += [_function(function) for function in graph.functions.values()]
    if graph.prepare != Section():
        parts.append(_section("prepare", graph.prepare))
    parts.append(_section("forward", graph.forward))
    if graph.relevance is not None:
        parts.append(_section("relevance", graph.relevance))
    if graph.locations:
        parts.append(_table("locations", [
            (f"#{quoted_place(place)}", word(at.cls) + (f" {json.dumps(at.source)}" if at.source else ""))
            for place, at in graph.locations.items()]))
    return "\n\n".join(parts) + "\n"


def print_op(op: Op) -> str:
    """One op on one line, as it stands in its section."""
    results, body, types, place = _op(op)
    return f"{results} = {body} : {types}{place and '  ' + place}"


def print_attr(value: Attr) -> str:
    """A literal: `1`, `1e-05`, `true`, `none`, `"tanh"`, `T//2`, `[1,2]`. Reads back exactly."""
    if value is True or value is False:
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{','.join(map(print_attr, value))}]"
    if isinstance(value, str):
        return json.dumps(value)
    if value is None:
        return "none"
    if isinstance(value, Sym):
        return str(value).replace(" ", "")
    return float.__repr__(value) if isinstance(value, float) else int.__repr__(value)


def print_operand(operand: Operand) -> str:
    """What an op reads: `%value`, `@weight`, a literal, or `none`; a size that is a sum in parentheses."""
    if isinstance(operand, Value):
        return f"%{quoted(operand.name)}"
    if isinstance(operand, Weight):
        return f"@{quoted(operand.name)}"
    text = print_attr(operand)
    return f"({text})" if isinstance(operand, Sym) and not text.isidentifier() else text


def _function(function: Function) -> str:
    header = f"function @{quoted(function.name)}({_params(function.params)}) {{"
    return _block(header, function.body, function.results, ())


def _section(name: str, section: Section) -> str:
    params = f"({_params(section.params)})" if section.params or name != "prepare" else ""
    return _block(f"{name}{params} {{", section.body, section.results, section.saves)


def _block(header: str, body: Sequence[Op | Kernel], results: Sequence[Value], saves: Sequence[Value]) -> str:
    words = ["return", *_listed(results)]
    if saves:
        words += ["save", *_listed(saves)]
    return "\n".join([header, *_body(body, "  "), *_wrapped(words, "  "), "}"])


def _params(params: Iterable[Value | Weight]) -> str:
    return ", ".join(f"{print_operand(param)} : {param.type}" for param in params)


def _listed(values: Sequence[Value]) -> list[str]:
    """`%a,` `%b,` `%c`: the words of a list of values."""
    names = [print_operand(value) for value in values]
    return [f"{name}," for name in names[:-1]] + names[-1:]


def _wrapped(words: Sequence[str], indent: str) -> list[str]:
    lines, line = [], indent + words[0]
    for part in words[1:]:
        if len(line) + len(part) >= WIDTH:
            lines.append(line)
            line = indent + "   "
        line += f" {part}"
    return [*lines, line]


def _body(body: Sequence[Op | Kernel], indent: str) -> list[str]:
    lines: list[str] = []
    run: list[Op] = []
    for item in body:
        if isinstance(item, Op):
            run.append(item)
            continue
        lines += _aligned(run, indent)
        run = []
        config = ", ".join(f"{word(key)}={print_attr(value)}" for key, value in item.config.items())
        lines.append(f"{indent}kernel @{quoted(item.name)} on {word(item.template)}"
                     f"{f'({config})' if config else ''} {{")
        lines += _aligned(item.body, indent + "  ")
        lines += _wrapped(["} ->", *_listed(item.results)], indent)
    return lines + _aligned(run, indent)


def _aligned(ops: Sequence[Op], indent: str) -> list[str]:
    """Ops with their names, types and places in columns."""
    parts = [_op(op) for op in ops]
    name = max((len(results) for results, *_ in parts if len(results) <= NAMED), default=0)
    rows = [(f"{results:<{name}} = {body}", types, place) for results, body, types, place in parts]
    left = max((len(row[0]) for row in rows if len(row[0]) <= ALIGNED), default=0)
    middle = max((len(row[1]) for row in rows if len(row[0]) <= ALIGNED and "," not in row[1].partition("]")[2]),
                 default=0)
    return [f"{indent}{text:<{left}} : {types:<{middle if place else 0}}{place and '  ' + place}"
            for text, types, place in rows]


def _op(op: Op) -> tuple[str, str, str, str]:
    """An op's results, what computes them, their types, its place."""
    results = ", ".join(f"%{quoted(result.name)}" for result in op.results)
    callee = op.attrs.get("function")
    target, attrs = "", op.attrs
    if isinstance(callee, str):
        target = f" @{quoted(callee)}"
        attrs = {key: value for key, value in attrs.items() if key != "function"}
    operands = ", ".join(map(print_operand, op.operands))
    if op.reads:
        operands += "; " + ", ".join(map(print_operand, op.reads))
    return (results, f"{word(op.name)}{_rule(op.rule) if op.rule else ''}{target}({operands})"
            f"{_attrs(attrs) if attrs else ''}{f' of %{quoted(op.of)}' if op.of else ''}",
            ", ".join(str(result.type) for result in op.results),
            f"#{quoted_place(op.place)}" if op.place else "")


def _rule(rule: Rule) -> str:
    names = tuple(name for name, _ in rule.params)
    if names == RULE_PARAMETERS.get(rule.name, ())[:len(names)]:
        params = ", ".join(print_attr(value) for _, value in rule.params)
    else:
        params = ", ".join(f"{word(name)}={print_attr(value)}" for name, value in rule.params)
    return f"<{word(rule.name) if rule.name or not params else ''}{f'({params})' if params else ''}>"


def _attrs(attrs: Attrs) -> str:
    if not attrs:
        return ""
    return f" {{{', '.join(f'{word(key)}={print_attr(value)}' for key, value in attrs.items())}}}"


def _table(name: str, rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(left) for left, _ in rows)
    return "\n".join([f"{name} {{", *(f"  {left:<{width}} : {right}" for left, right in rows), "}"])
