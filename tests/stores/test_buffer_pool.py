"""Memory that is used again: never more of it than there are reads at once, and nobody else's."""

from collections.abc import Sequence

import numpy as np
import pytest

from reshard.storage.errors import StoreError
from reshard.storage.stores.buffer_pool import PAGE_BYTES, Memory, in_step


def fill(name: str, ranges: Sequence[tuple[int, int]], buffer: memoryview) -> int:
    buffer[:] = bytes([ranges[0][0] % 256]) * len(buffer)
    return len(buffer)


def address_of(data: memoryview) -> int:
    return int(np.frombuffer(data, np.uint8).ctypes.data)


def kept(memory: Memory) -> list[int]:
    """The sizes of what may be lent again, without the page that each has besides."""
    return [array.nbytes - PAGE_BYTES for free in memory._free.values() for array in free]


def test_what_is_given_back_is_lent_again() -> None:
    memory = Memory()
    first = memory.filled(fill, "x", [(1, 1001)])
    assert bytes(first) == b"\1" * 1000
    address = address_of(first)
    memory.give(first)
    again = memory.filled(fill, "x", [(2, 982)])
    assert address_of(again) == address + 1
    assert len(again) == 980


def test_no_more_is_kept_than_was_lent_at_once() -> None:
    memory = Memory()
    for order in range(6):  # one at a time
        memory.give(memory.filled(fill, "x", [(0, 128 << order)]))
        assert kept(memory) == [128 << order]
    lent = [memory.filled(fill, "x", [(0, 1 << 20)]) for _ in range(5)]
    for data in lent:
        memory.give(data)
    assert kept(memory) == [1 << 20] * 5
    lent = [memory.filled(fill, "x", [(0, 3 << 20)])]
    assert kept(memory) == [1 << 20] * 2
    memory.give(lent[0])
    assert kept(memory) == [1 << 20] * 2 + [3 << 20]
    assert memory._lent == {}


@pytest.mark.parametrize("nbytes", [1, 2, 7, 8, 9, 1000, 1025, 9 << 20, (9 << 20) + 1])
def test_what_is_lent_is_hardly_larger_than_what_is_asked_for(nbytes: int) -> None:
    memory = Memory()
    memory.give(memory.filled(fill, "x", [(0, nbytes)]))
    (size,) = kept(memory)
    assert nbytes <= size <= nbytes * 1.125 + 1


def test_a_read_that_fails_gives_its_memory_back() -> None:
    def failing(name: str, ranges: Sequence[tuple[int, int]], buffer: memoryview) -> int:
        raise StoreError("injected")

    memory = Memory()
    for _ in range(3):
        with pytest.raises(StoreError, match="injected"):
            memory.filled(failing, "x", [(0, 1000)])
    assert memory._lent == {}
    assert len(kept(memory)) == 1


def test_what_was_not_lent_is_left_alone() -> None:
    memory = Memory()
    memory.give(np.zeros(1024, np.uint8).data)
    memory.give(memoryview(b"bytes"))
    assert kept(memory) == []


@pytest.mark.parametrize("start", [0, 1, 8, 4095, 4096, 123_456_789])
@pytest.mark.parametrize("nbytes", [1, 5000, 1 << 20])
def test_what_is_read_lies_as_far_into_a_page_as_in_its_file(start: int, nbytes: int) -> None:
    memory = Memory()
    for _ in range(2):
        data = memory.filled(fill, "x", [(start, start + nbytes)])
        assert bytes(data) == bytes([start % 256]) * nbytes
        assert (address_of(data) - start) % PAGE_BYTES == 0
        memory.give(data)
    assert len(kept(memory)) == 1
    fresh = in_step(start, nbytes)
    assert len(fresh) == nbytes
    assert (address_of(fresh) - start) % PAGE_BYTES == 0


def test_fresh_memory_can_be_empty() -> None:
    assert bytes(in_step(4095, 0)) == b""
