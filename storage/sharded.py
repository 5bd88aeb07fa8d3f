"""Tensors that are sharded over ranks: the boxes that this rank holds of a DTensor or a ShardedTensor.

Apart from `tensors`, since it takes long to import what torch has of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor.placement_types import _StridedShard as TorchStridedShard

from ..planner import layout
from ..planner.box import Box
from ..planner.errors import LayoutError
from .tensors import LocalShard


def local_shards(name: str, tensor: torch.Tensor) -> list[LocalShard]:
    """`tensors.local_shards`."""
    if isinstance(tensor, DTensor):
        return _dtensor_shards(name, tensor)
    if isinstance(tensor, ShardedTensor):
        shards: list[LocalShard] = []
        for shard in tensor.local_shards():
            origin = Box(tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes))
            for box, local in local_shards(name, shard.tensor):
                offsets = tuple(a + b for a, b in zip(origin.offsets, box.offsets, strict=True))
                shards.append((Box(offsets, box.sizes), local))
        return shards
    return [(Box.whole(tuple(tensor.shape)), tensor.detach())]


def _dtensor_shards(name: str, tensor: DTensor) -> list[LocalShard]:
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    placements = [_placement(name, placement) for placement in tensor.placements]
    held = _held(tuple(tensor.shape), tuple(tensor.device_mesh.shape), tuple(coordinate), tuple(placements))
    local = tensor.to_local().detach()
    if held.shape != tuple(local.shape):
        raise LayoutError(f"{name!r} holds {tuple(local.shape)} locally where its placements give {held.shape}")
    if len(held.boxes) == 1:
        return [(held.boxes[0], local)]
    return [(box, local[Box(at, box.sizes).slices]) for box, at in zip(held.boxes, held.local_offsets, strict=True)]


_held = functools.lru_cache(layout.held_tensor)  # the layers of a model are alike


def refuse_misplaced(state: Mapping[str, Any]) -> None:
    """Raises LayoutError for a DTensor of which DCP's own planner would read or write boxes that it does not hold."""
    for name, tensor in state.items():
        if not isinstance(tensor, DTensor):
            continue
        held = [box for box, _ in local_shards(name, tensor) if box.numel]
        planned = [
            box
            for chunk in (tensor.__create_chunk_list__() if tensor.device_mesh.get_coordinate() is not None else ())
            if (box := Box(tuple(chunk.offsets), tuple(chunk.sizes))).numel
        ]
        if held != planned:
            raise LayoutError(
                f"{name!r} is split unevenly by FSDP over TP: this rank holds {_listed(held)}, and DCP's planner "
                f"takes it to hold {_listed(planned)}. Use reshard.load and reshard.save, which do not ask that planner"
            )


def _listed(boxes: list[Box]) -> str:
    return ", ".join(map(str, boxes)) or "nothing"


def _placement(name: str, placement: Any) -> layout.Placement:
    if isinstance(placement, TorchStridedShard):
        return layout.StridedShard(placement.dim, int(placement.split_factor))
    if isinstance(placement, TorchShard):
        return layout.Shard(placement.dim)
    if isinstance(placement, TorchReplicate):
        return layout.REPLICATE
    raise LayoutError(f"{name!r} has the placement {placement}, which is neither a shard nor a replica")
