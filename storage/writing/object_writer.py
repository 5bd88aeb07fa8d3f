"""Shards to data objects: cut into chunks, encode on all cores, write in order, hold little.

One rank writes one object, as a stream, where the store takes one; several at once where it holds each in memory until
all of it is there. Chunks are encoded by a pool of threads that runs at most a window ahead of the writing, so that a
slow store slows the encoding down, and neither the size of a tensor nor that of a shard adds to what is held. What was
written comes back as records, from which the manifest is made.
"""

from __future__ import annotations

import contextlib
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
import torch
from torch.profiler import record_function
from typing_extensions import Buffer

from ...planner.box import Box, indexes
from ...planner.entries import Entry
from ...planner.grid import EIGHTHS, Grid
from ...planner.index import Encoding, Stream
from ..errors import StoreError
from ..formats.native.chunk_runs import Slices, continued, cut, extents
from ..formats.native.codec import encode, streams_of
from ..formats.native.manifest import DATA_FOLDER, DATA_SUFFIX
from ..formats.native.write_records import ObjectRecord, SegmentRecord, ShardRecord
from ..runtime.checksums import checksum, page_checksums
from ..runtime.limits import default_budget, default_threads
from ..runtime.logs import logger_of
from ..runtime.process_group import CHECK_EVERY_S, Interrupt, never
from ..runtime.threads import Pool, cleaning_up
from ..stores.base import Store
from ..stores.retry import retried, without_retries
from ..tensors.dtypes import as_array, as_bytes, dtype_name
from ..tensors.pieces import in_groups
from .object_layout import CONCURRENT_OBJECTS, MIN_EIGHTH_BYTES, TOGETHER_BYTES, ShardToWrite, grid_of, in_objects

logger = logger_of(__name__)

OBJECT_MAGIC = b"RESHARDD"
WINDOW_BYTES = 16 * 1024 * 1024
"""Values that may be waiting, encoded or being encoded, for an object to take them."""
TASK_BYTES = 1024 * 1024
"""Values that one task encodes, or a little more."""
LET_END_S = 2.0
"""How long a save that has failed waits for what is under way, to remove it."""

Encoded = tuple[Buffer, list[int], list[int]]
"""The bytes of a chunk, or of several one after another; the length of each; their checksums."""
_Band = tuple[Slices, list[int], int, int]
"""Chunks that adjoin: where they lie in the shard, the sizes of each, their number, in which dimension they adjoin."""


@dataclass(slots=True)
class _Segment:
    """A segment while its chunks are being written."""

    stream: Stream
    start: int = -1
    lengths: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)

    def add(self, at: int, lengths: list[int], checksums: list[int]) -> None:
        if not self.lengths:
            self.start = at
        self.lengths += lengths
        self.checksums += checksums

    def record(self, encoding: Encoding) -> SegmentRecord:
        lengths, checksums = np.array(self.lengths, "<u4"), np.array(self.checksums, "<u8")
        return SegmentRecord(int(self.stream), int(encoding), self.start, lengths.tobytes(), checksums.tobytes())


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard while its segments are being written."""

    source: ShardToWrite
    dtype: str
    grid: Grid
    segments: list[_Segment]
    chunks: int

    def record(self, encoding: Encoding) -> ShardRecord:
        source = self.source
        segments = tuple(segment.record(encoding) for segment in self.segments)
        return ShardRecord(source.name, int(source.kind), self.dtype, self.grid, source.box, segments)


@dataclass(frozen=True, slots=True)
class _Part:
    """One stream of a shard, or of what it has of an eighth of its tensor."""

    eighth: int
    values: npt.NDArray[Any]
    entry: Entry
    segment: _Segment
    streams: int
    """That the values are stored in."""
    tasks: list[tuple[list[_Band], int]]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Chunks of a segment that are being encoded."""

    segment: _Segment
    held_nbytes: int
    """Values that are held for it."""
    values_nbytes: int
    """Its part of the values: a shard's heads and tails have half of them each."""
    encoded: Future[list[Encoded]]


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
    """Write shards into new objects of a store: none where there is nothing to write.

    Their names are unique, so that nothing that exists is touched. Where the store fails in a way that may pass, the
    object that it failed at is begun anew, under another name.

    Args:
        label: what their names end with, the rank's number; it makes them no more unique.
        budget_bytes: of values that may be held; `default_budget()` by default.
        interrupt: called now and then, by this thread; what it raises stops the writing.
        failed: called as soon as it fails, before anything is removed.
        wrote: called with the bytes of values that the store has taken, by any thread; with a negative number of them
            where an object has failed, and is begun anew.

    Raises StoreError, DtypeError, ShapeMismatchError, and what `load` raises; what was written is then removed.
    """
    budget = default_budget() if budget_bytes is None else budget_bytes
    groups = in_objects(
        [shard for shard in shards if shard.box.numel > 0], codec, budget, several=store.capabilities.buffers_objects
    )
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
            with contextlib.suppress(Exception), cleaning_up():  # the first error is the one to tell
                without_retries(store).delete(written)
            raise
        finally:
            writing.shutdown(wait=False)


