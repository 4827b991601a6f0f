"""Every model, every preset, both backends: forward equals eager, relevance equals the float64 oracle.

`input-x-gradient` is also compared with torch's own autograd, which proves pairing, adjoints and fan-out.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from dlbc.compiler import Source, compile_now, explainer_of
from dlbc.composite import Composite
from dlbc.errors import InputError, UnsupportedOpError
from dlbc.frontends.torch_export import import_model
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc.options import Options
from dlbc.passes import run
from dlbc.passes.lower import Lower
from dlbc.passes.pipeline import CANONICALISE
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.program import Variant
from dlbc_runtime.target import Target
from tests import zoo

PRESETS = ("attnlrp", "cp-lrp", "epsilon", "dlb", "dlb-0.1", "input-x-gradient")
SEED = 100.0
HALF = (torch.float16, torch.bfloat16)
NO_RULE = {"logsumexp": UnsupportedOpError, "argmax_lookup": InputError}
"""Cases that must be refused by name: no rule, no differentiable path, an op the frontend does not take yet."""
TORCH_ONLY = frozenset({"bfloat16", "autocast_inside"})
"""numpy has no bfloat16, and says so."""
DETACHED = frozenset({"move_detach", "no_grad_inside"})
"""detach stops autograd; relevance passes it as the identity it is."""

ARCHITECTURES = [*zoo.TABULAR, *zoo.CNNS, *zoo.ENCODERS, *zoo.CAUSAL, *zoo.MIXTURES]

EXPLAINED = [n for n in (*ARCHITECTURES, *zoo.STRUCTURE) if n not in NO_RULE]


@dataclass(frozen=True)
class Compiled:
    """A case's model with what the frontend and the canonicalising passes made of it."""

    case: zoo.Case
    source: Source
    weights: Mapping[str, torch.Tensor]
    made: dict[tuple[object, ...], Explainer] = field(default_factory=dict)

    def shared(self, rules: str, backend: str = "torch", **variant: Any) -> Explainer:
        """`explainer`, compiled once for all tests of this model."""
        key = (rules, backend, *sorted(variant.items()))
        if key not in self.made:
            self.made[key] = self.explainer(rules, backend, **variant)
        return self.made[key]

    def explainer(self, rules: str | Composite, backend: str = "torch", **variant: Any) -> Explainer:
        options = Options(rules=rules, backend=backend)
        return explainer_of(self.source, options, Variant(**variant), self.weights, model=self.case.model)


def backends(name: str) -> tuple[str, ...]:
    return ("torch",) if name in TORCH_ONLY else ("torch", "numpy")


def compiled(name: str) -> Compiled:
    return _kept(name) if name in zoo.MIXTURES else _compiled(name)  # which take longest to capture


@functools.lru_cache(maxsize=4)
def _compiled(name: str) -> Compiled:
    if not zoo.available(name):
        pytest.skip(f"{name} needs {', '.join(zoo.NEEDS[name])}")
    return captured(zoo.CASES[name]())


_kept = functools.cache(_compiled.__wrapped__)


def captured(case: zoo.Case) -> Compiled:
    """A case as the frontend and the canonicalising passes leave it."""
    imported = import_model(case.model, case.args, case.kwargs)
    source = Source(imported.graph, run(imported.graph, CANONICALISE), imported.inputs, imported.outputs,
                    imported.static)
    return Compiled(case, source, imported.weights)


