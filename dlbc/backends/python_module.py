"""What the torch and numpy backends share: from a graph to a Python module, given a `Dialect`.

Each section is one Python function, each value a local variable that is deleted after its last use.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from dlbc.backends.liveness import KERNEL, deaths, reusable, whole
from dlbc.backends.names import Names, assigned, deleted, is_size, listed, literal, tuple_of
from dlbc.backends.site import Dialect, Expression, Scope, Site
from dlbc.errors import IRError, UnsupportedOpError
from dlbc.ir.core import Attr, Function, Graph, Kernel, Op, Section, Value, Weight, values
from dlbc.ir.dims import Sym
from dlbc.ir.ops import OPS

SECTIONS = {
    "prepare": "Values that depend on the weights alone.",
    "forward": "The model's outputs, and what `relevance` needs of this run.",
    "relevance": "Relevance of the inputs for S seeds; it empties `state`.",
}


@dataclass(frozen=True)
class PythonFunction:
    """A Python function as text; `sizes` and `weights` are what a called function asks its caller for.

    `inner`: it is called by others of the module, which have what the dialect's decorators give.
    """

    name: str
    params: tuple[str, ...]
    summary: str
    lines: tuple[str, ...]
    sizes: tuple[str, ...] = ()
    weights: bool = False
    inner: bool = False

    @property
    def header(self) -> list[str]:
        """`def name(parameters):`"""
        return listed(self.params, f"def {self.name}(", "):")


def emit_module(graph: Graph, dialect: Dialect) -> str:
    """The source of the module of a graph. UnsupportedOpError names an op that the dialect cannot write."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    given: list[Value | Weight] = [*graph.weights.values()]
    given += [param for _, section in graph.sections() for param in section.params]
    for each in given:
        dialect.dtype(each.type.dtype, str(each))
    module = _Module(graph, dialect)
    relevance = module.relevance()
    functions = [module.prepare(), module.forward()] + ([relevance] if relevance else [])
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=False,
                              undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return environment.get_template("module.py.jinja").render(
        title=f"The explainer of `{graph.name}`", backend=dialect.name, imports=dialect.imports,
        kernels=dialect.joined(list(module.kernels)),
        constants=_constants(graph) | module.numbers, functions=[*module.functions.values(), *functions],
        decorators=dialect.decorators)


def _constants(graph: Graph) -> dict[str, str]:
    sections = graph.relevance or Section()

    def names(stated: Attr, found: Sequence[Value]) -> str:
        named = isinstance(stated, tuple) and len(stated) == len(found)
        return literal(stated if named else tuple(value.name for value in found))

    return {"INPUTS": names(graph.attrs.get("inputs"), graph.forward.params),
            "OUTPUTS": names(graph.attrs.get("outputs"), graph.forward.results),
            "SEEDS": names(None, sections.params), "RELEVANCE": names(None, sections.results)}


