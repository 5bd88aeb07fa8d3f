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
from ..runtime.devices import synchronize
from ..runtime.limits import default_budget, default_threads
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
TASK_BYTES = 1024 * 1024
"""The bytes of values of the tasks that a large shard is cut into. A task ends with the chunk run that reaches this
size."""
MIN_TASK_BYTES = 128 * 1024
"""Smaller tasks are given to a thread together, until they reach this size. Each task has an overhead of about 0.1 ms,
the time to encode 64 KiB of values."""
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
class _UnfinishedSegment:
    """A segment whose chunks are being written."""

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

    source: ShardToWrite
    dtype: str
    grid: Grid
    codec: str
    segments: list[_UnfinishedSegment]
    chunks: int

    def record(self) -> ShardRecord:
        source = self.source
        segments = tuple(segment.record(self.codec) for segment in self.segments)
        return ShardRecord(source.name, int(source.kind), self.dtype, self.grid, source.box, segments)


@dataclass(frozen=True, slots=True)
class _SegmentInput:
    """The values of one segment: one stream of a shard, or of the part of a shard in one eighth of its tensor."""

    eighth: int
    values: npt.NDArray[Any]
    entry: Entry
    codec: str
    segment: _UnfinishedSegment
    streams: int
    """The number of streams that the values are stored in."""
    tasks: list[tuple[list[_Run], int]]
    """As in `_SegmentTasks`."""


_TaskPart = tuple[_SegmentInput, list[_Run], int]
"""Chunk runs of one segment, and the bytes of their values."""


