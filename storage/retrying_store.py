"""A store whose transient failures are tried again: slow-downs, resets, time-outs.

What is tried again is whole: a range, the manifest, a listing, a removal. An object that is being written cannot be;
its writer begins another one (`writer.write_object`). A conditional put whose first answer was lost fails when it is
tried again; the commit looks at what is there.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TypeVar

from typing_extensions import Buffer

from .errors import UnavailableError
from .store import ObjectWriter, Store

T = TypeVar("T")

RETRY_FOR_S = 120.0
"""A call that has failed for so long is given up."""
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 10.0


def retried(call: Callable[[], T], *, retry_for_s: float | None = None) -> T:
    """Call until it does not raise UnavailableError, waiting twice as long each time, with jitter."""
    deadline = time.monotonic() + (RETRY_FOR_S if retry_for_s is None else retry_for_s)
    wait = FIRST_WAIT_S
    while True:
        try:
            return call()
        except UnavailableError:
            pause = wait * random.uniform(0.5, 1)
            if time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        wait = min(2 * wait, LONGEST_WAIT_S)


class RetryingStore:
    """Another store, with its transient failures tried again for `retry_for_s` seconds a call (120 by default)."""

    def __init__(self, store: Store, *, retry_for_s: float | None = None) -> None:
        self._store = store
        self._retry_for_s = retry_for_s

    @property
    def location(self) -> str:
        return self._store.location

    def read(self, name: str, start: int, stop: int) -> Buffer:
        return self._retried(lambda: self._store.read(name, start, stop))

    def create(self, name: str) -> AbstractContextManager[ObjectWriter]:
        return self._store.create(name)

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        self._retried(lambda: self._store.put(name, data, overwrite=overwrite))

    def list(self, folder: str = "") -> Iterable[str]:
        return self._retried(lambda: list(self._store.list(folder)))

    def delete(self, names: Iterable[str]) -> None:
        names = list(names)
        self._retried(lambda: self._store.delete(names))

    def _retried(self, call: Callable[[], T]) -> T:
        return retried(call, retry_for_s=self._retry_for_s)
