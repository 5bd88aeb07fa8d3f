"""Time between barriers, for code that runs on every rank."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def elapsed(call: Callable[[], object]) -> float:
    """Seconds from when all ranks begin until the last has done. Collective."""
    gc.collect()
    dist.barrier()
    begin = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - begin


def on_rank_0(call: Callable[[], T]) -> T:
    """What a call gives on rank 0, once all ranks are here. Collective."""
    dist.barrier()
    given: list[Any] = [call() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(given)
    value: T = given[0]
    return value
