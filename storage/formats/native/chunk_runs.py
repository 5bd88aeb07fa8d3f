"""Group chunks into runs that are encoded, decoded and placed together.

A call of numpy or of the codec costs as much as working on some KiB of values (`benchmarks/overhead.py`), so that one
call should work on several chunks. A chunk run consists of consecutive chunks of equal size that adjoin along one
dimension of the tensor. One strided copy takes its values from the tensor or writes them to it, and its planes are
split and joined together. The chunks of a run that is read are also consecutive in their object, and each is needed as
a whole. Every other chunk is a run by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ....planner.box import IntArray, box_slices
from ....planner.chunk_reads import ChunkReads
from ....planner.entries import NATIVE_ENCODINGS
from ....planner.read_plan import BOXES_PER_CALL

Slices = tuple[slice, ...]

MAX_CHUNK_RUN_BYTES = 1024 * 1024
"""The most decoded bytes of a run with several chunks.

With smaller runs, threads wait more for each other (`benchmarks/overhead.py`).
"""


@dataclass(frozen=True, slots=True)
class ChunkRun:
    """One chunk run of a read."""

    row: int
    """The row of its first chunk in the ChunkReads."""
    count: int
    """The number of its chunks."""
    dim: int
    """The dimension along which its chunks adjoin."""
    encoding: int
    numel: int
    """The number of elements of each chunk."""
    sizes: tuple[int, ...]
    """The sizes of each chunk."""
    part: Slices
    """The part of the chunk that is needed. If there are several chunks, the whole of each."""
    target: Slices
    """The destination of the run in the wanted box."""


@dataclass(frozen=True, slots=True, eq=False)
class ChunkRuns:
    """The chunk runs of a read, in columns. Row i is run i."""

    firsts: IntArray
    """(r,) the rows of their first chunks in the ChunkReads."""
    counts: IntArray
    dims: IntArray
    encodings: npt.NDArray[np.uint8]
    numels: IntArray
    nbytes: IntArray
    """(r,) the decoded bytes of all their chunks."""
    sizes: IntArray
    """(r, ndim) the sizes of each of their chunks."""
    part_offsets: IntArray
    """(r, ndim) the part of the first chunk that is needed, relative to the chunk."""
    part_sizes: IntArray
    target_offsets: IntArray
    """(r, ndim) the destination of the run in the wanted box."""
    target_sizes: IntArray

    def select(self, runs: slice) -> Iterator[ChunkRun]:
        """Iterate over some of the runs."""
        columns = (
            column[runs].tolist() for column in (self.firsts, self.counts, self.dims, self.encodings, self.numels)
        )
        parts = box_slices(self.part_offsets[runs], self.part_sizes[runs])
        targets = box_slices(self.target_offsets[runs], self.target_sizes[runs])
        return map(ChunkRun, *columns, map(tuple, self.sizes[runs].tolist()), parts, targets)


def find_chunk_runs(reads: Sequence[ChunkReads], requests_of: Sequence[IntArray]) -> Iterator[ChunkRuns]:
    """Find the chunk runs of each read. Many reads are processed together.

    Args:
        reads: the reads.
        requests_of: for each read, the (n, s) requests that fetch the byte ranges of its n chunks. All bytes of a run
            come from one request.
    """
    groups: dict[int, list[int]] = {}
    for at, read in enumerate(reads):
        groups.setdefault(len(read.want.box.sizes), []).append(at)
    found: dict[int, ChunkRuns] = {}
    for members in groups.values():
        for first in range(0, len(members), BOXES_PER_CALL):
            positions = members[first : first + BOXES_PER_CALL]
            runs = _of_one_ndim([reads[at] for at in positions], [requests_of[at] for at in positions])
            found |= zip(positions, runs, strict=True)
    return (found[at] for at in range(len(reads)))


def _of_one_ndim(reads: Sequence[ChunkReads], requests_of: Sequence[IntArray]) -> Iterator[ChunkRuns]:
    """Find the chunk runs of reads whose tensors have the same number of dimensions."""
    lengths = [len(read) for read in reads]
    bounds = np.cumsum([0, *lengths])

    def column(name: str) -> IntArray:
        return np.concatenate([getattr(read, name) for read in reads])

    sizes, encodings = column("chunk_sizes"), column("encodings")
    offsets, piece_offsets, piece_sizes = column("chunk_offsets"), column("piece_offsets"), column("piece_sizes")
    origins = np.repeat(np.array([read.want.box.offsets for read in reads], np.int64), lengths, axis=0)
    numels = sizes.prod(axis=1)
    nbytes = numels * np.repeat([read.itemsize for read in reads], lengths)
    starts = np.concatenate([read.starts[:, 0] for read in reads])
    stops = np.concatenate([read.stops[:, 0] for read in reads])
    requests = np.concatenate([requests[:, [0, -1]] for requests in requests_of])

    whole = (sizes == piece_sizes).all(axis=1) & (encodings <= max(NATIVE_ENCODINGS))
    alike = whole[1:] & whole[:-1] & (encodings[1:] == encodings[:-1])
    alike &= (starts[1:] == stops[:-1]) & (requests[1:] == requests[:-1]).all(axis=1)
    dims = continued_dims(offsets, sizes)
    dims[1:][~alike] = -1
    dims[bounds[:-1][np.diff(bounds) > 0]] = -1
    firsts, counts, dims = group_into_runs(dims, nbytes)

    rows = firsts - np.repeat(bounds[:-1], np.diff(ends := np.searchsorted(firsts, bounds)))
    columns = [rows, counts, dims, encodings[firsts], numels[firsts], nbytes[firsts] * counts, sizes[firsts]]
    columns += [piece_offsets[firsts] - offsets[firsts], piece_sizes[firsts]]
    columns += [piece_offsets[firsts] - origins[firsts], run_sizes(piece_sizes[firsts], counts, dims)]
    for begin, end in pairwise(ends.tolist()):
        yield ChunkRuns(*(column[begin:end] for column in columns))


def continued_dims(offsets: IntArray, sizes: IntArray) -> IntArray:
    """Return along which dimension each box continues the box before it.

    Args:
        offsets, sizes: (n, ndim) the boxes.

    Returns:
        (n,) the dimension in which the box adjoins the box before it and has the same size, or -1.
    """
    dims = np.full(len(sizes), -1)
    steps = np.diff(offsets, axis=0)
    if steps.size:
        adjoin = ((steps == 0) | (steps == sizes[:-1])).all(axis=1) & ((steps != 0).sum(axis=1) == 1)
        alike = (sizes[1:] == sizes[:-1]).all(axis=1)
        dims[1:] = np.where(adjoin & alike, (steps != 0).argmax(axis=1), -1)
    return dims


def group_into_runs(dims: IntArray, nbytes: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Group consecutive chunks into runs.

    Args:
        dims: (n,) the result of `continued_dims`.
        nbytes: (n,) the decoded bytes of each chunk.

    Returns:
        For each run, (r,) its first chunk, (r,) the number of its chunks, and (r,) the dimension along which they
        adjoin, which is 0 for a single chunk.
    """
    rows = np.arange(len(dims))
    before = np.concatenate(([-1], dims[:-1]))[: len(rows)]
    opens = (dims < 0) | ((before >= 0) & (before != dims))
    inside = rows - np.maximum.accumulate(np.where(opens, rows, 0))
    opens |= inside % np.maximum(1, MAX_CHUNK_RUN_BYTES // nbytes) == 0
    firsts = np.flatnonzero(opens)
    counts = np.diff(firsts, append=len(rows))
    return firsts, counts, np.where(counts > 1, np.append(dims, 0)[firsts + 1], 0)


def run_sizes(sizes: IntArray, counts: IntArray, dims: IntArray) -> IntArray:
    """Return the (r, ndim) sizes of runs, from the sizes and counts of their chunks."""
    found = sizes.copy()
    if found.size:
        found[np.arange(len(found)), dims] *= counts
    return found
