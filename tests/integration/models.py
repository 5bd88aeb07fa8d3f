"""One model, under every layout that a checkpoint can be saved and loaded in."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module


def tp_plan() -> dict[str, ParallelStyle]:
    """The layers that tensor parallelism splits."""
    return {
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
        "small.up": ColwiseParallel(),
        "small.down": RowwiseParallel(),
    }


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return y


class Model(Mlp):
    """Layers of several chunks and of few elements; extents that no mesh divides, and some smaller than a mesh."""

    def __init__(self) -> None:
        super().__init__(389, 530)
        self.small = Mlp(3, 13)
        self.norm = nn.LayerNorm(5)
        self.register_buffer("scale", torch.tensor(2.0))


def model(seed: int) -> Model:
    """The whole model, with values that the seed determines; one layer in bf16."""
    torch.manual_seed(seed)
    made = Model()
    made.down.to(torch.bfloat16)
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape))
    return made


def build(layout: str, seed: int) -> dict[str, Any]:
    """The state dict of the model under a layout, over all ranks."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    module: nn.Module = model(seed)
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
        for part in (module.small, module):
            assert isinstance(part, nn.Module)
            fully_shard(part, mesh=mesh)
    elif layout == "hsdp":
        fully_shard(module, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    elif layout == "tp":
        parallelize_module(module, init_device_mesh("cpu", (world,)), tp_plan())
    elif layout == "fsdp_tp":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(module, mesh["tp"], tp_plan())
        fully_shard(module, mesh=mesh["dp"])
    elif layout == "fsdp1":
        wrapped = FullyShardedDataParallel(
            module,
            use_orig_params=True,
            device_id=torch.device("cpu"),
            auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        )
        with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.SHARDED_STATE_DICT):
            return wrapped.state_dict()
    else:
        assert layout == "plain"
    return module.state_dict()


def local_values(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What this rank holds of each tensor."""
    values = {}
    for name, tensor in state.items():
        if isinstance(tensor, DTensor):
            values[name] = tensor.to_local()
        elif isinstance(tensor, ShardedTensor):
            for number, shard in enumerate(tensor.local_shards()):
                values[f"{name}[{number}]"] = shard.tensor
        else:
            values[name] = tensor
    return {name: value.detach().clone() for name, value in values.items()}
