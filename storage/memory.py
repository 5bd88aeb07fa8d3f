"""`release_memory`: return the memory that loads and saves keep."""

from __future__ import annotations

import torch

from .reading.device.ring import RING
from .runtime.pinned import save_buffers
from .stores.buffer_pool import read_buffers
from .writing.staging import STAGING
from .writing.writer_process import end_writer_process


def release_memory() -> None:
    """Return the memory that loads and saves keep for their next calls, and end the writer process.

    In a process that uses CUDA, this also calls `torch.cuda.empty_cache`. Memory that a running call uses stays: wait
    for its `result()` first. Not collective.
    """
    read_buffers.clear()
    RING.release()
    save_buffers.release()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # torch keeps what was allocated on the streams of reshard for these streams
    STAGING.release()
    end_writer_process()
