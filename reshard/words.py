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


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as ranges: `0-3,7`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
