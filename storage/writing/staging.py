"""Copies what a save writes into memory that is kept between saves, so that training can go on while it is written.

The pages of new memory cost more than the copy (`benchmarks/async_save.py`), so memory is reused. It is shared memory,
which a writer process can map. For tensors on a CUDA device it is page-locked, and copied to on a separate stream.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...planner.box import Box
from ...planner.entries import Kind
from ..errors import StoreError
from ..runtime.devices import current_device
from ..runtime.forks import after_fork_in_child, fork_safe_lock
from ..runtime.limits import available_bytes, default_threads, local_ranks
from ..runtime.pinned import pin, save_buffers, unpin
from ..runtime.threads import Pool
from ..tensors.dtypes import as_array, from_bytes
from ..tensors.splitting import group_by_bytes
from .object_layout import ShardToWrite, part_of

ALIGNMENT = 64
"""Staged tensors begin at multiples of this many bytes."""
PAGE_BYTES = 2 * 1024 * 1024
"""Staging memory has a multiple of this size, so that the kernel can use large pages."""
MIN_STAGING_BYTES = 64 * 1024 * 1024
PIECE_BYTES = 16 * 1024 * 1024
"""A core copies about this many bytes at once."""
MIN_PAGE_LOCKED_BYTES = 256 * 1024
"""A synchronous save copies smaller tensors of a CUDA device to ordinary memory."""
MAX_PIECES = 8
"""If what a rank writes does not fit its staging memory, shards are cut into pieces of an eighth of that memory."""


class Arena:
    """A region of staging memory. Only one save uses it at a time.

    Args:
        nbytes: its size.
        pinned: whether to page-lock it, so that a CUDA device can copy to it while the host works.
    """

    _numbers = itertools.count()

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self.number = next(self._numbers)
        self.nbytes = max(1, -(-nbytes // PAGE_BYTES)) * PAGE_BYTES
        self.fd = -1
        """The file of the memory, which another process can map; -1 if the system has no such files."""
        try:
            if hasattr(os, "memfd_create"):
                self.fd = os.memfd_create("reshard-staging", os.MFD_CLOEXEC)
            self.bytes = mapped(self.fd, self.nbytes)
        except BaseException as error:
            self._close_file()
            if not isinstance(error, OSError):
                raise
            raise StoreError(
                f"the memory for an asynchronous save, {self.nbytes / 1e6:.1f} MB, cannot be allocated: "
                f"{error.strerror or error}. It counts as a file: raise the limits of files (ulimit -f, -n) and of "
                "memory, or use reshard.save"
            ) from error
        self.for_device = pinned
        """Whether page-locked memory was requested. `pinned` is whether it succeeded."""
        self.pinned = pinned and pin(self.bytes)

    def close(self) -> None:
        """Return the memory to the system."""
        if self.pinned:
            unpin(self.bytes)
        self.forget()

    def forget(self) -> None:
        """Unmap the memory in this process. Another process may use it."""
        self.pinned = False
        self.bytes = np.empty(0, np.uint8)
        self._close_file()

    def _close_file(self) -> None:
        fd, self.fd = self.fd, -1  # first, so that a forked child does not close another file
        if fd >= 0:
            os.close(fd)


def mapped(fd: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """Return the bytes of a memory file, or new memory if `fd` is -1."""
    if fd >= 0 and os.fstat(fd).st_size < nbytes:
        os.ftruncate(fd, nbytes)
    return np.frombuffer(mmap.mmap(fd, nbytes), np.uint8)


class StagingMemory:
    """The staging memory of this process."""

    def __init__(self) -> None:
        self._lock = fork_safe_lock()
        self._idle: list[Arena] = []
        self._used: list[Arena] = []
        self.closing: Callable[[Arena], object] = lambda arena: None
        """Called before the memory of an arena is returned to the system."""

    def take(self, nbytes: int, *, pinned: bool) -> Arena:
        """Return memory of at least this size. Idle memory that is too small for it is returned to the system."""
        with self._lock:
            fits = [arena for arena in self._idle if arena.nbytes >= nbytes and (arena.for_device or not pinned)]
            if fits:
                arena = min(fits, key=lambda arena: arena.nbytes)
                self._idle.remove(arena)
            else:
                self._close_idle()
                arena = Arena(nbytes, pinned=pinned)
            self._used.append(arena)
            return arena

    def put(self, arena: Arena) -> None:
        """Keep memory for the next save."""
        with self._lock:
            if arena in self._used:
                self._used.remove(arena)
                self._idle.append(arena)

    def release(self) -> None:
        """Return idle memory to the system."""
        with self._lock:
            self._close_idle()

    @property
    def held_bytes(self) -> int:
        """The bytes of idle memory."""
        return sum(arena.nbytes for arena in self._idle)

    def _close_idle(self) -> None:
        while self._idle:
            arena = self._idle.pop()
            self.closing(arena)
            arena.close()

    def forget_parent(self) -> None:
        """Forget the memory of the parent process, in a forked child. The two must not write to it at once."""
        for arena in (*self._idle, *self._used):
            arena.forget()
        self._idle, self._used = [], []


STAGING = StagingMemory()
after_fork_in_child(STAGING.forget_parent)


def default_staging_bytes() -> int:
    """Return how many bytes a save may stage on this rank: its share of half of the available memory."""
    return max(MIN_STAGING_BYTES, (available_bytes() // local_ranks() + STAGING.held_bytes) // 2)


@dataclass(frozen=True, slots=True)
class StagedShard:
    """A shard whose values are in staging memory."""

    name: str
    kind: Kind
    dtype: torch.dtype
    shape: tuple[int, ...]
    box: Box
    start: int
    """The first byte of the values. They are row-major."""
    largest_sizes: tuple[int, ...] | None
    """As in `ShardToWrite`."""

    def shard(self, memory: npt.NDArray[np.uint8]) -> ShardToWrite:
        """Return the shard to write, which reads its values from staging memory."""
        nbytes = self.box.numel * self.dtype.itemsize
        values = from_bytes(memory[self.start : self.start + nbytes], self.dtype, self.box.sizes)

        def load(part: Box) -> torch.Tensor:
            return part_of(self.name, values, self.box, self.dtype, part)

        return ShardToWrite(self.name, self.kind, self.dtype, self.shape, self.box, load, self.largest_sizes)


def staged_bytes(shards: Iterable[ShardToWrite]) -> int:
    """Return how many bytes of staging memory shards take."""
    return sum(_aligned(shard.nbytes) for shard in shards)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def split_to_fit(
    shards: Sequence[ShardToWrite], max_bytes: int, codec: str
) -> tuple[list[ShardToWrite], list[ShardToWrite]]:
    """Split shards into those to write at once, and those to stage, which take at most `max_bytes`."""
    max_bytes = max_bytes // PAGE_BYTES * PAGE_BYTES
    if not max_bytes:
        return list(shards), []
    if staged_bytes(shards) <= max_bytes:
        return [], list(shards)
    pieces = [piece for shard in shards for piece in shard.pieces(max_bytes // MAX_PIECES, codec)]
    at, left = len(pieces), max_bytes
    while at and _aligned(pieces[at - 1].nbytes) <= left:
        at -= 1
        left -= _aligned(pieces[at].nbytes)
    return pieces[:at], pieces[at:]


@dataclass(frozen=True, slots=True, eq=False)
class _HostCopy:
    """A copy that the host makes."""

    to: npt.NDArray[Any]
    source: npt.NDArray[Any]

    @property
    def nbytes(self) -> int:
        return self.to.nbytes

    def pieces(self) -> Iterator[_HostCopy]:
        """Cut the copy along its first dimension into copies of at most PIECE_BYTES, or of one row."""
        if not self.to.shape or self.nbytes <= PIECE_BYTES:
            yield self
            return
        rows = max(1, PIECE_BYTES // self.to[0].nbytes)
        for at in range(0, len(self.to), rows):
            yield _HostCopy(self.to[at : at + rows], self.source[at : at + rows])


@dataclass(slots=True)
class Staging:
    """Shards that are being copied into an arena.

    The constructor starts the copies from devices. `copy` does the others and waits for all.
    """

    arena: Arena
    shards: list[StagedShard] = field(default_factory=list)
    _host: list[_HostCopy] = field(default_factory=list)
    _device: list[DeviceCopies] = field(default_factory=list)

    @classmethod
    def begin(cls, shards: Sequence[ShardToWrite]) -> Staging:
        """Take an arena for shards, and start the copies from devices."""
        loaded = [(shard, shard.load(shard.box)) for shard in shards if shard.box.numel]
        devices = [values.device for _, values in loaded if values.device.type == "cuda"]
        with current_device(devices[0] if devices else torch.device("cpu")):
            staging = cls(STAGING.take(staged_bytes(shards), pinned=bool(devices)))
        try:
            staging._begin(loaded)
        except BaseException:
            staging.close()
            raise
        return staging

    def _begin(self, loaded: Sequence[tuple[ShardToWrite, torch.Tensor]]) -> None:
        by_device: dict[torch.device, DeviceCopies] = {}
        start = 0
        for shard, values in loaded:
            to = self.arena.bytes[start : start + shard.nbytes]
            if values.device.type == "cuda":
                copies = by_device.setdefault(values.device, DeviceCopies(values.device))
                copies.add(from_bytes(to, shard.dtype, shard.box.sizes), values)
            else:
                source = as_array(values)
                self._host.append(_HostCopy(to.view(source.dtype).reshape(source.shape), source))
            self.shards.append(
                StagedShard(shard.name, shard.kind, shard.dtype, shard.shape, shard.box, start, shard.largest_sizes)
            )
            start += _aligned(shard.nbytes)
        self._device = list(by_device.values())
        for copies in self._device:
            copies.start()

    def copy(self) -> None:
        """Copy the values that are on the host, with all cores of this rank, and wait for those from devices."""
        groups = list(group_by_bytes((piece for copy in self._host for piece in copy.pieces()), PIECE_BYTES))
        threads = min(default_threads(), len(groups))
        try:
            if threads > 1:
                with Pool(threads, "reshard-stage") as pool:
                    list(pool.map(_copy, groups))
            else:
                _copy(chain.from_iterable(groups))
        finally:
            self._wait_for_devices()
        self._host = []

    def close(self) -> None:
        """Return the arena, when the copies from devices that were started are done."""
        try:
            self._wait_for_devices()
        finally:
            STAGING.put(self.arena)

    def _wait_for_devices(self) -> None:
        for copies in self._device:
            copies.wait()
        self._device = []


class DeviceCopies:
    """Copies from a CUDA device on a separate stream.

    The copies begin after the work that is queued on the current stream of the device.
    """

    _streams: dict[torch.device, torch.cuda.Stream] = {}  # noqa: RUF012 (shared by all instances)

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Destinations and sources. They are referenced until the copies are done, so their memory is not reused."""
        self._done: torch.cuda.Event | None = None

    def add(self, to: torch.Tensor, values: torch.Tensor) -> None:
        """Add a copy."""
        self._pairs.append((to, values.resolve_conj().resolve_neg()))  # torch would do that before the copy is done

    def start(self) -> None:
        """Start the copies."""
        with current_device(self._device):
            stream = self._streams.get(self._device)
            if stream is None:
                stream = self._streams[self._device] = torch.cuda.Stream(self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
            try:
                with torch.cuda.stream(stream):
                    for to, values in self._pairs:
                        to.copy_(values, non_blocking=True)
            finally:  # also of the copies before one that failed
                self._done = stream.record_event(torch.cuda.Event(blocking=True))

    def wait(self) -> None:
        """Wait on the host until the copies that were started are done."""
        if self._done is not None:
            self._done.synchronize()
        self._pairs.clear()


def as_host_array(values: torch.Tensor) -> npt.NDArray[Any]:
    """Return the bits of a tensor as an array on the host.

    Values of a CUDA device are copied to page-locked memory, unless they are small: they would push the buffers of
    large tensors out.
    """
    memory = None
    if values.device.type == "cuda" and values.nbytes >= MIN_PAGE_LOCKED_BYTES:
        with current_device(values.device):
            memory = save_buffers.lend(values.nbytes)
    if memory is None:
        return as_array(values)
    copied = from_bytes(memory, values.dtype, tuple(values.shape))
    copies = DeviceCopies(values.device)
    copies.add(copied, values)
    copies.start()
    copies.wait()
    return as_array(copied)


def _copy(copies: Iterable[_HostCopy]) -> None:
    for copy in copies:
        np.copyto(copy.to, copy.source)
