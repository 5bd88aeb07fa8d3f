"""What a rank holds of a tensor."""

from __future__ import annotations

import torch

from ...planner.box import Box
from .dtypes import LocalShard


def local_shards(name: str, tensor: torch.Tensor) -> list[LocalShard]:
    """What this rank holds of a plain tensor, DTensor or ShardedTensor, as views that can be written through.

    A tensor whose class has its own `__torch_dispatch__` is returned as it is: `tensor_classes` knows how to write it.

    Raises LayoutError for a DTensor whose placements are not of shards and replicas.
    """
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return [(Box.whole(tuple(tensor.shape)), tensor.detach())]
    from . import distributed_tensors

    return distributed_tensors.distributed_shards(name, tensor)
