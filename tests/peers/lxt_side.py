"""What lxt says, in a process of its own: its patches stay in the classes of transformers for good.

    main("llama", "attnlrp", "seeds.npy", "found.npz")

`seeds.npy`: relevance [S, B, vocabulary] of the logits at the last position. `found.npz`: relevance of the embeddings
[S, B, T, D] as `float32` and `float64`, the logits before and after patching, and the version of transformers.
"""

from __future__ import annotations

import importlib
import warnings
from copy import deepcopy

import numpy as np
import torch

from tests.peers import lxt_moe, models
from tests.peers.stubs import torchvision_names

PATCHES = {"attnlrp": "attnLRP", "cp-lrp": "cp_LRP"}
ARCHITECTURES = {"smollm2": "llama"}
"""The model family of a model that is not named after it."""


def patch(family: str, rules: str) -> None:
    """Patch the classes of a model family for good; Warning (raised) where lxt skips one."""
    with torchvision_names():
        from lxt.efficient import monkey_patch

        own = lxt_moe.patch_map(rules) if family == "qwen3_moe" else getattr(
            importlib.import_module(f"lxt.efficient.models.{family}"), PATCHES[rules])
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkey_patch(module, own)


def relevance(model: torch.nn.Module, x: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """Relevance of x: input times (patched) gradient, the seed divided by the logits being the gradient there."""
    x = x.clone().requires_grad_(True)
    logits = model(inputs_embeds=x).logits[:, -1]
    (gradient,) = torch.autograd.grad(logits, x, seed / logits.detach())
    return (x * gradient).detach()


def main(family: str, rules: str, seeds_path: str, found_path: str) -> None:
    """Write lxt's relevance for the seeds."""
    import transformers

    seeds = torch.from_numpy(np.load(seeds_path))
    model, ids = models.decoder(family)
    x = model.get_input_embeddings()(ids)
    before = model(ids).logits[:, -1]
    patch(ARCHITECTURES.get(family, family), rules)
    after = model(ids).logits[:, -1]
    found = {str(kind).removeprefix("torch."): torch.stack([
        relevance(deepcopy(model).to(kind), x.to(kind), seed.to(kind)) for seed in seeds]).numpy()
        for kind in (torch.float32, torch.float64)}
    np.savez(found_path, before=before.detach().numpy(), after=after.detach().numpy(),
             transformers=transformers.__version__, **found)
