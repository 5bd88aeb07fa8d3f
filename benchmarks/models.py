"""The model of the benchmarks, and the layouts under which they save and load it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

DIM = 1024
HIDDEN = 4096
LAYERS = 8
TP_PLAN = {"*.up": "colwise", "*.down": "rowwise"}
"""The tensor-parallel layout of the model, as rules of `reshard.Layout`."""


class Block(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=False, dtype=torch.bfloat16, device="meta")
        self.down = nn.Linear(hidden, dim, bias=False, dtype=torch.bfloat16, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return y


def mlp(seed: int, *, layers: int = LAYERS, dim: int = DIM, hidden: int = HIDDEN) -> nn.Sequential:
    """Return an MLP in bf16 with weights ~ N(0, 0.02²), which the seed determines."""
    model = nn.Sequential(*(Block(dim, hidden) for _ in range(layers))).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def under(layout: str, model: nn.Module) -> nn.Module:
    """Shard the model with "fsdp" or "tp" over all ranks of the default process group."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if layout == "fsdp":
        fully_shard(model, mesh=mesh)
    else:
        plan = {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()}
        parallelize_module(model, mesh, plan)
    return model
