"""Importing zennit and lxt without torchvision.

Both import torchvision for the names of its model classes only: zennit because its canonizers ask whether a module is
a torchvision `BasicBlock`, lxt to patch torchvision's vision transformer. The CPU build of torch has no torchvision
that fits it, and one that does not fit breaks transformers. So while a peer is imported, and no longer, stand-ins with
these names lie in `sys.modules`; the `BasicBlock` among them is the residual block of `tests/zoo.py`, whose attributes
are named as torchvision's, so that zennit's own ResNetCanonizer applies to the zoo's ResNet.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import nn

from tests import zoo


class Bottleneck(nn.Module):
    """A name that zennit asks for; no model here has one."""


@contextmanager
def torchvision_names() -> Iterator[None]:
    """While this holds, `torchvision.models.resnet` and `.vision_transformer` can be imported; afterwards not."""
    if importlib.util.find_spec("transformers"):
        import transformers  # noqa: F401  (looks for torchvision once, when first imported: it must find none)
    made = {"torchvision": ModuleType("torchvision"), "torchvision.models": ModuleType("torchvision.models"),
            "torchvision.models.resnet": ModuleType("torchvision.models.resnet"),
            "torchvision.models.vision_transformer": ModuleType("torchvision.models.vision_transformer")}
    resnet, transformer = made["torchvision.models.resnet"], made["torchvision.models.vision_transformer"]
    vars(resnet).update(BasicBlock=zoo._Residual, Bottleneck=Bottleneck)
    vars(transformer).update(nn=nn)
    vars(made["torchvision.models"]).update(resnet=resnet, vision_transformer=transformer)
    vars(made["torchvision"]).update(models=made["torchvision.models"])
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
