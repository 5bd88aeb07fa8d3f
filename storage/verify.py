"""Every byte of a checkpoint against its checksums, without decoding or placing any.

Of other formats: the slices of DCP against the CRC-32s of their records; of the rest, that it is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..planner.box import Box
from ..planner.index import CheckpointIndex, Encoding
from ..planner.read_plan import Want, plan_reads
from .arranged import DAMAGED, Batch, ByteRange, Request, arrange
from .errors import ObjectNotFoundError
from .opaque import damage_of
from .store import Store


@dataclass(frozen=True, slots=True)
class Damage:
    """A chunk that cannot be read as it was written."""

    tensor: str
    box: Box
    """The chunk's, in the tensor."""
    object: str
    start: int
    stop: int
    """Where its bytes are, or should be: [start, stop) of the object."""
    reason: str

    def __str__(self) -> str:
        where = f"bytes [{self.start}, {self.stop}) of object {self.object!r}"
        return f"{self.tensor!r}: chunk {self.box}, {where}: {self.reason}"


def verify(store: Store, index: CheckpointIndex) -> list[Damage]:
    """Read all chunks of a checkpoint, several requests at once, and list those that are damaged or missing.

    Raises StoreError where the store fails otherwise than by not having an object.
    """
    plan = plan_reads(index, [Want(entry.name, Box.whole(entry.shape)) for entry in index.entries])
    _, requests = arrange(plan)

    def check(request: Request) -> list[Damage]:
        name = index.objects[request.object][0]
        return [
            Damage(part.tensor.name, part.box, name, part.start, part.stop, reason)
            for part, reason in _damages(store, index, name, request)
        ]

    with ThreadPoolExecutor(store.concurrent_reads, "reshard-verify") as pool:
        return [damage for damages in pool.map(check, requests) for damage in damages]


def _damages(store: Store, index: CheckpointIndex, name: str, request: Request) -> Iterable[tuple[ByteRange, str]]:
    try:
        data = memoryview(store.read(name, request.start, request.stop))
    except ObjectNotFoundError:
        return [(part, "the object is missing") for part in request.damages(memoryview(b""), index)]
    damages = [
        (part, "the object is cut short" if part.stop - request.start > len(data) else DAMAGED)
        for part in request.damages(data, index)
    ]
    return damages or [(part, reason) for batch, _ in request.parts for part, reason in _crcs(batch, request, data)]


def _crcs(batch: Batch, request: Request, data: memoryview) -> Iterator[tuple[ByteRange, str]]:
    """What of a batch's slices, files of torch.save, does not match its CRC-32."""
    read, first = batch.read, batch.rows.start
    for row in np.flatnonzero(read.encodings[batch.rows] == Encoding.OPAQUE).tolist():
        start, stop = int(read.starts[first + row, 0]), int(read.stops[first + row, 0])
        reason = damage_of(data[start - request.start : stop - request.start])
        if reason:
            yield ByteRange(batch.tensor, batch.chunk_box(row), start, stop), reason
