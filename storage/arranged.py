"""A read plan as what is carried out, or verified, one piece at a time: requests, batches of chunks, tensors.

The plan itself is columns. A batch is a run of its rows, some MiB of values, so that objects and tasks cost little
beside the bytes that they stand for; what is done to each chunk is a loop over a batch's columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..planner.box import Box
from ..planner.index import CheckpointIndex
from ..planner.read_plan import ChunkReads, ReadPlan
from .checksums import checksum, page_checksums
from .place import Destination

DAMAGED = "does not match its checksum: the bytes are damaged"
BATCH_BYTES = 2 * 1024 * 1024
"""Decoded bytes that one batch holds, or a little more."""


@dataclass(slots=True)
class Request:
    """One byte range of one object, and the batches that it holds bytes of."""

    object: int
    start: int
    stop: int
    parts: list[tuple[Batch, int]] = field(default_factory=list)
    """Batches, each with which of its streams the request holds."""
    unplaced: int = 0
    """Parts that are not in their destination yet; until there are none, the request's bytes are held."""
    data: memoryview | None = None
    """Its bytes, once they are here and verified."""

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def damages(self, data: memoryview, index: CheckpointIndex) -> list[ByteRange]:
        """The chunks whose bytes in `data`, the request's, do not match their checksums or are not there."""
        return [damage for batch, stream in self.parts for damage in batch.damages(stream, self.start, data, index)]


@dataclass(slots=True)
class Batch:
    """Consecutive chunks of one read, whose bytes lie in one request; in two, where heads and tails are both read."""

    tensor: Tensor
    read: ChunkReads
    rows: slice
    destination: Destination | None
    requests: list[Request]
    submitted: bool = False

    @property
    def is_here(self) -> bool:
        return all(request.data is not None for request in self.requests)

    def damages(self, stream: int, start: int, data: memoryview, index: CheckpointIndex) -> list[ByteRange]:
        """The chunks whose bytes of a stream do not match. `data` begins at byte `start` of the object."""
        read, rows = self.read, self.rows
        begins, ends = read.starts[rows, stream].tolist(), read.stops[rows, stream].tolist()
        firsts, raw = read.checksums[rows, stream], read.raw[rows].tolist()
        expected = index.checksums[firsts].tolist()
        page_bytes = read.entry.page_bytes
        damaged = []
        for i, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            view = data[begin - start : end - start]
            if raw[i]:
                found = page_checksums(view, page_bytes)
                first = int(firsts[i])
                intact = found == index.checksums[first : first + len(found)].tolist()
            else:
                intact = checksum(view) == expected[i]
            if not intact or len(view) != end - begin:
                damaged.append(ByteRange(self.tensor, self.chunk_box(i), begin, end))
        return damaged

    def chunk_box(self, i: int) -> Box:
        """The box of the batch's chunk i, in the global tensor."""
        row = self.rows.start + i
        return Box(tuple(self.read.chunk_offsets[row].tolist()), tuple(self.read.chunk_sizes[row].tolist()))


@dataclass(frozen=True, slots=True)
class ByteRange:
    """The bytes of one stream of one chunk."""

    tensor: Tensor
    box: Box
    start: int
    stop: int

    def __str__(self) -> str:
        return f"chunk {self.box}, bytes [{self.start}, {self.stop})"


@dataclass(slots=True)
class Tensor:
    """All batches of one name: what is written together, or not at all."""

    name: str
    batches: list[Batch] = field(default_factory=list)
    missing: int = 0
    """Parts of requests that have not arrived."""
    unplaced: int = 0
    """Batches that are not written yet."""
    piecemeal: bool = False
    """It does not fit the budget: chunks are placed as they arrive."""
    touched: bool = False


def arrange(
    plan: ReadPlan, destinations: Sequence[Destination | None] | None = None
) -> tuple[list[Tensor], list[Request]]:
    """The tensors of a plan, and its requests in the order in which tensors are completed.

    `destinations` has one for each of `plan.reads`; without, the plan can be verified, but not placed.
    """
    destinations = [None] * len(plan.reads) if destinations is None else destinations
    columns = (plan.requests.objects, plan.requests.starts, plan.requests.stops)
    requests = [Request(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    tensors: dict[str, Tensor] = {}
    ordered: dict[int, Request] = {}
    for read, request_of, destination in zip(plan.reads, plan.requests_of(), destinations, strict=True):
        tensor = tensors.setdefault(read.want.name, Tensor(read.want.name))
        if len(read) == 0:
            continue
        values = np.cumsum(read.chunk_sizes.prod(axis=1) * read.itemsize)
        opens = (request_of[1:] != request_of[:-1]).any(axis=1) | (np.diff(values // BATCH_BYTES) > 0)
        begins = [0, *(np.flatnonzero(opens) + 1).tolist(), len(read)]
        for begin, end in itertools.pairwise(begins):
            held = [ordered.setdefault(at, requests[at]) for at in request_of[begin].tolist()]
            batch = Batch(tensor, read, slice(begin, end), destination, held)
            tensor.batches.append(batch)
            tensor.unplaced += 1
            for stream, request in enumerate(held):
                request.parts.append((batch, stream))
                request.unplaced += 1
                tensor.missing += 1
    return list(tensors.values()), list(ordered.values())
