"""Lazy tensors on several ranks: FSDP, tensor parallelism and DTensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import reshard
from tests.integration.models import build, model
from tests.ranks import RankPool


def save(uri: str) -> None:
    reshard.save(build("fsdp", 3), uri)


def whole() -> dict[str, torch.Tensor]:
    return model(3).state_dict()


def fill_fsdp(uri: str) -> list[float]:
    """Load a checkpoint into an FSDP model, in two ways. Return the bytes fetched over the bytes needed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    amplification = []
    for options in (None, StateDictOptions(full_state_dict=True)):
        module: nn.Module = model(4)
        fully_shard(module, mesh=mesh)
        with reshard.open(uri).lazy() as weights:
            if options is None:
                module.load_state_dict(weights)
            else:
                set_model_state_dict(module, dict(weights), options=options)
        for name, tensor in module.state_dict().items():
            found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(found, whole()[name]), name
        amplification.append(weights.report.amplification)
    return amplification


def test_an_fsdp_model_reads_its_shards(ranks: RankPool, tmp_path: Path) -> None:
    uri = str(tmp_path / "c")
    ranks.run(4, save, uri)
    for copied, broadcast in ranks.run(3, fill_fsdp, uri):
        assert copied < 1.5  # small layers, and cuts across chunks
        assert broadcast >= 0


