"""Resume training from the latest checkpoint, on any number of ranks.

    torchrun --nproc-per-node 4 examples/resume_elastic.py run --steps 6
    torchrun --nproc-per-node 3 examples/resume_elastic.py run --steps 12

Each run restores the latest checkpoint of a folder, and saves every 3 steps. The global batch does not depend on the
number of ranks, so the losses do not depend on it either.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import reshard

DIM, BATCH, SAVE_INTERVAL = 100, 24, 3


def run_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Train one step, and return the loss of the global batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(step))[rank::world]
    loss = (model(x) - x.roll(1, dims=-1)).square().sum() / (BATCH * DIM)
    (loss * world).backward()  # FSDP averages gradients over the ranks
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach()
    dist.all_reduce(total)
    return float(total)


def main(run: str, steps: int) -> None:
    torch.manual_seed(dist.get_rank())  # restoring overwrites these values
    model = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.ReLU(), nn.Linear(4 * DIM, DIM))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = reshard.training_state(model, optimizer)
    with reshard.CheckpointManager(run, save_every=SAVE_INTERVAL) as manager:
        step = manager.restore(state) or 0
        if step:
            print_once(f"resumed from {manager.location(step)} on {dist.get_world_size()} ranks")
        while step < steps and not manager.should_stop:
            loss = run_step(model, optimizer, step)
            step += 1
            print_once(f"step {step}: loss {loss:.6f}")
            manager.save(step, state, metrics={"loss": loss})


def print_once(message: str) -> None:
    if dist.get_rank() == 0:
        print(message, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of the checkpoints: a path or a URI")
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    main(arguments.run, arguments.steps)
    dist.barrier()  # without it, a rank of torch 2.13 with gloo sometimes aborts at exit
    dist.destroy_process_group()
