"""Boxes of plain chunks to runs of bytes, and what is read over between them.

A plain chunk is another format's: the values of a shard in row-major order, of any size, without checksums. A part of
it is runs of bytes at a regular distance: rows, where it was cut in rows; pieces of rows, where it was cut in columns.
A wanted part is taken as **slabs** of about a MiB, each with runs of one length and one distance. The gaps between
the runs of a slab are read over where a request costs more than they do; else the runs are fetched alone, and packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .box import IntArray, columns_equal, concat_ranges, unravel
from .coalesce import GapLimits

SLAB_BYTES = 1024 * 1024
"""Values of a slab, at most, where one run is not longer."""
SPAN_BYTES = 4 * SLAB_BYTES
"""From the first to the last byte of a slab whose gaps are read over."""


@dataclass(frozen=True, slots=True, eq=False)
class ByteRuns:
    """The bytes of slabs, in columns: slab i has `counts[i]` runs of `nbytes[i]` bytes, `strides[i]` bytes apart."""

    counts: IntArray
    nbytes: IntArray
    strides: IntArray
    """From the first byte of a run to that of the next."""
    sparse: npt.NDArray[np.bool_]
    """Whether the runs alone are fetched; else what lies between them, too."""

    @property
    def packed_bytes(self) -> IntArray:
        """(n,) bytes of the runs."""
        return self.counts * self.nbytes

    @property
    def spans(self) -> IntArray:
        """(n,) bytes from the first run's begin to the last one's end."""
        return (self.counts - 1) * self.strides + self.nbytes

    __eq__ = columns_equal
    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, eq=False)
class Slabs:
    """Parts of plain chunks, in columns. Their values, run after run, are row-major in the slab's own box."""

    chunks: IntArray
    """(n,) the row of the chunk that each is a part of, ascending."""
    offsets: IntArray
    """(n, ndim) in the tensor."""
    sizes: IntArray
    begins: IntArray
    """(n,) the first byte, counted from that of the chunk."""
    runs: ByteRuns


def slabs_of(
    chunk_offsets: IntArray,
    chunk_sizes: IntArray,
    piece_offsets: IntArray,
    piece_sizes: IntArray,
    itemsize: int,
    gap_limits: GapLimits,
) -> Slabs:
    """The slabs of pieces of row-major chunks.

    Args:
        chunk_offsets, chunk_sizes: (n, ndim) the chunks, in the tensor.
        piece_offsets, piece_sizes: (n, ndim) the part of each that is wanted, inside it and not empty.
        itemsize: bytes an element.
        gap_limits: which of them are read over.
    """
    n, ndim = chunk_sizes.shape
    if ndim == 0:  # a scalar is a row of one element
        one = np.ones((n, 1), np.int64)
        slabs = slabs_of(0 * one, one, 0 * one, one, itemsize, gap_limits)
        return Slabs(slabs.chunks, chunk_offsets, chunk_sizes, slabs.begins, slabs.runs)
    # row_bytes[:, d] is the distance between neighbours along dimension d.
    row_bytes = np.empty((n, ndim), np.int64)
    row_bytes[:, -1] = itemsize
    for d in range(ndim - 1, 0, -1):
        row_bytes[:, d - 1] = row_bytes[:, d] * chunk_sizes[:, d]
    at = np.arange(n)
    # A run covers dimension `inner` in part, and all of those after it; one that is too long is cut along a later one.
    inner = np.where(piece_sizes != chunk_sizes, np.arange(ndim), 0).max(axis=1)
    for _ in range(ndim - 1):
        inner = np.where((row_bytes[at, inner] > SLAB_BYTES) & (inner < ndim - 1), inner + 1, inner)
    run_bytes = piece_sizes[at, inner] * row_bytes[at, inner]
    dims = np.arange(ndim)
    outer = np.where((dims < inner[:, None]) & (piece_sizes > 1), dims, -1).max(axis=1)
    several = (outer >= 0) & (run_bytes < SLAB_BYTES)
    strides = row_bytes[at, outer]
    gap = np.where(several, strides - run_bytes, 0)
    joined = (gap <= gap_limits.max_gap_bytes) & (gap <= gap_limits.max_over_read * run_bytes)

    # A slab is a block of the piece: one index of the dimensions before `axis`, some of it, all of those after it.
    axis = np.where(several, outer, inner)
    each = np.where(several, np.where(joined, strides * SLAB_BYTES // SPAN_BYTES, run_bytes), row_bytes[at, inner])
    each = np.where(several & joined, np.maximum(each, run_bytes), each)
    block = np.where(dims < axis[:, None], 1, piece_sizes)
    block[at, axis] = np.clip(SLAB_BYTES // np.maximum(each, 1), 1, piece_sizes[at, axis])
    blocks = -(-piece_sizes // block)
    counts = blocks.prod(axis=1)
    chunks = np.repeat(at, counts)
    place = unravel(concat_ranges(0, counts), blocks, chunks, range(ndim))
    offsets = piece_offsets[chunks] + place * block[chunks]
    sizes = np.minimum(block[chunks], (piece_offsets + piece_sizes)[chunks] - offsets)
    begins = ((offsets - chunk_offsets[chunks]) * row_bytes[chunks]).sum(axis=1)
    several = several[chunks]
    counts = np.where(several, sizes[np.arange(len(chunks)), axis[chunks]], 1)
    nbytes = sizes.prod(axis=1) * itemsize // counts
    runs = ByteRuns(counts, nbytes, np.where(counts > 1, strides[chunks], nbytes), (counts > 1) & ~joined[chunks])
    return Slabs(chunks, offsets, sizes, begins, runs)
