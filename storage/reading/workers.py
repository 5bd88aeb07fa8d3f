"""The threads that execute read plans. Several plans may share them, also at the same time."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

from ..runtime.limits import default_threads
from ..runtime.threads import Pool
from ..stores.base import Store
from .fetcher import Fetcher


class Workers(AbstractContextManager["Workers"]):
    """The threads that verify, decode and place chunks, and the fetcher that reads for them from one store.

    Args:
        store: the store.
        fetcher: the fetcher. By default, a new one that reads everything from the store.
    """

    def __init__(self, store: Store, fetcher: Fetcher | None = None) -> None:
        self.count = default_threads()
        self.pool = Pool(self.count, "reshard-read")
        self.fetcher = fetcher or Fetcher(store)
        self.stopped = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop all reads without waiting for them."""
        self.stopped = True
        self.fetcher.__exit__(kind, error, traceback)
        self.pool.abandon()
