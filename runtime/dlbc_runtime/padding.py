"""Texts of different lengths as one batch: lists of token ids are padded at their ends, and masked there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dlbc_runtime.arrays import Array, as_numpy
from dlbc_runtime.errors import InputError
from dlbc_runtime.signature import InputSpec, TensorSpec

Lengths = Mapping[str, tuple[int, ...]]
_INTEGERS = ("i64", "i32", "i16", "i8", "u8", "bool")


def padded(spec: InputSpec, args: Sequence[Any], kwargs: Mapping[str, Any], pad: int, array: Callable[[Array], Any]
           ) -> tuple[tuple[Any, ...], dict[str, Any], Lengths]:
    """The call with each list of rows as one array [B,T], and the lengths of their rows by name.

    Rows are 1-D: tensors, arrays or lists of whole numbers. They are padded after their end, the token ids by `pad`,
    others by 0; the attention mask is made where it is not given. `array` makes the model's arrays of numpy's.
    InputError for rows that are something else, and where the model has no mask to hide the padding.
    """
    named = dict(zip(spec.positional, args, strict=False))
    lists = {name: value for name, value in {**named, **kwargs}.items() if _is_list(spec.trees.get(name), value)}
    if not lists:
        return tuple(args), dict(kwargs), {}
    rows = {name: _rows(name, value) for name, value in lists.items()}
    lengths = {name: tuple(map(len, own)) for name, own in rows.items()}
    first = next((name for name in rows if "mask" not in name), next(iter(rows)))
    for name, own in lengths.items():
        if own != lengths[first]:
            raise InputError(f"the rows of `{name}` have the lengths {list(own)}, those of `{first}` "
                             f"{list(lengths[first])}", where="inputs", hint="give rows of the same lengths")
    width = max(lengths[first])
    mask = next((name for name, tree in spec.trees.items() if "attention_mask" in name and _is_ids(tree)), None)
    if mask is None and len(set(lengths[first])) > 1:
        raise InputError(f"the rows of `{first}` have the lengths {list(lengths[first])}, and the model takes no "
                         "attention mask to hide padding", where=first,
                         hint="compile with attention_mask among the example inputs, or explain row by row")
    found = {name: _padded(own, width, pad if name == first else 0, spec.trees[name]) for name, own in rows.items()}
    if mask is not None and {**named, **kwargs}.get(mask) is None:
        seen = [np.ones(length, np.int64) for length in lengths[first]]
        found[mask], lengths[mask] = _padded(seen, width, 0, spec.trees[mask]), lengths[first]
    arrays = {name: array(value) for name, value in found.items()}
    count = len(args)
    own_args = tuple(arrays.get(name, value) for name, value in zip(spec.positional, args, strict=False))
    rest = {name: value for name, value in arrays.items() if name not in spec.positional[:count]}
    return (*own_args, *args[len(own_args):]), {**kwargs, **rest}, lengths


def _is_ids(tree: object) -> bool:
    return isinstance(tree, TensorSpec) and len(tree.shape) == 2 and tree.dtype in _INTEGERS


def _is_list(tree: object, value: object) -> bool:
    """Whether rows are given in place of an input [B,T] of whole numbers."""
    return _is_ids(tree) and isinstance(value, list | tuple)


def _rows(name: str, value: Sequence[Any]) -> list[Array]:
    rows = []
    for number, row in enumerate(value):
        given: Array = as_numpy(row)
        if given.ndim != 1 or given.dtype.kind not in "iub" or not len(given):
            raise InputError(f"row {number} of `{name}` is {given.dtype!s}{list(given.shape)}, not token ids [T]",
                             where=name, hint="give a list of 1-D tensors or lists of whole numbers")
        rows.append(given)
    if not rows:
        raise InputError(f"the list of rows of `{name}` is empty", where=name, hint="give at least one row")
    return rows


def _padded(rows: Sequence[Array], width: int, pad: int, tree: object) -> Array:
    assert isinstance(tree, TensorSpec)
    names = {"i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8", "u8": "uint8", "bool": "bool"}
    found = np.full((len(rows), width), pad, names[tree.dtype])
    for number, row in enumerate(rows):
        found[number, :len(row)] = row
    return found
