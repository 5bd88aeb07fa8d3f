"""Verifies the bytes of a checkpoint against their checksums, without decoding them.

Other formats have no checksums of chunks. The shards of DCP, and the files of torch.save, are compared with the CRC-32s
of their zip records. Of all others, only the sizes are checked.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from typing_extensions import Buffer

from ...planner.box import Box
from ...planner.chunk_reads import WantedBox
from ...planner.entries import Encoding, Kind, Stream, are_native
from ...planner.index import CheckpointIndex
from ...planner.read_plan import plan_reads
from ..errors import ObjectNotFoundError
from ..formats.source import RecordWithCrc
from ..formats.torch_save.safe_load import damage_of
from ..reading.request_checksums import damaged_chunks
from ..reading.tasks import CHECKSUM_MISMATCH, ChunkBatch, ChunkRange, Request, build_tasks
from ..runtime.limits import default_budget
from ..runtime.logs import logger_of
from ..runtime.process_group import rank_of
from ..runtime.progress import Meter, OnProgress
from ..runtime.threads import Pool
from ..stores.base import Store
from ..stores.local import SpecialFileError
from ..stores.retry import read_whole

logger = logger_of(__name__)

MAX_READ_BYTES = 16 * 1024 * 1024
"""A record is read in parts of this size."""


@dataclass(frozen=True, slots=True)
class DamagedChunk:
    """A chunk that is damaged or missing."""

    tensor: str
    box: Box
    """The position of the chunk in the tensor."""
    object: str
    start: int
    stop: int
    """The byte range [start, stop) of the object that contains, or should contain, the chunk.

    Both are 0 if the whole tensor is missing."""
    reason: str

    def __str__(self) -> str:
        if self.start == self.stop:
            return self.reason
        where = f"bytes [{self.start}, {self.stop}) of object {self.object!r}"
        return f"{self.tensor!r}: chunk {self.box}, {where}: {self.reason}"


def verify(
    store: Store,
    index: CheckpointIndex,
    *,
    quick: bool = False,
    only: Collection[str] | None = None,
    records: Sequence[RecordWithCrc] = (),
    progress: OnProgress = False,
) -> list[DamagedChunk]:
    """Read all chunks of a checkpoint, and return those that are damaged or missing.

    Args:
        quick: Check only the sizes of the objects.
        only: The objects whose chunks are read. Default: all.
        records: The byte ranges to compare with their CRC-32s, instead of the chunks.
        progress: True for a progress bar, or a function that is called with a `Progress`.

    Raises:
        StoreError: The store failed. A missing object is not an error.
    """
    whole = (WantedBox(entry.name, entry.whole) for entry in index.entries)
    plan = plan_reads(index, list(whole if only is None else _boxes_in(index, only)))
    _, requests = build_tasks(plan)
    if only is not None:
        requests = [request for request in requests if index.objects[request.object][0] in only]

    by_size = quick or bool(records)

    def check(request: Request) -> list[DamagedChunk]:
        name = index.objects[request.object][0]
        damaged = _beyond_end(index, request, sizes[name]) if by_size else _damaged(store, index, name, request)
        return [
            DamagedChunk(chunk.tensor.name, chunk.box, name, chunk.start, chunk.stop, reason)
            for chunk, reason in damaged
        ]

    records = () if quick else records
    largest = max((request.nbytes for request in requests), default=1)
    largest = MAX_READ_BYTES if records else largest
    concurrent = max(1, min(store.capabilities.concurrent_reads, default_budget() // largest))
    meter = Meter("verify", progress, location=store.location, rank=rank_of(None))
    meter.expect(sum(read.stop - read.start for read in records or requests))
    found: list[DamagedChunk] = []
    with meter, Pool(concurrent, "reshard-verify") as pool:
        names = [name for name, _ in index.objects] if by_size else []
        sizes = dict(zip(names, pool.map(lambda name: _size(store, name), names), strict=True))
        for request, chunks in zip(requests, pool.map(check, requests), strict=True):
            found += chunks
            meter.add(0 if records else request.nbytes)
            meter.tick()
        cut_short = {chunk.object for chunk in found}
        found += _damaged_records(
            store, index, [record for record in records if record.object not in cut_short], pool, concurrent, meter
        )
    logger.info("verified %s: %d chunks are damaged or missing", store.location, len(found))
    return found


def _damaged_records(
    store: Store, index: CheckpointIndex, records: Sequence[RecordWithCrc], pool: Pool, concurrent: int, meter: Meter
) -> Iterator[DamagedChunk]:
    """Yield a DamagedChunk for each tensor and value in the records that do not match their CRC-32s.

    Args:
        pool: reads up to `concurrent` parts of records at once.
    """
    boxes = {entry.name: entry.whole for entry in index.entries}
    parts = ((record, start) for record in records for start in _part_starts(record))
    waiting: deque[tuple[RecordWithCrc, int, Future[Buffer]]] = deque()
    crc = 0
    while True:
        for record, start in islice(parts, concurrent - len(waiting)):
            waiting.append((record, start, pool.submit(partial(_read_part, store, record, start))))
        if not waiting:
            return
        record, start, part = waiting.popleft()
        data = part.result()
        crc = zlib.crc32(data, 0 if start == record.start else crc)
        meter.add(memoryview(data).nbytes)
        meter.tick()
        if start + MAX_READ_BYTES >= record.stop and crc != record.crc and _crc(store, record) != record.crc:
            reason = f"its record {record.name!r} does not match its CRC-32"
            for name in record.entries or [record.name]:  # only tensors that cannot be read may use it
                yield DamagedChunk(name, boxes.get(name, Box((), ())), record.object, record.start, record.stop, reason)


def _crc(store: Store, record: RecordWithCrc) -> int:
    """Read a record again, in case it was damaged in transit, and return its CRC-32."""
    crc = 0
    for start in _part_starts(record):
        crc = zlib.crc32(_read_part(store, record, start), crc)
    return crc


def _part_starts(record: RecordWithCrc) -> range:
    """Return where the parts of a record begin. An empty record has one part."""
    return range(record.start, max(record.stop, record.start + 1), MAX_READ_BYTES)


def _read_part(store: Store, record: RecordWithCrc, start: int) -> Buffer:
    stop = min(start + MAX_READ_BYTES, record.stop)
    return read_whole(store, record.object, start, stop) if start < stop else b""


def _boxes_in(index: CheckpointIndex, objects: Collection[str]) -> Iterator[WantedBox]:
    """Yield the boxes of the segments in some objects."""
    positions = [at for at, (name, _) in enumerate(index.objects) if name in objects]
    segments = index.segments
    rows = np.flatnonzero(np.isin(segments.objects, positions))
    for row in np.unique(rows - (segments.streams[rows] == Stream.TAIL)).tolist():  # a tail follows its head
        entry = index.entries[int(segments.entries[row])]
        extents = slice(int(index.first_extent[row]), int(index.first_extent[row]) + len(entry.shape))
        yield WantedBox(entry.name, Box(*(tuple(of[extents].tolist()) for of in (segments.offsets, segments.sizes))))


def _size(store: Store, name: str) -> int | None:
    try:
        return store.size(name)
    except (ObjectNotFoundError, SpecialFileError):
        return None


def _beyond_end(index: CheckpointIndex, request: Request, nbytes: int | None) -> list[tuple[ChunkRange, str]]:
    """Return the chunks of a request that are beyond the end of its object, which has `nbytes` or is missing."""
    chunks = damaged_chunks(request, index, memoryview(b"")) if nbytes is None or nbytes < request.stop else []
    reason = "the object is missing" if nbytes is None else "the object is cut short"
    return [(chunk, reason) for chunk in chunks if nbytes is None or chunk.stop > nbytes]


def _damaged(store: Store, index: CheckpointIndex, name: str, request: Request) -> Iterable[tuple[ChunkRange, str]]:
    try:
        data = memoryview(store.read(name, request.start, request.stop))
        chunks = damaged_chunks(request, index, data)
        if chunks:  # perhaps only in transit
            data = memoryview(read_whole(store, name, request.start, request.stop))
            chunks = damaged_chunks(request, index, data)
    except (ObjectNotFoundError, SpecialFileError) as error:
        reason = "the object is missing" if isinstance(error, ObjectNotFoundError) else "the object is not a file"
        return [(chunk, reason) for chunk in damaged_chunks(request, index, memoryview(b""))]
    damaged = [
        (chunk, "the object is cut short" if chunk.stop - request.start > len(data) else CHECKSUM_MISMATCH)
        for chunk in chunks
    ]
    return damaged or [found for batch, _ in request.parts for found in _wrong_crcs(batch, request, data)]


def _wrong_crcs(batch: ChunkBatch, request: Request, data: memoryview) -> Iterator[tuple[ChunkRange, str]]:
    """Yield the chunks of a batch that are whole torch.save files and do not match their CRC-32s."""
    read, first = batch.read, batch.rows.start
    whole = read.encodings[batch.rows] == Encoding.OPAQUE
    if read.entry.kind is Kind.TORCH_SAVE and not are_native(read.encodings[batch.rows]).all():
        whole |= (read.chunk_sizes[batch.rows] == read.entry.shape).all(axis=1)
    for row in np.flatnonzero(whole).tolist():
        start, stop = int(read.starts[first + row, 0]), int(read.stops[first + row, 0])
        reason = damage_of(data[start - request.start : stop - request.start])
        if reason:
            yield ChunkRange(batch.tensor, batch.chunk_box(row), start, stop), reason
