"""What a rank may use of its machine: cores and memory, shared with the other ranks on it."""

from __future__ import annotations

import contextlib
import ctypes
import numbers
import os
from pathlib import Path

from ..errors import ArgumentError

MAX_BUDGET_BYTES = 2 * 1024**3
MIN_BUDGET_BYTES = 64 * 1024**2


def local_ranks() -> int:
    """Return the number of ranks on this machine, which torchrun sets in LOCAL_WORLD_SIZE; 1 where it is not set.

    Raises ArgumentError where it is not a positive number.
    """
    given = os.environ.get("LOCAL_WORLD_SIZE", "").strip()
    if not given:
        return 1
    if not (given.isascii() and given.isdigit()) or int(given) < 1:
        raise ArgumentError(
            f"the environment variable LOCAL_WORLD_SIZE must be the number of ranks on this machine, got {given!r}: "
            "correct it, or unset it"
        )
    return int(given)


def check_budget(budget_bytes: object) -> None:
    """Raise ArgumentError unless a budget is None or a positive number of bytes."""
    is_whole = isinstance(budget_bytes, numbers.Integral) and not isinstance(budget_bytes, bool)
    if budget_bytes is not None and not (is_whole and int(budget_bytes) > 0):  # type: ignore[call-overload]
        raise ArgumentError(
            f"budget_bytes must be a positive whole number of bytes, got {budget_bytes!r}; None is the default budget"
        )


def default_threads() -> int:
    """Threads for encoding and decoding on this rank: the cores, shared by the ranks of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_ranks())


def default_budget() -> int:
    """Bytes that a save or a load may hold on this rank.

    The smaller of 2 GiB and a tenth of the memory that is available, shared by the ranks of this machine; 64 MiB at
    least.
    """
    return max(MIN_BUDGET_BYTES, min(MAX_BUDGET_BYTES, _available() // 10) // local_ranks())


def give_back_memory() -> None:
    """Have the C library give freed memory back to the system: glibc keeps some 60 MB of it for each thread."""
    with contextlib.suppress(AttributeError, OSError):  # another library
        ctypes.CDLL(None).malloc_trim(0)


def _available() -> int:
    """Bytes of memory that this process could take, by the machine and by its control group."""
    found = [MAX_BUDGET_BYTES * 10]
    with contextlib.suppress(OSError, ValueError, IndexError):
        line = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2]
        found.append(int(line.split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError, IndexError):
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        cached = int((group / "memory.stat").read_text().partition("inactive_file ")[2].split()[0])
        found.append(int((group / "memory.max").read_text()) - used + cached)
    return max(0, min(found))
