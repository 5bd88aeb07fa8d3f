"""Boxes: rectangular parts of tensors, which shards, chunks and reads cover.

Offsets and sizes are in elements, one per dimension, as in DCP's `ChunkStorageMetadata`. The functions over arrays work
on many boxes at once: row i of an (n, ndim) array is box i.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a tensor: it covers [offsets[d], offsets[d] + sizes[d]) in dimension d."""

    offsets: tuple[int, ...]
    """The first element, counted in the tensor."""
    sizes: tuple[int, ...]
    """The number of elements. A size of 0 makes the box empty."""

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sizes):
            raise ValueError(f"a box needs as many offsets as sizes, got offsets {self.offsets} and sizes {self.sizes}")
        if any(offset < 0 for offset in self.offsets) or any(size < 0 for size in self.sizes):
            raise ValueError(
                f"a box cannot have negative offsets or sizes, got offsets {self.offsets} and sizes {self.sizes}"
            )

    @staticmethod
    def whole(shape: Iterable[int]) -> Box:
        """Return the box that covers a tensor of this shape."""
        return _whole(tuple(map(int, shape)))

    @property
    def ndim(self) -> int:
        return len(self.sizes)

    @property
    def numel(self) -> int:
        """The number of elements inside. It is 1 for a box without dimensions (a scalar)."""
        return math.prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index: `tensor[box.slices]`."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether the box is inside a tensor of this shape."""
        return len(shape) == self.ndim and all(
            o + s <= n for o, s, n in zip(self.offsets, self.sizes, shape, strict=True)
        )

    def intersect(self, other: Box) -> Box | None:
        """Return the box that both cover, or None if they do not overlap."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        stops = (
            min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(stop - offset for stop, offset in zip(stops, offsets, strict=True))
        return Box(offsets, sizes) if all(size > 0 for size in sizes) else None

    @property
    def columns(self) -> tuple[IntArray, IntArray]:
        """The offsets and the sizes as arrays of shape (1, ndim)."""
        return np.array([self.offsets], np.int64), np.array([self.sizes], np.int64)

    def with_extent(self, dim: int, begin: int, end: int) -> Box:
        """Return the same box, but with [begin, end) in one dimension."""
        offsets, sizes = list(self.offsets), list(self.sizes)
        offsets[dim], sizes[dim] = begin, end - begin
        return Box(tuple(offsets), tuple(sizes))

    def first_element(self, shape: tuple[int, ...]) -> int:
        """Return the position of the first element in a row-major tensor of a shape."""
        position = 0
        for offset, n in zip(self.offsets, shape, strict=True):
            position = position * n + offset
        return position

    def relative_to(self, origin: Box) -> Box:
        """Return the same box, with offsets relative to those of `origin`."""
        return Box(tuple(a - b for a, b in zip(self.offsets, origin.offsets, strict=True)), self.sizes)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{s.start}:{s.stop}" for s in self.slices) + "]"


@lru_cache(maxsize=1024)
def _whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def columns_equal(a: object, b: object) -> bool:
    """Return whether two dataclass instances have equal fields. Arrays are compared element by element."""
    if type(a) is not type(b):
        return False
    names = [field.name for field in fields(a)]  # type: ignore[arg-type]
    pairs = ((getattr(a, name), getattr(b, name)) for name in names)
    return all(np.array_equal(x, y) if isinstance(x, np.ndarray) else bool(x == y) for x, y in pairs)


def intersect_many(offsets: IntArray, sizes: IntArray, box: Box) -> tuple[IntArray, IntArray]:
    """Intersect each of n boxes with one box.

    Args:
        offsets, sizes: (n, ndim) the boxes.
        box: the box to intersect them with.

    Returns:
        (n, ndim) offsets and sizes. If a box does not overlap `box`, at least one of its sizes is 0 or less.
    """
    return intersect_pairs(offsets, sizes, *box.columns)


def intersect_pairs(
    offsets: IntArray, sizes: IntArray, other_offsets: IntArray, other_sizes: IntArray
) -> tuple[IntArray, IntArray]:
    """Intersect box i of the first n boxes with box i of the second: see `intersect_many`."""
    starts = np.maximum(offsets, other_offsets)
    stops = np.minimum(offsets + sizes, other_offsets + other_sizes)
    return starts, stops - starts


def first_elements(offsets: IntArray, shapes: IntArray) -> IntArray:
    """Return the position of the first element of each box in its row-major tensor.

    Args:
        offsets: (n, d) the offsets of the boxes.
        shapes: (n, d) the shapes of their tensors.
    """
    found = np.zeros(len(offsets), np.int64)
    for d in range(offsets.shape[1]):
        found = found * shapes[:, d] + offsets[:, d]
    return found


def concat(columns: Iterable[IntArray]) -> IntArray:
    """Concatenate columns of integers. There may be none."""
    return np.concatenate([*columns, np.empty(0, np.int64)])


def concat_ranges(begins: IntArray | int, counts: IntArray) -> IntArray:
    """Concatenate ranges of integers: range i has counts[i] integers and starts at begins[i]."""
    before = np.cumsum(counts) - counts
    every: IntArray = np.arange(int(counts.sum())) + np.repeat(begins - before, counts)
    return every


def unravel(ordinals: IntArray, counts: IntArray, grids: IntArray, order: Sequence[int]) -> IntArray:
    """Convert the numbers of grid cells to coordinates, as `numpy.unravel_index` does, for several grids at once.

    Args:
        ordinals: (n,) the number of each cell in its grid.
        counts: (m, ndim) the number of cells of each of m grids in each dimension.
        grids: (n,) the grid that each cell belongs to: a row of `counts`.
        order: the dimensions, from the outermost to the innermost.

    Returns:
        (n, ndim) the coordinates of each cell.
    """
    coordinates = np.empty((len(ordinals), counts.shape[1]), np.int64)
    left = ordinals
    for d in reversed(order):
        count = counts[grids, d]
        coordinates[:, d] = left % count
        left = left // count
    return coordinates


def box_slices(offsets: IntArray, sizes: IntArray) -> list[tuple[slice, ...]]:
    """Convert n boxes, (n, ndim) offsets and sizes, to n tuples of slices that index a tensor."""
    stops = (offsets + sizes).tolist()
    return [tuple(map(slice, begin, end)) for begin, end in zip(offsets.tolist(), stops, strict=True)]
