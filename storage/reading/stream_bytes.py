"""Where the bytes of the chunks of a batch are: in host memory or in the memory of a device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ...planner.box import IntArray
from ...planner.chunk_reads import ChunkReads
from ..formats.native.codec import Planes, plane_shape
from .blocks import Block

Exceptions = tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]
"""Positions of float32 elements that heads and tails do not restore, and their bits."""


@dataclass(frozen=True, slots=True)
class StreamBytes:
    """The bytes of one stream of a batch, on the host."""

    data: memoryview
    stream: int
    first: int
    """The row of the first chunk of the batch."""
    begins: IntArray
    ends: IntArray
    """The byte range [begin, end) of each chunk in `data`."""

    @classmethod
    def of(cls, read: ChunkReads, rows: slice, stream: int, start: int, data: memoryview) -> StreamBytes:
        """Find the chunks of a batch in the bytes of a request.

        Args:
            rows: the rows of the batch in `read`.
            start: the position of `data` in its object.
        """
        begins = read.starts[rows, stream] - start
        return cls(data, stream, rows.start, begins, begins + read.fetched_bytes(rows)[:, stream])

    def rows(self, block: Block) -> slice:
        """Return the rows of a block, counted in the batch."""
        return slice(block.row - self.first, block.row - self.first + block.count)

    def range_of(self, block: Block) -> slice:
        """Return where the bytes of a block are in `data`. They are one byte range."""
        rows = self.rows(block)
        return slice(int(self.begins[rows.start]), int(self.ends[rows.stop - 1]))

    def planes(self, read: ChunkReads, block: Block) -> Planes:
        """Return the planes of the chunks of a block."""
        rows = self.rows(block)
        in_two_streams = read.starts.shape[1] == 2
        count, numel = 2, block.numel
        if not (in_two_streams or read.heads_only):
            count, numel = plane_shape(read.entry.dtype, block.numel)
        whole = not in_two_streams or self.stream == 0  # tails have exceptions after their planes
        return Planes.find(self.data, self.begins[rows], self.ends[rows], count, numel, whole=whole)


@dataclass(frozen=True, slots=True)
class StreamOnDevice:
    """The bytes of one stream of a batch, on a device. What describes them was read on the host."""

    data: torch.Tensor
    """(nbytes,) uint8, the bytes of the request."""
    copied: torch.cuda.Event | None
    """Reached when they have been copied to the device."""
    ranges: StreamBytes
    """Where the chunks are. Its own data is empty."""
    planes: dict[int, Planes]
    """By the first row of each block with planes. Their own data is empty."""
    exceptions: dict[int, dict[int, Exceptions]]
    """By the first row of each block with tails: the exceptions of its chunks."""
