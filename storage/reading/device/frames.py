"""Decompress zstd frames that are in the memory of a device, many with one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
import zstandard

FRAME_ALIGNMENT = 16
"""nvCOMP may require that frames and their values begin at a multiple of this many bytes."""
MIN_FRAMES = 512
"""The number of frames to collect before one call. nvCOMP decompresses 3 GB/s with 64 frames per call, 40 with a
thousand and 100 with eight thousand (H200). The budget limits it: a thousand would need 1.2 GB with nvCOMP's scratch
memory."""


class UndecodableFrameError(Exception):
    """A frame cannot be decompressed.

    Args:
        number: its position among the frames of the call.
        cause: why.
    """

    def __init__(self, number: int, cause: object) -> None:
        super().__init__(number, cause)
        self.number = number
        self.cause = cause


@dataclass(slots=True)
class Frames:
    """Frames to decompress with one call."""

    stored: list[torch.Tensor] = field(default_factory=list)
    """(nbytes,) uint8 each, on the device."""
    numels: list[int] = field(default_factory=list)
    """The number of bytes that each frame declares. The caller has checked it."""
    value_bytes: int = 0
    """The memory that the decompressed frames take."""

    def add(self, frame: torch.Tensor, numel: int) -> int:
        """Add a frame. Return where its bytes will begin in the result of `decompress`."""
        start = self.value_bytes
        self.stored.append(frame)
        self.numels.append(numel)
        self.value_bytes += aligned(numel)
        return start

    def decompress(self, decompressor: Decompressor) -> torch.Tensor:
        """Return the decompressed frames: (value_bytes,) uint8 on the device.

        Raises:
            UndecodableFrameError: a frame cannot be decompressed.
        """
        sizes = list(map(len, self.stored))
        device = self.stored[0].device
        padding = torch.empty(FRAME_ALIGNMENT, dtype=torch.uint8, device=device)
        parts = (
            part
            for frame, nbytes in zip(self.stored, sizes, strict=True)
            for part in (frame, padding[: -nbytes % FRAME_ALIGNMENT])
        )
        packed = torch.cat(list(parts))
        # Zeros, because a frame that fails must not expose old memory.
        values = torch.zeros(self.value_bytes, dtype=torch.uint8, device=device)
        decompressor.decompress(PackedFrames(packed, _starts(sizes), sizes, values, _starts(self.numels), self.numels))
        return values


@dataclass(frozen=True, slots=True)
class PackedFrames:
    """Frames in one piece of memory, and the memory to decompress them to."""

    packed: torch.Tensor
    """uint8, on the device."""
    starts: Sequence[int]
    sizes: Sequence[int]
    """The byte range of each frame."""
    values: torch.Tensor
    """uint8, on the device."""
    value_starts: Sequence[int]
    numels: Sequence[int]
    """The byte range of each decompressed frame in `values`."""


class Decompressor(Protocol):
    """Decompresses frames on a device."""

    def decompress(self, frames: PackedFrames) -> None:
        """Decompress frames, in the order of the current stream of the device. Any thread may call this.

        Raises:
            UndecodableFrameError: a frame cannot be decompressed.
        """

    def release(self) -> None:
        """Return the memory that it keeps to the device. Any thread may call this."""


def aligned(nbytes: int) -> int:
    """Return the number of bytes that a frame takes in memory."""
    return -(-nbytes // FRAME_ALIGNMENT) * FRAME_ALIGNMENT


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(map(aligned, sizes))][: len(sizes)]


class HostDecompressor:
    """Decompresses on the host what is on a device. It checks and replaces nvCOMP."""

    def decompress(self, frames: PackedFrames) -> None:
        """See `Decompressor`."""
        packed, values = frames.packed.cpu(), np.zeros(len(frames.values), np.uint8)
        for number, (start, numel) in enumerate(zip(frames.value_starts, frames.numels, strict=True)):
            values[start : start + numel] = self._decompressed(packed, frames, number)
        frames.values.copy_(torch.from_numpy(values))

    def release(self) -> None:
        """Do nothing: it keeps no memory."""

    def check_one(self, frames: PackedFrames) -> None:
        """Compare the result for one frame. Raise RuntimeError if it is another one."""
        number = len(frames.starts) // 2
        start, numel = frames.value_starts[number], frames.numels[number]
        found = frames.values[start : start + numel].cpu().numpy()
        if not np.array_equal(found, self._decompressed(frames.packed, frames, number)):
            raise RuntimeError("it decompressed a frame to other values than the host")

    def _decompressed(self, packed: torch.Tensor, frames: PackedFrames, number: int) -> np.ndarray[Any, Any]:
        start, nbytes, numel = frames.starts[number], frames.sizes[number], frames.numels[number]
        frame = packed[start : start + nbytes].cpu().numpy()
        try:
            found = np.frombuffer(zstandard.ZstdDecompressor().decompress(frame.data), np.uint8)
        except zstandard.ZstdError as error:
            raise UndecodableFrameError(number, error) from error
        if len(found) != numel:
            raise UndecodableFrameError(number, f"it has {len(found)} bytes, expected {numel}")
        return found
