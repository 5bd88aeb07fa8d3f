"""The tasks of a read plan: requests, batches of chunks, and tensors.

A plan consists of columns. A batch is some consecutive rows of them, with about 2 MiB of values, so that there are few
Python objects and tasks for the bytes they process. The work on each chunk is a loop over the columns of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ...planner.box import Box, IntArray
from ...planner.chunk_reads import ChunkReads
from ...planner.entries import NATIVE_ENCODINGS, Encoding
from ...planner.index import CheckpointIndex
from ...planner.read_plan import ReadPlan
from ..formats.native.chunk_runs import ChunkRuns, find_chunk_runs
from ..runtime.checksums import checksum, page_checksums
from .destination import Destination

DAMAGED = "does not match its checksum: the bytes are damaged"
BATCH_BYTES = 2 * 1024 * 1024
"""Decoded bytes of a batch, at least. A batch ends with the first chunk run that reaches this size. Smaller
batches would need more Python time for each byte (`benchmarks/overhead.py`)."""


@dataclass(slots=True)
class Request:
    """A byte range of an object, or several with a constant stride, and the batches that need its bytes."""

    object: int
    start: int
    stop: int
    sparse: tuple[int, int, int] | None = None
    """The number of byte ranges, the bytes of each, and their stride. None if [start, stop) is read as one range."""
    parts: list[tuple[ChunkBatch, int]] = field(default_factory=list)
    """The batches, each with the number of the stream that the request contains."""
    unplaced: int = 0
    """The number of parts that are not in their destination yet. When it reaches 0, the buffer is released."""
    data: memoryview | None = None
    """The bytes, after they have arrived and been verified."""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The byte ranges [start, stop) to fetch."""
        if self.sparse is None:
            return [(self.start, self.stop)]
        count, nbytes, stride = self.sparse
        return [(at, at + nbytes) for at in range(self.start, self.start + count * stride, stride)]

    @property
    def nbytes(self) -> int:
        """The number of bytes that are fetched."""
        return self.stop - self.start if self.sparse is None else self.sparse[0] * self.sparse[1]

    def damages(self, data: memoryview, index: CheckpointIndex) -> list[ChunkRange]:
        """Return the chunks whose bytes do not match their checksums or are missing.

        Args:
            data: The bytes of the request.
        """
        return [damage for batch, stream in self.parts for damage in batch.damages(stream, self.start, data, index)]


@dataclass(slots=True)
class ChunkBatch:
    """Consecutive chunks of one read. Their bytes are in one request, or in two if heads and tails are read."""

    tensor: TensorRead
    read: ChunkReads
    rows: slice
    chunk_runs: ChunkRuns
    run_rows: slice
    """The rows of `chunk_runs` that belong to the batch."""
    destination: Destination | None
    requests: list[Request]
    submitted: bool = False

    @property
    def has_arrived(self) -> bool:
        return all(request.data is not None for request in self.requests)

    def damages(self, stream: int, start: int, data: memoryview, index: CheckpointIndex) -> list[ChunkRange]:
        """Return the chunks whose bytes in a stream do not match their checksums.

        Args:
            start: The position in the object at which `data` begins.
        """
        read, rows = self.read, self.rows
        begins, nbytes = read.starts[rows, stream].tolist(), read.packed_bytes(rows)[:, stream].tolist()
        encodings, firsts = read.encodings[rows].tolist(), read.checksums[rows, stream]
        native = max(encodings, default=0) <= max(NATIVE_ENCODINGS)
        expected = index.checksums[firsts].tolist() if native else encodings
        page_bytes = read.entry.page_bytes
        damaged = []
        for i, (begin, size) in enumerate(zip(begins, nbytes, strict=True)):
            view = data[begin - start : begin - start + size]
            if not native:
                intact = True  # other formats have no checksums of chunks
            elif encodings[i] == Encoding.RAW:
                found = page_checksums(view, page_bytes)
                first = int(firsts[i])
                intact = found == index.checksums[first : first + len(found)].tolist()
            else:
                intact = checksum(view) == expected[i]
            if not intact or len(view) != size:
                damaged.append(
                    ChunkRange(self.tensor, self.chunk_box(i), begin, int(read.stops[rows.start + i, stream]))
                )
        return damaged

    def chunk_box(self, i: int) -> Box:
        """Return the box of chunk i of the batch, in the global tensor."""
        row = self.rows.start + i
        return Box(tuple(self.read.chunk_offsets[row].tolist()), tuple(self.read.chunk_sizes[row].tolist()))


