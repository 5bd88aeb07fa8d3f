"""The garbage collector is enabled again after it was switched off."""

from __future__ import annotations

import gc
import os
import threading

import pytest

from reshard.storage.runtime.gc_pauses import RARE_THRESHOLD, gc_disabled, gc_less_often


def test_collector_is_enabled_again_after_success_and_after_an_error() -> None:
    with gc_disabled(), gc_disabled():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), gc_disabled():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_collector_stays_off_until_the_last_of_two_threads_is_done() -> None:
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with gc_disabled():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=work)
    with gc_disabled():
        thread.start()
        entered.wait()
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_collector_that_was_disabled_stays_disabled() -> None:
    gc.disable()
    try:
        with gc_disabled():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_collections_are_rare_until_the_last_block_ends() -> None:
    before = gc.get_threshold()
    with gc_less_often():
        with gc_less_often():
            assert gc.get_threshold() == (RARE_THRESHOLD, *before[1:])
        assert gc.get_threshold()[0] == RARE_THRESHOLD
    assert gc.get_threshold() == before
    try:
        with gc_less_often():
            gc.set_threshold(5000, 20, 20)
        assert gc.get_threshold() == (5000, 20, 20)
        gc.set_threshold(0)
        with gc_less_often():
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)


def test_a_forked_child_has_the_collector_of_the_parent() -> None:
    before, inside = gc.get_threshold(), False
    with gc_disabled(), gc_less_often():
        child = os.fork()
        if child == 0:
            inside = gc.isenabled() and gc.get_threshold() == before
    if child == 0:
        os._exit(0 if inside and gc.isenabled() and gc.get_threshold() == before else 1)
    assert os.waitpid(child, 0)[1] == 0
