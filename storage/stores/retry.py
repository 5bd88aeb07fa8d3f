"""Retry transient failures of a store, such as throttling, connection resets and time-outs.

Only whole calls are retried: a byte range, a put, a listing, a deletion. An object that is being written cannot be
retried; `write_objects` in writing/object_writer.py begins a new one. If the answer to a conditional put is lost, the
retry fails because the object exists; the commit then reads the object to find out who wrote it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

from typing_extensions import Buffer

from ..errors import StoreError, UnavailableError
from ..runtime.forks import generation
from ..runtime.logs import logger_of
from ..runtime.threads import cleaning_up, current_stop
from .base import AsyncReads, Capabilities, Store, check_delete, close_store, top_names
from .wrapped import WrappedStore

T = TypeVar("T")
logger = logger_of(__name__)

RETRY_FOR_S = 120.0
"""A call is retried for this long."""
REQUEST_DEADLINE_S = 60.0
"""A request that is not complete by then fails, and may be retried."""
SLOWEST_BYTES_PER_S = 1_000_000
"""The deadline of a large request is longer, by its size at this rate."""
QUIET_S = 5.0
"""Failures for longer than this are logged as warnings."""
WARN_EVERY_S = 30.0
"""There is at most one such warning in this time, however many calls fail. The others are logged as information."""
FIRST_WAIT_S = 0.1
MAX_WAIT_S = 10.0
_jitter = random.SystemRandom()
"""Training scripts often seed `random` with the same number on all ranks, which would then retry at the same times."""


def jittered(wait_s: float) -> float:
    """Return a random time between half of a wait and the whole wait, in seconds. It differs between processes."""
    return wait_s * _jitter.uniform(0.5, 1)


def retried(call: Callable[[], T], *, retry_for_s: float | None = None) -> T:
    """Call a function until it does not raise UnavailableError, and return its result.

    Args:
        call: the function.
        retry_for_s: how long to retry, in seconds. None is RETRY_FOR_S.

    Raises:
        UnavailableError: the function still fails after that time, or the work of this thread was stopped.
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
    """Return how many seconds a request that transfers `nbytes` bytes may take."""
    return REQUEST_DEADLINE_S + nbytes / SLOWEST_BYTES_PER_S


def read_whole(store: Store, name: str, start: int, stop: int) -> Buffer:
    """Read bytes of an object, and retry if the answer is shorter than the size of the object implies.

    A short answer costs one more request than `Store.read`, for the size. Use this function where a short answer would
    otherwise be reported as damage.

    Returns:
        The bytes [start, stop), or fewer if the object ends before `stop`.

    Raises:
        UnavailableError: the answers remain too short.
        StoreError: any other error of `Store.read`.
    """

    def read() -> Buffer:
        data = store.read(name, start, stop)
        found = memoryview(data).nbytes
        if found < stop - start and found < (expected := min(stop, store.size(name)) - start):
            raise UnavailableError(
                f"cannot read {name!r} in {store.location} now: the answer had {found} of {expected} bytes at {start}"
            )
        return data

    return retried(read, retry_for_s=store.retry_for_s if isinstance(store, RetryingStore) else None)


