"""Decodes the chunks of a batch and writes them to their destination, one block at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np
import numpy.typing as npt

from ...planner.chunk_reads import ChunkReads
from ...planner.entries import Encoding
from ..errors import CorruptCheckpointError, UnsupportedFormatError
from ..formats.native.codec import Bytes, decode, decode_heads, decode_heads_and_tails
from ..formats.torch_save.safe_load import decode_opaque
from .blocks import Block
from .stream_bytes import StreamBytes
from .tasks import ChunkBatch, TensorProgress

MAX_PART_BYTES = 1024 * 1024
"""The maximum number of decoded bytes that are decoded or cast at once. They should fit the cache of a core
(`benchmarks/overhead.py`)."""


_RAW, _PLANES, _PLAIN, _OPAQUE = map(int, (Encoding.RAW, Encoding.PLANES, Encoding.PLAIN, Encoding.OPAQUE))
MakeError = Callable[[TensorProgress, str], Exception]
"""Returns the error to raise for a tensor and a message."""
Values = npt.NDArray[Any]
"""The values of chunks, as bytes or as unsigned integers."""


def place_chunk_batch(batch: ChunkBatch, make_error: MakeError) -> None:
    """Decode the chunks of a batch, whose bytes have arrived, and write them to its destination."""
    streams = arrived_streams(batch)
    for block in batch.blocks.select(batch.block_rows):
        try:
            _place(batch, block, streams)
        except CorruptCheckpointError as error:
            raise damaged_chunk(batch, block, partial(decode_chunk, batch.read, streams), error, make_error) from error
        except UnsupportedFormatError as error:
            raise UnsupportedFormatError(f"{batch.tensor.name!r} cannot be read: {error}") from error


def damaged_chunk(
    batch: ChunkBatch,
    block: Block,
    decode: Callable[[Block], object],
    error: CorruptCheckpointError,
    make_error: MakeError,
) -> Exception:
    """Return the error for a block that cannot be decoded. It names the first chunk that cannot be decoded.

    Args:
        decode: decodes a block of one chunk.
        error: what was raised for the whole block.
    """
    row, cause = block.row, error
    for chunk in (replace(block, row=at, count=1, counts=(), dims=()) for at in range(row, row + block.count)):
        try:
            decode(chunk)
        except CorruptCheckpointError as of_chunk:
            row, cause = chunk.row, of_chunk
            break
    return undecodable(batch, row, cause, make_error)


def undecodable(batch: ChunkBatch, row: int, cause: object, make_error: MakeError) -> Exception:
    """Return the error for the chunk in a row of a read."""
    return make_error(batch.tensor, f"chunk {batch.chunk_box(row - batch.rows.start)} cannot be decoded: {cause}")


def decode_chunk(read: ChunkReads, streams: list[StreamBytes], chunk: Block) -> None:
    """Decode a block of one chunk, and discard the values."""
    list(decode_block(read, chunk, streams, [1]))


def _place(batch: ChunkBatch, block: Block, streams: list[StreamBytes]) -> None:
    """Write the values of a block in parts that fit the cache. Write raw chunks that are not cast with one copy."""
    read, writer = batch.read, batch.open(block)
    in_one_copy = block.encoding in (_RAW, _PLAIN) and not writer.casts
    most = block.count if in_one_copy else max(1, MAX_PART_BYTES // (block.numel * read.itemsize))
    indexes, counts = parts_of(block.counts, most)
    for index, values in zip(indexes, decode_block(read, block, streams, counts), strict=True):
        batch.tensor.overwritten = True
        writer.write(index, values)


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


def arrived_streams(batch: ChunkBatch) -> list[StreamBytes]:
    """Return the bytes of each stream of a batch that has arrived."""
    found = []
    for stream, request in enumerate(batch.requests):
        assert request.data is not None
        found.append(StreamBytes.of(batch.read, batch.rows, stream, request.start, request.data))
    return found


def decode_block(read: ChunkReads, block: Block, streams: list[StreamBytes], counts: Sequence[int]) -> Iterable[Values]:
    """Decode a block.

    Args:
        counts: the number of chunks of each part.

    Returns:
        The values of each part: row-major, one chunk after another. They may be in scratch memory of this thread, which
        is valid until the next part.

    Raises:
        CorruptCheckpointError: the bytes cannot be decoded. Iterating over the values also raises it.
    """
    if block.encoding == _PLANES:
        return _decode_planes(read, block, streams, counts)
    data = streams[0].data[streams[0].range_of(block)]
    if block.encoding == _RAW or block.count > 1:
        values = _decode_raw(data, block.count * block.numel * read.itemsize, int(read.skipped[block.row]))
        if len(counts) == 1:
            return (values,)
        ends = (np.cumsum(counts) * block.numel * read.itemsize).tolist()
        return (values[begin:end] for begin, end in pairwise([0, *ends]))
    if block.encoding == _OPAQUE:
        return (decode_opaque(data, read.entry.dtype, block.sizes),)
    return (_decode_plain(read, block.row, np.frombuffer(data, np.uint8)),)


def _decode_planes(
    read: ChunkReads, block: Block, streams: list[StreamBytes], counts: Sequence[int]
) -> Iterator[Values]:
    planes = [stream.planes(read, block) for stream in streams]
    if len(planes) == 2:
        heads, tails = planes
        return decode_heads_and_tails(heads, tails, streams[1].ends[streams[1].rows(block)], counts)
    if read.heads_only:
        return decode_heads(planes[0], counts)
    return decode(planes[0], counts, read.entry.dtype)


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
