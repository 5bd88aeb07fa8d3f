"""What a plan says of one wanted box: its chunks, the byte ranges that hold them, and what of them is wanted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .box import Box, IntArray, columns_equal
from .entries import Encoding, Entry
from .slabs import ByteRuns


@dataclass(frozen=True, slots=True)
class Want:
    """A box of a tensor that a rank wants to read."""

    name: str
    box: Box
    """In the global tensor."""
    heads_only: bool = False
    """Of float32 values saved with heads and tails: read them as bfloat16, from the heads alone."""


@dataclass(frozen=True, slots=True, eq=False)
class ChunkReads:
    """The chunks that one wanted box meets, in columns. Row i is chunk i.

    A chunk has one byte range for each stream that is read: s = 1, or 2 where heads and tails are both read.
    """

    want: Want
    entry: Entry
    encodings: npt.NDArray[np.uint8]
    """(n,) how the chunk's bytes hold its values: an Encoding."""
    objects: IntArray
    """(n, s) the object that holds the range."""
    starts: IntArray
    """(n, s) the first byte of the range in the object."""
    stops: IntArray
    """(n, s) the byte after its last."""
    skipped: IntArray
    """(n,) bytes of a raw chunk that lie before the range."""
    checksums: IntArray
    """(n, s) the first checksum of the range; the pages of a raw range have one each. Other formats have none."""
    chunk_offsets: IntArray
    """(n, ndim) the chunk's box in the global tensor."""
    chunk_sizes: IntArray
    piece_offsets: IntArray
    """(n, ndim) the part of the chunk's box that is wanted, in the global tensor."""
    piece_sizes: IntArray
    runs: ByteRuns | None = None
    """Of the plain chunks of other formats, which are slabs here: how their bytes lie in the range."""

    def __len__(self) -> int:
        return len(self.encodings)

    __eq__ = columns_equal
    __hash__ = None  # type: ignore[assignment]

    @property
    def itemsize(self) -> int:
        """Bytes an element of what is read: 2 where only the heads of float32 values are."""
        return 2 if self.heads_only else self.entry.itemsize

    @property
    def heads_only(self) -> bool:
        return self.want.heads_only

    @property
    def bytes_needed(self) -> int:
        """Bytes of the wanted box, decoded."""
        return self.want.box.numel * self.itemsize

    @property
    def bytes_read(self) -> int:
        """Stored bytes of the ranges, without the gaps between runs."""
        return int((self.stops - self.starts).sum() if self.runs is None else self.runs.packed_bytes.sum())

    @property
    def bytes_over(self) -> IntArray:
        """(n,) bytes of the chunks' values that have to be read beside those wanted, as they are before encoding.

        Of a chunk that is decoded as a whole: what is not wanted of it. Of one that is not: the pages around what is
        wanted, or what lies between its runs.
        """
        whole: IntArray = (self.chunk_sizes.prod(axis=1) - self.piece_sizes.prod(axis=1)) * self.itemsize
        pages = (self.stops - self.starts).sum(axis=1) - self.piece_sizes.prod(axis=1) * self.itemsize
        over: IntArray = np.where(self.encodings == Encoding.RAW, np.maximum(pages, 0), whole)
        if self.runs is not None:
            between = np.where(self.runs.sparse, 0, self.runs.spans - self.runs.packed_bytes)
            over = np.where(self.encodings == Encoding.PLAIN, between, over)
        return over

    @property
    def bytes_spanned(self) -> int:
        """Stored bytes of the ranges, with the gaps between those runs that are not fetched alone."""
        return int(self.packed_bytes(slice(None)).sum())

    def packed_bytes(self, rows: slice) -> IntArray:
        """(m, s) what is fetched for some rows: their ranges; of a sparse one, its runs."""
        spans: IntArray = self.stops[rows] - self.starts[rows]
        if self.runs is not None:
            spans[:, 0] = np.where(self.runs.sparse[rows], self.runs.packed_bytes[rows], spans[:, 0])
        return spans
