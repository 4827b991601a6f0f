"""ATen's interpolation."""

from __future__ import annotations

from collections.abc import Sequence

from dlbc.frontends.aten import Tracer, aten, type_of
from dlbc.ir.core import Operand
from dlbc.ir.dims import Dim

Size = Sequence[Dim] | None
_NEAREST = {"upsample_nearest": "nearest", "_upsample_nearest_exact": "nearest_exact"}


@aten(*(f"{name}{rank}d" for name in _NEAREST for rank in (1, 2, 3)))
def nearest(at: Tracer, x: Operand, output_size: Size, *scales: object) -> Operand:
    """The nearest element."""
    mode = "nearest_exact" if "exact" in at.target else "nearest"
    return _resampled(at, x, mode, False, scales)


@aten("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
      "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
def smooth(at: Tracer, x: Operand, output_size: Size, align_corners: bool, *scales: object) -> Operand:
    """A weighted mean of neighbours along each axis."""
    return _resampled(at, x, "cubic" if "cubic" in at.target else "linear", align_corners, scales)


def _resampled(at: Tracer, x: Operand, mode: str, align_corners: bool, scales: tuple[object, ...]) -> Operand:
    """To the size that the exporter found. Scales come as one list (`vec` overloads), or one for each axis."""
    factors = scales[0] if len(scales) == 1 and isinstance(scales[0], list | tuple) else scales
    assert isinstance(factors, list | tuple)
    given = tuple(float(str(one)) for one in factors if one is not None)
    rank = type_of(x).rank - 2
    if len(given) not in (0, rank):
        raise at.unsupported("factors for some axes only", hint="give a factor for each axis, or the sizes")
    return at.interpolate(x, size=at.shape[-rank:], mode=mode, align_corners=align_corners, scales=given or None,
                          antialias="_aa" in at.target)
