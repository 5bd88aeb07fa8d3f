"""Partition an index into regions, so that a rank can read a part of the manifest.

A region is a part of a tensor: see `regions.py`. If a segment overlaps several regions, it is cut into several
segments. A rank of tensor parallelism needs a range of one dimension, usually the longest. So the regions result from
halving the tensor along its longest edge, as long as few segments are added in proportion to the number of chunks.
`benchmarks/planner.py` measures what a rank reads of the manifest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .box import Box, IntArray, concat_ranges
from .entries import Segments, Stream
from .grid import Grid
from .index import CheckpointIndex
from .regions import MAX_REGIONS, Regions

MIN_CHUNKS_PER_SEGMENT = 8
"""Cutting adds at most one segment per this many chunks. A segment of a matrix takes 50 bytes of manifest, eight chunks
take 96."""
MAX_CACHED_CUTS = 32
"""The size of the caches: the layers of a model were cut in the same way, so the result for one serves all of them."""


@dataclass(frozen=True, slots=True)
class _Saved:
    """How a tensor was saved: its grid, and its segments as bytes, so that it can be a key of a cache."""

    grid: Grid
    streams: bytes
    boxes: bytes
    """The offsets of all segments of the tensor, followed by their sizes."""

    @classmethod
    def of(cls, index: CheckpointIndex, position: int) -> _Saved:
        streams = index.segments.streams[index.segments_of(position)]
        boxes = np.stack(index.segment_boxes(position))
        return cls(index.entries[position].grid, streams.tobytes(), boxes.tobytes())

    @property
    def columns(self) -> tuple[IntArray, IntArray]:
        """The (n, ndim) offsets and sizes."""
        offsets, sizes = np.frombuffer(self.boxes, np.int64).reshape(2, len(self.streams), len(self.grid.shape))
        return offsets, sizes

    def chunks(self, offsets: IntArray, sizes: IntArray) -> IntArray:
        """Return the number of chunks of each box."""
        counts: IntArray = self.grid.cells(offsets, sizes)[1].prod(axis=1, dtype=np.int64)
        return counts


def choose_regions(index: CheckpointIndex, counts: Sequence[int]) -> list[tuple[int, ...]]:
    """Choose into how many parts to cut each dimension of each entry, for `counts[i]` regions of entry i or fewer."""
    choose = functools.lru_cache(MAX_CACHED_CUTS)(_choose)
    return [
        choose(_Saved.of(index, position), min(count, MAX_REGIONS)) if count > 1 else (1,) * len(entry.shape)
        for position, (entry, count) in enumerate(zip(index.entries, counts, strict=True))
    ]


def _choose(saved: _Saved, count: int) -> tuple[int, ...]:
    grid = saved.grid
    most = len(saved.streams) + int(saved.chunks(*saved.columns).sum()) // MIN_CHUNKS_PER_SEGMENT
    parts = (1,) * len(grid.shape)
    while math.prod(parts) < count:
        for d in sorted(grid.order, key=lambda d: -grid.shape[d] / parts[d]):
            halved = (*parts[:d], parts[d] * 2, *parts[d + 1 :])
            if grid.parts[d] % halved[d] == 0 and len(_pieces(saved, halved)[0]) <= most:
                parts = halved
                break
        else:
            break
    return parts


def partition(index: CheckpointIndex, parts: Sequence[tuple[int, ...]]) -> CheckpointIndex:
    """Return the same index with its tensors partitioned into regions.

    Args:
        index: an index in which each entry is one region.
        parts: the number of parts into which each dimension of each entry is cut.
    """
    cut_alike = functools.lru_cache(MAX_CACHED_CUTS)(_cut_segments)
    cuts = [cut_alike(_Saved.of(index, position), of_one) for position, of_one in enumerate(parts)]
    old = index.segments
    rows = np.concatenate([cut.rows + index.segments_of(position).start for position, cut in enumerate(cuts)])
    moved = [_moved(index, position, cut) for position, cut in enumerate(cuts)]
    starts, lengths, checksums = (np.concatenate(columns) for columns in zip(*moved, strict=True))
    segments = Segments(
        entries=old.entries[rows],
        streams=old.streams[rows],
        encodings=old.encodings[rows],
        objects=old.objects[rows],
        starts=starts,
        offsets=np.concatenate([cut.offsets.reshape(-1) for cut in cuts]),
        sizes=np.concatenate([cut.sizes.reshape(-1) for cut in cuts]),
    )
    regions = Regions(
        tuple(parts),
        np.repeat(np.arange(len(cuts)), [len(cut.regions) for cut in cuts]),
        np.concatenate([np.arange(len(cut.regions)) for cut in cuts]),
        np.concatenate([cut.regions for cut in cuts]),
    )
    return CheckpointIndex(index.entries, index.objects, segments, lengths, checksums, regions, index.whole_checksums)


def _moved(
    index: CheckpointIndex, position: int, cut: _Cut
) -> tuple[IntArray, npt.NDArray[np.uint32] | IntArray, npt.NDArray[np.uint64]]:
    """Return the starts of the new segments of an entry, and the lengths and checksums of all their chunks."""
    segments, chunks = index.segments_of(position), index.chunks_of(position)
    first, last = index.first_checksum[[segments.start, segments.stop]].tolist()
    starts, lengths, checksums = index.segments.starts[segments], index.lengths[chunks], index.checksums[first:last]
    if len(cut.regions) == 1:
        return starts, lengths, checksums
    before = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    opens = index.first_chunk[segments] - chunks.start
    counts = index.checksum_counts(np.arange(segments.start, segments.stop), lengths.astype(np.int64))
    moved = concat_ranges((np.cumsum(counts) - counts)[cut.chunks], counts[cut.chunks])
    return starts[cut.rows] + before[cut.first] - before[opens[cut.rows]], lengths[cut.chunks], checksums[moved]


@dataclass(frozen=True, slots=True)
class _Cut:
    """The new segments of an entry, in columns, region after region. Old segments and chunks count from the entry's
    first."""

    rows: IntArray
    """(n,) the old segment that each new one is a part of."""
    first: IntArray
    """(n,) the first chunk of each."""
    chunks: IntArray
    """The chunks of all new segments, segment after segment."""
    offsets: IntArray
    sizes: IntArray
    regions: IntArray
    """The number of new segments in each region."""


def _cut_segments(saved: _Saved, parts: tuple[int, ...]) -> _Cut:
    grid = saved.grid
    shards, offsets, sizes = _pieces(saved, parts)
    counts = saved.chunks(offsets, sizes)
    first = np.cumsum(counts) - counts
    corner, shape = (np.broadcast_to(column, offsets.shape) for column in Box.whole(grid.shape).columns)
    regions = Grid(grid.shape, parts).chunks_of_many(corner, shape, offsets, sizes)[1]  # each piece overlaps one region
    # The segment of the tails follows the segment of the heads of the same box.
    streams = np.frombuffer(saved.streams, np.uint8)[shards]
    pieces = np.arange(len(shards)) - np.searchsorted(shards, shards)
    order = np.lexsort((streams, pieces, shards - (streams == Stream.TAIL), regions))
    chunks, of_region = concat_ranges(first[order], counts[order]), np.bincount(regions, minlength=math.prod(parts))
    return _Cut(shards[order], first[order], chunks, offsets[order], sizes[order], of_region)


def _pieces(saved: _Saved, parts: tuple[int, ...]) -> tuple[IntArray, IntArray, IntArray]:
    """Cut shards into pieces so that each piece is in one region and its chunks are consecutive chunks of its shard.

    Returns:
        (n,) the shard of each piece, (n, ndim) offsets and sizes; shard after shard, in the order of its chunks.
    """
    grid, (offsets, sizes) = saved.grid, saved.columns
    met = Grid(grid.shape, parts).cells(offsets, sizes)[1]
    # Find the innermost dimension in which a shard overlaps several regions. In all dimensions further out, a piece
    # must be one chunk wide, or its chunks would not be consecutive.
    innermost = np.full(len(offsets), -1)
    for level, d in enumerate(grid.order):
        innermost[met[:, d] > 1] = level
    found: list[tuple[IntArray, IntArray, IntArray]] = []
    for level in np.unique(innermost).tolist():
        rows = np.flatnonzero(innermost == level)
        coarse = [1] * len(parts)
        for outer in grid.order[: max(level, 0)]:
            coarse[outer] = grid.parts[outer]
        if level >= 0:
            coarse[grid.order[level]] = parts[grid.order[level]]
        lines, whole = Grid(grid.shape, tuple(coarse)), Box.whole(grid.shape)
        of, _, piece_offsets, piece_sizes = lines.chunks_of_many(offsets[rows], sizes[rows], *whole.columns)
        found.append((rows[of], piece_offsets, piece_sizes))
    if not found:
        return np.empty(0, np.int64), offsets, sizes
    shards, all_offsets, all_sizes = (np.concatenate(columns) for columns in zip(*found, strict=True))
    order = np.argsort(shards, kind="stable")
    return shards[order], all_offsets[order], all_sizes[order]
