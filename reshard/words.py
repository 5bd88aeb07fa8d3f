"""Numbers in words, for people."""

from __future__ import annotations

import math
from collections.abc import Iterable

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def in_bytes(nbytes: float) -> str:
    """A number of bytes: three digits and a unit of powers of 1000."""
    at = min(len(UNITS) - 1, int(math.log(nbytes, 1000))) if nbytes >= 1 else 0
    value = nbytes / 1000**at
    return f"{value:.0f} {UNITS[at]}" if at == 0 or value >= 99.95 else f"{value:.3g} {UNITS[at]}"


def in_time(seconds: float) -> str:
    """A span of time, in its largest unit: `3 d`."""
    for unit, of_unit in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= of_unit:
            return f"{seconds / of_unit:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def first_few(names: Iterable[str], most: int = 5) -> str:
    """Return the first names of a list, and how many more there are: `'a', 'b' and 3 more`."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


MAX_RUNS = 3


def few(numbers: Iterable[int]) -> str:
    """Numbers as ranges, of many the first and how many there are: `0,2,4,… (32)`."""
    numbers = sorted(set(numbers))
    words = ranges(numbers).split(",")
    return ",".join(words) if len(words) <= MAX_RUNS + 1 else f"{','.join(words[:MAX_RUNS])},… ({len(numbers)})"


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as ranges: `0-3,7`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
