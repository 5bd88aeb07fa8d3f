"""Group chunks into runs that are encoded together.

A call of numpy or of the codec costs as much as working on some KiB of values (`benchmarks/overhead.py`), so that one
call should work on several chunks. A chunk run consists of consecutive chunks of equal size that adjoin along one
dimension of the tensor. One strided copy takes its values from the tensor, and its planes are split together. Reads
group chunk runs further, into the blocks of `reading.blocks`.
"""

from __future__ import annotations

import numpy as np

from ....planner.box import IntArray

Slices = tuple[slice, ...]

MAX_CHUNK_RUN_BYTES = 1024 * 1024
"""The most bytes of values of a run with several chunks that is encoded.

With smaller runs, threads wait more for each other (`benchmarks/overhead.py`).
"""


def continued_dims(offsets: IntArray, sizes: IntArray) -> IntArray:
    """Return along which dimension each box continues the box before it.

    Args:
        offsets, sizes: (n, ndim) the boxes.

    Returns:
        (n,) the dimension along which the box continues the previous one, which has the same sizes, or -1.
    """
    dims = np.full(len(sizes), -1)
    steps = np.diff(offsets, axis=0)
    if steps.size:
        adjoin = ((steps == 0) | (steps == sizes[:-1])).all(axis=1) & ((steps != 0).sum(axis=1) == 1)
        alike = (sizes[1:] == sizes[:-1]).all(axis=1)
        dims[1:] = np.where(adjoin & alike, (steps != 0).argmax(axis=1), -1)
    return dims


def group_into_runs(dims: IntArray, max_chunks: IntArray | None = None) -> tuple[IntArray, IntArray, IntArray]:
    """Group consecutive chunks into runs.

    Args:
        dims: (n,) the result of `continued_dims`.
        max_chunks: (n,) the maximum number of chunks in the run of each chunk. There is no limit by default.

    Returns:
        For each run, (r,) its first chunk, (r,) the number of its chunks, and (r,) the dimension along which they
        adjoin, which is 0 for a single chunk.
    """
    rows = np.arange(len(dims))
    before = np.concatenate(([-1], dims[:-1]))[: len(rows)]
    opens = (dims < 0) | ((before >= 0) & (before != dims))
    if max_chunks is not None:
        inside = rows - np.maximum.accumulate(np.where(opens, rows, 0))
        opens |= inside % max_chunks == 0
    firsts = np.flatnonzero(opens)
    counts = np.diff(firsts, append=len(rows))
    return firsts, counts, np.where(counts > 1, np.append(dims, 0)[firsts + 1], 0)


def run_sizes(sizes: IntArray, counts: IntArray, dims: IntArray) -> IntArray:
    """Return the (r, ndim) sizes of runs, from the sizes and counts of their chunks."""
    found = sizes.copy()
    if found.size:
        found[np.arange(len(found)), dims] *= counts
    return found
