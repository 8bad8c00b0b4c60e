"""Numbers in words: the same in the terminal and on a page. GB are 10⁹ bytes and MB 10⁶, as on a disk's label."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes, to three or four digits: 3.5 GB, 14 GB, 812 MB."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor * 0.99995:
            return f"{number(count / factor)} {unit}"
    return f"{count:.0f} B"


def count(n: float) -> str:
    """A count of weights: 7B, 1.24B, 494M, 260k."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= factor * 0.99995:
            return f"{number(n / factor)}{unit}"
    return f"{n:.0f}"


def number(x: float, digits: int = 4) -> str:
    """A number to so many significant digits, without trailing zeros, and without an exponent from 1e-4 to 1e6."""
    if x == 0:
        return "0"
    if 1e-4 <= abs(x) < 1e6:
        text = f"{x:.{digits}g}"
        if "e" in text:
            text = f"{x:.0f}"
        return text.replace("-", "−")
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}".replace("-", "−")
