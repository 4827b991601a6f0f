"""How far two implementations are apart: on the same weights, inputs and targets, in float32 and in float64.

float32 is what users get: the compiled explainer against the peer on the float32 model. float64 takes rounding out, so
what is left is a difference in the formulas: our rules by the float64 interpreter against the peer on the double model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

import dlbc
from dlbc.composite import Composite, resolve
from dlbc.ir.core import Rule
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc.passes.lower import Lower
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.target import Target

SEED = 100.0
Array = np.ndarray
Theirs = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""The peer: (model, input [B, ...], seed of its output [B, classes]) to relevance of the input [B, ...]."""


@dataclass(frozen=True)
class Distances:
    """Norm-wise distance from the peer, relative to the norm of the peer's relevance."""

    float32: float
    float64: float


def with_epsilon(rules: str | Composite, eps: float) -> Composite:
    """The same choice of rules with another stabiliser wherever a rule has one."""
    base = resolve(rules)
    return base.but(entries=tuple(
        (what, Rule(rule.name, tuple((key, eps if key == "eps" else value) for key, value in rule.params)))
        for what, rule in base.entries))


def distances(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor] | torch.Tensor, rules: str | Composite,
              targets: Sequence[Target], theirs: Mapping[torch.dtype, Callable[[Array], Array]], *, node: str = "",
              reference: torch.Tensor | None = None) -> Distances:
    """Ours against theirs. `theirs` takes seeds [S, B, classes] and gives relevance [S, B, ...], per float type.

    Relevance is compared at the input, or at the output of the module `node`; `reference` is that of `dlbc.compile`.
    """
    explainer = dlbc.compile(model, inputs, rules=rules, cache=False, keep=node or "inputs", reference=reference)
    explanation = explainer(**inputs, target=list(targets)) if isinstance(inputs, Mapping) else explainer(
        inputs, target=list(targets))
    found = explanation.nodes[node] if node else next(iter(explanation.relevance.values()))
    with torch.no_grad():
        shift = 0.0 if reference is None else model(reference).numpy()
    seeds = seeds_of(explainer, explanation, len(targets), shift)
    flat = seeds.reshape(*seeds.shape[:2], -1)
    return Distances(apart(found, theirs[torch.float32](flat)),
                     apart(exact(explainer, explanation, seeds, node, reference), theirs[torch.float64](flat)))


def peer(model: torch.nn.Module, x: torch.Tensor, run: Theirs) -> dict[torch.dtype, Callable[[Array], Array]]:
    """A peer in this process, as `distances` wants it: on a copy of the model, seed by seed."""
    from copy import deepcopy

    def at(kind: torch.dtype) -> Callable[[Array], Array]:
        def relevance(seeds: Array) -> Array:
            return np.stack([run(deepcopy(model).to(kind), x.to(kind), torch.from_numpy(seed).to(kind)).detach().numpy()
                             for seed in seeds])
        return relevance

    return {kind: at(kind) for kind in (torch.float32, torch.float64)}


def apart(ours: Array, theirs: Array) -> float:
    """||ours - theirs|| / ||theirs||; AssertionError for relevance that is nothing or not finite."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert np.isfinite(ours).all() and np.isfinite(theirs).all() and np.abs(theirs).sum() > 0
    return float(np.linalg.norm((ours - theirs).astype(np.float64)) / np.linalg.norm(theirs.astype(np.float64)))


def seeds_of(explainer: Explainer, explanation: Explanation, count: int, shift: Array | float = 0.0) -> Array:
    """The seeds [S, B, ...] of the explained output that the targets stand for; `shift` [B, classes]: a reference's."""
    output = explanation.outputs[explainer.manifest.output]
    moved = np.broadcast_to(output - shift, output.shape).reshape(len(output), -1)
    seeds = np.zeros((count, *output.shape))
    for one in explanation.target:
        negative = explainer.manifest.seed == "signed" and moved[one.row, one.index or 0] < 0
        seeds[(one.seed, one.row, *(0,) * (output.ndim - 2), one.index or 0)] = -SEED if negative else SEED
    return seeds


def exact(explainer: Explainer, explanation: Explanation, seeds: Array, node: str = "",
          reference: torch.Tensor | None = None) -> Array:
    """The same explanation by the float64 interpreter, from the paired level: the rules as they are written."""
    graph = Lower().run(parse_graph(explainer.ir("paired")))
    assert graph.relevance is not None
    inputs = {param.name: np.asarray(explanation.inputs[name]) for name, param in
              zip(explainer.manifest.inputs.names, graph.forward.params, strict=False)}
    weights = {name: weight.detach().double().numpy() if weight.is_floating_point() else weight.numpy()
               for name, weight in explainer.weights.items()}
    rows = [[o for o in explanation.target if o.row == row] for row in range(len(seeds[0]))]
    if explainer.manifest.positions:
        inputs["positions"] = np.array([[row[0].position] for row in rows])
    if explainer.manifest.sparse:  # a large head is computed at the explained tokens only: target k is column k
        inputs["targets"] = np.array([[[o.index for o in row]] for row in rows])
        seeds = np.stack([np.where(np.arange(len(seeds)) == number, seed.sum(-1, keepdims=True), 0.0)
                          for number, seed in enumerate(seeds)])
    (seed,) = (p.name for p in graph.relevance.params if p.name != "targets" and not p.name.startswith("ref."))
    given = {seed: seeds}
    if reference is not None:  # the forward section hands out what the relevance section reads of the reference's run
        (name,), wanted = inputs, [p.name for p in graph.relevance.params if p.name.startswith("ref.")]
        at_reference = interpret(graph, {name: reference.double().numpy()}, weights).outputs
        given |= dict(zip(wanted, at_reference[-len(wanted):], strict=True))
    ran = interpret(graph, inputs, weights, given)
    places = (*explainer.manifest.explained, *explainer.manifest.nodes)
    found = dict(zip(places, ran.relevance[:len(places)], strict=True))  # after these: relevance of experts
    return np.asarray(found[node or explainer.manifest.explained[0]])
