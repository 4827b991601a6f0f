"""Numbers as they are shown: three significant digits, a true minus sign, short exponents."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """`1234`, `0.0312`, `−4.1e−7`."""
    value = float(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    text = f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    digits, exponent, power = text.partition("e")
    return (digits + (f"e{int(power)}" if exponent else "")).replace("-", "−")


def signed(value: float) -> str:
    """As `number`, with a plus sign where it is positive."""
    return ("+" if value > 0 else "") + number(value)


def seconds(value: float) -> str:
    """A time with its unit: `840 µs`, `12.3 ms`, `1.2 s`."""
    unit, size = next(((unit, size) for unit, size in (("s", 1.0), ("ms", 1e-3)) if value >= size), ("µs", 1e-6))
    return f"{value / size:.3g} {unit}"


def percent(share: float) -> str:
    """`62 %`, `0.3 %`, `<0.1 %`, `>99.9 %`."""
    if math.isnan(share):
        return "not a number"
    if 0 < share < 0.001:
        return "<0.1 %"
    if 0.999 < share < 1:
        return ">99.9 %"
    return f"{100 * share:.0f} %" if 0.1 <= share < 0.995 or share in (0, 1) else f"{100 * share:.1f} %"
