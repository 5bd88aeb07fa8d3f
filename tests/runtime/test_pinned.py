"""The buffers of page-locked memory that saves copy values of a device to. Without a device, nothing is page-locked."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from reshard.storage.runtime.pinned import STEP_BYTES, ByteArray, PinnedBuffers


def new_buffers(unlocked: list[int], *, locks: bool = True) -> PinnedBuffers:
    def unlock(memory: ByteArray) -> None:
        unlocked.append(memory.nbytes)

    return PinnedBuffers(4 * STEP_BYTES, lambda memory: locks, unlock)


def test_memory_is_used_again_when_nothing_refers_to_it() -> None:
    buffers = new_buffers([])
    first = buffers.lend(STEP_BYTES)
    assert first is not None
    address = first.ctypes.data
    view = torch.from_numpy(first.view(np.int16)[100:200]).numpy()[::2]
    del first
    other = buffers.lend(STEP_BYTES)
    assert other is not None
    assert other.ctypes.data != address, "a view refers to the first buffer"
    del view
    gc.collect()
    again = buffers.lend(STEP_BYTES)
    assert again is not None
    assert again.ctypes.data == address
    assert buffers.held_bytes == 2 * STEP_BYTES


def test_there_is_a_limit_and_free_buffers_of_other_sizes_make_room() -> None:
    unlocked: list[int] = []
    buffers = new_buffers(unlocked)
    lent = [buffers.lend(STEP_BYTES) for _ in range(4)]
    assert all(memory is not None for memory in lent)
    assert buffers.lend(1) is None
    del lent[1:]
    gc.collect()
    large = buffers.lend(3 * STEP_BYTES)
    assert large is not None
    assert unlocked == 3 * [STEP_BYTES]
    assert buffers.held_bytes == 4 * STEP_BYTES


def test_release_keeps_what_is_in_use() -> None:
    unlocked: list[int] = []
    buffers = new_buffers(unlocked)
    lent = buffers.lend(10)
    free = buffers.lend(STEP_BYTES)
    del free
    gc.collect()
    buffers.release()
    assert unlocked == [STEP_BYTES]
    assert buffers.held_bytes == STEP_BYTES
    assert lent is not None
    lent[:] = 1
    del lent
    buffers.release()
    assert buffers.held_bytes == 0


def test_memory_that_cannot_be_page_locked_is_not_lent() -> None:
    buffers = new_buffers([], locks=False)
    assert buffers.lend(10) is None
    assert buffers.held_bytes == 0


def test_a_failing_page_lock_takes_no_budget() -> None:
    def fail(memory: ByteArray) -> bool:
        raise RuntimeError("CUDA failed")

    buffers = PinnedBuffers(4 * STEP_BYTES, fail)
    for _ in range(10):
        with pytest.raises(RuntimeError, match="CUDA failed"):
            buffers.lend(STEP_BYTES)
    assert buffers.held_bytes == 0
