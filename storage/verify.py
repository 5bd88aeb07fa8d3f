"""Every byte of a checkpoint against its checksums, without decoding or placing any."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..planner.box import Box
from ..planner.index import CheckpointIndex
from ..planner.read_plan import Want, plan_reads
from .arranged import DAMAGED, ByteRange, Request, arrange
from .errors import ObjectNotFoundError
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
    return [
        (part, "the object is cut short" if part.stop - request.start > len(data) else DAMAGED)
        for part in request.damages(data, index)
    ]
