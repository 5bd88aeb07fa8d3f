"""Reads many byte ranges of a store at the same time, on the store's event loop or on a pool of threads."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager
from types import TracebackType

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from ...planner.errors import CheckpointError
from ..errors import StoreError
from ..runtime.threads import Pool
from ..stores.base import AsyncReads, Store
from ..stores.buffer_pool import read_buffers

ObjectRanges = tuple[str, Sequence[tuple[int, int]]]
"""The name of an object, and byte ranges [start, stop) of it."""
Fetched = Buffer | StoreError
"""The bytes of the byte ranges, one after another, or the error that the read raised."""
FETCH_GROUP_BYTES = 4 * 1024 * 1024
"""Bytes that one call reads from a file. Each call, and passing its result on, costs as much as reading 100 KiB
(`benchmarks/overhead.py`)."""


class Fetcher(AbstractContextManager["Fetcher"]):
    """Reads from one store. When its `with` block ends, it stops the reads that still run, without waiting for them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._capabilities = can = store.capabilities
        self.workers_fetch = can.is_local
        """Whether the worker threads call `read`. Otherwise the thread that executes the plan calls `start`."""
        self._pool: Pool | None = None
        if can.async_reads is None and not can.is_local:
            self._pool = Pool(can.concurrent_reads, "reshard-fetch")
        self._running: set[Future[Fetched]] = set()
        self._turns = asyncio.Semaphore(can.concurrent_reads)

    @property
    def max_requests(self) -> int:
        """The maximum number of calls that may run at the same time."""
        return sys.maxsize if self.workers_fetch else self._capabilities.concurrent_reads

    @property
    def group_bytes(self) -> int:
        """The number of bytes that a worker should read before it looks for other work. If it is 0: one request."""
        return FETCH_GROUP_BYTES if self.workers_fetch else 0

    def start(self, wanted: ObjectRanges, done: Callable[[Future[Fetched]], None]) -> None:
        """Start to read byte ranges of an object. When all have arrived, `done` is called, from any thread."""
        reads = self._capabilities.async_reads
        if reads is not None:
            future = asyncio.run_coroutine_threadsafe(self._read_by(reads, wanted), reads.loop)
        else:
            assert self._pool is not None
            future = self._pool.submit(self._read, wanted)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        future.add_done_callback(done)

    def will_read(self, wanted: Sequence[ObjectRanges]) -> None:
        """Announce to the store which byte ranges will be read soon."""
        will_read = self._capabilities.will_read
        if will_read is not None:
            for name, ranges in wanted:
                if len(ranges) == 1:  # thousands of byte ranges would need as many system calls
                    will_read(name, ranges)

    def read(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        arrived: Callable[[memoryview, int], None],
        memory: npt.NDArray[np.uint8] | None = None,
    ) -> memoryview | StoreError:
        """Read byte ranges of an object into a buffer that is reused.

        Args:
            arrived: called several times while the bytes arrive, with the buffer and the number of bytes in it.
            memory: read into this memory instead. It must be one page larger than the data.
        """
        into = self._capabilities.read_into
        assert into is not None
        try:
            return read_buffers.read(into, name, ranges, arrived, memory)
        except Exception as error:
            return _as_store_error(error)

    def _read(self, wanted: ObjectRanges) -> Fetched:
        try:
            return read_ranges(self._store, *wanted)
        except Exception as error:
            return _as_store_error(error)

    async def _read_by(self, reads: AsyncReads, wanted: ObjectRanges) -> Fetched:
        name, ranges = wanted

        async def read(start: int, stop: int) -> Buffer:
            async with self._turns:
                return await reads.read(name, start, stop)

        tasks = [asyncio.ensure_future(read(start, stop)) for start, stop in ranges]
        try:
            return _packed(await asyncio.gather(*tasks))
        except Exception as error:
            return _as_store_error(error)
        finally:
            for task in tasks:  # one may have failed, and the others would go on
                task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.abandon()
        for future in tuple(self._running):
            future.cancel()


def _as_store_error(error: Exception) -> StoreError:
    """Convert an error of a read to a StoreError. Other errors of reshard and MemoryError are raised unchanged."""
    if isinstance(error, StoreError):
        return error
    if isinstance(error, (CheckpointError, CancelledError, MemoryError)):
        raise error
    found = StoreError(f"{type(error).__name__}: {error}")  # raised by a store that is not part of reshard
    found.__cause__ = error
    return found


def read_ranges(store: Store, name: str, ranges: Sequence[tuple[int, int]]) -> Buffer:
    """Read byte ranges of an object, and join them.

    Raises:
        StoreError: as `Store.read`.
    """
    return _packed([store.read(name, start, stop) for start, stop in ranges])


def _packed(parts: Sequence[Buffer]) -> Buffer:
    """Join parts. The result is shorter than requested if the object ends early."""
    return parts[0] if len(parts) == 1 else b"".join(parts)
