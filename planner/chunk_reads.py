"""The part of a plan for one wanted box: its chunks, the byte ranges that store them, and the wanted part of each."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .box import Box, IntArray, columns_equal
from .entries import Encoding, Entry
from .slabs import ByteRuns


@dataclass(frozen=True, slots=True)
class WantedBox:
    """A box of a tensor that a rank wants to read."""

    name: str
    box: Box
    """The box, in the global tensor."""
    heads_only: bool = False
    """Read float32 values as bfloat16, from the heads alone. Ignored for values stored otherwise."""


@dataclass(frozen=True, slots=True, eq=False)
class ChunkReads:
    """The chunks that one wanted box overlaps, in columns: row i is a chunk, or a slab of a plain chunk.

    A row has s byte ranges, one for each stream that is read: s is 2 if both heads and tails are read, and
    1 otherwise.
    """

    want: WantedBox
    entry: Entry
    encodings: npt.NDArray[np.uint8]
    """(n,) the Encoding of the chunk."""
    objects: IntArray
    """(n, s) the object that stores the range: a position in `CheckpointIndex.objects`."""
    starts: IntArray
    """(n, s) the first byte of the range in the object."""
    stops: IntArray
    """(n, s) the byte after the last byte of the range."""
    skipped: IntArray
    """(n,) the number of bytes of a raw chunk that precede the range."""
    checksums: IntArray
    """(n, s) the position of the first checksum of the range."""
    checksum_counts: IntArray
    """(n,) the number of checksums of each range. Several are those of the pages of a raw chunk; chunks of other
    formats have none."""
    chunk_offsets: IntArray
    """(n, ndim) the box of the chunk or slab, in the global tensor."""
    chunk_sizes: IntArray
    wanted_offsets: IntArray
    """(n, ndim) the wanted part of this box, in the global tensor. All of it if it is a slab."""
    wanted_sizes: IntArray
    runs: ByteRuns | None = None
    """If there are plain chunks, which are cut into slabs here: the byte runs of each row."""
    itemsize: int = field(init=False, repr=False)
    """Bytes per element that is read: 2 if only the heads of float32 values are read."""
    has_one_checksum_each: bool = field(init=False, repr=False)
    """Whether all byte ranges have one checksum."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "itemsize", 2 if self.heads_only else self.entry.itemsize)
        object.__setattr__(self, "has_one_checksum_each", bool((self.checksum_counts == 1).all()))

    def __len__(self) -> int:
        return len(self.encodings)

    __eq__ = columns_equal
    __hash__ = None  # type: ignore[assignment]

    @property
    def heads_only(self) -> bool:
        return self.want.heads_only

    @property
    def bytes_needed(self) -> int:
        """Bytes of the wanted box after decoding."""
        return self.want.box.numel * self.itemsize

    @property
    def bytes_wanted(self) -> int:
        """Stored bytes of the ranges, without the gaps between byte runs."""
        return int((self.stops - self.starts).sum() if self.runs is None else self.runs.packed_bytes.sum())

    @property
    def bytes_compressed(self) -> int:
        """Stored bytes of the chunks that are compressed."""
        return int((self.stops - self.starts)[self.encodings == Encoding.PLANES].sum())

    @property
    def bytes_over(self) -> IntArray:
        """(n,) bytes of each chunk that are read but not wanted, measured before encoding.

        If a chunk must be decoded as a whole, these are all its unwanted values. Otherwise they are the rest of the
        pages around the wanted values (raw chunks), or the gaps between the byte runs (plain chunks).
        """
        whole: IntArray = (self.chunk_sizes.prod(axis=1) - self.wanted_sizes.prod(axis=1)) * self.itemsize
        pages = (self.stops - self.starts).sum(axis=1) - self.wanted_sizes.prod(axis=1) * self.itemsize
        over: IntArray = np.where(self.encodings == Encoding.RAW, np.maximum(pages, 0), whole)
        if self.runs is not None:
            between = np.where(self.runs.sparse, 0, self.runs.spans - self.runs.packed_bytes)
            over = np.where(self.encodings == Encoding.PLAIN, between, over)
        return over

    @property
    def bytes_spanned(self) -> int:
        """Stored bytes of the ranges, with the gaps between byte runs that are read over."""
        return int(self.fetched_bytes(slice(None)).sum())

    def fetched_bytes(self, rows: slice) -> IntArray:
        """Return the (m, s) bytes that are fetched for some rows: only the byte runs if a range is sparse."""
        spans: IntArray = self.stops[rows] - self.starts[rows]
        if self.runs is not None:
            spans[:, 0] = np.where(self.runs.sparse[rows], self.runs.packed_bytes[rows], spans[:, 0])
        return spans
