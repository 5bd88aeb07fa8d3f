"""The shards of a DTensor or ShardedTensor that this rank holds.

Modules that work on plain tensors import this one only when they meet another: torch's modules for distributed tensors
take long to import.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor.placement_types import _StridedShard as TorchStridedShard

from ...planner import layout
from ...planner.box import Box
from ...planner.errors import LayoutError
from .dtypes import LocalShard
from .tensor_classes import as_plain, overrides_dispatch


def distributed_shards(name: str, tensor: torch.Tensor) -> list[LocalShard]:
    """Return the shards of any tensor that this rank holds. See `local_shards`."""
    if isinstance(tensor, ShardedTensor):
        shards: list[LocalShard] = []
        for shard in tensor.local_shards():
            origin = Box(tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes))
            for box, local in distributed_shards(name, shard.tensor):
                offsets = tuple(a + b for a, b in zip(origin.offsets, box.offsets, strict=True))
                shards.append((Box(offsets, box.sizes), local))
        return shards
    if isinstance(tensor, DTensor):
        if not hasattr(tensor._local_tensor, "__create_chunk_list__"):
            return _dtensor_shards(name, tensor)
        if tensor.device_mesh.get_coordinate() is None:
            return []
    if hasattr(tensor, "__create_chunk_list__"):
        return _checkpointable_shards(name, tensor)
    return [(Box.whole(tuple(tensor.shape)), _local_tensor(tensor))]


def _checkpointable_shards(name: str, tensor: Any) -> list[LocalShard]:
    """Return the shards that a tensor reports by torch's protocol `_Checkpointable`."""
    shards: list[LocalShard] = []
    for chunk in tensor.__create_chunk_list__():
        box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
        if box.numel:
            local = tensor.__get_tensor_shard__(MetadataIndex(name, chunk.offsets))
            if tuple(local.shape) != box.sizes:
                raise LayoutError(f"{name!r} reports that it holds {box}, but its local shape is {tuple(local.shape)}")
            shards.append((box, _local_tensor(local)))
    return shards


def may_repeat(tensor: torch.Tensor, world_size: int) -> bool:
    """Return whether two ranks of a group may hold the same part of a sharded tensor."""
    if not isinstance(tensor, DTensor):
        return True
    is_on_all_ranks = tensor.device_mesh.size() == world_size
    return not is_on_all_ranks or any(isinstance(placement, TorchReplicate) for placement in tensor.placements)


def waited(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, after waiting for the collective that produces it."""
    return tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor


def _local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a writable view of a local tensor, or the tensor itself if its class has its own dispatch."""
    tensor = waited(tensor)
    return tensor if overrides_dispatch(tensor) else as_plain(tensor)


def _dtensor_shards(name: str, tensor: DTensor) -> list[LocalShard]:
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    placements = tuple(_to_planner_placement(name, placement) for placement in tensor.placements)
    order = _order(name, tensor, placements)
    held = _held(tuple(tensor.shape), tuple(tensor.device_mesh.shape), tuple(coordinate), placements, order)
    local = _local_tensor(tensor._local_tensor)
    if held.shape != tuple(local.shape):
        raise LayoutError(f"{name!r} has the local shape {tuple(local.shape)}, but its placements require {held.shape}")
    if len(held.boxes) == 1:
        return [(held.boxes[0], local)]
    if held.boxes and overrides_dispatch(local):
        raise LayoutError(
            f"{name!r} is split unevenly, so this rank holds {_describe_boxes(list(held.boxes))} in a "
            f"{type(local).__name__}, but only plain tensors can hold several boxes"
        )
    return [(box, local[Box(at, box.sizes).slices]) for box, at in zip(held.boxes, held.local_offsets, strict=True)]


def _order(name: str, tensor: DTensor, placements: tuple[layout.Placement, ...]) -> tuple[int, ...] | None:
    """Return the order in which mesh dimensions split a DTensor, or None if it is the usual order.

    DTensorSpec of torch 2.13 has `shard_order`: for each dimension of the tensor, the mesh dimensions that split it.
    """
    entries = getattr(tensor._spec, "shard_order", None)
    order = tuple(at for _, mesh_dims in entries or () for at in mesh_dims)
    if all(tuple(sorted(mesh_dims)) == tuple(mesh_dims) for _, mesh_dims in entries or ()):
        return None
    if any(isinstance(placement, layout.StridedShard) for placement in placements):
        raise LayoutError(f"{name!r} has strided shards together with the shard order {entries}")
    return order


_held = functools.lru_cache(layout.held_tensor)  # the layers of a model have equal shards


def refuse_misplaced(state: Mapping[str, Any]) -> None:
    """Raise LayoutError if DCP's planner would read or write boxes of a DTensor that this rank does not hold."""
    for name, tensor in state.items():
        if not isinstance(tensor, DTensor) or hasattr(tensor._local_tensor, "__create_chunk_list__"):
            continue
        held = [box for box, _ in distributed_shards(name, tensor) if box.numel]
        planned = [
            box
            for chunk in (tensor.__create_chunk_list__() if tensor.device_mesh.get_coordinate() is not None else ())
            if (box := Box(tuple(chunk.offsets), tuple(chunk.sizes))).numel
        ]
        if held != planned:
            raise LayoutError(
                f"{name!r} is split unevenly by FSDP over TP, or in an unusual order: this rank holds "
                f"{_describe_boxes(held)}, but DCP's planner assumes that it holds {_describe_boxes(planned)}. Use "
                "reshard.load and reshard.save, which do not use that planner"
            )


def _describe_boxes(boxes: list[Box]) -> str:
    return ", ".join(map(str, boxes)) or "nothing"


def _to_planner_placement(name: str, placement: Any) -> layout.Placement:
    if isinstance(placement, TorchStridedShard):
        return layout.StridedShard(placement.dim, int(placement.split_factor))
    if isinstance(placement, TorchShard):
        return layout.Shard(placement.dim)
    if isinstance(placement, TorchReplicate):
        return layout.REPLICATE
    raise LayoutError(
        f"{name!r} has the placement {placement!r}, which is neither a shard nor a replica: redistribute it first"
    )
