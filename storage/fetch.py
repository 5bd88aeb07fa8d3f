"""Many byte ranges of a store at once: by its own event loop where it has one, else by a pool of threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType

from typing_extensions import Buffer

from .store import Store


class Fetcher(AbstractContextManager["Fetcher"]):
    """Starts reads. What still runs when its block is left is cancelled, or left to end by itself unheeded."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pool: ThreadPoolExecutor | None = None
        if store.async_reads is None:
            self._pool = ThreadPoolExecutor(store.concurrent_reads, "reshard-fetch")
        self._running: set[Future[Buffer]] = set()

    def start(self, name: str, start: int, stop: int, done: Callable[[Future[Buffer]], None]) -> None:
        """Begin to read bytes [start, stop) of an object, and call `done` when they are here, from any thread."""
        reads = self._store.async_reads
        if reads is None:
            assert self._pool is not None
            future = self._pool.submit(self._store.read, name, start, stop)
        else:
            future = asyncio.run_coroutine_threadsafe(reads.read(name, start, stop), reads.loop)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        future.add_done_callback(done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for future in tuple(self._running):
            future.cancel()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
