"""Numbers in words: counts in thousands, bytes in powers of 1024."""

from __future__ import annotations

import math


def decimal(value: float) -> str:
    """A count of at least three digits: 671.03 B, 268.1 M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:,.{2 if value >= 1e9 else 1}f} {unit}"
    return f"{value:,.0f}"


def binary(value: float) -> str:
    """Bytes in three digits: 68.6 KiB."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    scale = next((i for i in range(len(units)) if value < 1023.5 * 1024**i), len(units) - 1)
    scaled = value / 1024**scale
    return f"{scaled:,.0f} {units[scale]}" if scaled >= 99.95 or not scale else f"{scaled:.3g} {units[scale]}"


def number(value: float) -> str:
    """With commas; what is no whole number in four digits."""
    return f"{round(value):,}" if value == round(value) and abs(value) < 1e15 else f"{value:.4g}"


def rounded(value: float) -> str:
    """A rate in three digits: 87.6, 10,800."""
    if value <= 0:
        return "0"
    digits = 2 - math.floor(math.log10(value))
    return f"{round(value, digits):,.{max(0, digits)}f}"
