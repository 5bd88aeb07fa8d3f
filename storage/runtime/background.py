"""Threads that finish work after the call that began it has returned. The interpreter waits for them when it exits."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import threading
from collections.abc import Callable

from .forks import after_fork_in_child
from .logs import logger_of

logger = logger_of(__name__)

_running: set[BackgroundThread] = set()
_at_exit: list[Callable[[], object]] = []
_lock = threading.RLock()  # the garbage collector may create a thread at any moment
_has_waited = False
"""Whether the main thread has ended, and the interpreter waits for no further background threads."""


class BackgroundThread:
    """A thread that the interpreter waits for when it exits.

    Other threads of reshard are stopped at exit (see `threads`). This happens later, so the work can still use them. If
    no thread can start, or the main thread has ended, the work is done at once.

    Args:
        work: The work. It must not raise.
        name: The name of the thread.
    """

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self._work = work
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        with _lock:  # a thread is waited for only if it has started
            _running.add(self)
            has_started = not _has_waited and _start(self._thread)
        if not has_started:
            self._run()

    def _run(self) -> None:
        try:
            self._work()
        finally:
            _running.discard(self)

    def join(self) -> None:
        """Wait until the work has ended."""
        if self._thread.ident is not None:
            self._thread.join()


def _start(thread: threading.Thread) -> bool:
    """Start a thread. Return False if there are too many."""
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


def call_at_exit(callback: Callable[[], object]) -> None:
    """Call a function when the interpreter exits, after all background threads have ended."""
    _at_exit.append(callback)


def is_exiting() -> bool:
    """Return whether the main thread has ended. Background work is then done at once."""
    return _has_waited


def _wait_at_exit() -> None:
    """Wait for the background threads. Ctrl-C ends the wait."""
    global _has_waited
    with _lock:
        _has_waited = True
        threads = list(_running)
    if threads:
        logger.info("waiting for %d saves to end before the interpreter exits", len(threads))
    try:
        for thread in threads:
            thread.join()
    finally:
        for callback in _at_exit:
            with contextlib.suppress(Exception):
                callback()


# The callbacks of `atexit` are too late: the executors of concurrent.futures, which clients of stores use, accept no
# tasks then. The callbacks of `threading` run before, the last one registered first.
importlib.import_module("concurrent.futures.thread")
try:
    getattr(threading, "_register_atexit", atexit.register)(_wait_at_exit)
except RuntimeError:  # this module is imported by a callback of `atexit`
    _has_waited = True


def _forget_threads() -> None:
    """Forget the threads of the parent process, which do not run in a forked child."""
    global _lock
    _lock = threading.RLock()
    _running.clear()


after_fork_in_child(_forget_threads)
