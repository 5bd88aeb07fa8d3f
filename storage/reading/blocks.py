"""Group chunks into blocks, which are placed with one strided copy.

A call of numpy costs as much as copying some KiB of values (`benchmarks/overhead.py`), so that one call should place
many chunks. A block consists of consecutive chunks of equal size that form a box of the tensor: for example all chunks
of one request that are in the same rows. All bytes of a block are consecutive in one object and come from one request.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ...planner.box import IntArray, box_slices
from ...planner.chunk_reads import ChunkReads
from ...planner.entries import Encoding, are_native
from ...planner.read_plan import BOXES_PER_CALL
from ..formats.native.chunk_runs import Slices, continued_dims, group_into_runs, run_sizes


@dataclass(frozen=True, slots=True)
class Block:
    """Chunks that form a box, in the order of their bytes."""

    row: int
    """The row of the first chunk in the ChunkReads."""
    encoding: int
    numel: int
    """The number of elements of each chunk."""
    sizes: tuple[int, ...]
    """The sizes of each chunk."""
    part: Slices
    """The part of the chunk that is needed. If there are several chunks, the whole of each."""
    position: Slices
    """The position of the block in the wanted box."""
    count: int = 1
    """The number of chunks."""
    counts: tuple[int, ...] = ()
    """The number of chunks in each direction, the outermost direction first. Empty for a single chunk."""
    dims: tuple[int, ...] = ()
    """The dimension of each direction."""


@functools.lru_cache(maxsize=256)  # the blocks of a model have few shapes
def split_shape(block_sizes: tuple[int, ...], counts: tuple[int, ...], dims: tuple[int, ...]) -> _Split:
    """Return how to view a block with one axis for each direction.

    Args:
        block_sizes: the sizes of each chunk of the block.
        counts, dims: see `Block`.

    Returns:
        The shape if each dimension is split into the chunks along it and their size, and its axes in the order of the
        bytes: first the directions, then the dimensions of a chunk.
    """
    along = dict(zip(dims, counts, strict=True))
    shape = tuple(n for d, size in enumerate(block_sizes) for n in ((along[d], size) if d in along else (size,)))
    first = [d + sum(dim < d for dim in dims) for d in range(len(block_sizes))]
    return shape, (*(first[dim] for dim in dims), *(at + (d in along) for d, at in enumerate(first)))


_Split = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """The blocks of a read, in columns. Row i is block i."""

    batches: list[tuple[slice, slice]]
    """The rows of each batch in the ChunkReads, and its blocks. All chunks of a batch come from the same requests."""
    firsts: IntArray
    """(b,) the rows of their first chunks in the ChunkReads."""
    counts: IntArray
    """(b, levels) the number of chunks in each direction, the outermost first; 1 if there is no such direction."""
    dims: IntArray
    """(b, levels) the dimension of each direction."""
    encodings: npt.NDArray[np.uint8]
    numels: IntArray
    sizes: IntArray
    """(b, ndim) the sizes of each of their chunks."""
    part_offsets: IntArray
    """(b, ndim) the part of the first chunk that is needed, relative to the chunk."""
    part_sizes: IntArray
    position_offsets: IntArray
    """(b, ndim) the position of the block in the wanted box."""
    position_sizes: IntArray
    _made: list[Block] = field(default_factory=list, init=False)

    def select(self, blocks: slice) -> list[Block]:
        """Return some of the blocks. All of them are made when it is first called."""
        if not self._made:
            self._made[:] = self._make()  # one step: another thread may do the same
        return self._made[blocks]

    def _make(self) -> Iterator[Block]:
        columns = [column.tolist() for column in (self.firsts, self.encodings, self.numels)]
        parts = box_slices(self.part_offsets, self.part_sizes)
        positions = box_slices(self.position_offsets, self.position_sizes)
        sizes = map(tuple, self.sizes.tolist())
        counts, dims = map(tuple, self.counts.tolist()), map(tuple, self.dims.tolist())
        directions = zip(*map(_without_ones, counts, dims), strict=True)
        return map(Block, *columns, sizes, parts, positions, *directions)


@functools.lru_cache(maxsize=256)
def _without_ones(counts: tuple[int, ...], dims: tuple[int, ...]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return the number of chunks, and the directions with more than one chunk."""
    kept = [at for at, count in enumerate(counts) if count > 1]
    return math.prod(counts), tuple(counts[at] for at in kept), tuple(dims[at] for at in kept)


def find_blocks(reads: Sequence[ChunkReads], requests_of: Sequence[IntArray]) -> Iterator[Blocks]:
    """Find the blocks of each read. Many reads are processed together.

    Args:
        reads: the reads.
        requests_of: for each read, the (n, s) requests that fetch the byte ranges of its n chunks.
    """
    groups: dict[int, list[int]] = {}
    for at, read in enumerate(reads):
        groups.setdefault(len(read.want.box.sizes), []).append(at)
    found: dict[int, Blocks] = {}
    for members in groups.values():
        for first in range(0, len(members), BOXES_PER_CALL):
            positions = members[first : first + BOXES_PER_CALL]
            blocks = _blocks_of_one_ndim([reads[at] for at in positions], [requests_of[at] for at in positions])
            found |= zip(positions, blocks, strict=True)
    return (found[at] for at in range(len(reads)))


