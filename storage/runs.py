"""Chunks that are worked on together: calls of numpy and of the codec cost as much as some KiB of values.

Consecutive chunks of one size that lie one after another in their object, are wanted whole, and adjoin along one
dimension of the tensor are a run: they are decoded into one array, and written by one strided copy. All other chunks
are runs of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..planner.box import IntArray, indexes
from ..planner.index import NATIVE
from ..planner.read_plan import TOGETHER, ChunkReads
from .place import Slices

RUN_BYTES = 512 * 1024
"""Decoded bytes of a run of several chunks, at most: they stay in a core's cache."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a read."""

    row: int
    """Of its first chunk."""
    count: int
    dim: int
    """In which its chunks adjoin."""
    encoding: int
    sizes: tuple[int, ...]
    """Of each chunk."""
    numel: int
    """Of each chunk."""
    part: Slices
    """What is wanted of the chunk; of several, all of each."""
    place: Slices
    """Where the whole run goes, in the wanted box."""


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """The runs of a read, in columns."""

    read: ChunkReads
    firsts: IntArray
    """(r,) the row of the first chunk of each."""
    counts: IntArray
    dims: IntArray

    @property
    def nbytes(self) -> IntArray:
        """(r,) decoded bytes."""
        numels: IntArray = self.read.chunk_sizes[self.firsts].prod(axis=1)
        return numels * self.counts * self.read.itemsize

    def select(self, runs: slice) -> Iterator[Run]:
        """Some of them."""
        read, firsts, counts, dims = self.read, self.firsts[runs], self.counts[runs], self.dims[runs]
        sizes, wanted = read.chunk_sizes[firsts], read.piece_sizes[firsts]
        extents = wanted.copy()
        if extents.size:
            extents[np.arange(len(firsts)), dims] *= counts
        begins = read.piece_offsets[firsts]
        parts = indexes(begins - read.chunk_offsets[firsts], wanted)
        places = indexes(begins - np.asarray(read.want.box.offsets, np.int64), extents)
        columns = (column.tolist() for column in (firsts, counts, dims, read.encodings[firsts]))
        return map(Run, *columns, map(tuple, sizes.tolist()), sizes.prod(axis=1).tolist(), parts, places)


def runs_of(reads: Sequence[ChunkReads], requests_of: Sequence[IntArray]) -> Iterator[Runs]:
    """The runs of each read, many reads together.

    Args:
        requests_of: for each read, the (n, s) requests that fetch its ranges. A run's bytes come by one.
    """
    groups: dict[int, list[int]] = {}
    for at, read in enumerate(reads):
        groups.setdefault(len(read.want.box.sizes), []).append(at)
    found: dict[int, Runs] = {}
    for members in groups.values():
        for first in range(0, len(members), TOGETHER):
            places = members[first : first + TOGETHER]
            runs = _of_one_rank([reads[at] for at in places], [requests_of[at] for at in places])
            found |= zip(places, runs, strict=True)
    return (found[at] for at in range(len(reads)))


def _of_one_rank(reads: Sequence[ChunkReads], requests_of: Sequence[IntArray]) -> Iterator[Runs]:
    """The runs of reads of tensors that have as many dimensions."""
    bounds = np.cumsum([0, *map(len, reads)])
    rows = np.arange(bounds[-1])
    dims = _continued(reads, np.concatenate([requests[:, [0, -1]] for requests in requests_of]))
    dims[bounds[:-1][np.diff(bounds) > 0]] = -1
    before = np.concatenate(([-1], dims[:-1]))[: len(rows)]
    opens = (dims < 0) | ((before >= 0) & (before != dims))
    nbytes = np.concatenate([read.chunk_sizes.prod(axis=1) * read.itemsize for read in reads])
    inside = rows - np.maximum.accumulate(np.where(opens, rows, 0))
    opens |= inside % np.maximum(1, RUN_BYTES // nbytes) == 0
    firsts = np.flatnonzero(opens)
    counts = np.diff(firsts, append=len(rows))
    along = np.where(counts > 1, np.append(dims, 0)[firsts + 1], 0)
    places = np.searchsorted(firsts, bounds).tolist()
    for read, row, (begin, end) in zip(reads, bounds.tolist(), pairwise(places), strict=False):
        yield Runs(read, firsts[begin:end] - row, counts[begin:end], along[begin:end])


def _continued(reads: Sequence[ChunkReads], requests: IntArray) -> IntArray:
    """(n,) for each chunk of the reads: the dimension in which it continues the one before, or -1."""

    def column(name: str) -> IntArray:
        return np.concatenate([getattr(read, name) for read in reads])

    sizes, encodings, offsets = column("chunk_sizes"), column("encodings"), column("chunk_offsets")
    starts = np.concatenate([read.starts[:, 0] for read in reads])
    stops = np.concatenate([read.stops[:, 0] for read in reads])
    whole = (sizes == column("piece_sizes")).all(axis=1) & (encodings <= max(NATIVE))
    steps = np.diff(offsets, axis=0)
    continued = whole[1:] & whole[:-1] & (encodings[1:] == encodings[:-1]) & (starts[1:] == stops[:-1])
    continued &= (sizes[1:] == sizes[:-1]).all(axis=1) & (requests[1:] == requests[:-1]).all(axis=1)
    continued &= ((steps == 0) | (steps == sizes[:-1])).all(axis=1) & ((steps != 0).sum(axis=1) == 1)
    dims = np.full(len(sizes), -1)
    if steps.size:
        dims[1:] = np.where(continued, (steps != 0).argmax(axis=1), -1)
    return dims
