"""Executes a read plan: fetches, verifies, decodes and places chunks, all at the same time.

`schedule` decides what to do next; this module does it, with threads. Many requests run concurrently. As many workers
as this rank has cores verify the bytes against their checksums, decode them, and write the values straight into the
destination tensors. A tensor is written only after all its bytes have arrived and been verified, so damage leaves it
unchanged. The bytes that wait for this stay within a budget. When the waiting bytes fill the budget, chunks of
incomplete tensors are written as they arrive: damage that is found later then leaves such a tensor partly overwritten.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch.profiler import record_function

from ...planner.chunk_reads import ChunkReads
from ...planner.errors import CheckpointError
from ...planner.index import CheckpointIndex
from ...planner.masking import harmless
from ...planner.read_plan import ReadPlan
from ..errors import StoreError
from ..runtime.gc_pauses import gc_disabled, gc_less_often
from ..runtime.limits import budget_of
from ..runtime.process_group import CHECK_EVERY_S, Interrupt, never
from ..stores.base import Store
from ..stores.buffer_pool import read_buffers
from ..tensors.dtypes import torch_dtype
from .destination import Destination
from .device.frames import MIN_FRAMES
from .device.placing import MIN_DECOMPRESSED_BYTES, PlacingError, assign_devices, move, place
from .device.ring import Slot
from .fetcher import Fetched, ObjectRanges
from .request_checksums import RequestChecksums
from .schedule import Fetch, Place, Schedule, Verify
from .tasks import ChunkBatch, Request, break_reference_cycles, build_tasks
from .verifier import STOPPED, Verifier, object_of
from .workers import Workers

_Step = Fetch | Verify | Place
MAX_DEVICE_BUDGET_BYTES = 1024 * 1024 * 1024
"""The most bytes that a load into tensors on a device needs there, in addition to the tensors."""


@dataclass(slots=True)
class ReadStats:
    """Seconds that reading took, summed over all requests and all threads."""

    fetch_s: float = 0.0
    verify_s: float = 0.0
    """Computing checksums. If the store reads into memory of the caller, this is a part of `fetch_s`, since it happens
    while the bytes arrive."""
    decode_s: float = 0.0
    copy_s: float = 0.0
    """Starting to copy bytes to devices, and waiting for page-locked memory."""
    decoded_by: dict[str, int] = field(default_factory=dict)
    """See `RankReport`."""

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds by stage. Copies only count if there are any."""
        copied = {"copy": self.copy_s} if self.copy_s else {}
        return {"fetch": self.fetch_s, "verify": self.verify_s, **copied, "decode": self.decode_s}


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
        destinations: one tensor for each of `plan.reads`, with the sizes of its box, on any device. The stored dtype
            can be cast to its dtype. The tensors are written in place.
        budget_bytes: memory for bytes that have been fetched and not been placed yet, on the host and on a device.
            `default_budget()` by default. At most MAX_DEVICE_BUDGET_BYTES are used if a device decodes.
        interrupt: called regularly by this thread. If it raises an error, the read stops with this error.
        placed: called by any thread, with the number of stored bytes of a request whose values have all been placed.
        workers: threads and buffers that are shared with other calls. By default this call creates its own.

    Raises:
        CorruptCheckpointError: bytes are damaged or missing. The tensor that the message names is unchanged, unless
            the message says that a part of it was overwritten.
        StoreError: the store failed.
        RankError: torch or a device failed while values were written.
    """
    if not plan.reads:
        return ReadStats()
    shared = Workers(store) if workers is None else nullcontext(workers)
    with shared as used, read_buffers.reading(), gc_less_often():
        execution = _Execution(plan, index, store, destinations, budget_bytes, used)
        try:
            return execution.run(interrupt, placed)
        finally:
            for device in execution.decompressing:
                with suppress(RuntimeError):  # the interpreter is exiting
                    device.end_read()


class _Execution:
    """Drives the schedule of one plan with the threads of `workers`. `_lock` protects everything that threads share.

    If the store reads into memory of the caller, the workers also fetch, so that the core that read the bytes also
    processes them (`benchmarks/overhead.py`). Otherwise the thread that called `run` starts the fetches.
    """

    def __init__(
        self,
        plan: ReadPlan,
        index: CheckpointIndex,
        store: Store,
        destinations: Sequence[torch.Tensor],
        budget_bytes: int | None,
        workers: Workers,
    ) -> None:
        self._stats = ReadStats()
        self._index = index
        self._verifier = Verifier(index, store)
        self._workers = workers
        self._fetcher = workers.fetcher
        with gc_disabled():
            self._tensors, self._requests = build_tasks(plan, list(map(_destination, plan.reads, destinations)))
        device_budget = MAX_DEVICE_BUDGET_BYTES if budget_bytes is None else min(budget_bytes, MAX_DEVICE_BUDGET_BYTES)
        # Of 1 GiB: 600 frames of exponents. nvCOMP needs scratch memory of three times their size in addition.
        self._max_decompressed_bytes = device_budget // 8
        batches = [batch for tensor in self._tensors for batch in tensor.batches]
        may_decompress = self._max_decompressed_bytes >= MIN_DECOMPRESSED_BYTES
        self._stats.decoded_by = assign_devices(batches, may_decompress=may_decompress)
        self.decompressing = {batch.device for batch in batches if batch.frames and batch.device is not None}
        """The devices that decompress frames."""
        budget = budget_of(budget_bytes)
        if self._stats.decoded_by:
            on_host = any(request.on_host for request in self._requests)
            waiting = device_budget * 5 // 16 if self.decompressing else device_budget // 2
            budget = min(waiting, budget) if on_host else waiting
        self._schedule = Schedule(
            self._tensors,
            self._requests,
            budget_bytes=budget,
            group_bytes=self._fetcher.group_bytes,
            max_fetches=self._fetcher.max_requests,
            min_frames=MIN_FRAMES,
        )
        self._lock = threading.RLock()
        """Reentrant: if a read has already ended, `add_done_callback` runs the callback in the thread that holds the
        lock."""
        self._caller = threading.Condition(self._lock)
        """Notifies the thread that called `run`."""
        self._active = 0
        """The number of workers that have been started and have not ended."""
        self._placing = 0
        """The number of workers that write to destinations."""
        self._error: BaseException | None = None
        self._placed: Callable[[int], None] = lambda nbytes: None

    def run(self, interrupt: Interrupt, placed: Callable[[int], None]) -> ReadStats:
        self._placed = placed
        try:
            with self._lock:
                self._call_workers()
                while self._error is None and not self._schedule.done:
                    step = None if self._fetcher.workers_fetch else self._schedule.fetch()
                    if step is not None:
                        begun = time.perf_counter()
                        (wanted,) = self._wanted(step.requests)
                        self._fetcher.start(wanted, partial(self._fetched, step, begun))
                    else:
                        self._call_workers()
                        self._pause(interrupt)
        except BaseException as error:
            self._fail(error)
        if self._error is not None:
            with self._lock:
                while self._placing:  # what the error says about the tensor must be true when it is raised
                    self._caller.wait()
            for request in self._requests:
                if request.data is not None:
                    read_buffers.release(request.data)
        break_reference_cycles(self._tensors, self._requests)
        if self._error is not None:
            # A reference to the error, whose traceback refers to this object, would keep the tensors in memory.
            failure, self._error = self._error, StoreError(STOPPED)
            self._verifier.add_whether_overwritten(failure)
            try:
                raise failure
            finally:
                del failure
        return self._stats

    def _wanted(self, requests: Sequence[Request]) -> list[ObjectRanges]:
        return [(object_of(request, self._index), request.ranges) for request in requests]

    def _pause(self, interrupt: Interrupt) -> None:
        """Release the lock while waiting, and call `interrupt`. The caller holds the lock."""
        self._caller.wait(CHECK_EVERY_S)
        if self._workers.stopped:  # the steps of this plan may never run
            raise StoreError(STOPPED)
        self._lock.release()
        try:
            interrupt()
        finally:
            self._lock.acquire()

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, (RuntimeError, CancelledError)) and self._workers.stopped:
            error = StoreError(STOPPED)  # the pools accept no more tasks
        with self._lock:
            self._error = self._error or error
            self._caller.notify()

    def _call_workers(self) -> None:
        """Start a worker for each step that can begin, up to the maximum. The caller holds the lock.

        An error ends the read, but is not raised: the caller may have begun a step, which must end.
        """
        if self._active == self._workers.count:
            return
        waiting = self._schedule.work_left + (self._schedule.fetches_left if self._fetcher.workers_fetch else 0)
        for _ in range(min(self._workers.count - self._active, waiting)):
            self._active += 1  # first: if no thread can be started, the pool runs the worker here
            try:
                self._workers.pool.submit(self._work)
            except BaseException as error:
                self._active -= 1
                self._fail(error)
                return

    def _work(self) -> None:
        """Perform steps until there are none. Each worker runs this."""
        step: _Step | None = None
        try:
            with record_function("reshard.decode"):
                while True:
                    with self._lock:
                        if step is not None:
                            self._end(step)
                        step = self._begin()
                        if step is None:
                            return
                        self._call_workers()
                    self._perform(step)
        except BaseException as error:
            self._fail(error)

    def _begin(self) -> _Step | None:
        """Begin the next step of a worker. Return None if there is none. The caller holds the lock."""
        step: _Step | None = None
        if self._error is None and not self._workers.stopped:
            step = self._schedule.work()
            if step is None and self._fetcher.workers_fetch:
                step = self._schedule.fetch() or self._schedule.work()
        if step is None:
            self._active -= 1
        elif isinstance(step, Place):
            self._placing += 1
        return step

    def _perform(self, step: _Step) -> None:
        try:
            if isinstance(step, Fetch):
                self._fetch_here(step)
            elif isinstance(step, Verify):
                self._verify(step)
            else:
                self._place(step.batches)
        except BaseException as error:
            self._fail(error)

    def _end(self, step: _Step) -> None:
        """Record that a step has ended. The caller holds the lock."""
        if isinstance(step, Fetch):
            self._schedule.fetched(step)
        else:
            self._placing -= isinstance(step, Place)
            for request in self._schedule.ended(step):
                self._free(request)
        if self._schedule.done or self._error is not None or not self._fetcher.workers_fetch:
            self._caller.notify()

    def _free(self, request: Request) -> None:
        """Release the bytes of a request whose values have been written. The caller holds the lock."""
        if self._error is None:
            if request.data is not None:
                read_buffers.release(request.data)
                request.data = None
            self._placed(request.nbytes)

    def _fetch_here(self, step: Fetch) -> None:
        """Fetch requests, and compute their checksums while the bytes arrive."""
        with self._lock:
            announced = self._schedule.announcements()
        self._fetcher.will_read(self._wanted(announced))
        for request in step.requests:
            if self._error is not None:
                return
            device = request.device
            if device is None or request.on_host or request.nbytes > device.ring.max_request_bytes:
                self._read(request, None)
            else:
                with device.slot() as slot:
                    self._read(request, slot)

    def _read(self, request: Request, slot: Slot | None) -> None:
        """Fetch a request, into the slot of a ring if only devices need its bytes."""
        begin = time.perf_counter()
        check = RequestChecksums(request, self._index)
        memory = None if slot is None else slot.memory
        found = self._fetcher.read(object_of(request, self._index), request.ranges, check.update, memory)
        self._take(request, found, check, slot, fetch_s=time.perf_counter() - begin)

    def _fetched(self, step: Fetch, begun: float, future: Future[Fetched]) -> None:
        """Pass the bytes on to the workers. The thread that read them calls this."""
        with self._lock:
            self._stats.fetch_s += time.perf_counter() - begun
            try:
                self._schedule.fetched(step, future.result())
                self._call_workers()
            except BaseException as error:  # the read was cancelled, or no thread can be started
                self._fail(error)
            self._caller.notify()

    def _verify(self, step: Verify) -> None:
        if self._error is not None:
            return
        begin = time.perf_counter()
        check = RequestChecksums(step.request, self._index)
        if not isinstance(step.found, StoreError):
            data = memoryview(step.found)
            check.update(data, len(data))
        self._take(step.request, step.found, check, verify_s=time.perf_counter() - begin)

    def _take(
        self,
        request: Request,
        found: Fetched,
        check: RequestChecksums,
        slot: Slot | None = None,
        *,
        fetch_s: float = 0.0,
        verify_s: float = 0.0,
    ) -> None:
        """Accept the bytes of a request if they are intact. Release their buffer otherwise.

        Args:
            slot: the slot of a ring that they were read into.
            fetch_s, verify_s: how long it took to fetch them, and to compute their checksums.
        """
        arrived = found if isinstance(found, StoreError) else memoryview(found)
        kept = False
        try:
            data = self._verifier.intact(request, arrived, check)
            if request.device is not None:
                self._move(request, data, slot)
            with self._lock:
                self._stats.fetch_s += fetch_s
                self._stats.verify_s += verify_s
                if self._error is None:
                    kept = data is arrived and request.on_host
                    self._schedule.verified(request, data if request.on_host else None)
        finally:
            if not isinstance(arrived, StoreError) and not kept:
                read_buffers.release(arrived)

    def _move(self, request: Request, data: memoryview, slot: Slot | None) -> None:
        """Copy the bytes of a request to the devices that decode them."""
        begin = time.perf_counter()
        tensor = request.parts[0][0].tensor
        if slot is not None and not slot.contains(data):  # they were read again
            slot.memory[: len(data)] = np.frombuffer(data, np.uint8)
            data = slot.memory[: len(data)].data
        try:
            move(request, data, slot, self._verifier.make_error)
        except CheckpointError:
            raise
        except Exception as error:  # raised by torch or by the device
            raise self._verifier.device_error(tensor, error) from harmless(error)
        with self._lock:
            self._stats.copy_s += time.perf_counter() - begin

    def _place(self, batches: Sequence[ChunkBatch]) -> None:
        """Write the values of batches."""
        begin = time.perf_counter()
        try:
            place(batches, self._verifier.make_error, self._max_decompressed_bytes)
        except CheckpointError:
            raise
        except PlacingError as failed:
            error = failed.__cause__
            assert error is not None
            raise self._verifier.device_error(failed.tensor, error) from harmless(error)
        with self._lock:
            self._stats.decode_s += time.perf_counter() - begin


def _destination(read: ChunkReads, tensor: torch.Tensor) -> Destination:
    return Destination(tensor, torch.bfloat16 if read.heads_only else torch_dtype(read.entry.dtype))
