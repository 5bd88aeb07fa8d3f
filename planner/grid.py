"""The chunk grid of a tensor: how its shards are cut into chunks, and the order of the chunks in an object.

The grid covers the whole tensor, not one shard. So its lines are where tensor parallelism cuts the tensor, whatever
layout saved it. Dimension d of n elements has `parts[d]` cells; cell i covers [i * n // parts, (i + 1) * n // parts).
The chunks of a shard are the intersections of its box with the cells.

Tensor parallelism usually cuts the longer of the last two dimensions: up projections are colwise, down projections
rowwise. So this dimension is the outermost one in the order of the chunks, and the part that one rank needs is
contiguous in the object. If both are equally long, the last one is outermost. The dimensions before those two (experts)
are further out. Small shards that share an object are interleaved by the eighths of their tensors, so that the parts of
all shards that one rank needs are contiguous, too. `benchmarks/bytes_read.py` measures how many unneeded bytes the grid
costs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .box import Box, IntArray, concat_ranges, intersect_pairs, unravel

INITIAL_PARTS = 16
"""The number of cells of a dimension before merging and cutting: the edges fit TP 2, 4, 8 and 16."""
FLOOR_BYTES = 64 * 1024
"""A smaller cell is merged with a neighbour: each chunk costs 12 bytes in the manifest and one call of the decoder."""
RAW_FLOOR_BYTES = 128 * 1024
"""The same for raw chunks. It is larger because a part of a raw chunk can be read alone."""
TARGET_BYTES = 1024 * 1024
"""A larger cell is cut further: an encoded chunk must be read as a whole, even if only a part of it is needed."""
EIGHTHS = 8
"""The number of parts by which small shards in one object are interleaved. What a rank of TP 2, 4 or 8 needs of all
these shards is then contiguous."""
SHARD_FLOOR_BYTES = 32 * 1024
"""If shards are so small that their chunks are smaller, cells are merged, but not to fewer than eighths."""
MIN_CHUNK_BYTES = 4 * 1024
"""Even smaller chunks are merged in any case: reading a part of a page takes as long as reading all of it."""
MAX_MERGED_BYTES = 2 * 1024 * 1024
"""A cell of more bytes is not merged, however small the chunks are: the format limits cells to 16 MiB."""


def cells(shapes: IntArray, parts: IntArray, offsets: IntArray, sizes: IntArray) -> tuple[IntArray, IntArray]:
    """Return the first cell that each box overlaps in each dimension, and the number of cells that it overlaps.

    Args:
        shapes, parts: (n, ndim) the shape and the grid of the tensor of each box, or (ndim,) for one tensor.
        offsets, sizes: (n, ndim) the boxes.

    Returns:
        Two (n, ndim) arrays. The number of cells is 0 in a dimension in which the box is empty.
    """
    extent = np.maximum(shapes, 1)
    first = ((offsets + 1) * parts - 1) // extent
    last = ((offsets + sizes) * parts - 1) // extent
    return first, np.where(sizes > 0, last - first + 1, 0)


def _merged_in_shards(
    parts: Sequence[int], shape: tuple[int, ...], shard: tuple[int, ...], itemsize: int
) -> Sequence[int]:
    """Return fewer parts of the dimensions in which a shard overlaps several cells, while its chunks are small."""
    merged = list(parts)
    while True:
        cell = [n / part for n, part in zip(shape, merged, strict=True)]
        edges = [min(*both) for both in zip(shard, cell, strict=True)]
        nbytes = math.prod(edges) * itemsize
        least = 2 if nbytes < MIN_CHUNK_BYTES else 2 * EIGHTHS
        spanned = [d for d, size in enumerate(shard) if size > cell[d] and merged[d] >= least]
        if nbytes >= SHARD_FLOOR_BYTES or math.prod(cell) * itemsize > MAX_MERGED_BYTES or not spanned:
            return merged
        merged[min(spanned, key=lambda d: (edges[d], -d))] //= 2


@dataclass(frozen=True, slots=True)
class Grid:
    """The chunk grid of one tensor."""

    shape: tuple[int, ...]
    """The global shape of the tensor."""
    parts: tuple[int, ...]
    """The number of cells in each dimension, at least 1."""

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.parts) or any(part < 1 for part in self.parts):
            raise ValueError(
                f"a grid needs one number of parts, at least 1, for each dimension: got parts {self.parts} for shape "
                f"{self.shape}"
            )

    @staticmethod
    @functools.lru_cache(maxsize=1024)  # the tensors of a model have few shapes
    def choose(
        shape: tuple[int, ...], itemsize: int, *, raw: bool = False, shard: tuple[int, ...] | None = None
    ) -> Grid:
        """Choose the grid for a tensor of this shape.

        The choice starts with 16 equal parts of each dimension. It merges cells along their shortest edge while a cell
        is smaller than 64 KiB (128 KiB for raw chunks), and cuts them along their longest edge while a cell is larger
        than 1 MiB. If many ranks save small shards, a chunk is the small part of a cell that a shard overlaps. So cells
        are merged further while a chunk is smaller than 32 KiB, but 8 parts of a dimension remain: tensor parallelism
        over 2, 4 or 8 ranks still cuts between chunks. Chunks of less than 4 KiB are merged in any case.

        Args:
            shape: the global shape.
            itemsize: bytes per element.
            raw: whether the chunks are raw, not encoded.
            shard: the sizes of the largest shard that is saved. Default: those of the tensor.
        """
        floor = RAW_FLOOR_BYTES if raw else FLOOR_BYTES
        parts = [max(1, min(INITIAL_PARTS, n)) for n in shape]
        edges = [n / part for n, part in zip(shape, parts, strict=True)]
        while math.prod(edges) * itemsize < floor:
            mergeable = [d for d, part in enumerate(parts) if part > 1]
            if not mergeable:
                break
            # If two edges are equal, merge the last dimension: colwise, the more common case, cuts the first one.
            shortest = min(mergeable, key=lambda d: (edges[d], -d))
            parts[shortest] //= 2
            edges[shortest] = shape[shortest] / parts[shortest]
        while math.prod(edges) * itemsize > TARGET_BYTES:
            longest = max(range(len(shape)), key=lambda d: (edges[d], -d))
            if edges[longest] <= 1:
                break
            parts[longest] *= 2
            edges[longest] = shape[longest] / parts[longest]
        return Grid(shape, tuple(parts if shard is None else _merged_in_shards(parts, shape, shard, itemsize)))

    @property
    def cell_numel(self) -> int:
        """The number of elements in the largest cell."""
        return math.prod(-(-n // part) for n, part in zip(self.shape, self.parts, strict=True))

    @property
    def order(self) -> tuple[int, ...]:
        """The dimensions from the outermost to the innermost, in the order of chunks in an object."""
        dims = list(range(len(self.shape)))
        if len(dims) >= 2 and self.shape[-1] >= self.shape[-2]:
            dims[-2:] = [dims[-1], dims[-2]]
        return tuple(dims)

    def cells(self, offsets: IntArray, sizes: IntArray) -> tuple[IntArray, IntArray]:
        """Apply the function `cells` to boxes of this tensor."""
        return cells(np.array(self.shape, np.int64), np.array(self.parts, np.int64), offsets, sizes)

    def split(self, shard: Box, max_numel: int) -> list[Box]:
        """Split a shard between chunks into boxes of at most `max_numel` elements. A box of one chunk may have more.

        The chunks of all boxes, one box after another, are the chunks of the shard in the order of the object.
        """
        if shard.numel <= max_numel:
            return [shard]
        first, count = (column[0].tolist() for column in self.cells(*shard.columns))
        dim = next((d for d in self.order if count[d] > 1), None)
        if dim is None:
            return [shard]
        middle = (first[dim] + count[dim] // 2) * self.shape[dim] // self.parts[dim]
        begin, end = shard.offsets[dim], shard.offsets[dim] + shard.sizes[dim]
        low, high = shard.with_extent(dim, begin, middle), shard.with_extent(dim, middle, end)
        return self.split(low, max_numel) + self.split(high, max_numel)

    def eighths(self, shard: Box) -> list[tuple[int, Box]]:
        """Cut a shard along its outermost dimension into the eighths of the tensor.

        Cuts are at lines of the grid. If an eighth does not end at such a line, neighbouring eighths form one part.

        Returns:
            The number of the eighth and the box of each part. The chunks of all parts, one part after another, are the
            chunks of the shard in the order of the object.
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
        """Return the chunks of a shard, in the order of the object.

        Args:
            shard: the box of the shard.
            within: return only the chunks that overlap this box.

        Returns:
            (n,) positions among the chunks of the shard, (n, ndim) offsets in the tensor, (n, ndim) sizes.
        """
        return self.chunks_of_many(*shard.columns, *(within or Box.whole(self.shape)).columns)[1:]

    def chunks_of_many(
        self, offsets: IntArray, sizes: IntArray, within_offsets: IntArray, within_sizes: IntArray
    ) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Return the chunks of m shards that overlap a box: shard after shard, each in the order of the object.

        Args:
            offsets, sizes: (m, ndim) the shards.
            within_offsets, within_sizes: (m, ndim) one box for each shard, or (1, ndim) one box for all.

        Returns:
            (n,) the shard of each chunk, (n,) its position among the chunks of that shard, (n, ndim) its offsets in the
            tensor, (n, ndim) its sizes.
        """
        meeting_offsets, meeting_sizes = intersect_pairs(offsets, sizes, within_offsets, within_sizes)
        meeting_sizes = np.where((meeting_sizes > 0).all(axis=1, keepdims=True), meeting_sizes, 0)
        first, count = self.cells(offsets, sizes)
        first_met, count_met = self.cells(meeting_offsets, meeting_sizes)
        chunks = count_met.prod(axis=1, dtype=np.int64)
        shards = np.repeat(np.arange(len(chunks)), chunks)
        # Number the chunks of each shard that overlap the box, and convert each number to the coordinates of its cell.
        cells = unravel(concat_ranges(0, chunks), count_met, shards, self.order) + first_met[shards]
        ordinals = np.zeros(len(shards), np.int64)
        for d in self.order:
            ordinals = ordinals * count[shards, d] + cells[:, d] - first[shards, d]
        shape, parts = np.array(self.shape, np.int64), np.array(self.parts, np.int64)
        starts = np.maximum(cells * shape // parts, offsets[shards])
        stops = np.minimum((cells + 1) * shape // parts, (offsets + sizes)[shards])
        return shards, ordinals, starts, stops - starts
