"""A PyTorch model as a level-0 graph, by torch.export.

The model is captured in eval mode, functionalised (if need be) but not decomposed (`run_decompositions({})`), with
batch and sequence sizes free. Its training flags are put back; nothing else of it changes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import Dim as ExportDim
from torch.export import ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind

from dlbc.errors import DlbcError, ExportError, IRError
from dlbc.frontends.aten_complex import Pair
from dlbc.frontends.expert_capture import portable_experts
from dlbc.frontends.expert_rows import NotByRow
from dlbc.frontends.failures import brief, elsewhere, explained
from dlbc.frontends.in_place import exchange_in_place
from dlbc.frontends.inputs import (
    Args,
    Axes,
    Dynamic,
    Kwargs,
    Signature,
    dynamic_axes,
    enlarged,
    injected,
    input_spec,
    mapped,
    normalise,
    role,
    tensors,
    text_shape,
    value_name,
)
from dlbc.frontends.loop_capture import ExpertLoops, by_content, drop_assumptions, expert_loops
from dlbc.frontends.quiet import evaluating, quiet
from dlbc.frontends.recurrent_capture import recurrent_layers
from dlbc.frontends.registered_capture import check_registered, registered_forwards
from dlbc.frontends.sizes import Sizes
from dlbc.frontends.translate import Translation, unknown, weight_operand
from dlbc.ir.core import Graph, Operand, Section, Type, Value, Weight
from dlbc.ir.dims import evaluate, symbols
from dlbc_runtime.signature import UNBOUNDED, Constant, Container, InputSpec, OutputSpec, TensorSpec, Tree, holds

__all__ = ["Imported", "evaluating", "import_model", "normalise"]

log = logging.getLogger(__name__)

_ROUNDS = 5
"""How often operators without a handler are decomposed: what one decomposes into may need it again."""


@dataclass(frozen=True)
class Imported:
    """A captured model: level-0 graph, references to its tensors by weight name, how calls and results map.

    `static` names axes that were asked to be dynamic but are not, `"input_ids.1"`, with the reason.
    """

    graph: Graph
    weights: dict[str, Tensor]
    inputs: InputSpec
    outputs: OutputSpec
    static: dict[str, str] = field(default_factory=dict)


def import_model(model: nn.Module, args: Args, kwargs: Mapping[str, Any], *, dynamic: Dynamic = True) -> Imported:
    """Capture a model on example inputs. `dynamic`: True for batch and sequence, False for nothing, or axes by
    input name. Raises InputError (examples), ExportError (capture) and UnsupportedOpError (operators)."""
    signature = Signature.of(model)
    added = injected(model, signature, args, kwargs)
    bound = signature.bind(args, {**kwargs, **added})
    named = {path: x for name, value in bound.items() for path, x in tensors(value, name)}
    if not named:
        raise ExportError("the example inputs hold no tensor", hint="give the inputs that the model runs on")
    capture = _Capture(model, signature, bound, named)
    with quiet(), torch.no_grad(), evaluating(model):
        capture.check()
        try:
            return _read(capture, dynamic_axes(named, dynamic), tuple(added))
        except DlbcError as problem:
            raise elsewhere(problem, model) from problem.__cause__


def _read(capture: _Capture, axes: Axes, added: tuple[str, ...]) -> Imported:
    """The model with as many of these axes dynamic as its program can be read with: of sizes that a model cuts into
    chunks, the IR may not be able to say which are equal."""
    fixed: dict[str, str] = {}
    first: IRError | None = None
    while True:
        try:
            program, sizes, static = capture.run(axes)
        except DlbcError:
            if first is not None:
                raise first from first.__cause__  # it says more than what fails with fewer dynamic axes
            raise
        try:
            return _imported(capture, program, sizes, fixed | static, added)
        except IRError as problem:
            first = first or problem
            axes = {name: tuple(axis for axis in own if f"{name}.{axis}" not in static) for name, own in axes.items()}
            fewer = _more_static({name: own for name, own in axes.items() if own})
            if fewer is None or not (fixed or any("%" in condition for condition in sizes.conditions)):
                raise first from first.__cause__
            fixed |= static
            for name, axis in _missing(axes, fewer):
                fixed[f"{name}.{axis}"] = f"the captured program cannot be read with it dynamic: {brief(problem)}"
                log.info("axis %d of input `%s` is static: %s", axis, name, fixed[f"{name}.{axis}"])
            axes = fewer


@dataclass
class _Capture:
    """The attempts to export one model, each with the axes that are still dynamic."""

    model: nn.Module
    signature: Signature
    bound: dict[str, Any]
    named: dict[str, Tensor]
    examples: dict[str, Tensor] = field(default_factory=dict)
    loops: int = 0

    def run(self, axes: Axes) -> tuple[ExportedProgram, Sizes, dict[str, str]]:
        """The program, names of its sizes, and the axes that had to become static with the reasons."""
        static: dict[tuple[str, int], str] = {}
        while True:
            try:
                program = self.export(axes)
            except Exception as problem:  # the model's own code runs in there: it may raise anything
                fewer = _more_static(axes)
                if fewer is None:
                    raise explained(problem, self.model) from problem
                gone = dict.fromkeys(_missing(axes, fewer), f"the capture failed with it dynamic: {brief(problem)}")
            else:
                sizes, fixed = self.sizes(program, axes)
                static |= fixed
                gone = {key: reason for key, reason in fixed.items() if not self.kept(program, *key)}
                gone |= {} if gone else self.conditions(program, sizes, axes)
                gone |= {} if gone else self.singles(program, sizes, axes)
                if not gone:
                    self.compare_loops(program)
                    for (name, axis), reason in static.items():
                        log.info("axis %d of input `%s` is static: %s", axis, name, reason)
                    return program, sizes, {f"{name}.{axis}": reason for (name, axis), reason in static.items()}
                fewer = _without(axes, gone)
            static |= {key: reason for key, reason in gone.items() if key not in static}
            axes = fewer

    def check(self) -> None:
        """ExportError where the model has a registered forward that does not do what its module does."""
        def run() -> None:
            args, kwargs = self.call(self.bound)
            try:
                self.model(*args, **kwargs)
            except ExportError:
                raise
            except Exception as problem:
                raise explained(problem, self.model) from problem

        check_registered(self.model, run)

    def export(self, axes: Axes) -> ExportedProgram:
        """One attempt."""
        self.examples = enlarged(self.named, axes)
        values = {name: mapped(value, name, lambda path, _: self.examples[path]) for name, value in self.bound.items()}
        args, kwargs = self.call(values)
        shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
        for name, own in axes.items():
            shapes[self.examples[name]] = dict.fromkeys(own, ExportDim.AUTO)
        spec = shapes.dynamic_shapes(self.model, args, kwargs) if axes else None
        return self.traced(args, kwargs, spec)

    def traced(self, args: Args, kwargs: Kwargs, spec: Any) -> ExportedProgram:
        """The exporter's program. Where something depends on data, loops over experts are followed in a second try,
        and in a third one each expert is taken to have rows."""
        attempts: list[Callable[[], AbstractContextManager[ExpertLoops | None]]] = [
            nullcontext, expert_loops, partial(expert_loops, True)]
        first: Exception | None = None
        while True:
            try:
                with (portable_experts(self.model), registered_forwards(self.model), recurrent_layers(self.model),
                      attempts.pop(0)() as loops):
                    program = torch.export.export(self.model, args, kwargs, dynamic_shapes=spec, strict=False)
            except Exception as problem:
                first = first or problem
                if not attempts or not by_content(problem):
                    raise problem if isinstance(problem, NotByRow) else first from None
                continue
            self.loops = 0 if loops is None else loops.joined
            if loops is not None or not any(map(by_content, program.range_constraints)):
                return _functional(program, drop_assumptions if self.loops else None)

    def call(self, values: Mapping[str, Any]) -> tuple[Args, Kwargs]:
        """Values by parameter as a call: all by name, except what `*args` forces to be positional."""
        surplus = values.get(self.signature.variadic, ()) if self.signature.variadic else ()
        first = self.signature.positional if surplus else ()
        args = (*(values[name] for name in first), *surplus)
        return args, {k: v for k, v in values.items() if k not in first and k != self.signature.variadic}

    def sizes(self, program: ExportedProgram, axes: Axes) -> tuple[Sizes, dict[tuple[str, int], str]]:
        """Names of the program's symbols; and the dynamic axes that are not plain symbols, with the reason."""
        sizes, fixed = Sizes(), dict[tuple[str, int], str]()
        fakes = self.fakes(program)
        wanted = [(role(name, self.named[name], axis), name, axis) for name, own in axes.items() for axis in own]
        wanted.sort(key=lambda entry: ("B", "T", "").index(entry[0]))
        free, examples = 0, dict[str, int]()
        for kind, name, axis in wanted:
            expression = _expression(fakes[name].shape[axis])
            if expression is None or not expression.is_Symbol or str(expression) in sizes.names:
                continue
            example = self.examples[name].shape[axis]
            ours = kind if kind and examples.setdefault(kind, example) == example else ""
            if not ours:
                ours, free = f"s{free}", free + 1
            sizes.add(expression, ours, _bounds(program, expression))
        for _, name, axis in wanted:
            expression = _expression(fakes[name].shape[axis])
            if expression is None:
                fixed[name, axis] = f"the model takes no other size than {int(fakes[name].shape[axis])} there"
            elif any(str(symbol) not in sizes.names for symbol in expression.free_symbols):
                fixed[name, axis] = f"the model takes only sizes of the form {expression} there"
        return sizes, fixed

    def kept(self, program: ExportedProgram, name: str, axis: int) -> bool:
        """Whether a static axis has the size of the user's example."""
        size = self.fakes(program)[name].shape[axis]
        return _expression(size) is None and int(size) == self.named[name].shape[axis]

    def conditions(self, program: ExportedProgram, sizes: Sizes, axes: Axes) -> dict[tuple[str, int], str]:
        """What the program takes for granted of its sizes besides their ranges (the model asked `B % 2 == 0`) becomes
        `sizes.conditions`. The axes of those that the user's example does not meet, or that have no text."""
        fakes, found = self.fakes(program), dict[tuple[str, int], str]()
        environment: Any = next((x.fake_mode.shape_env for x in fakes.values() if hasattr(x, "fake_mode")), None)
        symbols_of = {(name, axis): _expression(fakes[name].shape[axis]) for name, own in axes.items() for axis in own}
        for guard in environment.guards if environment is not None else ():
            asked = environment.simplify(guard.expr)
            inside = {str(symbol) for symbol in asked.free_symbols}
            always = environment._maybe_evaluate_static(asked, axioms=())
            if (always is not None and bool(always)) or not inside or not inside <= sizes.names.keys():
                continue
            own = {key: self.named[key[0]].shape[key[1]] for key, expression in symbols_of.items()
                   if expression is not None and str(expression) in inside}
            try:
                condition = sizes.condition(asked)
                met = holds(condition, {sizes.names[str(symbols_of[key])]: size for key, size in own.items()})
            except DlbcError:
                condition, met = str(asked), False
            if not met or _pins(asked, condition, {sizes.names[symbol] for symbol in inside}):
                found |= dict.fromkeys(own, f"the capture holds for sizes with {condition} only")
            elif condition not in sizes.conditions:
                sizes.conditions.append(condition)
        return found

    def singles(self, program: ExportedProgram, sizes: Sizes, axes: Axes) -> dict[tuple[str, int], str]:
        """The axes of size 1 in the user's example that the model does not treat like other sizes. The exporter
        knows sizes from 2 on only, so the model itself is asked: a size whose 1 changes the shapes of the outputs,
        gives other numbers than the program, or fails, starts at 2."""
        found: dict[tuple[str, int], str] = {}
        count = len(program.graph_signature.user_outputs)
        expected = [output.meta["val"] for output in pytree.tree_leaves(program.graph.output_node().args[0])[-count:]
                    if isinstance(output, torch.fx.Node) and isinstance(output.meta["val"], Tensor)]
        try:
            types = [sizes.type(fake) for fake in expected]
        except ExportError:  # sizes that depend on the data: the translation names the operator
            return found
        fakes = self.fakes(program)
        named = {(name, axis): str(sizes.dim(fakes[name].shape[axis])) for name, mine in axes.items() for axis in mine}
        for size, (low, high) in list(sizes.ranges.items()):
            own = [key for key, ours in named.items() if ours == size]
            sample = {ours: 1 if ours == size else self.examples[name].shape[axis]
                      for (name, axis), ours in named.items()}
            if low > 1 or self.agrees(program, own, [_shape(type_, sample) for type_ in types]):
                continue
            sizes.ranges[size] = (2, high)
            found |= {key: "the model treats a size of 1 unlike others" for key in own
                      if self.named[key[0]].shape[key[1]] == 1}
        return found

    def compare_loops(self, program: ExportedProgram) -> None:
        """ExportError where the model has loops over experts that do more than their captured forms (CPU only)."""
        if self.loops and not self.agrees(program, [], None):
            raise ExportError("loops over experts were captured for all experts at once, but what comes out is not "
                              "what the model gives on the example inputs", where=type(self.model).__name__,
                              hint="something else than the experts' sum depends on which experts have rows; register "
                                   "an equivalent: `dlbc.register_moe` (docs/moe_models.md)")

    def agrees(self, program: ExportedProgram, own: list[tuple[str, int]], shapes: list[tuple[int, ...]] | None
               ) -> bool:
        """Whether the model's outputs have these shapes, and are the program's, where it is given 1 for its `own`
        axes. Asked on the CPU only: elsewhere a failure could not be undone. The model's experts run as they are
        captured: the user's setting may be one that this machine cannot run, which says nothing about sizes."""
        if any(x.device.type != "cpu" for x in (*self.examples.values(), *self.model.parameters())):
            return True
        narrow = dict(self.examples)
        for name, axis in own:
            narrow[name] = narrow[name].narrow(axis, 0, 1)
        values = {name: mapped(value, name, lambda path, _: narrow[path]) for name, value in self.bound.items()}
        args, kwargs = self.call(values)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with portable_experts(self.model), recurrent_layers(self.model):
                    own = self.model(*args, **kwargs)
                runs = (own, program.module(check_guards=False)(*args, **kwargs))
        except Exception as problem:
            log.debug("the model fails for size 1: %s", brief(problem))
            return False
        outputs, captured = ([x for x in pytree.tree_leaves(run) if isinstance(x, Tensor)] for run in runs)
        found = [tuple(x.shape) for x in outputs]
        return shapes in (None, found) and len(outputs) == len(captured) and all(map(_close, outputs, captured))

    def fakes(self, program: ExportedProgram) -> dict[str, Tensor]:
        """The exporter's fake tensors of the inputs by our names."""
        nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        return {path: nodes[name].meta["val"] for path, name in self.placeholders(program).items()}

    def placeholders(self, program: ExportedProgram) -> dict[str, str]:
        """Our name of each tensor input to the exporter's."""
        names = [getattr(spec.arg, "name", "") for spec in program.graph_signature.input_specs
                 if spec.kind is InputKind.USER_INPUT]
        args, kwargs = pytree.tree_unflatten([_Slot(name) for name in names], program.call_spec.in_spec)
        slots = {path: slot.name for name, value in self.signature.bind(args, kwargs).items()
                 for path, slot in _slots(value, name)}
        return {path: slots[path] for path in self.named}


