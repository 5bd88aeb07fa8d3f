"""Train under FSDP2 and save. Then serve the same checkpoint under tensor parallelism on another number of ranks.

    torchrun --nproc-per-node 4 examples/train_fsdp_serve_tp.py train run/step-20
    torchrun --nproc-per-node 2 examples/train_fsdp_serve_tp.py serve run/step-20

The location is a path or a URI, such as s3://bucket/run/step-20. Serving loads twice: with `load`, into the DTensors of
a parallelized module, and with `load_rank`, which needs no process group. Both return the same values.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import reshard

LAYERS, DIM = 4, 256
RULES = {"*.up": "colwise", "*.down": "rowwise"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, 4 * DIM, bias=False)
        self.down = nn.Linear(4 * DIM, DIM, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.add(x, self.down(torch.relu(self.up(x))))


def build() -> nn.Sequential:
    return nn.Sequential(*(Block() for _ in range(LAYERS)))


def train(mesh: DeviceMesh, uri: str) -> None:
    torch.manual_seed(0)
    model = build()
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(20):
        torch.manual_seed(1000 * step + dist.get_rank())
        x = torch.randn(8, DIM)
        loss = (model(x) - x.roll(1, dims=-1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    report = reshard.save(reshard.training_state(model, optimizer, step=20), uri, overwrite=True)
    print_once(f"saved: {report.total}")


def serve(mesh: DeviceMesh, uri: str) -> None:
    model = build()
    for block in model:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    report = reshard.load({"model": model.state_dict()}, uri)
    print_once(f"loaded: {report.total}")

    layout = reshard.Layout({"tp": mesh.size()}, RULES)
    tensors = reshard.open(uri).load_rank(layout, dist.get_rank(), include="model")
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.to_local().equal(tensors[f"model.{name}"]), name
    torch.manual_seed(0)
    x = torch.randn(64, DIM)
    with torch.no_grad():
        loss = (model(x) - x.roll(1, dims=-1)).square().mean()
    print_once(f"load and load_rank return the same {len(tensors)} tensors; loss {loss.item():.4f}")


def print_once(message: str) -> None:
    if dist.get_rank() == 0:
        print(message, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("train", "serve"))
    parser.add_argument("uri")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    {"train": train, "serve": serve}[arguments.phase](init_device_mesh("cpu", (dist.get_world_size(),)), arguments.uri)
    dist.barrier()  # without it, a rank of torch 2.13 with gloo sometimes aborts at exit
    dist.destroy_process_group()