def eager_outputs(case: zoo.Case, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The model's own tensors, in the order of the compiled outputs."""
    import inspect

    extra = {"use_cache": False} if "use_cache" in inspect.signature(case.model.forward).parameters else {}
    result = case.model(*args, **{**extra, **kwargs})
    return [leaf for leaf in torch.utils._pytree.tree_leaves(
        dict(result) if hasattr(result, "keys") else result) if isinstance(leaf, torch.Tensor)]


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Norm-wise distance, relative to what was wanted; to a millionth of the seed where that is next to nothing."""
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-6 * SEED))


def oracle(explainer: Explainer, explanation: Explanation, seeds: np.ndarray) -> dict[str, np.ndarray]:
    """The same explanation by the float64 interpreter, from the paired level: rules as they are written."""
    graph = Lower().run(parse_graph(explainer.ir("paired")))
    assert graph.relevance is not None
    inputs = {p.name: np.asarray(explanation.inputs[n])
              for n, p in zip(explainer.manifest.inputs.names, graph.forward.params, strict=False)}
    if explainer.manifest.sequence and len(graph.forward.params) > len(inputs):
        positions = np.array([[e.position] for e in explanation.target])
        inputs[graph.forward.params[-1].name] = positions
    weights = {n: w.detach().cpu().double().numpy() if hasattr(w, "detach") and w.is_floating_point() else np.asarray(w)
               for n, w in explainer.weights.items()}
    ran = interpret(graph, inputs, weights, {graph.relevance.params[0].name: seeds[None]})
    return dict(zip(explainer.manifest.explained, (r[0] for r in ran.relevance), strict=False))


def on_own_values(explainer: Explainer, explanation: Explanation) -> float:
    """Distance of the explanation from the float64 interpreter of the relevance section, given what the backend's own
    forward saved: the relevance code alone, without what the forward's rounding decides at kinks."""
    program = explainer.programs[explainer.default]
    graph, module = parse_graph(program.ir["lowered"]), program.module()
    assert graph.relevance is not None
    arguments = list(explanation.inputs.values())
    if explainer.manifest.positions:
        arguments.append(np.array([[e.position] for e in explanation.target]))
    given = [torch.as_tensor(a) for a in arguments] if explainer.manifest.backend != "numpy" else arguments
    narrow = next((w.dtype for w in explainer.weights.values() if getattr(w, "dtype", None) in HALF), None)
    given = [g.to(narrow) if narrow and g.is_floating_point() else g for g in given]
    with torch.no_grad():
        _, state = module.forward(explainer.weights, module.prepare(explainer.weights), *given)
    saved = dict(zip((v.name for v in graph.forward.saves), (wide(v) for v in state if not isinstance(v, int)),
                     strict=True))
    ran = interpret(graph, {p.name: wide(a) for p, a in zip(graph.forward.params, given, strict=True)},
                    {name: wide(weight) for name, weight in explainer.weights.items()},
                    {graph.relevance.params[0].name: seeds_of(explainer, explanation)[None]}, saved=saved)
    return max(distance(explanation.relevance[name], expected[0])
               for name, expected in zip(explainer.manifest.explained, ran.relevance, strict=False))


def wide(array: Any) -> np.ndarray:
    """Any array as the interpreter takes it."""
    if not isinstance(array, torch.Tensor):
        return np.asarray(array)
    array = array.detach().cpu()
    return (array.double() if array.is_floating_point() else array).numpy()


def seeds_of(explainer: Explainer, explanation: Explanation) -> np.ndarray:
    """The seed that the explanation's targets stand for."""
    output = explanation.outputs[explainer.manifest.output]
    seeds = np.zeros(output.shape, np.float64)
    for explained in explanation.target:
        place: tuple[int, ...] = (explained.row,)
        if output.ndim == 3:
            place += (0,)
        if output.ndim > 1:
            place += (explained.index or 0,)
        negative = rules_divide(explainer) and (explained.value or 0) < 0
        seeds[place] = -SEED if negative else SEED
    return seeds


def rules_divide(explainer: Explainer) -> bool:
    """Rules that divide by the output: the relevance of a negative number is negative."""
    return explainer.manifest.seed == "signed"


def has_explainable_output(explainer: Explainer) -> bool:
    shape = next(s.shape for s in explainer.manifest.outputs.tensors if s.name == explainer.manifest.output)
    return len(shape) <= 2 or bool(explainer.manifest.sequence)


@pytest.mark.parametrize("name", EXPLAINED)
def test_forward_equals_eager(name: str) -> None:
    """At the example shape, at other batch sizes and lengths, with padding on either side."""
    built = compiled(name)
    explainers = [built.shared("input-x-gradient", backend, all_positions=True) for backend in backends(name)]
    for args, kwargs in [(built.case.args, built.case.kwargs), *built.case.other]:
        with torch.no_grad():
            wanted = [output.detach() for output in eager_outputs(built.case, args, kwargs)]
        for explainer in explainers:
            found = explainer(*args, target=weighted(explainer, wanted), **kwargs)
            mask = kwargs.get("attention_mask")
            tolerance = 1e-5 if name not in TORCH_ONLY else 2e-2
            for own, other in zip(found.outputs.values(), wanted, strict=True):
                difference = np.abs((own - other.float().numpy()) * visible(own, mask))
                assert difference.max(initial=0.0) <= tolerance * max(1.0, float(other.abs().max()))


def visible(output: np.ndarray, mask: torch.Tensor | None) -> np.ndarray:
    """1 where an output is defined: padded positions hold what each attention code leaves there."""
    if mask is None or output.ndim != 3 or output.shape[:2] != tuple(mask.shape):
        return np.ones(())
    return mask.numpy()[..., None].astype(np.float32)


def weighted(explainer: Explainer, outputs: list[torch.Tensor]) -> Any:
    """A target that fits any output shape."""
    position = explainer.manifest.outputs.names.index(explainer.manifest.output)
    return Target.tensor(np.ones(outputs[position].shape, np.float32))


@pytest.mark.parametrize("rules", PRESETS)
@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in NO_RULE])
def test_relevance_equals_the_oracle(name: str, rules: str) -> None:
    built = compiled(name)
    check_against_oracle(built, rules)


