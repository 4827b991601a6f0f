"""Explanations in the element types and on the devices that models run in, held to a wide copy of the same numbers.

Rounding a model's weights makes another model. So what a float16 or bfloat16 model is held to is the explanation of its
own rounded weights and inputs in float64 (of a float32 model: of its weights), by torch on the CPU, for the same
target. An explanation is right where it is

* near: no farther from the wide one than a tenth of what the trial of kernels allows (`dlbc.trial.tolerance`), outputs
  by their own largest number, relevance by the largest of all;
* or, where rounding weighs more, as near as can be: at most twice as far from it (`dlbc.trial.FARTHER`) as what judges
  it, torch's backend in the same element type and precision, on the CPU or on the same device.

Torch on the CPU, which judges, has to be as near as the trial allows itself; or its relevance code alone: outputs have
to be near the wide ones, and relevance near the float64 interpreter of the IR where both are given what torch's forward
pass saved.

Used by test_devices.py on a GPU, and without one by test_narrow.py and, in Triton's interpreter, triton_narrow_runs.py.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

import dlbc
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc.trial import FARTHER, Numbers, apart, numbers, tolerance
from dlbc_runtime.target import Target
from tests import zoo

MODELS = tuple(name for group in (zoo.TABULAR, zoo.CNNS, zoo.ENCODERS, zoo.CAUSAL, zoo.MIXTURES) for name in group)
HALF = (torch.bfloat16, torch.float16)
NEARER = 10.0
"""How much nearer than the trial allows: kernels that were right were, or were as near as torch. One whose tanh is
wrong by a tenth would be within what the trial allows of half precision."""


@dataclass(frozen=True)
class How:
    """Where and how a model is explained."""

    backend: str = "torch"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    precision: str = "auto"


@dataclass(frozen=True)
class Checked:
    """How far an explanation is from the wide one, and in what; and its judge, where it needed one."""

    far: float
    place: str
    allowed: float
    judge: float | None = None

    @property
    def right(self) -> bool:
        """Whether it is near, or as near as its judge lets it be."""
        return self.far <= self.allowed or (self.judge is not None and self.far <= FARTHER * self.judge)


def cast(given: Any, dtype: torch.dtype, device: str = "cpu") -> Any:
    """Floating tensors in an element type, all tensors on a device."""
    return tree_map(lambda x: x.to(device, dtype if x.is_floating_point() else x.dtype)
                    if isinstance(x, torch.Tensor) else x, given)


def rounded(name: str, dtype: torch.dtype) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model of the zoo and its example inputs, rounded to an element type; on the CPU."""
    if not zoo.available(name):
        pytest.skip(f"{name} needs {', '.join(zoo.NEEDS[name])}")
    case = zoo.CASES[name]()
    args, kwargs = cast((case.args, case.kwargs), dtype)
    return case.model.to(dtype), args, kwargs


def explain(model: torch.nn.Module, given: tuple[tuple[Any, ...], Mapping[str, Any]], rules: str, target: Target | None,
            how: How) -> tuple[dlbc.Explainer, Numbers]:
    """An explainer, and outputs and relevance of the inputs, twice the same, in float32 and without NaN."""
    args, kwargs = given
    explainer = dlbc.compile(model, args if args else dict(kwargs), rules=rules, backend=how.backend, cache=False,
                             **({"precision": how.precision} if how.backend == "triton" else {}))
    found = numbers(explainer, args, kwargs, target)[0]
    for key, value in numbers(explainer, args, kwargs, target)[0].items():
        np.testing.assert_array_equal(value, found[key])
        assert np.isfinite(value).all() or key.startswith("output"), key
        assert value.dtype == np.float32 or how.dtype is torch.float64 or key.startswith("output"), (key, value.dtype)
    return explainer, found


@functools.lru_cache(maxsize=64)
def wide(name: str, rules: str, dtype: torch.dtype) -> tuple[Numbers, Target]:
    """The explanation in float64 of a model's numbers, rounded to an element type; and what it explains: of each row
    the class, or number, of largest magnitude. A predicted number next to 0 is as uncertain as what is divided by it.
    """
    model, args, kwargs = rounded(name, dtype)
    model = model.double()
    args, kwargs = cast((args, kwargs), torch.float64)
    explainer = dlbc.compile(model, args if args else kwargs, rules=rules, backend="torch", cache=False)
    manifest = explainer.manifest
    shape = next(spec.shape for spec in manifest.outputs.tensors if spec.name == manifest.output)
    if len(shape) > 2 and not manifest.sequence:
        output = explainer(*args, target=Target.tensor(np.float32(1.0)), **kwargs).outputs[manifest.output]
        rows = np.abs(output.reshape(len(output), -1))
        target = Target.tensor((np.arange(rows.shape[1]) == rows.argmax(1)[:, None]).reshape(output.shape))
    else:
        output = explainer(*args, **kwargs).outputs[manifest.output]
        rows = output[:, 0] if output.ndim == 3 else output.reshape(len(output), -1)
        target = Target.index(np.abs(rows).argmax(-1).tolist()) if output.ndim > 1 else Target.predicted()
    return numbers(explainer, args, kwargs, target)[0], target


