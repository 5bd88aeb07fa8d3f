"""Reads of metadata: many at once, counted and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from ...planner.request_costs import LOCAL_COSTS, REMOTE_COSTS, RequestCosts
from ..errors import CorruptCheckpointError
from ..runtime.checksums import checksum
from ..runtime.forks import Lock
from ..runtime.threads import Pool
from ..stores.base import Store
from ..stores.retry import read_whole

T = TypeVar("T")
MAX_LATENCY_READ_BYTES = 64 * 1024
"""The time of a read of this size, or a smaller one, is the store's latency."""
MIN_THROUGHPUT_READ_BYTES = 16 * 1024 * 1024
MAX_CONCURRENT = 64
MALFORMED_ERRORS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What Python raises when code that expects well-formed metadata works on metadata that is malformed."""


class Reads:
    """Reads of a store, counted.

    `latency_s` is the shortest that a small one took, `bytes_per_s` what the last large reading brought; None before.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.bytes_read = 0
        self.requests = 0
        self.digest = 0
        """A checksum of all that was read and asked, whatever the order."""
        self.latency_s: float | None = None
        self.bytes_per_s: float | None = None
        self._lock = Lock()

    def read(self, name: str, start: int, stop: int) -> bytes:
        """As Store.read."""
        begin = time.perf_counter()
        data = bytes(self.store.read(name, start, stop))
        self._count(len(data), time.perf_counter() - begin, name, start, data)
        return data

    def whole(self, name: str, start: int, stop: int, *, ending: bytes | None = None) -> bytes:
        """As `read`, and again where there are fewer bytes although the object has more.

        Args:
            ending: what the object ends with: fewer bytes that end so are taken to be all.
        """
        begin = time.perf_counter()
        data = bytes(self.store.read(name, start, stop))
        if len(data) < stop - start and (ending is None or not data.endswith(ending)):
            data = bytes(read_whole(self.store, name, start, stop))
        self._count(len(data), time.perf_counter() - begin, name, start, data)
        return data

    def exactly(self, name: str, start: int, stop: int) -> bytes:
        """As `whole`. Raises CorruptCheckpointError where the object ends before."""
        data = self.whole(name, start, stop)
        if len(data) != stop - start:
            raise CorruptCheckpointError(
                f"object {name!r} in {self.store.location} ends at byte {start + len(data)}, where it should have "
                f"{stop} or more"
            )
        return data

    def size(self, name: str) -> int:
        """As Store.size."""
        begin = time.perf_counter()
        nbytes = self.store.size(name)
        self._count(0, time.perf_counter() - begin, name, nbytes, b"")
        return nbytes

    def _count(self, nbytes: int, seconds: float, name: str, number: int, data: bytes) -> None:
        digest = checksum(f"{name}/{number}/".encode() + data)
        with self._lock:
            self.digest = (self.digest + digest) % 2**64
            self.bytes_read += nbytes
            self.requests += 1
            if nbytes <= MAX_LATENCY_READ_BYTES:
                self.latency_s = seconds if self.latency_s is None else min(self.latency_s, seconds)

    def observe(self, nbytes: int, seconds: float) -> None:
        """Note how long many requests at once took together; only of large readings, in which they overlap."""
        if nbytes >= MIN_THROUGHPUT_READ_BYTES:
            self.bytes_per_s = nbytes / seconds

    def many(self, call: Callable[..., T], *columns: Sequence[object]) -> list[T]:
        """A call for each row, many at once."""
        if len(columns[0]) <= 1:
            return list(map(call, *columns))
        with Pool(min(MAX_CONCURRENT, len(columns[0])), "reshard-open") as pool:
            return list(pool.map(call, *columns))

    @property
    def costs(self) -> RequestCosts:
        """What a request costs, by what was seen."""
        if self.store.capabilities.read_into is not None:
            return LOCAL_COSTS
        concurrent = self.store.capabilities.concurrent_reads
        return replace(REMOTE_COSTS.measured(self.latency_s, self.bytes_per_s), concurrent_requests=concurrent)
