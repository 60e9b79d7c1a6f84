"""Rates of links as people write them: 100mbit, 1gbit, 12.5MB/s."""

import re

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_PATTERN = re.compile(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([kmgt]?)(bit(?:/s|ps)?|bps|b/s)\s*", re.IGNORECASE)


def parse(text: str) -> float:
    """Return a rate in bits a second: "100mbit" (also Mbit/s, Mbps), or "12.5MB/s" in bytes, of 8 bits.

    Prefixes k, M, G, T are powers of 1000, in any case; a capital B in B/s is a byte, a small b in b/s a bit.
    Raises ValueError for anything else, and for a rate of 0.
    """
    match = _PATTERN.fullmatch(text)
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:  # two points, say
        number = 0.0
    if match is None or not 0 < number < float("inf"):
        raise ValueError(f"link must be a positive rate such as 100mbit, 1gbit or 12.5MB/s, got {text!r}")
    byte = match[3] == "B/s"
    return number * _PREFIXES[match[2].lower()] * (8 if byte else 1)


def show(bits: float) -> str:
    """Return a rate in the form that `parse` reads, with three digits."""
    for prefix, unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if bits >= 0.9995 * unit:
            return f"{float(f'{bits / unit:.3g}'):g} {prefix}bit/s"
    return f"{bits:.3g} bit/s"