class _Warnings:
    """Limits how often this process warns that calls fail."""

    def __init__(self) -> None:
        self._next = 0.0

    def are_due(self) -> bool:
        """Return whether to warn now. The next warning is then due after WARN_EVERY_S."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + WARN_EVERY_S
        return True


_warnings = _Warnings()


class _Pauses:
    """The time to wait before each retry: it doubles each time, with jitter. None ends the retries."""

    def __init__(self, retry_for_s: float | None) -> None:
        self.retry_for_s = RETRY_FOR_S if retry_for_s is None else retry_for_s
        self._deadline: float | None = None
        self._wait = FIRST_WAIT_S

    def next(self, error: UnavailableError) -> float | None:
        if self._deadline is None:  # the time that the first attempt took does not count
            self._deadline = time.monotonic() + self.retry_for_s
        pause = jittered(self._wait)
        self._wait = min(2 * self._wait, MAX_WAIT_S)
        if time.monotonic() + pause > self._deadline:
            return None
        failing_s = self.retry_for_s - (self._deadline - time.monotonic())
        level = logging.WARNING if failing_s > QUIET_S and _warnings.are_due() else logging.INFO
        logger.log(level, "failing for %.0f s, retrying in %.1f s: %s", failing_s, pause, error)
        return pause


class _RetryingAsyncReads:
    """Reads on an event loop whose transient failures are retried."""

    def __init__(self, reads: AsyncReads, retry_for_s: float | None) -> None:
        self._reads = reads
        self.retry_for_s = retry_for_s

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._reads.loop

    async def read(self, name: str, start: int, stop: int) -> Buffer:
        pauses = _Pauses(self.retry_for_s)
        while True:
            try:
                return await self._reads.read(name, start, stop)
            except UnavailableError as error:
                if (pause := pauses.next(error)) is None:
                    raise
            await asyncio.sleep(pause)


def without_retries(store: Store) -> Store:
    """Return a store without its retries, for calls that are not worth a wait, such as a clean-up after a failure."""
    return store.inner if isinstance(store, RetryingStore) else store


def discard(store: Store, names: Iterable[str]) -> None:
    """Delete objects after a failure, without retries. Errors are ignored: the failure is the one to raise."""
    with contextlib.suppress(Exception), cleaning_up():
        without_retries(store).delete(names)


class RetryingStore(WrappedStore):
    """Another store whose transient failures are retried.

    Args:
        store: the store that does the work.
        retry_for_s: how long each call is retried, in seconds. None is RETRY_FOR_S.
        reopen: opens the store again in a child process after a fork, since its client may need threads that the child
            does not have. None uses the same store there.
    """

    def __init__(
        self, store: Store, *, retry_for_s: float | None = None, reopen: Callable[[], Store] | None = None
    ) -> None:
        super().__init__(store)
        self.retry_for_s = retry_for_s
        self._reopen = reopen
        self._generation = generation()

    @property
    def inner(self) -> Store:
        if self._reopen is not None and self._generation != generation():
            self._inner, self._generation = self._reopen(), generation()
        return self._inner

    @property
    def capabilities(self) -> Capabilities:
        reads = self.inner.capabilities.async_reads
        return replace(
            super().capabilities,
            async_reads=None if reads is None else _RetryingAsyncReads(reads, self.retry_for_s),
            list_top=lambda: self._retried(lambda: top_names(self.inner)),
            check_delete=self._check_delete,
            close=lambda: close_store(self.inner),
        )

    def read(self, name: str, start: int, stop: int) -> Buffer:
        return self._retried(lambda: self.inner.read(name, start, stop))

    def size(self, name: str) -> int:
        return self._retried(lambda: self.inner.size(name))

    def modified(self, name: str) -> float:
        return self._retried(lambda: self.inner.modified(name))

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        attempts = 0

        def put() -> None:
            nonlocal attempts
            attempts += 1
            self.inner.put(name, data, overwrite=overwrite)

        try:
            self._retried(put)
        except StoreError as error:
            error.may_have_written = error.may_have_written or attempts > 1  # an earlier attempt may still succeed
            raise

    def list(self, folder: str = "") -> Iterable[str]:
        return self._retried(lambda: list(self.inner.list(folder)))

    def _check_delete(self, names: Iterable[str]) -> None:
        names = list(names)
        self._retried(lambda: check_delete(self.inner, names))

    def delete(self, names: Iterable[str]) -> None:
        names = list(names)
        self._retried(lambda: self.inner.delete(names))

    def _retried(self, call: Callable[[], T]) -> T:
        return retried(call, retry_for_s=self.retry_for_s)
