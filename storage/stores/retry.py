"""A store whose transient failures are tried again: slow-downs, resets, time-outs.

What is tried again is whole: a range, the manifest, a listing, a removal. An object that is being written cannot be;
its writer begins another one (`writer.write_objects`). A conditional put whose first answer was lost fails when it is
tried again; the commit looks at what is there.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TypeVar

from typing_extensions import Buffer

from ..errors import UnavailableError
from ..runtime.forks import generation
from ..runtime.logs import logger_of
from ..runtime.threads import current_stop
from .base import AsyncReads, ObjectWriter, Store, check_delete, close_store, top_names

T = TypeVar("T")
logger = logger_of(__name__)

RETRY_FOR_S = 120.0
"""A call that has failed for so long is given up."""
REQUEST_DEADLINE_S = 60.0
"""A request that has not been answered in full by then has failed; it may be tried again."""
SLOWEST_BYTES_PER_S = 1_000_000
"""What is large is given more time than that, at this rate."""
QUIET_S = 5.0
"""What fails for longer is worth a warning."""
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 10.0


def retried(call: Callable[[], T], *, retry_for_s: float | None = None) -> T:
    """Call until it does not raise UnavailableError, for so many seconds (RETRY_FOR_S by default).

    Gives up at once when the work of this thread is stopped.
    """
    pauses = _Pauses(retry_for_s)
    while True:
        try:
            return call()
        except UnavailableError as error:
            failure, pause = error, pauses.next(error)
        if pause is None or current_stop().wait(pause):
            raise failure


def deadline_s(nbytes: int) -> float:
    """How long a request that moves so many bytes may take."""
    return REQUEST_DEADLINE_S + nbytes / SLOWEST_BYTES_PER_S


def read_whole(store: Store, name: str, start: int, stop: int) -> Buffer:
    """Read bytes of an object, and again if there are fewer than the size of the object tells, as after other failures.

    Takes a request more than `Store.read`: for what would otherwise be called damaged.

    Returns: fewer bytes where the object ends before.

    Raises as `Store.read`; UnavailableError if the answers stay too short.
    """

    def read() -> Buffer:
        data = store.read(name, start, stop)
        found = memoryview(data).nbytes
        if found < stop - start and found < (due := min(stop, store.size(name)) - start):
            raise UnavailableError(
                f"cannot read {name!r} in {store.location} now: the answer had {found} of {due} bytes at {start}"
            )
        return data

    return retried(read, retry_for_s=store.retry_for_s if isinstance(store, RetryingStore) else None)


class _Pauses:
    """How long to wait before each further try: twice as long each time, with jitter; None once it is given up."""

    def __init__(self, retry_for_s: float | None) -> None:
        self._retry_for_s = RETRY_FOR_S if retry_for_s is None else retry_for_s
        self._deadline: float | None = None
        self._wait = FIRST_WAIT_S

    def next(self, error: UnavailableError) -> float | None:
        if self._deadline is None:  # what the first try took does not count
            self._deadline = time.monotonic() + self._retry_for_s
        pause = self._wait * random.uniform(0.5, 1)
        self._wait = min(2 * self._wait, LONGEST_WAIT_S)
        if time.monotonic() + pause > self._deadline:
            return None
        failing_s = self._retry_for_s - (self._deadline - time.monotonic())
        level = logging.WARNING if failing_s > QUIET_S else logging.INFO
        logger.log(level, "failing for %.0f s, tried again in %.1f s: %s", failing_s, pause, error)
        return pause


class _RetryingReads:
    """Asynchronous reads, whose transient failures are tried again."""

    def __init__(self, reads: AsyncReads, retry_for_s: float | None) -> None:
        self._reads = reads
        self._retry_for_s = retry_for_s
        self.loop = reads.loop

    async def read(self, name: str, start: int, stop: int) -> Buffer:
        pauses = _Pauses(self._retry_for_s)
        while True:
            try:
                return await self._reads.read(name, start, stop)
            except UnavailableError as error:
                if (pause := pauses.next(error)) is None:
                    raise
            await asyncio.sleep(pause)


def without_retries(store: Store) -> Store:
    """A store without its retries: for what is worth no wait, as to tidy up after a failure."""
    return store._store if isinstance(store, RetryingStore) else store


class RetryingStore:
    """Another store, with its transient failures tried again.

    Args:
        retry_for_s: for how long, for each call; 120 s by default.
        reopen: opens the other store again, in a child process after a fork. Without it, the same one is used there.
    """

    def __init__(
        self, store: Store, *, retry_for_s: float | None = None, reopen: Callable[[], Store] | None = None
    ) -> None:
        self._retry_for_s = retry_for_s
        self._opened = store
        self._reopen = reopen
        self._generation = generation()

    @property
    def _store(self) -> Store:
        """The store that does the work. In a child process it is opened again, since it may need its own threads."""
        if self._reopen is not None and self._generation != generation():
            self._opened, self._generation = self._reopen(), generation()
        return self._opened

    @property
    def location(self) -> str:
        return self._opened.location

    @property
    def retry_for_s(self) -> float | None:
        return self._retry_for_s

    @property
    def concurrent_reads(self) -> int:
        return self._store.concurrent_reads

    @property
    def async_reads(self) -> AsyncReads | None:
        reads = self._store.async_reads
        return None if reads is None else _RetryingReads(reads, self._retry_for_s)

    read_into = None

    @property
    def holds_objects(self) -> bool:
        return self._store.holds_objects

    def read(self, name: str, start: int, stop: int) -> Buffer:
        return self._retried(lambda: self._store.read(name, start, stop))

    def size(self, name: str) -> int:
        return self._retried(lambda: self._store.size(name))

    def modified(self, name: str) -> float:
        return self._retried(lambda: self._store.modified(name))

    def create(self, name: str) -> AbstractContextManager[ObjectWriter]:
        return self._store.create(name)

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        self._retried(lambda: self._store.put(name, data, overwrite=overwrite))

    def list(self, folder: str = "") -> Iterable[str]:
        return self._retried(lambda: list(self._store.list(folder)))

    def list_top(self) -> Iterable[str]:
        return self._retried(lambda: top_names(self._store))

    def close(self) -> None:
        close_store(self._store)

    def check_delete(self, names: Iterable[str]) -> None:
        names = list(names)
        self._retried(lambda: check_delete(self._store, names))

    def delete(self, names: Iterable[str]) -> None:
        names = list(names)
        self._retried(lambda: self._store.delete(names))

    def _retried(self, call: Callable[[], T]) -> T:
        return retried(call, retry_for_s=self._retry_for_s)
