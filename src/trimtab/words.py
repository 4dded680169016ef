"""Numbers as a person reads them. Nothing here depends on the locale or the clock."""

from __future__ import annotations

import math
from datetime import UTC, datetime


def count(value: float) -> str:
    """12,345"""
    return f"{round(value):,}"


def short(value: float) -> str:
    """950, 12.3k, 1.25M, 2.46B: three digits and a magnitude."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{_digits(value / size, 3)}{unit}"
    return _digits(value, 3)


def sig(value: float, digits: int = 4) -> str:
    """`digits` significant digits; a power of ten where plain digits would be long."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if 1e-3 <= abs(value) < 1e6:
        return _digits(value, digits)
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"


def tick(value: float) -> str:
    """A number beside an axis, as short as it can be: 0.25, 1,500, 20k, 5e-4."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        text = short(value)
        return f"{text[:-1].rstrip('0').rstrip('.')}{text[-1]}" if "." in text else text
    if abs(value) >= 0.01:
        return f"{value:,.4f}".rstrip("0").rstrip(".")
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def size(value: float) -> str:
    """Bytes in binary units: 1.25 GiB."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return f"{_digits(value / 1024**power, 3)} {unit}"
    return f"{round(value)} B"


def duration(seconds: float) -> str:
    """3 h 07 min, 2 min 05 s, 41 s"""
    whole = round(seconds)
    if whole >= 86_400:
        return f"{whole // 86_400} d {whole % 86_400 // 3600:02d} h"
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s" if seconds >= 10 else f"{_digits(seconds, 2)} s"


def date(seconds: float) -> str:
    """Unix seconds as a date and time in UTC."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, OSError, ValueError):
        return "unknown date"


def many(number: int, word: str, plural: str | None = None) -> str:
    """1 restart, 5 restarts"""
    return f"{number:,} {word if number == 1 else plural or word + 's'}"


def _digits(value: float, digits: int) -> str:
    """Fixed-point text with about `digits` significant digits, thousands set apart."""
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])  # after rounding: 999.9 has one digit more
    places = max(0, digits - 1 - exponent)
    return f"{value:,.{places}f}"
