"""Recurrent layers as one operator each while a model is captured, `dlbc::recurrent`.

torch.export traces `aten.lstm` and its like step by step to learn their shapes, which fixes the length of sequences
and takes long; and it cannot trace packed sequences at all, whose sizes depend on lengths. Inside `recurrent_layers`
these layers call our operator instead, whose shapes are plain, and a packed sequence is the padded one with its
lengths:

- `pack_padded_sequence` packs nothing: its data are the padded sequence [T * B, I], its batch sizes the lengths [B];
- a recurrent layer called with such data gets the lengths as an operand of the operator;
- `pad_packed_sequence` gives back T steps, those past a row's length set to the padding value.

Anything else that reads packed data would see the padding as well, so it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode

KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_LIBRARY: Any = torch.library.Library("dlbc", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("recurrent(str kind, Tensor x, Tensor[] states, Tensor[] params, Tensor? lengths, bool has_biases, "
                "int layers, bool bidirectional, bool batch_first) -> (Tensor, Tensor, Tensor)")
_ASKS = frozenset({"__get__", "dim", "size", "numel"})
"""What may be asked of packed data: properties such as its element type."""


def _compute(kind: str, x: Tensor, states: list[Tensor], params: list[Tensor], lengths: Tensor | None, has_biases: bool,
             layers: int, bidirectional: bool, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [T, B, H] (batch first if asked), last h, and last c (empty but for an LSTM), by torch's own layers."""
    function: Callable[..., tuple[Tensor, ...]] = getattr(torch, kind)
    options = (params, has_biases, layers, 0.0, False, bidirectional)
    with torch._C.DisableTorchFunction():
        if lengths is None:
            y, *last = function(x, states if kind == "lstm" else states[0], *options, batch_first)
        else:
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first, enforce_sorted=False)
            order, back = packed.sorted_indices, packed.unsorted_indices
            assert order is not None and back is not None
            first = [state.index_select(1, order) for state in states]
            data, *last = function(packed.data, packed.batch_sizes, first if kind == "lstm" else first[0], *options)
            y, _ = pad_packed_sequence(PackedSequence(data, packed.batch_sizes, order, back), batch_first,
                                       total_length=x.shape[1 if batch_first else 0])
            last = [state.index_select(1, back) for state in last]
    return y, last[0], last[1] if kind == "lstm" else x.new_empty(0)


