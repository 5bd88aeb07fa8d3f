"""A device that tensors are loaded to: its streams, and how bytes get there."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import numpy as np
import torch

from ...formats.native.codec import Bytes
from .frames import Decompressor
from .nvcomp import nvcomp_decompressor
from .ring import RING, Ring, Slot

ALIGNMENT = 64
"""Bytes have the same offset on the device as in their object, modulo this number, so that values are aligned."""


class Device:
    """A device without streams: all its operations are done when the call returns.

    Args:
        device: the device.
        ring: the host memory that bytes pass through.
        decompressor: decompresses frames on the device. None if the host does it.
    """

    def __init__(self, device: torch.device, ring: Ring, decompressor: Decompressor | None) -> None:
        self.device = device
        self.ring = ring
        self.decompressor = decompressor

    def send(self, slot: Slot, start: int, nbytes: int, offset: int = 0) -> torch.Tensor:
        """Start to copy bytes of a slot to new memory on the device.

        The copy is done before what runs in a `working` block that is entered later.

        Args:
            start, nbytes: the bytes of the slot.
            offset: their position in an object.
        """
        with self._copying():
            to = self._new(offset, nbytes)
            self._copy(slot, start, to)
        return to

    def upload(self, parts: Sequence[memoryview], offset: int = 0) -> torch.Tensor:
        """Start to copy bytes from any host memory to new memory on the device. They are copied into the ring first.

        Args:
            parts: the bytes, which will be one after another.
            offset: the position of the first byte in an object.
        """
        arrays = [np.frombuffer(part, np.uint8) for part in parts]
        with self._copying():
            to = self._new(offset, sum(map(len, arrays)))
        done = 0
        for pieces in _cut(arrays, self.ring.nbytes):
            with self.slot() as slot:
                nbytes = sum(map(len, pieces))
                np.concatenate(pieces, out=slot.memory[:nbytes])
                with self._copying():
                    self._copy(slot, 0, to[done : done + nbytes])
                done += nbytes
        return to

    @contextmanager
    def slot(self) -> Iterator[Slot]:
        """Lend a slot of the ring."""
        slot = self.ring.take()
        try:
            yield slot
        finally:
            self.ring.put(slot)

    def _new(self, offset: int, nbytes: int) -> torch.Tensor:
        shift = offset % ALIGNMENT
        return torch.empty(shift + nbytes, dtype=torch.uint8, device=self.device)[shift:]

    def _copy(self, slot: Slot, start: int, to: torch.Tensor) -> None:
        to.copy_(torch.from_numpy(slot.memory[start : start + len(to)]), non_blocking=True)

    def _copying(self) -> AbstractContextManager[object]:
        """Return a block whose operations run on the stream of the copies."""
        return nullcontext()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Run the operations of a block after the copies that were started before, and wait until they are done."""
        yield


class CudaDevice(Device):
    """A CUDA device. Copies have a stream of their own, and each thread that places values has one.

    Other work on the device, such as a forward pass, is not waited for.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, RING, nvcomp_decompressor(device))
        self._copies = torch.cuda.Stream(device)
        self._lock = threading.Lock()
        self._idle: list[torch.cuda.Stream] = []
        """Streams to work on. They are used again, because torch keeps memory for each stream."""

    @contextmanager
    def slot(self) -> Iterator[Slot]:
        with ExitStack() as stack:
            with torch.cuda.device(self.device):  # otherwise CUDA would also use the first device
                slot = stack.enter_context(super().slot())
            yield slot

    def _copy(self, slot: Slot, start: int, to: torch.Tensor) -> None:
        super()._copy(slot, start, to)
        slot.copies.append(self._copies.record_event())

    def _copying(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._copies)

    @contextmanager
    def working(self) -> Iterator[None]:
        with self._lock:
            stream = self._idle.pop() if self._idle else torch.cuda.Stream(self.device)
        stream.wait_stream(self._copies)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            stream.synchronize()  # also after an error: memory that operations use must not be used again
            with self._lock:
                self._idle.append(stream)


@functools.cache
def cuda_device(device: torch.device) -> Device:
    """Return the CUDA device. Raises what torch raises if it cannot be used."""
    return CudaDevice(device)


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
