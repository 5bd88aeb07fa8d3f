"""Decodes the chunks of a batch and writes them to their destination, one block at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import numpy.typing as npt

from ...planner.box import IntArray
from ...planner.chunk_reads import ChunkReads
from ...planner.entries import Encoding
from ..errors import CorruptCheckpointError
from ..formats.native.codec import Bytes, Planes, decode, decode_heads, decode_heads_and_tails, plane_shape
from ..formats.torch_save.safe_load import decode_opaque
from .blocks import Block
from .tasks import ChunkBatch, TensorRead

MAX_PART_BYTES = 1024 * 1024
"""The most decoded bytes of a block that are decoded or cast at once. They should fit the cache of a core
(`benchmarks/overhead.py`)."""


_RAW, _PLANES, _OPAQUE = int(Encoding.RAW), int(Encoding.PLANES), int(Encoding.OPAQUE)
Values = npt.NDArray[Any]
"""The values of chunks, as bytes or as unsigned integers."""


def place_chunk_batch(batch: ChunkBatch, damage: Callable[[TensorRead, str], Exception]) -> None:
    """Decode the chunks of a batch, whose bytes have arrived, and write them to its destination.

    Args:
        damage: returns the error to raise for a tensor and a message.
    """
    streams = [_StreamBytes.of(batch, stream) for stream in range(len(batch.requests))]
    for block in batch.blocks.select(batch.block_rows):
        try:
            _place(batch, block, streams)
        except CorruptCheckpointError as error:
            row, cause = _first_damaged(batch.read, block, streams) or (block.row, error)
            message = f"chunk {batch.chunk_box(row - batch.rows.start)} cannot be decoded: {cause}"
            raise damage(batch.tensor, message) from error


def _place(batch: ChunkBatch, block: Block, streams: list[_StreamBytes]) -> None:
    """Write the values of a block in parts that fit the cache. Write raw chunks that are not cast with one copy."""
    read, destination = batch.read, batch.destination
    assert destination is not None
    target = destination.open(block)
    in_one_copy = block.encoding == _RAW and not target.casts
    most = block.count if in_one_copy else max(1, MAX_PART_BYTES // (block.numel * read.itemsize))
    indexes, counts = parts_of(block.counts, most)
    for index, values in zip(indexes, _decode(read, block, streams, counts), strict=True):
        batch.tensor.overwritten = True
        target.write(index, values)


@functools.lru_cache(maxsize=256)  # the blocks of a model have few shapes
def parts_of(counts: tuple[int, ...], most: int) -> tuple[Sequence[tuple[int | slice, ...]], Sequence[int]]:
    """Split a block into parts of at most `most` chunks, which are boxes again.

    Args:
        counts: the number of chunks in each direction, the outermost first.
        most: the maximum number of chunks of a part.

    Returns:
        For each part, an index into the directions of the block, and the number of chunks.
    """
    if math.prod(counts) <= most:
        return [()], [math.prod(counts)]
    level, unit = len(counts) - 1, 1  # the direction to split, and the chunks of one step along it
    while level and unit * counts[level] <= most:
        unit *= counts[level]
        level -= 1
    step = most // unit
    indexes, numbers = list[tuple[int | slice, ...]](), list[int]()
    for outer in product(*map(range, counts[:level])):
        for begin in range(0, counts[level], step):
            end = min(begin + step, counts[level])
            indexes.append((*outer, slice(begin, end)))
            numbers.append((end - begin) * unit)
    return indexes, numbers


@dataclass(frozen=True, slots=True)
class _StreamBytes:
    """The bytes of one stream of a batch."""

    data: memoryview
    first: int
    """The row of the first chunk of the batch."""
    begins: IntArray
    ends: IntArray
    """The byte range [begin, end) of each chunk in `data`."""

    @classmethod
    def of(cls, batch: ChunkBatch, stream: int) -> _StreamBytes:
        data = batch.requests[stream].data
        assert data is not None
        begins = batch.read.starts[batch.rows, stream] - batch.requests[stream].start
        return cls(data, batch.rows.start, begins, begins + batch.read.packed_bytes(batch.rows)[:, stream])

    def rows(self, block: Block) -> slice:
        return slice(block.row - self.first, block.row - self.first + block.count)

    def bytes_of(self, block: Block) -> memoryview:
        """Return the bytes of a block, which are one byte range."""
        rows = self.rows(block)
        return self.data[int(self.begins[rows.start]) : int(self.ends[rows.stop - 1])]

    def planes(self, block: Block, count: int, numel: int, *, whole: bool = True) -> Planes:
        rows = self.rows(block)
        return Planes.find(self.data, self.begins[rows], self.ends[rows], count, numel, whole=whole)


def _decode(read: ChunkReads, block: Block, streams: list[_StreamBytes], counts: Sequence[int]) -> Iterator[Values]:
    """Decode a block.

    Args:
        counts: the number of chunks of each part.

    Yields:
        The values of each part: row-major, one chunk after another. They may be in scratch memory of this thread, which
        is valid until the next part.

    Raises:
        CorruptCheckpointError: the bytes cannot be decoded.
    """
    if block.encoding == _PLANES:
        return _decode_planes(read, block, streams, counts)
    data = streams[0].bytes_of(block)
    if block.encoding == _RAW:
        values = _decode_raw(data, block.count * block.numel * read.itemsize, int(read.skipped[block.row]))
        if len(counts) == 1:
            return iter([values])
        ends = (np.cumsum(counts) * block.numel * read.itemsize).tolist()
        return (values[begin:end] for begin, end in pairwise([0, *ends]))
    if block.encoding == _OPAQUE:
        return iter([decode_opaque(data, read.entry.dtype, block.sizes)])
    return iter([_decode_plain(read, block.row, np.frombuffer(data, np.uint8))])


def _decode_planes(
    read: ChunkReads, block: Block, streams: list[_StreamBytes], counts: Sequence[int]
) -> Iterator[Values]:
    numel = block.numel
    if len(streams) == 2:
        heads, tails = streams[0].planes(block, 2, numel), streams[1].planes(block, 2, numel, whole=False)
        return decode_heads_and_tails(heads, tails, streams[1].ends[streams[1].rows(block)], counts)
    if read.heads_only:
        return decode_heads(streams[0].planes(block, 2, numel), counts)
    planes = streams[0].planes(block, *plane_shape(read.entry.dtype, numel))
    return decode(planes, counts, read.entry.dtype)


def _first_damaged(
    read: ChunkReads, block: Block, streams: list[_StreamBytes]
) -> tuple[int, CorruptCheckpointError] | None:
    """Return the row of the first chunk that cannot be decoded, and the error. None if all can be decoded."""
    for row in range(block.row, block.row + block.count):
        chunk = replace(block, row=row, count=1, counts=(), dims=())
        try:
            list(_decode(read, chunk, streams, [1]))
        except CorruptCheckpointError as error:
            return row, error
    return None


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
