"""A read plan as objects that refer to each other: requests, their byte ranges, chunks, tensors.

The plan itself is columns; this is what is carried out, or verified, one piece at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..planner.box import Box
from ..planner.index import CheckpointIndex
from ..planner.read_plan import ChunkReads, ReadPlan
from .checksums import checksum, page_checksums
from .place import Destination

DAMAGED = "does not match its checksum: the bytes are damaged"


@dataclass(slots=True)
class Request:
    object: int
    start: int
    stop: int
    ranges: list[Range] = field(default_factory=list)
    unplaced: int = 0
    """Ranges that are not in their destination yet; until there are none, the request's bytes are held."""

    def damages(self, data: memoryview, index: CheckpointIndex) -> list[Range]:
        """The ranges whose bytes in `data`, the request's, do not match their checksums or are not there."""
        return [
            part
            for part in self.ranges
            if not part.is_intact(data[part.start - self.start : part.stop - self.start], index)
        ]


@dataclass(slots=True)
class Range:
    """One byte range of one chunk."""

    chunk: Chunk
    request: Request
    start: int
    stop: int
    first_checksum: int
    data: memoryview | None = None

    def is_intact(self, data: memoryview, index: CheckpointIndex) -> bool:
        """Whether what was read for this range is all there, and matches its checksums."""
        if len(data) != self.stop - self.start:
            return False
        read = self.chunk.read
        found = page_checksums(data, read.entry.page_bytes) if read.raw[self.chunk.row] else [checksum(data)]
        expected: list[int] = index.checksums[self.first_checksum : self.first_checksum + len(found)].tolist()
        return found == expected

    def __str__(self) -> str:
        return f"chunk {self.chunk.box}, bytes [{self.start}, {self.stop})"


@dataclass(slots=True)
class Chunk:
    """One chunk to place, from one range, or from two: heads and tails."""

    tensor: Tensor
    read: ChunkReads
    row: int
    destination: Destination | None
    ranges: list[Range] = field(default_factory=list)
    submitted: bool = False

    @property
    def box(self) -> Box:
        return _box(self.read.chunk_offsets, self.read.chunk_sizes, self.row)

    @property
    def piece(self) -> Box:
        """The part of it that is wanted, in the global tensor."""
        return _box(self.read.piece_offsets, self.read.piece_sizes, self.row)

    @property
    def is_here(self) -> bool:
        return all(part.data is not None for part in self.ranges)


@dataclass(slots=True)
class Tensor:
    """All chunks of one name: what is written together, or not at all."""

    name: str
    chunks: list[Chunk] = field(default_factory=list)
    missing: int = 0
    """Ranges that have not arrived."""
    piecemeal: bool = False
    """It does not fit the budget: chunks are placed as they arrive."""
    touched: bool = False


def _box(offsets: Any, sizes: Any, row: int) -> Box:
    return Box(tuple(offsets[row].tolist()), tuple(sizes[row].tolist()))


def arrange(
    plan: ReadPlan, destinations: Sequence[Destination | None] | None = None
) -> tuple[list[Tensor], list[Request]]:
    """The tensors of a plan, and its requests in the order in which tensors are completed.

    `destinations` has one for each of `plan.reads`; without, the plan can be verified, but not placed.
    """
    destinations = [None] * len(plan.reads) if destinations is None else destinations
    requests = [
        Request(*columns)
        for columns in zip(
            plan.requests.objects.tolist(), plan.requests.starts.tolist(), plan.requests.stops.tolist(), strict=True
        )
    ]
    tensors: dict[str, Tensor] = {}
    ordered: dict[int, Request] = {}
    for read, request_of, destination in zip(plan.reads, plan.requests_of(), destinations, strict=True):
        group = tensors.setdefault(read.want.name, Tensor(read.want.name))
        rows = zip(request_of.tolist(), read.starts.tolist(), read.stops.tolist(), read.checksums.tolist(), strict=True)
        for row, columns in enumerate(rows):
            chunk = Chunk(group, read, row, destination)
            group.chunks.append(chunk)
            for at, start, stop, first_checksum in zip(*columns, strict=True):
                request = ordered.setdefault(at, requests[at])
                part = Range(chunk, request, start, stop, first_checksum)
                chunk.ranges.append(part)
                request.ranges.append(part)
                request.unplaced += 1
                group.missing += 1
    return list(tensors.values()), list(ordered.values())
