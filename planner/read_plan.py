"""Index and wanted boxes to a plan: which chunks to read, which bytes of them, and where their values go.

For each wanted box the plan names the chunks of the saved shards that it meets, found by arithmetic on the tensor's
grid, and the byte ranges that hold them; the ranges of all boxes are then joined into requests. A chunk that is
encoded is read whole; of a raw chunk, only the pages that hold the rows wanted. Planning touches nothing but the
index: a plan is a value that another function executes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .box import Box, IntArray, columns_equal, intersect_many
from .byte_ranges import Gaps, Runs, slabs_of
from .coalesce import MAX_GAP_BYTES, MAX_OVER_READ, MAX_REQUEST_BYTES, Requests, coalesce
from .errors import InvalidIndexError, ShapeMismatchError
from .html import table
from .index import CheckpointIndex, Encoding, Entry, Stream
from .report import PlanReport

GAPS = Gaps(MAX_GAP_BYTES, MAX_OVER_READ)
"""Between the chunks of a native checkpoint, whose order leaves few."""


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
    runs: Runs | None = None
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


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """What one rank reads: the chunks of every wanted box, and the requests that fetch them."""

    reads: tuple[ChunkReads, ...]
    """One for each want, in its order."""
    requests: Requests
    """`request_of_range` follows the rows of `reads`, each row's ranges together."""
    gaps: Gaps = GAPS
    """Which gaps between ranges were read over."""

    def requests_of(self) -> Iterator[IntArray]:
        """For each of `reads`, the (n, s) requests that fetch its ranges."""
        begin = 0
        for read in self.reads:
            count = read.objects.size
            yield self.requests.request_of_range[begin : begin + count].reshape(read.objects.shape)
            begin += count

    @property
    def report(self) -> PlanReport:
        """The plan in numbers."""
        return PlanReport(
            bytes_needed=sum(read.bytes_needed for read in self.reads),
            bytes_wanted=sum(read.bytes_read for read in self.reads),
            bytes_fetched=self.requests.nbytes,
            requests=self.requests.ranges,
            chunks=sum(map(len, self.reads)),
            objects=len(np.unique(self.requests.objects)),
            max_gap_bytes=self.gaps.most_bytes,
            opaque_chunks=sum(int((read.encodings == Encoding.OPAQUE).sum()) for read in self.reads),
        )

    def __repr__(self) -> str:
        return f"ReadPlan({len(self.reads)} boxes: {self.report})"

    def _repr_html_(self) -> str:
        rows = [
            (read.want.name, read.want.box, len(read), f"{read.bytes_needed / 1e6:.2f}", f"{read.bytes_read / 1e6:.2f}")
            for read in self.reads
        ]
        return table(str(self.report), ("tensor", "box", "chunks", "MB needed", "MB stored"), rows)


def plan_reads(
    index: CheckpointIndex,
    wants: Sequence[Want],
    *,
    gaps: Gaps = GAPS,
    max_request_bytes: int = MAX_REQUEST_BYTES,
) -> ReadPlan:
    """Plan the reading of boxes of a checkpoint's tensors.

    Args:
        gaps: which are read over, between chunks, and between the runs of plain ones.
        max_request_bytes: a request is closed once it spans this.

    Raises:
        MissingTensorError: the checkpoint has no tensor of a name.
        ShapeMismatchError: a box does not fit in its tensor.
        InvalidIndexError: the shards in the index do not cover a box exactly once.
    """
    reads = tuple(_plan_one(index, want, gaps) for want in wants)

    def column(name: str) -> IntArray:
        parts = [getattr(read, name).reshape(-1) for read in reads]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    sparse: dict[int, tuple[int, int, int]] = {}
    first = wanted = spanned = 0
    for read in reads:
        wanted += read.bytes_read
        if read.runs is not None:
            runs, at = read.runs, np.flatnonzero(read.runs.sparse)
            columns = (first + at, runs.counts[at], runs.nbytes[at], runs.strides[at])
            sparse |= {row: (c, b, s) for row, c, b, s in zip(*(column.tolist() for column in columns), strict=True)}
        spanned += read.bytes_spanned
        first += read.objects.size
    # What slabs read over already counts.
    left = max(0.0, gaps.most_over_read * wanted - (spanned - wanted))
    requests = coalesce(
        column("objects"),
        column("starts"),
        column("stops"),
        max_gap_bytes=gaps.most_bytes,
        max_over_read=left / max(spanned, 1),
        max_request_bytes=max_request_bytes,
        sparse=sparse,
    )
    return ReadPlan(reads, requests, gaps)


def _plan_one(index: CheckpointIndex, want: Want, gaps: Gaps) -> ChunkReads:
    position = index.position(want.name)
    entry = index.entries[position]
    if not want.box.fits(entry.shape):
        raise ShapeMismatchError(f"{want.name!r} has shape {entry.shape}, {want.box} is not inside it")
    rows = index.segments_of(position)
    offsets, sizes = index.shard_boxes(position)
    _, overlap = intersect_many(offsets, sizes, want.box)
    met = (overlap > 0).all(axis=1) & (index.segments.streams[rows] != Stream.TAIL)
    touched = np.flatnonzero(met)
    shards, ordinals, chunk_offsets, chunk_sizes = entry.grid.chunks_of_many(offsets[touched], sizes[touched], want.box)
    segment = rows.start + touched[shards]
    read = _locate(index, want, entry, segment, ordinals, chunk_offsets, chunk_sizes)
    return _in_slabs(read, gaps) if bool((read.encodings == Encoding.PLAIN).any()) else read


