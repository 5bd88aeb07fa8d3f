"""Ends the threads of a manager, also if the manager is dropped without `close`."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from ...planner.masking import masked
from ..runtime.background import BackgroundThread
from ..runtime.forks import after_fork_in_child, generation
from ..runtime.logs import logger_of

logger = logger_of(__name__)

_ending: dict[threading.Event, str] = {}
"""One for each manager that was dropped and is being ended, and its root."""
after_fork_in_child(_ending.clear)


class ManagerThreads:
    """Ends the threads of a manager, also if the manager is dropped without `close`.

    Args:
        manager: the manager. Nothing here refers to it, so that it is collected if it has no other references.
        end: ends the first thread.
        root: the location of the run.
    """

    def __init__(self, manager: object, end: Callable[[], object], root: str) -> None:
        self.waits: list[Callable[[], object]] = []
        """Wait for the work that runs in the background."""
        self.ends = ExitStack()
        """Ends the threads, the last one first."""
        self.ends.callback(end)
        self._finalizer = weakref.finalize(manager, _end_dropped, root, self.waits, self.ends, generation())
        self._finalizer.atexit = False

    def end(self) -> None:
        """End the threads, without waiting for saves."""
        self._finalizer.detach()
        self.ends.close()


def _end_dropped(root: str, waits: Sequence[Callable[[], object]], ends: ExitStack, created_in: int) -> None:
    """End the threads of a manager that was dropped.

    The garbage collector calls this in any thread, which may hold locks. So a new thread does the work.
    """

    ended = threading.Event()

    def work() -> None:
        try:
            for function in (*waits, ends.close):
                try:
                    function()
                except Exception as error:
                    logger.warning("a CheckpointManager that was dropped could not be ended: %s", error)
        finally:
            _ending.pop(ended, None)
            ended.set()

    if created_in == generation():  # a forked child has no threads to end
        _ending[ended] = root
        BackgroundThread(work, "reshard-dropped")


def wait_for_dropped(root: str) -> None:
    """Wait until the managers of a run that this process has dropped have ended, and so have their saves."""
    for ended in [ended for ended, of in list(_ending.items()) if of == root]:
        logger.info("waiting for a CheckpointManager of %s that was dropped without close()", masked(root))
        ended.wait()
