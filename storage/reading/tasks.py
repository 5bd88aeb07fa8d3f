"""A read plan as what is carried out, or verified, one piece at a time: requests, batches of chunks, tensors.

The plan itself is columns. A batch is a run of its rows, some MiB of values, so that objects and tasks cost little
beside the bytes that they stand for; what is done to each chunk is a loop over a batch's columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ...planner.box import Box, IntArray
from ...planner.chunk_reads import ChunkReads
from ...planner.entries import NATIVE_ENCODINGS, Encoding
from ...planner.index import CheckpointIndex
from ...planner.read_plan import ReadPlan
from ..formats.native.chunk_runs import Bands, bands_of
from ..runtime.checksums import checksum, page_checksums
from .destination import Destination

DAMAGED = "does not match its checksum: the bytes are damaged"
BATCH_BYTES = 2 * 1024 * 1024
"""Decoded bytes that one batch holds, or a little more."""


@dataclass(slots=True)
class Request:
    """One byte range of one object, or runs of it, and the batches that it holds bytes of."""

    object: int
    start: int
    stop: int
    sparse: tuple[int, int, int] | None = None
    """Where runs alone are fetched, one after another: their count, bytes and stride."""
    parts: list[tuple[Batch, int]] = field(default_factory=list)
    """Batches, each with which of its streams the request holds."""
    unplaced: int = 0
    """Parts that are not in their destination yet; until there are none, the request's bytes are held."""
    data: memoryview | None = None
    """Its bytes, once they are here and verified."""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The byte ranges to fetch: [start, stop) each."""
        if self.sparse is None:
            return [(self.start, self.stop)]
        count, nbytes, stride = self.sparse
        return [(at, at + nbytes) for at in range(self.start, self.start + count * stride, stride)]

    @property
    def nbytes(self) -> int:
        """Bytes that are fetched."""
        return self.stop - self.start if self.sparse is None else self.sparse[0] * self.sparse[1]

    def damages(self, data: memoryview, index: CheckpointIndex) -> list[ByteRange]:
        """The chunks whose bytes in `data`, the request's, do not match their checksums or are not there."""
        return [damage for batch, stream in self.parts for damage in batch.damages(stream, self.start, data, index)]


@dataclass(slots=True)
class Batch:
    """Consecutive chunks of one read, whose bytes lie in one request; in two, where heads and tails are both read."""

    tensor: TensorRead
    read: ChunkReads
    rows: slice
    bands: Bands
    band_rows: slice
    """The rows of `bands` that are the batch's."""
    destination: Destination | None
    requests: list[Request]
    submitted: bool = False

    @property
    def is_here(self) -> bool:
        return all(request.data is not None for request in self.requests)

    def damages(self, stream: int, start: int, data: memoryview, index: CheckpointIndex) -> list[ByteRange]:
        """The chunks whose bytes of a stream do not match. `data` begins at byte `start` of the object."""
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
                intact = True  # other formats have no checksums of parts
            elif encodings[i] == Encoding.RAW:
                found = page_checksums(view, page_bytes)
                first = int(firsts[i])
                intact = found == index.checksums[first : first + len(found)].tolist()
            else:
                intact = checksum(view) == expected[i]
            if not intact or len(view) != size:
                damaged.append(
                    ByteRange(self.tensor, self.chunk_box(i), begin, int(read.stops[rows.start + i, stream]))
                )
        return damaged

    def chunk_box(self, i: int) -> Box:
        """The box of the batch's chunk i, in the global tensor."""
        row = self.rows.start + i
        return Box(tuple(self.read.chunk_offsets[row].tolist()), tuple(self.read.chunk_sizes[row].tolist()))


@dataclass(frozen=True, slots=True)
class ByteRange:
    """The bytes of one stream of one chunk."""

    tensor: TensorRead
    box: Box
    start: int
    stop: int

    def __str__(self) -> str:
        return f"chunk {self.box}, bytes [{self.start}, {self.stop})"


@dataclass(slots=True)
class TensorRead:
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
) -> tuple[list[TensorRead], list[Request]]:
    """The tensors of a plan, and its requests in the order in which tensors are completed.

    `destinations` has one for each of `plan.reads`; without, the plan can be verified, but not placed.
    """
    destinations = [None] * len(plan.reads) if destinations is None else destinations
    columns = (plan.requests.objects, plan.requests.starts, plan.requests.stops)
    requests = [Request(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    for at, sparse in plan.requests.sparse.items():
        requests[at].sparse = sparse
    tensors: dict[str, TensorRead] = {}
    ordered: dict[int, Request] = {}
    requests_of = list(plan.requests_of())
    all_bands = bands_of(plan.reads, requests_of)
    for read, request_of, bands, destination in zip(plan.reads, requests_of, all_bands, destinations, strict=True):
        tensor = tensors.setdefault(read.want.name, TensorRead(read.want.name))
        for rows, of_bands in _batches(read, bands, request_of):
            held = [ordered.setdefault(at, requests[at]) for at in request_of[rows.start].tolist()]
            batch = Batch(tensor, read, rows, bands, of_bands, destination, held)
            tensor.batches.append(batch)
            tensor.unplaced += 1
            for stream, request in enumerate(held):
                request.parts.append((batch, stream))
                request.unplaced += 1
                tensor.missing += 1
    return list(tensors.values()), list(ordered.values())


def separate(tensors: Iterable[TensorRead], requests: Iterable[Request]) -> None:
    """Let them refer to each other no more: destinations would be kept in memory until cycles are collected."""
    for tensor in tensors:
        tensor.batches.clear()
    for request in requests:
        request.parts.clear()


def _batches(read: ChunkReads, bands: Bands, request_of: IntArray) -> Iterator[tuple[slice, slice]]:
    """Rows of a read that one request fetches, or two, each with which of its bands they are."""
    requests, rows = request_of[bands.firsts].tolist(), [*bands.firsts.tolist(), len(read)]
    begin = nbytes = 0
    for end, size in enumerate([*bands.nbytes.tolist(), 0]):
        if nbytes and (end == len(requests) or nbytes >= BATCH_BYTES or requests[end] != requests[begin]):
            yield slice(rows[begin], rows[end]), slice(begin, end)
            begin, nbytes = end, 0
        nbytes += size
