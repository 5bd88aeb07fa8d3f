"""How a shard is cut into chunks, and in which order they lie in the file.

The grid lies over the tensor, not over the shard, so that its lines fall where tensor parallelism will cut,
whatever saved the shard. Dimension d of n elements has `parts[d]` cells; cell i covers
[i * n // parts, (i + 1) * n // parts). A shard's chunks are the intersections of its box with the cells.

The chunks of a shard are ordered so that a cut of the dimension that is most likely to be cut is contiguous in the
file: the longer of the last two dimensions is outermost (up projections are colwise, down projections rowwise, and
each is longest where it is cut); of two equals, the last. Dimensions before those two (experts) go further out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .box import Box, IntArray

MAX_PARTS = 16
"""Cells of a dimension before refinement: the edges serve TP 2, 4, 8 and 16."""
FLOOR_BYTES = 64 * 1024
"""A cell smaller than this is merged with a neighbour: a chunk costs 12 bytes of manifest and one decoding."""
TARGET_BYTES = 1024 * 1024
"""A cell larger than this is cut further: a chunk is what has to be read for any part of it."""


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

    @classmethod
    def choose(cls, shape: tuple[int, ...], itemsize: int) -> Grid:
        """The grid for a tensor of this shape, with elements of `itemsize` bytes.

        Starts from 16 equal parts of each dimension; merges along the shortest cell edge while a cell is below
        64 KiB; cuts along the longest while it is above 1 MiB.
        """
        parts = [max(1, min(MAX_PARTS, n)) for n in shape]
        edges = [n / part for n, part in zip(shape, parts, strict=True)]
        while math.prod(edges) * itemsize < FLOOR_BYTES:
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
        return cls(shape, tuple(parts))

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
        """The first cell that each box meets in each dimension, and how many it meets.

        Args and returns: (n, ndim) arrays. An empty extent meets no cell.
        """
        extent = np.maximum(np.asarray(self.shape, dtype=np.int64), 1)
        parts = np.asarray(self.parts, dtype=np.int64)
        first = ((offsets + 1) * parts - 1) // extent
        last = ((offsets + sizes) * parts - 1) // extent
        return first, np.where(sizes > 0, last - first + 1, 0)

    def chunk_counts(self, offsets: IntArray, sizes: IntArray) -> IntArray:
        """How many chunks each of n shards has: (n, ndim) boxes to (n,) counts."""
        counts: IntArray = self.cells(offsets, sizes)[1].prod(axis=1, dtype=np.int64)
        return counts

    def split(self, shard: Box, most: int) -> list[Box]:
        """A shard as boxes of at most `most` elements, cut between chunks; one chunk may have more.

        The chunks of the boxes, one box after another, are those of the shard in file order.
        """
        if shard.numel <= most:
            return [shard]
        bounds = np.array([shard.offsets], np.int64), np.array([shard.sizes], np.int64)
        first, count = (column[0].tolist() for column in self.cells(*bounds))
        dim = next((d for d in self.order if count[d] > 1), None)
        if dim is None:
            return [shard]
        middle = (first[dim] + count[dim] // 2) * self.shape[dim] // self.parts[dim]
        offsets, sizes = list(shard.offsets), list(shard.sizes)
        sizes[dim] = middle - offsets[dim]
        low = Box(shard.offsets, tuple(sizes))
        offsets[dim], sizes[dim] = middle, shard.sizes[dim] - sizes[dim]
        high = Box(tuple(offsets), tuple(sizes))
        return self.split(low, most) + self.split(high, most)

    def chunks(self, shard: Box, within: Box | None = None) -> tuple[IntArray, IntArray, IntArray]:
        """The chunks of a shard, in file order; only those that meet `within`, where it is given.

        Returns: (n,) ordinals among the shard's chunks, (n, ndim) offsets in the tensor, (n, ndim) sizes.
        """
        ndim = len(self.shape)
        wanted = shard if within is None else shard.intersect(within)
        if wanted is None or wanted.numel == 0:
            return np.empty(0, np.int64), np.empty((0, ndim), np.int64), np.empty((0, ndim), np.int64)
        boxes = (
            np.array([shard.offsets, wanted.offsets], np.int64),
            np.array([shard.sizes, wanted.sizes], np.int64),
        )
        first, count = self.cells(*boxes)
        cells = [first[1, d] + np.arange(count[1, d]) for d in self.order]
        mesh = np.meshgrid(*cells, indexing="ij")
        ordinals = np.zeros(math.prod(count[1].tolist()), np.int64)
        offsets = np.empty((len(ordinals), ndim), np.int64)
        sizes = np.empty_like(offsets)
        for d, along in zip(self.order, mesh, strict=True):
            cell = along.reshape(-1)
            ordinals = ordinals * count[0, d] + (cell - first[0, d])
            start, stop = shard.offsets[d], shard.offsets[d] + shard.sizes[d]
            offsets[:, d] = np.maximum(cell * self.shape[d] // self.parts[d], start)
            sizes[:, d] = np.minimum((cell + 1) * self.shape[d] // self.parts[d], stop) - offsets[:, d]
        return ordinals, offsets, sizes
