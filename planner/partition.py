"""An index cut into regions, that its manifest may be read in parts: one segment becomes several where it has to.

A rank of tensor parallelism wants a range of one dimension, most likely of the longest. So regions are made by halving
the tensor along its longest edge, as long as the segments that this adds stay few beside the chunks.
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
"""Cutting adds at most one segment for so many chunks: a segment of a matrix takes 50 bytes, so many chunks take 96."""
MAX_CACHED_CUTS = 32
"""How many kinds of tensors are remembered meanwhile: the layers of a model were cut alike, and are cut alike here."""


@dataclass(frozen=True, slots=True)
class _Saved:
    """How a tensor was saved."""

    grid: Grid
    streams: bytes
    boxes: bytes
    """The offsets of all its segments, then the sizes."""

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
        """How many each box has."""
        counts: IntArray = self.grid.cells(offsets, sizes)[1].prod(axis=1, dtype=np.int64)
        return counts


def choose_regions(index: CheckpointIndex, counts: Sequence[int]) -> list[tuple[int, ...]]:
    """In how many parts to cut each dimension of each entry, to have so many regions of it, as far as that can be."""
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
    """The same index in regions, with all of them.

    Args:
        index: each entry one region.
        parts: in how many to cut each dimension of each entry.
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
    return CheckpointIndex(index.entries, index.objects, segments, lengths, checksums, regions)


def _moved(
    index: CheckpointIndex, position: int, cut: _Cut
) -> tuple[IntArray, npt.NDArray[np.uint32] | IntArray, npt.NDArray[np.uint64]]:
    """The starts of an entry's new segments, and the lengths and the checksums of all their chunks."""
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
    """The segments that those of an entry become, in columns, region after region. Counted from the entry's first."""

    rows: IntArray
    """The segment that each is part of."""
    first: IntArray
    """Its first chunk."""
    chunks: IntArray
    """All its chunks, segment after segment."""
    offsets: IntArray
    sizes: IntArray
    regions: IntArray
    """How many segments each region has."""


def _cut_segments(saved: _Saved, parts: tuple[int, ...]) -> _Cut:
    grid = saved.grid
    shards, offsets, sizes = _pieces(saved, parts)
    counts = saved.chunks(offsets, sizes)
    first = np.cumsum(counts) - counts
    corner, shape = (np.broadcast_to(column, offsets.shape) for column in Box.whole(grid.shape).columns)
    regions = Grid(grid.shape, parts).chunks_of_many(corner, shape, offsets, sizes)[1]  # each piece meets one
    # A tail comes right after the head of the same box.
    streams = np.frombuffer(saved.streams, np.uint8)[shards]
    pieces = np.arange(len(shards)) - np.searchsorted(shards, shards)
    order = np.lexsort((streams, pieces, shards - (streams == Stream.TAIL), regions))
    chunks, of_region = concat_ranges(first[order], counts[order]), np.bincount(regions, minlength=math.prod(parts))
    return _Cut(shards[order], first[order], chunks, offsets[order], sizes[order], of_region)


def _pieces(saved: _Saved, parts: tuple[int, ...]) -> tuple[IntArray, IntArray, IntArray]:
    """The shards cut so that each piece lies in one region, and its chunks are a run of those of its shard.

    Returns: (n,) the shard of each piece, (n, ndim) offsets and sizes; shard after shard, in the order of its chunks.
    """
    grid, (offsets, sizes) = saved.grid, saved.columns
    met = Grid(grid.shape, parts).cells(offsets, sizes)[1]
    # Of the dimensions in which a shard meets several regions, the innermost: in all further out, a piece is one chunk.
    innermost = np.full(len(offsets), -1)
    for place, d in enumerate(grid.order):
        innermost[met[:, d] > 1] = place
    found: list[tuple[IntArray, IntArray, IntArray]] = []
    for place in np.unique(innermost).tolist():
        rows = np.flatnonzero(innermost == place)
        coarse = [1] * len(parts)
        for outer in grid.order[: max(place, 0)]:
            coarse[outer] = grid.parts[outer]
        if place >= 0:
            coarse[grid.order[place]] = parts[grid.order[place]]
        lines, whole = Grid(grid.shape, tuple(coarse)), Box.whole(grid.shape)
        of, _, piece_offsets, piece_sizes = lines.chunks_of_many(offsets[rows], sizes[rows], *whole.columns)
        found.append((rows[of], piece_offsets, piece_sizes))
    if not found:
        return np.empty(0, np.int64), offsets, sizes
    shards, all_offsets, all_sizes = (np.concatenate(columns) for columns in zip(*found, strict=True))
    order = np.argsort(shards, kind="stable")
    return shards[order], all_offsets[order], all_sizes[order]
