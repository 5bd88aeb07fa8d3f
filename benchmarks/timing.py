"""Measure the time between barriers, for code that runs on every rank."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def elapsed(call: Callable[[], object]) -> float:
    """Return the seconds from the time when all ranks start until the last one is done. Collective."""
    gc.collect()
    dist.barrier()
    begin = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - begin


def on_rank_0(call: Callable[[], T]) -> T:
    """Wait for all ranks, run a call on rank 0, and return its result on every rank. Collective."""
    dist.barrier()
    result: list[Any] = [call() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(result)
    value: T = result[0]
    return value
