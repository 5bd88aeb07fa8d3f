"""Decodes the chunks of a batch and writes them to their destination, one chunk run at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ...planner.chunk_reads import ChunkReads
from ...planner.entries import Encoding
from ..errors import CorruptCheckpointError
from ..formats.native.chunk_runs import MAX_CHUNK_RUN_BYTES, ChunkRun
from ..formats.native.codec import Bytes, decode, decode_heads, decode_heads_and_tails
from ..formats.torch_save.safe_load import decode_opaque
from .tasks import ChunkBatch, TensorRead


def place_chunk_batch(batch: ChunkBatch, damage: Callable[[TensorRead, str], Exception]) -> None:
    """Decode the chunks of a batch, whose bytes have arrived, and write them to its destination.

    Args:
        damage: Returns the error to raise for a tensor and a message.
    """
    read, destination = batch.read, batch.destination
    assert destination is not None
    streams = [_StreamBytes.of(batch, stream) for stream in range(len(batch.requests))]
    for runs in _together(read, batch.chunk_runs.select(batch.run_rows)):
        try:
            values = _decode_runs(read, runs, streams)
        except CorruptCheckpointError as error:
            at, cause = _first_damaged(read, runs, streams) or (runs[0].row, error)
            message = f"chunk {batch.chunk_box(at - batch.rows.start)} cannot be decoded: {cause}"
            raise damage(batch.tensor, message) from error
        batch.tensor.overwritten = True
        begin = 0
        for run in runs:
            end = begin + run.count * run.numel * read.itemsize
            destination.write(run.target, values[begin:end], run.sizes, run.part, run.count, run.dim)
            begin = end


def _together(read: ChunkReads, runs: Iterable[ChunkRun]) -> Iterator[list[ChunkRun]]:
    """Group chunk runs for one call of the codec: equal numbers of values, at most MAX_CHUNK_RUN_BYTES together."""
    together: list[ChunkRun] = []
    chunks = 0
    for run in runs:
        first = together[0] if together else run
        joined = run.encoding == first.encoding == Encoding.PLANES and run.numel == first.numel
        if together and not (joined and (chunks + run.count) * run.numel * read.itemsize <= MAX_CHUNK_RUN_BYTES):
            yield together
            together, chunks = [], 0
        together.append(run)
        chunks += run.count
    if together:
        yield together


@dataclass(frozen=True, slots=True)
class _StreamBytes:
    """The bytes of one stream of a batch."""

    data: memoryview
    first: int
    """The row of the first chunk of the batch."""
    begins: list[int]
    ends: list[int]
    """The byte range [begin, end) of each chunk in `data`."""

    @classmethod
    def of(cls, batch: ChunkBatch, stream: int) -> _StreamBytes:
        data = batch.requests[stream].data
        assert data is not None
        begins = batch.read.starts[batch.rows, stream] - batch.requests[stream].start
        return cls(
            data, batch.rows.start, begins.tolist(), (begins + batch.read.packed_bytes(batch.rows)[:, stream]).tolist()
        )

    def together(self, row: int, count: int) -> memoryview:
        """Return the bytes of consecutive chunks that are one byte range."""
        at = row - self.first
        return self.data[self.begins[at] : self.ends[at + count - 1]]

    def each(self, row: int, count: int) -> list[memoryview]:
        """Return the bytes of each of some chunks."""
        at = row - self.first
        return [self.data[self.begins[i] : self.ends[i]] for i in range(at, at + count)]


def _first_damaged(
    read: ChunkReads, runs: list[ChunkRun], streams: list[_StreamBytes]
) -> tuple[int, CorruptCheckpointError] | None:
    """Return the row of the first chunk that cannot be decoded, and the error. None if all can be decoded."""
    for run in runs:
        for row in range(run.row, run.row + run.count):
            try:
                _decode_runs(read, [replace(run, row=row, count=1)], streams)
            except CorruptCheckpointError as error:
                return row, error
    return None


def _decode_runs(read: ChunkReads, runs: list[ChunkRun], streams: list[_StreamBytes]) -> Bytes:
    """Decode chunk runs that `_together` grouped. Return the values of each chunk, row-major, one after another."""
    encoding, numel, row = runs[0].encoding, runs[0].numel, runs[0].row
    count = sum(run.count for run in runs)
    if encoding == Encoding.PLANES:
        chunks = [stream.each(row, count) for stream in streams]
        if len(chunks) == 2:
            return decode_heads_and_tails(chunks[0], chunks[1], numel)
        return decode_heads(chunks[0], numel) if read.heads_only else decode(chunks[0], read.entry.dtype, numel)
    data = streams[0].together(row, count)
    if encoding == Encoding.RAW:
        return _decode_raw(data, count * numel * read.itemsize, int(read.skipped[row]))
    if encoding == Encoding.OPAQUE:
        return decode_opaque(data, read.entry.dtype, runs[0].sizes)
    return _decode_plain(read, row, np.frombuffer(data, np.uint8))


def _decode_raw(data: memoryview, nbytes: int, skipped: int) -> Bytes:
    """Return the values of raw chunks. If a chunk was read in part, the other values are not initialised."""
    values = np.frombuffer(data, np.uint8)
    if len(values) == nbytes:
        return values
    whole = np.empty(nbytes, np.uint8)
    whole[skipped : skipped + len(values)] = values
    return whole


def _decode_plain(read: ChunkReads, row: int, values: Bytes) -> Bytes:
    """Return the values of a plain chunk. Bytes that were read between its byte ranges are skipped."""
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
