"""What `rules="auto"` chooses: by what the graph holds, among rules whose faithfulness was measured.

A plan looks at a graph and gives the composite for it, with the reason in words. `auto` picks the plan of the
kind of model; the others may be asked for by name. `docs/faithfulness.md` has the measurements behind the choice,
and what was tried and failed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from dlbc.composite import Composite
from dlbc.ir.core import Graph, Op, values
from dlbc.passes.carriers import carriers
from dlbc.passes.signs import nonnegative
from dlbc.passes.sink_positions import sequence_output
from dlbc.selectors import GROUPS, Sites, is_layer

RECTIFIERS = frozenset({"relu", "clamp"})
ENDS = frozenset((*GROUPS["layer"], *GROUPS["activation"], "clamp"))
LARGEST = 20.0
"""The largest gamma of a CNN: from there on, more changes nothing."""
SMALL = 0.1
"""The gamma of a language model."""
STEM = "w_square"
"""The rule of a CNN's first layer."""


def kind_of(graph: Graph, output: str = "") -> str:
    """The kind of a model: `lm` (causal, an output per position), `vit` (attention over patches), `encoder` (other
    attention), `cnn` or `mlp`."""
    kinds = {op.name for op in graph.forward.ops}
    convolves = bool(kinds & set(GROUPS["convolution"]))
    if "attention" in kinds or "softmax" in kinds:
        if sequence_output(graph, output) is not None and _causal(graph):
            return "lm"
        return "vit" if kinds & {"conv2d", "conv3d"} else "encoder"
    return "cnn" if convolves else "mlp"


def automatic(graph: Graph, output: str = "") -> Composite:
    """The plan for the kind of model that the graph is."""
    kind = kind_of(graph, output)
    if kind == "mlp":
        return Composite([], base="epsilon", name="epsilon").but(
            reason="neither attention nor convolutions: epsilon, as faithful as integrated gradients on small networks")
    return {"lm": language_model, "encoder": encoder, "vit": vision_transformer, "cnn": cnn}[kind](graph, output)


def cnn(graph: Graph, output: str = "") -> Composite:
    """The w^2 rule at the stem; then gamma, falling towards the classifier, where a layer's input is never negative;
    epsilon at signed bottlenecks and in the last layer.

    With h layers above a layer and d below it, gamma is h / d. Where a ReLU follows only after a sum, z-plus, the limit
    of large gammas, stands for it: one product cheaper. What projects into a signed bottleneck keeps gamma. Batch norm
    that no layer could take in shares by size, because its bias often takes most of what it reads away again.
    """
    sites, positive, carrying = Sites.of(graph, output), nonnegative(graph), carriers(graph)
    layers = [op for op in graph.forward.ops if is_layer(op, carrying) and op.result.name in sites.height]
    reads = {op.result.name: next(v.name for v in values(op.operands) if v.name in carrying) for op in layers}
    into_signed = _feeding(graph, [op for op in layers if reads[op.result.name] not in positive], carrying)
    entries: list[tuple[str, str]] = []
    for op in layers:
        name = op.result.name
        depth, height = sites.depth[name], sites.height[name]
        if not height or (depth and reads[name] not in positive):
            continue
        rectified = sites.readers[name] <= RECTIFIERS
        gamma = f"gamma({min(height / max(depth, 1), LARGEST):.4g})"
        entries.append((f"%{name}", STEM if not depth else gamma if rectified or name in into_signed else "zplus"))
    counts = Counter(rule.partition("(")[0] for _, rule in entries)
    chosen = ", ".join(f"{rule} on {count}" for rule, count in counts.items())
    if any(op.name == "batch_norm" and op.result.name in carrying for op in graph.forward.ops):
        entries.append(("batch_norm", "absolute"))
        chosen += ", absolute on batch norms"
    return Composite(entries, base="epsilon", name="auto-cnn").but(
        reason=f"convolutions: {chosen or 'none of the rules for convolutions'}, epsilon on the other "
               f"{len(layers) - counts.total()} of {len(layers)} layers")


def _feeding(graph: Graph, layers: list[Op], carrying: set[str]) -> set[str]:
    """Results that reach one of some layers through no activation and no other layer."""
    wanted = {v.name for op in layers for v in values(op.operands) if v.name in carrying}
    for op in reversed(list(graph.forward.ops)):
        if any(r.name in wanted for r in op.results) and op.name not in ENDS:
            wanted |= {v.name for v in values(op.operands) if v.name in carrying}
    return wanted


def language_model(graph: Graph, output: str = "") -> Composite:
    """CP-LRP with a small gamma in every layer, of the logit minus the mean of all logits."""
    return Composite([("layer", f"gamma({SMALL})")], base="cp-lrp", name="auto-lm", contrast="mean").but(
        reason=f"a causal language model: CP-LRP with gamma {SMALL} in all layers, of the logit minus the mean logit")


def encoder(graph: Graph, output: str = "") -> Composite:
    """CP-LRP."""
    return Composite([], base="cp-lrp", name="auto-encoder").but(
        reason="attention without a causal mask: CP-LRP, as faithful as AttnLRP there, conserving, and cheaper")


def vision_transformer(graph: Graph, output: str = "") -> Composite:
    """By size in all layers, through the values in attention; epsilon in the last layer, which tells targets apart."""
    return Composite([("layer & last", "epsilon"), ("attention", "absolute"), ("matmul", "signal_relevance"),
                      ("einsum", "signal_relevance"), ("norm", "detach")], base="dlb", name="auto-vit").but(
        reason="attention over patches of an image: shares by size, through the values in attention, and epsilon in "
               "the last layer, where targets part")


def _causal(graph: Graph) -> bool:
    return any(op.name == "attention" and op.attrs.get("causal", False) for op in graph.forward.ops)


PLANS: dict[str, Callable[[Graph, str], Composite]] = {
    "auto": automatic, "auto-cnn": cnn, "auto-lm": language_model, "auto-encoder": encoder,
    "auto-vit": vision_transformer,
}
"""What makes a composite for a graph, by the name it is asked for."""
