"""The garbage collector is enabled again after it was switched off."""

from __future__ import annotations

import gc
import threading

import pytest

from reshard.storage.runtime.collector import without_collections


def test_collector_is_enabled_again_after_success_and_after_an_error() -> None:
    with without_collections(), without_collections():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), without_collections():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_collector_stays_off_until_the_last_of_two_threads_is_done() -> None:
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with without_collections():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=work)
    with without_collections():
        thread.start()
        entered.wait()
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_collector_that_was_disabled_stays_disabled() -> None:
    gc.disable()
    try:
        with without_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
