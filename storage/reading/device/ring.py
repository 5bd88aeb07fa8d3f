"""Host memory that bytes pass through on their way to a device.

It is page-locked: only then does a copy run at the speed of the bus, while the host goes on. Page-locking takes about
half a second per GiB, so the memory is allocated once per process and kept.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from ....planner.coalesce import MAX_REQUEST_BYTES
from ...runtime.forks import fork_safe_lock, generation
from ...runtime.pinned import ByteArray, pin, unpin
from ...stores.buffer_pool import PAGE_BYTES

SLOT_BYTES = MAX_REQUEST_BYTES + PAGE_BYTES
MAX_RING_BYTES = 256 * 1024 * 1024
MAX_SLOTS = MAX_RING_BYTES // SLOT_BYTES


@dataclass(slots=True, eq=False)
class Slot:
    """A part of the ring that one thread fills."""

    memory: ByteArray
    pinned: bool
    copies: list[torch.cuda.Event] = field(default_factory=list)
    """Reached when the copies from this memory are done."""

    def contains(self, data: memoryview) -> bool:
        """Return whether bytes are in this slot."""
        return 0 <= self.position(data) < self.memory.nbytes

    def position(self, data: memoryview) -> int:
        """Return where bytes begin in this slot."""
        return int(np.frombuffer(data, np.uint8).ctypes.data - self.memory.ctypes.data)

    def wait(self) -> None:
        """Wait until the copies from this memory are done."""
        while self.copies:
            self.copies[-1].synchronize()
            self.copies.pop()


class Ring:
    """At most MAX_SLOTS slots, which are allocated when they are needed.

    A thread must not take a slot while it holds another: if all threads did, all would wait.

    Args:
        nbytes: the size of a slot.
        page_lock: page-locks memory, and returns whether that succeeded.
    """

    def __init__(self, nbytes: int = SLOT_BYTES, page_lock: Callable[[ByteArray], bool] = pin) -> None:
        self.nbytes = nbytes
        self._page_lock = page_lock
        self._of_process = fork_safe_lock()
        self._begin()

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._free: deque[Slot] = deque()
        """In the order in which they were put back."""
        self._count = 0
        self._generation = generation()

    @property
    def max_request_bytes(self) -> int:
        """The largest request that fits a slot at every offset in a page."""
        return self.nbytes - PAGE_BYTES

    @property
    def held_bytes(self) -> int:
        """The bytes of all slots."""
        return self._count * self.nbytes

    def take(self) -> Slot:
        """Return a slot whose copies are done. Wait for one if all are in use."""
        self._forget_parent()
        with self._changed:
            while not self._free and self._count == MAX_SLOTS:
                self._changed.wait()
            slot = next((slot for slot in self._free if all(copy.query() for copy in slot.copies)), None)
            if slot is None and self._count == MAX_SLOTS:
                slot = self._free[0]  # the copies of the others were started later
            if slot is None:
                self._count += 1
            else:
                self._free.remove(slot)
        try:
            if slot is None:
                memory = np.frombuffer(mmap.mmap(-1, self.nbytes), np.uint8)
                return Slot(memory, self._page_lock(memory))
            slot.wait()
        except BaseException:
            with self._changed:
                self._count -= 1
                self._changed.notify()
            if slot is not None and slot.pinned:
                unpin(slot.memory)
            raise
        return slot

    def put(self, slot: Slot) -> None:
        """Take back a slot. Copies from it may still run."""
        with self._changed:
            self._free.append(slot)
            self._changed.notify()

    def release(self) -> None:
        """Return the memory of the slots that are not in use to the system."""
        self._forget_parent()
        with self._changed:
            slots, self._free = self._free, deque()
            self._count -= len(slots)
        for slot in slots:
            slot.wait()
            if slot.pinned:
                unpin(slot.memory)

    def _forget_parent(self) -> None:
        """Forget the slots of the parent process. A forked child cannot use its CUDA context."""
        with self._of_process:
            if self._generation != generation():
                self._begin()


RING = Ring()
"""The ring of this process, for all CUDA devices."""
