"""Threads that can be stopped, so that a call that failed or was interrupted ends soon, and so does the process.

The interpreter joins the threads of concurrent.futures when it exits, and the retries of a request can keep such a
thread busy for minutes. The threads of a `Pool` are not joined. Instead the pool has a `Stop`, which is set when the
call that created the pool fails, and when the interpreter exits. It ends the waits of retries, and cancels the requests
of `result_of`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast

from ..errors import StoreError
from .forks import after_fork_in_child, fork_safe_lock, generation

P = ParamSpec("P")
T = TypeVar("T")
CLEAN_UP_S = 1.0
"""How long a failed call may take to delete what it wrote."""
EXIT_S = 1.0
"""How long the interpreter waits at exit for threads that were stopped."""


class Stop:
    """A signal to threads that their work is no longer needed.

    Args:
        parent: another signal. When it is set, this one is set, too. Its deadline applies to this one.
        seconds: the time after which waits end as if the signal were set. None: no limit.
    """

    def __init__(self, parent: Stop | None = None, *, seconds: float | None = None) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: dict[object, Callable[[], object]] = {}
        self._children: weakref.WeakSet[Stop] = weakref.WeakSet()
        self._deadline = None if seconds is None else time.monotonic() + seconds
        if parent is not None:
            limits = [limit for limit in (self._deadline, parent._deadline) if limit is not None]
            self._deadline = min(limits, default=None)
            parent._adopt(self)

    def _adopt(self, child: Stop) -> None:
        with self._lock:
            self._children.add(child)
            already = self._event.is_set()
        if already:
            child.set()

    @property
    def left_s(self) -> float | None:
        """The seconds until the deadline, or None without a deadline."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def set(self) -> None:
        """Set the signal, and call the callbacks."""
        with self._lock:
            self._event.set()
            callbacks, children = list(self._callbacks.values()), list(self._children)
        for callback in callbacks:
            callback()
        for child in children:
            child.set()

    def wait(self, seconds: float) -> bool:
        """Wait for some seconds, or until the signal is set or its deadline has passed. Return whether to stop."""
        left = self.left_s
        return self._event.wait(seconds if left is None else min(left, seconds)) or self.left_s == 0

    @contextmanager
    def calling(self, callback: Callable[[], object]) -> Iterator[None]:
        """Call a callback if the signal is set while the block runs, or was set before."""
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


_thread_local = threading.local()
_never_set = Stop()
"""The signal of threads that do not belong to a pool."""
_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_pools_lock = fork_safe_lock()


def current_stop() -> Stop:
    """Return the signal that stops the work of this thread."""
    stop: Stop = getattr(_thread_local, "stop", _never_set)
    return stop


@contextmanager
def cleaning_up() -> Iterator[None]:
    """Allow this thread to call a store for CLEAN_UP_S even if its work was stopped, to delete what it wrote."""
    before = current_stop()
    _thread_local.stop = Stop(seconds=CLEAN_UP_S)
    try:
        yield
    finally:
        _thread_local.stop = before


class Pool(Executor):
    """An executor whose threads are not joined when the interpreter exits.

    If a `with` block raises, its pool is stopped, and the block does not wait for the threads.

    Args:
        count: the maximum number of threads.
        name: the prefix of the threads' names.
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
        task = future, partial(fn, *args, **kwargs)
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is shut down and accepts no tasks")
            self._tasks.put(task)  # before a thread starts: one that finds no task counts as idle
            if not self._idle.acquire(blocking=False) and len(self.threads) < self._count:
                self._start_thread()
            has_threads = bool(self.threads)
            if not has_threads:
                self._tasks.get_nowait()
        if not has_threads:
            _run(*task)
        return future

    def _start_thread(self) -> None:
        """Start another thread if the system permits it. In a pool without threads, `submit` runs the tasks itself.

        Since Python 3.12 no thread can start while the interpreter exits, when it may still wait for a save.
        """
        thread = threading.Thread(
            target=_work,
            args=(self._tasks, self._idle, self.stop),
            name=f"{self._name}_{len(self.threads)}",
            daemon=True,
        )
        with contextlib.suppress(RuntimeError):
            thread.start()
            self.threads.append(thread)

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
        for future in waiting:  # without the lock, since a callback may call the pool
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
        """Cancel the waiting tasks and stop the running ones, without waiting for them."""
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
    """Run tasks until None arrives. The thread has no reference to its pool, so an unused pool can be collected."""
    _thread_local.stop = stop
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
    """Run a coroutine on the event loop of another thread and return its result.

    The coroutine is cancelled when the work of this thread is stopped, and when the wait is interrupted.

    Raises:
        TimeoutError: the coroutine takes longer than `timeout_s`.
        StoreError: the work of this thread was stopped.
        Exception: any exception of the coroutine.
    """
    stop = current_stop()
    future = asyncio.run_coroutine_threadsafe(_outcome(coroutine, timeout_s), loop)
    with stop.calling(future.cancel):
        try:
            outcome = future.result(stop.left_s)
        except CancelledError:
            raise StoreError("the call was stopped") from None
        except BaseException:
            future.cancel()
            raise
    try:
        if outcome.error is not None:
            raise outcome.error
        return cast("T", outcome.result)
    finally:
        del outcome  # the traceback of its error refers to this frame


@dataclass(slots=True)
class _Outcome:
    """The result or the error of a coroutine."""

    result: Any = None
    error: Exception | None = None


async def _outcome(coroutine: Coroutine[Any, Any, Any], timeout_s: float | None) -> _Outcome:
    """Wait for a coroutine. If it fails when nobody waits for its error any more, asyncio would print the error."""
    try:
        return _Outcome(await asyncio.wait_for(coroutine, timeout_s))
    except Exception as error:
        return _Outcome(error=error)


def run_bounded(call: Callable[[], object], seconds: float | None = None) -> None:
    """Run a call that cannot be cancelled, and wait for it. Default: until the deadline of this thread's `Stop`."""
    with Pool(1, "reshard-bounded") as pool:
        pool.submit(call).result(current_stop().left_s if seconds is None else seconds)


_loops: dict[int, asyncio.AbstractEventLoop] = {}
"""The event loop of each generation of forks, since a child process does not have the threads of its parent."""
_loops_lock = fork_safe_lock()


def event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of this process for clients without their own. It runs in a daemon thread."""
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
    """Stop all pools and requests. A client's thread that returns after the interpreter ended aborts the process."""
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
    for thread in threads:  # includes daemon threads of the caller that own a pool, which may be in a client, too
        if thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))


def _forget_threads() -> None:
    """Forget the threads of the parent process: waiting for them would take forever."""
    global _thread_local, _never_set
    _thread_local, _never_set = threading.local(), Stop()
    _pools.clear()


after_fork_in_child(_forget_threads)
