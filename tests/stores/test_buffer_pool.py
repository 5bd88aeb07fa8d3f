"""The pool of read buffers: it reuses its own memory, and keeps a limited amount of it."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from reshard.storage.errors import StoreError
from reshard.storage.stores import buffer_pool
from reshard.storage.stores.buffer_pool import PAGE_BYTES, BufferPool, aligned_buffer


def fill(name: str, ranges: Sequence[tuple[int, int]], buffer: memoryview, arrived: Callable[[int], None]) -> int:
    buffer[:] = bytes([ranges[0][0] % 256]) * len(buffer)
    return len(buffer)


def address_of(data: memoryview) -> int:
    return int(np.frombuffer(data, np.uint8).ctypes.data)


def kept(pool: BufferPool) -> list[int]:
    """Return the sizes of the free buffers, without the extra page of each."""
    return [array.nbytes - PAGE_BYTES for free in pool._free.values() for array in free]


def test_a_released_buffer_is_lent_again() -> None:
    pool = BufferPool()
    first = pool.read(fill, "x", [(1, 1001)])
    assert bytes(first) == b"\1" * 1000
    address = address_of(first)
    pool.release(first)
    again = pool.read(fill, "x", [(2, 982)])
    assert address_of(again) == address + 1
    assert len(again) == 980


def test_the_pool_keeps_no_more_than_was_lent_at_the_same_time() -> None:
    pool = BufferPool(0)
    for order in range(6):  # one at a time
        pool.release(pool.read(fill, "x", [(0, 128 << order)]))
        assert kept(pool) == [128 << order]
    lent = [pool.read(fill, "x", [(0, 1 << 20)]) for _ in range(5)]
    for data in lent:
        pool.release(data)
    assert kept(pool) == [1 << 20] * 5
    lent = [pool.read(fill, "x", [(0, 3 << 20)])]
    assert kept(pool) == [1 << 20] * 2
    pool.release(lent[0])
    assert kept(pool) == [1 << 20] * 2 + [3 << 20]
    assert not pool._lent


def test_the_pool_keeps_a_limited_amount_between_reads() -> None:
    pool = BufferPool(max_idle_bytes=3 << 20)
    with pool.reading(), pool.reading():
        lent = [pool.read(fill, "x", [(0, 1 << 20)]) for _ in range(5)]
        for data in lent:
            pool.release(data)
        assert kept(pool) == [1 << 20] * 5
    assert kept(pool) == [1 << 20] * 2  # each takes one more page
    pool.clear()
    assert kept(pool) == []


def test_a_buffer_that_is_dropped_is_forgotten() -> None:
    pool = BufferPool()
    with pool.reading():
        data = pool.read(fill, "x", [(0, 1000)])
        assert len(pool._lent) == 1
        del data
    assert not pool._lent
    assert pool._lent_bytes == 0


@pytest.mark.parametrize("nbytes", [1, 2, 7, 8, 9, 1000, 1025, 9 << 20, (9 << 20) + 1])
def test_a_buffer_is_at_most_an_eighth_larger_than_needed(nbytes: int) -> None:
    pool = BufferPool()
    pool.release(pool.read(fill, "x", [(0, nbytes)]))
    (size,) = kept(pool)
    assert nbytes <= size <= nbytes * 1.125 + 1


def test_a_failed_read_releases_its_buffer() -> None:
    def failing(
        name: str, ranges: Sequence[tuple[int, int]], buffer: memoryview, arrived: Callable[[int], None]
    ) -> int:
        raise StoreError("injected")

    pool = BufferPool()
    for _ in range(3):
        with pytest.raises(StoreError, match="injected"):
            pool.read(failing, "x", [(0, 1000)])
    assert not pool._lent
    assert len(kept(pool)) == 1


def test_release_ignores_memory_that_was_not_lent() -> None:
    pool = BufferPool()
    pool.release(np.zeros(1024, np.uint8).data)
    pool.release(memoryview(b"bytes"))
    assert kept(pool) == []


@pytest.mark.parametrize("start", [0, 1, 8, 4095, 4096, 123_456_789])
@pytest.mark.parametrize("nbytes", [1, 5000, 1 << 20])
def test_a_buffer_has_the_same_offset_in_a_page_as_the_file(start: int, nbytes: int) -> None:
    pool = BufferPool()
    for _ in range(2):
        data = pool.read(fill, "x", [(start, start + nbytes)])
        assert bytes(data) == bytes([start % 256]) * nbytes
        assert (address_of(data) - start) % PAGE_BYTES == 0
        pool.release(data)
    assert len(kept(pool)) == 1
    fresh = aligned_buffer(start, nbytes)
    assert len(fresh) == nbytes
    assert (address_of(fresh) - start) % PAGE_BYTES == 0


def test_a_new_buffer_can_be_empty() -> None:
    assert bytes(aligned_buffer(4095, 0)) == b""


def test_a_child_that_forked_during_a_change_has_an_empty_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = BufferPool()
    lent = pool.read(fill, "x", [(0, 1 << 20)])
    pool._free_bytes = 1 << 40  # another thread of the parent was about to add a buffer
    monkeypatch.setattr(buffer_pool, "generation", lambda: 1_000_000)
    with pool.reading():
        data = pool.read(fill, "x", [(0, 1 << 20)])
        pool.release(data)
        assert len(kept(pool)) == 1
    pool.release(lent)  # a buffer of the parent
    assert len(kept(pool)) == 1
