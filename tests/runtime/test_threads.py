"""Pools whose threads can be stopped, and how that ends the waits of retries and requests."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError

import pytest
import torch

import reshard
from reshard.errors import StoreError, UnavailableError
from reshard.storage.runtime.progress import Progress
from reshard.storage.runtime.threads import Pool, Stop, cleaning_up, current_stop, event_loop, result_of
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.retry import RetryingStore, retried
from reshard.storage.stores.testing import Call, RecordingStore, slow


def unavailable() -> None:
    raise UnavailableError("injected: down")


def retry_forever() -> None:
    retried(unavailable)


def wait_for_long() -> None:
    result_of(asyncio.sleep(60), event_loop())


@pytest.fixture
def in_time() -> Iterator[None]:
    """Fail a test that takes longer than stopped work may take."""
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < 3


def test_a_pool_runs_tasks() -> None:
    names = set()

    def name(value: int) -> int:
        names.add(threading.current_thread().name)
        time.sleep(0.01)
        return value

    with Pool(3, "test") as pool:
        assert list(pool.map(name, range(20))) == list(range(20))
        with pytest.raises(ZeroDivisionError):
            pool.submit(lambda: 1 // 0).result()
    assert names == {"test_0", "test_1", "test_2"}
    assert all(not thread.is_alive() for thread in pool.threads)
    with pytest.raises(RuntimeError, match="the pool is shut down"):
        pool.submit(name, 1)


def test_tasks_that_wait_for_each_other_run_at_the_same_time() -> None:
    for _ in range(100):
        barrier = threading.Barrier(3)
        with Pool(3, "test") as pool:
            for future in [pool.submit(barrier.wait, 20) for _ in range(3)]:
                future.result()


def test_one_task_at_a_time_starts_few_threads() -> None:
    with Pool(8, "test") as pool:
        for i in range(20):
            assert pool.submit(int, i).result() == i
            time.sleep(0.02)
        assert len(pool.threads) < 8


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("work", [retry_forever, wait_for_long])
def test_a_block_that_fails_stops_its_threads(work: Callable[[], None]) -> None:
    pool = Pool(2, "test")
    futures = [pool.submit(work) for _ in range(4)]
    time.sleep(0.2)
    with pytest.raises(KeyError), pool:
        raise KeyError
    for thread in pool.threads:
        thread.join(2)
        assert not thread.is_alive()
    errors = [CancelledError() if future.cancelled() else future.exception() for future in futures]
    assert [isinstance(error, StoreError) for error in errors] == [True, True, False, False]
    assert all(future.cancelled() for future in futures[2:])


@pytest.mark.usefixtures("in_time")
def test_stopping_a_pool_stops_the_pools_of_its_threads() -> None:
    def outer() -> list[None]:
        with Pool(2, "inner") as inner:
            return list(inner.map(lambda _: retried(unavailable), range(3)))

    pool = Pool(1, "outer")
    future = pool.submit(outer)
    time.sleep(0.2)
    pool.abandon()
    with pytest.raises(UnavailableError):
        future.result()


@pytest.mark.usefixtures("in_time")
def test_stopped_work_may_clean_up_for_a_while() -> None:
    found = []

    def work() -> None:
        try:
            wait_for_long()
        finally:
            with cleaning_up():
                found.append(result_of(asyncio.sleep(0.1, "removed"), event_loop()))
                with pytest.raises(TimeoutError):
                    wait_for_long()
            assert current_stop() is pool.stop

    pool = Pool(1, "test")
    future = pool.submit(work)
    time.sleep(0.1)
    pool.abandon()
    with pytest.raises(StoreError, match="the call was stopped"):
        future.result()
    assert found == ["removed"]


def test_a_stop_calls_its_callbacks_once() -> None:
    called: list[str] = []
    parent = Stop()
    child = Stop(parent)
    with child.calling(lambda: called.append("a")):
        assert called == []
        parent.set()
        assert called == ["a"]
    with child.calling(lambda: called.append("b")):
        assert called == ["a", "b"]
    child.set()
    assert called == ["a", "b"]
    assert Stop(parent).wait(60)
    assert not Stop().wait(0.01)
    assert Stop(seconds=0.01).wait(60)


def test_result_of_returns_the_result_or_raises() -> None:
    async def fails() -> None:
        raise KeyError("x")

    assert result_of(asyncio.sleep(0, 7), event_loop()) == 7
    with pytest.raises(KeyError):
        result_of(fails(), event_loop())
    with pytest.raises(TimeoutError):
        result_of(asyncio.sleep(60), event_loop(), 0.05)


@pytest.mark.usefixtures("in_time")
def test_a_failed_call_stops_only_its_own_retries() -> None:
    memory = MemoryStore()
    values = torch.randn(300, 300)
    reshard.save({"w": values}, memory)
    tries = {"failing": 0, "other": 0}

    def before(which: str, passes_after: int) -> RetryingStore:
        def fail(call: Call) -> None:
            if call.method == "read" and call.name.startswith("data/"):
                tries[which] += 1
                if tries[which] <= passes_after:
                    raise UnavailableError("injected: down")

        return RetryingStore(RecordingStore(memory, fail))

    def raising(progress: Progress) -> None:
        raise KeyError("the callback")

    loaded = torch.zeros(300, 300)
    other = threading.Thread(target=reshard.load, args=({"w": loaded}, before("other", 3)))
    other.start()
    with pytest.raises(reshard.errors.RankError, match="the callback"):
        reshard.load({"w": torch.zeros(300, 300)}, before("failing", 10**9), progress=raising)
    time.sleep(0.1)
    seen = tries["failing"]
    other.join()
    assert loaded.equal(values)
    time.sleep(0.5)
    assert tries["failing"] == seen


def test_calls_wait_for_a_slow_store() -> None:
    memory = MemoryStore()
    reshard.save({"w": torch.ones(10)}, RecordingStore(memory, slow("write", 0.2)))
    assert reshard.open(RecordingStore(memory, slow("read", 0.2))).verify() == []


def test_tasks_run_in_the_caller_if_no_thread_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Since Python 3.12, no thread can start while the interpreter exits."""

    def fails(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with Pool(3, "test") as started:
        first = started.submit(threading.get_ident).result()
        monkeypatch.setattr(threading.Thread, "start", fails)
        assert list(started.map(lambda _: threading.get_ident(), range(5))) == [first] * 5
        with Pool(3, "test") as pool:
            assert pool.submit(threading.get_ident).result() == threading.get_ident()
            failed = pool.submit(int, "x")
            assert isinstance(failed.exception(), ValueError)
