"""Every comparison that is made: what is explained, by which rules of ours and of theirs, with which stabiliser."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from dlbc.composite import Composite
from tests.peers import captum_side, lxt_explicit, models, zennit_side
from tests.peers.measure import Array, Distances, Theirs, distances, peer, with_epsilon

ROOT = Path(__file__).parents[2]
FLOAT32, FLOAT64 = 2e-4, 1e-6
"""Tolerances. The first holds for every pair, the second in float64 at a stabiliser of 1e-9 or none."""

NONE = 1e-30
"""A stabiliser that changes no number: what lxt.efficient has outside of activations."""


@dataclass(frozen=True)
class Comparison:
    """One row of the table: `eps` is the stabiliser of both sides, None where neither has one."""

    peer: str
    model: str
    ours: str
    theirs: str
    eps: float | None
    measure: Callable[[], Distances]

    @property
    def name(self) -> str:
        """What the test is called."""
        return f"{self.peer}-{self.model}-{self.ours}" + (f"-{self.eps:g}" if self.eps else "")

    @property
    def exactly(self) -> float:
        """The tolerance in float64."""
        return FLOAT64 if self.eps is None or self.eps <= 1e-9 else FLOAT32


# --- lxt ---------------------------------------------------------------------------------------------

def _lxt(family: str, rules: str) -> Distances:
    """A causal language model, explained by lxt in a process of its own; each number of each embedding is compared."""
    model, ids = models.decoder(family)
    with torch.no_grad():
        logits = model(ids).logits[:, -1].numpy()

    @cache
    def found(shape: tuple[int, ...], seeds: bytes) -> dict[str, Array]:
        read = lxt_process(family, rules, np.frombuffer(seeds).reshape(shape))
        for when in ("before", "after"):  # it is the same model there, and patching has left its outputs alone
            np.testing.assert_allclose(read[when], logits, rtol=1e-4, atol=1e-5)
        return read

    theirs = {kind: partial(lambda name, seeds: found(seeds.shape, seeds.tobytes())[name], name)
              for kind, name in ((torch.float32, "float32"), (torch.float64, "float64"))}
    return distances(model, {"input_ids": ids}, with_epsilon(rules, NONE), models.targets(model, ids), theirs,
                     node=models.embedding(model))


def lxt_process(family: str, rules: str, seeds: Array) -> dict[str, Array]:
    """What `lxt_side` found for seeds [S, B, vocabulary]."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "seeds.npy"), Path(folder, "found.npz")
        np.save(given, seeds)
        program = (f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'runtime')]}; "
                   "from tests.peers.lxt_side import main; main(*sys.argv[1:])")
        subprocess.run([sys.executable, "-c", program, family, rules, given, found], check=True, timeout=1200)
        with np.load(found) as read:
            return dict(read)


def _lxt_explicit(eps: float) -> Distances:
    model, x = lxt_explicit.explicit_block()
    return distances(model, x, with_epsilon("attnlrp", eps), models.targets(model, x),
                     peer(model, x, partial(lxt_explicit.relevance, eps=eps)))


# --- zennit, captum, autograd ------------------------------------------------------------------------

def _pictures(model_name: str, rules: Callable[[], str | Composite], run: Theirs) -> Distances:
    """A net of the zoo."""
    model, x = models.picture_net(model_name)
    return distances(model, x, rules(), models.targets(model, x), peer(model, x, run))


def _deep_lift(model_name: str) -> Distances:
    model, x = models.picture_net(model_name)
    reference = models.reference(x)
    run = partial(captum_side.deep_lift, reference=reference)
    return distances(model, x, with_epsilon("epsilon", NONE), models.targets(model, x),
                     peer(model, x, run), reference=reference)


def autograd(model: torch.nn.Module, x: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """Input times gradient."""
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(x), x, seed)
    return (x * gradient).detach()


LXT = [Comparison("lxt", family, rules, theirs, None, partial(_lxt, family, rules))
       for family in ("llama", "qwen3", "gpt2", "smollm2")
       for rules, theirs in (("attnlrp", "lxt.efficient, attnLRP"), ("cp-lrp", "lxt.efficient, cp_LRP"))]
LXT += [Comparison("lxt", "qwen3_moe", rules, f"lxt's functions, put together for the mixture ({theirs})", None,
                   partial(_lxt, "qwen3_moe", rules))
        for rules, theirs in (("attnlrp", "attnLRP"), ("cp-lrp", "cp_LRP"))]
LXT += [Comparison("lxt", "transformer layer", "attnlrp", "lxt.explicit", eps, partial(_lxt_explicit, eps))
        for eps in (1e-6, 1e-9)]
CAPTUM = [Comparison("captum", model, "epsilon", "LRP, EpsilonRule everywhere", eps,
                     partial(_pictures, model, partial(with_epsilon, "epsilon", eps),
                             partial(captum_side.lrp, eps=eps)))
          for model in ("mlp", "lenet", "vgg_small") for eps in (1e-6, 1e-9)]
CAPTUM += [Comparison("captum", model, "epsilon, reference=", "DeepLift", None, partial(_deep_lift, model))
           for model in ("mlp", "mlp_tanh", "lenet_avg", "vgg_small_avg")]
AUTOGRAD = [Comparison("torch", model, "input-x-gradient", "x * torch.autograd.grad", None,
                       partial(_pictures, model, lambda: "input-x-gradient", autograd))
            for model in ("mlp", "vgg_small", "resnet18_small")]
ZENNIT = [Comparison("zennit", model, ours, theirs, eps,
                     partial(_pictures, model, partial(zennit_side.rules, ours, eps),
                             partial(zennit_side.relevance, name=theirs, eps=eps)))
          for model in ("vgg_small", "resnet18_small") for ours, theirs in zennit_side.PRESETS.items()
          for eps in (1e-6, 1e-9)]
ALL = [*LXT, *ZENNIT, *CAPTUM, *AUTOGRAD]
