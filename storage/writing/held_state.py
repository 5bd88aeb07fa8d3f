"""What one rank holds of the state dict to save: its entries, its shards and their values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from ...planner.box import Box
from ...planner.entries import Kind
from ...planner.errors import CheckpointError
from ..errors import UnsupportedValueError
from ..formats.value_codec import encode_value, needs_pickle
from ..runtime.checksums import checksum
from ..tensors.dtypes import as_array, as_bytes, dtype_name
from ..tensors.local_shards import local_shards
from ..tensors.state_dict import Leaf
from ..tensors.tensor_classes import as_storable, check_has_memory, is_whole
from .agreement import EntryDescription
from .object_layout import ShardToWrite, part_of
from .save_plan import SMALL_REPLICA_BYTES, HeldShards, unpack_largest_sizes

SAMPLED = 256
"""About how many values of a large replica are compared between ranks."""


@dataclass(frozen=True, slots=True)
class _TensorShard:
    """A shard of a tensor that this rank holds."""

    name: str
    box: Box
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class _EncodedValue:
    """A value that is not a tensor."""

    name: str
    kind: Kind
    data: bytes


class HeldState:
    """The leaves of this rank's state dict, checked and described. Values are encoded.

    A DTensor is saved as the boxes that this rank really holds. They may differ from the boxes that DTensor computes
    (see `planner.layout.held_tensor`).

    Args:
        leaves: the leaves of the state dict, by name.
        allow_pickle: whether to store values that need pickle. If not, they are an error.
        world_size: the number of ranks that save. Checksums of what several of them may hold are compared.

    Raises:
        UnsupportedValueError, DtypeError, LayoutError: a leaf cannot be stored.
    """

    def __init__(self, leaves: Mapping[str, Leaf], *, allow_pickle: bool = True, world_size: int = 1) -> None:
        self._allow_pickle = allow_pickle
        self._world_size = world_size
        self._shards: list[_TensorShard | _EncodedValue] = []
        """What this rank holds. A value counts as a shard."""
        self._described: dict[str, EntryDescription] = {}
        self._boxes: list[list[Box]] = []
        self._digests: list[tuple[int, Box, int]] = []
        for name, leaf in leaves.items():
            try:
                add = self._add_tensor if isinstance(leaf.value, torch.Tensor) else self._add_value
                add(name, leaf)
            except CheckpointError:
                raise
            except Exception as error:
                raise UnsupportedValueError(
                    f"{name!r}, of {type(leaf.value)}, cannot be stored: {type(error).__name__}: {error}"
                ) from error
        self.held = HeldShards.of(self._described, self._boxes, self._digests)
        """What this rank holds, as it is sent to rank 0."""

    def shards_to_write(self, positions: Iterable[int], largest_sizes: bytes) -> list[ShardToWrite]:
        """Return some of the shards that this rank holds.

        Args:
            positions: their positions in `held`.
            largest_sizes: as in `GlobalPlan`.
        """
        shapes = [value.shape for value in self._described.values()]
        largest = dict(zip(self._described, unpack_largest_sizes(largest_sizes, shapes), strict=True))
        found: list[ShardToWrite] = []
        for at in positions:
            held = self._shards[at]
            if isinstance(held, _EncodedValue):
                found.append(ShardToWrite.of_value(held.name, held.kind, held.data))
            else:
                name, box, values = held.name, held.box, held.values
                load = partial(_load, name, values, box)
                shape = self._described[name].shape
                found.append(ShardToWrite(name, Kind.TENSOR, values.dtype, shape, box, load, largest[name]))
        return found

    def _add_value(self, name: str, leaf: Leaf) -> None:
        try:
            kind, data = encode_value({} if leaf.is_empty_dict else leaf.value)
        except UnsupportedValueError as error:
            raise UnsupportedValueError(f"{name!r} cannot be stored: {error}") from error
        if not self._allow_pickle and needs_pickle(name, kind, data):
            raise UnsupportedValueError(
                f"{name!r}, of {type(leaf.value)}, needs pickle, but allow_pickle is False: use plain data instead, "
                "leave it out, or pass allow_pickle=True"
            )
        box = Box((), ())
        self._digests.append((len(self._boxes), box, checksum(data)))
        self._described[name] = EntryDescription(leaf.path, "empty dict" if leaf.is_empty_dict else "value")
        self._boxes.append([box])
        self._shards.append(_EncodedValue(name, kind, data))

    def _add_tensor(self, name: str, leaf: Leaf) -> None:
        tensor: torch.Tensor = leaf.value
        is_sharded = not is_whole(tensor)
        if not is_sharded:
            check_has_memory(name, tensor)
        shards = [(box, as_storable(name, local)) for box, local in local_shards(name, tensor)]
        if self._may_repeat(tensor):
            self._digests += [
                (len(self._boxes), box, checksum(as_bytes(as_array(_sample(local))).data))
                for box, local in shards
                if local.nbytes
            ]
        dtype = dtype_name(name, shards[0][1].dtype if shards else tensor.dtype)
        kind = "sharded tensor" if is_sharded else "tensor"
        self._described[name] = EntryDescription(leaf.path, kind, dtype, tuple(tensor.size()))
        self._boxes.append([box for box, _ in shards])
        self._shards += [_TensorShard(name, box, values) for box, values in shards]

    def _may_repeat(self, tensor: torch.Tensor) -> bool:
        """Return whether another rank may hold the same part of a tensor, or of another tensor with the same name."""
        if self._world_size == 1:
            return False
        if is_whole(tensor):
            return True
        from ..tensors import distributed_tensors

        return distributed_tensors.may_repeat(tensor, self._world_size)


def _sample(values: torch.Tensor) -> torch.Tensor:
    """Return some values of a large tensor, spread evenly over it. They show whether replicas have diverged."""
    if values.nbytes <= SMALL_REPLICA_BYTES:
        return values
    steps = [1] * values.ndim
    left = float(SAMPLED)
    for done, dim in enumerate(sorted(range(values.ndim), key=lambda d: values.shape[d])):
        n, along = values.shape[dim], math.ceil(left ** (1 / (values.ndim - done)))
        steps[dim] = -(-n // along)
        left = max(1.0, left / -(-n // steps[dim]))
    return values[tuple(slice(None, None, step) for step in steps)]


def _load(name: str, local: torch.Tensor, shard: Box, box: Box) -> torch.Tensor:
    return part_of(name, as_storable(name, local), shard, local.dtype, box)
