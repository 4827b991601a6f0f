"""The one colour scale: blue against, nothing at zero, vermilion for; the same strength on both sides.

Colours are chosen and mixed in Oklab (Björn Ottosson, 2020), where equal distances look equal. The two ends
have equal lightness and chroma, so +0.4 and -0.4 look equally strong; their hues, 35° and 255°, stay apart
under all common forms of colour blindness.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from dlbc_runtime.arrays import Array

Rgb: TypeAlias = tuple[int, int, int]

FOR_HUE, AGAINST_HUE = 35.0, 255.0  # degrees


@dataclass(frozen=True)
class Scale:
    """From `neutral` lightness at 0 to `lightness` and `chroma` at ±1, under text of colour `ink`."""

    neutral: float
    lightness: float
    chroma: float
    ink: Rgb

    def colour(self, strength: float) -> Rgb:
        """sRGB of a strength in [-1, 1]; beyond it clips, and what is not a number is neutral."""
        if math.isnan(strength):
            strength = 0.0
        amount = min(abs(strength), 1.0)
        lightness = self.neutral + (self.lightness - self.neutral) * amount
        return rgb(lightness, self.chroma * amount, FOR_HUE if strength > 0 else AGAINST_HUE)

    def hex(self, strength: float) -> str:
        """`#rrggbb` of a strength in [-1, 1]."""
        return "#{:02x}{:02x}{:02x}".format(*self.colour(strength))


LIGHT = Scale(neutral=1.0, lightness=0.74, chroma=0.136, ink=(28, 29, 32))  # behind text on a light page
DARK = Scale(neutral=0.225, lightness=0.50, chroma=0.137, ink=(236, 236, 238))  # behind text on a dark page
HEAT = Scale(neutral=1.0, lightness=0.58, chroma=0.165, ink=(28, 29, 32))  # pixels and bars, no text on it
HEAT_DARK = Scale(neutral=0.225, lightness=0.68, chroma=0.155, ink=(236, 236, 238))


def rgb(lightness: float, chroma: float, hue: float) -> Rgb:
    """sRGB of an Oklch colour (lightness 0..1, chroma from 0, hue in degrees), clipped to what sRGB has."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
              -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
              -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short)
    red, green, blue = (round(255 * _gamma(min(max(channel, 0.0), 1.0))) for channel in linear)
    return red, green, blue


def lightness_of(colour: Rgb) -> float:
    """Oklab lightness, 0 to 1, of an sRGB colour."""
    red, green, blue = (_linear(channel / 255) for channel in colour)
    long = 0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue
    medium = 0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue
    short = 0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue
    return 0.2104542553 * math.cbrt(long) + 0.7936177850 * math.cbrt(medium) - 0.0040720468 * math.cbrt(short)


def contrast(first: Rgb, second: Rgb) -> float:
    """WCAG contrast ratio of two sRGB colours, 1 to 21; text should have 4.5."""
    dark, light = sorted(sum(weight * _linear(channel / 255) for weight, channel in
                             zip((0.2126, 0.7152, 0.0722), colour, strict=True)) for colour in (first, second))
    return (light + 0.05) / (dark + 0.05)


def limit(relevance: Array, quantile: float = 1.0) -> float:
    """The |relevance| that gets the full colour: the largest finite one, or a quantile of them; 0 if none.

    A quantile below 1 is for images, where a few pixels would otherwise leave the rest without colour.
    """
    sizes = np.abs(relevance[np.isfinite(relevance)])
    if not sizes.size:
        return 0.0
    largest = float(sizes.max())
    if quantile >= 1.0:
        return largest
    return float(np.quantile(sizes, quantile)) or largest


def image_limit(relevance: Array) -> float:
    """The limit of a heat map: that of 99.5 % of its pixels, or of all where they are too few to spare any."""
    return limit(relevance, 0.995 if relevance.size >= 2000 else 1.0)


def strengths(relevance: Array, full: float) -> Array:
    """Relevance on the scale [-1, 1], where `full` is 1; what is not a number becomes 0."""
    if not full > 0:
        return np.zeros(relevance.shape)
    return np.clip(np.nan_to_num(relevance.astype(np.float64) / full, nan=0.0), -1.0, 1.0)


def _gamma(linear: float) -> float:
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
