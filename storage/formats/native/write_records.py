"""Records of what each rank wrote. Ranks send them in columns to the rank that commits, which builds the index.

Ranks that wrote shards of the same entries send the same bytes for these, and rank 0 decodes them once. So building the
index takes few operations per rank (`benchmarks/many_ranks.py`).
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ....planner.box import Box, IntArray, concat, concat_ranges, first_elements
from ....planner.entries import ITEMSIZES, Entry, Kind, Segments
from ....planner.grid import Grid
from ....planner.index import CheckpointIndex, count_checksums
from ...errors import ArgumentError


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """A segment that was written."""

    stream: int
    encoding: int
    start: int
    lengths: bytes
    """The stored bytes of each chunk, as little-endian uint32."""
    checksums: bytes
    """The checksums of each chunk, as little-endian uint64. See `count_checksums`."""


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A shard that was written."""

    name: str
    kind: int
    dtype: str
    grid: Grid
    """The grid of the tensor."""
    box: Box
    segments: tuple[SegmentRecord, ...]


@dataclass(slots=True)
class ObjectRecord:
    """A data object that one rank wrote."""

    name: str
    nbytes: int = 0
    shards: list[ShardRecord] = field(default_factory=list)
    bytes_needed: int = 0
    """The bytes of the values before encoding."""
    chunks: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of wall time by stage: waiting for encoders ("encode"), and calls of the store ("write")."""


def record_to_json(record: ObjectRecord) -> dict[str, Any]:
    """Return a record as a JSON value."""

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return base64.b64encode(value).decode("ascii")
        raise TypeError(type(value))

    made: dict[str, Any] = json.loads(json.dumps(asdict(record), default=plain))
    return made


def record_from_json(value: dict[str, Any]) -> ObjectRecord:
    """Return a record from its JSON value. Raise one of MALFORMED_ERRORS if the value is malformed."""
    shards = [
        ShardRecord(
            shard["name"],
            shard["kind"],
            shard["dtype"],
            Grid(tuple(shard["grid"]["shape"]), tuple(shard["grid"]["parts"])),
            Box(tuple(shard["box"]["offsets"]), tuple(shard["box"]["sizes"])),
            tuple(
                SegmentRecord(**{**segment, **{c: base64.b64decode(segment[c]) for c in ("lengths", "checksums")}})
                for segment in shard["segments"]
            ),
        )
        for shard in value["shards"]
    ]
    return ObjectRecord(**{**value, "shards": shards})


@dataclass(frozen=True, slots=True)
class PackedRecords:
    """The records of a rank in columns, as it sends them to the rank that commits."""

    objects: tuple[tuple[str, int], ...]
    """The name and size in bytes of each object."""
    entries: bytes
    """The entries of its shards, packed. They are equal for ranks that wrote shards of the same entries."""
    columns: bytes
    """The columns of its segments, packed."""
    boxes: bytes
    """Offsets and sizes of each segment, packed."""
    lengths: bytes
    checksums: bytes

    @classmethod
    def of(cls, records: Sequence[ObjectRecord]) -> PackedRecords:
        """Pack records."""
        entries: dict[str, tuple[int, tuple[Any, ...]]] = {}
        rows: list[tuple[int, ...]] = []
        boxes: list[int] = []
        found: list[SegmentRecord] = []
        for at, record in enumerate(records):
            for shard in record.shards:
                described = (shard.name, shard.kind, shard.dtype, shard.grid.shape, shard.grid.parts)
                entry, known = entries.setdefault(shard.name, (len(entries), described))
                if known != described:
                    raise _different_grids(shard.name, known[4], shard.grid.parts)
                for segment in shard.segments:
                    rows.append((entry, at, segment.stream, segment.encoding, segment.start, len(segment.lengths) // 4))
                    boxes += (*shard.box.offsets, *shard.box.sizes)
                    found.append(segment)
        columns = np.array(rows, "<i8").reshape(-1, 6).T
        return cls(
            tuple((record.name, record.nbytes) for record in records),
            zlib.compress(json.dumps([known for _, known in entries.values()], separators=(",", ":")).encode(), 1),
            zlib.compress(columns.tobytes(), 1),
            zlib.compress(np.array(boxes, "<i8").tobytes(), 1),
            b"".join(segment.lengths for segment in found),
            b"".join(segment.checksums for segment in found),
        )


def _entries_of(packed: Sequence[PackedRecords]) -> dict[bytes, list[Entry]]:
    """Decode each distinct table of entries once. Return the tables by their packed bytes.

    Raises:
        ArgumentError: ranks used different grids for a tensor, because they saved with different codecs.
    """
    found: dict[bytes, list[Entry]] = {}
    known: dict[str, Entry] = {}
    for entries in dict.fromkeys(one.entries for one in packed):
        found[entries] = [
            Entry(name, Kind(kind), dtype, Grid(tuple(shape), tuple(parts)))
            for name, kind, dtype, shape, parts in json.loads(zlib.decompress(entries))
        ]
        for entry in found[entries]:
            if known.setdefault(entry.name, entry).grid != entry.grid:
                raise _different_grids(entry.name, known[entry.name].grid.parts, entry.grid.parts)
    return found


def _different_grids(name: str, parts: tuple[int, ...], others: tuple[int, ...]) -> ArgumentError:
    return ArgumentError(
        f"one rank divided {name!r} into {parts} parts, another into {others}: use the same codec on all ranks"
    )


def assemble_index(
    packed: Sequence[PackedRecords], empty: Mapping[str, tuple[str, tuple[int, ...]]] | None = None
) -> CheckpointIndex:
    """Build the index of a checkpoint.

    Args:
        packed: the records of all ranks.
        empty: the dtype and shape of tensors without elements, for which nothing was written.

    Raises:
        ArgumentError: ranks used different grids for a tensor, because they saved with different codecs.
    """
    tables = _entries_of(packed)
    known = {
        name: Entry(name, Kind.TENSOR, dtype, Grid.choose(shape, ITEMSIZES[dtype]))
        for name, (dtype, shape) in (empty or {}).items()
    }
    known |= {entry.name: entry for table in tables.values() for entry in table}
    entries = tuple(entry for _, entry in sorted(known.items()))
    position = {entry.name: at for at, entry in enumerate(entries)}
    positions = {key: np.array([position[e.name] for e in table], np.int64) for key, table in tables.items()}
    rows = [np.frombuffer(zlib.decompress(one.columns), "<i8").reshape(6, -1) for one in packed]
    first_objects = np.cumsum([0, *(len(one.objects) for one in packed)]).tolist()
    entry_ids = concat([positions[one.entries][columns[0]] for one, columns in zip(packed, rows, strict=True)])
    objects = concat([columns[1] + first for columns, first in zip(rows, first_objects, strict=False)])
    streams, encodings, starts, counts = (concat([columns[at] for columns in rows]) for at in range(2, 6))
    boxes = np.frombuffer(b"".join(zlib.decompress(one.boxes) for one in packed), "<i8")
    lengths = np.frombuffer(b"".join(one.lengths for one in packed), "<u4")
    checksums = np.frombuffer(b"".join(one.checksums for one in packed), "<u8")

    ndims = np.array([len(entry.shape) for entry in entries], np.int64)[entry_ids]
    begins = np.cumsum(2 * ndims) - 2 * ndims
    order = np.lexsort((_first_elements(entries, entry_ids, boxes, begins), entry_ids))
    page_bytes = np.array([entry.page_bytes for entry in entries], np.int64)[entry_ids]
    each, pages = (np.repeat(column, counts) for column in (encodings, page_bytes))
    checksums_before = np.concatenate(([0], np.cumsum(count_checksums(each, lengths, pages, whole=True))))
    first_lengths = np.cumsum(counts) - counts
    first_checksums = checksums_before[first_lengths]
    of_checksums = checksums_before[first_lengths + counts] - first_checksums
    segments = Segments(
        entries=entry_ids[order],
        streams=streams[order].astype(np.uint8),
        encodings=encodings[order].astype(np.uint8),
        objects=objects[order],
        starts=starts[order],
        offsets=boxes[concat_ranges(begins[order], ndims[order])],
        sizes=boxes[concat_ranges((begins + ndims)[order], ndims[order])],
    )
    return CheckpointIndex(
        entries,
        tuple(named for one in packed for named in one.objects),
        segments,
        lengths[concat_ranges(first_lengths[order], counts[order])],
        checksums[concat_ranges(first_checksums[order], of_checksums[order])],
    )


def _first_elements(entries: Sequence[Entry], entry_ids: IntArray, boxes: IntArray, begins: IntArray) -> IntArray:
    """Return the (n,) position of the first element of each box in its row-major tensor."""
    found = np.zeros(len(entry_ids), np.int64)
    for ndim in {len(entry.shape) for entry in entries}:
        shapes = np.array([e.shape if len(e.shape) == ndim else (1,) * ndim for e in entries], np.int64)
        mine = np.flatnonzero(np.array([len(entry.shape) == ndim for entry in entries])[entry_ids])
        offsets = boxes[begins[mine][:, None] + np.arange(ndim)]
        found[mine] = first_elements(offsets, shapes[entry_ids[mine]])
    return found
