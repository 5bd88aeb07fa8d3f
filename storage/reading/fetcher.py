"""Many byte ranges of a store at once: by its own event loop where it has one, else by a pool of threads."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType

from typing_extensions import Buffer

from ...planner.errors import CheckpointError
from ..errors import StoreError
from ..runtime.threads import Pool
from ..stores.base import AsyncReads, Store
from ..stores.buffer_pool import BufferPool

Ranges = tuple[str, Sequence[tuple[int, int]]]
"""The name of an object, and bytes of it: [start, stop) each."""
Fetched = Buffer | StoreError
"""The bytes of some ranges, one after another, or why they are not to be had."""
TOGETHER_BYTES = 4 * 1024 * 1024
"""To ask for more, and to have what was read verified, takes as long as to read some 100 KiB of a file."""


class Fetcher(AbstractContextManager["Fetcher"]):
    """Starts reads. What still runs when its block is left is stopped, and not waited for."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._capabilities = can = store.capabilities
        self._pool: Pool | None = None
        if can.async_reads is None and can.read_into is None:
            self._pool = Pool(can.concurrent_reads, "reshard-fetch")
        self._running: set[Future[list[Fetched]]] = set()
        self._buffers = BufferPool()
        self._turns = asyncio.Semaphore(can.concurrent_reads)

    @property
    def reads_here(self) -> bool:
        """Whether `read` is the way to read, in the thread that wants the bytes; else, `start` is."""
        return self._capabilities.read_into is not None

    @property
    def max_requests(self) -> int:
        """How many calls may be under way."""
        return sys.maxsize if self.reads_here else self._capabilities.concurrent_reads

    @property
    def together_bytes(self) -> int:
        """What one call best asks for: several ranges, where each takes no longer than a call."""
        return TOGETHER_BYTES if self.reads_here else 0

    def start(self, wanted: Sequence[Ranges], done: Callable[[Future[list[Fetched]]], None]) -> None:
        """Begin to read byte ranges of objects, and call `done` when all are here, from any thread."""
        reads = self._capabilities.async_reads
        if reads is not None:
            future = asyncio.run_coroutine_threadsafe(self._read_by(reads, wanted), reads.loop)
        else:
            assert self._pool is not None
            future = self._pool.submit(self._read, wanted, partial(read_ranges, self._store))
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        future.add_done_callback(done)

    def will_read(self, wanted: Sequence[Ranges]) -> None:
        """Tell the store what `read` will be called for soon."""
        will_read = self._capabilities.will_read
        if will_read is not None:
            for name, ranges in wanted:
                if len(ranges) == 1:  # not those of thousands of runs: each would be a call of the system
                    will_read(name, ranges)

    def read(self, wanted: Sequence[Ranges]) -> list[Fetched]:
        """Read byte ranges of objects into memory that is used again."""
        into = self._capabilities.read_into
        assert into is not None
        return self._read(wanted, partial(self._buffers.read, into))

    def _read(
        self, wanted: Sequence[Ranges], read: Callable[[str, Sequence[tuple[int, int]]], Buffer]
    ) -> list[Fetched]:
        found = list[Fetched]()
        for name, ranges in wanted:
            try:
                found.append(read(name, ranges))
            except Exception as error:
                found.append(_of_store(error))
        return found

    async def _read_by(self, reads: AsyncReads, wanted: Sequence[Ranges]) -> list[Fetched]:
        async def read(name: str, start: int, stop: int) -> Buffer:
            async with self._turns:
                return await reads.read(name, start, stop)

        found: list[Fetched] = []
        for name, ranges in wanted:
            try:
                found.append(_packed(await asyncio.gather(*(read(name, start, stop) for start, stop in ranges))))
            except Exception as error:
                found.append(_of_store(error))
        return found

    def release(self, data: memoryview) -> None:
        """Give back what a read gave: nothing refers to it any more."""
        self._buffers.release(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.abandon()
        for future in tuple(self._running):
            future.cancel()


def _of_store(error: Exception) -> StoreError:
    """What a read raised, as a StoreError. Raises the errors of reshard that are none, and MemoryError, as they are."""
    if isinstance(error, StoreError):
        return error
    if isinstance(error, (CheckpointError, CancelledError, MemoryError)):
        raise error
    found = StoreError(f"{type(error).__name__}: {error}")  # somebody's own store failed in a way of its own
    found.__cause__ = error
    return found


def read_ranges(store: Store, name: str, ranges: Sequence[tuple[int, int]]) -> Buffer:
    """Some ranges of an object, one after another. Raises as Store.read."""
    return _packed([store.read(name, start, stop) for start, stop in ranges])


def _packed(parts: Sequence[Buffer]) -> Buffer:
    """Bytes one after another; of an object that ends before, fewer than were asked for."""
    return parts[0] if len(parts) == 1 else b"".join(parts)
