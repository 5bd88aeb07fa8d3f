"""Shards to data objects: cut into chunks, encode on all cores, write in order, hold little.

One rank writes one object. Its chunks are encoded by a pool of threads that runs at most a window ahead of the
writing, so that a slow store slows the encoding down, and neither the size of a tensor nor that of a shard adds to
what is held. What was written comes back as a record, from which the manifest is made.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from ..planner.box import Box
from ..planner.errors import ShapeMismatchError
from ..planner.grid import Grid
from ..planner.index import ITEMSIZES, Encoding, Entry, Kind, Stream
from .checksums import checksum, page_checksums
from .codec import encode, streams_of
from .manifest import DATA_FOLDER, DATA_SUFFIX
from .records import ObjectRecord, SegmentRecord, ShardRecord
from .retrying_store import retried
from .store import Store
from .tensors import as_bytes, dtype_name
from .threads import default_threads

OBJECT_MAGIC = b"RESHARDD"
WINDOW_BYTES = 64 * 1024 * 1024
"""Values that may be waiting, encoded or being encoded, for the object to take them."""

Encoded = tuple[bytes, list[int]]
"""A chunk's bytes, and its checksums."""


@dataclass(frozen=True, slots=True)
class ShardToWrite:
    """One shard of a tensor, or one object as bytes."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    """Of the global tensor."""
    box: Box
    """The part of it that the shard is."""
    load: Callable[[], torch.Tensor]
    """Gives the shard's values, of shape `box.sizes`, on any device; called once, when its turn comes."""


@dataclass(slots=True)
class _Segment:
    """A segment while its chunks are being written."""

    stream: Stream
    start: int = -1
    lengths: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)

    def add(self, at: int, length: int, checksums: list[int]) -> None:
        if not self.lengths:
            self.start = at
        self.lengths.append(length)
        self.checksums += checksums

    def record(self, encoding: Encoding) -> SegmentRecord:
        lengths, checksums = np.array(self.lengths, "<u4"), np.array(self.checksums, "<u8")
        return SegmentRecord(int(self.stream), int(encoding), self.start, lengths.tobytes(), checksums.tobytes())


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard while its segments are being written."""

    source: ShardToWrite
    dtype: str
    segments: list[_Segment]
    chunks: int

    def record(self, encoding: Encoding) -> ShardRecord:
        source = self.source
        segments = tuple(segment.record(encoding) for segment in self.segments)
        return ShardRecord(source.name, int(source.kind), self.dtype, source.shape, source.box, segments)


def write_object(store: Store, rank: int, shards: Sequence[ShardToWrite], codec: str) -> ObjectRecord:
    """Write shards into one new object of a store.

    The name is unique, so that nothing that exists is touched. Where there is nothing to write, no object is made.
    Where the store fails in a way that may pass, another object is begun.
    Raises StoreError, DtypeError, ShapeMismatchError, and what `load` raises; what was begun is then removed.
    """
    return retried(lambda: _write_object(store, rank, shards, codec))


def _write_object(store: Store, rank: int, shards: Sequence[ShardToWrite], codec: str) -> ObjectRecord:
    # What differs comes first: stores spread their load by the beginning of a key.
    record = ObjectRecord(f"{DATA_FOLDER}/{uuid.uuid4().hex}-{rank:05d}{DATA_SUFFIX}")
    filled = [shard for shard in shards if shard.box.numel > 0]
    if not filled:
        return record
    begun: list[_Shard] = []
    encode_s = write_s = 0.0
    try:
        with store.create(record.name) as out, ThreadPoolExecutor(default_threads(), "reshard-encode") as pool:
            out.write(OBJECT_MAGIC)
            record.nbytes = len(OBJECT_MAGIC)
            clock = time.perf_counter()
            for segment, data, checksums in _encoded_chunks(filled, codec, pool, begun):
                encoded_at = time.perf_counter()
                out.write(data)
                segment.add(record.nbytes, len(data), checksums)
                record.nbytes += len(data)
                encode_s += encoded_at - clock
                clock = time.perf_counter()
                write_s += clock - encoded_at
        write_s += time.perf_counter() - clock
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            store.delete([record.name])
        raise
    encoding = Encoding.RAW if codec == "none" else Encoding.PLANES
    record.shards = [shard.record(encoding) for shard in begun]
    record.bytes_needed = sum(shard.source.box.numel * ITEMSIZES[shard.dtype] for shard in begun)
    record.chunks = sum(shard.chunks for shard in begun)
    record.seconds = {"encode": encode_s, "write": write_s}
    return record


def _encoded_chunks(
    shards: list[ShardToWrite], codec: str, pool: ThreadPoolExecutor, begun: list[_Shard]
) -> Iterator[tuple[_Segment, bytes, list[int]]]:
    """The encoded chunks of all shards, in the order of the file; the pool works at most a window ahead."""
    waiting: deque[tuple[int, _Segment, Future[Encoded]]] = deque()
    held = 0
    try:
        for source in shards:
            values = source.load().detach()
            if tuple(values.shape) != source.box.sizes:
                raise ShapeMismatchError(
                    f"{source.name!r} should hold {source.box} on this rank, but has shape {tuple(values.shape)}"
                )
            dtype = dtype_name(source.name, values.dtype)
            entry = Entry(source.name, source.kind, dtype, Grid.choose(source.shape, values.itemsize))
            _, offsets, sizes = entry.grid.chunks(source.box)
            segments = [_Segment(stream) for stream in streams_of(dtype, codec)]
            begun.append(_Shard(source, dtype, segments, len(offsets)))
            for segment in segments:
                for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
                    box = Box(tuple(offset), tuple(size)).relative_to(source.box)
                    nbytes = box.numel * values.itemsize
                    while waiting and held + nbytes > WINDOW_BYTES:
                        freed, ready, future = waiting.popleft()
                        yield ready, *future.result()
                        held -= freed
                    future = pool.submit(_encode_chunk, values[box.slices], entry, segment.stream, codec)
                    waiting.append((nbytes, segment, future))
                    held += nbytes
        while waiting:
            _, ready, future = waiting.popleft()
            yield ready, *future.result()
    finally:
        for _, _, future in waiting:
            future.cancel()


def _encode_chunk(values: torch.Tensor, entry: Entry, stream: Stream, codec: str) -> Encoded:
    plain = as_bytes(values)
    if codec == "none":
        return plain.tobytes(), page_checksums(plain.data, entry.page_bytes)
    encoded = encode(plain, entry.dtype, stream)
    return encoded, [checksum(encoded)]
