"""Records of what each rank wrote. Ranks send them as plain data to the rank that commits, which builds the index."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ....planner.box import Box
from ....planner.entries import ITEMSIZES, Entry, Kind, Segments
from ....planner.grid import Grid
from ....planner.index import CheckpointIndex
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
    """The checksum of each chunk, or of each page of a raw chunk, as little-endian uint64."""


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


def assemble_index(
    objects: Sequence[ObjectRecord], empty: Mapping[str, tuple[str, tuple[int, ...]]] | None = None
) -> CheckpointIndex:
    """Build the index of a checkpoint.

    Args:
        objects: the data objects of all ranks.
        empty: the dtype and shape of tensors without elements, for which nothing was written.

    Raises:
        ArgumentError: ranks used different grids for a tensor, because they saved with different codecs.
    """
    shards = sorted(
        ((shard, at) for at, record in enumerate(objects) for shard in record.shards),
        key=lambda item: (item[0].name, item[0].box.offsets),
    )
    kinds = {
        name: (Kind.TENSOR, dtype, Grid.choose(shape, ITEMSIZES[dtype]))
        for name, (dtype, shape) in (empty or {}).items()
    }
    kinds |= {shard.name: (Kind(shard.kind), shard.dtype, shard.grid) for shard, _ in shards}
    for shard, _ in shards:
        if shard.grid != (grid := kinds[shard.name][2]):
            raise ArgumentError(
                f"one rank divided {shard.name!r} into {grid.parts} parts, another into {shard.grid.parts}: "
                "use the same codec on all ranks"
            )
    entries = tuple(Entry(name, *kind) for name, kind in sorted(kinds.items()))
    position = {entry.name: i for i, entry in enumerate(entries)}
    rows = [(shard, segment, at) for shard, at in shards for segment in shard.segments]
    segments = Segments(
        entries=np.array([position[shard.name] for shard, _, _ in rows], np.int64),
        streams=np.array([segment.stream for _, segment, _ in rows], np.uint8),
        encodings=np.array([segment.encoding for _, segment, _ in rows], np.uint8),
        objects=np.array([at for _, _, at in rows], np.int64),
        starts=np.array([segment.start for _, segment, _ in rows], np.int64),
        offsets=np.array([n for shard, _, _ in rows for n in shard.box.offsets], np.int64),
        sizes=np.array([n for shard, _, _ in rows for n in shard.box.sizes], np.int64),
    )
    return CheckpointIndex(
        entries,
        tuple((record.name, record.nbytes) for record in objects),
        segments,
        np.frombuffer(b"".join(segment.lengths for _, segment, _ in rows), "<u4"),
        np.frombuffer(b"".join(segment.checksums for _, segment, _ in rows), "<u8"),
    )
