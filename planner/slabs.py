"""Slabs: how parts of plain chunks are read, as byte runs with a stride.

A plain chunk was written by another tool. It holds the values of a shard in row-major order, has any size, and has no
checksums. A part of it is a set of byte runs: whole rows if the part is cut by rows, parts of rows if it is cut by
columns. A wanted part is split into **slabs** of about 1 MiB (a slab is a box, like a hyperslab of HDF5). All byte runs
of a slab have the same size and the same stride. If a request costs more than the gaps between the runs, one request
reads over the gaps. Otherwise only the runs are read and packed. `benchmarks/foreign.py` measures both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .box import IntArray, columns_equal, concat_ranges, unravel
from .coalesce import GapLimits

MAX_SLAB_BYTES = 1024 * 1024
"""The maximum bytes of the values of a slab. Only a slab of a single byte run may have more."""
MAX_SPAN_BYTES = 4 * MAX_SLAB_BYTES
"""The maximum bytes from the first to the last byte of a slab whose gaps are read over."""


NO_GAPS = GapLimits(0, 0.0)
"""No gap is read over."""


@dataclass(frozen=True, slots=True, eq=False)
class ByteRuns:
    """The byte runs of slabs, in columns: slab i has `counts[i]` runs of `nbytes[i]` bytes, `strides[i]` bytes
    apart."""

    counts: IntArray
    nbytes: IntArray
    strides: IntArray
    """(n,) the distance in bytes from the start of a run to the start of the next."""
    sparse: npt.NDArray[np.bool_]
    """(n,) whether only the runs are read. Otherwise the gaps between them are read, too."""

    @property
    def packed_bytes(self) -> IntArray:
        """(n,) the bytes of all runs of a slab."""
        return self.counts * self.nbytes

    @property
    def spans(self) -> IntArray:
        """(n,) the bytes from the start of the first run to the end of the last one."""
        return (self.counts - 1) * self.strides + self.nbytes

    __eq__ = columns_equal
    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, eq=False)
class Slabs:
    """Parts of plain chunks, in columns. The values of a slab, run after run, are row-major in the box of the slab."""

    chunks: IntArray
    """(n,) the row of the chunk that each slab is a part of, ascending."""
    offsets: IntArray
    """(n, ndim) the offsets in the tensor."""
    sizes: IntArray
    begins: IntArray
    """(n,) the first byte, relative to the first byte of the chunk."""
    runs: ByteRuns


def slabs_of(
    chunk_offsets: IntArray,
    chunk_sizes: IntArray,
    wanted_offsets: IntArray,
    wanted_sizes: IntArray,
    itemsize: int,
    gap_limits: GapLimits,
    *,
    aligned: bool = False,
) -> Slabs:
    """Split wanted parts of row-major chunks into slabs.

    Args:
        chunk_offsets, chunk_sizes: (n, ndim) the boxes of the chunks, in the tensor.
        wanted_offsets, wanted_sizes: (n, ndim) the wanted part of each chunk: inside it and not empty.
        itemsize: bytes per element.
        gap_limits: which gaps between byte runs to read over.
        aligned: give slabs a power of two rows. Ranks that need different columns of the same rows then get slabs that
            start at the same rows, so that they can share the read (`shared_reads`).
    """
    n, ndim = chunk_sizes.shape
    if ndim == 0:  # treat a scalar as one row of one element
        one = np.ones((n, 1), np.int64)
        slabs = slabs_of(0 * one, one, 0 * one, one, itemsize, gap_limits, aligned=aligned)
        return Slabs(slabs.chunks, chunk_offsets, chunk_sizes, slabs.begins, slabs.runs)
    # row_bytes[:, d] is the distance in bytes between neighbours along dimension d.
    row_bytes = np.empty((n, ndim), np.int64)
    row_bytes[:, -1] = itemsize
    for d in range(ndim - 1, 0, -1):
        row_bytes[:, d - 1] = row_bytes[:, d] * chunk_sizes[:, d]
    at = np.arange(n)
    # A byte run covers a part of dimension `inner` and all dimensions after it. If its rows are too long, cut it along
    # a later dimension.
    inner = np.where(wanted_sizes != chunk_sizes, np.arange(ndim), 0).max(axis=1)
    for _ in range(ndim - 1):
        inner = np.where((row_bytes[at, inner] > MAX_SLAB_BYTES) & (inner < ndim - 1), inner + 1, inner)
    run_bytes = wanted_sizes[at, inner] * row_bytes[at, inner]
    dims = np.arange(ndim)
    outer = np.where((dims < inner[:, None]) & (wanted_sizes > 1), dims, -1).max(axis=1)
    several = (outer >= 0) & (run_bytes < MAX_SLAB_BYTES)
    strides = row_bytes[at, outer]
    gap = np.where(several, strides - run_bytes, 0)
    joined = (gap <= gap_limits.max_gap_bytes) & (gap <= gap_limits.max_over_read * run_bytes)

    # A slab has one index in the dimensions before `axis`, a range of `axis`, and all of the dimensions after it. For
    # example, columns 2 to 4 of rows 0 to 99 of a matrix have 100 byte runs. Their `axis` is 0: a slab is some of these
    # rows, whether or not the gaps between the runs are read over. `step_bytes` is what one more row adds to it.
    axis = np.where(several, outer, inner)
    step_bytes = np.where(
        several, np.where(joined, strides * MAX_SLAB_BYTES // MAX_SPAN_BYTES, run_bytes), row_bytes[at, inner]
    )
    step_bytes = np.where(several & joined, np.maximum(step_bytes, run_bytes), step_bytes)
    slab_sizes = np.where(dims < axis[:, None], 1, wanted_sizes)
    steps_per_slab = np.maximum(MAX_SLAB_BYTES // np.maximum(step_bytes, 1), 1)
    if aligned:
        steps_per_slab = 2 ** np.floor(np.log2(steps_per_slab)).astype(np.int64)
    slab_sizes[at, axis] = np.minimum(steps_per_slab, wanted_sizes[at, axis])
    slab_counts = -(-wanted_sizes // slab_sizes)
    counts = slab_counts.prod(axis=1)
    chunks = np.repeat(at, counts)
    position = unravel(concat_ranges(0, counts), slab_counts, chunks, range(ndim))
    offsets = wanted_offsets[chunks] + position * slab_sizes[chunks]
    sizes = np.minimum(slab_sizes[chunks], (wanted_offsets + wanted_sizes)[chunks] - offsets)
    begins = ((offsets - chunk_offsets[chunks]) * row_bytes[chunks]).sum(axis=1)
    several = several[chunks]
    counts = np.where(several, sizes[np.arange(len(chunks)), axis[chunks]], 1)
    nbytes = sizes.prod(axis=1) * itemsize // counts
    runs = ByteRuns(counts, nbytes, np.where(counts > 1, strides[chunks], nbytes), (counts > 1) & ~joined[chunks])
    return Slabs(chunks, offsets, sizes, begins, runs)
