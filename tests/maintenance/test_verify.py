"""A part of a checkpoint can be verified alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import reshard
from reshard.storage.formats.native.native_source import NativeSource
from reshard.storage.maintenance.verify import verify
from reshard.storage.stores.local import LocalStore
from tests.ranks import RankPool


def save(folder: str, codec: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    tensors: dict[str, Any] = {
        "float32": torch.randn(70, 90),
        "bfloat16": torch.randn(50, 40, 3).bfloat16(),
        "int64": torch.arange(1000),
        "empty": torch.empty(0, 5),
    }
    sharded = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}
    whole = {"scalar": torch.tensor(3.0), "replica": torch.randn(300), "step": 3, "words": {"a": ["b"]}}
    reshard.save({**sharded, **whole}, folder, codec=codec)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_damage_of_an_object_is_found_if_only_that_one_is_verified(ranks: RankPool, tmp_path: Path, codec: str) -> None:
    ranks.run(3, save, str(tmp_path), codec)
    store = LocalStore(tmp_path)
    manifest = NativeSource.find(store)
    assert manifest is not None
    index = manifest.index()
    names = [name for name, nbytes in index.objects if nbytes]
    assert len(names) == 3
    for name in names:
        path = tmp_path / name
        intact = path.read_bytes()
        others = set(names) - {name}
        for at in range(8, len(intact), max(1, len(intact) // 40)):
            path.write_bytes(intact[:at] + bytes([intact[at] ^ 1]) + intact[at + 1 :])
            damaged = verify(store, index)
            assert verify(store, index, only={name}) == damaged
            assert verify(store, index, only=others) == []
        path.write_bytes(intact)
        assert verify(store, index, only={name}) == []
        path.unlink()
        assert verify(store, index, only=others) == []
        path.write_bytes(intact)
