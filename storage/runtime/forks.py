"""Locks and a fork counter for objects that must also work in a forked child process.

A child has the memory of its parent, but only the thread that forked. A lock that another thread held would never be
released in the child, and a client with its own threads would wait for them forever. So objects that outlive a call use
`fork_safe_lock`, and stores open their clients again when `generation()` has changed.
"""

from __future__ import annotations

import importlib
import os
import threading
import weakref
from collections.abc import Callable

importlib.import_module("numpy.ma")
"""`np.unique` imports this module when it is first called. A fork during that import, in another thread, would leave
the module locked in the child, where the next `np.unique` would wait forever."""
_locks: weakref.WeakSet[threading.Lock] = weakref.WeakSet()
_generation = 0


def generation() -> int:
    """Return the number of forks between this process and the one that imported this module first."""
    return _generation


def after_fork_in_child(function: Callable[[], object]) -> None:
    """Call a function in each child process after a fork, on systems that have forks."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def fork_safe_lock() -> threading.Lock:
    """Return a lock that is free in a forked child process, even if a thread of the parent held it.

    The data that it protects must be valid after every single step of a change, since a fork may happen in between.
    """
    lock = threading.Lock()
    _locks.add(lock)
    return lock


def _renew_locks() -> None:
    global _generation
    _generation += 1
    for lock in list(_locks):
        lock._at_fork_reinit()  # type: ignore[attr-defined]  # as the standard library does with its own locks


after_fork_in_child(_renew_locks)
