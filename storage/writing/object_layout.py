"""Distributes the shards that a rank writes over data objects."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ...planner.box import Box
from ...planner.entries import Kind
from ...planner.errors import ShapeMismatchError
from ...planner.grid import Grid
from ..runtime.pinned import MAX_BUFFER_BYTES
from ..tensors.splitting import group_by_bytes

CONCURRENT_OBJECTS = 8
"""The number of objects that are written concurrently to a store that holds each object in memory
(`benchmarks/fsdp_to_tp.py`)."""
MIN_OBJECT_BYTES = 8 * 1024 * 1024
"""A rank does not split its shards into objects smaller than this."""
MAX_OBJECT_BYTES = 64 * 1024 * 1024
MAX_DEVICE_COPY_BYTES = 64 * 1024 * 1024
"""The most bytes of values that one copy from a device takes."""
MAX_SHARD_GROUP_BYTES = 16 * 1024 * 1024
"""The most bytes of shards that are stored as one group, if the store holds objects in memory.

The shards of a group are split into eighths, and the first eighths of all shards come first. So a rank reads its part
of all of them with one request (`benchmarks/fsdp_to_tp.py`). On a disk a request costs little, and shards are not
grouped.
"""
MIN_EIGHTH_BYTES = 256 * 1024
"""A shard whose eighths would be smaller is not split: each part adds about 50 bytes to the manifest."""
MIN_COMPRESSED_BYTES = 1024
"""A tensor whose shards are all smaller is stored raw: compressing it takes long and saves nothing
(`benchmarks/small_tensors.py`)."""


@dataclass(frozen=True, slots=True)
class ShardToWrite:
    """A shard of a tensor, a piece of one (see `pieces`), or the bytes of one value."""

    name: str
    kind: Kind
    dtype: torch.dtype
    shape: tuple[int, ...]
    """The global shape of the tensor."""
    box: Box
    """The position of the shard in the tensor."""
    load: Callable[[Box], torch.Tensor]
    """Returns the values of a box inside the shard, on any device. It is called just before the box is written."""
    largest_sizes: tuple[int, ...] | None = None
    """The sizes of the largest shard of the tensor on any rank, if there are several."""

    @classmethod
    def of_value(cls, name: str, kind: Kind, data: bytes) -> ShardToWrite:
        """Return the shard of an encoded value: a tensor of its bytes, as a whole."""
        values = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        whole = Box.whole((len(data),))
        return cls(name, kind, values.dtype, whole.sizes, whole, lambda box: values[box.slices])

    @property
    def nbytes(self) -> int:
        return self.box.numel * self.dtype.itemsize

    def codec(self, codec: str) -> str:
        """Return the codec of the tensor, in a checkpoint that is saved with this codec."""
        nbytes = math.prod(self.largest_sizes or self.shape) * self.dtype.itemsize
        return "none" if nbytes < MIN_COMPRESSED_BYTES else codec

    def grid(self, codec: str) -> Grid:
        """Return the grid of the tensor, in a checkpoint that is saved with this codec."""
        raw = self.codec(codec) == "none"
        return Grid.choose(self.shape, self.dtype.itemsize, raw=raw, shard=self.largest_sizes)

    def pieces(self, max_bytes: int, codec: str) -> list[ShardToWrite]:
        """Cut the shard along the grid into shards of at most `max_bytes`. Single chunks may be larger."""
        boxes = self.grid(codec).split(self.box, max(1, max_bytes // self.dtype.itemsize))
        return [replace(self, box=box) for box in boxes]


def part_of(name: str, values: torch.Tensor, shard: Box, dtype: torch.dtype, box: Box) -> torch.Tensor:
    """Return the values of a box, taken from the values of a shard.

    Args:
        values: the values of the whole shard.
        shard: the box of the shard in the tensor.
        box: the box to return, inside of `shard`.

    Raises:
        ShapeMismatchError: `values` does not have the sizes of `shard` and the dtype `dtype`.
    """
    if tuple(values.shape) != shard.sizes or values.dtype != dtype:
        raise ShapeMismatchError(
            f"{name!r} should hold {shard} of {dtype} on this rank, but has shape {tuple(values.shape)}, {values.dtype}"
        )
    return values[box.relative_to(shard).slices]


def in_objects(
    shards: Sequence[ShardToWrite], codec: str, budget_bytes: int, *, streams: int
) -> list[list[ShardToWrite]]:
    """Return the shards of each data object to write, cut into parts.

    Args:
        streams: the number of objects that the store accepts as streams at the same time. 0 if it holds each object in
            memory until it is complete: then there are several objects of similar size that are not too small.
    """
    if streams:
        most = min(MAX_DEVICE_COPY_BYTES, MAX_BUFFER_BYTES // (2 * streams), budget_bytes // (4 * streams))
        pieces = [piece for shard in shards for piece in shard.pieces(most, codec)]
        return _divided(pieces, streams)
    total = sum(shard.nbytes for shard in shards)
    share = max(total // CONCURRENT_OBJECTS, MIN_OBJECT_BYTES)
    most = min(share, MAX_OBJECT_BYTES, budget_bytes // (2 * CONCURRENT_OBJECTS))
    return list(group_by_bytes((piece for shard in shards for piece in shard.pieces(most, codec)), most))


def _divided(pieces: Sequence[ShardToWrite], count: int) -> list[list[ShardToWrite]]:
    """Return consecutive pieces in at most `count` groups of similar size that are not too small."""
    share = max(sum(piece.nbytes for piece in pieces) / count, MIN_OBJECT_BYTES)
    groups: list[list[ShardToWrite]] = []
    before = 0
    for piece in pieces:
        if before >= len(groups) * share:
            groups.append([])
        groups[-1].append(piece)
        before += piece.nbytes
    return groups
