"""How many threads a rank uses."""

from __future__ import annotations

import os


def default_threads() -> int:
    """Threads for encoding and decoding on this rank: the cores, shared by the ranks of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
