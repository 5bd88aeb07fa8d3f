"""The demo: train under FSDP on 4 processes, serve under tensor parallelism on 2, resume under FSDP on 3.

`reshard demo` calls `run_demo`, which starts the processes of each phase. Each of them runs this module.

The demo trains a small transformer on the documentation of Python with AdamW, and saves model, optimizer and step to a
URI. Then it loads the model under tensor parallelism, and resumes training on another number of processes. It checks
that logits and losses agree with those before the save, and prints the bytes that each rank reads, with reshard and
with DCP.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import reshard
from reshard.demo.dcp_peer import CountingReader
from reshard.demo.training_text import batch, corpus
from reshard.demo.transformer import VOCABULARY, Transformer, shard_for_serving, shard_for_training
from reshard.errors import ArgumentError
from reshard.planner.masking import masked
from reshard.storage.stores.open import open_store

FOLDER = Path("demo-run")
MARK = ".reshard-demo"
"""A file that marks the folder of a demo, so that the demo deletes no other folder."""
OPTIONS = "RESHARD_DEMO_STORAGE_OPTIONS"
PHASES = {"train": 4, "serve": 2, "resume": 3}
BATCH = 12
LENGTH = 128
MORE_STEPS = 5
"""The number of steps after the save. The run that saved takes them, and the run that resumes takes them again."""


def run_demo(uri: str, steps: int, storage_options: dict[str, Any]) -> None:
    """Run all phases, one after another, each with torchrun.

    Raises:
        ArgumentError: the folder `demo-run` exists and was not created by a demo.
        CalledProcessError: a phase failed.
    """
    begin = time.perf_counter()
    if FOLDER.exists() and not (FOLDER / MARK).exists():
        raise ArgumentError(
            f"the folder {FOLDER} exists and was not created by a demo; run the demo in another working directory"
        )
    open_store(uri, storage_options)  # refuse an invalid location before anything is created
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    (FOLDER / MARK).touch()
    # Pass the options in the environment: every user of the machine can see the arguments of a process.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", OPTIONS: json.dumps(storage_options)}
    for phase, processes in PHASES.items():
        launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "reshard.demo"]
        arguments = [phase, uri, str(steps)]
        subprocess.run([sys.executable, "-m", *launch, *arguments], env=environment, check=True)
    print(f"\nDone in {time.perf_counter() - begin:.0f} s. The checkpoint is at {masked(uri)}")


def run_phase() -> None:
    phase, uri, steps = sys.argv[1:]
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    checkpoint = CheckpointLocation(uri, json.loads(os.environ[OPTIONS]))
    {"train": train, "serve": serve, "resume": resume}[phase](mesh, checkpoint, int(steps))
    dist.barrier()  # without it, a rank of torch 2.13 with gloo sometimes aborts at exit
    dist.destroy_process_group()


@dataclass(frozen=True)
class CheckpointLocation:
    """The location of the checkpoint, and the options to access it."""

    uri: str
    storage_options: dict[str, Any]


class Training:
    """A sharded model and its optimizer. The global batch of a step does not depend on the number of ranks."""

    def __init__(self, mesh: DeviceMesh, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Transformer()
        shard_for_training(self.model, mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.tokens = corpus()
        self.state = reshard.training_state(self.model, self.optimizer, step=0)

    def run(self, steps: int) -> list[float]:
        """Train for this number of steps, and return the loss of each."""
        rank, world = dist.get_rank(), dist.get_world_size()
        losses = []
        for _ in range(steps):
            inputs, targets = batch(self.tokens, self.state["step"], BATCH, LENGTH)
            loss = loss_of(self.model(inputs[rank::world]), targets[rank::world])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state["step"] += 1
            mean = loss.detach() / world
            dist.all_reduce(mean)
            losses.append(mean.item())
            if self.state["step"] % 10 == 0:
                print_once(f"  step {self.state['step']}: loss {losses[-1]:.4f}")
        return losses


def train(mesh: DeviceMesh, checkpoint: CheckpointLocation, steps: int) -> None:
    print_once(f"1. Train under FSDP on {mesh.size()} processes")
    training = Training(mesh, seed=0)
    training.run(steps)
    logits, loss = evaluate(training.model)
    report = reshard.save(training.state, checkpoint.uri, storage_options=checkpoint.storage_options, progress=True)
    print_once(f"  saved to {checkpoint.uri}: {report.total}")
    # Save with DCP, too, to compare the bytes that are read.
    dcp.save(training.state, storage_writer=FsspecWriter(str(FOLDER / "dcp")))
    losses = training.run(MORE_STEPS)
    if dist.get_rank() == 0:
        torch.save({"logits": logits, "loss": loss, "losses": losses}, FOLDER / "expected.pt")


def serve(mesh: DeviceMesh, checkpoint: CheckpointLocation, steps: int) -> None:
    print_once(f"\n2. Load under tensor parallelism on {mesh.size()} processes")
    torch.manual_seed(1)
    model = Transformer()
    shard_for_serving(model, mesh)
    reader = CountingReader(str(FOLDER / "dcp"))
    dcp.load({"model": model.state_dict()}, storage_reader=reader)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    report = reshard.load({"model": model.state_dict()}, checkpoint.uri, storage_options=checkpoint.storage_options)
    dcp_bytes: list[Any] = [None] * mesh.size()
    dist.all_gather_object(dcp_bytes, reader.bytes)
    for rank, by_dcp in zip(report.ranks, dcp_bytes, strict=True):
        print_once(
            f"  rank {rank.rank}: needs {rank.bytes_needed / 1e6:.2f} MB; reshard read "
            f"{rank.bytes_fetched / 1e6:.2f} MB in {rank.requests} requests; DCP's reader read {by_dcp / 1e6:.2f} MB"
        )
    expected = torch.load(FOLDER / "expected.pt")
    logits, loss = evaluate(model)
    check("logits", logits, expected["logits"])
    check("loss", loss, expected["loss"])


def resume(mesh: DeviceMesh, checkpoint: CheckpointLocation, steps: int) -> None:
    print_once(f"\n3. Resume training under FSDP on {mesh.size()} processes")
    training = Training(mesh, seed=2)
    report = reshard.load(training.state, checkpoint.uri, storage_options=checkpoint.storage_options)
    print_once(f"  {report.total}")
    expected = torch.load(FOLDER / "expected.pt")
    check("loss", evaluate(training.model)[1], expected["loss"])
    losses = training.run(MORE_STEPS)
    check(f"losses of the next {MORE_STEPS} steps", torch.tensor(losses), torch.tensor(expected["losses"]))


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), targets.reshape(-1))


def evaluate(model: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits and the loss of a fixed batch, the same on every rank."""
    inputs, targets = batch(corpus(), 10**6, 4, LENGTH)
    with torch.no_grad():
        logits = model(inputs)
    whole = logits.full_tensor() if isinstance(logits, DTensor) else logits
    return whole, loss_of(whole, targets)


def check(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Print the difference of two results. Exit if it is larger than a different order of summation explains."""
    difference = (found - expected).abs().max().item()
    print_once(f"  {what}: agree to {difference:.1e}" + (f" ({found.item():.6f})" if found.ndim == 0 else ""))
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise SystemExit(f"{what}: the results differ by {difference}, more than the tolerance of 1e-3")


def print_once(message: str) -> None:
    if dist.get_rank() == 0:
        print(message, flush=True)


if __name__ == "__main__":
    run_phase()
