"""Named arrays that become numpy arrays on first access, and their form in JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, KeysView, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_KINDS = "biuf"  # boolean, signed, unsigned, floating


class Arrays(Mapping[str, Array]):
    """Arrays by name. Torch tensors may be given: each is converted when it is first asked for.

    Values are referenced, not copied, so whoever makes one hands over arrays that nobody changes later.
    16-bit floating types become float32.
    """

    __slots__ = ("_source",)

    def __init__(self, source: Mapping[str, object]) -> None:
        self._source: dict[str, object] = dict(source._source if isinstance(source, Arrays) else source)

    def __getitem__(self, name: str) -> Array:
        value = self._source[name]
        if not (isinstance(value, np.ndarray) and value.dtype != np.float16):
            value = self._source[name] = as_numpy(value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def keys(self) -> KeysView[str]:
        """The names. The dict's own: going through them by `Mapping` takes as long as a small explanation's ops."""
        return self._source.keys()

    @classmethod
    def adopted(cls, source: dict[str, object]) -> Arrays:
        """Arrays of a dict that nobody else has, which is kept."""
        found = cls.__new__(cls)
        found._source = source
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one array, without converting it."""
        shape = getattr(self._source[name], "shape", None)
        return tuple(np.shape(self[name]) if shape is None else shape)

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{name!r}: {list(self.shape(name))}" for name in self) + "}"


NOTHING = Arrays({})
"""No arrays."""


def as_numpy(value: object) -> Array:
    """`value` (array, torch tensor on any device, number or nested list) as a numpy array."""
    array = _from_torch(value) if hasattr(value, "detach") else np.asarray(value)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _from_torch(tensor: Any) -> Array:  # recognised by what it can do: this package runs without torch
    plain = tensor.detach()
    plain = plain if plain.device.type == "cpu" else plain.cpu()
    short = plain.element_size() == 2 and plain.is_floating_point()
    found: Array = (plain.float() if short else plain).numpy()
    return found


def array_to_json(array: Array) -> dict[str, Json]:
    """`{"dtype", "shape", "data"}` with the elements in one flat list; floats keep every digit they have."""
    flat = array.ravel()
    data: list[Json]
    if array.dtype.kind == "f":
        # float32 through its own shortest text: 0.1 and not 0.10000000149011612.
        data = [_float_to_json(text) for text in flat.astype(str).tolist()]
    elif array.dtype.kind in _KINDS:
        data = flat.tolist()
    else:
        raise TypeError(f"arrays of {array.dtype} cannot be written")
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": data}


def array_from_json(stored: Json) -> Array:
    """The array that `array_to_json` wrote. Raises ValueError when it is not one."""
    if not isinstance(stored, dict):
        raise ValueError("an array must be an object with dtype, shape and data")
    dtype, shape, data = stored.get("dtype"), stored.get("shape"), stored.get("data")
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(data, list):
        raise ValueError("an array must be an object with dtype, shape and data")
    try:
        kind = np.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"unknown dtype {dtype!r}") from error
    if kind.kind not in _KINDS:
        raise ValueError(f"unknown dtype {dtype!r}")
    sizes = [size for size in shape if isinstance(size, int) and size >= 0]
    if len(sizes) != len(shape) or math.prod(sizes) != len(data):
        raise ValueError(f"shape {shape} does not hold {len(data)} elements")
    numbers = [_NOT_FINITE.get(item, item) if isinstance(item, str) else item for item in data]
    if not all(isinstance(number, int | float) for number in numbers):
        raise ValueError("an array holds something that is not a number")
    return np.array(numbers, dtype=kind).reshape(sizes)


def _float_to_json(text: str) -> Json:
    number = float(text)
    return number if math.isfinite(number) else text
