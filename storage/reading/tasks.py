"""The tasks of a read plan: requests, batches of chunks, and tensors.

A plan consists of columns. A batch is the consecutive rows of one read whose bytes one request fetches, so that there
are few Python objects and tasks for the bytes they process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ...planner.box import Box
from ...planner.chunk_reads import ChunkReads
from ...planner.read_plan import ReadPlan
from .blocks import Block, Blocks, find_blocks
from .destination import BlockWriter, Destination
from .device.device import Device
from .stream_bytes import StreamOnDevice

CHECKSUM_MISMATCH = "does not match its checksum: the bytes are damaged"


@dataclass(slots=True)
class Request:
    """A byte range of an object, or several with a constant stride, and the batches that need its bytes."""

    object: int
    start: int
    stop: int
    sparse: tuple[int, int, int] | None = None
    """The number of byte ranges, the bytes of each, and their stride. None if [start, stop) is read as one range."""
    nbytes: int = field(init=False)
    """The number of bytes that are fetched."""
    on_host: bool = True
    """Whether a batch is decoded on the host."""
    device: Device | None = None
    """The first device that decodes a batch. None if the host decodes all."""
    parts: list[tuple[ChunkBatch, int]] = field(default_factory=list)
    """The batches, each with the number of the stream that the request contains."""
    unplaced: int = 0
    """The number of parts that are not in their destination yet. When it reaches 0, the buffer is released."""
    arrived: bool = False
    """Whether the bytes have arrived and been verified."""
    data: memoryview | None = None
    """The bytes, after they have arrived, if a batch is decoded on the host."""

    def __post_init__(self) -> None:
        self.nbytes = self.stop - self.start if self.sparse is None else self.sparse[0] * self.sparse[1]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The byte ranges [start, stop) to fetch."""
        if self.sparse is None:
            return [(self.start, self.stop)]
        count, nbytes, stride = self.sparse
        return [(at, at + nbytes) for at in range(self.start, self.start + count * stride, stride)]


@dataclass(slots=True)
class ChunkBatch:
    """Consecutive chunks of one read. Their bytes are in one request, or in two if heads and tails are read."""

    tensor: TensorProgress
    read: ChunkReads
    rows: slice
    blocks: Blocks
    block_rows: slice
    """The rows of `blocks` that belong to the batch."""
    destination: Destination | None
    requests: list[Request]
    device: Device | None = None
    """The device that the stored bytes are copied to before they are decoded. None: the host decodes."""
    on_device: dict[int, StreamOnDevice] = field(default_factory=dict)
    """The bytes of each stream that have arrived on `device`."""
    frames: int = 0
    """The number of planes that `device` may have to decompress."""
    queued: bool = False

    @property
    def has_arrived(self) -> bool:
        return all(request.arrived for request in self.requests)

    def open(self, block: Block) -> BlockWriter:
        """Return the part of the destination that a block is written to."""
        assert self.destination is not None
        return BlockWriter(self.destination, block)

    def chunk_box(self, i: int) -> Box:
        """Return the box of chunk i of the batch, in the global tensor."""
        row = self.rows.start + i
        return Box(tuple(self.read.chunk_offsets[row].tolist()), tuple(self.read.chunk_sizes[row].tolist()))


@dataclass(frozen=True, slots=True)
class ChunkRange:
    """The byte range of one stream of one chunk."""

    tensor: TensorProgress
    box: Box
    start: int
    stop: int

    def __str__(self) -> str:
        return f"chunk {self.box}, bytes [{self.start}, {self.stop})"


@dataclass(slots=True)
class TensorProgress:
    """All batches of one tensor. They are written together or not at all, unless the tensor exceeds the budget."""

    name: str
    batches: list[ChunkBatch] = field(default_factory=list)
    missing: int = 0
    """The number of parts of requests that have not arrived."""
    piecemeal: bool = False
    """Whether chunks are placed as they arrive, because the tensor does not fit the budget."""
    overwritten: bool = False
    """Whether a part of the destination has been written."""


def build_tasks(
    plan: ReadPlan, destinations: Sequence[Destination | None] | None = None
) -> tuple[list[TensorProgress], list[Request]]:
    """Return the tensors of a plan, and its requests in the order that completes one tensor after another.

    If the plan has an order of requests, they are in this order.

    Args:
        destinations: one for each of `plan.reads`. Without them the plan can be verified, but not placed.
    """
    destinations = [None] * len(plan.reads) if destinations is None else destinations
    columns = [column.tolist() for column in (plan.requests.objects, plan.requests.starts, plan.requests.stops)]
    requests = list(map(Request, *columns, map(plan.requests.sparse.get, range(len(plan.requests)))))
    tensors: dict[str, TensorProgress] = {}
    ordered: dict[int, Request] = {}
    requests_of = list(plan.requests_of())
    all_blocks = find_blocks(plan.reads, requests_of)
    for read, request_of, blocks, destination in zip(plan.reads, requests_of, all_blocks, destinations, strict=True):
        tensor = tensors.setdefault(read.want.name, TensorProgress(read.want.name))
        for rows, block_rows in blocks.batches:
            held = [ordered.setdefault(at, requests[at]) for at in request_of[rows.start].tolist()]
            batch = ChunkBatch(tensor, read, rows, blocks, block_rows, destination, held)
            tensor.batches.append(batch)
            for stream, request in enumerate(held):
                request.parts.append((batch, stream))
                request.unplaced += 1
                tensor.missing += 1
    if plan.order is not None:
        ordered = {at: ordered[at] for at in plan.order.tolist() if at in ordered}
    return list(tensors.values()), list(ordered.values())


def break_reference_cycles(tensors: Iterable[TensorProgress], requests: Iterable[Request]) -> None:
    """Remove the references between tensors and requests.

    These cycles would keep the destinations in memory until the garbage collector runs.
    """
    for tensor in tensors:
        for batch in tensor.batches:
            batch.on_device.clear()
        tensor.batches.clear()
    for request in requests:
        request.parts.clear()
