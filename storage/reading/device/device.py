"""A CUDA device that tensors are loaded to: its streams, and how bytes get there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch

from ...formats.native.codec import Bytes
from ...runtime.devices import current_device
from ...runtime.forks import fork_safe_lock
from .frames import Decompressor
from .nvcomp import nvcomp_decompressor
from .ring import RING, Ring, Slot

ALIGNMENT = 64
"""Bytes have the same offset on the device as in their object, modulo this number, so that values are aligned."""
WORKING_STREAMS = 4
"""The number of threads whose operations a device runs at the same time. torch keeps memory for each stream."""


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes that are being copied to a device."""

    data: torch.Tensor
    """(nbytes,) uint8, on the device."""
    copied: torch.cuda.Event | None
    """Reached when they are there. None if there are no bytes."""


class Device:
    """A CUDA device. Copies have a stream of their own, and the operations that place values have a few.

    The streams do not wait for work that the caller has queued on the device: `read_tensors` waits for it before a read
    begins.

    Args:
        device: the device.
        ring: the page-locked memory that bytes pass through.
        decompressor: decompresses frames on the device. None if the host does it.
    """

    def __init__(self, device: torch.device, ring: Ring, decompressor: Decompressor | None) -> None:
        self.device = device
        self.ring = ring
        self.decompressor = decompressor
        self._lock = fork_safe_lock()
        self._copies: torch.cuda.Stream | None = None
        """The stream of the copies. The first copy creates it."""
        self._streams: SimpleQueue[torch.cuda.Stream | None] = SimpleQueue()
        """Streams to work on; None for one that has not been created."""
        for _ in range(WORKING_STREAMS):
            self._streams.put(None)
        self._decompressing = fork_safe_lock()
        self._frame_stream: torch.cuda.Stream | None = None

    @contextmanager
    def slot(self) -> Iterator[Slot]:
        """Lend a slot of the ring."""
        with current_device(self.device):
            slot = self.ring.take()
        try:
            yield slot
        finally:
            self.ring.put(slot)

    def send(self, slot: Slot, start: int, nbytes: int, offset: int = 0) -> Moved:
        """Start to copy bytes of a slot to new memory on the device.

        Args:
            slot: the slot, which is lent to this thread.
            start, nbytes: the bytes of the slot.
            offset: their position in an object.
        """
        with self._copying():
            to = self._new(offset, nbytes)
            return Moved(to, self._copy(slot, start, to))

    def upload(self, parts: Sequence[memoryview], offset: int = 0) -> Moved:
        """Start to copy bytes from any host memory to new memory on the device. They are copied into the ring first.

        Args:
            parts: the bytes, which will be one after another.
            offset: the position of the first byte in an object.
        """
        arrays = [np.frombuffer(part, np.uint8) for part in parts]
        with self._copying():
            to = self._new(offset, sum(map(len, arrays)))
        done, copied = 0, None
        for pieces in _cut(arrays, self.ring.nbytes):
            with self.slot() as slot:
                nbytes = sum(map(len, pieces))
                np.concatenate(pieces, out=slot.memory[:nbytes])
                with self._copying():
                    copied = self._copy(slot, 0, to[done : done + nbytes])  # after those of the other pieces
                done += nbytes
        return Moved(to, copied)

    @contextmanager
    def working(self, copied: Iterable[torch.cuda.Event | None], *, decompresses: bool = False) -> Iterator[None]:
        """Run the operations of a block after some copies, and wait until they are done.

        Args:
            copied: reached when the bytes that the operations use have been copied.
            decompresses: whether frames are decompressed. Only one thread does this at a time, on one stream, because
                it takes a large part of the device's budget.
        """
        with self._stream(decompresses=decompresses) as stream:
            for event in {id(event): event for event in copied if event is not None}.values():
                stream.wait_event(event)
            try:
                with torch.cuda.stream(stream):
                    yield
            finally:  # also after an error: memory that operations use must not be used again
                ended = torch.cuda.Event(blocking=True)
                ended.record(stream)
                ended.synchronize()

    @contextmanager
    def _stream(self, *, decompresses: bool) -> Iterator[torch.cuda.Stream]:
        """Lend a stream to work on."""
        if decompresses:
            with self._decompressing, current_device(self.device):
                if self._frame_stream is None:
                    self._frame_stream = torch.cuda.Stream(self.device)
                yield self._frame_stream
            return
        stream = self._streams.get()
        try:
            with current_device(self.device):
                stream = torch.cuda.Stream(self.device) if stream is None else stream
                yield stream
        finally:
            self._streams.put(stream)

    def end_read(self) -> None:
        """Return the memory that decompression took to the device. Other reads may still run."""
        if self.decompressor is not None:
            self.decompressor.release()

    def _new(self, offset: int, nbytes: int) -> torch.Tensor:
        shift = offset % ALIGNMENT
        return torch.empty(shift + nbytes, dtype=torch.uint8, device=self.device)[shift:]

    def _copy(self, slot: Slot, start: int, to: torch.Tensor) -> torch.cuda.Event:
        to.copy_(torch.from_numpy(slot.memory[start : start + len(to)]), non_blocking=True)
        copied = torch.cuda.Event(blocking=True)
        copied.record(torch.cuda.current_stream(self.device))
        slot.copies.append(copied)
        return copied

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Run the operations of a block on the stream of the copies."""
        with current_device(self.device):
            with self._lock:  # all copies must be on one stream: events are reached in their order
                if self._copies is None:
                    self._copies = torch.cuda.Stream(self.device)
            with torch.cuda.stream(self._copies):
                yield


_devices: dict[torch.device, Device] = {}
_lock = fork_safe_lock()


def cuda_device(device: torch.device) -> Device:
    """Return the CUDA device of this process. Raises what torch raises if it cannot be used."""
    with _lock:
        if device not in _devices:
            _devices[device] = Device(device, RING, nvcomp_decompressor(device))
        return _devices[device]


def device_of(tensor: torch.Tensor) -> Device | None:
    """Return the device to decode on for a destination. None: the host decodes."""
    return cuda_device(tensor.device) if tensor.device.type == "cuda" else None


def _cut(arrays: Sequence[Bytes], max_bytes: int) -> Iterator[list[Bytes]]:
    """Yield the bytes of arrays in groups of exactly `max_bytes`; the last group may have fewer."""
    group, left = list[Bytes](), max_bytes
    for array in arrays:
        at = 0
        while at < len(array):
            group.append(array[at : at + left])
            at += len(group[-1])
            left -= len(group[-1])
            if not left:
                yield group
                group, left = [], max_bytes
    if group:
        yield group
