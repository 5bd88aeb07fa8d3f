"""Many byte ranges of a store at once: by its own event loop where it has one, else by a pool of threads.

Where the store reads into memory that is given, that memory is used again: fresh pages cost more than filling them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from .errors import StoreError
from .store import AsyncReads, ReadInto, Store

Array = npt.NDArray[np.uint8]
Range = tuple[str, int, int]
"""Bytes [start, stop) of an object: its name, start and stop."""
Found = Buffer | StoreError
"""The bytes of a range, or why they are not to be had."""
TOGETHER_BYTES = 4 * 1024 * 1024
"""To hand work to another thread takes as long as to read some 100 KiB of a file."""


class Fetcher(AbstractContextManager["Fetcher"]):
    """Starts reads. What still runs when its block is left is cancelled, or left to end by itself unheeded."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pool: ThreadPoolExecutor | None = None
        if store.async_reads is None:
            self._pool = ThreadPoolExecutor(store.concurrent_reads, "reshard-fetch")
        self._running: set[Future[list[Found]]] = set()
        self._memory = _Memory(store.concurrent_reads)

    @property
    def together_bytes(self) -> int:
        """What one call of `start` best asks for: several ranges, where each takes no longer than a call."""
        return 0 if self._store.read_into is None else TOGETHER_BYTES

    def start(self, ranges: Sequence[Range], done: Callable[[Future[list[Found]]], None]) -> None:
        """Begin to read byte ranges, one after another, and call `done` when all are here, from any thread."""
        reads = self._store.async_reads
        if reads is not None:
            future = asyncio.run_coroutine_threadsafe(_read_by(reads, ranges), reads.loop)
        else:
            assert self._pool is not None
            future = self._pool.submit(self._read, ranges)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        future.add_done_callback(done)

    def _read(self, ranges: Sequence[Range]) -> list[Found]:
        into, found = self._store.read_into, list[Found]()
        for wanted in ranges:
            try:
                found.append(self._store.read(*wanted) if into is None else self._memory.filled(into, *wanted))
            except StoreError as error:
                found.append(error)
        return found

    def release(self, data: memoryview) -> None:
        """Give back what a read gave: nothing refers to it any more."""
        self._memory.give(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for future in tuple(self._running):
            future.cancel()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


async def _read_by(reads: AsyncReads, ranges: Sequence[Range]) -> list[Found]:
    found: list[Found] = []
    for wanted in ranges:
        try:
            found.append(await reads.read(*wanted))
        except StoreError as error:
            found.append(error)
    return found


class _Memory:
    """Memory that is used again, in sizes of powers of two; as much as there are reads at once, and no more."""

    def __init__(self, arrays: int) -> None:
        self._most = arrays
        self._lock = threading.Lock()
        self._free: list[Array] = []
        self._lent: dict[int, Array] = {}
        """By what `id` gives."""

    def filled(self, read_into: ReadInto, name: str, start: int, stop: int) -> memoryview:
        """What `read_into` gives of [start, stop)."""
        nbytes = stop - start
        size = 1 << (nbytes - 1).bit_length()
        with self._lock:
            at = next((at for at, array in enumerate(self._free) if array.nbytes == size), None)
            array = np.empty(size, np.uint8) if at is None else self._free.pop(at)
            self._lent[id(array)] = array
        data = array.data
        return data[: read_into(name, start, data[:nbytes])]

    def give(self, data: memoryview) -> None:
        """Take back what `filled` gave; anything else is left alone."""
        with self._lock:
            array = self._lent.pop(id(data.obj), None)
            if array is not None:
                self._free = [*self._free, array][-self._most :]