class _Module:
    """The functions of one module, and what they hand to each other."""

    def __init__(self, graph: Graph, dialect: Dialect) -> None:
        self.graph, self.dialect = graph, dialect
        self.functions: dict[str, PythonFunction] = {}
        self.numbers: dict[str, str] = {}
        self.kernels: dict[str, None] = {}  # functions that kernels are written as, each once
        self.definitions = {name: op for _, section in graph.sections() for name, op in section.definitions().items()}
        sizes = {*graph.dims, *_all_sizes(graph), *dialect.reserved}
        self.made = frozenset(_made(item for _, section in graph.sections() for item in section.body))
        self.module_names = Names(sizes)
        self.taken = {*sizes, *(self.module_names[name] for name in graph.functions)}
        self.names = Names(self.taken)
        self.prepared = {value.name for value in graph.prepare.results}
        self.state: list[str] = []  # sizes and values that relevance asks forward for, in order
        self.state_sizes: tuple[str, ...] = ()

    def scope(self, names: Names, parameters: frozenset[str] = frozenset(),
              definitions: Mapping[str, Op] | None = None, made: frozenset[str] | None = None) -> Scope:
        """A function to be written; `definitions`, and what kernels have made, are those of the graph unless given."""
        known = self.definitions if definitions is None else definitions
        return Scope(self.graph, self.dialect, names, parameters, known, made=self.made if made is None else made,
                     numbers=self.numbers)

    def prepare(self) -> PythonFunction:
        """`prepare(w)`: what depends on the weights alone."""
        section, scope = self.graph.prepare, self.scope(self.names)
        body = self.body(section.body, {v.name for v in section.results}, (), scope)
        head = self.head(scope, ())
        results = listed([self.names[v.name] for v in section.results], "return (", ")")
        return PythonFunction("prepare", ("w",), SECTIONS["prepare"], (*head, *body, *results))

    def forward(self) -> PythonFunction:
        """`forward(w, p, ...)`: the outputs, and the state that relevance takes apart."""
        section, scope = self.graph.forward, self.scope(self.names)
        saved = [name for name in self.state if name not in self.state_sizes]
        keep = {*saved, *(v.name for v in section.results)}
        params = [v.name for v in section.params]
        body = self.body(section.body, keep, params, scope)
        scope.sizes |= dict.fromkeys(self.state_sizes)
        known = {*params, *self.prepared, *(r.name for op in section.ops for r in op.results)}
        for name in sorted(keep - known):
            raise IRError(f"`%{name}` is read in the relevance section and defined nowhere")
        head = [*self.unpacked(section, section.results), *self.head(scope, section.params)]
        outputs = ", ".join(self.names[v.name] for v in section.results)
        outputs += "," if len(section.results) == 1 else ""
        state = listed([*self.state_sizes, *(self.names[name] for name in saved)], "state = [", "]")
        return PythonFunction("forward", ("w", "p", *(self.names[name] for name in params)),
                              SECTIONS["forward"], (*head, *body, *state, f"return ({outputs}), state"))

    def relevance(self) -> PythonFunction | None:
        """`relevance(w, p, state, ...)`; it decides what the state holds, so it is written first."""
        section = self.graph.relevance
        if section is None:
            return None
        scope, seeds = self.scope(self.names), [v.name for v in section.params]
        own = {*seeds, *(r.name for op in section.ops for r in op.results)}
        read = [v.name for v in chain(*(values(op.inputs) for op in section.ops), section.results)]
        saved = [name for name in dict.fromkeys(read) if name not in own and name not in self.prepared]
        order = {v.name: i for i, v in enumerate(self.graph.forward.saves)}
        saved.sort(key=lambda name: order.get(name, len(order)))
        body = self.body(section.body, {v.name for v in section.results}, [*seeds, *saved], scope)
        forward = _bindable(self.graph.forward.params)
        self.state_sizes = tuple(size for size in scope.sizes if size in forward)
        self.state = [*self.state_sizes, *saved]
        head = [*self.unpacked(section, section.results),
                *assigned([*self.state_sizes, *(self.names[name] for name in saved)], "state"),
                "state.clear()", *self.head(scope, section.params, known=self.state_sizes)]
        results = listed([self.names[v.name] for v in section.results], "return (", ")")
        return PythonFunction("relevance", ("w", "p", "state", *(self.names[name] for name in seeds)),
                              SECTIONS["relevance"], (*head, *body, *results))

    def unpacked(self, section: Section, results: Iterable[Value]) -> list[str]:
        """`p0, _ = p`, for the prepared values that a section reads."""
        read = {v.name for v in chain(*(values(op.inputs) for op in section.ops), results)}
        names = [self.names[v.name] if v.name in read else "_" for v in self.graph.prepare.results]
        return assigned(names, "p") if any(name != "_" for name in names) else []

    def head(self, scope: Scope, params: Sequence[Value | Weight], *,
             known: Iterable[str] = ()) -> list[str]:
        """Lines that bind the sizes and the device that the body needs."""
        lines, missing = [], [size for size in scope.sizes if size not in set(known)]
        for param in params:
            lines += _sizes_of(param, scope.operand(param), missing) if isinstance(param, Value) else []
        if missing:
            raise IRError(f"the size of dimension `{missing[0]}` is not known",
                          hint="each size must be a dimension of some parameter by itself")
        if scope.device:
            lines.append(f"device = {self.device(params, scope)}")
        return lines

    def device(self, params: Sequence[Value | Weight], scope: Scope) -> str:
        """The device of the first parameter, else of some weight."""
        if params:
            source = scope.operand(params[0])
        elif self.graph.weights:
            source = f"w[{literal(next(iter(self.graph.weights)))}]"
            scope.weights = True
        else:
            return self.dialect.no_device
        return self.dialect.device.format(source)

    def call(self, site: Site, dying: Collection[str]) -> list[str]:
        """A call of one of the graph's functions, which is written at its first call.

        Values are handed over in a list that the function empties: those in `dying`, which the caller reads no more,
        are then freed as early in the function as they would be outside of it.
        """
        name = str(site.op.attrs.get("function"))
        if name not in self.graph.functions:
            raise IRError(f"the graph has no function `@{name}`", where=f"#{site.op.place}",
                          hint=f"it has {', '.join(self.graph.functions) or 'none'}")
        if name not in self.functions:
            self.functions[name] = self.function(self.graph.functions[name])
        function = self.functions[name]
        site.scope.sizes |= dict.fromkeys(function.sizes)
        site.scope.weights = site.scope.weights or function.weights
        streamed = site.op.name == "stream"
        bound = [name for name, o in zip(site.args(), site.op.operands, strict=True)
                 if isinstance(o, Weight) and not streamed]
        given = [name for name in site.args() if name not in bound]
        dead = [site.scope.names[v.name] for v in dict.fromkeys(values(site.op.operands)) if v.name in dying]
        results = [site.scope.names[result.name] for result in site.op.results]
        arguments = ["w"] * function.weights + ["given"] * bool(given) + bound + list(function.sizes)
        called = listed(arguments, f"{function.name}(", ")")
        if streamed:
            how = [f"{key}={site.scope.text(value)}" for key, value in site.op.attrs.items() if key != "function"]
            how += [f"sizes={tuple_of(function.sizes)}"] if function.sizes else []
            called = listed([function.name, "given", *how], "kernels.stream(", ")")
        return [*(listed(given, "given = [", "]") if given else []), *deleted(dead),
                *assigned(results, called[0]), *called[1:]]

    def function(self, function: Function) -> PythonFunction:
        """A repeated block: its parameters, then the sizes that their shapes do not tell."""
        names = Names(self.taken)
        weights = frozenset(p.name for p in function.params if isinstance(p, Weight))
        params = tuple(p for p in function.params if isinstance(p, Value))
        bound = [names[f"@{p.name}"] for p in function.params if isinstance(p, Weight)]
        ops = Section(body=function.body).definitions()
        scope = self.scope(names, weights, ops, frozenset(_made(function.body)))
        body = self.body(function.body, {v.name for v in function.results}, [p.name for p in params], scope)
        extra = tuple(size for size in scope.sizes if size not in _bindable(params))
        head = self.head(scope, params or function.params, known=extra)
        given = [*assigned([names[p.name] for p in params], "given"), "given.clear()"] if params else []
        results = listed([names[v.name] for v in function.results], "return (", ")")
        summary = f"The block `{function.name}`" + ("; it empties `given`." if params else ".")
        return PythonFunction(self.module_names[function.name],
                              (*(["w"] * scope.weights), *(["given"] * bool(params)), *bound, *extra), summary,
                              (*given, *head, *body, *results), extra, scope.weights, inner=True)

    def body(self, items: Sequence[Op | Kernel], keep: set[str], own: Sequence[str],
             scope: Scope) -> list[str]:
        """The lines of a section's ops; `own` are the parameters that may be deleted."""
        written = self.written(items, scope)
        items = [whole(item) if isinstance(item, Kernel) and item.name in written else item for item in items]
        ops = [op for item in items for op in (item.body if isinstance(item, Kernel) else (item,))]
        dying = deaths(ops, keep, own)
        reused = reusable(ops, dying, keep, self.dialect.overwriting)
        titles, launches = _titles(items), iter(written.values())
        lines, place = [], ""
        for number, op in enumerate(ops):
            if number in titles:
                lines.append(titles[number])
            if op.place and op.place != place:
                lines.append(f"# {op.place}")
                place = op.place
            over = dying[number]
            if op.name in ("call", "stream"):
                lines += self.call(Site(op, scope), over)
                handed = {v.name for v in values(op.operands)}
                over = [name for name in over if name not in handed]
            elif op.name == KERNEL:
                lines += next(launches)
            else:
                lines.append(self.line(op, reused.get(number), scope))
            lines += deleted([scope.names[name] for name in over])
        return lines

    def written(self, items: Sequence[Op | Kernel], scope: Scope) -> dict[str, tuple[str, ...]]:
        """The lines that launch kernels, by kernel, of those that the dialect writes as one; their functions are
        noted."""
        found: dict[str, tuple[str, ...]] = {}
        for item in items:
            if not isinstance(item, Kernel) or self.dialect.kernel is None:
                continue
            title, made = f"# kernel {item.name} ({item.template})", self.dialect.kernel(item, scope)
            if made is None:
                found[item.name] = (f"{title}, op by op", *self.opened(item, scope))
            else:
                self.kernels |= {made[0]: None}
                found[item.name] = (title, "try:", *_inner(made[1]),
                                    "except KernelError:", *_inner(self.opened(item, scope)))
        return found

    def opened(self, kernel: Kernel, scope: Scope) -> list[str]:
        """The ops of a kernel one by one, where there is no code for it, or that does not compile, or does not pay. The
        results lie in memory as a kernel's would."""
        keep = {result.name for result in kernel.results}
        dying = deaths(kernel.body, keep, ())
        reused = reusable(kernel.body, dying, keep, self.dialect.overwriting)
        lines: list[str] = []
        for number, op in enumerate(kernel.body):
            lines += self.call(Site(op, scope), ()) if op.name in ("call", "stream") else [
                self.line(op, reused.get(number), scope)]
            lines += deleted([scope.names[name] for name in dying[number]])
        dense = [f"{scope.names[r.name]} = {scope.names[r.name]}.contiguous()" for r in kernel.results
                 if r.type.rank]
        return [*lines, *dense]

    def line(self, op: Op, reused: int | None, scope: Scope) -> str:
        """`results = expression` of one op."""
        table = self.dialect.table if reused is None else self.dialect.overwriting
        if reused:
            op = replace(op, operands=(op.operands[reused], *op.operands[:reused], *op.operands[reused + 1:]))
        site = Site(op, scope)
        for result in op.results:
            site.dtype(result.type.dtype)
        right = _written(self.expression(op, table), site)
        return f"{', '.join(scope.names[result.name] for result in op.results)} = {right}"

    def expression(self, op: Op, table: Mapping[str, Expression]) -> Expression:
        """How the dialect writes an op. UnsupportedOpError where it does not."""
        if op.name not in table:
            known = OPS.get(op.name)
            hint = (f"lower the graph first: `{op.name}` is no primitive" if op.name.startswith("rel.") else
                    f"add it to the table in dlbc/backends/{self.dialect.name}/: {known.summary}" if known
                    else "the catalogue is dlbc/ir/ops.py")
            raise UnsupportedOpError(f"the {self.dialect.name} backend has no code for `{op.name}`",
                                     where=f"#{op.place}", hint=hint)
        return table[op.name]


