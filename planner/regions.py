"""Regions: the parts of tensors that an index covers, so that a rank can load only the part of a large index that it
needs.

A region is one cell of a coarse grid over a tensor. The lines of this grid are also lines of the chunk grid, and the
segments of a region tile it. A whole tensor is one region or several. The blocks of the manifest contain whole regions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .box import Box, IntArray, columns_equal, unravel
from .entries import Entry
from .errors import InvalidIndexError
from .grid import Grid

MAX_REGIONS = 2**12
"""The maximum number of regions of one tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Regions:
    """Regions in columns, sorted by entry, and in the order of chunks within an entry: row i is region i."""

    parts: tuple[tuple[int, ...], ...]
    """The number of parts into which each dimension of each entry is cut. They divide the parts of its chunk grid."""
    entries: IntArray
    """(n,) the position of the entry in CheckpointIndex.entries. Each entry has at least one region."""
    cells: IntArray
    """(n,) the number of the region among those of its entry."""
    segments: IntArray
    """(n,) the number of segments in the region."""

    def __len__(self) -> int:
        return len(self.entries)

    __eq__ = columns_equal
    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def whole(cls, entries: Sequence[Entry], entry_ids: IntArray) -> Regions:
        """Return one region per entry. `entry_ids` are the entries that the segments belong to."""
        n = len(entries)
        parts = tuple((1,) * len(entry.shape) for entry in entries)
        return cls(parts, np.arange(n), np.zeros(n, np.int64), np.bincount(entry_ids, minlength=n))

    def check(self, entries: Sequence[Entry], entry_ids: IntArray) -> None:
        """Check the regions against the entries, and against `entry_ids`, the entries that the segments belong to.

        Raises:
            InvalidIndexError: they contradict each other.
        """
        if len(self.parts) != len(entries) or not np.array_equal(np.unique(self.entries), np.arange(len(entries))):
            raise InvalidIndexError("a tensor has no regions")
        for entry, parts in zip(entries, self.parts, strict=True):
            if not parts.count(1) == len(parts) == len(entry.shape):
                check_region_parts(entry, parts)
        counts = np.array([math.prod(parts) for parts in self.parts], np.int64)[self.entries]
        steps, further = np.diff(self.entries), np.diff(self.cells)
        ascending = (steps > 0) | ((steps == 0) & (further > 0))
        if not bool(ascending.all()) or bool(((self.cells < 0) | (self.cells >= counts)).any()):
            raise InvalidIndexError("the regions of a tensor are not in order")
        if not np.array_equal(np.repeat(self.entries, self.segments), entry_ids):
            raise InvalidIndexError("a region has segments that are not those of its tensor")

    def boxes(self, entries: Sequence[Entry], ndim: int) -> tuple[IntArray, IntArray, IntArray]:
        """Return the regions of all entries with `ndim` dimensions: their (k,) rows, and their (k, ndim) offsets and
        sizes."""
        selected = np.flatnonzero([len(parts) == ndim for parts in self.parts])
        row_of = np.full(len(self.parts), -1)
        row_of[selected] = np.arange(len(selected))
        rows = np.flatnonzero(row_of[self.entries] >= 0)
        of = row_of[self.entries[rows]]

        def column(values: list[tuple[int, ...]]) -> IntArray:
            return np.array(values, np.int64).reshape(len(selected), ndim)

        shapes = column([entries[at].shape for at in selected.tolist()])[of]
        parts = column([self.parts[at] for at in selected.tolist()])
        orders = column([entries[at].grid.order for at in selected.tolist()])
        in_order = unravel(self.cells[rows], np.take_along_axis(parts, orders, axis=1), of, range(ndim))
        parts, cells = parts[of], np.empty((len(rows), ndim), np.int64)
        np.put_along_axis(cells, orders[of], in_order, axis=1)
        offsets = cells * shapes // parts
        return rows, offsets, (cells + 1) * shapes // parts - offsets


def check_region_parts(entry: Entry, parts: tuple[int, ...]) -> None:
    """Raise InvalidIndexError if an entry cannot be cut into this number of parts."""
    chunked = entry.grid.parts
    fit = len(parts) == len(chunked) and not any(n < 1 or many % n for many, n in zip(chunked, parts, strict=True))
    if not fit or math.prod(parts) > (MAX_REGIONS if entry.numel else 1):
        raise InvalidIndexError(
            f"{entry.name!r} has {chunked} chunks and cannot be cut into {parts} regions: the regions of a dimension "
            f"must divide its chunks, and a tensor has at most {MAX_REGIONS}"
        )


def regions_met(shape: tuple[int, ...], parts: tuple[int, ...], box: Box) -> IntArray:
    """Return the regions of a tensor that a box overlaps, ascending; the first one if the box is empty or does not
    fit."""
    if math.prod(parts) > 1 and box.fits(shape) and box.numel:
        return Grid(shape, parts).chunks(Box.whole(shape), box)[0]
    return np.zeros(1, np.int64)
