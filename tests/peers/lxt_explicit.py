"""lxt's other half, its explicit functions: their stabiliser can be set (lxt.efficient, gradient times input, has
none).

They carry relevance itself and divide by `y + eps`, without the sign of y; so they equal the published epsilon rule
only as far as eps is small beside |y|.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import zoo
from tests.peers.models import Built, _seeded


class Block(nn.Module):
    """One transformer layer, written with operations that can be exchanged: attention, GELU MLP, two sums, a head."""

    def __init__(self, width: int = 32, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(width, 48), nn.Linear(48, width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return block(self, x, Plain())


class Plain:
    """The operations as torch has them."""

    def linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return layer(x)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def softmax(self, x: Tensor) -> Tensor:
        return x.softmax(-1)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def norm(self, x: Tensor, layer: nn.RMSNorm) -> Tensor:
        return layer(x)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class Explicit(Plain):
    """The operations as lxt.explicit has them, with one stabiliser."""

    def __init__(self, eps: float) -> None:
        import lxt.explicit.functional as functional
        from lxt.explicit.rules import identity

        self.lxt, self.identity, self.eps = functional, identity, eps

    def linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return self.lxt.linear_epsilon(x, layer.weight, layer.bias, self.eps)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return self.lxt.matmul(a, b, False, self.eps)

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return self.lxt.mul2(x, factor)

    def softmax(self, x: Tensor) -> Tensor:
        return self.lxt.softmax(x, -1)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self.lxt.add2(a, b, False, self.eps)

    def norm(self, x: Tensor, layer: nn.RMSNorm) -> Tensor:
        return self.lxt.rms_norm_identity(x, layer.weight, layer.eps)

    def gelu(self, x: Tensor) -> Tensor:
        return self.identity(F.gelu, x)


def block(self: Block, x: Tensor, ops: Plain) -> Tensor:
    """The layer's output at the last position, [B, classes]."""
    normal = ops.norm(x, self.norm1)
    q, k, v = (ops.linear(normal, layer).unflatten(-1, (self.heads, -1)).transpose(1, 2)
               for layer in (self.q, self.k, self.v))
    scores = ops.matmul(q, k.transpose(-1, -2))
    found = ops.matmul(ops.softmax(ops.scale(scores, q.shape[-1] ** -0.5)), v)
    x = ops.add(x, ops.linear(found.transpose(1, 2).flatten(2), self.out))
    hidden = ops.gelu(ops.linear(ops.norm(x, self.norm2), self.up))
    return ops.linear(ops.add(x, ops.linear(hidden, self.down))[:, -1], self.head)


def explicit_block() -> Built:
    """The layer with random weights and an input [2, 6, 32]."""
    return _seeded(lambda: (zoo.randomise(Block()), torch.randn(2, 6, 32)))


def relevance(model: nn.Module, x: Tensor, seed: Tensor, *, eps: float) -> Tensor:
    """Relevance of x by lxt.explicit: what its backward pass hands back is relevance itself."""
    assert isinstance(model, Block)
    x = x.clone().requires_grad_(True)
    block(model, x, Explicit(eps)).backward(seed)
    assert x.grad is not None
    return x.grad