SPLITTING = ("gamma", "epsilon-plus", "epsilon-plus-flat", "epsilon-gamma-box{low=-6,high=6}", "alpha2-beta1")


@pytest.mark.parametrize(("name", "rules"), [
    *((name, rules) for name in ("lenet", "vgg_small", "resnet18_small", "densenet_small") for rules in SPLITTING),
    *((name, "auto") for name in ("mlp", "resnet18_small", "densenet_small", "bert", "vit", "gpt2", "llama")),
    *((name, "attnlrp-conserving") for name in ("gpt2", "llama", "gemma2")), ("bert", "gamma")])
def test_further_presets_equal_the_oracle(name: str, rules: str) -> None:
    check_against_oracle(compiled(name), rules)


@pytest.mark.parametrize("name", [n for n in zoo.STRUCTURE if n not in NO_RULE])
def test_structures_equal_the_oracle(name: str) -> None:
    built = compiled(name)
    for rules in ("attnlrp", "dlb"):
        check_against_oracle(built, rules)


def check_against_oracle(built: Compiled, rules: str) -> None:
    name = built.case.name
    tolerance = 2e-2 if name in TORCH_ONLY else 1e-5 if rules.startswith("dlb") else 1e-4
    wanted: dict[str, np.ndarray] | None = None
    dense = built.explainer(rules, dense=True)
    for backend in backends(name):
        explainer = built.shared(rules, backend)
        if not has_explainable_output(explainer):
            explanation, seeds = explained_by_largest(explainer, built)
        else:
            explanation = explained_by_clearest(explainer, built)
            predicted = explainer(*built.case.args, **built.case.kwargs)
            if [e.index for e in predicted.target] != [e.index for e in explanation.target]:
                assert on_own_values(explainer, predicted) <= tolerance, backend
            seeds = seeds_of(explainer, explanation)
        wanted = wanted or oracle(dense, explanation, seeds)
        for name, expected in wanted.items():
            found = explanation.relevance[name]
            assert found.shape == tuple(explanation.inputs[name].shape)
            assert np.isfinite(found).all()
            assert distance(found, expected) <= tolerance, (backend, name)


def explained_by_clearest(explainer: Explainer, built: Compiled) -> Explanation:
    """The explanation of each row's class of largest magnitude. These models are untrained, and may predict a class
    whose logit is next to 0: relevance, which is divided by it, is then as uncertain as float32 makes the logit."""
    args, kwargs = built.case.args, built.case.kwargs
    output = explainer(*args, **kwargs).outputs[explainer.manifest.output]
    rows = output[:, 0] if output.ndim == 3 else output
    target = Target.index(np.abs(rows).argmax(-1).tolist()) if rows.ndim == 2 else None
    return explainer(*args, target=target, **kwargs)


def explained_by_largest(explainer: Explainer, built: Compiled) -> tuple[Explanation, np.ndarray]:
    """The explanation of each row's largest number, for outputs that are no list of classes."""
    args, kwargs = built.case.args, built.case.kwargs
    output = explainer(*args, target=Target.tensor(np.float32(1.0)), **kwargs).outputs[explainer.manifest.output]
    rows = np.abs(output.reshape(output.shape[0], -1) if output.ndim else output.reshape(1, 1))
    weights = (np.arange(rows.shape[1]) == rows.argmax(1)[:, None]).reshape(output.shape)
    return explainer(*args, target=Target.tensor(weights), **kwargs), weights * SEED


