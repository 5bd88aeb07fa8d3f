"""Chunks that are worked on together: calls of numpy and of the codec cost as much as some KiB of values.

Consecutive chunks of one size that adjoin along one dimension of the tensor are a run: they are taken from the tensor,
or written to it, by one strided copy, and their planes are split and joined together. Of a read they also lie one after
another in their object, and are wanted whole. All other chunks are runs of one.
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
"""Decoded bytes of a run of several chunks, at most: with fewer, threads wait more for each other."""


@dataclass(frozen=True, slots=True)
class ChunkRun:
    """One run of a read."""

    row: int
    """Of its first chunk."""
    count: int
    dim: int
    """In which its chunks adjoin."""
    encoding: int
    numel: int
    """Of each chunk."""
    sizes: tuple[int, ...]
    """Of each chunk."""
    part: Slices
    """What is wanted of the chunk; of several, all of each."""
    place: Slices
    """Where the whole run goes, in the wanted box."""


@dataclass(frozen=True, slots=True, eq=False)
class ChunkRuns:
    """The runs of a read, in columns."""

    firsts: IntArray
    """(r,) the row of the first chunk of each."""
    counts: IntArray
    dims: IntArray
    encodings: npt.NDArray[np.uint8]
    numels: IntArray
    nbytes: IntArray
    """(r,) decoded bytes of all its chunks."""
    sizes: IntArray
    """(r, ndim) of each chunk."""
    part_offsets: IntArray
    """(r, ndim) what is wanted of the first chunk, in it."""
    part_sizes: IntArray
    place_offsets: IntArray
    """(r, ndim) where the run goes, in the wanted box."""
    place_sizes: IntArray

    def select(self, runs: slice) -> Iterator[ChunkRun]:
        """Some of them."""
        columns = (
            column[runs].tolist() for column in (self.firsts, self.counts, self.dims, self.encodings, self.numels)
        )
        parts = box_slices(self.part_offsets[runs], self.part_sizes[runs])
        places = box_slices(self.place_offsets[runs], self.place_sizes[runs])
        return map(ChunkRun, *columns, map(tuple, self.sizes[runs].tolist()), parts, places)


def find_chunk_runs(reads: Sequence[ChunkReads], requests_of: Sequence[IntArray]) -> Iterator[ChunkRuns]:
    """The runs of each read, many reads together.

    Args:
        requests_of: for each read, the (n, s) requests that fetch its ranges. A run's bytes come by one.
    """
    groups: dict[int, list[int]] = {}
    for at, read in enumerate(reads):
        groups.setdefault(len(read.want.box.sizes), []).append(at)
    found: dict[int, ChunkRuns] = {}
    for members in groups.values():
        for first in range(0, len(members), BOXES_PER_CALL):
            places = members[first : first + BOXES_PER_CALL]
            runs = _of_one_ndim([reads[at] for at in places], [requests_of[at] for at in places])
            found |= zip(places, runs, strict=True)
    return (found[at] for at in range(len(reads)))


def _of_one_ndim(reads: Sequence[ChunkReads], requests_of: Sequence[IntArray]) -> Iterator[ChunkRuns]:
    """The runs of reads of tensors that have as many dimensions."""
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
    """(n,) for each of n boxes, (n, ndim): the dimension in which it continues the one before, of its size; or -1."""
    dims = np.full(len(sizes), -1)
    steps = np.diff(offsets, axis=0)
    if steps.size:
        adjoin = ((steps == 0) | (steps == sizes[:-1])).all(axis=1) & ((steps != 0).sum(axis=1) == 1)
        alike = (sizes[1:] == sizes[:-1]).all(axis=1)
        dims[1:] = np.where(adjoin & alike, (steps != 0).argmax(axis=1), -1)
    return dims


def group_into_runs(dims: IntArray, nbytes: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Chunks as runs: (r,) the first chunk of each, their number, the dimension in which they adjoin (0 for one).

    Args:
        dims: (n,) as `continued_dims` gives.
        nbytes: (n,) decoded bytes of each chunk.
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
    """(r, ndim) the sizes of runs, from those of their chunks."""
    found = sizes.copy()
    if found.size:
        found[np.arange(len(found)), dims] *= counts
    return found
