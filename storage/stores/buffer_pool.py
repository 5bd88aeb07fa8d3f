"""Reusable memory for reads from a local disk.

Faulting in new pages takes longer than filling pages that are already mapped (benchmarks/overhead.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from ..runtime.forks import fork_safe_lock, generation
from .base import ReadInto

ByteArray = npt.NDArray[np.uint8]
PAGE_BYTES = 4096
MAX_IDLE_BYTES = 256 * 1024 * 1024
"""The most bytes that a process keeps between loads."""


def aligned_buffer(start: int, nbytes: int) -> memoryview:
    """Return new memory for bytes from `start` of a file, at the same offset in a page as in the file.

    On AMD's Zen 3 and 4, a copy is five times as slow if its destination is up to 63 bytes further into a page than its
    source (glibc bug 30994). The C library allocates large memory exactly there: 16 bytes into a page.
    """
    page_offset = start % PAGE_BYTES
    return _page_aligned(page_offset + nbytes).data[page_offset:]


def _page_aligned(nbytes: int) -> ByteArray:
    """Return a new array that begins at the start of a page."""
    array = np.empty(nbytes + PAGE_BYTES, np.uint8)
    return array[-array.ctypes.data % PAGE_BYTES :][:nbytes]


class BufferPool:
    """Buffers of a few sizes that are used again.

    While reads run, the pool never holds more bytes than the most that were lent at once, or `max_idle_bytes` if that
    is more. Between reads it keeps at most `max_idle_bytes`. A forked child begins with an empty pool.
    """

    def __init__(self, max_idle_bytes: int = MAX_IDLE_BYTES) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._lock = fork_safe_lock()
        self._begin()

    def _begin(self) -> None:
        self._generation = generation()
        self._free: dict[int, list[ByteArray]] = {}
        """Free arrays by size. The array that was released last is at the end: it is most likely in the cache."""
        self._lent: WeakValueDictionary[int, ByteArray] = WeakValueDictionary()
        """Lent arrays by their `id`. A buffer that is dropped without `release` is not kept in memory."""
        self._lent_bytes = self._free_bytes = 0
        self._max_bytes = self._max_idle_bytes
        self._readers = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Count a call that reads. When the last one ends, free memory beyond `max_idle_bytes` is dropped."""
        with self._lock:
            if self._generation != generation():  # a fork happened, perhaps while another thread changed the pool
                self._begin()
            begun = self._generation
            self._readers += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers -= begun == self._generation
                if self._readers == 0:
                    self._max_bytes = self._max_idle_bytes
                    self._lent_bytes = sum(array.nbytes for array in self._lent.values())  # without dropped buffers
                    self._drop_excess()

    def clear(self) -> None:
        """Drop all free memory."""
        with self._lock:
            self._free_bytes = 0
            self._free.clear()

    def read(
        self,
        read_into: ReadInto,
        name: str,
        ranges: Sequence[tuple[int, int]],
        arrived: Callable[[memoryview, int], None] = lambda data, nbytes: None,
        memory: ByteArray | None = None,
    ) -> memoryview:
        """Read byte ranges of an object into a buffer of the pool. Raises what `read_into` raises.

        Pass the result to `release` when nothing refers to it any more.

        Args:
            arrived: called several times while the bytes arrive, with the buffer and the number of bytes in it.
            memory: memory to use instead of a buffer of the pool, with one page more than the bytes.
        """
        nbytes = sum(stop - start for start, stop in ranges)
        buffer = self._lend(nbytes) if memory is None else memory
        data = buffer.data[ranges[0][0] % PAGE_BYTES :]  # the alignment of `aligned_buffer`
        try:
            return data[: read_into(name, ranges, data[:nbytes], partial(arrived, data))]
        except BaseException:
            self.release(data)
            raise

    def _lend(self, nbytes: int) -> ByteArray:
        """Return an array of at least `nbytes` bytes and one page."""
        step = 1 << max(0, (nbytes - 1).bit_length() - 4)
        size = -(-nbytes // step) * step + PAGE_BYTES  # rounding up adds at most an eighth
        with self._lock:
            if free := self._free.get(size):
                array = free.pop()
                self._free_bytes -= size
            else:
                array = _page_aligned(size)
            self._lent[id(array)] = array
            self._lent_bytes += size
            self._max_bytes = max(self._max_bytes, self._lent_bytes)
            self._drop_excess()
        return array

    def _drop_excess(self) -> None:
        """Drop free arrays beyond the limit, first those of the size that was released longest ago."""
        while self._free and self._lent_bytes + self._free_bytes > self._max_bytes:
            size, free = next(iter(self._free.items()))
            if free:
                free.pop(0)
                self._free_bytes -= size
            if not free:
                del self._free[size]
        if not self._free:
            self._free_bytes = 0

    def release(self, data: memoryview) -> None:
        """Take back a buffer that `read` returned. Other memory is ignored."""
        with self._lock:
            array = self._lent.pop(id(data.obj), None)
            if array is not None:
                free = self._free.pop(array.nbytes, [])
                free.append(array)
                self._free[array.nbytes] = free  # moves this size to the end of the dict
                self._lent_bytes -= array.nbytes
                self._free_bytes += array.nbytes
                self._drop_excess()


read_buffers = BufferPool()
"""The buffers of this process: the pages of new ones would have to be faulted in by each load."""
