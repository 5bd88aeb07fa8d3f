"""The index of a checkpoint: which chunk stores which box of which tensor, and where its bytes are.

A tensor was saved as shards. A shard is stored as one **segment**, or as several if it is large or overlaps several
regions. If float32 values are stored as heads and tails, each of these segments becomes two, so that the heads can be
read alone. A segment consists of the **chunks** of one box, in the order of the grid of the tensor. So the index stores
no boxes of chunks: the position in the segment determines the box.

Everything that grows with the number of shards or chunks is a column, that is, a numpy array. The constructor checks
the columns against the tensors and the sizes of the objects. `check_disjoint` also checks that no two segments share
bytes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .box import Box, IntArray, columns_equal, concat_ranges
from .entries import MAX_TOTAL_BYTES, Encoding, Entry, Segments, Stream, are_native
from .errors import InvalidIndexError, MissingTensorError
from .index_checks import check_references, count_chunks
from .regions import Regions
from .shard_boxes import join_segments


def nearest_names(name: str, names: Iterable[str], count: int) -> list[str]:
    """Return up to `count` names that are similar to a name that does not exist."""
    return difflib.get_close_matches(name, list(names), n=count)


def missing_tensor(name: str, names: Iterable[str]) -> MissingTensorError:
    """Return the error for a name that the checkpoint does not have; it suggests similar names."""
    near = ", ".join(map(repr, nearest_names(name, names, 3)))
    return MissingTensorError(f"the checkpoint has no {name!r}" + (near and f"; nearest are {near}"))


def count_checksums(
    encodings: npt.NDArray[Any], lengths: npt.NDArray[Any], page_bytes: IntArray, *, whole: bool
) -> IntArray:
    """Return the number of checksums of each chunk.

    An encoded chunk has one. A raw chunk has one for each page, and after them one of all its bytes if there are
    several pages: a part can be verified alone, and the whole with one call. Chunks of other formats have none.

    Args:
        encodings: (n,) the Encoding of each chunk.
        lengths: (n,) its stored bytes.
        page_bytes: (n,) the size of a page of its tensor.
        whole: whether raw chunks have checksums of all their bytes.
    """
    pages: IntArray = np.where(encodings == Encoding.RAW, -(-lengths.astype(np.int64) // page_bytes), 1)
    if whole:
        pages += pages > 1
    pages[~are_native(encodings)] = 0
    return pages


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointIndex:
    """The metadata of a checkpoint that planning needs.

    Raises:
        InvalidIndexError: the columns contradict each other.
    """

    entries: tuple[Entry, ...]
    objects: tuple[tuple[str, int], ...]
    """The name and the size in bytes of each data object."""
    segments: Segments
    lengths: npt.NDArray[np.uint32] | IntArray
    """The encoded bytes of each chunk, segment after segment."""
    checksums: npt.NDArray[np.uint64]
    """The checksums of all chunks, segment after segment: see `count_checksums`."""
    held: InitVar[Regions | None] = None
    """The regions of tensors that this index covers. By default, it covers whole tensors."""
    whole_checksums: bool = True
    """Whether a raw chunk with several pages also has a checksum of all its bytes. Old checkpoints do not have it."""

    regions: Regions = field(init=False)
    first_chunk: IntArray = field(init=False, repr=False)
    """(segments + 1,) the position of the first chunk of each segment in `lengths`."""
    first_checksum: IntArray = field(init=False, repr=False)
    """(segments + 1,) the position of the first checksum of each segment in `checksums`."""
    _positions: dict[str, int] = field(init=False, repr=False)
    _first_segment: IntArray = field(init=False, repr=False)
    first_extent: IntArray = field(init=False, repr=False)
    """(segments + 1,) the position of the box of each segment in `segments.offsets` and `segments.sizes`."""

    __eq__ = columns_equal
    __hash__ = None  # type: ignore[assignment]

    def __post_init__(self, held: Regions | None) -> None:
        assign = object.__setattr__
        assign(self, "_positions", {entry.name: i for i, entry in enumerate(self.entries)})
        if len(self._positions) != len(self.entries):
            raise InvalidIndexError("two entries of the checkpoint have the same name")
        if any(not 0 <= nbytes <= MAX_TOTAL_BYTES for _, nbytes in self.objects):
            name, nbytes = next(pair for pair in self.objects if not 0 <= pair[1] <= MAX_TOTAL_BYTES)
            raise InvalidIndexError(
                f"object {name!r} has the impossible size of {nbytes} bytes; it must be from 0 to {MAX_TOTAL_BYTES}"
            )
        check_references(self.segments, len(self.entries), len(self.objects))
        entry_ids = self.segments.entries
        assign(self, "regions", Regions.whole(self.entries, entry_ids) if held is None else held)
        if held is not None:
            held.check(self.entries, entry_ids)
        assign(self, "_first_segment", np.searchsorted(entry_ids, np.arange(len(self.entries) + 1)))
        ndims = np.array([len(entry.shape) for entry in self.entries], np.int64)[entry_ids]
        assign(self, "first_extent", np.concatenate(([0], np.cumsum(ndims))))
        if len(self.segments.offsets) != ndims.sum() or len(self.segments.sizes) != ndims.sum():
            raise InvalidIndexError(
                f"the boxes of the shards need {ndims.sum()} offsets and sizes, got {len(self.segments.offsets)} and "
                f"{len(self.segments.sizes)}"
            )
        counts = count_chunks(self.entries, self.segments, self.regions, self.first_extent)
        most = int(counts.max(initial=0))
        total = int(counts.sum()) if most <= len(self.lengths) else most
        if total != len(self.lengths):
            raise InvalidIndexError(
                f"the shards have at least {total} chunks, but the index has {len(self.lengths)} lengths"
            )
        assign(self, "first_chunk", np.concatenate(([0], np.cumsum(counts))))
        if len(counts):
            self._check_lengths()
        self._check_positions(counts)

    def _check_lengths(self) -> None:
        """Check that no chunk has more bytes than its values plus the maximum overhead of an encoding."""
        largest = [min(entry.grid.cell_numel * (entry.itemsize + 8) + 64, MAX_TOTAL_BYTES) for entry in self.entries]
        most = np.array(largest, np.int64)[self.segments.entries]
        most[self.segments.encodings == Encoding.OPAQUE] = MAX_TOTAL_BYTES
        first = self.first_chunk[:-1]
        wrong = (np.minimum.reduceat(self.lengths, first) < 1) | (np.maximum.reduceat(self.lengths, first) > most)
        if bool(wrong.any()):
            name = self.entries[int(self.segments.entries[np.argmax(wrong)])].name
            raise InvalidIndexError(
                f"a chunk of {name!r} has an impossible length: none, or more than its values can need"
            )

    def _check_positions(self, counts: IntArray) -> None:
        """Check that all segments are inside their objects, and that all chunks have their checksums."""
        segments, first = self.segments, self.first_chunk[:-1]
        nbytes = np.add.reduceat(self.lengths, first, dtype=np.int64) if len(first) else first
        object_bytes = np.array([nbytes for _, nbytes in self.objects], np.int64)[segments.objects]
        starts = segments.starts
        if bool(((starts < 0) | (starts > object_bytes) | (nbytes > object_bytes - starts)).any()):
            raise InvalidIndexError("a segment extends beyond the end of its data object")
        checksums = counts
        if bool((segments.encodings != Encoding.PLANES).any()):
            checksums = np.add.reduceat(
                self.checksum_counts(np.arange(len(first)), self.lengths.astype(np.int64)), first
            )
        object.__setattr__(self, "first_checksum", np.concatenate(([0], np.cumsum(checksums))))
        if int(self.first_checksum[-1]) != len(self.checksums):
            raise InvalidIndexError(
                f"the chunks need {int(self.first_checksum[-1])} checksums, but the index has {len(self.checksums)}"
            )

    def check_disjoint(self) -> None:
        """Check that no two segments share bytes of an object. Raises InvalidIndexError."""
        if len(self.segments) < 2:
            return
        segments = self.segments
        stops = segments.starts + np.add.reduceat(self.lengths, self.first_chunk[:-1], dtype=np.int64)
        order = np.lexsort((segments.starts, segments.objects))
        objects, starts, stops = segments.objects[order], segments.starts[order], stops[order]
        shared = (objects[1:] == objects[:-1]) & (starts[1:] < stops[:-1])
        if bool(shared.any()):
            at = int(np.argmax(shared))
            names = [self.entries[int(segments.entries[order[i]])].name for i in (at, at + 1)]
            raise InvalidIndexError(
                f"{names[0]!r} and {names[1]!r} share bytes of object {self.objects[int(objects[at])][0]!r}"
            )

    def checksum_counts(self, segments: IntArray, lengths: IntArray) -> IntArray:
        """Return the number of checksums of each chunk of some segments, given the lengths of all their chunks."""
        entry_ids, of = np.unique(self.segments.entries[segments], return_inverse=True)
        page_bytes = np.array([self.entries[entry_id].page_bytes for entry_id in entry_ids.tolist()], np.int64)[of]
        chunks = self.first_chunk[segments + 1] - self.first_chunk[segments]
        encodings, pages = np.repeat(self.segments.encodings[segments], chunks), np.repeat(page_bytes, chunks)
        return count_checksums(encodings, lengths, pages, whole=self.whole_checksums)

    def locate(self, segments: IntArray, ordinals: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Return where chunks are stored.

        Args:
            segments: (n,) the segment of each chunk, ascending.
            ordinals: (n,) the position of each chunk in its segment.

        Returns:
            Three arrays of shape (n,): the first byte in the object, the length in bytes, and the position of the first
            checksum in `checksums`.
        """
        if len(segments) == 0:
            return segments, segments, segments
        opens = np.concatenate(([True], segments[1:] != segments[:-1]))
        touched, which = segments[opens], np.cumsum(opens) - 1
        counts = self.first_chunk[touched + 1] - self.first_chunk[touched]
        base = np.cumsum(counts) - counts
        lengths = self.lengths[concat_ranges(self.first_chunk[touched], counts)].astype(np.int64)
        rows = base[which] + ordinals

        def counted_in_segment(values: IntArray) -> IntArray:
            before: IntArray = np.cumsum(values) - values
            inside: IntArray = before[rows] - before[base[which]]
            return inside

        checksums = ordinals
        if bool((self.segments.encodings[touched] != Encoding.PLANES).any()):
            checksums = counted_in_segment(self.checksum_counts(touched, lengths))
        return (
            self.segments.starts[segments] + counted_in_segment(lengths),
            lengths[rows],
            self.first_checksum[segments] + checksums,
        )

    def __contains__(self, name: str) -> bool:
        return name in self._positions

    def position(self, name: str) -> int:
        """Return the position of an entry in `entries`. Raises MissingTensorError."""
        if name not in self._positions:
            raise missing_tensor(name, self._positions)
        return self._positions[name]

    def entry(self, name: str) -> Entry:
        """Return the entry with this name. Raises MissingTensorError."""
        return self.entries[self.position(name)]

    def segments_of(self, position: int) -> slice:
        """Return the rows of `segments` that belong to an entry."""
        return slice(int(self._first_segment[position]), int(self._first_segment[position + 1]))

    def segment_boxes(self, position: int) -> tuple[IntArray, IntArray]:
        """Return the (n, ndim) offsets and sizes of the segments of an entry."""
        rows = self.segments_of(position)
        extents = slice(int(self.first_extent[rows.start]), int(self.first_extent[rows.stop]))
        shape = (rows.stop - rows.start, len(self.entries[position].shape))
        return self.segments.offsets[extents].reshape(shape), self.segments.sizes[extents].reshape(shape)

    def shards(self, position: int) -> tuple[IntArray, IntArray]:
        """Return the (n, ndim) offsets and sizes of the shards that an entry was saved as.

        A segment is a shard or a part of one. Adjacent segments of one object that form a box together count as one
        shard.
        """
        rows = self.segments_of(position)
        once = self.segments.streams[rows] != Stream.TAIL
        columns = (self.segments.objects[rows], self.segments.starts[rows], *self.segment_boxes(position))
        return join_segments(*(column[once] for column in columns))

    def shards_of(self, position: int) -> list[Box]:
        """Return the shards that an entry was saved as, as boxes."""
        offsets, sizes = (column.tolist() for column in self.shards(position))
        return [Box(tuple(offset), tuple(size)) for offset, size in zip(offsets, sizes, strict=True)]

    def chunks_of(self, position: int) -> slice:
        """Return the rows of `lengths` that belong to an entry."""
        rows = self.segments_of(position)
        return slice(int(self.first_chunk[rows.start]), int(self.first_chunk[rows.stop]))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The number of chunks (a head and its tail count as one) and the encoded bytes of each entry."""
        bounds = self._first_segment
        once = self.segments.streams != Stream.TAIL
        chunks = np.concatenate(([0], np.cumsum(np.where(once, np.diff(self.first_chunk), 0))))[bounds]
        nbytes = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))[self.first_chunk[bounds]]
        return list(zip(np.diff(chunks).tolist(), np.diff(nbytes).tolist(), strict=True))
