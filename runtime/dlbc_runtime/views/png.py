"""PNG without a library: pictures and heat maps as bytes, data URIs and uint8 arrays."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np

from dlbc_runtime.arrays import Array
from dlbc_runtime.errors import InputError
from dlbc_runtime.views.colour import HEAT, Rgb, strengths

STEPS = 127  # shades on either side of zero in a heat map


def encode(pixels: Array, palette: list[tuple[int, int, int, int]] | None = None) -> bytes:
    """PNG of uint8 [H,W,3] (RGB), [H,W,4] (RGBA), or [H,W] indices into a `palette` of RGBA."""
    height, width = pixels.shape[:2]
    kind = 3 if palette is not None else {3: 2, 4: 6}[pixels.shape[2]]
    rows = np.ascontiguousarray(pixels, dtype=np.uint8).reshape(height, -1)
    filtered = np.zeros((height, rows.shape[1] + 1), np.uint8)  # a filter byte before each row, 0 for none
    filtered[:, 1:] = rows
    if palette is None:  # photographs pack better as the difference to the pixel on the left, filter 1
        filtered[:, 0] = 1
        filtered[:, 1 + pixels.shape[2]:] -= rows[:, :-pixels.shape[2]]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))]
    if palette is not None:
        chunks += [(b"PLTE", bytes(channel for entry in palette for channel in entry[:3])),
                   (b"tRNS", bytes(entry[3] for entry in palette))]
    chunks += [(b"IDAT", zlib.compress(filtered.tobytes(), 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))
        for tag, data in chunks)


def data_uri(png: bytes) -> str:
    """A PNG inside a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def shades(relevance: Array, full: float) -> Array:
    """Relevance as uint8 shades: 127 is zero, 0 and 254 the full colour."""
    return np.asarray(np.rint(strengths(relevance, full) * STEPS) + STEPS, dtype=np.uint8)


def heat_map(relevance: Array, full: float) -> bytes:
    """Relevance [H,W] as a PNG in the colours of the scale, the weaker the more transparent."""
    against, favouring = HEAT.colour(-1.0), HEAT.colour(1.0)
    palette = [_entry(against if shade < STEPS else favouring, abs(shade - STEPS)) for shade in range(2 * STEPS + 1)]
    return encode(shades(relevance, full), palette)


def as_picture(image: Array) -> Array:
    """A picture as uint8 [H,W,3]. Raises InputError for what is not one."""
    hint = "give uint8 [H,W,3] or [H,W], or floats between 0 and 1"
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or 0 in image.shape:
        raise InputError(f"a picture cannot have shape {list(image.shape)}", where="with_image()", hint=hint)
    if image.dtype != np.uint8:
        if image.dtype.kind != "f" or not (np.nanmin(image) >= 0 and np.nanmax(image) <= 1):
            raise InputError(f"a picture of {image.dtype} must have values between 0 and 1", where="with_image()",
                             hint=hint)
        image = np.rint(np.nan_to_num(image) * 255).astype(np.uint8)
    return _three_channels(image)


def stretched(values: Array) -> Array:
    """A model's image input [H,W,C], in whatever range, as uint8 [H,W,3] from its darkest to its brightest."""
    numbers = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(numbers.min()), float(numbers.max())
    return _three_channels(np.rint((numbers - low) / ((high - low) or 1.0) * 255).astype(np.uint8))


def resized(image: Array, height: int, width: int) -> Array:
    """An array [H,W,...] at another resolution: each new pixel is the mean of those it covers."""
    def edges(old: int, new: int) -> tuple[Array, Array]:
        start = (np.arange(new) * old) // new
        return start, np.maximum(-((-(np.arange(new) + 1) * old) // new), start + 1)

    (top, bottom), (left, right) = edges(image.shape[0], height), edges(image.shape[1], width)
    sums = np.zeros((image.shape[0] + 1, image.shape[1] + 1, *image.shape[2:]))
    sums[1:, 1:] = image.astype(np.float64).cumsum(axis=0).cumsum(axis=1)
    total = (sums[np.ix_(bottom, right)] - sums[np.ix_(top, right)]
             - sums[np.ix_(bottom, left)] + sums[np.ix_(top, left)])
    area = np.outer(bottom - top, right - left)
    return np.asarray(total / area.reshape(height, width, *(1,) * (image.ndim - 2)))


def _three_channels(image: Array) -> Array:
    return np.ascontiguousarray(np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[..., :3])


def _entry(colour: Rgb, amount: int) -> tuple[int, int, int, int]:
    return (*colour, round(255 * amount / STEPS))
