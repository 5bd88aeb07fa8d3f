"""A box: the axis-aligned part of a tensor that a shard, a chunk or a read covers. The only geometry there is.

Offsets and sizes are in elements, one for each dimension, as in DCP's `ChunkStorageMetadata`.
The functions over arrays do the same for many boxes at once: row i of an (n, ndim) array is box i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Box:
    """A half-open box: in dimension d it covers [offsets[d], offsets[d] + sizes[d])."""

    offsets: tuple[int, ...]
    """Where it starts, in elements of the tensor."""
    sizes: tuple[int, ...]
    """How far it extends, in elements; 0 makes it empty."""

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sizes):
            raise ValueError(f"offsets {self.offsets} and sizes {self.sizes} differ in length")
        if any(offset < 0 for offset in self.offsets) or any(size < 0 for size in self.sizes):
            raise ValueError(f"a box cannot be negative: offsets {self.offsets}, sizes {self.sizes}")

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """The box that covers a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def ndim(self) -> int:
        return len(self.sizes)

    @property
    def numel(self) -> int:
        """Elements inside; 1 for a box of no dimensions (a scalar)."""
        return math.prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index: `tensor[box.slices]`."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it lies inside a tensor of this shape."""
        return len(shape) == self.ndim and all(
            o + s <= n for o, s, n in zip(self.offsets, self.sizes, shape, strict=True)
        )

    def intersect(self, other: Box) -> Box | None:
        """What both cover, or None where that is empty."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        stops = (
            min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(stop - offset for stop, offset in zip(stops, offsets, strict=True))
        return Box(offsets, sizes) if all(size > 0 for size in sizes) else None

    @property
    def columns(self) -> tuple[IntArray, IntArray]:
        """The box as one of many: (1, ndim) offsets and sizes."""
        return np.array([self.offsets], np.int64), np.array([self.sizes], np.int64)

    def with_extent(self, dim: int, begin: int, end: int) -> Box:
        """The same box, but [begin, end) in one dimension."""
        offsets, sizes = list(self.offsets), list(self.sizes)
        offsets[dim], sizes[dim] = begin, end - begin
        return Box(tuple(offsets), tuple(sizes))

    def relative_to(self, origin: Box) -> Box:
        """The same box, with offsets counted from those of `origin`."""
        return Box(tuple(a - b for a, b in zip(self.offsets, origin.offsets, strict=True)), self.sizes)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{s.start}:{s.stop}" for s in self.slices) + "]"


def columns_equal(a: object, b: object) -> bool:
    """Whether two values of one dataclass have the same fields, arrays compared by their elements."""
    if type(a) is not type(b):
        return False
    names = [field.name for field in fields(a)]  # type: ignore[arg-type]
    pairs = ((getattr(a, name), getattr(b, name)) for name in names)
    return all(np.array_equal(x, y) if isinstance(x, np.ndarray) else bool(x == y) for x, y in pairs)


def intersect_many(offsets: IntArray, sizes: IntArray, box: Box) -> tuple[IntArray, IntArray]:
    """The intersection of each of n boxes with `box`.

    Args and returns: (n, ndim) offsets and sizes. Where a box does not meet `box`, a size is 0 or less.
    """
    return intersect_pairs(offsets, sizes, *box.columns)


def intersect_pairs(
    offsets: IntArray, sizes: IntArray, other_offsets: IntArray, other_sizes: IntArray
) -> tuple[IntArray, IntArray]:
    """The intersection of each of n boxes with another: (n, ndim) offsets and sizes, as above."""
    starts = np.maximum(offsets, other_offsets)
    stops = np.minimum(offsets + sizes, other_offsets + other_sizes)
    return starts, stops - starts


def concat_ranges(begins: IntArray | int, counts: IntArray) -> IntArray:
    """The integers of ranges, one range after another: counts[i] of them from begins[i] on."""
    before = np.cumsum(counts) - counts
    every: IntArray = np.arange(int(counts.sum())) + np.repeat(begins - before, counts)
    return every


def unravel(ordinals: IntArray, counts: IntArray, grids: IntArray, order: Sequence[int]) -> IntArray:
    """Ordinals of cells, as places in their grids.

    Args:
        ordinals: (n,)
        counts: (m, ndim) the cells of m grids in each dimension.
        grids: (n,) which of them each ordinal is of.
        order: the dimensions, from the outermost to the innermost.

    Returns: (n, ndim)
    """
    places = np.empty((len(ordinals), counts.shape[1]), np.int64)
    left = ordinals
    for d in reversed(order):
        count = counts[grids, d]
        places[:, d] = left % count
        left = left // count
    return places


def box_slices(offsets: IntArray, sizes: IntArray) -> list[tuple[slice, ...]]:
    """Boxes as indexes of a tensor: (n, ndim) offsets and sizes to n tuples of slices."""
    stops = (offsets + sizes).tolist()
    return [tuple(map(slice, begin, end)) for begin, end in zip(offsets.tolist(), stops, strict=True)]
