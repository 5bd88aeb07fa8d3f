"""The chunks of a batch, decoded, some runs of them together, and written where they belong, run by run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..planner.index import Encoding
from ..planner.read_plan import ChunkReads
from .arranged import Batch, Tensor
from .codec import Bytes, decode, decode_heads, decode_heads_and_tails
from .errors import CorruptCheckpointError
from .opaque import decode_opaque
from .runs import RUN_BYTES, Run


def place_batch(batch: Batch, damage: Callable[[Tensor, str], CorruptCheckpointError]) -> None:
    """Decode a batch's chunks, whose bytes are here, and write them to its destination.

    Args:
        damage: gives the error for a tensor, from what is wrong with it.
    """
    read, destination = batch.read, batch.destination
    assert destination is not None
    streams = [_Stream.of(batch, stream) for stream in range(len(batch.requests))]
    for runs in _together(read, batch.runs.select(batch.run_rows)):
        chunks = replace(runs[0], count=sum(run.count for run in runs))
        try:
            values = _values(read, chunks, streams)
        except CorruptCheckpointError as error:
            at, told = _first_damaged(read, chunks, streams) or (chunks.row, error)
            message = f"chunk {batch.chunk_box(at - batch.rows.start)} cannot be decoded: {told}"
            raise damage(batch.tensor, message) from error
        batch.tensor.touched = True
        begin = 0
        for run in runs:
            end = begin + len(values) // chunks.count * run.count
            destination.write(run.place, values[begin:end], run.sizes, run.part, run.count, run.dim)
            begin = end


def _together(read: ChunkReads, runs: Iterable[Run]) -> Iterator[list[Run]]:
    """Runs whose planes are joined together: of chunks of as many values, one after another, RUN_BYTES at most."""
    together: list[Run] = []
    chunks = 0
    for run in runs:
        first = together[0] if together else run
        joined = run.encoding == first.encoding == Encoding.PLANES and run.numel == first.numel
        if together and not (joined and (chunks + run.count) * run.numel * read.itemsize <= RUN_BYTES):
            yield together
            together, chunks = [], 0
        together.append(run)
        chunks += run.count
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

    def together(self, run: Run) -> memoryview:
        """The bytes of a run, which are one range."""
        at = run.row - self.first
        return self.data[self.begins[at] : self.ends[at + run.count - 1]]

    def each(self, run: Run) -> list[memoryview]:
        """The bytes of each chunk of a run."""
        at = run.row - self.first
        return [self.data[self.begins[i] : self.ends[i]] for i in range(at, at + run.count)]


def _first_damaged(read: ChunkReads, run: Run, streams: list[_Stream]) -> tuple[int, CorruptCheckpointError] | None:
    """The row of the first chunk, of some, that cannot be decoded, and why."""
    for row in range(run.row, run.row + run.count):
        try:
            _values(read, replace(run, row=row, count=1), streams)
        except CorruptCheckpointError as error:
            return row, error
    return None


def _values(read: ChunkReads, run: Run, streams: list[_Stream]) -> Bytes:
    """The bytes of the values of a run: each chunk row-major, one after another."""
    if run.encoding == Encoding.PLANES:
        chunks = [stream.each(run) for stream in streams]
        if len(chunks) == 2:
            return decode_heads_and_tails(chunks[0], chunks[1], run.numel)
        return decode_heads(chunks[0], run.numel) if read.heads_only else decode(chunks[0], read.entry.dtype, run.numel)
    data, row = streams[0].together(run), run.row
    if run.encoding == Encoding.RAW:
        return _raw(data, run.count * run.numel * read.itemsize, int(read.skipped[row]))
    if run.encoding == Encoding.OPAQUE:
        return decode_opaque(data, read.entry.dtype, run.sizes)
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
