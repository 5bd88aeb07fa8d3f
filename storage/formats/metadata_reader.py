"""Read metadata: many requests at once, counted and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ...planner.request_costs import LOCAL_COSTS, REMOTE_COSTS, RequestCosts
from ..errors import CorruptCheckpointError
from ..runtime.checksums import checksum
from ..runtime.forks import fork_safe_lock
from ..runtime.threads import Pool
from ..stores.base import Store
from ..stores.retry import read_whole

T = TypeVar("T")
MAX_LATENCY_READ_BYTES = 64 * 1024
"""Reads up to this size measure the latency of the store."""
MIN_THROUGHPUT_READ_BYTES = 16 * 1024 * 1024
"""Readings from this size on measure the throughput of the store, because their requests overlap."""
MAX_CONCURRENT = 64
"""How many reads are in flight at once."""
MALFORMED_ERRORS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What Python raises when code that expects well-formed metadata works on metadata that is malformed."""


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a store answers. None if that was not measured."""

    latency_s: float | None = None
    bytes_per_s: float | None = None


class MetadataReader:
    """Reads the metadata of a checkpoint from its store, and counts and times the requests."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.bytes_read = 0
        self.requests = 0
        self.digest = 0
        """A checksum of everything that was read, independent of the order."""
        self.latency_s: float | None = None
        """The shortest time that a small read took, in seconds. None before the first one."""
        self.bytes_per_s: float | None = None
        """The throughput of the last large reading. None before the first one."""
        self._lock = fork_safe_lock()

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Read a byte range once, as `Store.read` does. The result may be shorter than the range."""
        begin = time.perf_counter()
        data = bytes(self.store.read(name, start, stop))
        self._count(len(data), time.perf_counter() - begin, name, start, data)
        return data

    def whole(self, name: str, start: int, stop: int, *, ending: bytes | None = None) -> bytes:
        """Read a byte range, with further requests if the store returns fewer bytes than the object has.

        Args:
            name: the object.
            start, stop: the byte range. It may end after the object.
            ending: the last bytes of the object, if known. A shorter result that ends with them is complete.
        """
        begin = time.perf_counter()
        data = bytes(self.store.read(name, start, stop))
        if len(data) < stop - start and (ending is None or not data.endswith(ending)):
            data = bytes(read_whole(self.store, name, start, stop))
        self._count(len(data), time.perf_counter() - begin, name, start, data)
        return data

    def exactly(self, name: str, start: int, stop: int) -> bytes:
        """Read all bytes of a byte range. Raise CorruptCheckpointError if the object ends before `stop`."""
        data = self.whole(name, start, stop)
        if len(data) != stop - start:
            raise CorruptCheckpointError(
                f"object {name!r} in {self.store.location} ends at byte {start + len(data)}, but should have {stop} "
                "or more bytes"
            )
        return data

    def size(self, name: str) -> int:
        """Return the size of an object in bytes, as `Store.size` does."""
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

    @property
    def speed(self) -> Speed:
        """What the reads measured."""
        return Speed(self.latency_s, self.bytes_per_s)

    def use_store(self, store: Store, speed: Speed | None) -> None:
        """Read from another store from now on; see `Source.use_store`."""
        self.store = store
        if speed is not None:
            self.bytes_read = self.requests = 0
            self.latency_s, self.bytes_per_s = speed.latency_s, speed.bytes_per_s

    def observe(self, nbytes: int, seconds: float) -> None:
        """Learn the throughput from concurrent requests: their bytes, and the seconds that all of them took."""
        if nbytes >= MIN_THROUGHPUT_READ_BYTES:
            self.bytes_per_s = nbytes / seconds

    def many(self, call: Callable[..., T], *columns: Sequence[object]) -> list[T]:
        """Call a function for each row of some columns, many at once, and return the results in order."""
        if len(columns[0]) <= 1:
            return list(map(call, *columns))
        with Pool(min(MAX_CONCURRENT, len(columns[0])), "reshard-open") as pool:
            return list(pool.map(call, *columns))

    @property
    def costs(self) -> RequestCosts:
        """The cost of a request, from the measured latency and throughput."""
        if self.store.capabilities.is_local:
            return LOCAL_COSTS
        concurrent = self.store.capabilities.concurrent_reads
        return replace(REMOTE_COSTS.measured(self.latency_s, self.bytes_per_s), concurrent_requests=concurrent)
