"""DTensors inside tuples and other objects, which are one value for all ranks, and DTensors without elements."""

from __future__ import annotations

import dataclasses
import types
from collections import deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import reshard
from reshard.errors import DestinationError, UnsupportedValueError
from tests.ranks import RankPool

Pair = namedtuple("Pair", "a b")


@dataclasses.dataclass
class Record:
    x: Any


CONTAINERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tuple": lambda tensor: (tensor,),
    "namedtuple": lambda tensor: Pair(1, tensor),
    "dataclass": Record,
    "deque": lambda tensor: deque([tensor]),
    "tuple in a list": lambda tensor: [(tensor,)],
    "list in a tuple in a dict": lambda tensor: {"x": (1, [tensor])},
    "object": lambda tensor: types.SimpleNamespace(x=tensor),
}
PLACEMENTS: tuple[Placement, ...] = (Shard(0), Replicate())


def distributed(shape: tuple[int, ...], placement: Placement) -> DTensor:
    return distribute_tensor(torch.ones(shape), init_device_mesh("cpu", (2,)), [placement])


def refuse_all(folder: str) -> None:
    for kind, contain in CONTAINERS.items():
        for placement in PLACEMENTS:
            saved = {"v": contain(distributed((4, 2), placement))}
            message = r"'v.*' cannot be stored: .*contains a DTensor in a tuple or another object.*a list or a dict"
            with pytest.raises(UnsupportedValueError, match=message):
                reshard.save(saved, f"{folder}/{kind}")
            with pytest.raises(UnsupportedValueError, match=message):
                reshard.async_save(saved, f"{folder}/{kind}").result()
            with pytest.raises(CheckpointException, match="contains a DTensor in a tuple"):
                dcp.save(saved, storage_writer=reshard.StorageWriter(f"{folder}/{kind}"))
    reshard.save({"v": (torch.zeros(4, 2),)}, f"{folder}/plain")
    for contain in CONTAINERS.values():
        value = contain(distributed((4, 2), Shard(0)))
        if not isinstance(value, (list, dict)):
            with pytest.raises(DestinationError, match="'v' cannot be loaded: it contains a DTensor"):
                reshard.load({"v": value}, f"{folder}/plain")
    itself: list[Any] = []
    itself.append((itself, lambda: 1))
    state: dict[str, Any] = {"v": (itself,)}
    reshard.load(state, f"{folder}/plain")
    assert state["v"][0].equal(torch.zeros(4, 2))


def test_a_dtensor_inside_a_value_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, refuse_all, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir() if any(path.rglob("manifest.reshard"))] == ["plain"]


def save_empty(folder: str) -> None:
    meshes = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    for at, shape in enumerate([(0,), (0, 4), (6, 0), (0, 0)]):
        for mesh in meshes:
            for dim in range(len(shape)):
                tensor = distribute_tensor(torch.zeros(shape), mesh, [Shard(dim)] * mesh.ndim)
                uri = f"{folder}/{at}-{mesh.ndim}-{dim}"
                reshard.save({"e": tensor, "w": torch.ones(2)}, uri)
                assert reshard.load({"e": tensor}, uri).missing_keys == ()


def sharded(shape: tuple[int, ...], dim: int) -> ShardedTensor:
    placements: Any = [f"rank:{rank}/cpu" for rank in range(dist.get_world_size())]
    return sharded_tensor.zeros(ChunkShardingSpec(dim, placements), *shape)


def save_few_rows(folder: str) -> None:
    """`ShardedTensor` puts the empty shards of the last ranks outside the tensor."""
    for at, (shape, dim) in enumerate([((2, 4), 0), ((5, 4), 0), ((4, 2), 1), ((0, 4), 0)]):
        saved, loaded = sharded(shape, dim), sharded(shape, dim)
        for shard in saved.local_shards():
            shard.tensor.fill_(dist.get_rank() + 1)
        reshard.save({"x": saved}, f"{folder}/{at}")
        reshard.load({"x": loaded}, f"{folder}/{at}")
        for one, other in zip(saved.local_shards(), loaded.local_shards(), strict=True):
            assert one.tensor.equal(other.tensor)


def test_sharded_tensors_with_fewer_rows_than_ranks_are_saved(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(4, save_few_rows, str(tmp_path))
    assert reshard.open(tmp_path / "1").read("x")[:, 0].tolist() == [1, 1, 2, 2, 3]


def test_dtensors_without_elements_are_saved(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_empty, str(tmp_path))
    assert reshard.open(tmp_path / "2-1-0").read("e").shape == (6, 0)
