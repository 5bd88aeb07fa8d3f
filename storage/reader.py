"""A read plan carried out: fetch, verify, decode, place, each overlapping the others.

Requests run on a pool of threads; every byte range is verified against its checksums as it arrives; decoding and
placing run on another pool, straight into the destination tensors. A tensor is written only once all its bytes have
arrived and been verified, so that damage leaves it as it was; what waits for that is held within a budget. A tensor
that is larger than the budget is written as its chunks arrive.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..planner.index import CheckpointIndex
from ..planner.read_plan import ChunkReads, ReadPlan
from .arranged import DAMAGED, Chunk, Range, Request, Tensor, arrange
from .codec import Bytes, decode, decode_heads, decode_heads_and_tails
from .errors import CorruptCheckpointError, ObjectNotFoundError, StoreError, nearest
from .place import Destination
from .store import Store
from .tensors import torch_dtype
from .threads import default_threads

BUDGET_BYTES = 512 * 1024 * 1024
"""Fetched bytes that may be held before they are placed."""
CONCURRENT_REQUESTS = 16
_BATCH_BYTES = 4 * 1024 * 1024
"""Decoded bytes that one task places: enough to make the cost of a task small."""


@dataclass(slots=True)
class ReadStats:
    """What reading took. Seconds are summed over the threads."""

    fetch_s: float = 0.0
    decode_s: float = 0.0


def execute(
    plan: ReadPlan,
    index: CheckpointIndex,
    store: Store,
    destinations: Sequence[torch.Tensor],
    *,
    budget_bytes: int = BUDGET_BYTES,
) -> ReadStats:
    """Carry out a plan: fill each destination with the box that was wanted in its place.

    Args:
        destinations: one tensor for each of `plan.reads`, of its box's sizes, on any device, of a dtype that the
            stored one can be cast to. Written in place.

    Raises:
        CorruptCheckpointError: bytes are damaged or missing. The tensor that it names is as it was, unless the
            message says that a part of it was overwritten.
        StoreError: the store failed.
    """
    execution = _Execution(plan, index, store, destinations, budget_bytes)
    execution.run()
    return execution.stats


class _Execution:
    """The state of one plan while it is carried out; `_lock` guards all that the threads share."""

    def __init__(
        self,
        plan: ReadPlan,
        index: CheckpointIndex,
        store: Store,
        destinations: Sequence[torch.Tensor],
        budget_bytes: int,
    ) -> None:
        self.stats = ReadStats()
        self._index = index
        self._store = store
        self._budget = budget_bytes
        self._tensors, self._requests = arrange(plan, list(map(_destination, plan.reads, destinations)))
        self._lock = threading.Condition()
        self._held = 0
        self._running = 0
        self._error: BaseException | None = None

    def run(self) -> None:
        with (
            ThreadPoolExecutor(CONCURRENT_REQUESTS, "reshard-fetch") as fetching,
            ThreadPoolExecutor(default_threads(), "reshard-decode") as self._placing,
        ):
            for request in self._requests:
                if not self._admit(request.stop - request.start):
                    break
                with self._lock:
                    self._submit(fetching, self._fetch, request)
            with self._lock:
                self._lock.wait_for(lambda: self._running == 0)
        if self._error is not None:
            raise self._error

    def _admit(self, nbytes: int) -> bool:
        """Wait until the budget has room; False once something has failed."""
        with self._lock:
            while self._error is None and self._held and self._held + nbytes > self._budget:
                if self._running == 0:
                    self._place_what_is_here()
                    if self._running == 0:
                        break  # nothing can make room: one oversize chunk passes alone
                self._lock.wait()
            self._held += nbytes
            return self._error is None

    def _place_what_is_here(self) -> None:
        for tensor in self._tensors:
            if tensor.missing and any(chunk.is_here for chunk in tensor.chunks):
                tensor.piecemeal = True
                self._place_later(tensor.chunks)

    def _submit(self, pool: ThreadPoolExecutor, task: Callable[[Any], None], argument: Any) -> None:
        self._running += 1
        pool.submit(self._guarded, task, argument)

    def _guarded(self, task: Callable[[Any], None], argument: Any) -> None:
        try:
            if self._error is None:
                task(argument)
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
        finally:
            with self._lock:
                self._running -= 1
                self._lock.notify_all()

    def _fetch(self, request: Request) -> None:
        begin = time.perf_counter()
        name = self._index.objects[request.object][0]
        where = f"bytes [{request.start}, {request.stop}) of object {name!r} in {self._store.location}"
        tensor = request.ranges[0].chunk.tensor
        try:
            data, damages = self._read(name, request)
        except ObjectNotFoundError as error:
            raise self._damage(tensor, f"object {name!r} is missing in {self._store.location}") from error
        except StoreError as error:
            raise nearest(error)(self._told(tensor, f"{where}: {error}")) from error
        if len(data) != request.stop - request.start:
            raise self._damage(tensor, f"only {len(data)} bytes are left of {where}: the object was cut short")
        if damages:
            where = f"{damages[0]} of object {name!r} in {self._store.location}"
            raise self._damage(damages[0].chunk.tensor, f"{where}: {DAMAGED}")
        for part in request.ranges:
            part.data = data[part.start - request.start : part.stop - request.start]
        with self._lock:
            self.stats.fetch_s += time.perf_counter() - begin
            for part in request.ranges:
                chunk = part.chunk
                chunk.tensor.missing -= 1
                if chunk.tensor.missing == 0:
                    self._place_later(chunk.tensor.chunks)
                elif chunk.tensor.piecemeal:
                    self._place_later([chunk])

    def _read(self, name: str, request: Request) -> tuple[memoryview, list[Range]]:
        """The request's bytes, and what of them is damaged; read again if any is, in case that happened on the way."""
        for _ in range(2):
            data = memoryview(self._store.read(name, request.start, request.stop))
            damages = request.damages(data, self._index)
            if not damages:
                break
        return data, damages

    def _damage(self, tensor: Tensor, message: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(self._told(tensor, message))

    def _told(self, tensor: Tensor, message: str) -> str:
        touched = tensor.touched or tensor.piecemeal
        return f"{tensor.name!r}: {message}" + ("; a part of the tensor was overwritten" if touched else "")

    def _place_later(self, chunks: list[Chunk]) -> None:
        """Hand the chunks that are here to the placing threads, in batches. Holds the lock."""
        batch: list[Chunk] = []
        batch_bytes = 0
        for chunk in chunks:
            if chunk.submitted or not chunk.is_here:
                continue
            chunk.submitted = True
            batch.append(chunk)
            batch_bytes += chunk.box.numel * chunk.read.itemsize
            if batch_bytes >= _BATCH_BYTES:
                self._submit(self._placing, self._place, batch)
                batch, batch_bytes = [], 0
        if batch:
            self._submit(self._placing, self._place, batch)

    def _place(self, chunks: list[Chunk]) -> None:
        begin = time.perf_counter()
        for chunk in chunks:
            chunk.tensor.touched = True
            try:
                _place_chunk(chunk)
            except CorruptCheckpointError as error:
                raise self._damage(chunk.tensor, f"chunk {chunk.box} cannot be decoded: {error}") from error
        with self._lock:
            self.stats.decode_s += time.perf_counter() - begin
            for chunk in chunks:
                for part in chunk.ranges:
                    part.data = None
                    part.request.unplaced -= 1
                    if part.request.unplaced == 0:
                        self._held -= part.request.stop - part.request.start


def _place_chunk(chunk: Chunk) -> None:
    read, box, piece = chunk.read, chunk.box, chunk.piece
    data = [part.data for part in chunk.ranges]
    assert chunk.destination is not None
    chunk.destination.write(
        piece.relative_to(read.want.box), _decoded(chunk, data, box.numel), box.sizes, piece.relative_to(box)
    )


def _decoded(chunk: Chunk, data: list[memoryview | None], numel: int) -> Bytes:
    """The bytes of a chunk's values; of a raw chunk that was read in part, only that part is set."""
    read = chunk.read
    first = data[0]
    assert first is not None
    if read.raw[chunk.row]:
        values = np.frombuffer(first, np.uint8)
        nbytes = numel * read.itemsize
        if len(values) == nbytes:
            return values
        whole = np.empty(nbytes, np.uint8)
        skipped = int(read.skipped[chunk.row])
        whole[skipped : skipped + len(values)] = values
        return whole
    if len(data) == 2:
        second = data[1]
        assert second is not None
        return decode_heads_and_tails(first, second, numel)
    return decode_heads(first, numel) if read.heads_only else decode(first, read.entry.dtype, numel)


def _destination(read: ChunkReads, tensor: torch.Tensor) -> Destination:
    return Destination(tensor, torch.bfloat16 if read.heads_only else torch_dtype(read.entry.dtype))
