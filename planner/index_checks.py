"""Check the columns of an index: every reference must be valid, and the shards of each tensor must tile it.

An index may have millions of segments, so numpy checks all of them at once (`benchmarks/planner.py`). Only tensors that
were cut along several dimensions are checked one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .box import IntArray
from .entries import Encoding, Entry, Segments, Stream
from .errors import InvalidIndexError
from .grid import cells
from .regions import Regions

MAX_CORNERS = 2**23
"""The maximum number of corners that `tile` counts for shards that are not the cells of a grid."""


def check_references(segments: Segments, entries: int, objects: int) -> None:
    """Check that each segment refers to an entry and an object, and that the columns have the same length.

    Raises:
        InvalidIndexError: a check fails.
    """
    n = len(segments)
    lengths = [len(c) for c in (segments.streams, segments.encodings, segments.objects, segments.starts)]
    if lengths.count(n) != len(lengths):
        raise InvalidIndexError(f"the columns of the segments differ in length: {[n, *lengths]}")
    if n == 0:
        return
    if segments.entries[0] < 0 or segments.entries[-1] >= entries:
        raise InvalidIndexError(f"a segment belongs to none of the {entries} tensors")
    if bool((segments.entries[1:] < segments.entries[:-1]).any()):
        raise InvalidIndexError("the segments are not sorted by tensor")
    if int(segments.objects.min()) < 0 or int(segments.objects.max()) >= objects:
        raise InvalidIndexError(f"a segment is in none of the {objects} data objects")
    if int(segments.streams.max()) > max(Stream) or int(segments.encodings.max()) > max(Encoding):
        raise InvalidIndexError("a segment has an unknown stream or encoding")


def count_chunks(entries: Sequence[Entry], segments: Segments, regions: Regions, first_extent: IntArray) -> IntArray:
    """Check the boxes of the shards, and return the number of chunks of each segment.

    Raises:
        InvalidIndexError: a shard is outside its region, heads and tails do not pair up, or the shards of a region do
            not tile it.
    """
    counts = np.zeros(len(segments), np.int64)
    _check_streams(entries, segments)
    ndims = np.array([len(entry.shape) for entry in entries], np.int64)
    region_of = np.repeat(np.arange(len(regions)), regions.segments)
    for ndim in np.unique(ndims).tolist():
        known, region_offsets, region_sizes = regions.boxes(entries, ndim)
        empty = (regions.segments[known] == 0) & (region_sizes > 0).all(axis=1)
        if bool(empty.any()):
            at = int(np.argmax(empty))
            raise _not_covered(entries[int(regions.entries[known[at]])], 0, region_sizes[at])
        rows = np.flatnonzero(ndims[segments.entries] == ndim)
        if len(rows) == 0:
            continue
        extents = first_extent[rows][:, None] + np.arange(ndim)
        offsets, sizes = segments.offsets[extents], segments.sizes[extents]
        of_ndim = np.flatnonzero(ndims == ndim)
        position = np.searchsorted(of_ndim, segments.entries[rows])
        grids = [entries[at].grid for at in of_ndim.tolist()]
        shapes = np.array([grid.shape for grid in grids], np.int64).reshape(len(of_ndim), ndim)[position]
        parts = np.array([grid.parts for grid in grids], np.int64).reshape(len(of_ndim), ndim)[position]
        within = np.searchsorted(known, region_of[rows])
        offsets_in = offsets - region_offsets[within]
        inside = ((offsets_in >= 0) & (sizes > 0) & (sizes <= region_sizes[within] - offsets_in)).all(axis=1)
        if not bool(inside.all()):
            at = int(np.argmin(inside))
            entry = entries[int(segments.entries[rows[at]])]
            raise InvalidIndexError(
                f"a shard of {entry.name!r} is outside its shape {entry.shape}, or outside its region"
            )
        _check_pairs(entries, segments, rows, offsets, sizes)
        _check_tiling(entries, segments, rows, offsets_in, sizes, within, region_sizes)
        counts[rows] = cells(shapes, parts, offsets, sizes)[1].prod(axis=1, dtype=np.int64)
    return counts


def _check_streams(entries: Sequence[Entry], segments: Segments) -> None:
    """Check that only float32 tensors have heads and tails, and that a tail follows each head."""
    split = segments.streams != Stream.WHOLE
    if not bool(split.any()):
        return
    heads, tails = np.flatnonzero(segments.streams == Stream.HEAD), np.flatnonzero(segments.streams == Stream.TAIL)
    owners = np.unique(segments.entries[split])
    paired = np.array_equal(heads + 1, tails) and np.array_equal(segments.entries[heads], segments.entries[tails])
    alone = not bool(np.isin(segments.entries[~split], owners).any())
    for at in owners.tolist():
        if not paired or not alone or entries[at].dtype != "float32":
            raise _unpaired(entries[at])


def _check_pairs(
    entries: Sequence[Entry], segments: Segments, rows: IntArray, offsets: IntArray, sizes: IntArray
) -> None:
    tails = np.flatnonzero(segments.streams[rows] == Stream.TAIL)
    same = (offsets[tails] == offsets[tails - 1]).all(axis=1) & (sizes[tails] == sizes[tails - 1]).all(axis=1)
    if not bool(same.all()):
        raise _unpaired(entries[int(segments.entries[rows[tails[np.argmin(same)]]])])


def _unpaired(entry: Entry) -> InvalidIndexError:
    return InvalidIndexError(f"the heads and tails of {entry.name!r}, {entry.dtype}, do not pair up")


def _check_tiling(
    entries: Sequence[Entry],
    segments: Segments,
    rows: IntArray,
    offsets: IntArray,
    sizes: IntArray,
    owners: IntArray,
    region_sizes: IntArray,
) -> None:
    """Check that shards tile their regions.

    Args:
        rows: (n,) the segments of the shards.
        offsets, sizes: (n, ndim) the boxes of the shards. Each is inside its region, and relative to its corner.
        owners: (n,) the region of each shard: a row of `region_sizes`.
        region_sizes: (m, ndim) the sizes of the regions.
    """
    once = segments.streams[rows] != Stream.TAIL
    rows, owners, offsets, sizes = rows[once], owners[once], offsets[once], sizes[once]
    first = np.flatnonzero(np.concatenate(([True], owners[1:] != owners[:-1])))
    volumes = sizes.prod(axis=1, dtype=np.int64)
    # Each volume is below 2**60, but their sum may overflow int64. So compute it as floats first.
    rough = np.add.reduceat(volumes.astype(np.float64), first)
    exact = np.add.reduceat(volumes, first)
    numel = region_sizes[owners[first]].prod(axis=1, dtype=np.int64)
    wrong = (rough > 2.0 * numel + 1) | (exact != numel)
    if bool(wrong.any()):
        at = int(np.argmax(wrong))
        entry = entries[int(segments.entries[rows[first[at]]])]
        raise _not_covered(entry, int(rough[at]), region_sizes[owners[first[at]]])
    # If a region is cut along one dimension only, each shard begins where the previous one ends.
    shapes = region_sizes[owners]
    begins = np.where(sizes[:-1] == shapes[:-1], offsets[:-1], offsets[:-1] + sizes[:-1])
    abut = (offsets[1:] == begins).all(axis=1) & ((sizes[:-1] != shapes[:-1]).sum(axis=1) == 1)
    abut |= owners[1:] != owners[:-1]
    unclear = np.unique(owners[1:][~abut])
    for at in unclear.tolist():
        mine = slice(*np.searchsorted(owners, [at, at + 1]).tolist())
        if not tile(tuple(region_sizes[at].tolist()), offsets[mine], sizes[mine]):
            raise InvalidIndexError(f"the shards of {entries[int(segments.entries[rows[mine.start]])].name!r} overlap")


def _not_covered(entry: Entry, covered: int, region_sizes: IntArray) -> InvalidIndexError:
    sizes = tuple(region_sizes.tolist())
    region = "" if sizes == entry.shape else f", its region {sizes} has {math.prod(sizes)}"
    return InvalidIndexError(
        f"the shards of {entry.name!r} hold {covered} elements, its shape {entry.shape} has {entry.numel}{region}"
    )


def tile(shape: tuple[int, ...], offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> bool:
    """Return whether boxes inside a shape tile it: whether each element is in exactly one box.

    Boxes are almost always all cells of a grid, which is quick to check. Otherwise, count their corners. A corner
    counts as -1 if an odd number of its coordinates are upper ends of the box, and as +1 otherwise. The boxes tile the
    shape if and only if these counts add up to those of the shape itself at every point. The reason: boxes tile the
    shape if the sum of their indicator functions is the indicator function of the shape. Two such functions are equal
    if and only if their differences along all dimensions are equal, and the difference of a box is nonzero at its
    corners only.

    Raises:
        InvalidIndexError: the count needs more than MAX_CORNERS corners.
    """
    starts = [np.unique(offsets[:, d]) for d in range(len(shape))]
    if math.prod(map(len, starts)) == len(offsets):
        positions = [np.searchsorted(starts[d], offsets[:, d]) for d in range(len(shape))]
        ends = [np.append(starts[d][1:], n) for d, n in enumerate(shape)]
        fit = all(np.array_equal(offsets[:, d] + sizes[:, d], ends[d][positions[d]]) for d in range(len(shape)))
        if fit and len(np.unique(np.ravel_multi_index(positions, [len(start) for start in starts]))) == len(offsets):
            return True
    cut = [d for d, n in enumerate(shape) if bool((sizes[:, d] != n).any())]
    lows = np.vstack([offsets[:, cut], np.zeros((1, len(cut)), np.int64)])
    highs = np.vstack([offsets[:, cut] + sizes[:, cut], np.array([[shape[d] for d in cut]], np.int64)])
    signs = np.append(np.ones(len(offsets), np.int64), -1)
    rest = _numbers_of_rests(lows, highs)
    points, boxes = np.zeros(len(lows), np.int64), np.arange(len(lows))
    for d in range(len(cut)):
        if 2 * len(boxes) > MAX_CORNERS:
            raise InvalidIndexError(
                f"{len(offsets)} shards are cut along {len(cut)} dimensions, but not by a grid: too many to check"
            )
        ends_of = np.concatenate((lows[boxes, d], highs[boxes, d]))
        points = _pair_numbers(np.concatenate((points, points)), ends_of)
        boxes, signs = np.concatenate((boxes, boxes)), np.concatenate((signs, -signs))
        _, first, of = np.unique(_pair_numbers(points, rest[d + 1][boxes]), return_index=True, return_inverse=True)
        sums = np.zeros(len(first), np.int64)
        np.add.at(sums, of, signs)
        kept = first[sums != 0]
        points, boxes, signs = points[kept], boxes[kept], sums[sums != 0]
    return not len(boxes) and bool(cut)


def _numbers_of_rests(lows: IntArray, highs: IntArray) -> list[IntArray]:
    """For each dimension, give boxes the same number if they agree in this and all later dimensions."""
    rests = [np.zeros(len(lows), np.int64)]
    for d in reversed(range(lows.shape[1])):
        rests.append(_pair_numbers(_pair_numbers(lows[:, d], highs[:, d]), rests[-1]))
    return rests[::-1]


def _pair_numbers(first: IntArray, second: IntArray) -> IntArray:
    """Return (n,) numbers of pairs, which are equal if and only if the pairs are equal."""
    one, two = (np.unique(column, return_inverse=True)[1].astype(np.int64) for column in (first, second))
    numbers: IntArray = np.unique(one * (int(two.max(initial=0)) + 1) + two, return_inverse=True)[1].astype(np.int64)
    return numbers
