"""Pictures as people have them as the input of a model: opened, processed, and as the model saw them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlbc_runtime.arrays import Array, as_numpy
from dlbc_runtime.errors import InputError
from dlbc_runtime.signature import TensorSpec


def pictures_of(inputs: object) -> list[Any] | None:
    """The pictures that were given: of pillow, files of them, or uint8 arrays [H,W,3]. None where they are none."""
    several = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    if not several or not any(_is_picture(one) for one in several):
        return None
    return [_opened(one, number) for number, one in enumerate(several)]


def _is_picture(value: object) -> bool:
    return (isinstance(value, str | Path | bytes) or (hasattr(value, "convert") and hasattr(value, "mode"))
            or (isinstance(value, np.ndarray) and value.dtype == np.uint8))


def _opened(value: Any, number: int) -> Any:
    if isinstance(value, str | Path):
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError as problem:
            raise InputError("pictures are read with pillow, which is missing", hint="pip install pillow") from problem
        try:
            with Image.open(value) as opened:
                return opened.convert("RGB")
        except FileNotFoundError as problem:
            raise InputError(f"there is no picture {str(value)!r:.80}", where="inputs",
                             hint="check the name; the model takes pictures, no text") from problem
        except (UnidentifiedImageError, OSError) as problem:
            raise InputError("no picture that can be read", where=str(value), hint="give a .png or .jpg") from problem
    if isinstance(value, np.ndarray) and (value.ndim != 3 or value.shape[2] not in (1, 3)):
        raise InputError(f"picture {number} is {value.dtype}{list(value.shape)}", where="inputs",
                         hint="give uint8 [H,W,3], a picture of pillow, or the model's own input as a tensor of floats")
    if not _is_picture(value) or isinstance(value, bytes):
        raise InputError(f"picture {number} is {type(value).__name__}", where="inputs",
                         hint="give a picture of pillow, the name of a file, or the model's own input as a tensor")
    return value


def processed(pictures: list[Any], processor: Any, spec: TensorSpec
              ) -> tuple[Array, dict[str, Any], tuple[Array, ...]]:
    """The model's input [B,C,H,W], what else a processor made (by name), and what is to be seen of it, uint8 [H,W,C].

    `processor`: one of transformers, or a function that makes a tensor [C,H,W] of a picture. InputError without one,
    and where it makes inputs of different sizes.
    """
    if processor is None:
        raise InputError("there is no processor for the picture", where="tokenizer",
                         hint="give the model's own: tokenizer=AutoImageProcessor.from_pretrained(...); or a function "
                              "that makes its input [C,H,W] of a picture")
    mode = "L" if spec.shape[1] == 1 else "RGB"
    pictures = [one.convert(mode) if hasattr(one, "convert") else one for one in pictures]
    own = getattr(processor, "image_processor", processor)
    if hasattr(own, "model_input_names"):
        made = dict(own(images=pictures, return_tensors="pt"))
        rows = [as_numpy(one) for one in made.pop("pixel_values")]
    elif callable(own):
        made, rows = {}, [as_numpy(own(one)) for one in pictures]
        rows = [one[0] if one.ndim == len(spec.shape) and len(one) == 1 else one for one in rows]
    else:
        raise InputError(f"the processor is {type(own).__name__}, which cannot be called", where="tokenizer",
                         hint="give AutoImageProcessor.from_pretrained(...), or a function")
    if len({row.shape for row in rows}) > 1:
        raise InputError(f"the processor made inputs of the shapes {[list(row.shape) for row in rows]}",
                         where="tokenizer", hint="give a processor that makes them of one size, or picture by picture")
    pixels = np.stack(rows)
    return pixels, made, tuple(_picture(row, own) for row in pixels) if pixels.ndim == 4 else ()


def _picture(pixels: Array, processor: Any) -> Array:
    """What the model saw, uint8 [H,W,C], of its input [C,H,W]: normalised back where the processor says how."""
    mean, deviation = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    picture = np.moveaxis(pixels.astype(np.float64), 0, -1)
    if getattr(processor, "do_normalize", False) and mean is not None and deviation is not None:
        picture = picture * np.asarray(deviation) + np.asarray(mean)
    else:  # the range is not known: the whole of it is shown
        picture = (picture - picture.min()) / max(float(np.ptp(picture)), 1e-12)
    found: Array = np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8)
    return found
