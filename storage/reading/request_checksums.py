"""Compares the bytes of requests with their checksums."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...planner.box import IntArray, concat_ranges
from ...planner.index import CheckpointIndex
from ..runtime.checksums import checksum
from .tasks import ChunkBatch, ChunkRange, Request


class RequestChecksums:
    """Computes the checksums of a request while its bytes arrive, so that they are still in the CPU's cache.

    Chunks of other formats have no checksums. For them, only the length is checked.
    """

    def __init__(self, request: Request, index: CheckpointIndex) -> None:
        self._request = request
        self._parts = [_Checked.of(batch, stream, request.start, index) for batch, stream in request.parts]
        columns = [(part.begins, part.ends, part.expected) for part in self._parts]
        begins, ends, expected = columns[0] if len(columns) == 1 else map(np.concatenate, zip(*columns, strict=True))
        order = ends.argsort(kind="stable")  # the bytes of a shard may be before those of a shard with a lower offset
        # In the order in which the bytes arrive: `_ends` ascends.
        self._begins: list[int] = begins[order].tolist()
        self._ends: list[int] = ends[order].tolist()
        self._expected: list[int] = expected[order].tolist()
        self._found: list[int] = []
        self._done = 0
        """The number of checksums that have been computed."""

    def update(self, data: memoryview, nbytes: int) -> None:
        """Compute the checksums of the bytes that have arrived.

        Args:
            data: the buffer for the bytes of the request.
            nbytes: the number of bytes in it.
        """
        begin, self._done = self._done, bisect_right(self._ends, nbytes, self._done)
        part = slice(begin, self._done)
        self._found += map(checksum, map(data.__getitem__, map(slice, self._begins[part], self._ends[part])))

    def is_intact(self, data: memoryview) -> bool:
        """Return whether all bytes have arrived and match their checksums, after `update` has been called with all.

        Args:
            data: the bytes that have arrived.
        """
        return self._found == self._expected and len(data) == self._request.nbytes

    def damaged_chunks(self, data: memoryview) -> list[ChunkRange]:
        """Return the chunks that are damaged or missing, after `update` has been called with all bytes.

        Args:
            data: the bytes that have arrived.
        """
        if self.is_intact(data):
            return []
        return [chunk for part in self._parts for chunk in part.damaged_chunks(data)]


def damaged_chunks(request: Request, index: CheckpointIndex, data: memoryview) -> list[ChunkRange]:
    """Return the chunks of a request that are damaged or missing.

    Args:
        data: the bytes of the request. They may be fewer than requested.
    """
    check = RequestChecksums(request, index)
    check.update(data, len(data))
    return check.damaged_chunks(data)


@dataclass(frozen=True, slots=True, eq=False)
class _Checked:
    """The byte ranges of one stream of a batch that have a checksum: chunks, or pages of partly read chunks."""

    batch: ChunkBatch
    stream: int
    start: int
    """The position in the object at which the bytes of the request begin."""
    chunks: IntArray
    """(c,) the chunk of each byte range, counted in the batch."""
    begins: IntArray
    ends: IntArray
    """(c,) the byte range [begin, end) in the bytes of the request."""
    expected: npt.NDArray[np.uint64]
    """(c,) the checksums."""

    @classmethod
    def of(cls, batch: ChunkBatch, stream: int, start: int, index: CheckpointIndex) -> _Checked:
        read, rows = batch.read, batch.rows
        counts = read.checksum_counts[rows]
        begins, ends = read.starts[rows, stream] - start, read.stops[rows, stream] - start
        chunks, firsts = np.arange(len(counts)), read.checksums[rows, stream]
        if not read.has_one_checksum_each:
            page_bytes = read.entry.page_bytes
            pages, of_pages = concat_ranges(0, counts), counts.repeat(counts) > 1
            chunks = chunks.repeat(counts)
            begins, last = begins[chunks] + pages * page_bytes, ends[chunks]
            ends = np.where(of_pages, np.minimum(begins + page_bytes, last), last)
            firsts = firsts[chunks] + pages
        return cls(batch, stream, start, chunks, begins, ends, index.checksums[firsts])

    def damaged_chunks(self, data: memoryview) -> list[ChunkRange]:
        """Return the chunks that do not match their checksums or are not in `data`."""
        batch = self.batch
        starts = batch.read.starts[batch.rows, self.stream]
        damaged = starts - self.start + batch.read.fetched_bytes(batch.rows)[:, self.stream] > len(data)
        views = map(data.__getitem__, map(slice, self.begins.tolist(), self.ends.tolist()))
        found = np.fromiter(map(checksum, views), np.uint64, len(self.begins))
        damaged[self.chunks[found != self.expected]] = True
        return [
            ChunkRange(
                batch.tensor,
                batch.chunk_box(i),
                int(starts[i]),
                int(batch.read.stops[batch.rows.start + i, self.stream]),
            )
            for i in np.flatnonzero(damaged).tolist()
        ]