def _shapes(kind: str, x: Tensor, states: list[Tensor], params: list[Tensor], lengths: Tensor | None, has_biases: bool,
            layers: int, bidirectional: bool, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors of the results' shapes."""
    rows, check = x.shape[0 if batch_first else 1], cast("Callable[..., None]", torch._check)
    for state in states:
        check(state.shape[1] == rows, lambda: "the initial states have not the rows of the input")
    if lengths is not None:
        check(lengths.shape[0] == rows, lambda: "there is not one length for each row of the input")
    y = x.new_empty((*x.shape[:2], states[0].shape[2] * (1 + bidirectional)))
    return y, torch.empty_like(states[0]), torch.empty_like(states[1]) if kind == "lstm" else x.new_empty(0)


_LIBRARY.impl("recurrent", _compute, "CompositeExplicitAutograd")
torch.library.register_fake("dlbc::recurrent", _shapes, lib=_LIBRARY)


@dataclass
class _Packed:
    """A packed sequence: its data, its lengths in place of batch sizes, and its shape as a padded one."""

    data: Tensor
    lengths: Tensor
    shape: tuple[Any, ...]
    padded_with_zeros: bool = False


@contextmanager
def recurrent_layers(model: nn.Module) -> Iterator[None]:
    """While it is entered, what recurrent layers and packed sequences ask torch for in this thread goes to
    `dlbc::recurrent`; and the model's layers do not check states against the sizes of a packed sequence."""
    layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    for layer in layers:
        vars(layer)["check_forward_args"] = partial(_check_unless_packed, layer)
    try:
        with _Redirection():
            yield
    finally:
        for layer in layers:
            vars(layer).pop("check_forward_args", None)


def _check_unless_packed(layer: nn.RNNBase, x: Tensor, states: Any, batch_sizes: Tensor | None) -> None:
    if batch_sizes is None:
        type(layer).check_forward_args(layer, x, states, batch_sizes)


@dataclass
class _Redirection(TorchFunctionMode):
    """Calls of torch as they are made, those of recurrent layers exchanged."""

    packed: list[_Packed] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        """What a call of torch gives: our operator's results for recurrent layers, else its own."""
        name, given = getattr(func, "__name__", ""), dict(kwargs or {})
        if name in KINDS and len(args) == 9:
            return self._layer(name, args)
        if name == "_pack_padded_sequence" and not given:
            return self._pack(*args)
        held = self._held(args)
        if held is not None:
            return self._asked(name, held, func, args, given)
        return func(*args, **given)

    def _layer(self, kind: str, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """`lstm(x, states, params, has_biases, layers, dropout, train, bidirectional, batch_first)`, or
        `lstm(data, batch_sizes, states, params, has_biases, layers, dropout, train, bidirectional)`."""
        held = self._held(args[:2])
        x, lengths, batch_first = args[0], None, args[8]
        if held is not None:
            x, lengths, batch_first = held.data.reshape(held.shape), held.lengths, False
            args = (x, *args[2:])
        states = list(args[1]) if isinstance(args[1], list | tuple) else [args[1]]
        _, _, params, has_biases, layers, dropout, train, bidirectional = args[:8]
        if train and dropout:
            raise RuntimeError("dropout between the layers is active although the model is in eval mode")
        found = torch.ops.dlbc.recurrent(kind, x, states, list(params), lengths, has_biases, layers, bidirectional,
                                         batch_first)
        y, *last = found if kind == "lstm" else found[:2]
        if held is not None:
            y = y.flatten(0, 1)
            self.packed.append(_Packed(y, held.lengths, (*held.shape[:2], y.shape[-1]), padded_with_zeros=True))
        return y, *last

    def _pack(self, x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        x = x.transpose(0, 1) if batch_first else x
        data, own = x.flatten(0, 1), lengths.clone()
        self.packed.append(_Packed(data, own, tuple(x.shape)))
        return data, own

    def _held(self, args: Sequence[Any]) -> _Packed | None:
        """The packed sequence whose data or lengths are among the arguments; data go before lengths."""
        flat = [one for arg in args for one in (arg if isinstance(arg, list | tuple) else (arg,))]
        for of in ("data", "lengths"):
            for held in self.packed:
                if any(one is getattr(held, of) for one in flat):
                    return held
        return None

    def _asked(self, name: str, held: _Packed, func: Any, args: Sequence[Any], given: dict[str, Any]) -> Any:
        """What a call gets that has a packed sequence's data or lengths among its arguments."""
        of_sizes = args[0] is held.lengths
        if name == "_pad_packed_sequence":
            return self._pad(held, *args[2:])
        if of_sizes and name == "__getitem__" and args[1] == 0:
            return held.shape[1]
        if of_sizes and name == "size" and args[1:] == (0,):
            return held.shape[0]
        if name in _ASKS:
            return func(*args, **given)
        raise RuntimeError(f"packed sequence read by `{name}`")

    def _pad(self, held: _Packed, batch_first: bool, padding: float, total: Any) -> tuple[Tensor, Tensor]:
        y, (steps, rows, *rest) = held.data.reshape(held.shape), held.shape
        if padding or not held.padded_with_zeros:
            shown = torch.arange(steps, device=y.device).unsqueeze(1) < held.lengths.to(y.device)
            y = torch.where(shown.reshape(steps, rows, *(1,) * len(rest)), y, padding)
        if total is not steps:
            y = F.pad(y, (*(0, 0) * (y.ndim - 1), 0, total - steps), value=padding)
        return y.transpose(0, 1) if batch_first else y, held.lengths.clone()
