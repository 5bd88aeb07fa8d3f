"""Plan which chunks to read for wanted boxes, which of their bytes, and with which requests.

For each wanted box, arithmetic on the grid of the tensor finds the chunks that the box overlaps, and the index returns
the byte ranges that store them. Then the ranges of all boxes are joined into requests. An encoded chunk is read as a
whole. A raw (uncompressed) chunk is read from the page of the first wanted element to the page of the last. A plain
chunk is read in slabs. Planning uses only the index. The plan is a value that another function executes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .box import IntArray, columns_equal, concat, first_elements, intersect_pairs
from .chunk_reads import ChunkReads, WantedBox
from .coalesce import DEFAULT_LIMITS, FREE_GAP_BYTES, MAX_REQUEST_BYTES, GapLimits, Requests, coalesce
from .entries import Encoding, Entry, Stream, are_native
from .errors import InvalidIndexError, ShapeMismatchError
from .grid import Grid
from .html import table
from .index import CheckpointIndex
from .report import PlanReport
from .slabs import MAX_SLAB_BYTES, ByteRuns, slabs_of

NATIVE_GAP_LIMITS = replace(DEFAULT_LIMITS, free_gap_bytes=FREE_GAP_BYTES)
"""The limits for native checkpoints. The order of their chunks leaves few gaps (`benchmarks/coalescing.py`)."""
BOXES_PER_CALL = 64
"""The number of boxes that are planned together: many enough that the overhead of numpy calls is small, few enough that
the temporary arrays are small (`benchmarks/planner.py`)."""


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """What a rank reads for several ranks, sends and receives, if ranks share a read."""

    objects: IntArray
    starts: IntArray
    stops: IntArray
    """(n,) the byte ranges that the rank reads for several ranks: the object, and [start, stop)."""
    is_given: npt.NDArray[np.bool_]
    """(requests,) whether the bytes of a request are in a range that one rank reads for several. The rank reads all
    other requests for itself."""
    bytes_sent: int
    bytes_received: int

    __eq__ = columns_equal
    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, eq=False)
class ReadPlan:
    """What one rank reads: the chunks of every wanted box, and the requests that fetch them."""

    reads: tuple[ChunkReads, ...]
    """One item per wanted box, in the order in which the boxes were passed to `plan_reads`."""
    requests: Requests
    """The requests. `request_of_range` has the number of the request for each byte range of all `reads`, one after
    another, row by row."""
    gap_limits: GapLimits = NATIVE_GAP_LIMITS
    """The limits under which gaps between byte ranges are read over."""
    order: IntArray | None = None
    """The requests in the order in which they must be fetched. By default, the order does not matter."""
    exchange: Exchange | None = None
    """What the rank reads for several ranks, sends and receives. None if it reads everything by itself."""

    __eq__ = columns_equal
    __hash__ = None  # type: ignore[assignment]

    def requests_of(self) -> Iterator[IntArray]:
        """Yield for each item of `reads` the (n, s) requests that fetch its byte ranges."""
        begin = 0
        for read in self.reads:
            count = read.objects.size
            yield self.requests.request_of_range[begin : begin + count].reshape(read.objects.shape)
            begin += count

    @property
    def fetched(self) -> Requests:
        """The requests to the store: those that the rank makes for itself, then those for several ranks."""
        if (exchange := self.exchange) is None:
            return self.requests
        own = self.requests.select(~exchange.is_given)
        return own.extended(exchange.objects, exchange.starts, exchange.stops)

    @property
    def report(self) -> PlanReport:
        """The bytes, requests and chunks of the plan."""
        fetched, exchange = self.fetched, self.exchange
        for_all = 0 if exchange is None else int((exchange.stops - exchange.starts).sum())
        given = 0 if exchange is None else self.requests.select(exchange.is_given).nbytes
        wanted = sum(read.bytes_wanted for read in self.reads)
        return PlanReport(
            bytes_needed=sum(read.bytes_needed for read in self.reads),
            bytes_wanted=wanted,
            bytes_fetched=fetched.nbytes,
            requests=fetched.byte_ranges,
            chunks=sum(map(len, self.reads)),
            objects=len(np.unique(fetched.objects)),
            bytes_over_read=max(0, fetched.nbytes - for_all + given - wanted),
            max_gap_bytes=self.gap_limits.max_gap_bytes,
            opaque_chunks=sum(int((read.encodings == Encoding.OPAQUE).sum()) for read in self.reads),
            bytes_compressed=sum(read.bytes_compressed for read in self.reads),
            bytes_sent=exchange.bytes_sent if exchange else 0,
            bytes_received=exchange.bytes_received if exchange else 0,
        )

    def __repr__(self) -> str:
        return f"ReadPlan({len(self.reads)} boxes: {self.report})"

    def _repr_html_(self) -> str:
        rows = [
            (
                read.want.name,
                read.want.box,
                len(read),
                f"{read.bytes_needed / 1e6:.2f}",
                f"{read.bytes_wanted / 1e6:.2f}",
            )
            for read in self.reads
        ]
        return table(str(self.report), ("tensor", "box", "chunks", "MB needed", "MB stored"), rows)


def plan_reads(
    index: CheckpointIndex,
    wants: Sequence[WantedBox],
    *,
    gap_limits: GapLimits = NATIVE_GAP_LIMITS,
    max_request_bytes: int = MAX_REQUEST_BYTES,
) -> ReadPlan:
    """Plan how to read boxes of the tensors of a checkpoint.

    Args:
        index: the index of the checkpoint.
        wants: the boxes to read.
        gap_limits: which gaps to read over, between chunks and between the byte runs of plain chunks.
        max_request_bytes: joined ranges are divided into requests at multiples of this many bytes. A range is never
            split, so a request may be longer.

    Raises:
        MissingTensorError: the checkpoint has no tensor of this name.
        ShapeMismatchError: a box is not inside its tensor.
        InvalidIndexError: the shards in the index do not cover a box exactly once.
    """
    reads = find_chunks(index, wants, gap_limits)
    return ReadPlan(reads, join_ranges(reads, gap_limits, max_request_bytes), gap_limits)


def row_column(reads: Sequence[ChunkReads], name: str) -> IntArray:
    """Return a column of all byte ranges of some reads, one after another, row by row."""
    return concat(getattr(read, name).reshape(-1) for read in reads)


def join_ranges(
    reads: Sequence[ChunkReads],
    gap_limits: GapLimits,
    max_request_bytes: int,
    kept: npt.NDArray[np.bool_] | None = None,
) -> Requests:
    """Join the byte ranges of reads into requests. See `plan_reads`.

    Args:
        kept: which byte ranges of all reads to join. Default: all.
    """
    objects, starts, stops = (row_column(reads, name) for name in ("objects", "starts", "stops"))
    kept = np.ones(len(starts), bool) if kept is None else kept
    position = np.cumsum(kept) - 1
    wanted = spanned = int((stops - starts)[kept].sum())
    sparse: dict[int, tuple[int, int, int]] = {}
    first = 0
    for read in reads:
        if read.runs is not None:
            runs, at = read.runs, np.flatnonzero(kept[first : first + len(read)])
            gaps = runs.spans[at] - runs.packed_bytes[at]
            wanted -= int(gaps.sum())
            spanned -= int(gaps[runs.sparse[at]].sum())
            at = at[runs.sparse[at]]
            columns = (position[first + at], runs.counts[at], runs.nbytes[at], runs.strides[at])
            sparse |= {row: (c, b, s) for row, c, b, s in zip(*(column.tolist() for column in columns), strict=True)}
        first += read.objects.size
    # The gaps that are read over inside slabs count toward the limit, too.
    over_read = spanned - wanted

    def joined(limits: GapLimits) -> Requests:
        return coalesce(
            objects[kept],
            starts[kept],
            stops[kept],
            limits,
            max_over_read_bytes=max(0, int(limits.max_over_read * wanted) - over_read),
            max_request_bytes=max_request_bytes,
            sparse=sparse,
        )

    if not gap_limits.enough_requests:
        return joined(gap_limits)
    requests = joined(NATIVE_GAP_LIMITS)
    return requests if len(requests) <= gap_limits.enough_requests else joined(gap_limits)


def find_chunks(
    index: CheckpointIndex, wants: Sequence[WantedBox], gap_limits: GapLimits, *, aligned: bool = False
) -> tuple[ChunkReads, ...]:
    """Find the chunks of each wanted box. Tensors with the same grid, such as the layers of a model, are processed
    together.

    Args:
        index: the index of the checkpoint.
        wants: the boxes.
        gap_limits: which gaps between the byte runs of plain chunks to read over.
        aligned: see `slabs_of`.
    """
    groups: dict[tuple[Grid, int, bool, bool], list[tuple[int, int]]] = {}
    for at, want in enumerate(wants):
        position = index.position(want.name)
        entry, rows = index.entries[position], index.segments_of(position)
        if not want.box.fits(entry.shape):
            raise ShapeMismatchError(
                f"{want.name!r} has shape {entry.shape}, and the box {want.box} is not inside it: pass a box inside "
                "the shape"
            )
        split = rows.stop > rows.start and bool(index.segments.streams[rows.start] == Stream.HEAD)
        key = (entry.grid, entry.itemsize, split, want.heads_only and split)
        groups.setdefault(key, []).append((position, at))
    found: dict[int, ChunkReads] = {}
    for (_, _, split, heads_only), members in groups.items():
        for first in range(0, len(members), BOXES_PER_CALL):
            positions, chosen = zip(*members[first : first + BOXES_PER_CALL], strict=True)
            named = [WantedBox(wants[at].name, wants[at].box, heads_only) for at in chosen]
            found |= zip(
                chosen, _find_in_one_grid(index, named, positions, with_tails=split and not heads_only), strict=True
            )
    reads = (found[at] for at in range(len(wants)))
    if not bool((index.segments.encodings == Encoding.PLAIN).any()):
        return tuple(reads)
    return tuple(
        _in_slabs(read, gap_limits, aligned=aligned) if bool((read.encodings == Encoding.PLAIN).any()) else read
        for read in reads
    )


def _find_in_one_grid(
    index: CheckpointIndex, wants: Sequence[WantedBox], positions: Sequence[int], *, with_tails: bool
) -> Iterator[ChunkReads]:
    """Find the chunks of each wanted box of tensors with the same grid.

    Args:
        index: the index of the checkpoint.
        wants: the boxes.
        positions: the positions of their entries in the index.
        with_tails: whether both the heads and the tails of each chunk are read.
    """
    entries = [index.entries[position] for position in positions]
    slices = [index.segments_of(position) for position in positions]
    rows = np.concatenate([np.arange(rows.start, rows.stop) for rows in slices])
    want_ids = np.repeat(np.arange(len(wants)), [rows.stop - rows.start for rows in slices])
    boxes = [index.segment_boxes(position) for position in positions]
    offsets, sizes = (np.concatenate(columns) for columns in zip(*boxes, strict=True))
    box_offsets = np.array([want.box.offsets for want in wants], np.int64)
    box_sizes = np.array([want.box.sizes for want in wants], np.int64)
    _, overlap = intersect_pairs(offsets, sizes, box_offsets[want_ids], box_sizes[want_ids])
    met = np.flatnonzero((overlap > 0).all(axis=1) & (index.segments.streams[rows] != Stream.TAIL))
    rows, want_ids = rows[met], want_ids[met]
    shards, ordinals, chunk_offsets, chunk_sizes = entries[0].grid.chunks_of_many(
        offsets[met], sizes[met], box_offsets[want_ids], box_sizes[want_ids]
    )
    rows, want_ids = rows[shards], want_ids[shards]
    wanted_offsets, wanted_sizes = intersect_pairs(
        chunk_offsets, chunk_sizes, box_offsets[want_ids], box_sizes[want_ids]
    )
    covered = np.zeros(len(wants), np.int64)
    np.add.at(covered, want_ids, wanted_sizes.prod(axis=1))
    for want, numel in zip(wants, covered.tolist(), strict=True):
        if numel != want.box.numel:
            raise InvalidIndexError(
                f"the shards of {want.name!r} cover {numel} of the {want.box.numel} elements of the box {want.box}: "
                "the metadata of the checkpoint is damaged, load a copy or an older checkpoint"
            )
    segments = np.stack([rows, rows + 1], axis=1) if with_tails else rows[:, None]
    boxed = (chunk_offsets, chunk_sizes, wanted_offsets, wanted_sizes)
    starts, stops, skipped, checksums, counts = _byte_ranges(index, entries[0], segments, ordinals, *boxed)
    encodings, objects = index.segments.encodings[rows], index.segments.objects[segments]
    bounds = np.searchsorted(want_ids, np.arange(len(wants) + 1)).tolist()
    for want, entry, (begin, end) in zip(wants, entries, pairwise(bounds), strict=True):
        part = slice(begin, end)
        yield ChunkReads(
            want=want,
            entry=entry,
            encodings=encodings[part],
            objects=objects[part],
            starts=starts[part],
            stops=stops[part],
            skipped=skipped[part],
            checksums=checksums[part],
            checksum_counts=counts[part],
            chunk_offsets=chunk_offsets[part],
            chunk_sizes=chunk_sizes[part],
            wanted_offsets=wanted_offsets[part],
            wanted_sizes=wanted_sizes[part],
        )


def _byte_ranges(
    index: CheckpointIndex,
    entry: Entry,
    segments: IntArray,
    ordinals: IntArray,
    chunk_offsets: IntArray,
    chunk_sizes: IntArray,
    wanted_offsets: IntArray,
    wanted_sizes: IntArray,
) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
    """Compute `starts`, `stops`, `skipped`, `checksums` and `checksum_counts` of ChunkReads.

    Args:
        index: the index of the checkpoint.
        entry: any entry that the chunks belong to: all have the same grid and element size.
        segments: (n, s) the segments that store the streams of each chunk.
        ordinals: (n,) the position of each chunk in its segment.
        chunk_offsets, chunk_sizes: (n, ndim) the box of each chunk.
        wanted_offsets, wanted_sizes: (n, ndim) the wanted part of it.
    """
    stored = [index.locate(column, ordinals) for column in segments.T]
    starts, lengths, checksums = (np.stack(columns, axis=1) for columns in zip(*stored, strict=True))
    stops, skipped = starts + lengths, np.zeros(len(starts), np.int64)
    encodings, streams = index.segments.encodings[segments[:, 0]], index.segments.streams[segments[:, 0]]
    raw = encodings == Encoding.RAW
    as_they_are = raw | (encodings == Encoding.PLAIN)
    counts = are_native(encodings).astype(np.int64)
    if bool(as_they_are.any()):
        nbytes = chunk_sizes.prod(axis=1) * entry.itemsize
        wrong = as_they_are & ((streams == Stream.HEAD) | (lengths[:, 0] != nbytes))
        if bool(wrong.any()):
            name = index.entries[int(index.segments.entries[segments[np.argmax(wrong), 0]])].name
            raise InvalidIndexError(
                f"a raw or plain chunk of {name!r} does not have as many bytes as its box: the metadata of the "
                "checkpoint is damaged, load a copy or an older checkpoint"
            )
    if bool(raw.any()):
        within = wanted_offsets - chunk_offsets
        first, last = (first_elements(at, chunk_sizes) for at in (within, within + wanted_sizes - 1))
        page = entry.page_bytes
        skipped = np.where(raw, first * entry.itemsize // page * page, 0)
        ends = -(-(last + 1) * entry.itemsize // page) * page
        stops[:, 0] = np.where(raw, starts[:, 0] + np.minimum(ends, lengths[:, 0]), stops[:, 0])
        starts[:, 0] += skipped
        pages, of_chunk = (-(-nbytes // page) for nbytes in (stops[:, 0] - starts[:, 0], lengths[:, 0]))
        whole = index.whole_checksums & raw & (of_chunk > 1) & (pages == of_chunk)
        counts = np.where(raw & ~whole, pages, counts)
        checksums[:, 0] += np.where(whole, pages, skipped // page)
    return starts, stops, skipped, checksums, counts


def _in_slabs(read: ChunkReads, gap_limits: GapLimits, *, aligned: bool) -> ChunkReads:
    """Replace the plain chunks by slabs, which contain only their wanted parts."""
    whole = read.stops[:, 0] - read.starts[:, 0]
    is_whole = bool((read.encodings == Encoding.PLAIN).all() and (read.wanted_sizes == read.chunk_sizes).all())
    if is_whole and int(whole.max()) <= MAX_SLAB_BYTES:  # most tensors of a model with many small ones
        once = np.ones(len(read), np.int64)
        return replace(read, runs=ByteRuns(once, whole, whole, once == 0))
    plain = np.flatnonzero(read.encodings == Encoding.PLAIN)
    order = list(read.entry.order or range(read.chunk_sizes.shape[1]))
    slabs = slabs_of(
        read.chunk_offsets[plain][:, order],
        read.chunk_sizes[plain][:, order],
        read.wanted_offsets[plain][:, order],
        read.wanted_sizes[plain][:, order],
        read.entry.itemsize,
        gap_limits,
        aligned=aligned,
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
    runs = ByteRuns(
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
        checksum_counts=read.checksum_counts[rows],
        chunk_offsets=of_slabs(slab_offsets, read.chunk_offsets),
        chunk_sizes=of_slabs(slab_sizes, read.chunk_sizes),
        wanted_offsets=of_slabs(slab_offsets, read.wanted_offsets),
        wanted_sizes=of_slabs(slab_sizes, read.wanted_sizes),
        runs=runs,
    )
