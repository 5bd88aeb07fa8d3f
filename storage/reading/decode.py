"""The chunks of a batch, decoded, some bands of them together, and written where they belong, band by band."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ...planner.chunk_reads import ChunkReads
from ...planner.entries import Encoding
from ..errors import CorruptCheckpointError
from ..formats.native.chunk_runs import BAND_BYTES, Band
from ..formats.native.codec import Bytes, decode, decode_heads, decode_heads_and_tails
from ..formats.torch_save.blob import decode_opaque
from .tasks import Batch, TensorRead


def place_batch(batch: Batch, damage: Callable[[TensorRead, str], Exception]) -> None:
    """Decode a batch's chunks, whose bytes are here, and write them to its destination.

    Args:
        damage: gives the error for a tensor, from what is wrong with it.
    """
    read, destination = batch.read, batch.destination
    assert destination is not None
    streams = [_Stream.of(batch, stream) for stream in range(len(batch.requests))]
    for bands in _together(read, batch.bands.select(batch.band_rows)):
        try:
            values = _values(read, bands, streams)
        except CorruptCheckpointError as error:
            at, told = _first_damaged(read, bands, streams) or (bands[0].row, error)
            message = f"chunk {batch.chunk_box(at - batch.rows.start)} cannot be decoded: {told}"
            raise damage(batch.tensor, message) from error
        batch.tensor.touched = True
        begin = 0
        for band in bands:
            end = begin + band.count * band.numel * read.itemsize
            destination.write(band.place, values[begin:end], band.sizes, band.part, band.count, band.dim)
            begin = end


def _together(read: ChunkReads, bands: Iterable[Band]) -> Iterator[list[Band]]:
    """Bands whose planes are joined together: of chunks of as many values, one after another, BAND_BYTES at most."""
    together: list[Band] = []
    chunks = 0
    for band in bands:
        first = together[0] if together else band
        joined = band.encoding == first.encoding == Encoding.PLANES and band.numel == first.numel
        if together and not (joined and (chunks + band.count) * band.numel * read.itemsize <= BAND_BYTES):
            yield together
            together, chunks = [], 0
        together.append(band)
        chunks += band.count
    if together:
        yield together


@dataclass(frozen=True, slots=True)
class _Stream:
    """One stream of a batch's chunks."""

    data: memoryview
    first: int
    """The row of the batch's first chunk."""
    begins: list[int]
    ends: list[int]
    """Where each chunk's bytes are in the data."""

    @classmethod
    def of(cls, batch: Batch, stream: int) -> _Stream:
        data = batch.requests[stream].data
        assert data is not None
        begins = batch.read.starts[batch.rows, stream] - batch.requests[stream].start
        return cls(
            data, batch.rows.start, begins.tolist(), (begins + batch.read.packed_bytes(batch.rows)[:, stream]).tolist()
        )

    def together(self, row: int, count: int) -> memoryview:
        """The bytes of chunks, which are one range."""
        at = row - self.first
        return self.data[self.begins[at] : self.ends[at + count - 1]]

    def each(self, row: int, count: int) -> list[memoryview]:
        """The bytes of each of some chunks."""
        at = row - self.first
        return [self.data[self.begins[i] : self.ends[i]] for i in range(at, at + count)]


def _first_damaged(
    read: ChunkReads, bands: list[Band], streams: list[_Stream]
) -> tuple[int, CorruptCheckpointError] | None:
    """The row of the first chunk that cannot be decoded, and why."""
    for band in bands:
        for row in range(band.row, band.row + band.count):
            try:
                _values(read, [replace(band, row=row, count=1)], streams)
            except CorruptCheckpointError as error:
                return row, error
    return None


def _values(read: ChunkReads, bands: list[Band], streams: list[_Stream]) -> Bytes:
    """The bytes of the values of bands that `_together` gives: each chunk row-major, one after another."""
    encoding, numel, row = bands[0].encoding, bands[0].numel, bands[0].row
    count = sum(band.count for band in bands)
    if encoding == Encoding.PLANES:
        chunks = [stream.each(row, count) for stream in streams]
        if len(chunks) == 2:
            return decode_heads_and_tails(chunks[0], chunks[1], numel)
        return decode_heads(chunks[0], numel) if read.heads_only else decode(chunks[0], read.entry.dtype, numel)
    data = streams[0].together(row, count)
    if encoding == Encoding.RAW:
        return _raw(data, count * numel * read.itemsize, int(read.skipped[row]))
    if encoding == Encoding.OPAQUE:
        return decode_opaque(data, read.entry.dtype, bands[0].sizes)
    return _plain(read, row, np.frombuffer(data, np.uint8))


def _raw(data: memoryview, nbytes: int, skipped: int) -> Bytes:
    """The bytes of raw chunks' values; where one was read in part, only that part is set."""
    values = np.frombuffer(data, np.uint8)
    if len(values) == nbytes:
        return values
    whole = np.empty(nbytes, np.uint8)
    whole[skipped : skipped + len(values)] = values
    return whole


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
