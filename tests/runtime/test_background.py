"""Background threads: what happens if none can start. tests/integration/test_async_save.py covers the exit."""

from __future__ import annotations

import threading

import pytest

from reshard.storage.runtime import background
from reshard.storage.runtime.background import BackgroundThread


def test_the_work_runs_in_another_thread_and_is_joined() -> None:
    go_on = threading.Event()
    seen: list[int] = []

    def work() -> None:
        go_on.wait(60)
        seen.append(threading.get_ident())

    thread = BackgroundThread(work, "test")
    assert thread in background._running
    go_on.set()
    thread.join()
    assert seen
    assert seen[0] != threading.get_ident()
    assert thread not in background._running


def test_the_work_is_done_at_once_if_no_thread_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fails)
    seen: list[int] = []
    thread = BackgroundThread(lambda: seen.append(threading.get_ident()), "test")
    thread.join()
    assert seen == [threading.get_ident()]
    assert thread not in background._running
