"""Executes a read plan: fetches, verifies, decodes and places chunks, all at the same time.

Many requests run concurrently. As many workers as this rank has cores verify the bytes against their checksums, decode
them, and write the values straight into the destination tensors. A tensor is written only after all its bytes have
arrived and been verified, so damage leaves it unchanged. The bytes that wait for this stay within a budget. When the
waiting bytes fill the budget, chunks of incomplete tensors are written as they arrive: damage that is found later then
leaves such a tensor partly overwritten.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch.profiler import record_function

from ...planner.chunk_reads import ChunkReads
from ...planner.errors import CheckpointError
from ...planner.index import CheckpointIndex
from ...planner.masking import harmless
from ...planner.read_plan import ReadPlan
from ..errors import CorruptCheckpointError, ObjectNotFoundError, RankError, StoreError, nearest
from ..runtime.limits import default_budget
from ..runtime.process_group import CHECK_EVERY_S, Interrupt, never
from ..stores.base import Store
from ..tensors.dtypes import torch_dtype
from .decode import place_chunk_batch
from .destination import Destination
from .fetcher import Fetched, ObjectRanges, read_ranges
from .tasks import DAMAGED, ChunkBatch, ChunkRange, Request, TensorRead, arrange, separate
from .workers import Workers

GROUPS_AHEAD = 4
"""The number of groups of requests that are announced in advance to a store that reads ahead."""
STOPPED = "the read was stopped"


@dataclass(slots=True)
class ReadStats:
    """Seconds that reading took, summed over all requests and all threads."""

    fetch_s: float = 0.0
    decode_s: float = 0.0


def execute(
    plan: ReadPlan,
    index: CheckpointIndex,
    store: Store,
    destinations: Sequence[torch.Tensor],
    *,
    budget_bytes: int | None = None,
    interrupt: Interrupt = never,
    placed: Callable[[int], None] = lambda nbytes: None,
    workers: Workers | None = None,
) -> ReadStats:
    """Execute a plan: read each box into its destination.

    Args:
        destinations: One tensor for each of `plan.reads`, with the sizes of its box, on any device. The stored dtype
            can be cast to its dtype. The tensors are written in place.
        budget_bytes: Memory for bytes that have been fetched and not been placed yet. `default_budget()` by default.
        interrupt: Called regularly by this thread. If it raises an error, the read stops with this error.
        placed: Called by any thread, with the number of stored bytes of a request whose values have all been placed.
        workers: Threads and buffers that are shared with other calls. By default this call creates its own.

    Raises:
        CorruptCheckpointError: Bytes are damaged or missing. The tensor that the message names is unchanged, unless
            the message says that a part of it was overwritten.
        StoreError: The store failed.
    """
    budget = default_budget() if budget_bytes is None else budget_bytes
    execution = _Execution(plan, index, store, destinations, budget, interrupt, placed)
    with Workers(store) if workers is None else nullcontext(workers) as used:
        execution.run(used)
    return execution.stats


class _Execution:
    """The state of one plan while it is executed. `_lock` protects everything that threads share.

    A worker always takes the latest possible step: it places batches that are verified, or verifies requests that have
    arrived. If the fetcher reads in the calling thread, the worker also reads
    the next group, so that the core that read the bytes also processes them (`benchmarks/overhead.py`). For other
    fetchers, the thread that called `run` starts the reads.
    """

    def __init__(
        self,
        plan: ReadPlan,
        index: CheckpointIndex,
        store: Store,
        destinations: Sequence[torch.Tensor],
        budget_bytes: int,
        interrupt: Interrupt,
        placed: Callable[[int], None],
    ) -> None:
        self.stats = ReadStats()
        self._index = index
        self._store = store
        self._budget = budget_bytes
        self._interrupt = interrupt
        self._placed = placed
        self._tensors, self._requests = arrange(plan, list(map(_destination, plan.reads, destinations)))
        self._lock = threading.RLock()  # the thread that starts a read runs its callback if it has already ended
        self._caller = threading.Condition(self._lock)
        """Notifies the thread that called `run`."""
        self._held = 0
        self._fetching = 0
        self._called = 0
        """The number of workers that have been started and have not ended."""
        self._working = 0
        """The number of workers that execute a task."""
        self._reading = 0
        """The number of workers that read."""
        self._arrived: deque[tuple[list[Request], Sequence[Fetched]]] = deque()
        self._verified: deque[ChunkBatch] = deque()
        self._error: BaseException | None = None
        self._failed_at: dict[BaseException, TensorRead] = {}

    def run(self, workers: Workers) -> None:
        self._workers, self._fetcher = workers, workers.fetcher
        self._groups = deque(self._grouped())
        self._unannounced = deque(self._groups)  # the groups that have not been announced to the store
        try:
            with self._lock:
                self._call_workers()
                while self._error is None and not self._ended:
                    group = None if self._fetcher.reads_here else self._admitted()
                    if group is not None:
                        self._fetcher.start(self._wanted(group), partial(self._fetched, group, time.perf_counter()))
                    else:
                        self._pause()
        except BaseException as error:
            self._fail(error)
        if self._error is not None:
            with self._lock:
                while (
                    self._working > self._reading
                ):  # what the error says about the tensor must be true when it is raised
                    self._caller.wait()
            for request in self._requests:
                if request.data is not None:
                    self._fetcher.release(request.data)
        separate(self._tensors, self._requests)
        if self._error is not None:
            tensor = self._failed_at.get(self._error)
            if tensor is not None and tensor.overwritten:
                self._error.args = (f"{self._error}; a part of the tensor was overwritten",)
            raise self._error

    def _grouped(self) -> Iterator[list[Request]]:
        """Yield groups of requests that are read by one call."""
        most = min(self._fetcher.group_bytes, self._budget // 4)
        group, nbytes = list[Request](), 0
        for request in self._requests:
            group.append(request)
            nbytes += request.nbytes
            if nbytes >= most:
                yield group
                group, nbytes = [], 0
        if group:
            yield group

    def _wanted(self, group: list[Request]) -> list[ObjectRanges]:
        return [(self._index.objects[request.object][0], request.ranges) for request in group]

    @property
    def _ended(self) -> bool:
        idle = not (self._fetching or self._working)
        return idle and not (self._groups or self._arrived or self._verified)

    def _admitted(self) -> list[Request] | None:
        """Return the requests to fetch next, or None if the store or the budget is full. The caller holds the lock."""
        if not self._groups or self._fetching >= self._fetcher.max_requests:
            return None
        nbytes = sum(request.nbytes for request in self._groups[0])
        if self._held and self._held + nbytes > self._budget:
            if self._fetching or self._working or self._arrived or self._verified:
                return None
            self._place_incomplete_tensors()
            if self._verified:
                return None
            # Nothing else can free memory: let this one request exceed the budget.
        self._fetching += 1
        self._held += nbytes
        return self._groups.popleft()

    def _pause(self) -> None:
        """Release the lock while waiting, and call `interrupt`. The caller holds the lock."""
        self._caller.wait(CHECK_EVERY_S)
        if self._workers.stopped:  # the tasks of this plan may never run
            raise StoreError(STOPPED)
        self._lock.release()
        try:
            self._interrupt()
        finally:
            self._lock.acquire()

    def _fail(self, error: BaseException) -> None:
        if (
            isinstance(error, (RuntimeError, CancelledError)) and self._workers.stopped
        ):  # the pools accept no more tasks
            error = StoreError(STOPPED)
        with self._lock:
            self._error = self._error or error
            self._caller.notify()

    def _call_workers(self) -> None:
        """Start a worker for each task that waits, up to the maximum. The caller holds the lock."""
        waiting = len(self._verified) + len(self._arrived)
        if self._fetcher.reads_here:
            waiting += len(self._groups)
        for _ in range(min(self._workers.count - self._called, waiting)):
            self._workers.pool.submit(self._work)
            self._called += 1

    def _work(self) -> None:
        """Execute tasks until there are none. Each worker runs this."""
        try:
            with record_function("reshard.decode"):
                while (task := self._next()) is not None:
                    self._do(task)
        except BaseException as error:
            self._fail(error)

    def _do(self, task: Callable[[], None]) -> None:
        begin = time.perf_counter()
        failed: BaseException | None = None
        try:
            task()
        except BaseException as error:
            failed = error
        with self._lock:  # under one lock: no thread may see that the task has ended, and not that it failed
            if failed is not None:
                self._fail(failed)
            self.stats.decode_s += time.perf_counter() - begin
            self._working -= 1
            if self._error is None:
                self._call_workers()
            if self._ended or self._error is not None or not self._fetcher.reads_here:
                self._caller.notify()

    def _next(self) -> Callable[[], None] | None:
        """Return the next task. None if there is none now: the thread that adds one starts a worker again."""
        with self._lock:
            task: Callable[[], None] | None = None
            if self._error is None and not self._workers.stopped:
                group = None
                if self._fetcher.reads_here and not (self._verified or self._arrived):
                    group = self._admitted()
                if group is not None:
                    task = partial(self._read, group)
                elif self._verified:
                    task = partial(self._place, self._verified.popleft())
                elif self._arrived:
                    task = partial(self._arrive, *self._arrived.popleft())
            if task is None:
                self._called -= 1
                self._caller.notify()
            else:
                self._working += 1
            return task

    def _read(self, group: list[Request]) -> None:
        begin = time.perf_counter()
        with self._lock:
            count = len(self._unannounced) - len(self._groups) + GROUPS_AHEAD
            soon = [self._unannounced.popleft() for _ in range(min(count, len(self._unannounced)))]
            self._reading += 1
            if self._error is not None:
                self._caller.notify()
        try:
            for later in soon:
                self._fetcher.will_read(self._wanted(later))
            found = self._fetcher.read(self._wanted(group))
        finally:
            took = time.perf_counter() - begin
            with self._lock:
                self.stats.fetch_s += took
                self.stats.decode_s -= took
                self._fetching -= 1
                self._reading -= 1
        self._arrive(group, found)

    def _fetched(self, group: list[Request], begin: float, future: Future[list[Fetched]]) -> None:
        """Pass the bytes on to the workers. The thread that read them calls this."""
        with self._lock:
            self.stats.fetch_s += time.perf_counter() - begin
            self._fetching -= 1
            try:
                self._arrived.append((group, future.result()))
                self._call_workers()
            except BaseException as error:  # the read was cancelled, or no thread can be started
                self._fail(error)
            self._caller.notify()

    def _arrive(self, group: list[Request], found: Sequence[Fetched]) -> None:
        """Verify the bytes of requests, and queue the tensors that are complete."""
        for request, data in zip(group, found, strict=True):
            if self._error is None:
                try:
                    self._take(request, data)
                except BaseException as error:
                    self._fail(error)
            elif not isinstance(data, StoreError):
                self._fetcher.release(memoryview(data))

    def _take(self, request: Request, found: Fetched) -> None:
        name = self._index.objects[request.object][0]
        where = f"bytes [{request.start}, {request.stop}) of object {name!r} in {self._store.location}"
        tensor = request.parts[0][0].tensor
        try:
            if isinstance(found, StoreError):
                raise found
            data, damages = self._checked(request, memoryview(found), name)
        except ObjectNotFoundError as error:
            raise self._damage(tensor, f"object {name!r} is missing in {self._store.location}") from error
        except StoreError as error:
            raise self._failure(nearest(error), tensor, f"{where}: {error}") from error
        except CheckpointError:
            raise
        except Exception as error:  # raised by a store that is not part of reshard, when a read was repeated
            raise self._failure(StoreError, tensor, f"{where}: {type(error).__name__}: {error}") from harmless(error)
        if len(data) != request.nbytes:
            raise self._damage(tensor, f"only {len(data)} bytes are left of {where}: the object was cut short")
        if damages:
            where = f"{damages[0]} of object {name!r} in {self._store.location}"
            raise self._damage(damages[0].tensor, f"{where}: {DAMAGED}")
        with self._lock:
            if self._error is not None:
                self._fetcher.release(data)
                return
            request.data = data
            for batch, _ in request.parts:
                batch.tensor.missing -= 1
                if batch.tensor.missing == 0:
                    self._place_later(batch.tensor.batches)
                elif batch.tensor.piecemeal:
                    self._place_later([batch])

    def _checked(self, request: Request, data: memoryview, name: str) -> tuple[memoryview, list[ChunkRange]]:
        """Return the bytes of a request and the damaged chunks.

        If a chunk is damaged, the request is read once more, because the damage may have happened in transit.
        """
        damages = request.damages(data, self._index)
        if damages:
            self._fetcher.release(data)
            with self._lock:
                self._reading += 1
                self._caller.notify()
            try:
                data = memoryview(read_ranges(self._store, name, request.ranges))
            finally:
                with self._lock:
                    self._reading -= 1
            damages = request.damages(data, self._index)
        return data, damages

    def _damage(self, tensor: TensorRead, message: str) -> Exception:
        return self._failure(CorruptCheckpointError, tensor, message)

    def _failure(self, kind: type[Exception], tensor: TensorRead, message: str) -> Exception:
        """Return an error that names a tensor. `run` adds whether a part of it was overwritten."""
        error = kind(f"{tensor.name!r}: {message}")
        self._failed_at[error] = tensor
        return error

    def _place_incomplete_tensors(self) -> None:
        """Free memory: write the chunks of incomplete tensors that have arrived. The caller holds the lock."""
        for tensor in self._tensors:
            if tensor.missing and any(batch.has_arrived for batch in tensor.batches):
                tensor.piecemeal = True
                self._place_later(tensor.batches)

    def _place_later(self, batches: list[ChunkBatch]) -> None:
        """Queue the batches that have arrived. The caller holds the lock."""
        for batch in batches:
            if batch.has_arrived and not batch.submitted:
                batch.submitted = True
                self._verified.append(batch)
        self._call_workers()

    def _place(self, batch: ChunkBatch) -> None:
        try:
            self._write(batch)
        except CheckpointError:
            raise
        except Exception as error:  # raised by torch or by the device
            raise self._failure(RankError, batch.tensor, f"{type(error).__name__}: {error}") from harmless(error)
        with self._lock:
            for request in batch.requests:
                request.unplaced -= 1
                if request.unplaced == 0:
                    assert request.data is not None
                    self._fetcher.release(request.data)
                    request.data = None
                    self._held -= request.nbytes
                    self._placed(request.nbytes)

    def _write(self, batch: ChunkBatch) -> None:
        """Write the values of a batch. The last batch of a tensor also completes its destination."""
        tensor, destination = batch.tensor, batch.destination
        assert destination is not None
        destination.begin(whole=not tensor.piecemeal, max_bytes=self._budget // 4)
        place_chunk_batch(batch, self._damage)
        with self._lock:
            tensor.unplaced -= 1
            complete = tensor.unplaced == 0
        if complete:
            for destination in {id(batch.destination): batch.destination for batch in tensor.batches}.values():
                assert destination is not None
                destination.finish()


def _destination(read: ChunkReads, tensor: torch.Tensor) -> Destination:
    return Destination(tensor, torch.bfloat16 if read.heads_only else torch_dtype(read.entry.dtype))