class _ObjectWriter:
    """Writes objects, several at once, with one pool of threads that encodes."""

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
        self._window = min(WINDOW_BYTES, budget_bytes)
        self._buffers_objects = store.capabilities.buffers_objects
        self._together = min(TOGETHER_BYTES, budget_bytes // 4) if self._buffers_objects else 0
        self._encoding = encoding
        self._stopped = stopped
        """Set where nobody waits for the objects any more."""
        self._wrote = wrote

    def write(self, shards: Sequence[ShardToWrite]) -> ObjectRecord:
        """One object of these shards. What was begun is removed where that fails."""
        # What differs comes first: stores spread their load by the beginning of a key.
        record = ObjectRecord(f"{DATA_FOLDER}/{uuid.uuid4().hex}-{self._label}{DATA_SUFFIX}")
        begun: list[_Shard] = []
        encode_s = write_s = 0.0
        taken = 0
        try:
            with record_function("reshard.write"), self._store.create(record.name) as out:
                out.write(OBJECT_MAGIC)
                record.nbytes = len(OBJECT_MAGIC)
                clock = time.perf_counter()
                for batch in self._encoded(shards, begun):
                    chunks = batch.encoded.result()
                    encoded_at = time.perf_counter()
                    for data, lengths, checksums in chunks:
                        out.write(data)
                        batch.segment.add(record.nbytes, lengths, checksums)
                        record.nbytes += sum(lengths)
                    if not self._buffers_objects:
                        self._wrote(batch.values_nbytes)
                        taken += batch.values_nbytes
                    encode_s += encoded_at - clock
                    clock = time.perf_counter()
                    write_s += clock - encoded_at
            write_s += time.perf_counter() - clock
            self._check_wanted()
        except BaseException:
            self._wrote(-taken)
            with contextlib.suppress(Exception), cleaning_up():  # the first error is the one to tell
                without_retries(self._store).delete([record.name])
            raise
        encoding = Encoding.RAW if self._codec == "none" else Encoding.PLANES
        record.shards = [shard.record(encoding) for shard in begun]
        record.bytes_needed = sum(shard.source.nbytes for shard in begun)
        record.chunks = sum(shard.chunks for shard in begun)
        record.seconds = {"encode": encode_s, "write": write_s}
        self._wrote(record.bytes_needed - taken)
        logger.debug("wrote %s to %s: %d bytes", record.name, self._store.location, record.nbytes)
        return record

    def _check_wanted(self) -> None:
        if self._stopped.is_set():
            raise StoreError("the save was stopped")

    def _encoded(self, shards: Sequence[ShardToWrite], begun: list[_Shard]) -> Iterator[_Batch]:
        """All chunks in the order of the file, some at a time; the pool works at most a window ahead."""
        waiting: deque[_Batch] = deque()
        held = 0
        try:
            for group in in_groups(shards, self._together):
                for part in self._in_order(group, begun):
                    for bands, nbytes in part.tasks:
                        self._check_wanted()
                        while waiting and held + nbytes > self._window:
                            held -= waiting[0].held_nbytes
                            yield waiting.popleft()
                        encoding = partial(_encode, part.values, bands, part.entry, part.segment.stream, self._codec)
                        batch = _Batch(part.segment, nbytes, nbytes // part.streams, self._encoding.submit(encoding))
                        waiting.append(batch)
                        held += nbytes
            while waiting:
                yield waiting.popleft()
        finally:
            for left in waiting:
                left.encoded.cancel()

    def _in_order(self, group: Sequence[ShardToWrite], begun: list[_Shard]) -> list[_Part]:
        """The parts of shards that lie together, as they lie: heads before tails, then eighth by eighth."""
        parts = []
        for source in group:
            values = source.load(source.box)
            dtype = dtype_name(source.name, values.dtype)
            grid = grid_of(source.shape, values.itemsize, self._codec)
            entry = Entry(source.name, source.kind, dtype, grid)
            streams = streams_of(dtype, self._codec)
            if values.device.type != "cpu":
                torch.accelerator.synchronize(values.device)  # what its own stream still computes
            array = as_array(values)
            eighths = grid.eighths(source.box)
            if len(group) == 1 or values.nbytes < EIGHTHS * MIN_EIGHTH_BYTES:
                eighths = [(eighths[0][0], source.box)]
            for eighth, box in eighths:
                cuts = _cut(grid, box, values.itemsize)
                segments = [_Segment(stream) for stream in streams]
                begun.append(_Shard(replace(source, box=box), dtype, grid, segments, cuts.chunks))
                inside = array[box.relative_to(source.box).slices]
                parts += [_Part(eighth, inside, entry, segment, len(streams), cuts.tasks) for segment in segments]
        return sorted(parts, key=lambda part: (part.segment.stream is Stream.TAIL, part.eighth))


@dataclass(frozen=True, slots=True)
class _Cuts:
    """How a shard is cut."""

    chunks: int
    tasks: list[tuple[list[_Band], int]]
    """Bands that are encoded together, and the bytes of their values."""


@functools.lru_cache(maxsize=64)
def _cut(grid: Grid, box: Box, itemsize: int) -> _Cuts:
    """Remembered, since the layers of a model are cut alike."""
    _, offsets, sizes = grid.chunks(box)
    chunk_bytes = sizes.prod(axis=1) * itemsize
    firsts, counts, dims = cut(continued(offsets, sizes), chunk_bytes)
    starts = offsets[firsts] - np.asarray(box.offsets, np.int64)
    places = indexes(starts, extents(sizes[firsts], counts, dims))
    bands = list(zip(places, sizes[firsts].tolist(), counts.tolist(), dims.tolist(), strict=True))
    band_bytes = chunk_bytes[firsts] * counts
    ends = (np.flatnonzero(np.diff(np.cumsum(band_bytes) // TASK_BYTES)) + 1).tolist()
    tasks = [(bands[begin:end], int(band_bytes[begin:end].sum())) for begin, end in pairwise([0, *ends, len(bands)])]
    return _Cuts(len(offsets), tasks)


def _encode(
    values: npt.NDArray[Any],
    bands: Sequence[_Band],
    entry: Entry,
    stream: Stream,
    codec: str,
) -> list[Encoded]:
    """Chunks of a shard, whose values these are."""
    page_bytes = entry.page_bytes
    encoded: list[Encoded] = []
    for place, sizes, count, dim in bands:
        # What of the values is one chunk after another, each row-major.
        split = values[place].reshape(*sizes[:dim], count, *sizes[dim:])
        plain = as_bytes(split.transpose(dim, *(d for d in range(split.ndim) if d != dim)))
        nbytes = len(plain) // count
        if codec == "none":
            checksums: list[int] = []
            for at in range(0, len(plain), nbytes):
                checksums += page_checksums(plain.data[at : at + nbytes], page_bytes)
            encoded.append((plain.data, [nbytes] * count, checksums))
        else:
            chunks = encode(plain, entry.dtype, stream, nbytes // entry.itemsize)
            encoded += [(chunk, [len(chunk)], [checksum(chunk)]) for chunk in chunks]
    return encoded