def _locate(
    index: CheckpointIndex,
    want: Want,
    entry: Entry,
    segment: IntArray,
    ordinal: IntArray,
    chunk_offsets: IntArray,
    chunk_sizes: IntArray,
) -> ChunkReads:
    """Find the byte ranges of chunks that are given by their segment and their place in it."""
    piece_offsets, piece_sizes = intersect_many(chunk_offsets, chunk_sizes, want.box)
    covered = int(piece_sizes.prod(axis=1).sum()) if want.box.numel else 0
    if covered != want.box.numel:
        raise InvalidIndexError(
            f"the shards of {want.name!r} cover {covered} of the {want.box.numel} elements of {want.box}"
        )
    split = len(segment) > 0 and index.segments.streams[segment[0]] == Stream.HEAD
    wide = split and not want.heads_only
    segments = np.stack([segment, segment + 1], axis=1) if wide else segment[:, None]
    places = [index.locate(column, ordinal) for column in segments.T]
    starts, lengths, checksums = (np.stack(columns, axis=1) for columns in zip(*places, strict=True))
    stops = starts + lengths
    encodings = index.segments.encodings[segment]
    raw = encodings == Encoding.RAW
    as_they_are = raw | (encodings == Encoding.PLAIN)
    skipped = np.zeros(len(segment), np.int64)
    if bool(as_they_are.any()):
        nbytes = chunk_sizes[as_they_are].prod(axis=1) * entry.itemsize
        if split or not np.array_equal(lengths[as_they_are, 0], nbytes):
            raise InvalidIndexError(f"a raw chunk of {want.name!r} has not the size of its box")
    if bool(raw.any()):
        first, last = _row_span(chunk_offsets, chunk_sizes, piece_offsets, piece_sizes)
        page = entry.page_bytes
        skipped = np.where(raw, first * entry.itemsize // page * page, 0)
        ends = -(-(last + 1) * entry.itemsize // page) * page
        stops[:, 0] = np.where(raw, starts[:, 0] + np.minimum(ends, lengths[:, 0]), stops[:, 0])
        starts[:, 0] += skipped
        checksums[:, 0] += skipped // page
    return ChunkReads(
        Want(want.name, want.box, heads_only=want.heads_only and split),
        entry,
        encodings,
        index.segments.objects[segments],
        starts,
        stops,
        skipped,
        checksums,
        chunk_offsets,
        chunk_sizes,
        piece_offsets,
        piece_sizes,
    )


def _in_slabs(read: ChunkReads, gaps: Gaps) -> ChunkReads:
    """The same with its plain chunks cut into slabs, which are what is wanted of them."""
    plain = np.flatnonzero(read.encodings == Encoding.PLAIN)
    order = list(read.entry.order or range(read.chunk_sizes.shape[1]))
    slabs = slabs_of(
        read.chunk_offsets[plain][:, order],
        read.chunk_sizes[plain][:, order],
        read.piece_offsets[plain][:, order],
        read.piece_sizes[plain][:, order],
        read.entry.itemsize,
        gaps,
    )
    back = np.argsort(order).astype(int)
    slab_offsets, slab_sizes = slabs.offsets[:, back], slabs.sizes[:, back]
    other = np.flatnonzero(read.encodings != Encoding.PLAIN)
    rows = np.concatenate([plain[slabs.chunks], other])
    count = len(slabs.chunks)

    def of_slabs(values: IntArray, column: IntArray) -> IntArray:
        return np.concatenate([values, column[other]])

    starts = read.starts[rows]
    starts[:count, 0] += slabs.begins
    stops = read.stops[rows]
    stops[:count, 0] = starts[:count, 0] + slabs.runs.spans
    once = np.ones(len(other), np.int64)
    spans = read.stops[other, 0] - read.starts[other, 0]
    runs = Runs(
        np.concatenate([slabs.runs.counts, once]),
        np.concatenate([slabs.runs.nbytes, spans]),
        np.concatenate([slabs.runs.strides, spans]),
        np.concatenate([slabs.runs.sparse, once == 0]),
    )
    return replace(
        read,
        encodings=read.encodings[rows],
        objects=read.objects[rows],
        starts=starts,
        stops=stops,
        skipped=read.skipped[rows],
        checksums=read.checksums[rows],
        chunk_offsets=of_slabs(slab_offsets, read.chunk_offsets),
        chunk_sizes=of_slabs(slab_sizes, read.chunk_sizes),
        piece_offsets=of_slabs(slab_offsets, read.piece_offsets),
        piece_sizes=of_slabs(slab_sizes, read.piece_sizes),
        runs=runs,
    )


def _row_span(
    chunk_offsets: IntArray, chunk_sizes: IntArray, piece_offsets: IntArray, piece_sizes: IntArray
) -> tuple[IntArray, IntArray]:
    """The first and the last element of each piece, counted in its row-major chunk."""
    first = np.zeros(len(chunk_offsets), np.int64)
    last = np.zeros_like(first)
    for d in range(chunk_offsets.shape[1]):
        low = piece_offsets[:, d] - chunk_offsets[:, d]
        first = first * chunk_sizes[:, d] + low
        last = last * chunk_sizes[:, d] + low + piece_sizes[:, d] - 1
    return first, last
