"""Execute writes that have been recorded for later, before other code uses the memory that they write to."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class Deferred(Protocol):
    """Writes to tensors that have been recorded and not been executed yet."""

    def finish(self, function: Any, tensors: Sequence[torch.Tensor]) -> None:
        """Execute the writes if a function uses the memory of one of their destinations."""


class _Thread(threading.local):
    is_executing = False


_lock = threading.Lock()
_registered: tuple[Deferred, ...] = ()
_thread = _Thread()


def register(deferred: Deferred) -> None:
    """Let `finish_writes` execute the writes, until `unregister`."""
    global _registered
    with _lock:
        _registered = (*_registered, deferred)


def unregister(deferred: Deferred) -> None:
    """Undo `register`. Do nothing if it has not been called."""
    global _registered
    with _lock:
        _registered = tuple(other for other in _registered if other is not deferred)


@contextmanager
def executing() -> Iterator[None]:
    """Disable `finish_writes` in this thread, while it executes writes."""
    before, _thread.is_executing = _thread.is_executing, True
    try:
        yield
    finally:
        _thread.is_executing = before


def finish_writes(function: Any, tensors: Sequence[torch.Tensor], *, excluded: Deferred | None = None) -> None:
    """Execute all recorded writes to the memory of some tensors.

    Args:
        function: the function that is about to use the tensors, for the log.
        tensors: tensors of any class.
        excluded: writes that are not executed.
    """
    if _thread.is_executing:
        return
    for deferred in _registered:
        if deferred is not excluded:
            deferred.finish(function, tensors)
