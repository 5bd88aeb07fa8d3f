"""Python's garbage collector, switched off or called rarely while many objects are created that stay alive.

A search for cyclic garbage visits all objects, and can take longer than creating them. The blocks below may be nested,
and run in several threads. After the last one, the collector works as before the first one.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

from .forks import after_fork_in_child, fork_safe_lock, generation

RARE_THRESHOLD = 50_000
"""How many objects are created between two searches while they are rare. Python's default is 700 to 2,000."""
_lock = fork_safe_lock()


class _Setting:
    """A change of the collector that several blocks share.

    Args:
        change: makes the change, and returns a function that undoes it.
    """

    def __init__(self, change: Callable[[], Callable[[], object]]) -> None:
        self._change = change
        self._undo: Callable[[], object] = lambda: None
        self._users = 0
        after_fork_in_child(self._end)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        began_in = -1
        try:
            with _lock:
                if self._users == 0:
                    self._undo = self._change()
                self._users += 1
                began_in = generation()
            yield
        finally:
            with _lock:
                self._users -= began_in == generation()
                if self._users == 0:
                    self._end()

    def _end(self) -> None:
        """Undo the change. The blocks of the parent process do not end in a forked child."""
        undo, self._undo, self._users = self._undo, lambda: None, 0
        undo()


def _switch_off() -> Callable[[], object]:
    was_enabled = gc.isenabled()
    gc.disable()
    return gc.enable if was_enabled else lambda: None


def _make_rare() -> Callable[[], object]:
    before = gc.get_threshold()
    if not 0 < before[0] < RARE_THRESHOLD:
        return lambda: None
    gc.set_threshold(RARE_THRESHOLD, *before[1:])
    rare = gc.get_threshold()

    def undo() -> None:
        if gc.get_threshold() == rare:  # otherwise someone else has changed it
            gc.set_threshold(*before)

    return undo


_off, _rare = _Setting(_switch_off), _Setting(_make_rare)


def gc_disabled() -> contextlib.AbstractContextManager[None]:
    """Do not search for garbage while the block runs. Use it for work that takes seconds, such as planning."""
    return _off.active()


def gc_less_often() -> contextlib.AbstractContextManager[None]:
    """Search for garbage less often while the block runs. Use it for work that the caller waits for."""
    return _rare.active()
