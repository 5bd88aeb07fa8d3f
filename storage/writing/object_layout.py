"""What a rank is to write: shards, and how they are spread over objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ...planner.box import Box
from ...planner.entries import Kind
from ...planner.errors import ShapeMismatchError
from ...planner.grid import Grid

CONCURRENT_OBJECTS = 8
"""Objects that are written at once to a store that holds each in memory."""
MIN_OBJECT_BYTES = 8 * 1024 * 1024
"""Where there are several, none is made smaller for that."""
MAX_OBJECT_BYTES = 64 * 1024 * 1024
PIECE_BYTES = 64 * 1024 * 1024
"""Values that are taken from a device at once."""
TOGETHER_BYTES = 16 * 1024 * 1024
"""Values of shards that are taken apart and lie together, by eighths: a rank reads its part of all by one request.

Where a store holds objects: on a disk a request costs little.
"""
MIN_EIGHTH_BYTES = 256 * 1024
"""A shard with smaller ones is not taken apart: each part costs some 50 bytes of manifest."""


@dataclass(frozen=True, slots=True)
class ShardToWrite:
    """One shard of a tensor, or one object as bytes."""

    name: str
    kind: Kind
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the global tensor."""
    box: Box
    """The part of it that the shard is."""
    load: Callable[[Box], torch.Tensor]
    """Gives the values of a box of the tensor, inside the shard, on any device; called when its turn comes."""

    @property
    def nbytes(self) -> int:
        return self.box.numel * self.dtype.itemsize

    def pieces(self, max_bytes: int, codec: str) -> list[ShardToWrite]:
        """The shard as several that have at most so many bytes, as far as the grid lets it be cut."""
        boxes = grid_of(self.shape, self.dtype.itemsize, codec).split(
            self.box, max(1, max_bytes // self.dtype.itemsize)
        )
        return [replace(self, box=box) for box in boxes]


def part_of(name: str, values: torch.Tensor, shard: Box, dtype: torch.dtype, box: Box) -> torch.Tensor:
    """A box of a tensor, out of the values of a shard. Raises ShapeMismatchError where they are not those of one."""
    if tuple(values.shape) != shard.sizes or values.dtype != dtype:
        raise ShapeMismatchError(
            f"{name!r} should hold {shard} of {dtype} on this rank, but has shape {tuple(values.shape)}, {values.dtype}"
        )
    return values[box.relative_to(shard).slices]


def grid_of(shape: tuple[int, ...], itemsize: int, codec: str) -> Grid:
    return Grid.choose(shape, itemsize, raw=codec == "none")


def in_objects(
    shards: Sequence[ShardToWrite], codec: str, budget_bytes: int, *, several: bool
) -> list[list[ShardToWrite]]:
    """What each object is to hold: all, or, where `several` are better, as much as makes many, and not too small."""
    if not several:
        pieces = [piece for shard in shards for piece in shard.pieces(min(PIECE_BYTES, budget_bytes // 4), codec)]
        return [pieces] if pieces else []
    total = sum(shard.nbytes for shard in shards)
    share = max(total // CONCURRENT_OBJECTS, MIN_OBJECT_BYTES)
    most = min(share, MAX_OBJECT_BYTES, budget_bytes // (2 * CONCURRENT_OBJECTS))
    groups: list[list[ShardToWrite]] = []
    room = 0
    for piece in (piece for shard in shards for piece in shard.pieces(most, codec)):
        if not groups or piece.nbytes > room:
            groups.append([])
            room = most
        groups[-1].append(piece)
        room -= piece.nbytes
    return groups
