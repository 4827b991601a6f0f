"""What plain torch reads, writes, multiplies and holds, counted while it runs: on the meta device for any size.

Each op that torch dispatches is one launch that reads its operands and writes its results once; views are none. Memory
is that of the tensors that are alive, by their storages; what libraries take for themselves is not seen, nor the
allocator's slack. On the meta device `scaled_dot_product_attention` counts as the fused kernel that it is on a GPU: it
keeps queries, keys, values, result and one number for each query.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from _floors import RATES, Step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Tally(TorchDispatchMode):
    """Counts what runs inside of it: `steps`, and `peak`, the most bytes that its tensors held."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.held = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op, and count it."""
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and given[0].is_meta:
            return given[0].dtype == torch.bool  # transformers asks whether positions are 0, 1, 2 ...: they are
        before = {x.untyped_storage()._cdata for x in given}
        found = func(*args, **(kwargs or {}))
        results = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        fresh = [x for x in results if x.untyped_storage()._cdata not in before]
        for x in fresh:
            self.hold(x)
        written = fresh or ([] if func.is_view else results)
        if written and func not in _FREE:
            self.count(func, args, kwargs or {}, found, given, written)
        return found

    def hold(self, x: Tensor) -> None:
        """A new tensor, until nothing refers to its storage any more."""
        storage = x.untyped_storage()
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self.release, size)

    def release(self, size: int) -> None:
        """It is gone."""
        self.held -= size

    def count(self, func: Any, args: Any, kwargs: Any, found: Any, given: list[Tensor], written: list[Tensor]) -> None:
        """One launch."""
        packet = func._overloadpacket
        name = str(packet).removeprefix("aten.")
        products = 0.0
        if packet in flop_registry:
            products = flop_registry[packet](*args, **kwargs, out_val=found) / RATES[_kind(given, name)]
        elif packet in _ATTENTION:
            products = _attended(packet, args) / RATES[_kind(given, name)]
        read = sum(_bytes(x) for x in given)
        if name in _GATHERS:
            read = sum(_bytes(x) for x in written)
        self.steps.append(Step("torch", name, "", read + sum(_bytes(x) for x in written), products))


def counted(run: Callable[[], object], *, meta: bool = True) -> Tally:
    """What a run takes, once. `meta`: its tensors are on the meta device."""
    attention = "torch.nn.functional.scaled_dot_product_attention"
    with Tally() as tally, mock.patch(attention, _sdpa) if meta else nullcontext():
        run()
    return tally


def fused(steps: list[Step]) -> list[Step]:
    """The same if everything pointwise cost nothing: only products and attention are left. No compiler does better
    with the same products."""
    return [step for step in steps if step.products]


_FREE = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.empty_strided.default,
         torch.ops.aten.detach.default)
"""Ops that touch no memory."""
_GATHERS = ("embedding", "index", "gather", "index_select", "slice_backward", "select_backward")
"""Ops that read no more than they write."""


def _bytes(x: Tensor) -> int:
    """Bytes of a tensor's distinct elements: repeated ones are read once."""
    return x.element_size() * math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step)


def _kind(given: list[Tensor], name: str) -> str:
    """What multiplies by torch's defaults: float32 convolutions are tf32, other products of float32 exact."""
    if given[0].dtype in (torch.bfloat16, torch.float16):
        return "16 bits"
    return "tf32" if "conv" in name else "float32"


# --- attention as one op -----------------------------------------------------------------------------

@torch.library.custom_op("dlbc_counted::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("attention is counted on the meta device only")


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("dlbc_counted::attention_gradient", mutates_args=())
def _attention_gradient(given: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
                        causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("attention is counted on the meta device only")


@_attention_gradient.register_fake
def _(given: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
      causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _backward(ctx: Any, given: Tensor, _: Tensor) -> tuple[Any, ...]:
    q, k, v, mask, out, lse = ctx.saved_tensors
    return (*_attention_gradient(given, q, k, v, mask, out, lse, ctx.causal), None, None)


def _saved(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, mask, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, mask, *output)


_attention.register_autograd(_backward, setup_context=_saved)
_ATTENTION = (torch.ops.dlbc_counted.attention, torch.ops.dlbc_counted.attention_gradient)


def _attended(packet: Any, args: Any) -> float:
    """Operations: two products of queries with keys forward, five for the gradient; half of each where causal."""
    q, k = args[:2] if packet == _ATTENTION[0] else args[1:3]
    times = 2 if packet == _ATTENTION[0] else 5
    return float(times * 2 * math.prod(q.shape) * k.shape[-2] * (0.5 if args[-1] else 1.0))


def _sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
          is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, as one op."""
    found: Tensor = _attention(query, key, value, attn_mask, is_causal)[0]
    return found
