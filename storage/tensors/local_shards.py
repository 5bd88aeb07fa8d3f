"""The shards of a tensor that this rank holds."""

from __future__ import annotations

import torch

from ...planner.box import Box
from .dtypes import LocalShard


def local_shards(name: str, tensor: torch.Tensor) -> list[LocalShard]:
    """Return the shards of a plain tensor, DTensor or ShardedTensor that this rank holds, as writable views.

    A tensor whose class has its own `__torch_dispatch__` is returned unchanged. `tensor_classes` can write to it.

    Raises:
        LayoutError: a DTensor has placements that are neither shards nor replicas.
    """
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return [(Box.whole(tuple(tensor.shape)), tensor.detach())]
    from . import distributed_tensors

    return distributed_tensors.distributed_shards(name, tensor)
