"""What captum says: its LRP with EpsilonRule at every layer, and its DeepLift, on plain sequential nets.

captum treats a batch norm as a layer of its own and takes no in-place ReLU, so it gets the nets with folded norms.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from tests.peers.models import without_batch_norm

NOTHING = 1e-30
"""captum divides and multiplies by the values at max pooling and Flatten, too, where nothing is divided up; to have
equal stabilisers it gets one there that does nothing."""


def lrp(model: nn.Module, x: Tensor, seed: Tensor, *, eps: float) -> Tensor:
    """Relevance of x for one-hot seeds [B, classes]; captum's sums to the output f, so it is scaled by seed / f."""
    from captum.attr import LRP
    from captum.attr._utils.lrp_rules import EpsilonRule

    model = without_batch_norm(model)
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.AvgPool2d):
            layer.rule = EpsilonRule(eps)
        elif isinstance(layer, nn.MaxPool2d | nn.Flatten):
            layer.rule = EpsilonRule(NOTHING)
    explained = seed.abs().argmax(-1)
    with torch.no_grad():
        output = model(x)
    found = LRP(model).attribute(x.clone().requires_grad_(True), target=explained)
    return _scaled(found, output, seed, explained)


def deep_lift(model: nn.Module, x: Tensor, seed: Tensor, *, reference: Tensor) -> Tensor:
    """DeepLIFT's rescale rule; captum's relevance sums to f(x) - f(reference), so it is scaled by seed over that."""
    from captum.attr import DeepLift

    model = without_batch_norm(model)
    reference, explained = reference.to(x.dtype), seed.abs().argmax(-1)
    with torch.no_grad():
        difference = model(x) - model(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it sets hooks
        found = DeepLift(model).attribute(x.clone().requires_grad_(True), baselines=reference, target=explained)
    return _scaled(found, difference, seed, explained)


def _scaled(found: Tensor, output: Tensor, seed: Tensor, explained: Tensor) -> Tensor:
    factor = (seed / output).gather(1, explained[:, None])
    return (found * factor.reshape(-1, *(1,) * (found.ndim - 1))).detach()
