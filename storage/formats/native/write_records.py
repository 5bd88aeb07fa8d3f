"""What a rank wrote, as plain data that travels to the rank that commits, and how the index is made of it."""

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
    """A segment as written."""

    stream: int
    encoding: int
    start: int
    lengths: bytes
    """uint32 little-endian, one for each chunk."""
    checksums: bytes
    """uint64 little-endian, one for each chunk, or for each page of a raw chunk."""


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A shard as written."""

    name: str
    kind: int
    dtype: str
    grid: Grid
    """By which the tensor is cut."""
    box: Box
    segments: tuple[SegmentRecord, ...]


@dataclass(slots=True)
class ObjectRecord:
    """A data object as written, by one rank."""

    name: str
    nbytes: int = 0
    shards: list[ShardRecord] = field(default_factory=list)
    bytes_needed: int = 0
    """Bytes of the values, before encoding."""
    chunks: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by stage: "encode" is time spent waiting for it, "write" is time in the store's calls."""


def record_to_json(record: ObjectRecord) -> dict[str, Any]:
    """What a rank wrote, as a value of JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return base64.b64encode(value).decode("ascii")
        raise TypeError(type(value))

    made: dict[str, Any] = json.loads(json.dumps(asdict(record), default=plain))
    return made


def record_from_json(value: dict[str, Any]) -> ObjectRecord:
    """Raises what Python does where it is no such value."""
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
    """The index of what was written.

    Args:
        objects: of all ranks.
        empty: dtype and shape of tensors of no elements, of which nothing was written.

    Raises ArgumentError where ranks have cut a tensor differently, since they were given different codecs.
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
                f"{shard.name!r} was cut in {grid.parts} parts by one rank and in {shard.grid.parts} by another: the "
                "codec of a save is to be the same on all ranks"
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