def _pins(guard: Any, condition: str, names: Collection[str]) -> bool:
    """Whether a condition leaves a size no choice, as `T*T == 25`."""
    if getattr(guard, "rel_op", "") != "==" or len(names) != 1:
        return False
    return sum(holds(condition, dict.fromkeys(names, size)) for size in range(1, 1024)) <= 1


@dataclass(frozen=True)
class _Slot:
    name: str


def _slots(value: object, path: str) -> Iterator[tuple[str, _Slot]]:
    if isinstance(value, _Slot):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _slots(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _slots(inner, f"{path}.{i}")


def _more_static(axes: Axes) -> Axes | None:
    """Fewer dynamic axes to try: first the batch alone, then none; None when there are none."""
    if not axes:
        return None
    batch: Axes = {name: (0,) for name, own in axes.items() if 0 in own}
    return batch if any(own != (0,) for own in axes.values()) else {}


def _without(axes: Axes, gone: Mapping[tuple[str, int], str]) -> Axes:
    kept = {name: tuple(axis for axis in own if (name, axis) not in gone) for name, own in axes.items()}
    return {name: own for name, own in kept.items() if own}


def _functional(program: ExportedProgram, clean: Callable[[ExportedProgram], None] | None) -> ExportedProgram:
    """The program without in-place operators. Operators that we have no handler for are decomposed where torch
    knows how, all others stay as they are. Most programs are so from the start; running them through the exporter
    again would cost more than the first time, and change nothing. `clean` is done to each program."""
    clean = clean or (lambda program: None)
    clean(program)
    exchange_in_place(program.graph_module)
    if _is_functional(program):
        return program
    known: Any = torch.export.default_decompositions()
    table: dict[Any, Any] = {}
    for _ in range(_ROUNDS):
        more = {target: known[target] for target in unknown(program.graph_module) if target in known}
        if table and not more.keys() - table.keys():
            break
        table |= more
        program = program.run_decompositions(dict(table))
        clean(program)
        if not unknown(program.graph_module):
            break
    return program


def _is_functional(program: ExportedProgram) -> bool:
    """Whether a program consists of known operators only, of which none works in place."""
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate or unknown(program.graph_module):
        return False
    called = [node for node in program.graph.nodes if node.op not in ("placeholder", "output")]
    return all(node.op == "call_function" and (
        not node.target._schema.is_mutable if isinstance(node.target, torch._ops.OpOverload)
        else getattr(node.target, "__module__", "") in ("_operator", "math", "torch")) for node in called)


def _close(own: Tensor, captured: Tensor) -> bool:
    """Whether two outputs are the same but for rounding: the captured operators are the model's own."""
    if own.shape != captured.shape or own.dtype != captured.dtype:
        return False
    if not own.is_floating_point():
        return torch.equal(own, captured)
    scale = float(own[own.isfinite()].abs().max()) if own.isfinite().any() else 0.0
    allowed = (1e-3 if own.dtype in (torch.float32, torch.float64) else 1e-1) * scale
    return torch.allclose(own.double(), captured.double(), rtol=0.0, atol=allowed, equal_nan=True)


def _missing(axes: Axes, fewer: Axes) -> list[tuple[str, int]]:
    return [(name, axis) for name, own in axes.items() for axis in own if axis not in fewer.get(name, ())]


def _shape(type_: Type, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A type's shape in numbers; none where it divides by 0."""
    try:
        return tuple(evaluate(dim, sizes) for dim in type_.shape)
    except ZeroDivisionError:
        return (-1,)


def _expression(size: int | torch.SymInt) -> Any:
    """The sympy expression of a size, None where it is a number."""
    expression = size.node.expr if isinstance(size, torch.SymInt) else None
    return None if expression is None or expression.is_Integer else expression


def _bounds(program: ExportedProgram, expression: Any) -> tuple[int, int]:
    """A symbol's range. From 1 up: that the exporter starts at 2 is its own habit, not the model's."""
    found = program.range_constraints.get(expression)
    if found is None:
        return 1, UNBOUNDED
    low = int(found.lower) if found.lower.is_Integer else 1
    high = int(found.upper) if found.upper.is_Integer else UNBOUNDED
    return (1 if low <= 2 else low), min(high, UNBOUNDED)


def _imported(capture: _Capture, program: ExportedProgram, sizes: Sizes, static: dict[str, str],
              injected: tuple[str, ...]) -> Imported:
    """The program as a graph, with its weights and signatures."""
    model = capture.model
    leaves = frozenset(path for path, module in model.named_modules() if not any(True for _ in module.children()))
    translation = Translation(sizes, leaves)
    taken: set[str] = set()
    fakes, placeholders = capture.fakes(program), capture.placeholders(program)
    params: dict[str, Value] = {}
    for path in capture.named:
        params[placeholders[path]] = Value(value_name(path, taken), sizes.type(fakes[path]))
        taken.add(params[placeholders[path]].name)
    translation.at.taken = set(taken)
    tensors_by_name, operands = _weights(model, program, sizes)
    constants = {spec.arg.name: spec.arg.value for spec in program.graph_signature.input_specs
                 if spec.kind is InputKind.USER_INPUT and hasattr(spec.arg, "value")}
    known: dict[str, Operand] = {**operands, **params, **constants, **_numbers(translation, program, operands)}
    translation.known |= {node: known[node.name] for node in program.graph.nodes if node.op == "placeholder"}
    outputs = translation.run(program.graph_module)
    results, tree = _results(translation, outputs[-len(program.graph_signature.user_outputs):]
                             if program.graph_signature.user_outputs else (), program)
    ops, renamed = translation.named(results, taken)
    used = {o.name for op in ops for o in op.operands if isinstance(o, Weight)}
    weights = {operand.name: operand for operand in operands.values() if operand.name in used}
    places = {op.place for op in ops}
    specs = {path: TensorSpec(path, params[name].type.dtype, text_shape(params[name].type.shape))
             for path, name in placeholders.items()}
    output_spec = OutputSpec(tree)
    graph = Graph(
        name=type(model).__name__,
        forward=Section(params=tuple(params.values()), body=ops, results=tuple(map(renamed, results))),
        dims={name: bounds for name, bounds in sorted(sizes.ranges.items()) if any(
            name in symbols(dim) for value in params.values() for dim in value.type.shape)},
        weights=weights,
        locations={place: at for place, at in translation.locations.items() if place in places},
        attrs={"inputs": tuple(capture.named), "outputs": output_spec.names})
    return Imported(graph, {name: tensors_by_name[name] for name in weights},
                    input_spec(capture.signature, capture.bound, injected, specs, sizes), output_spec, static)


def _weights(model: nn.Module, program: ExportedProgram, sizes: Sizes) -> tuple[dict[str, Tensor], dict[str, Weight]]:
    """The model's tensors by weight name, and the weight of each placeholder; one weight for tied tensors."""
    found: dict[str, Tensor] = {}
    operands: dict[str, Weight] = {}
    names: dict[int, str] = {id(x): name for name, x in [*model.named_parameters(), *model.named_buffers()]}
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            continue
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) or spec.target is None:
            raise ExportError(f"the model reads `{spec.target}` ({spec.kind.name.lower()}), which is not a tensor")
        tensor = program.state_dict.get(spec.target)
        tensor = program.constants[spec.target] if tensor is None else tensor
        name = names.setdefault(id(tensor), spec.target)
        if tensor.is_complex():
            if spec.kind is not InputKind.CONSTANT_TENSOR:
                raise ExportError("a weight of complex numbers", where=name,
                                  hint="keep torch.view_as_real of it, or make it a plain attribute of its module")
            tensor = torch.view_as_real(tensor)
        found[name] = tensor
        operands[spec.arg.name] = weight_operand(name, tensor, sizes)
    return found, operands


def _numbers(translation: Translation, program: ExportedProgram, weights: Mapping[str, Weight]) -> dict[str, Operand]:
    """`torch.tensor(0.0)` in a forward pass, which torch 2.11 keeps as a constant: a tensor filled with it, by
    placeholder."""
    found: dict[str, Operand] = {}
    for spec in program.graph_signature.input_specs:
        target = spec.target or ""
        if spec.kind is InputKind.CONSTANT_TENSOR and "lifted_tensor" in target and not program.constants[target].dim():
            kind = weights[spec.arg.name].type
            found[spec.arg.name] = translation.at.full(shape=(), value=program.constants[target].item(),
                                                       dtype=kind.dtype)
            translation.calls.append(("", ""))
    return found


def _results(translation: Translation, outputs: tuple[Operand, ...],
             program: ExportedProgram) -> tuple[list[Value], Tree]:
    """The forward section's results and the tree of the model's result. Every result is a value of its own:
    an output that is an input, a weight, or another output again gets a copy (a cast to its own type)."""
    if any(isinstance(output, Pair) for output in outputs):
        raise ExportError("the model returns complex numbers", hint="let it return torch.view_as_real of them")
    results: list[Value] = []
    at, inner = translation.at, {value.name for op in translation.at.ops for value in op.results}
    at.place = ""
    seen: set[str] = set()

    def leaf(output: Operand, path: str) -> Tree:
        if not isinstance(output, Value | Weight):
            if output is None or isinstance(output, bool | int | float | str):
                return Constant(output)
            raise ExportError(f"the output `{path}` is a size, {output}", hint="return tensors only")
        value = output
        if not isinstance(value, Value) or value.name in seen or value.name not in inner:
            value = at.cast(output, dtype=output.type.dtype)
            translation.calls.append(("", ""))
        seen.add(value.name)
        results.append(value)
        return TensorSpec(path or "output", value.type.dtype, text_shape(value.type.shape))

    def walk(node: Any, path: str) -> Tree:
        if isinstance(node, _Output):
            return leaf(node.operand, path)
        if node is None:
            return Constant(None)
        if isinstance(node, Mapping) or hasattr(node, "_fields"):
            items = node.items() if isinstance(node, Mapping) else node._asdict().items()
            named = {str(key): walk(inner, f"{path}.{key}" if path else str(key)) for key, inner in items}
            return Container("dict", tuple(named.values()), tuple(named))
        if isinstance(node, list | tuple):
            return Container("list" if isinstance(node, list) else "tuple", tuple(
                walk(inner, f"{path or 'output'}.{i}") for i, inner in enumerate(node)))
        raise ExportError(f"the output `{path or 'output'}` is a {type(node).__name__}",
                          hint="return tensors, and dicts, lists and tuples of them; with a key-value cache, "
                               "pass use_cache=False")

    tree = walk(pytree.tree_unflatten([_Output(output) for output in outputs], program.call_spec.out_spec), "")
    if not results:
        raise ExportError("the model returns no tensor", hint="return the tensors to explain")
    return results, tree


@dataclass(frozen=True)
class _Output:
    operand: Operand