def copy_to_dtensors(uri: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected = whole()["up.weight"]
    destinations = [
        distribute_tensor(torch.zeros_like(expected), mesh, [placement])
        for placement in (Shard(0), Shard(1), Replicate())
    ]
    layer = nn.Linear(expected.shape[1], expected.shape[0], bias=False)
    with reshard.open(uri).lazy() as weights:
        for destination in destinations:
            destination.copy_(weights["up.weight"])
        distributed = distribute_tensor(weights["up.weight"], mesh, [Shard(0)], src_data_rank=None)
        layer.weight = nn.Parameter(distributed)
        weights.fill(layer)
    for tensor in (*destinations, layer.weight):
        assert isinstance(tensor, DTensor)
        assert type(tensor.to_local()) is torch.Tensor
        assert torch.equal(tensor.full_tensor(), expected)


def test_dtensors_are_filled_with_their_shards(ranks: RankPool, tmp_path: Path) -> None:
    uri = str(tmp_path / "c")
    ranks.run(2, save, uri)
    ranks.run(3, copy_to_dtensors, uri)


def use_in_collectives(uri: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    expected = whole()["small.up.weight"]
    with reshard.open(uri).lazy() as weights:
        tensor = weights["small.up.weight"]
        gathered = [torch.zeros_like(expected) for _ in range(world)]
        dist.all_gather(gathered, tensor)
        assert all(torch.equal(found, expected) for found in gathered)
        received = torch.zeros_like(expected)
        dist.scatter(received, [tensor] * world if rank == 0 else None, src=0)
        assert torch.equal(received, expected)
        pending = torch.zeros_like(expected)
        pending.copy_(tensor)
        dist.all_reduce(pending)
        assert torch.equal(pending, expected * world)
        dist.broadcast(tensor, src=0)


def test_collectives_send_the_values(ranks: RankPool, tmp_path: Path) -> None:
    uri = str(tmp_path / "c")
    ranks.run(2, save, uri)
    ranks.run(2, use_in_collectives, uri)


class Engine(nn.Module):
    """One layer of an engine that fuses parameters, with the part of one rank."""

    def __init__(self, state: dict[str, Any], rank: int, world: int) -> None:
        super().__init__()
        rows, columns = state["up.weight"].shape
        self.rank, self.world, self.rows = rank, world, rows // world
        self.fused = nn.Parameter(torch.zeros(self.rows + state["up.bias"].shape[0], columns))
        self.down = nn.Parameter(torch.zeros(state["down.weight"].shape[0], self.rows, dtype=torch.bfloat16))

    def load_weights(self, weights: Any) -> None:
        for name, tensor in weights.items():
            if name == "up.weight":
                self.fused.data[: self.rows].copy_(tensor.narrow(0, self.rank * self.rows, self.rows))
            elif name == "up.bias":
                self.fused.data[self.rows :].copy_(tensor.unsqueeze(1).expand(-1, self.fused.shape[1]))
            elif name == "down.weight":
                self.down.data.copy_(tensor[:, self.rank * self.rows : (self.rank + 1) * self.rows])


def load_engine(uri: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    lazy, eager = Engine(whole(), rank, world), Engine(whole(), rank, world)
    eager.load_weights(whole())
    with reshard.open(uri).lazy() as weights:
        lazy.load_weights(weights)
    for name, parameter in eager.named_parameters():
        assert torch.equal(parameter, lazy.get_parameter(name)), name


@pytest.mark.parametrize("world", [1, 2, 5])
def test_an_engine_that_fuses_parameters_loads_its_part(ranks: RankPool, tmp_path: Path, world: int) -> None:
    uri = str(tmp_path / "c")
    ranks.run(4, save, uri)
    ranks.run(world, load_engine, uri)


def load_together(uri: str) -> tuple[reshard.RankReport, int]:
    """Every rank copies everything, and half of a matrix by columns. Return the report and the bytes of the copies."""
    rank, expected = dist.get_rank(), whole()
    half = expected["down.weight"].shape[1] // 2
    copies = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    columns = torch.zeros_like(expected["down.weight"][:, :half])
    with reshard.open(uri).lazy(process_group=dist.group.WORLD, cooperative=True) as weights:
        for name, tensor in copies.items():
            tensor.copy_(weights[name])
        columns.copy_(weights["down.weight"][:, half * (rank % 2) :][:, :half])
        columns.mul_(2)  # executes the copies of this rank alone
        for name, tensor in copies.items():
            tensor.zero_()
            tensor.copy_(weights[name])
        filled = nn.Linear(3, 13, bias=False)
        filled.weight = nn.Parameter(weights["small.up.weight"])
        weights.fill(filled)
        more = torch.zeros_like(expected["up.weight"])
        more.copy_(weights["up.weight"])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in copies.items())
    assert torch.equal(columns, expected["down.weight"][:, half * (rank % 2) :][:, :half] * 2)
    assert torch.equal(filled.weight, expected["small.up.weight"])
    assert torch.equal(more, expected["up.weight"])
    return weights.report, sum(tensor.nbytes for tensor in copies.values())


def test_ranks_read_once_what_all_of_them_copy(ranks: RankPool, tmp_path: Path) -> None:
    uri = str(tmp_path / "c")
    ranks.run(2, save, uri)
    found = ranks.run(4, load_together, uri)
    assert any(report.bytes_received > 0 for report, _ in found)
    assert sum(report.bytes_sent for report, _ in found) == sum(report.bytes_received for report, _ in found)


def fail_on_one_rank(uri: str, where: str) -> str:
    destination = torch.zeros_like(whole()["up.weight"])

    def run() -> None:
        with reshard.open(uri).lazy(process_group=dist.group.WORLD, cooperative=True) as weights:
            if dist.get_rank() == 1 and where == "block":
                raise ValueError("from the block")
            if dist.get_rank() == 1:
                torch.zeros(530, 389, dtype=torch.int32).copy_(weights["up.weight"])
            destination.copy_(weights["up.weight"])

    with pytest.raises((ValueError, reshard.errors.CheckpointError)) as caught:
        run()
    assert not destination.any()
    with reshard.open(uri).lazy(process_group=dist.group.WORLD, cooperative=True) as weights:
        destination.copy_(weights["up.weight"])
    assert torch.equal(destination, whole()["up.weight"])
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("where", ["block", "copy"])
def test_an_error_of_one_rank_ends_the_block_on_all(ranks: RankPool, tmp_path: Path, where: str) -> None:
    uri = str(tmp_path / "c")
    ranks.run(2, save, uri)
    messages = ranks.run(3, fail_on_one_rank, uri, where)
    assert all(("from the block" if where == "block" else "up.weight") in message for message in messages), messages
    assert messages[0] == messages[2]
    assert messages[0].startswith("RankError: rank 1" if where == "block" else "DtypeError: rank 1")
