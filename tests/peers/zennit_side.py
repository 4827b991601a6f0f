"""What zennit says: its composites, with its own canonizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlbc.composite import Composite
from tests.peers.measure import with_epsilon
from tests.peers.stubs import torchvision_names

PRESETS = {"epsilon-plus": "EpsilonPlus", "epsilon-plus-flat": "EpsilonPlusFlat",
           "epsilon-gamma-box": "EpsilonGammaBox", "alpha2-beta1": "EpsilonAlpha2Beta1"}
"""Ours by name, and zennit's."""
BOUND = 6.0
"""The pictures, random numbers here, lie within plus and minus this."""


def rules(ours: str, eps: float) -> Composite:
    """Our preset with zennit's stabiliser (and the same box)."""
    return with_epsilon(f"{ours}{{low={-BOUND},high={BOUND}}}" if "box" in ours else ours, eps)


def relevance(model: nn.Module, x: Tensor, seed: Tensor, *, name: str, eps: float) -> Tensor:
    """Relevance of x by a composite of zennit; its ResNetCanonizer merges batch norms and makes residual sums seen."""
    with torchvision_names():
        import zennit.composites
        from zennit.attribution import Gradient
        from zennit.torchvision import ResNetCanonizer

    given = {"epsilon": eps, "stabilizer": eps, "canonizers": [ResNetCanonizer()]}
    if name == "EpsilonGammaBox":
        bound = torch.full_like(x[:1], BOUND)
        given |= {"low": -bound, "high": bound}
    composite = getattr(zennit.composites, name)(**given)
    with Gradient(model, composite) as attributor:
        without_eps(model)
        _, found = attributor(x, seed)
    return found.detach()


def without_eps(model: nn.Module) -> None:
    """What zennit forgets: a batch norm that is merged into the layer before still divides by sqrt(1 + eps)."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 0.0