@pytest.mark.parametrize("name", ["logsumexp", *(n for n in EXPLAINED if n not in DETACHED | TORCH_ONLY)])
def test_input_x_gradient_equals_autograd(name: str) -> None:
    built = compiled(name)
    explainer = built.shared("input-x-gradient", all_positions=True)
    if explainer.manifest.before:
        pytest.skip("the output's softmax is skipped on purpose: what is explained is not the model's output")
    args, kwargs = built.case.args, built.case.kwargs
    outputs = eager_outputs(built.case, args, kwargs)
    position = explainer.manifest.outputs.names.index(explainer.manifest.output)
    generator = torch.Generator().manual_seed(1)
    seed = torch.randn(outputs[position].shape, generator=generator)
    mask = kwargs.get("attention_mask")
    if mask is not None and seed.ndim == 3 and seed.shape[:2] == mask.shape:
        seed = seed * mask[..., None]
    found = explainer(*args, target=Target.tensor(seed.numpy()), multiplier=1.0, **kwargs)
    wanted = autograd(built, explainer, seed, position)
    for input_name, expected in wanted.items():
        assert distance(found.relevance[input_name], expected) <= 1e-4, input_name


def autograd(built: Compiled, explainer: Explainer, seed: torch.Tensor, position: int) -> dict[str, np.ndarray]:
    """Input x gradient by torch: of floating inputs, and of the embeddings that integer inputs select."""
    case = built.case
    bound = {k: v.detach().clone() for k, v in explainer.manifest.inputs.bind(case.args, case.kwargs).items()}
    leaves = {name: bound[name].requires_grad_(True) for name in explainer.manifest.explained
              if bound[name].is_floating_point()}
    looked_up: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_(True)
        output.retain_grad()
        looked_up.append((inputs[0], output))
        return output

    hooks = [m.register_forward_hook(record) for m in case.model.modules() if isinstance(m, torch.nn.Embedding)]
    try:
        args, kwargs = rebound(case, bound)
        (eager_outputs(case, args, kwargs)[position] * seed).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
        case.model.zero_grad(set_to_none=True)
    found = {name: (x * x.grad if x.grad is not None else torch.zeros_like(x)).detach().numpy()
             for name, x in leaves.items()}
    for name in explainer.manifest.explained:
        if name not in leaves:
            products = [(out * out.grad).sum(-1) for ids, out in looked_up
                        if out.grad is not None and ids.shape == bound[name].shape and torch.equal(ids, bound[name])]
            if products:
                found[name] = sum(products).detach().numpy()  # type: ignore[union-attr]
    return found


def rebound(case: zoo.Case, bound: Mapping[str, torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The case's inputs with its tensors replaced, in order, by those that were bound."""
    def replacement(leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return next(t for t in bound.values() if t.dtype == leaf.dtype and torch.equal(t, leaf))

    args, kwargs = torch.utils._pytree.tree_map(replacement, (case.args, case.kwargs))
    return args, kwargs


@pytest.mark.parametrize("name", NO_RULE)
def test_refused_by_name(name: str) -> None:
    with pytest.raises(NO_RULE[name]):
        compiled(name).explainer("attnlrp")


@pytest.mark.parametrize("rules", ["attnlrp", "cp-lrp", "dlb"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["mlp", "resnet18_small", "bert", "gpt2", "llama"])
def test_half_precision_equals_the_oracle(name: str, dtype: torch.dtype, rules: str) -> None:
    """Relevance is float32 whatever the model's type, and equals the oracle on the same forward values; also from the
    inputs on, where rounding in the forward pass is not amplified (`docs/rules.md`: Numerics)."""
    case = zoo.CASES[name]()

    def narrow(leaf: object) -> object:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    args, kwargs = torch.utils._pytree.tree_map(narrow, (case.args, case.kwargs))
    explainer = compile_now(case.model.to(dtype), args, kwargs, Options(rules=rules), Variant(dense=True))
    found = explainer(*args, **kwargs)
    assert on_own_values(explainer, found) <= 2e-2
    amplified = name == "resnet18_small" or (dtype is torch.bfloat16 and rules != "dlb")
    for input_name, expected in oracle(explainer, found, seeds_of(explainer, found)).items():
        assert found.relevance[input_name].dtype == np.float32
        assert amplified or distance(found.relevance[input_name], expected) <= 2e-2
