"""How a shard is cut into chunks, and in which order they lie in the file.

The grid lies over the tensor, not over the shard, so that its lines fall where tensor parallelism will cut,
whatever saved the shard. Dimension d of n elements has `parts[d]` cells; cell i covers
[i * n // parts, (i + 1) * n // parts). A shard's chunks are the intersections of its box with the cells.

The chunks of a shard are ordered so that a cut of the dimension that is most likely to be cut is contiguous in the
file: the longer of the last two dimensions is outermost (up projections are colwise, down projections rowwise, and
each is longest where it is cut); of two equals, the last. Dimensions before those two (experts) go further out.
Small shards that lie together are taken apart by the eighths of their tensors: what a rank of tensor parallelism needs
of all of them is then contiguous, too.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .box import Box, IntArray, concat_ranges, intersect_pairs, unravel

INITIAL_PARTS = 16
"""Cells of a dimension before refinement: the edges serve TP 2, 4, 8 and 16."""
FLOOR_BYTES = 64 * 1024
"""A cell smaller than this is merged with a neighbour: a chunk costs 12 bytes of manifest and one decoding."""
RAW_FLOOR_BYTES = 128 * 1024
"""The same of raw chunks, of which a part can be read: fewer of them are as good for a rank that needs a few rows."""
TARGET_BYTES = 1024 * 1024
"""A cell larger than this is cut further: a chunk is what has to be read for any part of it."""
EIGHTHS = 8
"""Parts of a tensor by which shards lie together in a file: what a rank of TP 2, 4 or 8 needs of all is one run."""


def cells(shapes: IntArray, parts: IntArray, offsets: IntArray, sizes: IntArray) -> tuple[IntArray, IntArray]:
    """The first cell that each box meets in each dimension, and how many it meets: none, where its extent is empty.

    Args and returns: (n, ndim) arrays; shapes and parts may also be (ndim,), those of one tensor.
    """
    extent = np.maximum(shapes, 1)
    first = ((offsets + 1) * parts - 1) // extent
    last = ((offsets + sizes) * parts - 1) // extent
    return first, np.where(sizes > 0, last - first + 1, 0)


@dataclass(frozen=True, slots=True)
class Grid:
    """The chunk grid of one tensor."""

    shape: tuple[int, ...]
    """The tensor's global shape."""
    parts: tuple[int, ...]
    """Cells in each dimension, 1 or more."""

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.parts) or any(part < 1 for part in self.parts):
            raise ValueError(f"parts {self.parts} do not make a grid over shape {self.shape}")

    @staticmethod
    @functools.lru_cache(maxsize=1024)  # the tensors of a model have few shapes
    def choose(shape: tuple[int, ...], itemsize: int, *, raw: bool = False) -> Grid:
        """The grid for a tensor of this shape, with elements of `itemsize` bytes, whose chunks are `raw` or encoded.

        Starts from 16 equal parts of each dimension; merges along the shortest cell edge while a cell is below
        64 KiB, of raw chunks below 128 KiB; cuts along the longest while it is above 1 MiB.
        """
        floor = RAW_FLOOR_BYTES if raw else FLOOR_BYTES
        parts = [max(1, min(INITIAL_PARTS, n)) for n in shape]
        edges = [n / part for n, part in zip(shape, parts, strict=True)]
        while math.prod(edges) * itemsize < floor:
            mergeable = [d for d, part in enumerate(parts) if part > 1]
            if not mergeable:
                break
            # Of two equal edges the last dimension is merged: colwise cuts the first, and is the more frequent.
            shortest = min(mergeable, key=lambda d: (edges[d], -d))
            parts[shortest] //= 2
            edges[shortest] = shape[shortest] / parts[shortest]
        while math.prod(edges) * itemsize > TARGET_BYTES:
            longest = max(range(len(shape)), key=lambda d: (edges[d], -d))
            if edges[longest] <= 1:
                break
            parts[longest] *= 2
            edges[longest] = shape[longest] / parts[longest]
        return Grid(shape, tuple(parts))

    @property
    def cell_numel(self) -> int:
        """Elements in the largest cell."""
        return math.prod(-(-n // part) for n, part in zip(self.shape, self.parts, strict=True))

    @property
    def order(self) -> tuple[int, ...]:
        """The dimensions from the outermost to the innermost in the file."""
        dims = list(range(len(self.shape)))
        if len(dims) >= 2 and self.shape[-1] >= self.shape[-2]:
            dims[-2:] = [dims[-1], dims[-2]]
        return tuple(dims)

    def cells(self, offsets: IntArray, sizes: IntArray) -> tuple[IntArray, IntArray]:
        """`cells` of this grid."""
        return cells(np.array(self.shape, np.int64), np.array(self.parts, np.int64), offsets, sizes)

    def split(self, shard: Box, most: int) -> list[Box]:
        """A shard as boxes of at most `most` elements, cut between chunks; one chunk may have more.

        The chunks of the boxes, one box after another, are those of the shard in file order.
        """
        if shard.numel <= most:
            return [shard]
        first, count = (column[0].tolist() for column in self.cells(*shard.columns))
        dim = next((d for d in self.order if count[d] > 1), None)
        if dim is None:
            return [shard]
        middle = (first[dim] + count[dim] // 2) * self.shape[dim] // self.parts[dim]
        begin, end = shard.offsets[dim], shard.offsets[dim] + shard.sizes[dim]
        low, high = shard.with_extent(dim, begin, middle), shard.with_extent(dim, middle, end)
        return self.split(low, most) + self.split(high, most)

    def eighths(self, shard: Box) -> list[tuple[int, Box]]:
        """A shard cut where the tensor's eighths end, in its outermost dimension: each part with the eighth it is of.

        They end at lines of the grid: where it has fewer there, or others, some eighths are one part. The parts, one
        after another, have the chunks of the shard in file order.
        """
        dim = next((d for d in self.order if self.parts[d] > 1), None)
        if dim is None:
            return [(0, shard)]
        count = math.gcd(self.parts[dim], EIGHTHS)
        lines = [self.shape[dim] * i // count for i in range(count + 1)]
        found = []
        for at, (low, high) in enumerate(pairwise(lines)):
            begin, end = max(low, shard.offsets[dim]), min(high, shard.offsets[dim] + shard.sizes[dim])
            if begin < end:
                found.append((at * EIGHTHS // count, shard.with_extent(dim, begin, end)))
        return found

    def chunks(self, shard: Box, within: Box | None = None) -> tuple[IntArray, IntArray, IntArray]:
        """The chunks of a shard, in file order; only those that meet `within`, where it is given.

        Returns: (n,) ordinals among the shard's chunks, (n, ndim) offsets in the tensor, (n, ndim) sizes.
        """
        return self.chunks_of_many(*shard.columns, *(within or Box.whole(self.shape)).columns)[1:]

    def chunks_of_many(
        self, offsets: IntArray, sizes: IntArray, within_offsets: IntArray, within_sizes: IntArray
    ) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """The chunks of m shards that meet a box each: shard after shard, each in file order.

        Args:
            offsets, sizes: (m, ndim) the shards.
            within_offsets, within_sizes: (m, ndim) the boxes, or (1, ndim), one for all.

        Returns: (n,) the shard of each chunk, (n,) its ordinal among that shard's chunks, (n, ndim) its offsets in
        the tensor, (n, ndim) its sizes.
        """
        meeting_offsets, meeting_sizes = intersect_pairs(offsets, sizes, within_offsets, within_sizes)
        meeting_sizes = np.where((meeting_sizes > 0).all(axis=1, keepdims=True), meeting_sizes, 0)
        first, count = self.cells(offsets, sizes)
        first_met, count_met = self.cells(meeting_offsets, meeting_sizes)
        chunks = count_met.prod(axis=1, dtype=np.int64)
        shards = np.repeat(np.arange(len(chunks)), chunks)
        # A chunk's number among those of its shard that meet the box, taken apart into its cell in each dimension.
        cells = unravel(concat_ranges(0, chunks), count_met, shards, self.order) + first_met[shards]
        ordinals = np.zeros(len(shards), np.int64)
        for d in self.order:
            ordinals = ordinals * count[shards, d] + cells[:, d] - first[shards, d]
        shape, parts = np.array(self.shape, np.int64), np.array(self.parts, np.int64)
        starts = np.maximum(cells * shape // parts, offsets[shards])
        stops = np.minimum((cells + 1) * shape // parts, (offsets + sizes)[shards])
        return shards, ordinals, starts, stops - starts
