"""The index of a checkpoint: which chunks hold which box of which tensor, and where their bytes are.

A tensor was saved as shards; a shard lies in the file as **segments**: one, or several where it is large or meets
several regions; and two for each where the heads and the tails of fp32 values are apart, so that either can be read
alone. A segment is a run of encoded **chunks** of one box, in the order of the tensor's grid. So a chunk needs no box
of its own in the index: its place in the segment gives it.

Everything that grows with the number of shards or chunks is a column, a numpy array. What the columns say is checked
once, here, against the tensors and the sizes of the objects; whoever holds a CheckpointIndex can rely on it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field

import numpy as np
import numpy.typing as npt

from .box import Box, IntArray, columns_equal, concat_ranges
from .entries import MAX_TOTAL_BYTES, NATIVE_ENCODINGS, Encoding, Entry, Segments, Stream
from .errors import InvalidIndexError, MissingTensorError
from .index_checks import check_references, count_chunks
from .regions import Regions
from .shard_boxes import join_segments


def nearest_names(name: str, names: Iterable[str], count: int) -> list[str]:
    """The names most like one that is not there."""
    return difflib.get_close_matches(name, list(names), n=count)


def missing_tensor(name: str, names: Iterable[str]) -> MissingTensorError:
    """The error for a name that is none of those that there are."""
    near = ", ".join(map(repr, nearest_names(name, names, 3)))
    return MissingTensorError(f"the checkpoint has no {name!r}" + (near and f"; nearest are {near}"))


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointIndex:
    """All that a plan needs to know of a checkpoint. Raises InvalidIndexError if it contradicts itself."""

    entries: tuple[Entry, ...]
    objects: tuple[tuple[str, int], ...]
    """Name and size in bytes of each data object."""
    segments: Segments
    lengths: npt.NDArray[np.uint32] | IntArray
    """Encoded bytes of each chunk, segment after segment."""
    checksums: npt.NDArray[np.uint64]
    """One for each chunk; of raw chunks, one for each page; of those of other formats, none."""
    held: InitVar[Regions | None] = None
    """The regions that it knows; all of each entry by default."""

    regions: Regions = field(init=False)
    first_chunk: IntArray = field(init=False, repr=False)
    """(segments + 1,) where a segment's chunks begin in `lengths`."""
    first_checksum: IntArray = field(init=False, repr=False)
    """(segments + 1,) where the checksums of a segment's chunks begin in `checksums`."""
    _positions: dict[str, int] = field(init=False, repr=False)
    _first_segment: IntArray = field(init=False, repr=False)
    first_extent: IntArray = field(init=False, repr=False)
    """(segments + 1,) where the box of a segment begins in `segments.offsets` and `segments.sizes`."""

    __eq__ = columns_equal
    __hash__ = None  # type: ignore[assignment]

    def __post_init__(self, held: Regions | None) -> None:
        assign = object.__setattr__
        assign(self, "_positions", {entry.name: i for i, entry in enumerate(self.entries)})
        if len(self._positions) != len(self.entries):
            raise InvalidIndexError("two tensors of the checkpoint have the same name")
        if any(not 0 <= nbytes <= MAX_TOTAL_BYTES for _, nbytes in self.objects):
            raise InvalidIndexError("a data object has an impossible size")
        check_references(self.segments, len(self.entries), len(self.objects))
        owners = self.segments.entries
        assign(self, "regions", Regions.whole(self.entries, owners) if held is None else held)
        if held is not None:
            held.check(self.entries, owners)
        assign(self, "_first_segment", np.searchsorted(owners, np.arange(len(self.entries) + 1)))
        ndims = np.array([len(entry.shape) for entry in self.entries], np.int64)[owners]
        assign(self, "first_extent", np.concatenate(([0], np.cumsum(ndims))))
        if len(self.segments.offsets) != ndims.sum() or len(self.segments.sizes) != ndims.sum():
            raise InvalidIndexError("the shards' boxes and the tensors' dimensions differ in number")
        counts = count_chunks(self.entries, self.segments, self.regions, self.first_extent)
        most = int(counts.max(initial=0))
        total = int(counts.sum()) if most <= len(self.lengths) else most
        if total != len(self.lengths):
            raise InvalidIndexError(
                f"the shards have {total} chunks or more, but there are {len(self.lengths)} lengths"
            )
        assign(self, "first_chunk", np.concatenate(([0], np.cumsum(counts))))
        if len(counts):
            self._check_lengths()
        self._check_places(counts)

    def _check_lengths(self) -> None:
        """No chunk takes more bytes than its values and what an encoding may add to them."""
        largest = [entry.grid.cell_numel * (entry.itemsize + 8) + 64 for entry in self.entries]
        most = np.array(largest, np.int64)[self.segments.entries]
        most[self.segments.encodings == Encoding.OPAQUE] = MAX_TOTAL_BYTES
        first = self.first_chunk[:-1]
        wrong = (np.minimum.reduceat(self.lengths, first) < 1) | (np.maximum.reduceat(self.lengths, first) > most)
        if bool(wrong.any()):
            name = self.entries[int(self.segments.entries[np.argmax(wrong)])].name
            raise InvalidIndexError(f"a chunk of {name!r} has an impossible length")

    def _check_places(self, counts: IntArray) -> None:
        """All segments lie inside their objects, and all chunks have their checksums."""
        segments, first = self.segments, self.first_chunk[:-1]
        nbytes = np.add.reduceat(self.lengths, first, dtype=np.int64) if len(first) else first
        object_bytes = np.array([nbytes for _, nbytes in self.objects], np.int64)[segments.objects]
        starts = segments.starts
        if bool(((starts < 0) | (starts > object_bytes) | (nbytes > object_bytes - starts)).any()):
            raise InvalidIndexError("a segment reaches beyond the end of its data object")
        checksums = counts
        if bool((segments.encodings != Encoding.PLANES).any()):
            checksums = np.add.reduceat(
                self.checksum_counts(np.arange(len(first)), self.lengths.astype(np.int64)), first
            )
        object.__setattr__(self, "first_checksum", np.concatenate(([0], np.cumsum(checksums))))
        if int(self.first_checksum[-1]) != len(self.checksums):
            raise InvalidIndexError(
                f"the chunks need {int(self.first_checksum[-1])} checksums, there are {len(self.checksums)}"
            )

    def check_disjoint(self) -> None:
        """Check that no two segments have bytes of an object in common. Raises InvalidIndexError."""
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
                f"{names[0]!r} and {names[1]!r} have bytes of object {self.objects[int(objects[at])][0]!r} in common"
            )

    def checksum_counts(self, segments: IntArray, lengths: IntArray) -> IntArray:
        """How many checksums each chunk of some segments has, given the lengths of all their chunks."""
        owners, of = np.unique(self.segments.entries[segments], return_inverse=True)
        pages = np.array([self.entries[owner].page_bytes for owner in owners.tolist()], np.int64)[of]
        counts = self.first_chunk[segments + 1] - self.first_chunk[segments]
        encodings = np.repeat(self.segments.encodings[segments], counts)
        found: IntArray = np.where(encodings == Encoding.RAW, -(-lengths // np.repeat(pages, counts)), 1)
        found[encodings > max(NATIVE_ENCODINGS)] = 0
        return found

    def locate(self, segments: IntArray, ordinals: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Where chunks are, that are given by their segment and their place in it.

        Returns, (n,) each: the first byte in the object, the length in bytes, the place of the first checksum.
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
        """Where the entry of this name stands. Raises MissingTensorError."""
        if name not in self._positions:
            raise missing_tensor(name, self._positions)
        return self._positions[name]

    def entry(self, name: str) -> Entry:
        """The entry of this name. Raises MissingTensorError."""
        return self.entries[self.position(name)]

    def segments_of(self, position: int) -> slice:
        """The rows of `segments` that belong to an entry."""
        return slice(int(self._first_segment[position]), int(self._first_segment[position + 1]))

    def segment_boxes(self, position: int) -> tuple[IntArray, IntArray]:
        """The (n, ndim) offsets and sizes of the segments of an entry."""
        rows = self.segments_of(position)
        extents = slice(int(self.first_extent[rows.start]), int(self.first_extent[rows.stop]))
        shape = (rows.stop - rows.start, len(self.entries[position].shape))
        return self.segments.offsets[extents].reshape(shape), self.segments.sizes[extents].reshape(shape)

    def shards(self, position: int) -> tuple[IntArray, IntArray]:
        """The (n, ndim) offsets and sizes of the shards that an entry was saved as, each once.

        Segments are shards, or parts of them; those that lie in one object, and make up a box, are told as one.
        """
        rows = self.segments_of(position)
        once = self.segments.streams[rows] != Stream.TAIL
        columns = (self.segments.objects[rows], self.segments.starts[rows], *self.segment_boxes(position))
        return join_segments(*(column[once] for column in columns))

    def shards_of(self, position: int) -> list[Box]:
        """`shards` as boxes."""
        offsets, sizes = (column.tolist() for column in self.shards(position))
        return [Box(tuple(offset), tuple(size)) for offset, size in zip(offsets, sizes, strict=True)]

    def chunks_of(self, position: int) -> slice:
        """The rows of `lengths` that belong to an entry."""
        rows = self.segments_of(position)
        return slice(int(self.first_chunk[rows.start]), int(self.first_chunk[rows.stop]))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Of each entry: how many chunks it has, the head and the tail of one counted once; their encoded bytes."""
        bounds = self._first_segment
        once = self.segments.streams != Stream.TAIL
        chunks = np.concatenate(([0], np.cumsum(np.where(once, np.diff(self.first_chunk), 0))))[bounds]
        nbytes = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))[self.first_chunk[bounds]]
        return list(zip(np.diff(chunks).tolist(), np.diff(nbytes).tolist(), strict=True))
