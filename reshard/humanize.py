"""Numbers and lists as short text for people, as the command line and the pictures show them."""

from __future__ import annotations

import math
from collections.abc import Iterable

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
MAX_SHOWN_RANGES = 3


def format_bytes(nbytes: float) -> str:
    """Return a number of bytes with three digits and a decimal unit: `1.23 MB`."""
    at = min(len(UNITS) - 1, int(math.log(nbytes, 1000))) if nbytes >= 1 else 0
    value = nbytes / 1000**at
    return f"{value:.0f} {UNITS[at]}" if at == 0 or value >= 99.95 else f"{value:.3g} {UNITS[at]}"


def format_age(seconds: float) -> str:
    """Return a duration in its largest whole unit: `3 d`."""
    for unit, unit_seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= unit_seconds:
            return f"{seconds / unit_seconds:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def format_ranges(numbers: Iterable[int]) -> str:
    """Return integers as ranges: `0-3,7`."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def format_ranks(ranks: Iterable[int]) -> str:
    """Return ranks as ranges; if there are many, the first ranges and the number of ranks: `0,2,4,… (32)`."""
    ranks = sorted(set(ranks))
    ranges = format_ranges(ranks).split(",")
    if len(ranges) <= MAX_SHOWN_RANGES + 1:
        return ",".join(ranges)
    return f"{','.join(ranges[:MAX_SHOWN_RANGES])},… ({len(ranks)})"
