"""Ends the threads of a manager, also if the manager is dropped without `close`."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence

from ..runtime.background import BackgroundThread
from ..runtime.forks import after_fork_in_child, generation
from ..runtime.logs import logger_of

logger = logger_of(__name__)

_ending: set[threading.Event] = set()
"""One for each manager that was dropped and is being ended."""
after_fork_in_child(_ending.clear)


class ManagerThreads:
    """Ends the threads of a manager, also if the manager is dropped without `close`.

    Args:
        manager: the manager. Nothing here refers to it, so that it is collected if it has no other references.
        end: ends the first thread.
    """

    def __init__(self, manager: object, end: Callable[[], object]) -> None:
        self.waits: list[Callable[[], object]] = []
        """Wait for the work that runs in the background."""
        self.ends = [end]
        """End the threads."""
        self._finalizer = weakref.finalize(manager, _end_dropped, self.waits, self.ends, generation())
        self._finalizer.atexit = False

    def end(self) -> None:
        """End the threads, without waiting for saves."""
        self._finalizer.detach()
        for end in self.ends:
            end()


def _end_dropped(waits: Sequence[Callable[[], object]], ends: Sequence[Callable[[], object]], created_in: int) -> None:
    """End the threads of a manager that was dropped.

    The garbage collector calls this in any thread, which may hold locks. So a new thread does the work.
    """

    ended = threading.Event()

    def work() -> None:
        try:
            for function in (*waits, *ends):
                try:
                    function()
                except Exception as error:
                    logger.warning("a CheckpointManager that was dropped could not be ended: %s", error)
        finally:
            _ending.discard(ended)
            ended.set()

    if created_in == generation():  # a forked child has no threads to end
        _ending.add(ended)
        BackgroundThread(work, "reshard-dropped")


def wait_for_dropped() -> None:
    """Wait until the managers of this process that were dropped have ended, and so have their saves."""
    for ended in list(_ending):
        ended.wait()