@dataclass(frozen=True, slots=True)
class ChunkRange:
    """The byte range of one stream of one chunk."""

    tensor: TensorRead
    box: Box
    start: int
    stop: int

    def __str__(self) -> str:
        return f"chunk {self.box}, bytes [{self.start}, {self.stop})"


@dataclass(slots=True)
class TensorRead:
    """All batches of one tensor. They are written together or not at all, unless the tensor exceeds the budget."""

    name: str
    batches: list[ChunkBatch] = field(default_factory=list)
    missing: int = 0
    """The number of parts of requests that have not arrived."""
    unplaced: int = 0
    """The number of batches that have not been written."""
    piecemeal: bool = False
    """Whether chunks are placed as they arrive, because the tensor does not fit the budget."""
    overwritten: bool = False
    """Whether a part of the destination has been written."""


def arrange(
    plan: ReadPlan, destinations: Sequence[Destination | None] | None = None
) -> tuple[list[TensorRead], list[Request]]:
    """Return the tensors of a plan, and its requests in the order that completes one tensor after another.

    Args:
        destinations: One for each of `plan.reads`. Without them the plan can be verified, but not placed.
    """
    destinations = [None] * len(plan.reads) if destinations is None else destinations
    columns = (plan.requests.objects, plan.requests.starts, plan.requests.stops)
    requests = [Request(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    for at, sparse in plan.requests.sparse.items():
        requests[at].sparse = sparse
    tensors: dict[str, TensorRead] = {}
    ordered: dict[int, Request] = {}
    requests_of = list(plan.requests_of())
    all_runs = find_chunk_runs(plan.reads, requests_of)
    for read, request_of, runs, destination in zip(plan.reads, requests_of, all_runs, destinations, strict=True):
        tensor = tensors.setdefault(read.want.name, TensorRead(read.want.name))
        for rows, of_runs in _batches(read, runs, request_of):
            held = [ordered.setdefault(at, requests[at]) for at in request_of[rows.start].tolist()]
            batch = ChunkBatch(tensor, read, rows, runs, of_runs, destination, held)
            tensor.batches.append(batch)
            tensor.unplaced += 1
            for stream, request in enumerate(held):
                request.parts.append((batch, stream))
                request.unplaced += 1
                tensor.missing += 1
    return list(tensors.values()), list(ordered.values())


def separate(tensors: Iterable[TensorRead], requests: Iterable[Request]) -> None:
    """Remove the references between tensors and requests.

    These cycles would keep the destinations in memory until the garbage collector runs.
    """
    for tensor in tensors:
        tensor.batches.clear()
    for request in requests:
        request.parts.clear()


def _batches(read: ChunkReads, runs: ChunkRuns, request_of: IntArray) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of each batch, and the chunk runs in it. A batch needs the bytes of one or two requests."""
    requests, rows = request_of[runs.firsts].tolist(), [*runs.firsts.tolist(), len(read)]
    begin = nbytes = 0
    for end, size in enumerate([*runs.nbytes.tolist(), 0]):
        if nbytes and (end == len(requests) or nbytes >= BATCH_BYTES or requests[end] != requests[begin]):
            yield slice(rows[begin], rows[end]), slice(begin, end)
            begin, nbytes = end, 0
        nbytes += size