def _blocks_of_one_ndim(reads: Sequence[ChunkReads], requests_of: Sequence[IntArray]) -> Iterator[Blocks]:
    """Find the blocks of reads whose tensors have the same number of dimensions."""
    lengths = [len(read) for read in reads]
    bounds = np.cumsum([0, *lengths])

    def column(name: str) -> IntArray:
        return np.concatenate([getattr(read, name) for read in reads])

    sizes, encodings = column("chunk_sizes"), column("encodings")
    offsets, wanted_offsets, wanted_sizes = column("chunk_offsets"), column("wanted_offsets"), column("wanted_sizes")
    origins = np.repeat(np.array([read.want.box.offsets for read in reads], np.int64), lengths, axis=0)
    starts = np.concatenate([read.starts[:, 0] for read in reads])
    stops = np.concatenate([read.stops[:, 0] for read in reads])
    requests = np.concatenate([requests[:, [0, -1]] for requests in requests_of])

    whole = (sizes == wanted_sizes).all(axis=1)
    whole &= are_native(encodings) | np.concatenate(list(map(_are_dense, reads)))
    same_batch = (requests[1:] == requests[:-1]).all(axis=1)
    between = bounds[1:-1]
    same_batch[between[(between > 0) & (between <= len(same_batch))] - 1] = False
    alike = same_batch & whole[1:] & whole[:-1] & (encodings[1:] == encodings[:-1]) & (starts[1:] == stops[:-1])
    firsts, counts, dims, block_sizes = form_boxes(offsets, sizes, alike)

    ends = np.searchsorted(firsts, bounds)
    rows = firsts - np.repeat(bounds[:-1], np.diff(ends))
    columns = [rows, counts, dims, encodings[firsts], sizes[firsts].prod(axis=1), sizes[firsts]]
    columns += [
        wanted_offsets[firsts] - offsets[firsts],
        wanted_sizes[firsts],
        wanted_offsets[firsts] - origins[firsts],
    ]
    columns += [np.where((counts.prod(axis=1) > 1)[:, None], block_sizes, wanted_sizes[firsts])]
    opens = np.flatnonzero(np.concatenate((np.ones(min(len(sizes), 1), np.bool_), ~same_batch)))
    batches = list(zip(_slices_from(opens, bounds), _slices_from(np.searchsorted(firsts, opens), ends), strict=True))
    batch_ends = np.searchsorted(opens, bounds)
    for (begin, end), (first, last) in zip(pairwise(ends.tolist()), pairwise(batch_ends.tolist()), strict=True):
        yield Blocks(batches[first:last], *(column[begin:end] for column in columns))


def _slices_from(begins: IntArray, bounds: IntArray) -> Iterator[slice]:
    """Yield the slices between positions in lists that follow one another, each relative to the begin of its list.

    Args:
        begins: (n,) the first position of each slice. Each list with items has a slice that begins with it.
        bounds: (lists + 1,) the first position of each list.
    """
    base = bounds[np.searchsorted(bounds, begins, "right") - 1]
    ends = np.concatenate((begins[1:], bounds[-1:]))[: len(begins)]
    return map(slice, (begins - base).tolist(), (ends - base).tolist())


def _are_dense(read: ChunkReads) -> npt.NDArray[np.bool_]:
    """Return which of the n chunks of a read are plain and row-major, without bytes between their runs: (n,) bool."""
    if read.runs is None or read.entry.order is not None:
        return np.zeros(len(read), np.bool_)
    runs = read.runs
    dense: npt.NDArray[np.bool_] = read.encodings == Encoding.PLAIN
    dense &= ~runs.sparse
    dense &= runs.packed_bytes == runs.spans
    return dense


def form_boxes(
    offsets: IntArray, sizes: IntArray, alike: npt.NDArray[np.bool_]
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Group consecutive chunks that form a box: chunks in a row, rows of chunks in a plane, and so on.

    Args:
        offsets, sizes: (n, ndim) the boxes of the chunks.
        alike: (n - 1,) whether a chunk and the next one may be in the same block.

    Returns:
        For each block: (b,) its first chunk; (b, levels) the number of chunks in each direction, the outermost first,
        and the dimension of each direction; (b, ndim) the sizes of the whole block.
    """
    firsts = np.arange(len(sizes))
    counts: list[IntArray] = []
    dims: list[IntArray] = []
    for _ in range(sizes.shape[1]):
        continued = continued_dims(offsets, sizes)
        same = alike[firsts[1:] - 1]
        for count, dim in zip(counts, dims, strict=True):
            same &= (count[1:] == count[:-1]) & (dim[1:] == dim[:-1])
            same &= (count[1:] == 1) | (dim[1:] != continued[1:])
        continued[1:][~same] = -1
        opening, count, dim = group_into_runs(continued)
        if len(opening) == len(firsts):
            break
        counts = [count, *(column[opening] for column in counts)]
        dims = [dim, *(column[opening] for column in dims)]
        firsts, offsets, sizes = firsts[opening], offsets[opening], run_sizes(sizes[opening], count, dim)
    if not counts:
        counts, dims = [np.ones(len(firsts), np.int64)], [np.zeros(len(firsts), np.int64)]
    return firsts, np.stack(counts, axis=1), np.stack(dims, axis=1), sizes
