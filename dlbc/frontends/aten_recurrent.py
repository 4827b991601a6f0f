"""Recurrent layers: one `lstm`, `gru` or `rnn` per layer and direction; stacking, directions and lengths around it."""

from __future__ import annotations

from collections.abc import Sequence

from dlbc.errors import UnsupportedOpError
from dlbc.frontends.aten import UNSUPPORTED, Tracer, aten, type_of
from dlbc.ir.core import Operand, Value
from dlbc.ir.dims import Dim

_OPS: dict[str, tuple[str, dict[str, str]]] = {
    "lstm": ("lstm", {}), "gru": ("gru", {}), "rnn_tanh": ("rnn", {}), "rnn_relu": ("rnn", {"activation": "relu"})}
Operands = Sequence[Operand]


@aten("recurrent")
def recurrent(at: Tracer, kind: str, x: Operand, states: Operands, params: Operands, lengths: Operand,
              has_biases: bool, layers: int, bidirectional: bool, batch_first: bool) -> tuple[Operand, ...]:
    """A whole nn.LSTM, nn.GRU or nn.RNN (see `recurrent_capture`): outputs, last h and, for an LSTM, last c."""
    directions, each = 1 + bidirectional, 4 if has_biases else 2
    if len(params) != layers * directions * each:
        raise UnsupportedOpError("nn.LSTM with proj_size is not supported", where=at.origin,
                                 hint="use proj_size=0 and a linear layer on the outputs")
    x = at.permuted(x, (1, 0, 2)) if batch_first else x
    last: list[list[Operand]] = [[] for _ in states]
    for layer in range(layers):
        outputs: list[Operand] = []
        for direction in range(directions):
            number = layer * directions + direction
            start = [at.select(state, dim=0, index=number) for state in states]
            found = _layer(at, kind, x, start, params[number * each:(number + 1) * each], lengths, bool(direction))
            for ends, steps in zip(last, found, strict=True):
                ends.append(at.select(steps, dim=0, index=0 if direction else -1))
            outputs.append(found[0])
        x = at.cat(*outputs, dim=-1) if bidirectional else outputs[0]
    y = x if lengths is None else at.where(_shown(at, x, lengths), x, 0.0)
    y = at.permuted(y, (1, 0, 2)) if batch_first else y
    return y, *(_stacked(at, ends) for ends in last), *(None,) * (2 - len(last))


def _layer(at: Tracer, kind: str, x: Operand, start: Operands, params: Operands, lengths: Operand, reverse: bool
           ) -> tuple[Value, ...]:
    """The states of one layer in one direction after each step."""
    op, attrs = _OPS[kind]
    biases = tuple(params[2:]) or (None, None)
    return at.op(op, x, *start, *params[:2], *biases, lengths, reverse=reverse, **attrs)


def _shown(at: Tracer, x: Operand, lengths: Operand) -> Operand:
    """True at the steps that a row has, [T, B, 1]."""
    steps, rows, _ = type_of(x).shape
    return at.lt(at.reshape(at.arange(stop=steps), shape=(steps, 1, 1)), at.reshape(lengths, shape=(1, rows, 1)))


def _stacked(at: Tracer, states: Operands) -> Operand:
    """States [B, H] as [N, B, H]."""
    raised = [at.reshape(state, shape=(1, *type_of(state).shape)) for state in states]
    return at.cat(*raised, dim=0) if len(raised) > 1 else raised[0]


@aten("lstm.input")
def lstm(at: Tracer, x: Operand, states: Operands, params: Operands, has_biases: bool, layers: int, dropout: float,
         train: bool, bidirectional: bool, batch_first: bool) -> tuple[Operand, ...]:
    """An LSTM that was called as a function with keyword arguments."""
    return recurrent(at, "lstm", x, states, params, None, has_biases, layers, bidirectional, batch_first)


@aten("gru.input", "rnn_tanh.input", "rnn_relu.input")
def gru(at: Tracer, x: Operand, state: Operand, params: Operands, has_biases: bool, layers: int, dropout: float,
        train: bool, bidirectional: bool, batch_first: bool) -> tuple[Operand, ...]:
    """The same of a GRU or RNN."""
    return recurrent(at, at.target.partition(".")[0], x, [state], params, None, has_biases, layers, bidirectional,
                     batch_first)[:2]


# --- cells: one step ---------------------------------------------------------------------------------

@aten("lstm_cell")
def lstm_cell(at: Tracer, x: Operand, states: Operands, *params: Operand) -> tuple[Operand, ...]:
    """One step of an LSTM: h and c."""
    return tuple(_one_step(at, "lstm", x, states, params))


@aten("gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def other_cell(at: Tracer, x: Operand, state: Operand, *params: Operand) -> Operand:
    """One step of a GRU or RNN: h."""
    return _one_step(at, at.target.partition("_cell")[0], x, [state], params)[0]


def _one_step(at: Tracer, kind: str, x: Operand, states: Operands, params: Operands) -> list[Operand]:
    only: tuple[Dim, ...] = (1, *type_of(x).shape)
    return [at.select(steps, dim=0, index=0)
            for steps in _layer(at, kind, at.reshape(x, shape=only), states, params, None, False)]


UNSUPPORTED.update(dict.fromkeys(
    ("lstm.data", "gru.data", "rnn_tanh.data", "rnn_relu.data", "_pack_padded_sequence", "_pad_packed_sequence"),
    "call nn.LSTM, nn.GRU or nn.RNN with what pack_padded_sequence gave, or with padded sequences"))
UNSUPPORTED.update(dict.fromkeys(
    ("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "quantized_lstm", "quantized_gru"),
    "quantized and fused recurrent cells are not supported; use nn.LSTM, nn.GRU or nn.RNN in floating point"))