@functools.lru_cache(maxsize=64)
def torch_is(name: str, rules: str, dtype: torch.dtype, device: str = "cpu", precision: str = "ieee"
             ) -> tuple[float, str] | None:
    """How far torch's own backend in that type is from the wide explanation; None where torch has no such kernel."""
    model, args, kwargs = rounded(name, dtype)
    exact, target = wide(name, rules, dtype)
    given = cast((args, kwargs), dtype, device)
    model = model.to(device)
    if unknown(model, *given):
        return None
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        return apart(explain(model, given, rules, target, How(device=device, dtype=dtype))[1], exact)
    finally:
        torch.set_float32_matmul_precision(products)


def unknown(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What torch lacks to run the model itself in this element type on this device; "" where it runs."""
    try:
        with torch.no_grad():
            copy.deepcopy(model)(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as problem:
        if "not implemented for" not in str(problem):
            raise
        return str(problem).splitlines()[0]
    return ""


def checked(name: str, rules: str, how: How) -> Checked:
    """Explain a model so, and say how far it is from the wide explanation. Skips what torch itself cannot run there."""
    model, args, kwargs = rounded(name, how.dtype)
    plain = how.backend == "torch" and how.device == "cpu"
    tolerable = tolerance(model.parameters(), how.precision)
    allowed = tolerable if plain else tolerable / NEARER
    given = cast((args, kwargs), how.dtype, how.device)
    model = model.to(how.device)
    if lacking := unknown(model, *given):
        pytest.skip(f"torch does not run {name} in this type on this device: {lacking}")
    exact, target = wide(name, rules, how.dtype)
    explainer, found = explain(model, given, rules, target, how)
    far, place = apart(found, exact)
    if far <= allowed:
        return Checked(far, place, allowed)
    if plain:
        outputs = {key: value for key, value in exact.items() if key.startswith("output")}
        near = apart(found, outputs)[0] <= allowed and on_own_values(explainer, given, target) <= allowed
        return Checked(far, place, allowed, far if near else None)
    judges = [torch_is(name, rules, how.dtype), *([torch_is(name, rules, how.dtype, how.device, how.precision)]
                                                  if how.backend != "torch" and how.device != "cpu" else [])]
    known = [judge[0] for judge in judges if judge is not None]
    return Checked(far, place, allowed, max(known)) if known else Checked(far, place, tolerable)


def check(name: str, rules: str, how: How) -> Checked:
    """`checked`, which must be right."""
    found = checked(name, rules, how)
    assert found.right, f"{name}, {rules}, {how}: {found}"
    return found


def on_own_values(explainer: dlbc.Explainer, given: tuple[tuple[Any, ...], Mapping[str, Any]], target: Target
                  ) -> float:
    """How far relevance by torch is from the float64 interpreter of the relevance section, of the largest number of
    each input, both on the values that torch's forward pass saved: no rounding of that pass decides anything here."""
    args, kwargs = given
    graph, manifest = parse_graph(explainer.ir("lowered")), explainer.manifest
    assert graph.relevance is not None
    caught: list[tuple[list[Any], tuple[Any, ...]]] = []
    module = explainer._load(explainer.default).module
    relevance = module.relevance

    def seen(weights: Any, prepared: Any, state: list[Any], *seeds: Any) -> Any:
        caught.append((list(state), seeds))
        return relevance(weights, prepared, state, *seeds)

    module.relevance = seen
    try:
        found = explainer(*args, target=target, **kwargs)
    finally:
        module.relevance = relevance
    ((state, seeds),) = caught
    arguments = [_wide(x) for x in found.inputs.values()]
    if len(graph.forward.params) > len(arguments):
        arguments.append(np.array([sorted({e.position for e in found.target})] * len(arguments[0])))
    saved = dict(zip((v.name for v in graph.forward.saves), (_wide(v) for v in state if not isinstance(v, int)),
                     strict=True))
    ran = interpret(graph, dict(zip((p.name for p in graph.forward.params), arguments, strict=True)),
                    {name: _wide(weight) for name, weight in explainer.weights.items()},
                    dict(zip((p.name for p in graph.relevance.params), map(_wide, seeds), strict=True)), saved=saved)
    worst = 0.0
    for name, expected in zip(manifest.explained, ran.relevance, strict=False):
        scale = max(float(np.abs(expected).max(initial=0.0)), 1e-6 * 100)
        worst = max(worst, float(np.abs(found.relevance[name] - expected[0]).max(initial=0.0)) / scale)
    return worst


def _wide(x: Any) -> np.ndarray:
    if not isinstance(x, torch.Tensor):
        return np.asarray(x)
    return (x.double() if x.is_floating_point() else x).detach().cpu().numpy()
