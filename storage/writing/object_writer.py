"""Writes shards to data objects: cuts them into chunks, encodes these on all cores, and writes them in order.

If the store accepts a stream, a rank writes one object, or a few if it has many cores. If the store holds each object
in memory until it is complete, a rank writes several objects concurrently. A pool of threads encodes the chunks, at
most a window ahead of the writer. So a slow store also slows down the encoding, and memory does not grow with the size
of a tensor or shard. The result consists of records, from which the manifest is made.
"""

from __future__ import annotations

import functools
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.profiler import record_function
from typing_extensions import Buffer

from ...planner.box import Box, box_slices
from ...planner.entries import Encoding, Entry, Stream
from ...planner.grid import EIGHTHS, Grid
from ..errors import StoreError
from ..formats.native.chunk_runs import MAX_CHUNK_RUN_BYTES, Slices, continued_dims, group_into_runs, run_sizes
from ..formats.native.codec import encode, streams_of
from ..formats.native.manifest import DATA_FOLDER, DATA_SUFFIX
from ..formats.native.write_records import ObjectRecord, SegmentRecord, ShardRecord
from ..runtime.checksums import checksum, raw_checksums
from ..runtime.devices import DeviceWaits
from ..runtime.limits import budget_of, default_threads
from ..runtime.logs import logger_of
from ..runtime.process_group import CHECK_EVERY_S, Interrupt, never
from ..runtime.threads import Pool
from ..stores.base import Store
from ..stores.retry import discard, retried
from ..tensors.dtypes import as_bytes, dtype_name
from ..tensors.splitting import group_by_bytes
from .object_layout import CONCURRENT_OBJECTS, MAX_SHARD_GROUP_BYTES, MIN_EIGHTH_BYTES, ShardToWrite, in_objects
from .staging import as_host_array

logger = logger_of(__name__)

OBJECT_MAGIC = b"RESHARDD"
MAX_WINDOW_BYTES = 16 * 1024 * 1024
"""The most bytes of values that are being encoded, or wait to be written, for one object."""
RUN_GROUP_BYTES = 1024 * 1024
"""The bytes of values of the groups of chunk runs that a large shard is cut into. A group ends with the run that
reaches this size."""
MIN_TASK_BYTES = 128 * 1024
"""Smaller groups are given to a thread as one task, until they reach this size. Each task has an overhead of about
0.1 ms, the time to encode 64 KiB of values."""
THREADS_PER_STREAM = 4
"""The number of encoding threads for each stream. On tmpfs, writing 1 GiB runs at 2.9 to 3.3 GB/s with one thread and
one file, and at 4.1 to 4.6 GB/s with two (two cores of an AMD EPYC)."""
MAX_STREAMS = 4
LET_END_S = 2.0
"""How long a failed save waits for objects that are being written, to remove them."""

Encoded = tuple[Buffer, list[int], list[int]]
"""The bytes of one or more chunks, one after another, the length of each chunk, and their checksums."""
_Run = tuple[Slices, list[int], int, int]
"""A chunk run: its position in the shard, the sizes of each chunk, their number, and the dimension of the run."""


@dataclass(slots=True)
class _SegmentOutput:
    """What has been written of a segment."""

    stream: Stream
    start: int = -1
    lengths: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)

    def add(self, at: int, lengths: list[int], checksums: list[int]) -> None:
        if not self.lengths:
            self.start = at
        self.lengths += lengths
        self.checksums += checksums

    def record(self, codec: str) -> SegmentRecord:
        encoding = Encoding.RAW if codec == "none" else Encoding.PLANES
        lengths, checksums = np.array(self.lengths, "<u4"), np.array(self.checksums, "<u8")
        return SegmentRecord(int(self.stream), int(encoding), self.start, lengths.tobytes(), checksums.tobytes())


@dataclass(frozen=True, slots=True)
class _UnfinishedShard:
    """A shard whose segments are being written."""

    shard: ShardToWrite
    dtype: str
    grid: Grid
    codec: str
    segments: list[_SegmentOutput]
    chunks: int

    def record(self) -> ShardRecord:
        shard = self.shard
        segments = tuple(segment.record(self.codec) for segment in self.segments)
        return ShardRecord(shard.name, int(shard.kind), self.dtype, self.grid, shard.box, segments)


