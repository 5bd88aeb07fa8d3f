"""Python's garbage collector, switched off while many objects are created that stay alive."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from .forks import fork_safe_lock

_lock = fork_safe_lock()
_users = 0
_was_enabled = False


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Do not search for cyclic garbage while the block runs.

    A plan has many objects and no cycles, and a search can take longer than unpickling it. Blocks may be nested, and
    run in several threads: the collector is enabled again after the last one, if it was enabled before the first one.
    """
    global _users, _was_enabled
    with _lock:
        if _users == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _was_enabled:
                gc.enable()
