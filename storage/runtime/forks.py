"""What a fork leaves to a child process: the memory of its parent, and of the threads only the one that forked.

A lock that another thread held at that moment would never be released in the child, and a client whose work is done by
threads of its own would wait for them for ever. So what outlives a call has locks that a child gets anew, and stores
open their clients again when `generation()` has changed.
"""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType

_locks: weakref.WeakSet[Lock] = weakref.WeakSet()
_generation = 0


def generation() -> int:
    """Return how many forks lie between this process and the one that imported this module first."""
    return _generation


class Lock:
    """A lock that is free in a child process, whoever held it in the parent.

    What it protects must be right at every step of whoever changes it: a child may find it half changed.
    """

    __slots__ = ("__weakref__", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def renew(self) -> None:
        """Be free."""
        self._lock = threading.Lock()


def _in_child() -> None:
    global _generation
    _generation += 1
    for lock in list(_locks):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
