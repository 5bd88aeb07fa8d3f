"""Decompress zstd frames that are in the memory of a device, many with one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
import zstandard

FRAME_ALIGNMENT = 16
"""nvCOMP may require that frames and their values begin at a multiple of this many bytes."""
MIN_FRAMES = 1024
"""nvCOMP decompresses 1 GB/s with 32 frames per call, 40 with a thousand and 100 with eight thousand (H200)."""


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
        """Return the decompressed frames: (value_bytes,) uint8 on the device."""
        sizes = list(map(len, self.stored))
        device = self.stored[0].device
        padding = torch.empty(FRAME_ALIGNMENT, dtype=torch.uint8, device=device)
        parts = (
            part
            for frame, nbytes in zip(self.stored, sizes, strict=True)
            for part in (frame, padding[: -nbytes % FRAME_ALIGNMENT])
        )
        packed = torch.cat(list(parts))
        values = torch.empty(self.value_bytes, dtype=torch.uint8, device=device)
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
        """Decompress frames, in the order of the current stream of the device. Any thread may call this."""


def aligned(nbytes: int) -> int:
    """Return the number of bytes that a frame takes in memory."""
    return -(-nbytes // FRAME_ALIGNMENT) * FRAME_ALIGNMENT


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(map(aligned, sizes))][: len(sizes)]


class HostDecompressor:
    """Decompresses on the host what is on a device. It replaces a decompressor that failed."""

    def decompress(self, frames: PackedFrames) -> None:
        """See `Decompressor`."""
        packed, values = frames.packed.cpu().numpy(), np.empty(len(frames.values), np.uint8)
        decompress = zstandard.ZstdDecompressor().decompress
        columns = (frames.starts, frames.sizes, frames.value_starts, frames.numels)
        for start, nbytes, to, numel in zip(*columns, strict=True):
            values[to : to + numel] = np.frombuffer(decompress(packed[start : start + nbytes].data), np.uint8)
        frames.values.copy_(torch.from_numpy(values))
