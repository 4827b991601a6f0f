"""Maps of token relevance as figures of matplotlib, from a relevance trace as `run_task` returns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dlbc.errors import DlbcError, InputError
from dlbc_runtime.arrays import Array, as_numpy
from dlbc_runtime.views.tokens import display

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Trace = Sequence[Mapping[str, Any]]


def relevance_map(trace: Trace, input_ids: Any, tokenizer: Any, generated_ids: Any, key: str,
                  size: tuple[float, float]) -> Figure:
    """Generated tokens from left to right, tokens of the input from top to bottom; colours are symmetric about 0."""
    tokens, new = _tokens(tokenizer, input_ids), _new_tokens(tokenizer, trace, input_ids, generated_ids)
    values = np.stack([_row(trace, number, key, len(tokens)) for number in range(len(trace))], 1)
    figure, axes = _figure(size)
    _image(figure, axes, values)
    axes.set_xticks(range(len(new)), new, rotation=60, ha="right")
    axes.set_yticks(range(len(tokens)), tokens)
    axes.set_xlabel("generated")
    axes.set_ylabel("input")
    return figure


def heat_of_token(trace: Trace, number: int, input_ids: Any, tokenizer: Any, generated_ids: Any, key: str,
                  size: tuple[float, float]) -> Figure:
    """One generated token: the relevance of each token of the input."""
    if not isinstance(number, int) or not 0 <= number < len(trace):
        raise InputError(f"there is no generated token {number!r}", where="n", hint=f"0 to {len(trace) - 1}")
    tokens, new = _tokens(tokenizer, input_ids), _new_tokens(tokenizer, trace, input_ids, generated_ids)
    figure, axes = _figure(size)
    _image(figure, axes, _row(trace, number, key, len(tokens))[None])
    axes.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right")
    axes.set_yticks([])
    axes.set_title(f"{new[number]!r}, token {number}")
    return figure


def _row(trace: Trace, number: int, key: str, length: int) -> Array:
    """Relevance [length] of the input at one step."""
    if not trace or key not in trace[number]:
        known = ", ".join(map(repr, trace[number])) if trace else "none: the trace is empty"
        raise InputError(f"the trace holds no relevance of {key!r}", where="timewise_relevance_out",
                         hint=f"give result['relevance_trace'] of run_task(return_relevance=True); names: {known}")
    value = as_numpy(trace[number][key])
    found: Array = value.reshape(-1, value.shape[-1])[0] if value.ndim else value.reshape(1)
    if len(found) < length:
        raise InputError(f"step {number} is about {len(found)} tokens, the input has {length}", where="input_ids",
                         hint="give the ids that were generated from")
    return found[:length]


def _tokens(tokenizer: Any, ids: Any) -> list[str]:
    flat = as_numpy(ids).reshape(-1).tolist()
    texts = [str(text) for text in tokenizer.convert_ids_to_tokens([int(one) for one in flat])]
    return [token.text or token.spaced for token in display(texts)]


def _new_tokens(tokenizer: Any, trace: Trace, input_ids: Any, generated_ids: Any) -> list[str]:
    """The text of each generated token; its number where the ids are not given. The ids may be those of all tokens."""
    if generated_ids is None:
        return [str(number) for number in range(len(trace))]
    flat, given = as_numpy(generated_ids).reshape(-1), as_numpy(input_ids).reshape(-1)
    if len(flat) > len(given) and (flat[:len(given)] == given).all():
        flat = flat[len(given):]
    if len(flat) < len(trace):
        raise InputError(f"{len(flat)} generated ids for {len(trace)} steps", where="generated_ids",
                         hint="give the ids of all generated tokens")
    return _tokens(tokenizer, flat[:len(trace)])


def _figure(size: tuple[float, float]) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise DlbcError("figures are drawn with matplotlib, which is missing",
                        hint="pip install 'dlbc[plots]'") from problem
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _image(figure: Any, axes: Any, values: Array) -> None:
    highest = float(np.abs(values).max()) or 1.0
    image = axes.imshow(values, cmap="RdBu_r", vmin=-highest, vmax=highest, aspect="auto")
    figure.colorbar(image, ax=axes, label="relevance")
