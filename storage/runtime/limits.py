"""How many threads and how much memory a rank may use, since it shares its machine with other ranks."""

from __future__ import annotations

import contextlib
import ctypes
import os

from ..errors import ArgumentError

MAX_BUDGET_BYTES = 2 * 1024**3
MIN_BUDGET_BYTES = 64 * 1024**2


def local_ranks() -> int:
    """Return the number of ranks on this machine: LOCAL_WORLD_SIZE, which torchrun sets, or 1 if it is not set.

    Raises:
        ArgumentError: LOCAL_WORLD_SIZE is not a positive integer.
    """
    given = os.environ.get("LOCAL_WORLD_SIZE", "").strip()
    if not given:
        return 1
    if not (given.isascii() and given.isdigit()) or int(given) < 1:
        raise ArgumentError(
            f"the environment variable LOCAL_WORLD_SIZE must be the number of ranks on this machine, got {given!r}: "
            "correct or unset it"
        )
    return int(given)


def default_threads() -> int:
    """Return the number of threads that encode and decode on this rank: its share of the machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_ranks())


def default_budget() -> int:
    """Return how many bytes a save or a load may hold in memory on this rank.

    The ranks of a machine share 2 GiB, or a tenth of the available memory if that is less. The minimum is 64 MiB.
    """
    return max(MIN_BUDGET_BYTES, min(MAX_BUDGET_BYTES, available_bytes() // 10) // local_ranks())


def budget_of(budget_bytes: int | None) -> int:
    """Return a budget that a caller has passed, or the default if it is None."""
    return default_budget() if budget_bytes is None else budget_bytes


def give_back_memory() -> None:
    """Return freed memory to the system. glibc keeps about 60 MB of it per thread."""
    with contextlib.suppress(AttributeError, OSError):  # the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes() -> int:
    """Return how many bytes of memory are available to this process, by its machine and its control group.

    If the system does not say, the result is 20 GiB.
    """
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        found.append(int(_read_text("/proc/meminfo").partition("MemAvailable:")[2].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError, IndexError):
        group = "/sys/fs/cgroup"
        used = int(_read_text(f"{group}/memory.current"))
        cached = int(_read_text(f"{group}/memory.stat").partition("inactive_file ")[2].split()[0])
        found.append(int(_read_text(f"{group}/memory.max")) - used + cached)
    return max(0, min(found, default=MAX_BUDGET_BYTES * 10))


def _read_text(path: str) -> str:
    with open(path) as file:
        return file.read()
