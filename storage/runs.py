"""Chunks that are worked on together: calls of numpy and of the codec cost as much as some KiB of values.

Consecutive chunks of one size that lie one after another in their object, are wanted whole, and adjoin along one
dimension of the tensor are a run: they are decoded into one array, and written by one strided copy. All other chunks
are runs of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..planner.box import IntArray, indexes
from ..planner.index import NATIVE
from ..planner.read_plan import ChunkReads
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

    @classmethod
    def of(cls, read: ChunkReads, opens: IntArray) -> Runs:
        """The runs of a read; chunk i + 1 begins one wherever `opens[i]`, (n - 1,) bool, says so."""
        dims = np.where(opens, -1, _adjoining(read))
        before = np.concatenate(([-1], dims[:-1]))
        begins = np.concatenate(([True], (dims < 0) | ((before >= 0) & (before != dims))))
        most = np.maximum(1, RUN_BYTES // (read.chunk_sizes.prod(axis=1) * read.itemsize))
        rows = np.arange(len(read))
        begins |= (rows - np.maximum.accumulate(np.where(begins, rows, 0))) % most == 0
        firsts = np.flatnonzero(begins)
        counts = np.diff(firsts, append=len(read))
        along = np.concatenate((dims, [0]))[firsts]  # chunk i + 1 continues chunk i in dims[i]
        return cls(read, firsts, counts, np.where(counts > 1, along, 0))

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


def _adjoining(read: ChunkReads) -> IntArray:
    """(n - 1,): the dimension in which each chunk but the first continues the one before, or -1."""
    sizes, encodings, steps = read.chunk_sizes, read.encodings, np.diff(read.chunk_offsets, axis=0)
    if steps.size == 0:
        return np.full(len(steps), -1)
    whole = (sizes == read.piece_sizes).all(axis=1) & (encodings <= max(NATIVE))
    adjoin = whole[1:] & whole[:-1] & (encodings[1:] == encodings[:-1]) & (sizes[1:] == sizes[:-1]).all(axis=1)
    adjoin &= ((steps == 0) | (steps == sizes[:-1])).all(axis=1) & ((steps != 0).sum(axis=1) == 1)
    adjoin &= (read.starts[1:] == read.stops[:-1]).all(axis=1)
    dims: IntArray = np.where(adjoin, (steps != 0).argmax(axis=1), -1)
    return dims
