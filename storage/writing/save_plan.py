"""The save planner of `reshard.save`, which is based on DCP's default planner.

Every rank describes the entries of its state dict. Before anything is written, the coordinator compares the
descriptions (see `agreement`) and assigns each replica to one rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Replicate

from ...planner.errors import CheckpointError
from ...planner.index_checks import tile
from ..errors import ArgumentError, UnsupportedValueError
from ..formats.value_codec import EncodedValue, encode_value, needs_pickle
from ..runtime.checksums import checksum
from ..tensors.dtypes import LocalShard, as_array, as_bytes, dtype_name
from ..tensors.local_shards import local_shards
from ..tensors.state_dict import Leaf, Path
from ..tensors.tensor_classes import check_has_memory, check_storable, is_whole
from .agreement import ValueDescription, agreed_paths, differing_names

SMALL_REPLICA_BYTES = 64 * 1024
"""Replicas up to this size are written by the lowest rank that has them. So entries that belong together come from one
rank, for example the parts of a random state, or mean and variance of a BatchNorm. Larger ones are spread over the
ranks."""


class SavePlanner(DefaultSavePlanner):
    """DCP's default planner for the leaves of a state dict, with a few differences.

    - The state dicts of the ranks are compared.
    - Small replicas and values are written by the lowest rank that has them.
    - Values that are plain data are not pickled.
    - A DTensor is written as the boxes that this rank really holds. They may differ from the boxes that DTensor
      computes (see `planner.layout.held_tensor`).

    Args:
        leaves: The leaves of this rank's state dict, by name.
        allow_pickle: Whether to store values that need pickle. If not, they are an error.
    """

    holds_boxes = True
    """Shows StorageWriter that the plans contain the boxes that ranks really hold."""

    def __init__(self, leaves: Mapping[str, Leaf], *, allow_pickle: bool = True) -> None:
        super().__init__(flatten_state_dict=False)
        self._leaves = leaves
        self._allow_pickle = allow_pickle
        self._views: dict[MetadataIndex, torch.Tensor] = {}
        self._encoded: dict[str, EncodedValue] = {}
        self._shards: dict[str, list[LocalShard]] = {}
        """The shards of each tensor that this rank holds. Known while the plan is made."""

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        # DCP flattens sharded tensors that contain sharded tensors. Pass tensors only: it would drop empty dicts.
        tensors = {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}
        super().set_up_planner(tensors, storage_meta, is_coordinator)
        self.state_dict = {**state_dict, **self.state_dict}

    def create_local_plan(self) -> SavePlan:
        described = {name: self._described(name, leaf) for name, leaf in self._leaves.items()}
        plan = super().create_local_plan()
        items = [held for item in plan.items for held in self._as_held(item)]
        self._shards = {}
        self.plan = replace(plan, items=items, planner_data=described)
        return self.plan

    def _as_held(self, item: WriteItem) -> list[WriteItem]:
        name, tensor = item.index.fqn, self.state_dict[item.index.fqn]
        if not isinstance(tensor, DTensor) or item.tensor_data is None:
            return [item]
        if hasattr(tensor._local_tensor, "__create_chunk_list__"):  # an item is one of its shards
            return [item]
        shards = self._shards[name]
        chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box, _ in shards]
        if chunks == [item.tensor_data.chunk] or not (chunks or item.tensor_data.chunk.sizes.numel()):
            return [item]
        items = []
        for chunk, (_, view) in zip(chunks, shards, strict=True):
            index = MetadataIndex(name, chunk.offsets)
            self._views[index] = view
            items.append(replace(item, index=index, tensor_data=replace(item.tensor_data, chunk=chunk)))
        return items

    def _described(self, name: str, leaf: Leaf) -> ValueDescription:
        try:
            if isinstance(leaf.value, torch.Tensor):
                return self._describe_tensor(name, leaf.path, leaf.value)
            self._encoded[name] = self._encode(name, leaf)
            digest = checksum(self._encoded[name].getbuffer())
            return ValueDescription(leaf.path, "empty dict" if leaf.is_empty_dict else "value", digests=(((), digest),))
        except CheckpointError:
            raise
        except Exception as error:
            raise UnsupportedValueError(
                f"{name!r}, of {type(leaf.value)}, cannot be stored: {type(error).__name__}: {error}"
            ) from error

    def _describe_tensor(self, name: str, path: Path, tensor: torch.Tensor) -> ValueDescription:
        is_sharded = not is_whole(tensor)
        if not is_sharded:
            check_has_memory(name, tensor)
        shards = self._shards[name] = local_shards(name, tensor)
        for _, local in shards:
            check_storable(name, local)
        may_repeat = not is_sharded or (
            isinstance(tensor, DTensor) and any(isinstance(placement, Replicate) for placement in tensor.placements)
        )
        digests = tuple(
            (box.offsets, checksum(as_bytes(as_array(local)).data))
            for box, local in shards
            if may_repeat and local.nbytes <= SMALL_REPLICA_BYTES
        )
        dtype = dtype_name(name, shards[0][1].dtype if shards else tensor.dtype)
        return ValueDescription(
            path, "sharded tensor" if is_sharded else "tensor", dtype, tuple(tensor.size()), digests
        )

    def _encode(self, name: str, leaf: Leaf) -> EncodedValue:
        kind, data = encode_value({} if leaf.is_empty_dict else leaf.value)
        if not self._allow_pickle and needs_pickle(kind, data):
            raise UnsupportedValueError(
                f"{name!r}, of {type(leaf.value)}, needs pickle, but allow_pickle is False: use plain data instead, "
                "leave it out, or pass allow_pickle=True"
            )
        return EncodedValue(kind, data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        described = [plan.planner_data for plan in all_plans]
        paths = agreed_paths(described)
        plans = assign_replicas([[item for item in plan.items if item.index.fqn in paths] for plan in all_plans])
        check_coverage(plans, paths)
        self.global_plan, metadata = create_default_global_save_plan(
            [replace(plan, items=items, planner_data=None) for plan, items in zip(all_plans, plans, strict=True)]
        )
        self.metadata = replace(metadata, planner_data=paths, storage_data=differing_names(described))
        return self.global_plan, self.metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        written = {item.index.fqn for item in new_plan.items}
        self._encoded = {name: encoded for name, encoded in self._encoded.items() if name in written}
        return super().finish_plan(new_plan)

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._views[index] if index in self._views else super().lookup_object(index)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        if write_item.type is WriteItemType.BYTE_IO:
            return self._encoded[write_item.index.fqn]
        return super().transform_object(write_item, object)


def assign_replicas(plans: Sequence[Sequence[WriteItem]]) -> list[list[WriteItem]]:
    """Assign each item that several ranks hold to one of them.

    Args:
        plans: The items that each rank holds.

    Returns:
        The items that each rank writes.
    """
    holders: dict[MetadataIndex, list[int]] = defaultdict(list)
    sizes: dict[MetadataIndex, int] = {}
    for rank, items in enumerate(plans):
        for item in items:
            holders[item.index].append(rank)
            sizes[item.index] = _nbytes(item)
    writers: dict[MetadataIndex, int] = {}
    loads = [0] * len(plans)
    for index in sorted(holders, key=lambda index: len(holders[index]) > 1 and sizes[index] > SMALL_REPLICA_BYTES):
        ranks = holders[index]
        is_small = sizes[index] <= SMALL_REPLICA_BYTES
        writers[index] = min(ranks) if is_small else min(ranks, key=lambda rank: loads[rank])
        loads[writers[index]] += sizes[index]
    return [[item for item in items if writers[item.index] == rank] for rank, items in enumerate(plans)]


def _nbytes(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 0
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def check_coverage(plans: Sequence[Sequence[WriteItem]], names: Iterable[str]) -> None:
    """Check that the ranks together write every entry completely.

    Raises:
        ArgumentError: The shards of a tensor overlap or leave gaps, for example because the placements of the ranks
            differ, or no rank holds a part of an entry.
    """
    written = {item.index.fqn for items in plans for item in items}
    for name in names:
        if name not in written:
            raise ArgumentError(
                f"no rank of the process group holds a part of {name!r}, so it would not be saved: save from the "
                "ranks that hold it, or leave it out"
            )
    boxes: dict[str, list[tuple[list[int], list[int]]]] = defaultdict(list)
    shapes: dict[str, tuple[int, ...]] = {}
    for item in (item for items in plans for item in items):
        data = item.tensor_data
        if data is None:
            continue
        name, offsets, sizes = item.index.fqn, [*data.chunk.offsets], [*data.chunk.sizes]
        shapes[name] = tuple(data.size)
        if any(offset + size > n for offset, size, n in zip(offsets, sizes, data.size, strict=True)):
            raise ArgumentError(
                f"{name!r} has shape {[*data.size]}, but a rank holds a shard of shape {sizes} at {offsets}: all ranks "
                "need the same mesh and placements"
            )
        if data.chunk.sizes.numel():
            boxes[name].append((offsets, sizes))
    for name, shape in shapes.items():
        held, numel = boxes[name], sum(math.prod(sizes) for _, sizes in boxes[name])
        columns = [np.array(column, np.int64) for column in zip(*held, strict=True)]
        if numel != math.prod(shape) or (len(held) > 1 and not tile(shape, *columns)):
            raise ArgumentError(
                f"the ranks hold {numel} elements of {name!r}, which has {math.prod(shape)}: its shards overlap or "
                "leave gaps. All ranks of the process group must save it, with the same mesh and placements"
            )
