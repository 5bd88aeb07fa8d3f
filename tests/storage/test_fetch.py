"""Memory that is used again: never more of it than there are reads at once, and nobody else's."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from reshard.planner.box import Box
from reshard.planner.read_plan import Want, plan_reads
from reshard.storage.errors import StoreError
from reshard.storage.fetch import _Memory
from reshard.storage.reader import execute
from tests.storage.test_reader import saved


def fill(name: str, ranges: Sequence[tuple[int, int]], buffer: memoryview) -> int:
    buffer[:] = bytes([ranges[0][0] % 256]) * len(buffer)
    return len(buffer)


def kept(memory: _Memory) -> list[int]:
    """The sizes of what may be lent again."""
    return [array.nbytes for free in memory._free.values() for array in free]


def test_what_is_given_back_is_lent_again() -> None:
    memory = _Memory()
    first = memory.filled(fill, "x", [(1, 1001)])
    assert bytes(first) == b"\1" * 1000
    address = np.frombuffer(first, np.uint8).ctypes.data
    memory.give(first)
    again = memory.filled(fill, "x", [(2, 982)])
    assert np.frombuffer(again, np.uint8).ctypes.data == address
    assert len(again) == 980


def test_no_more_is_kept_than_was_lent_at_once() -> None:
    memory = _Memory()
    for order in range(6):  # one at a time
        memory.give(memory.filled(fill, "x", [(0, 128 << order)]))
        assert kept(memory) == [128 << order]
    lent = [memory.filled(fill, "x", [(0, 1024)]) for _ in range(5)]
    for data in lent:
        memory.give(data)
    assert kept(memory) == [1024] * 5
    lent = [memory.filled(fill, "x", [(0, 3 * 1024)])]
    assert kept(memory) == [1024] * 2
    memory.give(lent[0])
    assert kept(memory) == [1024] * 2 + [3 * 1024]
    assert memory._lent == {}


@pytest.mark.parametrize("nbytes", [1, 2, 7, 8, 9, 1000, 1025, 9 << 20, (9 << 20) + 1])
def test_what_is_lent_is_hardly_larger_than_what_is_asked_for(nbytes: int) -> None:
    memory = _Memory()
    memory.give(memory.filled(fill, "x", [(0, nbytes)]))
    (size,) = kept(memory)
    assert nbytes <= size <= nbytes * 1.125 + 1


def test_a_read_that_fails_gives_its_memory_back() -> None:
    def failing(name: str, ranges: Sequence[tuple[int, int]], buffer: memoryview) -> int:
        raise StoreError("injected")

    memory = _Memory()
    for _ in range(3):
        with pytest.raises(StoreError, match="injected"):
            memory.filled(failing, "x", [(0, 1000)])
    assert memory._lent == {}
    assert len(kept(memory)) == 1


def test_what_was_not_lent_is_left_alone() -> None:
    memory = _Memory()
    memory.give(np.zeros(1024, np.uint8).data)
    memory.give(memoryview(b"bytes"))
    assert kept(memory) == []


def test_a_pool_that_cannot_start_a_thread_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    store, manifest = saved("none", {"w": torch.randn(512, 256)})
    submit = ThreadPoolExecutor.submit

    def refusing(self: ThreadPoolExecutor, task: Callable[..., Any], *arguments: Any) -> Any:
        if self._thread_name_prefix == "reshard-read":
            raise RuntimeError("can't start new thread")
        return submit(self, task, *arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refusing)
    plan = plan_reads(manifest.index(), [Want("w", Box.whole((512, 256)))])
    with pytest.raises(RuntimeError, match="new thread"):
        execute(plan, manifest.index(), store, [torch.zeros(512, 256)])
