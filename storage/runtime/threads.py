"""Threads that can be stopped, so that a call which failed or was interrupted ends soon, and so does the process.

The interpreter joins the threads of concurrent.futures when it exits, and a request that is tried again keeps such a
thread busy for minutes. The threads of a `Pool` are not joined: the pool has a `Stop`, which is set when the call
that made it fails, and when the interpreter exits. Retries wait for it, and `result_of` cancels its request by it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Executor, Future
from contextlib import contextmanager
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from ..errors import StoreError
from .forks import Lock, generation

P = ParamSpec("P")
T = TypeVar("T")
CLEAN_UP_S = 1.0
"""How long a call that failed may take to remove what it wrote."""
EXIT_S = 1.0
"""How long the interpreter waits at exit for threads that were stopped."""


class Stop:
    """Tells threads that nobody waits for their work any more.

    Args:
        parent: sets this one too when it is set.
        seconds: after which waits end as if it were set.
    """

    def __init__(self, parent: Stop | None = None, *, seconds: float | None = None) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: dict[object, Callable[[], object]] = {}
        self._children: weakref.WeakSet[Stop] = weakref.WeakSet()
        self._deadline = None if seconds is None else time.monotonic() + seconds
        if parent is not None:
            parent._adopt(self)

    def _adopt(self, child: Stop) -> None:
        with self._lock:
            self._children.add(child)
            already = self._event.is_set()
        if already:
            child.set()

    @property
    def left_s(self) -> float | None:
        """Seconds until its deadline, or None where it has none."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def set(self) -> None:
        """Stop the threads that heed it."""
        with self._lock:
            self._event.set()
            callbacks, children = list(self._callbacks.values()), list(self._children)
        for callback in callbacks:
            callback()
        for child in children:
            child.set()

    def wait(self, seconds: float) -> bool:
        """Wait, and return whether to stop."""
        left = self.left_s
        return self._event.wait(seconds if left is None else min(left, seconds)) or self.left_s == 0

    @contextmanager
    def calling(self, callback: Callable[[], object]) -> Iterator[None]:
        """Call `callback` if it is set while the block runs, or was set before."""
        key = object()
        with self._lock:
            self._callbacks[key] = callback
            already = self._event.is_set()
        try:
            if already:
                callback()
            yield
        finally:
            with self._lock:
                del self._callbacks[key]


_local = threading.local()
_unstopped = Stop()
"""Of threads that are not of a pool; never set."""
_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_pools_lock = Lock()


def current_stop() -> Stop:
    """Return what stops the work of this thread."""
    found: Stop = getattr(_local, "stop", _unstopped)
    return found


@contextmanager
def cleaning_up() -> Iterator[None]:
    """Allow this thread to call a store for CLEAN_UP_S, even if its work was stopped: to remove what it wrote."""
    before = current_stop()
    _local.stop = Stop(seconds=CLEAN_UP_S)
    try:
        yield
    finally:
        _local.stop = before


class Pool(Executor):
    """Runs calls in threads that the interpreter does not join when it exits.

    A block that ends by an error stops its pool and does not wait for the threads.
    """

    def __init__(self, count: int, name: str) -> None:
        self.stop = Stop(current_stop())
        self._count = count
        self._name = name
        self._lock = threading.Lock()
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._closed = False
        self.owner = threading.current_thread()
        self.threads: list[threading.Thread] = []
        with _pools_lock:
            _pools.add(self)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool takes no more tasks")
            self._tasks.put((future, partial(fn, *args, **kwargs)))
            if not self._idle.acquire(blocking=False) and len(self.threads) < self._count:
                thread = threading.Thread(
                    target=_work,
                    args=(self._tasks, self._idle, self.stop),
                    name=f"{self._name}_{len(self.threads)}",
                    daemon=True,
                )
                thread.start()
                self.threads.append(thread)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        waiting: list[Future[Any]] = []
        with self._lock:
            self._closed = True
            with contextlib.suppress(Empty):
                while cancel_futures:
                    if (task := self._tasks.get_nowait()) is not None:
                        waiting.append(task[0])
            for _ in self.threads:
                self._tasks.put(None)
        for future in waiting:  # without the lock: some call back
            future.cancel()
        if not wait:
            return
        try:
            for thread in self.threads:
                thread.join()
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Cancel what waits, stop what runs, and wait for neither."""
        self.shutdown(wait=False, cancel_futures=True)
        self.stop.set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.shutdown()
        else:
            self.abandon()


def _work(
    tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None], idle: threading.Semaphore, stop: Stop
) -> None:
    """Run tasks until there is None. Holds no pool, so that one that is dropped can go."""
    _local.stop = stop
    while True:
        try:
            task = tasks.get_nowait()
        except Empty:
            idle.release()
            task = tasks.get()
        if task is None:
            return
        _run(*task)
        del task


def _run(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def result_of(coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop, timeout_s: float | None = None) -> T:
    """Run a coroutine on a loop of another thread and return its result.

    It is cancelled when this thread's work is stopped, and when the wait is interrupted.

    Raises what it raises, TimeoutError, and StoreError where it was stopped.
    """
    stop = current_stop()
    future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, timeout_s), loop)
    with stop.calling(future.cancel):
        try:
            return future.result(stop.left_s)
        except CancelledError:
            raise StoreError("the call was stopped") from None
        except BaseException:
            future.cancel()
            raise


def run_bounded(call: Callable[[], object]) -> None:
    """Run a call that cannot be cancelled, and wait for it no longer than this thread may. Raises what it raises."""
    with Pool(1, "reshard-bounded") as pool:
        pool.submit(call).result(current_stop().left_s)


_loops: dict[int, asyncio.AbstractEventLoop] = {}
"""By generation: a child process has none of its parent's threads."""
_loops_lock = Lock()


def event_loop() -> asyncio.AbstractEventLoop:
    """Return the loop of this process for clients that have none of their own. It runs in a daemon thread."""
    with _loops_lock:
        loop = _loops.get(generation())
        if loop is None:
            loop = _loops[generation()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="reshard-loop", daemon=True).start()
        return loop


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@atexit.register
def _at_exit() -> None:
    """Stop all pools and requests: a client's thread that returned after the interpreter has gone would abort."""
    deadline = time.monotonic() + EXIT_S
    with _pools_lock:
        pools = list(_pools)
    for pool in pools:
        pool.abandon()
    loop = _loops.get(generation())
    if loop is not None:
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(EXIT_S)
    threads = [thread for pool in pools for thread in (*pool.threads, pool.owner)]
    for thread in threads:  # a daemon thread of the caller's own may be in a client too
        if thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))


def _in_child() -> None:
    """Forget the parent's threads: what waits for them to end, or to stop, would wait for ever."""
    global _local, _unstopped
    _local, _unstopped = threading.local(), Stop()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
