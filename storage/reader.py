"""A read plan carried out: fetch, verify, decode, place, each overlapping the others.

Many requests are under way at once; what arrives is verified against its checksums, decoded and placed, straight into
the destination tensors, by a pool of as many threads as this rank has cores. A tensor is written only once all its
bytes have arrived and been verified, so that damage leaves it as it was; what waits for that is held within a budget.
A tensor that is larger than the budget is written as its chunks arrive.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import numpy as np
import torch
from torch.profiler import record_function

from ..planner.box import indexes
from ..planner.index import CheckpointIndex, Encoding
from ..planner.read_plan import ChunkReads, ReadPlan
from .arranged import DAMAGED, Batch, ByteRange, Request, Tensor, arrange
from .codec import Bytes, decode, decode_heads, decode_heads_and_tails
from .errors import CorruptCheckpointError, ObjectNotFoundError, StoreError, nearest
from .fetch import Fetcher, Found, read_ranges
from .opaque import decode_opaque
from .place import Destination
from .ranks import HEED_S, Interrupt, never
from .resources import default_budget, default_threads
from .store import Store
from .tensors import torch_dtype


@dataclass(slots=True)
class ReadStats:
    """What reading took. Seconds are summed over the requests, and over the threads."""

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
    """Carry out a plan: fill each destination with the box that was wanted in its place.

    Args:
        destinations: one tensor for each of `plan.reads`, of its box's sizes, on any device, of a dtype that the
            stored one can be cast to. Written in place.
        budget_bytes: of what was fetched and is not placed yet; `default_budget()` by default.
        interrupt: called now and then, by this thread; what it raises stops the reading.
        placed: called with the stored bytes of a request once all its values are where they belong, by any thread.
        workers: threads and memory that other calls use too; some of its own by default.

    Raises:
        CorruptCheckpointError: bytes are damaged or missing. The tensor that it names is as it was, unless the
            message says that a part of it was overwritten.
        StoreError: the store failed.
    """
    budget = default_budget() if budget_bytes is None else budget_bytes
    execution = _Execution(plan, index, store, destinations, budget, interrupt, placed)
    if workers is not None:
        execution.run(workers)
    else:
        with Workers(store) as own:
            execution.run(own)
    return execution.stats


class Workers(AbstractContextManager["Workers"]):
    """The threads that fetch from a store, those that decode and place, and the memory that is fetched into."""

    def __init__(self, store: Store) -> None:
        self.placing = ThreadPoolExecutor(default_threads(), "reshard-place")
        self.fetcher = Fetcher(store)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.fetcher.__exit__(kind, error, traceback)
        self.placing.shutdown()


class _Execution:
    """The state of one plan while it is carried out; `_lock` guards all that the threads share."""

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
        self._lock = threading.Condition()
        self._held = 0
        self._fetching = 0
        self._working = 0
        self._error: BaseException | None = None

    def run(self, workers: Workers) -> None:
        self._pool, self._fetcher = workers.placing, workers.fetcher
        try:
            for together in self._grouped(self._fetcher.together_bytes):
                self._admit(together)
                if self._error is not None:
                    break
                names = (self._index.objects[request.object][0] for request in together)
                wanted = [(name, request.ranges) for name, request in zip(names, together, strict=True)]
                self._fetcher.start(wanted, partial(self._fetched, together, time.perf_counter()))
            with self._lock:
                self._wait_until(lambda: self._fetching == 0 and self._working == 0)
        except BaseException as error:
            self._fail(error)
        if self._error is not None:
            raise self._error

    def _grouped(self, together_bytes: int) -> Iterator[list[Request]]:
        """The requests, some of them together."""
        group: list[Request] = []
        nbytes = 0
        for request in self._requests:
            group.append(request)
            nbytes += request.nbytes
            if nbytes >= min(together_bytes, self._budget // 4):
                yield group
                group, nbytes = [], 0
        if group:
            yield group

    def _admit(self, requests: list[Request]) -> None:
        """Wait until the store takes more, and the budget has room for it."""
        nbytes = sum(request.nbytes for request in requests)
        with self._lock:
            self._wait_until(lambda: self._fetching < self._store.concurrent_reads)
            while self._error is None and self._held and self._held + nbytes > self._budget:
                if self._fetching == 0 and self._working == 0:
                    self._place_what_is_here()
                    if self._working == 0:
                        break  # nothing can make room: one oversize request passes alone
                self._pause()
            self._fetching += 1
            self._held += nbytes

    def _wait_until(self, ended: Callable[[], bool]) -> None:
        """Wait for a condition, or for an error. Holds the lock."""
        while self._error is None and not ended():
            self._pause()

    def _pause(self) -> None:
        """Let others have the lock, and ask whether this is still wanted. Holds the lock, before and after."""
        self._lock.wait(HEED_S)
        self._lock.release()
        try:
            self._interrupt()
        finally:
            self._lock.acquire()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            self._lock.notify_all()

    def _fetched(self, requests: list[Request], begun: float, future: Future[list[Found]]) -> None:
        """Hand what was read to the pool. Called by the thread that read it."""
        with self._lock:
            self.stats.fetch_s += time.perf_counter() - begun
            self._fetching -= 1
            if self._error is None:
                self._submit(partial(self._arrive, requests, future))
            self._lock.notify_all()

    def _submit(self, task: Callable[[], None]) -> None:
        """Have the pool do something. Holds the lock."""
        try:
            self._pool.submit(self._guarded, task)
            self._working += 1
        except BaseException as error:  # no further thread can be started
            self._error = self._error or error

    def _guarded(self, task: Callable[[], None]) -> None:
        begin = time.perf_counter()
        try:
            if self._error is None:
                with record_function("reshard.decode"):
                    task()
        except BaseException as error:
            self._fail(error)
        with self._lock:
            self.stats.decode_s += time.perf_counter() - begin
            self._working -= 1
            self._lock.notify_all()

    def _arrive(self, requests: list[Request], future: Future[list[Found]]) -> None:
        """Verify what was read, and place what is complete by it."""
        for request, found in zip(requests, future.result(), strict=True):
            if self._error is None:
                self._take(request, found)

    def _take(self, request: Request, found: Found) -> None:
        name = self._index.objects[request.object][0]
        where = f"bytes [{request.start}, {request.stop}) of object {name!r} in {self._store.location}"
        tensor = request.parts[0][0].tensor
        try:
            if isinstance(found, StoreError):
                raise found
            data, damages = self._verified(request, memoryview(found), name)
        except ObjectNotFoundError as error:
            raise self._damage(tensor, f"object {name!r} is missing in {self._store.location}") from error
        except StoreError as error:
            raise nearest(error)(self._told(tensor, f"{where}: {error}")) from error
        if len(data) != request.nbytes:
            raise self._damage(tensor, f"only {len(data)} bytes are left of {where}: the object was cut short")
        if damages:
            where = f"{damages[0]} of object {name!r} in {self._store.location}"
            raise self._damage(damages[0].tensor, f"{where}: {DAMAGED}")
        with self._lock:
            request.data = data
            for batch, _ in request.parts:
                batch.tensor.missing -= 1
                if batch.tensor.missing == 0:
                    self._place_later(batch.tensor.batches)
                elif batch.tensor.piecemeal:
                    self._place_later([batch])

    def _verified(self, request: Request, data: memoryview, name: str) -> tuple[memoryview, list[ByteRange]]:
        """The request's bytes, and what of them is damaged; read again if any is, in case that happened on the way."""
        damages = request.damages(data, self._index)
        if damages:
            data = memoryview(read_ranges(self._store, name, request.ranges))
            damages = request.damages(data, self._index)
        return data, damages

    def _damage(self, tensor: Tensor, message: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(self._told(tensor, message))

    def _told(self, tensor: Tensor, message: str) -> str:
        touched = tensor.touched or tensor.piecemeal
        return f"{tensor.name!r}: {message}" + ("; a part of the tensor was overwritten" if touched else "")

    def _place_what_is_here(self) -> None:
        """Make room: write what is complete of tensors that are not. Holds the lock."""
        for tensor in self._tensors:
            if tensor.missing and any(batch.is_here for batch in tensor.batches):
                tensor.piecemeal = True
                self._place_later(tensor.batches)

    def _place_later(self, batches: list[Batch]) -> None:
        """Have the pool place those batches that are here. Holds the lock."""
        for batch in batches:
            if batch.is_here and not batch.submitted:
                batch.submitted = True
                self._submit(partial(self._place, batch))

    def _place(self, batch: Batch) -> None:
        tensor, destination = batch.tensor, batch.destination
        assert destination is not None
        destination.begin(whole=not tensor.piecemeal, most_bytes=self._budget // 4)
        _place_batch(batch, self._damage)
        with self._lock:
            tensor.unplaced -= 1
            complete = tensor.unplaced == 0
        if complete:
            for destination in {id(batch.destination): batch.destination for batch in tensor.batches}.values():
                assert destination is not None
                destination.finish()
        with self._lock:
            for request in batch.requests:
                request.unplaced -= 1
                if request.unplaced == 0:
                    assert request.data is not None
                    self._fetcher.release(request.data)
                    request.data = None
                    self._held -= request.nbytes
                    self._placed(request.nbytes)


def _place_batch(batch: Batch, damage: Callable[[Tensor, str], CorruptCheckpointError]) -> None:
    """Decode the batch's chunks and write them where they belong."""
    read, rows, destination = batch.read, batch.rows, batch.destination
    assert destination is not None
    origin = np.asarray(read.want.box.offsets, np.int64)
    places = indexes(read.piece_offsets[rows] - origin, read.piece_sizes[rows])
    parts = indexes(read.piece_offsets[rows] - read.chunk_offsets[rows], read.piece_sizes[rows])
    shapes = list(map(tuple, read.chunk_sizes[rows].tolist()))
    counts = read.chunk_sizes[rows].prod(axis=1).tolist()
    encodings, skipped = read.encodings[rows].tolist(), read.skipped[rows].tolist()
    packed = read.packed_bytes(rows)
    streams = []
    for stream, request in enumerate(batch.requests):
        assert request.data is not None
        begins = read.starts[rows, stream] - request.start
        ends, begins = (begins + packed[:, stream]).tolist(), begins.tolist()
        streams.append([request.data[begin:end] for begin, end in zip(begins, ends, strict=True)])
    for i, data in enumerate(zip(*streams, strict=True)):
        try:
            values = _values(read, rows.start + i, encodings[i], data, counts[i], skipped[i])
        except CorruptCheckpointError as error:
            raise damage(batch.tensor, f"chunk {batch.chunk_box(i)} cannot be decoded: {error}") from error
        batch.tensor.touched = True
        destination.write(places[i], values, shapes[i], parts[i])


def _values(read: ChunkReads, row: int, encoding: int, data: tuple[memoryview, ...], numel: int, skipped: int) -> Bytes:
    """The bytes of a chunk's values, row-major."""
    if encoding == Encoding.PLANES:
        return _decoded(read, data, numel)
    if encoding == Encoding.RAW:
        return _raw(data[0], numel * read.itemsize, skipped)
    if encoding == Encoding.OPAQUE:
        return decode_opaque(data[0], read.entry.dtype, tuple(read.chunk_sizes[row].tolist()))
    return _plain(read, row, np.frombuffer(data[0], np.uint8))


def _plain(read: ChunkReads, row: int, values: Bytes) -> Bytes:
    """The bytes of a slab's values, from its runs and what lies between them where that was read."""
    assert read.runs is not None
    nbytes, runs = int(read.runs.nbytes[row]), int(read.runs.counts[row])
    if len(values) != runs * nbytes:
        strides = (int(read.runs.strides[row]), 1)
        values = np.lib.stride_tricks.as_strided(values, (runs, nbytes), strides, writeable=False).reshape(-1)
    if (order := read.entry.order) is None:
        return values
    sizes = read.chunk_sizes[row][list(order)].tolist()
    back = [order.index(d) for d in range(len(order))]
    return np.ascontiguousarray(values.reshape(*sizes, read.itemsize).transpose(*back, len(order))).reshape(-1)


def _raw(data: memoryview, nbytes: int, skipped: int) -> Bytes:
    """The bytes of a raw chunk's values; where it was read in part, only that part is set."""
    values = np.frombuffer(data, np.uint8)
    if len(values) == nbytes:
        return values
    whole = np.empty(nbytes, np.uint8)
    whole[skipped : skipped + len(values)] = values
    return whole


def _decoded(read: ChunkReads, data: tuple[memoryview, ...], numel: int) -> Bytes:
    """The bytes of an encoded chunk's values, from its one stream or two."""
    if len(data) == 2:
        return decode_heads_and_tails(data[0], data[1], numel)
    return decode_heads(data[0], numel) if read.heads_only else decode(data[0], read.entry.dtype, numel)


def _destination(read: ChunkReads, tensor: torch.Tensor) -> Destination:
    return Destination(tensor, torch.bfloat16 if read.heads_only else torch_dtype(read.entry.dtype))
