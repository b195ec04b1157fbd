"""How numbers are shown to people: one format for each kind, in messages, tables, cards and plots.

Counts are ``921,600``, shares ``95.1 %``, sizes ``3.88 MB`` (decimal units, as on the Hub), durations ``4.63 ms``,
``12.3 s`` or ``4 min 5 s``.
"""

from __future__ import annotations


def format_count(number: float) -> str:
    """Return a whole number with commas: ``921,600``."""
    return f"{number:,.0f}"


def format_share(share: float, digits: int = 1) -> str:
    """Return a fraction in percent: ``95.1 %`` for 0.951."""
    return f"{100 * share:.{digits}f} %"


def format_bytes(number: float) -> str:
    """Return bytes in decimal units, as the Hub shows them: ``3.88 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number:.0f} B"


def format_seconds(seconds: float) -> str:
    """Return a duration given in seconds: ``0.3 s``, ``12.3 s``, ``4 min 5 s``, ``2 h 10 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