def _written(expression: Expression, site: Site) -> str:
    text = expression.format_map(site) if isinstance(expression, str) else expression(site)
    operands = site.op.operands
    if operands and OPS[site.op.name].elementwise and not any(map(site.tensor, range(len(operands)))):
        text = site.dialect.scalar.format(text, site.dtype(site.result.dtype), site.device())
    return text


def _inner(lines: Iterable[str]) -> Iterable[str]:
    return (f"    {line}" for line in lines)


def _made(items: Iterable[Op | Kernel]) -> Iterable[str]:
    """The names of what kernels compute for others."""
    return (result.name for item in items if isinstance(item, Kernel) for result in item.results)


def _titles(items: Sequence[Op | Kernel]) -> dict[int, str]:
    titles, number = {}, 0
    for item in items:
        if isinstance(item, Kernel):
            titles[number] = f"# kernel {item.name} ({item.template})"
            number += len(item.body)
        else:
            number += 1
    return titles


def _sizes_of(param: Value, text: str, missing: list[str]) -> list[str]:
    """Lines that bind the sizes in `missing` that a parameter's shape tells; they leave the list."""
    found: list[str] = []
    for dim in param.type.shape:
        told = is_size(dim) and str(dim) in missing
        found.append(str(dim) if told else "_")
        if told:
            missing.remove(str(dim))
    told_at = [i for i, name in enumerate(found) if name != "_"]
    if len(told_at) == 1:
        return [f"{found[told_at[0]]} = {text}.shape[{told_at[0]}]"]
    return [f"{', '.join(found)} = {text}.shape"] if told_at else []


def _bindable(params: Iterable[Value]) -> set[str]:
    return {str(dim) for param in params for dim in param.type.shape if is_size(dim)}


def _all_sizes(graph: Graph) -> set[str]:
    sections = [section for _, section in graph.sections()]
    params = [p for section in sections for p in section.params]
    params += [p for f in graph.functions.values() for p in f.params if isinstance(p, Value)]
    return {str(dim) for param in params for dim in param.type.shape if isinstance(dim, Sym) and is_size(dim)}
