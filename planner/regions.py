"""Regions: the parts of tensors that an index knows, so that a rank can hold of a large one what it reads.

A region is a cell of a coarse grid over its tensor, whose lines are lines of the grid of chunks; the segments of a
region tile it. Where an index knows all of a tensor, that is one region, or all of several.
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
"""Of one tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Regions:
    """Regions in columns, sorted by entry, those of one in the order of its chunks."""

    parts: tuple[tuple[int, ...], ...]
    """In how many parts each dimension of each entry is cut into regions: divisors of those of its grid of chunks."""
    entries: IntArray
    """(n,) the entry's position in CheckpointIndex.entries: each has one region or more."""
    cells: IntArray
    """(n,) which of its entry's regions it is."""
    segments: IntArray
    """(n,) how many segments it has."""

    def __len__(self) -> int:
        return len(self.entries)

    __eq__ = columns_equal
    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def whole(cls, entries: Sequence[Entry], owners: IntArray) -> Regions:
        """One for each entry, given the entries that segments belong to."""
        n = len(entries)
        parts = tuple((1,) * len(entry.shape) for entry in entries)
        return cls(parts, np.arange(n), np.zeros(n, np.int64), np.bincount(owners, minlength=n))

    def check(self, entries: Sequence[Entry], owners: IntArray) -> None:
        """Raises InvalidIndexError where they contradict the entries, or those that the segments belong to."""
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
        if not np.array_equal(np.repeat(self.entries, self.segments), owners):
            raise InvalidIndexError("the segments of a region are not those of its tensor")

    def boxes(self, entries: Sequence[Entry], ndim: int) -> tuple[IntArray, IntArray, IntArray]:
        """Those of the entries of so many dimensions: their (k,) rows, and their (k, ndim) offsets and sizes."""
        alike = np.flatnonzero([len(parts) == ndim for parts in self.parts])
        place = np.full(len(self.parts), -1)
        place[alike] = np.arange(len(alike))
        rows = np.flatnonzero(place[self.entries] >= 0)
        of = place[self.entries[rows]]

        def column(values: list[tuple[int, ...]]) -> IntArray:
            return np.array(values, np.int64).reshape(len(alike), ndim)

        shapes = column([entries[at].shape for at in alike.tolist()])[of]
        parts = column([self.parts[at] for at in alike.tolist()])
        orders = column([entries[at].grid.order for at in alike.tolist()])
        in_order = unravel(self.cells[rows], np.take_along_axis(parts, orders, axis=1), of, range(ndim))
        parts, cells = parts[of], np.empty((len(rows), ndim), np.int64)
        np.put_along_axis(cells, orders[of], in_order, axis=1)
        offsets = cells * shapes // parts
        return rows, offsets, (cells + 1) * shapes // parts - offsets


def check_region_parts(entry: Entry, parts: tuple[int, ...]) -> None:
    """Raises InvalidIndexError where an entry cannot be cut into such regions."""
    chunked = entry.grid.parts
    fit = len(parts) == len(chunked) and not any(n < 1 or many % n for many, n in zip(chunked, parts, strict=True))
    if not fit or math.prod(parts) > (MAX_REGIONS if entry.numel else 1):
        raise InvalidIndexError(f"{entry.name!r} is cut into {chunked} chunks, it has no {parts} regions of them")


def regions_met(shape: tuple[int, ...], parts: tuple[int, ...], box: Box) -> IntArray:
    """Which regions of a tensor a box meets, in order; the first, where it is empty or does not fit."""
    if math.prod(parts) > 1 and box.fits(shape) and box.numel:
        return Grid(shape, parts).chunks(Box.whole(shape), box)[0]
    return np.zeros(1, np.int64)
