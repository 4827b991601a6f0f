"""The reference input: what an input is compared with, where differences to it are explained.

    dlbc.compile(model, x, reference="blur")
    dlbc.compile(model, x, reference=Reference.mean(sample))
    explainer(x, reference=Reference.token(tokenizer.pad_token_id))

A reference has as many rows as the input, or one for all of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import numpy as np

from dlbc_runtime.arrays import Array, Json, as_numpy
from dlbc_runtime.errors import InputError
from dlbc_runtime.signature import InputSpec, TensorSpec

KINDS = ("zero", "mean", "blur")
"""What may be given as text."""
_INPUTS = "inputs"


@dataclass(frozen=True, eq=False)
class Reference:
    """What stands in for the explained inputs. Made by the class methods; arrays are copied.

    `zero`: numbers that are all 0. `mean`: of a data set sample, or each row's own mean by channel. `blur`: the input
    itself, blurred. `token`: one token id everywhere. `of`: a given input, or one of these for each input by name.
    """

    kind: str = "zero"
    sigma: float = 10.0
    token_id: int = 0
    kept: tuple[int, ...] = ()
    array: Array | None = None
    parts: Mapping[str, Reference] = field(default_factory=dict)

    @classmethod
    def zero(cls) -> Reference:
        """Zeros. For normalised images that is the mean colour of the data they were normalised by."""
        return cls("zero")

    @classmethod
    def mean(cls, sample: object = None) -> Reference:
        """The mean over the rows of `sample` [N, ...]; without one, of each row of the input itself the mean of each
        channel (axis 1) over all positions. InputError where the sample is empty, not floating, or holds NaN."""
        if sample is None:
            return cls("mean")
        array = _array(sample, "the sample")
        if array.dtype.kind != "f" or array.ndim == 0 or not len(array):
            raise InputError(f"the sample is {array.dtype}{list(array.shape)}", where="Reference.mean",
                             hint="give floating inputs as to the model, one a row: [N, ...]")
        return cls("given", array=array.mean(0, keepdims=True, dtype=np.float64).astype(array.dtype))

    @classmethod
    def blur(cls, sigma: float = 10.0) -> Reference:
        """The input itself, each channel (axis 1) blurred by a Gaussian of `sigma` pixels along all later axes."""
        if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 < sigma < math.inf:
            raise InputError(f"sigma is {sigma!r}", where="Reference.blur", hint="give a positive number of pixels")
        return cls("blur", sigma=float(sigma))

    @classmethod
    def token(cls, token_id: int, keep: Collection[int] = ()) -> Reference:
        """The token `token_id` (padding, mask, unknown) in place of all but those in `keep` ([CLS] and [SEP], say)."""
        for number in (token_id, *keep):
            if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 0:
                raise InputError(f"{number!r} is no token id", where="Reference.token",
                                 hint="give numbers, as tokenizer.pad_token_id or tokenizer.mask_token_id")
        return cls("token", token_id=int(token_id), kept=tuple(sorted({int(number) for number in keep})))

    @classmethod
    def of(cls, reference: object) -> Reference:
        """An input to compare with: a tensor (one row, or as many as the input has), or for several inputs a dict by
        name, or a tuple in order, of tensors or references; None in place of those that are not explained."""
        if isinstance(reference, Reference):
            return reference
        if isinstance(reference, str):
            return cls.named(reference)
        if isinstance(reference, Mapping):
            return cls(_INPUTS, parts={str(name): cls.of(part) for name, part in reference.items() if part is not None})
        if isinstance(reference, list | tuple) and any(
                part is None or hasattr(part, "shape") or isinstance(part, Reference | str) for part in reference):
            return cls(_INPUTS, parts={f"#{i}": cls.of(part) for i, part in enumerate(reference) if part is not None})
        return cls("given", array=_array(reference, "the reference"))

    @classmethod
    def named(cls, text: str) -> Reference:
        """`zero`, `mean` or `blur`. InputError for other text."""
        if text not in KINDS:
            near = get_close_matches(text, KINDS, 1)
            raise InputError(f"there is no reference {text!r}", where="reference", hint=(
                f"did you mean {near[0]!r}?" if near else "it can be " + ", ".join(map(repr, KINDS)))
                + " Or give a tensor, or a dlbc.Reference")
        return cls(text)

    # What it is

    @property
    def fixed(self) -> bool:
        """Whether it is the same for all inputs of one shape: then the model is run on it once."""
        if self.kind == _INPUTS:
            return all(part.fixed for part in self.parts.values())
        return self.kind in ("zero", "given") or (self.kind == "token" and not self.kept)

    @cached_property
    def digest(self) -> bytes:
        """Of all it says: equal for equal references."""
        found = hashlib.blake2b(repr((self.kind, self.sigma, self.token_id, self.kept)).encode())
        if self.array is not None:
            found.update(repr((str(self.array.dtype), self.array.shape)).encode() + self.array.tobytes())
        for name, part in sorted(self.parts.items()):
            found.update(name.encode() + b"\0" + part.digest)
        return found.digest()

    def __str__(self) -> str:
        match self.kind:
            case "blur":
                return f"blur({self.sigma:g})"
            case "token":
                return f"token({self.token_id})"
            case "given":
                assert self.array is not None
                return f"given {list(self.array.shape)}"
            case "inputs":
                return ", ".join(f"{name}: {part}" for name, part in self.parts.items())
        return self.kind

    # What it is for a model

    def by_input(self, inputs: InputSpec, explained: Collection[str]) -> dict[str, Reference]:
        """The reference of each explained input. InputError for inputs that are unknown, not explained, or left out,
        and for references that do not fit an input's element type, rank or sizes."""
        found = self._parts(inputs, explained)
        for name in explained:
            if name not in found:
                raise InputError(f"there is no reference for input `{name}`", where="reference",
                                 hint="give one for each explained input, or name those to explain: explain=[...]")
        for spec in inputs.tensors:
            if spec.name in found:
                found[spec.name]._check(spec)
        return found

    def _parts(self, inputs: InputSpec, explained: Collection[str]) -> dict[str, Reference]:
        if self.kind != _INPUTS:
            if self.kind == "given" and len(explained) > 1:
                raise InputError(f"one tensor is given for {len(explained)} inputs: {', '.join(explained)}",
                                 where="reference", hint="give a dict by name, or a tuple in order")
            return dict.fromkeys(explained, self)
        found = {}
        for key, part in self.parts.items():
            name = key
            if key.startswith("#"):
                number = int(key[1:])
                if number >= len(inputs.names):
                    raise InputError(f"{number + 1} references, the model takes {len(inputs.names)} inputs",
                                     where="reference", hint=f"the model takes {inputs}")
                name = inputs.names[number]
            if name not in inputs.names:
                near = get_close_matches(name, inputs.names, 1)
                raise InputError(f"the model has no input `{name}`", where="reference",
                                 hint=f"did you mean `{near[0]}`?" if near else f"the model takes {inputs}")
            if name not in explained:
                raise InputError(f"input `{name}` is not explained, and is the same at the reference",
                                 where="reference", hint="leave it out, or give None in its place")
            if part.kind == _INPUTS:
                raise InputError(f"the reference of input `{name}` is a collection", where="reference",
                                 hint="give a tensor or a dlbc.Reference; inputs inside others go by `name.key`")
            found[name] = part
        return found

    def _check(self, spec: TensorSpec) -> None:
        floating = spec.dtype.startswith(("f", "bf"))
        if self.kind == "token":
            if floating:
                raise InputError(f"input `{spec.name}` holds numbers, not token ids", where="reference",
                                 hint='give "zero", "mean", "blur" or a tensor')
        elif self.kind == "given":
            self._check_array(spec, floating)
        elif not floating:
            raise InputError(f"{self.kind!r} is no reference for token ids, which input `{spec.name}` holds",
                             where="reference", hint="give dlbc.Reference.token(id), or a tensor of ids")
        elif self.kind in ("mean", "blur") and len(spec.shape) < 3:
            raise InputError(f"{self.kind!r} needs positions to go over, as images have; input `{spec.name}` is {spec}",
                             where="reference", hint="give dlbc.Reference.mean(sample) of a data set, or a tensor")

    def _check_array(self, spec: TensorSpec, floating: bool) -> None:
        assert self.array is not None
        shown = f"{self.array.dtype}{list(self.array.shape)}"
        if (self.array.dtype.kind == "f") != floating:
            raise InputError(f"the reference of input `{spec.name}` is {shown}, the model takes {spec}",
                             where="reference", hint="give it in the element type of the input")
        wrong = len(self.array.shape) != len(spec.shape) or any(
            isinstance(wanted, int) and own != wanted and (i or own != 1)
            for i, (own, wanted) in enumerate(zip(self.array.shape, spec.shape, strict=True)))
        if wrong:
            raise InputError(f"the reference of input `{spec.name}` is {shown}, the model takes {spec}",
                             where="reference", hint="give one row (axis 0 of size 1), or as many as the input has")

    # Numbers

    def numbers(self, name: str, x: Any) -> Array:
        """The reference of an input x [B, ...]: of its shape, or with one row. InputError where a given one does not
        fit it."""
        shape = tuple(int(size) for size in x.shape)
        row = (1, *shape[1:]) if shape else ()
        match self.kind:
            case "zero":
                return np.zeros(row, np.float32)
            case "given":
                assert self.array is not None
                if self.array.shape not in (shape, row):
                    raise InputError(f"the reference of input `{name}` has shape {list(self.array.shape)}, the input "
                                     f"{list(shape)}", where="reference",
                                     hint="give one row, or as many as the input has; the mean of a data set sample is "
                                          "dlbc.Reference.mean(sample)")
                return self.array
            case "token":
                if not self.kept:
                    return np.full(row, self.token_id, np.int64)
                ids = as_numpy(x)
                return np.where(np.isin(ids, self.kept), ids, self.token_id)
            case "mean":
                array = as_numpy(x)
                positions = tuple(range(2, array.ndim))
                mean = array.mean(positions, keepdims=True, dtype=np.float64).astype(array.dtype)
                return np.broadcast_to(mean, array.shape)
        return blurred(as_numpy(x), self.sigma)

    # Files

    def to_json(self) -> dict[str, Json]:
        """The same as plain JSON data, but for its arrays."""
        return {"kind": self.kind, "sigma": self.sigma, "token_id": self.token_id, "kept": list(self.kept),
                "parts": {name: part.to_json() for name, part in self.parts.items()}}

    def arrays(self, path: str = "reference") -> Iterator[tuple[str, Array]]:
        """Its arrays, each with a name."""
        if self.array is not None:
            yield path, self.array
        for name, part in self.parts.items():
            yield from part.arrays(f"{path}/{name}")

    @classmethod
    def from_json(cls, data: Mapping[str, Any], arrays: Mapping[str, Array], path: str = "reference") -> Reference:
        """Read what `to_json` and `arrays` gave. KeyError, TypeError, ValueError or InputError for something else."""
        kind = str(data["kind"])
        if kind not in (*KINDS, "given", "token", _INPUTS):
            raise ValueError(f"reference {kind!r}")
        given = _array(arrays[path], "the reference") if kind == "given" else None
        checked = cls.token(data["token_id"], tuple(data["kept"]))
        return cls(kind, cls.blur(data["sigma"]).sigma, checked.token_id, checked.kept, given, {
            str(name): cls.from_json(part, arrays, f"{path}/{name}") for name, part in data["parts"].items()})


def blurred(x: Array, sigma: float) -> Array:
    """x [B, C, ...] smoothed along every axis from the third on by a Gaussian, whose weights within x sum to 1."""
    found = x.astype(np.float64)
    for axis in range(2, x.ndim):
        places = np.arange(x.shape[axis])
        weights = np.exp(-0.5 * ((places[:, None] - places) / sigma) ** 2)
        weights /= weights.sum(1, keepdims=True)
        found = np.moveaxis(np.moveaxis(found, axis, -1) @ weights.T, -1, axis)
    return found.astype(x.dtype)


def _array(value: object, what: str) -> Array:
    """A copy as a numpy array. InputError for what is none, and for NaN and infinity."""
    try:
        array = np.array(as_numpy(value))
    except (TypeError, ValueError) as problem:
        raise InputError(f"{what} is {type(value).__name__}, not a tensor", where="reference") from problem
    if array.dtype.kind not in "iuf":
        raise InputError(f"{what} is {type(value).__name__} {value!r:.60}, which holds no numbers", where="reference",
                         hint='give "zero", "mean", "blur", a tensor or a dlbc.Reference')
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"{what} holds NaN or infinity", where="reference",
                         hint="differences to it would mean nothing; clean it first")
    return array
