"""Page-locked host memory. A CUDA device copies from it and to it at the speed of the bus, while the host works."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import weakref
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from .forks import fork_safe_lock, generation
from .logs import logger_of

logger = logger_of(__name__)
MAX_BUFFER_BYTES = 256 * 1024 * 1024
"""The most bytes of page-locked memory that saves use."""
STEP_BYTES = 2 * 1024 * 1024
"""Buffers have a multiple of this size, so that they can be used again for other tensors."""
_PORTABLE = 1
"""cudaHostRegisterPortable: the memory counts as page-locked for all devices."""
ByteArray = npt.NDArray[np.uint8]
_refused_bytes = sys.maxsize
"""The fewest bytes that CUDA has refused to page-lock in this process. It may accept fewer."""


def pin(memory: ByteArray) -> bool:
    """Page-lock memory, for the current device and all others.

    If CUDA refuses, log a warning and return False, also for further calls with as much memory: copies are then slower,
    but still right.
    """
    global _refused_bytes
    if memory.nbytes >= _refused_bytes:
        return False
    try:
        status = int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, _PORTABLE))
        problem = f"error {status}" if status else ""
        refused = memory.nbytes
    except (AttributeError, RuntimeError, TypeError) as error:  # torch for another kind of device than CUDA
        problem = f"{type(error).__name__}: {error}"
        refused = 0
    if problem:
        _refused_bytes = min(refused, _refused_bytes)
        _forget_error()
        logger.warning(
            "%d bytes of host memory cannot be page-locked (%s), so copies between host and device are slower",
            memory.nbytes,
            problem,
        )
    return not problem


def unpin(memory: ByteArray) -> None:
    """Undo `pin`."""
    if int(torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)):
        _forget_error()


def _forget_error() -> None:
    """Let the next operation of this thread on a device report no earlier error, as CUDA otherwise does."""
    with contextlib.suppress(Exception):
        torch.zeros(1, device="cuda")


class PinnedBuffers:
    """Buffers of page-locked memory that are kept, since page-locking takes half a second per GiB.

    Args:
        max_bytes: the size of all buffers together.
        page_lock: page-locks memory, and returns whether that succeeded.
        unlock: undoes that.
    """

    def __init__(
        self,
        max_bytes: int = MAX_BUFFER_BYTES,
        page_lock: Callable[[ByteArray], bool] = pin,
        unlock: Callable[[ByteArray], object] = unpin,
    ) -> None:
        self._max_bytes = max_bytes
        self._page_lock = page_lock
        self._unlock = unlock
        self._lock = fork_safe_lock()
        self._begin()

    def _begin(self) -> None:
        self._free: dict[int, ByteArray] = {}
        """By their `id`. A buffer may be taken back at any moment, by any thread, without the lock."""
        self.held_bytes = 0
        """The bytes of all buffers."""
        self._generation = generation()

    def lend(self, nbytes: int) -> ByteArray | None:
        """Return memory of this size. It counts as in use while an array refers to it.

        Returns:
            The memory, or None if there is no more. Then use ordinary memory: waiting could take forever, since the
            caller may itself refer to other buffers.
        """
        size = max(1, -(-nbytes // STEP_BYTES)) * STEP_BYTES
        with self._lock:
            if self._generation != generation():  # a forked child cannot use the CUDA context of its parent
                self._begin()
            fits = [buffer for buffer in list(self._free.values()) if size <= buffer.nbytes <= 2 * size]
            buffer = min(fits, key=len, default=None)
            if buffer is not None:
                del self._free[id(buffer)]
            else:
                while self._free and self.held_bytes + size > self._max_bytes:
                    self._drop_one()
                if self.held_bytes + size > self._max_bytes:
                    return None
                buffer = np.frombuffer(mmap.mmap(-1, size), np.uint8)
                if not self._page_lock(buffer):
                    return None
                self.held_bytes += size
        lent = (ctypes.c_ubyte * buffer.nbytes).from_buffer(buffer.data)  # all arrays over it refer to this object
        weakref.finalize(lent, self._take_back, buffer, self._generation).atexit = False
        return np.frombuffer(memoryview(lent), np.uint8)[:nbytes]

    def _take_back(self, buffer: ByteArray, of: int) -> None:
        if of == self._generation == generation():
            self._free[id(buffer)] = buffer

    def release(self) -> None:
        """Return the memory that is not in use to the system."""
        with self._lock:
            if self._generation != generation():
                self._begin()
            while self._free:
                self._drop_one()

    def _drop_one(self) -> None:
        buffer = self._free.pop(next(iter(self._free)))
        self._unlock(buffer)
        self.held_bytes -= buffer.nbytes


save_buffers = PinnedBuffers()
"""The buffers of this process, which saves copy values of CUDA devices to."""