@dataclass(frozen=True, slots=True)
class _SegmentInput:
    """The values of one segment: one stream of a shard, or of the part of a shard in one eighth of its tensor."""

    eighth: int
    values: npt.NDArray[Any]
    entry: Entry
    codec: str
    output: _SegmentOutput
    streams: int
    """The number of streams that the values are stored in."""
    run_groups: list[_RunGroup]


@dataclass(frozen=True, slots=True)
class _RunGroup:
    """Chunk runs of a segment that are encoded by one thread."""

    runs: list[_Run]
    nbytes: int
    """Bytes of their values."""


@dataclass(frozen=True, slots=True)
class _EncodingTask:
    """Chunk runs of one or more segments that a thread encodes."""

    inputs: list[tuple[_SegmentInput, _RunGroup]]
    nbytes: int
    """Bytes of values that stay in memory for it."""

    @property
    def written_nbytes(self) -> int:
        """Bytes of values that count as written with it. If a shard has heads and tails, each counts half."""
        return sum(group.nbytes // segment.streams for segment, group in self.inputs)

    def encode(self) -> list[list[Encoded]]:
        """Return the chunks of each input."""
        return [_encode_runs(segment, group.runs) for segment, group in self.inputs]


def write_objects(
    store: Store,
    label: str,
    shards: Sequence[ShardToWrite],
    codec: str,
    *,
    budget_bytes: int | None = None,
    interrupt: Interrupt = never,
    failed: Callable[[BaseException], None] = lambda error: None,
    wrote: Callable[[int], None] = lambda nbytes: None,
) -> list[ObjectRecord]:
    """Write shards to new data objects of a store. If all shards are empty, no object is written.

    The objects have unique names, so that no existing object changes. If the store fails with a temporary error, the
    object is written again under another name. If the call fails, the objects that it wrote are removed.

    Args:
        label: the end of the object names, usually the rank.
        budget_bytes: memory for values that wait to be written. `default_budget()` by default.
        interrupt: called regularly by this thread. If it raises an error, the writing stops with this error.
        failed: called with the first error, before any object is removed.
        wrote: called by any thread, with the bytes of values that the store has accepted. If an object has to be
            written again, it is called with the negative number.

    Returns:
        A record for each object.

    Raises:
        StoreError: the store failed.
        DtypeError: a dtype cannot be stored.
        ShapeMismatchError: `load` returned values of another shape or dtype.
    """
    budget = budget_of(budget_bytes)
    streams = min(MAX_STREAMS, max(1, default_threads() // THREADS_PER_STREAM))
    streams = 0 if store.capabilities.buffers_objects else streams
    groups = in_objects([shard for shard in shards if shard.box.numel > 0], codec, budget, streams=streams)
    stopped = threading.Event()
    with Pool(default_threads(), "reshard-encode") as encoders:
        writing = Pool(CONCURRENT_OBJECTS, "reshard-write")
        save = _Save(store, label, codec, budget, encoders, stopped, wrote, DeviceWaits())
        futures = [writing.submit(retried, partial(save.write, group)) for group in groups]
        try:
            pending = set(futures)
            while pending:
                done, pending = wait(pending, CHECK_EVERY_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                interrupt()
            return [future.result() for future in futures]
        except BaseException as error:
            stopped.set()
            failed(error)
            writing.abandon()
            ended, _ = wait([future for future in futures if not future.cancelled()], LET_END_S)
            written = [future.result().name for future in ended if future.exception() is None]
            discard(store, written)
            raise
        finally:
            writing.shutdown(wait=False)


@dataclass(frozen=True, slots=True, eq=False)
class _Save:
    """What the objects of one save have in common. They share one pool of threads for encoding."""

    store: Store
    label: str
    codec: str
    budget_bytes: int
    encoders: Executor
    stopped: threading.Event
    """Set when the save has failed."""
    wrote: Callable[[int], None]
    devices: DeviceWaits

    @property
    def window_bytes(self) -> int:
        """The most bytes of values that are being encoded, or wait to be written, for one object.

        The encoded bytes need as much again.
        """
        return min(MAX_WINDOW_BYTES, self.budget_bytes // (2 * CONCURRENT_OBJECTS))

    @property
    def group_bytes(self) -> int:
        """The most bytes of shards that are stored as one group."""
        buffers = self.store.capabilities.buffers_objects
        return min(MAX_SHARD_GROUP_BYTES, self.budget_bytes // 4) if buffers else 0

    def write(self, shards: Sequence[ShardToWrite]) -> ObjectRecord:
        """Write one object that contains these shards. If this fails, the object is removed."""
        return _ObjectWriter(self, shards).write()


class _ObjectWriter:
    """Writes one object.

    Args:
        save: what all objects have in common.
        shards: what the object contains.
    """

    def __init__(self, save: _Save, shards: Sequence[ShardToWrite]) -> None:
        self._save = save
        self._shards = shards
        self._unfinished: list[_UnfinishedShard] = []
        """The shards, or their eighths, that have been begun."""
        # Object names start with random characters, because stores distribute their load by the start of a key.
        self._record = ObjectRecord(f"{DATA_FOLDER}/{uuid.uuid4().hex}-{save.label}{DATA_SUFFIX}")
        self._reported = 0
        """Bytes of values that have been passed to `wrote`."""

    def write(self) -> ObjectRecord:
        """Write the object, once. If this fails, the object is removed."""
        record, store = self._record, self._save.store
        try:
            with record_function("reshard.write"):
                encode_s, write_s = self._write()
            self._check_wanted()
        except BaseException:
            self._report(0)
            discard(store, [record.name])
            raise
        record.shards = [shard.record() for shard in self._unfinished]
        record.bytes_needed = sum(shard.shard.nbytes for shard in self._unfinished)
        record.chunks = sum(shard.chunks for shard in self._unfinished)
        record.seconds = {"encode": encode_s, "write": write_s}
        self._report(record.bytes_needed)
        logger.debug("wrote %s to %s: %d bytes", record.name, store.location, record.nbytes)
        return record

    def _write(self) -> tuple[float, float]:
        """Write the bytes. Return the seconds of waiting for the encoding and for the store."""
        record, store = self._record, self._save.store
        encode_s = write_s = 0.0
        with store.create(record.name) as out:
            out.write(OBJECT_MAGIC)
            record.nbytes = len(OBJECT_MAGIC)
            clock = time.perf_counter()
            for task, future in self._encoded_tasks():
                encoded = future.result()
                encoded_at = time.perf_counter()
                for (segment, _), chunks in zip(task.inputs, encoded, strict=True):
                    for data, lengths, checksums in chunks:
                        out.write(data)
                        segment.output.add(record.nbytes, lengths, checksums)
                        record.nbytes += sum(lengths)
                if not store.capabilities.buffers_objects:
                    self._report(self._reported + task.written_nbytes)
                encode_s += encoded_at - clock
                clock = time.perf_counter()
                write_s += clock - encoded_at
        return encode_s, write_s + time.perf_counter() - clock

    def _report(self, nbytes: int) -> None:
        """Report how many bytes of values the store has accepted for this object, in total."""
        self._save.wrote(nbytes - self._reported)
        self._reported = nbytes

    def _check_wanted(self) -> None:
        if self._save.stopped.is_set():
            raise StoreError("the save was stopped")

    def _encoded_tasks(self) -> Iterator[tuple[_EncodingTask, Future[list[list[Encoded]]]]]:
        """Yield tasks in the order in which their chunks are stored. The pool encodes at most a window ahead."""
        waiting: deque[tuple[_EncodingTask, Future[list[list[Encoded]]]]] = deque()
        held = 0
        try:
            for task in self._tasks():
                self._check_wanted()
                while waiting and held + task.nbytes > self._save.window_bytes:
                    held -= waiting[0][0].nbytes
                    yield waiting.popleft()
                waiting.append((task, self._save.encoders.submit(task.encode)))
                held += task.nbytes
            while waiting:
                yield waiting.popleft()
        finally:
            for _, future in waiting:
                future.cancel()

    def _tasks(self) -> Iterator[_EncodingTask]:
        inputs, held = list[tuple[_SegmentInput, _RunGroup]](), 0
        for together in group_by_bytes(self._shards, self._save.group_bytes):
            for segment in self._segments(together):
                for group in segment.run_groups:
                    inputs.append((segment, group))
                    held += group.nbytes
                    if held >= MIN_TASK_BYTES:
                        yield _EncodingTask(inputs, held)
                        inputs, held = [], 0
        if inputs:
            yield _EncodingTask(inputs, held)

    def _segments(self, together: Sequence[ShardToWrite]) -> list[_SegmentInput]:
        """Return the segments of a group of shards in the order in which they are stored.

        Heads come before tails. Each of them is sorted by eighths.
        """
        segments: list[_SegmentInput] = []
        for shard in together:
            values = shard.load(shard.box)
            dtype = dtype_name(shard.name, values.dtype)
            grid = shard.grid(self._save.codec)
            entry = Entry(shard.name, shard.kind, dtype, grid)
            codec = shard.codec(self._save.codec)
            streams = streams_of(dtype, codec)
            self._save.devices.wait(values.device)  # another stream may still write the values
            array = as_host_array(values)
            eighths = grid.eighths(shard.box)
            is_split = len(together) > 1 and values.nbytes >= EIGHTHS * MIN_EIGHTH_BYTES
            for eighth, box in eighths if is_split else [(eighths[0][0], shard.box)]:
                chunks, run_groups = _cut_into_run_groups(grid, box, values.itemsize)
                outputs = [_SegmentOutput(stream) for stream in streams]
                piece = replace(shard, box=box) if is_split else shard
                self._unfinished.append(_UnfinishedShard(piece, dtype, grid, codec, outputs, chunks))
                inside = array[box.relative_to(shard.box).slices] if is_split else array
                segments += [
                    _SegmentInput(eighth, inside, entry, codec, output, len(streams), run_groups) for output in outputs
                ]
        return sorted(segments, key=lambda segment: (segment.output.stream is Stream.TAIL, segment.eighth))


@functools.lru_cache(maxsize=64)
def _cut_into_run_groups(grid: Grid, box: Box, itemsize: int) -> tuple[int, list[_RunGroup]]:
    """Return the number of a shard's chunks, and its chunk runs in groups of RUN_GROUP_BYTES.

    The result is cached because the layers of a model are cut in the same way.
    """
    _, offsets, sizes = grid.chunks(box)
    chunk_bytes = sizes.prod(axis=1) * itemsize
    firsts, counts, dims = group_into_runs(
        continued_dims(offsets, sizes), np.maximum(1, MAX_CHUNK_RUN_BYTES // chunk_bytes)
    )
    starts = offsets[firsts] - np.asarray(box.offsets, np.int64)
    places = box_slices(starts, run_sizes(sizes[firsts], counts, dims))
    runs = list(zip(places, sizes[firsts].tolist(), counts.tolist(), dims.tolist(), strict=True))
    run_bytes = chunk_bytes[firsts] * counts
    ends = (np.flatnonzero(np.diff(np.cumsum(run_bytes) // RUN_GROUP_BYTES)) + 1).tolist()
    bounds = pairwise([0, *ends, len(runs)])
    return len(offsets), [_RunGroup(runs[begin:end], int(run_bytes[begin:end].sum())) for begin, end in bounds]


def _encode_runs(segment: _SegmentInput, runs: Sequence[_Run]) -> list[Encoded]:
    """Encode chunk runs of a segment."""
    entry = segment.entry
    page_bytes = entry.page_bytes
    encoded: list[Encoded] = []
    for place, sizes, count, dim in runs:
        # Copy the run so that its chunks follow each other, each row-major.
        split = segment.values[place].reshape(*sizes[:dim], count, *sizes[dim:])
        plain = as_bytes(split.transpose(dim, *(d for d in range(split.ndim) if d != dim)))
        nbytes = len(plain) // count
        if segment.codec == "none":
            checksums: list[int] = []
            for at in range(0, len(plain), nbytes):
                checksums += raw_checksums(plain.data[at : at + nbytes], page_bytes)
            encoded.append((plain.data, [nbytes] * count, checksums))
        else:
            chunks = encode(plain, entry.dtype, segment.output.stream, nbytes // entry.itemsize)
            encoded += [(chunk, [len(chunk)], [checksum(chunk)]) for chunk in chunks]
    return encoded
