"""Resume training from the latest checkpoint, on any number of ranks.

    torchrun --nproc-per-node 4 examples/resume_elastic.py run --steps 6
    torchrun --nproc-per-node 3 examples/resume_elastic.py run --steps 12

Each run loads the newest complete checkpoint in a folder, and saves every 3 steps. The global batch does not depend on
the number of ranks, so the losses do not depend on it either.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import reshard

DIM, BATCH, SAVE_INTERVAL = 100, 24, 3


class Training:
    """A Stateful object: `reshard.save` calls its `state_dict`, and `reshard.load` calls its `load_state_dict`."""

    def __init__(self) -> None:
        torch.manual_seed(dist.get_rank())  # loading overwrites these values
        self.model: nn.Module = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.ReLU(), nn.Linear(4 * DIM, DIM))
        fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.step = state["step"]

    def run_step(self) -> float:
        """Train one step, and return the loss of the global batch."""
        rank, world = dist.get_rank(), dist.get_world_size()
        x = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(self.step))[rank::world]
        loss = (self.model(x) - x.roll(1, dims=-1)).square().sum() / (BATCH * DIM)
        (loss * world).backward()  # FSDP averages gradients over the ranks
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        total = loss.detach()
        dist.all_reduce(total)
        return float(total)


def find_newest(run: str) -> str | None:
    """Return the newest complete checkpoint. Rank 0 looks for it and broadcasts its location."""
    newest_uri: list[str | None] = [None]
    if dist.get_rank() == 0:
        complete = [checkpoint for checkpoint in reshard.find_checkpoints(run) if checkpoint.is_complete]
        newest_uri = [max(complete, key=lambda checkpoint: checkpoint.step or 0).uri if complete else None]
    dist.broadcast_object_list(newest_uri)
    return newest_uri[0]


def main(run: str, steps: int) -> None:
    training = Training()
    uri = find_newest(run)
    if uri:
        reshard.load({"train": training}, uri)
        print_once(f"resumed from {uri} at step {training.step} on {dist.get_world_size()} ranks")
    while training.step < steps:
        loss = training.run_step()
        print_once(f"step {training.step}: loss {loss:.6f}")
        if training.step % SAVE_INTERVAL == 0:
            reshard.save({"train": training}, f"{run}/step-{training.step}", overwrite=True)


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