@dataclass(frozen=True, slots=True)
class _EncodingTask:
    """Chunk runs of one or more segments that a thread encodes."""

    parts: list[_TaskPart]
    nbytes: int
    """Bytes of values that stay in memory for it."""
    encoded: Future[list[list[Encoded]]]
    """The chunks of each part."""

    @property
    def written_nbytes(self) -> int:
        """Bytes of values that count as written with it. If a shard has heads and tails, each counts half."""
        return sum(nbytes // part.streams for part, _, nbytes in self.parts)


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
    budget = default_budget() if budget_bytes is None else budget_bytes
    streams = min(MAX_STREAMS, max(1, default_threads() // THREADS_PER_STREAM))
    streams = 0 if store.capabilities.buffers_objects else streams
    groups = in_objects([shard for shard in shards if shard.box.numel > 0], codec, budget, streams=streams)
    stopped = threading.Event()
    with Pool(default_threads(), "reshard-encode") as encoding:
        writing = Pool(CONCURRENT_OBJECTS, "reshard-write")
        writer = _ObjectWriter(store, label, codec, budget, encoding, stopped, wrote)
        futures = [writing.submit(retried, partial(writer.write, group)) for group in groups]
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


class _ObjectWriter:
    """Writes objects, several concurrently, that share one pool of threads for encoding."""

    def __init__(
        self,
        store: Store,
        label: str,
        codec: str,
        budget_bytes: int,
        encoding: Executor,
        stopped: threading.Event,
        wrote: Callable[[int], None],
    ) -> None:
        self._store = store
        self._label = label
        self._codec = codec
        self._window = min(MAX_WINDOW_BYTES, budget_bytes)
        self._buffers_objects = store.capabilities.buffers_objects
        self._together = min(MAX_SHARD_GROUP_BYTES, budget_bytes // 4) if self._buffers_objects else 0
        self._encoding = encoding
        self._stopped = stopped
        """Set when the save has failed."""
        self._wrote = wrote

    def write(self, shards: Sequence[ShardToWrite]) -> ObjectRecord:
        """Write one object that contains these shards. If this fails, the object is removed."""
        # Object names start with random characters, because stores distribute their load by the start of a key.
        record = ObjectRecord(f"{DATA_FOLDER}/{uuid.uuid4().hex}-{self._label}{DATA_SUFFIX}")
        begun: list[_UnfinishedShard] = []
        encode_s = write_s = 0.0
        taken = 0
        try:
            with record_function("reshard.write"), self._store.create(record.name) as out:
                out.write(OBJECT_MAGIC)
                record.nbytes = len(OBJECT_MAGIC)
                clock = time.perf_counter()
                for task in self._encoded(shards, begun):
                    encoded = task.encoded.result()
                    encoded_at = time.perf_counter()
                    for (part, _, _), chunks in zip(task.parts, encoded, strict=True):
                        for data, lengths, checksums in chunks:
                            out.write(data)
                            part.segment.add(record.nbytes, lengths, checksums)
                            record.nbytes += sum(lengths)
                    if not self._buffers_objects:
                        self._wrote(task.written_nbytes)
                        taken += task.written_nbytes
                    encode_s += encoded_at - clock
                    clock = time.perf_counter()
                    write_s += clock - encoded_at
            write_s += time.perf_counter() - clock
            self._check_wanted()
        except BaseException:
            self._wrote(-taken)
            discard(self._store, [record.name])
            raise
        record.shards = [shard.record() for shard in begun]
        record.bytes_needed = sum(shard.source.nbytes for shard in begun)
        record.chunks = sum(shard.chunks for shard in begun)
        record.seconds = {"encode": encode_s, "write": write_s}
        self._wrote(record.bytes_needed - taken)
        logger.debug("wrote %s to %s: %d bytes", record.name, self._store.location, record.nbytes)
        return record

    def _check_wanted(self) -> None:
        if self._stopped.is_set():
            raise StoreError("the save was stopped")

    def _encoded(self, shards: Sequence[ShardToWrite], begun: list[_UnfinishedShard]) -> Iterator[_EncodingTask]:
        """Yield tasks in the order in which their chunks are stored. The pool encodes at most a window ahead."""
        waiting: deque[_EncodingTask] = deque()
        held = 0
        try:
            for parts, nbytes in self._cut_into_tasks(shards, begun):
                self._check_wanted()
                while waiting and held + nbytes > self._window:
                    held -= waiting[0].nbytes
                    yield waiting.popleft()
                encoding = self._encoding.submit(partial(_encode_parts, parts))
                waiting.append(_EncodingTask(parts, nbytes, encoding))
                held += nbytes
            while waiting:
                yield waiting.popleft()
        finally:
            for left in waiting:
                left.encoded.cancel()

    def _cut_into_tasks(
        self, shards: Sequence[ShardToWrite], begun: list[_UnfinishedShard]
    ) -> Iterator[tuple[list[_TaskPart], int]]:
        """Yield the parts of each task, and the bytes of their values."""
        parts, held = list[_TaskPart](), 0
        for group in group_by_bytes(shards, self._together):
            for part in self._in_order(group, begun):
                for runs, nbytes in part.tasks:
                    parts.append((part, runs, nbytes))
                    held += nbytes
                    if held >= MIN_TASK_BYTES:
                        yield parts, held
                        parts, held = [], 0
        if parts:
            yield parts, held

    def _in_order(self, group: Sequence[ShardToWrite], begun: list[_UnfinishedShard]) -> list[_SegmentInput]:
        """Return the segments of a group of shards in the order in which they are stored.

        Heads come before tails. Each of them is sorted by eighths.
        """
        parts = []
        for source in group:
            values = source.load(source.box)
            dtype = dtype_name(source.name, values.dtype)
            grid = source.grid(self._codec)
            entry = Entry(source.name, source.kind, dtype, grid)
            codec = source.codec(self._codec)
            streams = streams_of(dtype, codec)
            synchronize(values.device)  # another stream may still write the values
            array = as_host_array(values)
            eighths = grid.eighths(source.box)
            is_split = len(group) > 1 and values.nbytes >= EIGHTHS * MIN_EIGHTH_BYTES
            for eighth, box in eighths if is_split else [(eighths[0][0], source.box)]:
                cuts = _encoding_tasks(grid, box, values.itemsize)
                segments = [_UnfinishedSegment(stream) for stream in streams]
                part = replace(source, box=box) if is_split else source
                begun.append(_UnfinishedShard(part, dtype, grid, codec, segments, cuts.chunks))
                inside = array[box.relative_to(source.box).slices] if is_split else array
                parts += [
                    _SegmentInput(eighth, inside, entry, codec, segment, len(streams), cuts.tasks)
                    for segment in segments
                ]
        return sorted(parts, key=lambda part: (part.segment.stream is Stream.TAIL, part.eighth))


@dataclass(frozen=True, slots=True)
class _SegmentTasks:
    """The tasks that encode the segments of a shard."""

    chunks: int
    tasks: list[tuple[list[_Run], int]]
    """For each task, its chunk runs and the bytes of their values."""


@functools.lru_cache(maxsize=64)
def _encoding_tasks(grid: Grid, box: Box, itemsize: int) -> _SegmentTasks:
    """Cut a shard into tasks. The result is cached because the layers of a model are cut in the same way."""
    _, offsets, sizes = grid.chunks(box)
    chunk_bytes = sizes.prod(axis=1) * itemsize
    firsts, counts, dims = group_into_runs(
        continued_dims(offsets, sizes), np.maximum(1, MAX_CHUNK_RUN_BYTES // chunk_bytes)
    )
    starts = offsets[firsts] - np.asarray(box.offsets, np.int64)
    places = box_slices(starts, run_sizes(sizes[firsts], counts, dims))
    runs = list(zip(places, sizes[firsts].tolist(), counts.tolist(), dims.tolist(), strict=True))
    run_bytes = chunk_bytes[firsts] * counts
    ends = (np.flatnonzero(np.diff(np.cumsum(run_bytes) // TASK_BYTES)) + 1).tolist()
    tasks = [(runs[begin:end], int(run_bytes[begin:end].sum())) for begin, end in pairwise([0, *ends, len(runs)])]
    return _SegmentTasks(len(offsets), tasks)


def _encode_parts(parts: Sequence[_TaskPart]) -> list[list[Encoded]]:
    return [_encode_runs(part, runs) for part, runs, _ in parts]


def _encode_runs(part: _SegmentInput, runs: Sequence[_Run]) -> list[Encoded]:
    """Encode chunk runs of a segment."""
    entry = part.entry
    page_bytes = entry.page_bytes
    encoded: list[Encoded] = []
    for place, sizes, count, dim in runs:
        # Copy the run so that its chunks follow each other, each row-major.
        split = part.values[place].reshape(*sizes[:dim], count, *sizes[dim:])
        plain = as_bytes(split.transpose(dim, *(d for d in range(split.ndim) if d != dim)))
        nbytes = len(plain) // count
        if part.codec == "none":
            checksums: list[int] = []
            for at in range(0, len(plain), nbytes):
                checksums += raw_checksums(plain.data[at : at + nbytes], page_bytes)
            encoded.append((plain.data, [nbytes] * count, checksums))
        else:
            chunks = encode(plain, entry.dtype, part.segment.stream, nbytes // entry.itemsize)
            encoded += [(chunk, [len(chunk)], [checksum(chunk)]) for chunk in chunks]
    return encoded
